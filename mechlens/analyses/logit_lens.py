"""The logit lens: every layer read as if it were the last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.arguments import chosen, names_of
from mechlens.measures.readout import Readout, joined, read_out
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import MAX_POSITIONS, watch, watch_from
from mechlens.models.run.properties import check_adds_up, check_rows_alike, reads_alike_in
from mechlens.models.run.unembedding import bare_norm, check_streamed, final_norm, unembedding
from mechlens.models.run.user_hooks import user_hooks
from mechlens.models.weights.access import check_heads_add_up, head_outputs, is_tied
from mechlens.progress import progress_bar
from mechlens.results import LogitLensResult, ModelInfo, TunedLens, VectorLens, head_label, parse_heads
from mechlens.results.heads import Heads
from mechlens.text.batches import Batch, Pieces, cut, prompt_batch
from mechlens.text.prompts import Prompt
from mechlens.text.tokens import all_bos, own_bos_token_id, target_id, token_strings

COMPONENTS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "result": "blocks.{}.attn.hook_z",
}
_ADDED_TO = {"attn_out": "resid_pre", "mlp_out": "resid_mid", "result": "resid_pre"}
DECODERS = ("final_norm", "norm_only", "none")
STATISTICS = ("entropy", "kl_final", "kl_input", "log_prob", "rank")
"""What a lens says of each row beside its most likely tokens."""
_OWN_NAMES = ("final", "input", "next")
RESIDUAL_BYTES = 256 * 2**20
"""Memory for the residual vectors of one part of a long prompt; a single window may need more."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of the lens."""

    label: str
    layer: int
    head: int | None
    next_block: int
    """The first block that has yet to run on what this row reads."""

    @property
    def place(self) -> str:
        """The row of a lens on `resid_post` that lies at the same place of the stream."""
        return "embed" if self.next_block == 0 else str(self.next_block - 1)


def logit_lens(
    model: LensModel,
    prompt: Prompt,
    *,
    component: str = "resid_post",
    onto_stream: bool = False,
    heads: Heads | None = None,
    decoder: str | Callable[[Tensor], Tensor] | TunedLens = "final_norm",
    last_blocks: int = 0,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    top_k: int = 5,
    targets: str | int | Tensor | Sequence[Any] | Mapping[str, Any] = (),
    statistics: Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    memory_budget: int | None = None,
    progress: bool | None = None,
) -> LogitLensResult:
    """Read the residual stream after each layer, or what each layer adds to it, as a next-token distribution.

    Args:
        prompt: a text, several texts, or token ids (used as they are: BOS is yours to put). A row longer than
            the model's context is read in windows of that many tokens, which overlap by half; how much each
            position saw is in the result's `context_length`.
        component: `resid_post` (default), `resid_pre`, `resid_mid`, `attn_out`, `mlp_out`, or `result`, what
            each head adds to the stream (`z @ W_O`; the layer's `b_O` is nobody's).
        onto_stream: read `attn_out`, `mlp_out` or `result` together with the stream it is added to; False
            reads it alone.
        heads: for `result`, in the place of `layers`: which, such as `L5H5` or `(5, 5)`; None reads all of
            `layers`.
        decoder: what comes before `W_U` and `b_U`: `final_norm`, the model's last norm with statistics of
            this very vector; `norm_only`, the same without its learned scale and bias; `none`, nothing; a
            function of vectors `[1, pos, d_model]`; or a `TunedLens`. A soft-cap is always applied.
        last_blocks: how many of the model's last blocks the vectors of a row go through before the decoder.
            No block is run on what it made: the last row goes through none.
        layers: which to read; None reads all. Rows are in the order of the layers (and heads).
        positions: which to read; None reads all. In a padded batch they count padding.
        top_k: how many of the most likely tokens to keep.
        targets: further tokens whose rank and log-probability are wanted, one or several, as ids or as texts
            of one token; one for each position is a list within the list, or a tensor like the tokens. A
            mapping names them; else they are named as they are given, and those that differ by position
            `target_0`, ...
        statistics: which of `entropy`, `kl_final`, `kl_input`, `log_prob` and `rank` are wanted; None is all,
            an empty list none beside the most likely tokens. The others are not computed, and nan.
        attention_mask: of token ids `[batch, pos]`: 0 or False where they are padding, left or right.
        prepend_bos: for texts: None prepends BOS where the tokenizer has one.
        memory_budget: bytes for logits and what is made of them; None takes 64 MiB, on a GPU 1 GiB. It is
            halved when memory runs out, and exceeded when one position does not fit.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        Statistics for the row `embed` (block 0's `resid_pre`) and each layer (or head), in float32.

    Raises:
        ValueError: an unknown component, decoder or statistic, a component that the model does not have, a
            layer, head or position out of range, a target that is not one token (its pieces are shown), a
            decoder that needs `processing=False` or was trained for other weights, no tokens, ids out of
            range, a mask that is no padding, a model whose logits are more than norm, `W_U`, `b_U` and
            soft-cap, or one that scales what its heads write.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens", whose decoder is `norm_only`.
    Cost: one forward pass and one product with `W_U` per row, in tiles; no `[row, pos, d_vocab]` tensor
    exists. With `last_blocks=k` each row's vectors go through up to k more blocks (on a bridge: through all).
    """
    info = describe(model)
    batch = prompt_batch(model, prompt, attention_mask=attention_mask, prepend_bos=prepend_bos)
    n_layers = model.cfg.n_layers
    if component not in COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(COMPONENTS)}, but is {component!r}")
    if onto_stream and component not in _ADDED_TO:
        raise ValueError(f"onto_stream is for {', '.join(_ADDED_TO)}, but component is {component!r}")
    if not 0 <= last_blocks <= n_layers:
        raise ValueError(f"last_blocks must lie between 0 and the model's {n_layers}, but is {last_blocks}")
    if heads is not None and layers is not None:
        raise ValueError("heads say which layers are read: leave out layers, or leave out heads")
    rows = _rows(model, component, sorted(chosen("layer", layers, n_layers)), heads)
    read = chosen("position", positions, batch.tokens.shape[1])
    wanted = {name: _ids(model, target, batch.tokens) for name, target in _named(targets)}
    known = STATISTICS
    asked = known if statistics is None else names_of("statistic", statistics, known, may_be_empty=True)
    decode, decoder_name = _decoder(model, decoder, info)
    if isinstance(decoder, TunedLens) and (component not in ("resid_pre", "resid_post") or last_blocks):
        raise ValueError(
            "a tuned lens translates the stream between two blocks (resid_pre or resid_post), but this asks "
            f"for {component} with last_blocks={last_blocks}"
        )
    pieces = cut(batch, model.cfg.n_ctx, bos=own_bos_token_id(model.tokenizer))
    check_streamed(model, pieces.tokens)
    if onto_stream:
        check_adds_up(model, pieces.tokens)
    # what the model's own logits are read from is the last row already, or else comes behind it
    own = decoder == "final_norm" and component == "resid_post" and rows[-1].next_block == n_layers
    final = len(rows) - 1 if own else len(rows)
    tied = bool(is_tied(model))
    references = (final, 0) if tied and "kl_input" in asked else (final,)
    computed = {"kl" if name.startswith("kl") else name for name in asked if name != "kl_input" or tied}

    def decode_row(row: int, vectors: Tensor) -> Tensor:
        return final_norm(model, vectors) if row == final else decode(rows[row].place, vectors)

    targeted = torch.stack([batch.tokens, batch.tokens.roll(-1, 1), *wanted.values()], dim=-1)
    reader = unembedding(model)
    found: list[Readout] = []
    cells: list[Tensor] = []
    n_cells = int(batch.mask[:, list(read)].sum())
    run_apart = list(_parts(model, batch, pieces, read, vector_size=(len(rows) + 1) * model.cfg.d_model))
    if len(run_apart) > 1 and len(pieces.tokens) > 1:
        check_rows_alike(model, pieces.tokens)
    with progress_bar(desc="logit lens", unit="token", total=n_cells, progress=progress) as shown:
        for part in run_apart:
            vectors = _vectors(model, part, rows, component, onto_stream, last_blocks)[: final + 1]
            with torch.inference_mode():
                readout = read_out(
                    vectors,
                    reader,
                    targets=targeted[part.batch, part.pos].to(vectors.device),
                    references=references,
                    top_k=top_k,
                    statistics=computed,
                    decode=decode_row,
                    memory_budget=memory_budget,
                    advance=shown.update,
                )
            found.append(readout)
            cells.append(part.cell)
    return _result(
        found,
        torch.cat(cells),
        ("final", "input", "next", *wanted),
        final=final,
        n_rows=len(rows),
        read_text=partial(token_strings, model),
        statistics=tuple(name for name in STATISTICS if name in asked),
        model=info,
        tokens=batch.tokens,
        mask=batch.mask,
        positions=read,
        context_length=torch.where(batch.mask, pieces.offset + 1, 0)[:, list(read)],
        target_ids={name: ids[:, list(read)] for name, ids in wanted.items()},
        rows=tuple(row.label for row in rows),
        component=component,
        onto_stream=onto_stream,
        decoder=decoder_name,
        last_blocks=last_blocks,
        prepend_bos=all_bos(model.tokenizer, batch.first_tokens),
    )


def lens_vector(
    model: LensModel,
    vector: Float[Tensor, "*vector d_model"],
    *,
    decoder: str | Callable[[Tensor], Tensor] = "final_norm",
    top_k: int = 10,
    targets: str | int | Sequence[str | int] | Mapping[str, str | int] = (),
    memory_budget: int | None = None,
) -> VectorLens:
    """Read any vector of the residual stream's width as a next-token distribution.

    Args:
        vector: one or several, such as a steering vector, a row of `W_out` or a feature's direction.
        decoder: `final_norm`, `norm_only`, `none` or a function, as for `logit_lens`.
        top_k: how many of the most likely tokens to keep.
        targets: further tokens whose rank and log-probability are wanted, as ids or as texts of one token.
        memory_budget: as for `logit_lens`.

    Raises:
        ValueError: vectors of another width, and as `logit_lens`.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Cost: one product with `W_U` per vector.
    """
    info = describe(model)
    if vector.numel() == 0 or vector.shape[-1] != info.d_model:
        raise ValueError(
            f"a vector has the model's {info.d_model} elements, but this is {tuple(vector.shape)}"
        )
    if isinstance(decoder, TunedLens):
        raise ValueError("a tuned lens translates rows of a run: translate the vector first, then read it")
    decode, decoder_name = _decoder(model, decoder, info)
    vectors = vector.detach().to(model.W_U).reshape(-1, info.d_model)
    asked = {name: target_id(model, target) for name, target in _named(targets)}
    ids = torch.tensor(list(asked.values()), dtype=torch.long)
    with torch.inference_mode():
        found = read_out(
            vectors[None],
            unembedding(model),
            targets=ids.expand(len(vectors), -1).to(vectors.device),
            top_k=top_k,
            statistics=("entropy", "log_prob", "rank"),
            decode=lambda _, some: decode("", some),
            memory_budget=memory_budget,
        )
    assert found.entropy is not None
    assert found.log_prob is not None
    assert found.rank is not None
    seen = torch.cat([found.top_ids.cpu().flatten(), ids]).unique()
    return VectorLens(
        model=info,
        vectors=vectors.float().cpu(),
        decoder=decoder_name,
        top_ids=found.top_ids[0].cpu(),
        top_probabilities=found.top_probabilities[0].cpu(),
        entropy=found.entropy[0].cpu(),
        log_prob={name: found.log_prob[0, :, at].cpu() for at, name in enumerate(asked)},
        rank={name: found.rank[0, :, at].float().cpu() for at, name in enumerate(asked)},
        strings=dict(zip(map(str, seen.tolist()), token_strings(model, seen), strict=True)),
    )


# -- what is read ----------------------------------------------------------------------------------


def _rows(
    model: LensModel,
    component: str,
    layers: Sequence[int],
    heads: Heads | None,
) -> list[_Row]:
    if heads is not None and component != "result":
        raise ValueError(f"heads are for the component 'result', but component is {component!r}")
    rows = [_Row("embed", 0, None, 0)]
    if component != "result":
        after = 0 if component == "resid_pre" else 1
        return rows + [_Row(str(layer), layer, None, layer + after) for layer in layers]
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if heads is None:
        pairs = [(layer, head) for layer in layers for head in range(n_heads)]
    else:
        pairs = sorted(parse_heads(heads))
        for layer, head in pairs:
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise ValueError(
                    f"there is no head {head_label(layer, head)}: the model has {n_layers} layers with "
                    f"{n_heads} heads each"
                )
    if not pairs:
        raise ValueError("no head is asked for")
    return rows + [_Row(head_label(layer, head), layer, head, layer + 1) for layer, head in pairs]


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Some of the pieces, and the positions that are read in them."""

    tokens: Int[Tensor, "piece width"]
    piece: Int[Tensor, " here"]
    """Row of `tokens`, for each position that is read."""
    offset: Int[Tensor, " here"]
    batch: Int[Tensor, " here"]
    """Row of the batch that it belongs to."""
    pos: Int[Tensor, " here"]
    cell: Int[Tensor, " here"]
    """Its place in `[batch, read]`, flattened."""


def _parts(
    model: LensModel, batch: Batch, pieces: Pieces, read: Sequence[int], *, vector_size: int
) -> Iterator[_Part]:
    """As many pieces at a time as one forward pass and `RESIDUAL_BYTES` take."""
    columns = torch.tensor(read)
    row, column = batch.mask[:, columns].nonzero(as_tuple=True)
    if not len(row):
        raise ValueError("every position that is asked for is padding")
    pos = columns[column]
    piece, offset = pieces.piece[row, pos], pieces.offset[row, pos]
    for together, width in _runs(model, pieces, piece, offset):
        at_once = max(1, min(MAX_POSITIONS, RESIDUAL_BYTES // (4 * vector_size)) // width)
        for some in together.split(at_once):
            here = torch.isin(piece, some).nonzero()[:, 0]
            yield _Part(
                pieces.tokens[some, :width],
                torch.searchsorted(some, piece[here]),
                offset[here],
                row[here],
                pos[here],
                row[here] * len(read) + column[here],
            )


def _runs(
    model: LensModel, pieces: Pieces, piece: Int[Tensor, " here"], offset: Int[Tensor, " here"]
) -> list[tuple[Int[Tensor, " some"], int]]:
    """The pieces that are read, those first that run together, and how long they are run.

    Shorter ones are padded, and what lies behind the last position that is read is left out, where the model
    reads a token alike whatever comes behind it.
    """
    used, lengths = piece.unique(), pieces.lengths
    deepest = int(offset.max()) + 1
    width = int(lengths[used].max())
    if not user_hooks(model):
        shortest = used[lengths[used].argmin()]
        # one piece takes as long to try as to run
        padded = len(used) > 1 and reads_alike_in(model, pieces.tokens[shortest, : lengths[shortest]], width)
        if len(used) == 1 or (padded and deepest == width):
            return [(used, width)]
        longest = used[lengths[used].argmax()]
        if padded and reads_alike_in(model, pieces.tokens[longest, :deepest], width):
            return [(used, deepest)]
    return [(used[lengths[used] == length], int(length)) for length in lengths[used].unique()]


def _vectors(
    model: LensModel, part: _Part, rows: Sequence[_Row], component: str, onto_stream: bool, last_blocks: int
) -> Float[Tensor, "row here d_model"]:
    """What each row reads, and last what the model's own logits are read from."""
    n_layers = model.cfg.n_layers
    n_pieces, width = part.tokens.shape
    # blocks attend to every position, so these vectors are wanted at all of them
    everywhere = last_blocks > 0
    piece = (
        repeat(torch.arange(n_pieces), "piece -> (piece width)", width=width) if everywhere else part.piece
    )
    offset = (
        repeat(torch.arange(width), "width -> (piece width)", piece=n_pieces) if everywhere else part.offset
    )
    vectors = torch.zeros(
        len(rows) + 1, len(piece), model.cfg.d_model, dtype=model.W_U.dtype, device=model.W_U.device
    )
    checked: dict[int, Tensor] = {}
    """`z` of the layers whose heads are read, until it is seen that these add up."""
    readers: dict[str, list[tuple[int, int | None]]] = {"blocks.0.hook_resid_pre": [(0, None)]}
    for index, row in enumerate(rows[1:], start=1):
        readers.setdefault(COMPONENTS[component].format(row.layer), []).append((index, row.head))
        if onto_stream:
            stream = _ADDED_TO[component]
            if stream == "resid_mid" and "blocks.0.hook_resid_mid" not in model.hook_dict:
                stream = "resid_pre"  # parallel blocks add both to what came in
            readers.setdefault(COMPONENTS[stream].format(row.layer), []).append((index, None))
    readers.setdefault(f"blocks.{n_layers - 1}.hook_resid_post", []).append((len(rows), None))

    def add(name: str, activation: Tensor) -> None:
        some = activation[piece.to(activation.device), offset.to(activation.device)]
        indices = [index for index, _ in readers[name]]
        heads = [head for _, head in readers[name] if head is not None]
        if heads:
            layer = rows[indices[0]].layer
            checked[layer] = some
            written = head_outputs(model, layer, some, heads)
            vectors[indices] += rearrange(written, "here head d_model -> head here d_model").to(vectors.dtype)
        else:
            vectors[indices] += some

    def check(layer: int, attn_out: Tensor) -> None:
        some = attn_out[piece.to(attn_out.device), offset.to(attn_out.device)]
        check_heads_add_up(model, layer, checked.pop(layer), some)

    # in a list, since what is added to the stream may be read as well
    watched = {name: [partial(add, name)] for name in readers}
    if component == "result":
        for layer in {row.layer for row in rows[1:]}:
            watched.setdefault(COMPONENTS["attn_out"].format(layer), []).append(partial(check, layer))
    watch(model, part.tokens, {name: partial(_each, reads) for name, reads in watched.items()})
    if not everywhere:
        return vectors
    with torch.inference_mode():
        at = part.piece.to(vectors.device), part.offset.to(vectors.device)
        whole = vectors.unflatten(1, (n_pieces, width))
        done = [
            _through(model, each, row.next_block, last_blocks)[at]
            for each, row in zip(whole, rows, strict=False)
        ]
        return torch.stack([*done, whole[-1][at]])


def _each(reads: Sequence[Callable[[Tensor], None]], activation: Tensor) -> None:
    for read in reads:
        read(activation)


def _through(
    model: LensModel, residual: Float[Tensor, "piece pos d_model"], next_block: int, last_blocks: int
) -> Float[Tensor, "piece pos d_model"]:
    """The residual after those of the last blocks that have yet to run on it."""
    n_layers = model.cfg.n_layers
    first = max(next_block, n_layers - last_blocks)
    if first == n_layers:
        return residual
    kept: list[Tensor] = []
    watch_from(model, first, residual, {f"blocks.{n_layers - 1}.hook_resid_post": kept.append})
    return kept.pop()


# -- how it is read --------------------------------------------------------------------------------


def _decoder(
    model: LensModel, decoder: str | Callable[[Tensor], Tensor] | TunedLens, info: ModelInfo
) -> tuple[Callable[[str, Tensor], Tensor], str]:
    """What is done to the vectors of a row, by its place in the stream, and what it is called."""
    if isinstance(decoder, TunedLens):
        decoder.check_fits(info)
        return lambda place, vectors: final_norm(model, decoder.translate(place, vectors)), "tuned_lens"
    if callable(decoder):
        return partial(_own_decoder, decoder), getattr(decoder, "__name__", type(decoder).__name__)
    if decoder not in DECODERS:
        raise ValueError(
            f"decoder must be one of {', '.join(DECODERS)}, a function or a TunedLens, but is {decoder!r}"
        )
    if decoder == "final_norm":
        return lambda _, vectors: final_norm(model, vectors), decoder
    if info.processing is not False:
        raise ValueError(
            f"the decoder {decoder!r} leaves out the last norm's learned scale, which these weights have in "
            "W_U: load the model with processing=False"
        )
    if decoder == "norm_only":
        return lambda _, vectors: bare_norm(model, vectors), decoder
    return lambda _, vectors: vectors, decoder


def _own_decoder(decoder: Callable[[Tensor], Tensor], _: str, vectors: Tensor) -> Tensor:
    """What a user's function makes of vectors; a copy of them, because some rows are decoded again."""
    decoded = decoder(vectors.clone())
    if not isinstance(decoded, Tensor) or decoded.shape != vectors.shape:
        came = tuple(decoded.shape) if isinstance(decoded, Tensor) else type(decoded).__name__
        raise ValueError(
            f"a decoder gives vectors as many and as wide as it gets, {tuple(vectors.shape)}, but this one "
            f"gave {came}"
        )
    return decoded


def _named(targets: Any) -> Iterator[tuple[str, Any]]:
    """Every target with its name: the one it was given, itself, or its place where it differs by position."""
    if isinstance(targets, Mapping):
        for name in _OWN_NAMES:
            if name in targets:
                raise ValueError(f"every lens has a token {name!r}: give the target another name")
        yield from targets.items()
        return
    if isinstance(targets, (str, Integral, Tensor)):
        targets = [targets]
    given: set[str] = set()
    for index, target in enumerate(targets):
        # an id and a text may read alike
        plain = _is_one(target) and str(target) not in {*_OWN_NAMES, *given}
        name = str(target) if plain else f"target_{index}"
        given.add(name)
        yield name, target


def _is_one(target: Any) -> bool:
    """Whether a target is the same token at every position."""
    return isinstance(target, (str, Integral))


def _ids(model: LensModel, target: Any, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """A target's id at each position."""
    if isinstance(target, Tensor):
        target = target.tolist()
    if _is_one(target) or not isinstance(target, Sequence):
        return torch.full_like(tokens, target_id(model, target))
    nested = target if target and isinstance(target[0], (list, tuple)) else [target]
    if [len(row) for row in nested] != [tokens.shape[1]] * len(tokens):
        raise ValueError(
            f"a target for each position is wanted for tokens {tuple(tokens.shape)}, but there are "
            f"{' + '.join(str(len(row)) for row in nested)}: give one id or text per position of each row"
        )
    return torch.tensor([[target_id(model, each) for each in row] for row in nested])


# -- what comes back -------------------------------------------------------------------------------


def _result(
    found: Sequence[Readout],
    cells: Int[Tensor, " here"],
    names: Sequence[str],
    *,
    final: int,
    n_rows: int,
    statistics: tuple[str, ...],
    read_text: Callable[[Tensor], Sequence[str]],
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    positions: tuple[int, ...],
    target_ids: dict[str, Tensor],
    **facts: Any,
) -> LogitLensResult:
    """The readouts of all parts, with batch and position apart again and nan where nothing was read."""
    shape, whole = (len(tokens), len(positions)), joined(found, dim=1)
    columns = list(positions)

    def apart(values: Tensor | None, fill: float, *more: int) -> Tensor:
        """`[row, batch, read, ...]`; nan where nobody asked."""
        if values is None:
            return torch.full((n_rows, *shape, *more), fill, dtype=torch.float32)
        values = rearrange(values.cpu(), "row here ... -> here row ...")
        grid = values.new_full((shape[0] * shape[1], *values.shape[1:]), fill)
        grid[cells] = values
        return rearrange(grid, "(batch read) row ... -> row batch read ...", batch=shape[0])

    def told(name: str, values: Tensor | None) -> Tensor:
        return apart(values if name in statistics else None, torch.nan)[:n_rows]

    # absent where nothing follows in the row: at its last token, and before padding
    followed = torch.nn.functional.pad(mask[:, 1:] & mask[:, :-1], (0, 1))[:, columns]

    def by_name(values: Tensor) -> dict[str, Tensor]:
        absent = {"next": ~followed}
        return {
            name: values[:n_rows, ..., index].masked_fill(absent.get(name, torch.tensor(False)), torch.nan)
            for index, name in enumerate(names)
        }

    log_prob = apart(whole.log_prob, torch.nan, len(names))
    # a distribution that is no number has no ranks either
    nowhere = apart(whole.top_probabilities, torch.nan)[..., :1].isnan()
    rank = apart(None if whole.rank is None else whole.rank.float(), torch.nan, len(names))
    rank = rank.masked_fill(nowhere[: len(rank)], torch.nan)
    top_ids = apart(whole.top_ids, 0)
    kl_final, kl_input = (None, None) if whole.kl is None else (whole.kl[..., 0], whole.kl[..., -1])
    tied = whole.kl is not None and whole.kl.shape[-1] == 2
    seen = torch.cat([top_ids.flatten(), tokens.flatten(), *(ids.flatten() for ids in target_ids.values())])
    seen = seen.unique()
    return LogitLensResult(
        tokens=tokens,
        mask=mask,
        positions=positions,
        target_ids=target_ids,
        top_ids=top_ids[:n_rows],
        top_probabilities=apart(whole.top_probabilities, torch.nan)[:n_rows],
        entropy=told("entropy", whole.entropy),
        kl_final=told("kl_final", kl_final),
        kl_input=told("kl_input", kl_input if tied else None),
        final_ids=top_ids[final, ..., 0],
        log_prob=by_name(log_prob),
        rank=by_name(rank),
        statistics=statistics,
        strings=dict(zip(map(str, seen.tolist()), read_text(seen), strict=True)),
        **facts,
    )
