"""The logit lens: every layer read as if it were the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.vocabulary import Readout, read_out
from mechlens.models.protocol import LensModel, describe
from mechlens.models.runs import bare_norm, final_norm, reads_as_streamed, soft_cap, watch
from mechlens.models.weights import is_tied
from mechlens.prompts import own_bos_token_id, prompt_tokens, target_id, token_strings
from mechlens.results import LogitLensResult

COMPONENTS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
}
_ADDED_TO = {"attn_out": "resid_pre", "mlp_out": "resid_mid"}
DECODERS = ("final_norm", "norm_only", "none")


def logit_lens(
    model: LensModel,
    prompt: str | Int[Tensor, "*batch pos"],
    *,
    component: str = "resid_post",
    onto_stream: bool = False,
    decoder: str | Callable[[Tensor], Tensor] = "final_norm",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    top_k: int = 5,
    targets: Sequence[str | int] = (),
    prepend_bos: bool | None = None,
) -> LogitLensResult:
    """Read the residual stream after each layer, or what each layer adds to it, as a next-token distribution.

    Args:
        prompt: a text, or token ids (used as they are: BOS is yours to put), all rows equally long.
        component: `resid_post` (default), `resid_pre`, `resid_mid`, `attn_out` or `mlp_out`.
        onto_stream: read `attn_out` or `mlp_out` together with the stream it is added to.
        decoder: what comes before `W_U` and `b_U`: `final_norm`, the model's last norm with statistics of
            this very vector; `norm_only`, the same without its learned scale and bias; `none`, nothing; or a
            function of vectors `[row, pos, d_model]`. A soft-cap of the model is always applied.
        layers: which to read, in increasing order; None reads all.
        positions: which to read; None reads all.
        top_k: how many of the most likely tokens to keep.
        targets: further tokens, as ids or as texts of one token, whose rank and log-probability are wanted.
        prepend_bos: for a text: None prepends BOS where the tokenizer has one.

    Returns:
        Statistics for the row `embed` (block 0's `resid_pre`) and each layer.

    Raises:
        ValueError: an unknown component or decoder, a component that the model does not have, a layer or
            position out of range, a target that is not one token (its pieces are shown), a decoder that
            needs `processing=False`, or a model whose logits are more than norm, `W_U`, `b_U` and soft-cap.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens", whose decoder is `norm_only`.
    Cost: one forward pass and one product with `W_U` per row; no `[row, pos, d_vocab]` tensor exists.
    """
    info = describe(model)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    chosen = _chosen("layer", layers, model.cfg.n_layers)
    read = _chosen("position", positions, tokens.shape[1])
    ids = [target_id(model, target) for target in targets]
    if component not in COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(COMPONENTS)}, but is {component!r}")
    if onto_stream and component not in _ADDED_TO:
        raise ValueError(f"onto_stream is for {' and '.join(_ADDED_TO)}, but component is {component!r}")
    decode = _decoder(model, decoder, info.processing)
    if not reads_as_streamed(model, tokens[:1, :8]):
        raise ValueError(
            "this model's logits are more than its last norm, W_U, b_U and a soft-cap: a lens would not show "
            "what it predicts"
        )

    kept = _residuals(model, tokens, component, onto_stream, chosen, read)
    rows = torch.stack([kept["embed"], *(kept[str(layer)] for layer in chosen), kept["final"]])
    batch = tokens.shape[0]
    here = tokens[:, list(read)]
    after = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)[:, list(read)]
    wanted = torch.stack([here, after, *(torch.full_like(here, i) for i in ids)], dim=-1).flatten(0, 1)
    last = len(rows) - 1

    def decode_rows(vectors: Tensor) -> Tensor:
        # the reference is the model's own distribution, whatever the lens
        return torch.cat([decode(vectors[:last]), final_norm(model, vectors[last:])])

    with torch.inference_mode():
        found = read_out(
            rows.flatten(1, 2),
            model.W_U,
            model.b_U,
            targets=wanted.to(rows.device),
            references=(last, 0),
            top_k=top_k,
            soft_cap=soft_cap(model),
            decode=decode_rows,
        )
    names = ["final", "input", "next", *(str(i) for i in ids)]
    seen = torch.cat([found.top_ids.cpu().flatten(), tokens.flatten(), torch.tensor(ids, dtype=torch.long)])
    seen = seen.unique()
    return _result(
        found,
        batch,
        names,
        strings=dict(zip(map(str, seen.tolist()), token_strings(model, seen), strict=True)),
        model=info,
        tokens=tokens,
        positions=read,
        rows=("embed", *(str(layer) for layer in chosen)),
        component=component,
        onto_stream=onto_stream,
        decoder=decoder if isinstance(decoder, str) else getattr(decoder, "__name__", type(decoder).__name__),
        tied=is_tied(model),
        bos=own_bos_token_id(model.tokenizer),
    )


def _residuals(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    component: str,
    onto_stream: bool,
    layers: Sequence[int],
    read: Sequence[int],
) -> dict[str, Float[Tensor, "batch read d_model"]]:
    """By row of the lens: `embed`, each layer, and `final`, what the model's own logits are read from."""
    kept: dict[str, Tensor] = {}
    positions = torch.tensor(read)

    def keep(rows: Sequence[str], activation: Tensor) -> None:
        some = activation[:, positions.to(activation.device)]
        for row in rows:
            kept[row] = kept[row] + some if row in kept else some

    wanted: dict[str, list[str]] = {}
    for layer in layers:
        wanted.setdefault(COMPONENTS[component].format(layer), []).append(str(layer))
        if onto_stream:
            stream = _ADDED_TO[component]
            if stream == "resid_mid" and "blocks.0.hook_resid_mid" not in model.hook_dict:
                stream = "resid_pre"  # parallel blocks add both to what came in
            wanted.setdefault(COMPONENTS[stream].format(layer), []).append(str(layer))
    wanted.setdefault(COMPONENTS["resid_pre"].format(0), []).append("embed")
    wanted.setdefault(COMPONENTS["resid_post"].format(model.cfg.n_layers - 1), []).append("final")
    watch(model, tokens, {name: partial(keep, rows) for name, rows in wanted.items()})
    return kept


def _decoder(
    model: LensModel, decoder: str | Callable[[Tensor], Tensor], processing: bool | None
) -> Callable[[Tensor], Tensor]:
    if callable(decoder):
        return decoder
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)} or a function, but is {decoder!r}")
    if decoder == "final_norm":
        return lambda vectors: final_norm(model, vectors)
    if processing is not False:
        raise ValueError(
            f"the decoder {decoder!r} leaves out the last norm's learned scale, which these weights have in "
            "W_U: load the model with processing=False"
        )
    return (
        (lambda vectors: bare_norm(model, vectors)) if decoder == "norm_only" else (lambda vectors: vectors)
    )


def _chosen(what: str, given: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Indices from 0, negative ones counted from the end."""
    if given is None:
        return tuple(range(count))
    for index in given:
        if not -count <= index < count:
            raise ValueError(f"there is no {what} {index}: there are {count}")
    if not given:
        raise ValueError(f"no {what} is asked for; there are {count}")
    chosen = tuple(index % count for index in given)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"the same {what} is asked for twice: {tuple(given)}")
    return chosen


def _result(
    found: Readout, batch: int, names: Sequence[str], *, tied: bool | None, bos: int | None, **facts: Any
) -> LogitLensResult:
    """The readout without its last row, which was the reference, with batch and position apart again."""

    def apart(values: Tensor) -> Tensor:
        return values.cpu()[:-1].unflatten(1, (batch, -1))

    log_prob, rank = apart(found.log_prob), apart(found.rank).float()
    n_pos = facts["tokens"].shape[1]
    unlabelled = torch.tensor([position == n_pos - 1 for position in facts["positions"]])
    log_probs, ranks = {}, {}
    for index, name in enumerate(names):
        absent = unlabelled if name == "next" else torch.zeros_like(unlabelled)
        log_probs[name] = log_prob[..., index].masked_fill(absent, torch.nan)
        ranks[name] = rank[..., index].masked_fill(absent, torch.nan)
    kl_input = apart(found.kl[1])
    return LogitLensResult(
        top_ids=apart(found.top_ids),
        top_probabilities=apart(found.top_probabilities),
        entropy=apart(found.entropy),
        kl_final=apart(found.kl[0]),
        kl_input=kl_input if tied else torch.full_like(kl_input, torch.nan),
        final_ids=found.top_ids.cpu()[-1, :, 0].unflatten(0, (batch, -1)),
        log_prob=log_probs,
        rank=ranks,
        prepend_bos=bos is not None and bool((facts["tokens"][:, 0] == bos).all()),
        **facts,
    )
