"""The logit lens: what each layer would predict if it were the last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from mechlens.analyses.logit_lens.decoders import Decoder, LastBlocks, decoder_name, decoding
from mechlens.analyses.logit_lens.reading import Read, Reading, Row, read_vectors
from mechlens.analyses.logit_lens.targets import Targets, named_targets, target_ids
from mechlens.analyses.logit_lens.windows import Part, window_parts
from mechlens.arguments import chosen, names_of
from mechlens.measures.readout import Readout, joined, read_out
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.properties import check_adds_up, check_rows_alike
from mechlens.models.run.unembedding import check_streamed, final_norm, unembedding
from mechlens.models.weights.access import is_tied
from mechlens.progress import progress_bar
from mechlens.results import LogitLensResult, TunedLens
from mechlens.results.lens import OWN_TOKENS, STATISTICS
from mechlens.text.batches import Batch, cut, prompt_batch
from mechlens.text.prompts import Prompt
from mechlens.text.tokens import all_bos, own_bos_token_id, token_strings


def logit_lens(
    model: LensModel,
    prompt: Prompt | Batch,
    read: Read = "resid_post",
    *,
    decoder: Decoder = "final_norm",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    top_k: int = 5,
    targets: Targets = (),
    statistics: str | Sequence[str] | None = None,
) -> LogitLensResult:
    """Read each layer's residual stream, or what it adds to the stream, as a next-token distribution.

    Args:
        prompt: a text, several texts, or token ids `[batch, pos]`; ids are used as they are. BOS is prepended
            to texts if the tokenizer has one; `prompt_batch(model, texts, prepend_bos=False)` leaves it out.
            Give padded ids with their mask, as a tokenizer returns them. A row longer than the model's
            context is read in windows that overlap by half; `context_length` is how much context each
            position had.
        read: `resid_post`, `resid_pre`, `resid_mid`, `attn_out`, `mlp_out`, or `result`, what each head adds
            to the stream (`z @ W_O`; `b_O` is not attributed to any head). `resid_pre+attn_out`,
            `resid_mid+mlp_out` and so on read an output together with the stream that it is added to. Heads
            are labels or tuples, one or several: `L5H5`, `(5, 5)`, `["resid_pre+L1H2", "resid_pre+L3H5"]`.
        decoder: what comes before `W_U` and `b_U`: `final_norm`, the model's final norm with the statistics
            of the vector itself; `norm_only`, the same without learned scale and bias; `none`; a function of
            vectors `[1, pos, d_model]`; a `TunedLens`; or `LastBlocks(n)`. A soft-cap is always applied.
        layers: layers to read, negative ones from the end; None reads all.
        positions: positions to read, negative ones from the end, counting padding; None reads all.
        top_k: number of most likely tokens to keep.
        targets: tokens to give the rank and log-probability of, besides the model's top token, the input
            token and the next token: one or several, as texts of one token or ids. For one token per
            position, give a list within the list, or a tensor shaped like the tokens. A mapping names them.
        statistics: which of `entropy`, `kl_final`, `kl_input`, `log_prob` (nats) and `rank` (from 1) to
            compute; the others are nan. None is all; an empty list computes only the most likely tokens.

    Returns:
        Statistics `[row, batch, read]` in float32 for the row `embed` (block 0's `resid_pre`) and each layer
        or head.

    Raises:
        ArgumentError: `read`, `decoder` or `top_k` is none of the above.
        ValueError: a layer, head, position, token id or statistic is out of range; a target is not one token;
            the model does not have what is read; the decoder needs `processing=False` or belongs to other
            weights; or the model's logits involve more than its final norm, `W_U`, `b_U` and a soft-cap.

    Example:
        >>> lens = mechlens.logit_lens(model, "The captain of the", targets=" ship")
        >>> lens.rows
        ('embed', '0', '1', '2', '3')
        >>> lens.rank[" ship"].shape
        torch.Size([5, 1, 6])

    References: nostalgebraist 2020, "interpreting GPT: the logit lens", whose decoder is `norm_only`.
    Cost: one forward pass and, per row, one product with `W_U`, in tiles; no `[row, pos, d_vocab]` tensor is
    created.
    """
    info, reading = describe(model), Reading.of(read)
    reading.check(model)
    rows = reading.rows(model, layers)
    batch = prompt if isinstance(prompt, Batch) else prompt_batch(model, prompt)
    columns = chosen("position", positions, batch.tokens.shape[1])
    wanted = {name: target_ids(model, each, batch.tokens) for name, each in named_targets(targets)}
    asked: tuple[str, ...] = STATISTICS
    if statistics is not None:
        asked = names_of("statistic", statistics, STATISTICS, may_be_empty=True)
    decode = decoding(model, decoder, info)
    _check_tuned(decoder, reading)
    bos = own_bos_token_id(model.tokenizer)
    pieces = cut(batch, model.cfg.n_ctx, bos=bos)
    check_streamed(model, pieces.tokens)
    if reading.stream is not None:
        check_adds_up(model, pieces.tokens)
    wide = (len(rows) + 1) * model.cfg.d_model
    parts = list(window_parts(model, batch, pieces, columns, vector_size=wide))
    if len(parts) > 1 and len(pieces.tokens) > 1:
        check_rows_alike(model, pieces.tokens)
    lens = _Lens(model, rows, reading, decoder, decode, asked, top_k, (*OWN_TOKENS, *wanted))
    ids = torch.stack([batch.tokens, batch.tokens.roll(-1, 1), *wanted.values()], dim=-1)
    found = lens.read_out(parts, ids, int(batch.mask[:, list(columns)].sum()))
    values = lens.values(found, torch.cat([part.cell for part in parts]), batch.mask, columns)
    seen = [values["top_ids"], values["final_ids"], batch.tokens, *wanted.values()]
    tokens = torch.cat([some.flatten() for some in seen]).unique()
    return LogitLensResult(
        model=info,
        tokens=batch.tokens,
        mask=batch.mask,
        positions=columns,
        context_length=torch.where(batch.mask, pieces.offset + 1, 0)[:, list(columns)],
        rows=tuple(row.label for row in rows),
        read=reading.name,
        decoder=decoder_name(decoder),
        statistics=lens.statistics,
        target_ids={name: some[:, list(columns)] for name, some in wanted.items()},
        strings=dict(zip(map(str, tokens.tolist()), token_strings(model, tokens), strict=True)),
        prepend_bos=all_bos(model.tokenizer, batch.first_tokens),
        **values,
    )


def _check_tuned(decoder: Decoder, reading: Reading) -> None:
    tuned = isinstance(decoder, TunedLens)
    inside = isinstance(decoder, LastBlocks) and isinstance(decoder.decoder, TunedLens)
    if inside or (tuned and reading.name not in ("resid_pre", "resid_post")):
        raise ValueError(
            "a tuned lens translates the stream between two blocks: it decodes resid_pre or resid_post, and "
            f"cannot follow LastBlocks, but read is {reading.name}"
        )


@dataclasses.dataclass(frozen=True)
class _Lens:
    """The settings of a lens."""

    model: LensModel
    rows: Sequence[Row]
    reading: Reading
    decoder: Decoder
    decode: Callable[[str, Tensor], Tensor]
    asked: Sequence[str]
    top_k: int
    names: tuple[str, ...]
    """Names of the tokens that get a rank."""

    @property
    def statistics(self) -> tuple[str, ...]:
        return tuple(name for name in STATISTICS if name in self.asked)

    @property
    def last_blocks(self) -> int:
        return self.decoder.count if isinstance(self.decoder, LastBlocks) else 0

    @property
    def final(self) -> int:
        """The row that gives the model's own logits: the last one, or an extra one after it."""
        decoder = self.decoder.decoder if isinstance(self.decoder, LastBlocks) else self.decoder
        at_end = self.rows[-1].next_block == self.model.cfg.n_layers
        own = decoder == "final_norm" and self.reading.name == "resid_post" and at_end
        return len(self.rows) - 1 if own else len(self.rows)

    def decode_row(self, row: int, vectors: Tensor) -> Tensor:
        if row == self.final:
            return final_norm(self.model, vectors)
        return self.decode(self.rows[row].place, vectors)

    def read_out(self, parts: Sequence[Part], ids: Int[Tensor, "batch pos token"], n_cells: int) -> Readout:
        """The statistics of all parts, concatenated."""
        tied = bool(is_tied(self.model))
        references = (self.final, 0) if tied and "kl_input" in self.asked else (self.final,)
        computed = {
            "kl" if name.startswith("kl") else name for name in self.asked if name != "kl_input" or tied
        }
        reader, found = unembedding(self.model), []
        with progress_bar(desc="logit lens", unit="token", total=n_cells, progress=None) as shown:
            for part in parts:
                vectors = read_vectors(self.model, part, self.rows, self.reading, self.last_blocks)
                with torch.inference_mode():
                    readout = read_out(
                        vectors[: self.final + 1],
                        reader,
                        targets=ids[part.batch, part.pos].to(vectors.device),
                        references=references,
                        top_k=self.top_k,
                        statistics=computed,
                        decode=self.decode_row,
                        advance=shown.update,
                    )
                found.append(readout)
        return joined(found, dim=1)

    def values(
        self,
        found: Readout,
        cells: Int[Tensor, " here"],
        mask: Bool[Tensor, "batch pos"],
        columns: Sequence[int],
    ) -> dict[str, Any]:
        """The tensors of the result, `[row, batch, read]`; nan where nothing was read or computed."""
        n_rows, shape = len(self.rows), (len(mask), len(columns))

        def apart(values: Tensor | None, fill: float, *more: int) -> Tensor:
            if values is None:
                return torch.full((n_rows, *shape, *more), fill, dtype=torch.float32)
            values = rearrange(values.cpu(), "row here ... -> here row ...")
            grid = values.new_full((shape[0] * shape[1], *values.shape[1:]), fill)
            grid[cells] = values
            return rearrange(grid, "(batch read) row ... -> row batch read ...", batch=shape[0])

        def told(name: str, values: Tensor | None) -> Tensor:
            return apart(values if name in self.asked else None, torch.nan)[:n_rows]

        # no next token at the end of a row or before padding
        followed = torch.nn.functional.pad(mask[:, 1:] & mask[:, :-1], (0, 1))[:, list(columns)]

        def by_name(values: Tensor) -> dict[str, Tensor]:
            absent = {"next": ~followed}
            return {
                name: values[:n_rows, ..., at].masked_fill(absent.get(name, torch.tensor(False)), torch.nan)
                for at, name in enumerate(self.names)
            }

        log_prob = apart(found.log_prob, torch.nan, len(self.names))
        # a nan distribution has no ranks
        nowhere = apart(found.top_probabilities, torch.nan)[..., :1].isnan()
        rank = apart(None if found.rank is None else found.rank.float(), torch.nan, len(self.names))
        rank = rank.masked_fill(nowhere[: len(rank)], torch.nan)
        top_ids = apart(found.top_ids, 0)
        kl_final, kl_input = (None, None) if found.kl is None else (found.kl[..., 0], found.kl[..., -1])
        has_input = found.kl is not None and found.kl.shape[-1] == 2
        return {
            "top_ids": top_ids[:n_rows],
            "top_probabilities": apart(found.top_probabilities, torch.nan)[:n_rows],
            "entropy": told("entropy", found.entropy),
            "kl_final": told("kl_final", kl_final),
            "kl_input": told("kl_input", kl_input if has_input else None),
            "final_ids": top_ids[self.final, ..., 0],
            "log_prob": by_name(log_prob),
            "rank": by_name(rank),
        }
