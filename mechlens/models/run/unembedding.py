"""From the residual stream to predictions: the last norm and the unembedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import parts, running, seen_whole, watch
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.sites import last_hook
from mechlens.models.run.user_hooks import hooks_on_logits, probe
from mechlens.progress import note_run

Readers = Mapping[str, Callable[[Tensor], None]]
"""By hook name, as in `watch`."""


def next_token_log_probs(
    model: LensModel, tokens: Int[Tensor, "batch pos"], beside: Callable[[slice], Readers] | None = None
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """How well each position predicts the next token.

    Args:
        beside: makes additional readers for the rows of each forward pass.

    Returns:
        Log probability of the next token in nats, nan at the last position; and whether no other token is
        more likely, False at the last position. Both on the CPU.

    Raises:
        ValueError: the batch has to be split, but a user hook treats its rows differently.

    Cost: one forward pass, and one of at most 8 tokens to check whether the logits are the last norm's output
    through `W_U`. If so, logits exist for a few positions at a time. If not, the model's own logits are used,
    row by row.
    """
    streamed = not _why_not_streamed(model, tokens)
    log_probs, corrects = [], []
    several = parts(tokens)
    if len(several) > 1:
        check_rows_alike(model, tokens)
    start = 0
    for rows in several:
        readers = {} if beside is None else beside(slice(start, start + len(rows)))
        start += len(rows)
        if streamed:
            log_prob, correct = _streamed(model, rows, readers)
        else:
            log_prob, correct = _whole(model, rows)
            if readers:
                watch(model, rows, readers)
        log_probs.append(torch.nn.functional.pad(log_prob.cpu(), (0, 1), value=torch.nan))
        corrects.append(torch.nn.functional.pad(correct.cpu(), (0, 1), value=False))
    return torch.cat(log_probs), torch.cat(corrects)


def _streamed(
    model: LensModel, rows: Int[Tensor, "batch pos"], readers: Readers | None = None
) -> tuple[Tensor, Tensor]:
    """`[batch, pos - 1]`: log probability of each next token, and whether it is the most likely one."""
    kept: list[Tensor] = []
    watch(model, rows, {**(readers or {}), last_hook(model): kept.append})
    with torch.inference_mode():
        return token_log_probs(model, kept.pop()[:, :-1], rows[:, 1:])


def _whole(model: LensModel, rows: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
    """The same from the model's own logits, row by row."""
    log_probs, corrects = [], []
    for row in rows.to(model.cfg.device).split(1):
        note_run(model, *row.shape)
        with running(model, []):
            logits = model(row, return_type="logits", **seen_whole(model, row))[:, :-1].float()
        own = logits.gather(2, row[:, 1:, None])[..., 0]
        log_probs.append(own - logits.logsumexp(2))
        corrects.append(own == logits.amax(2))
    return torch.cat(log_probs), torch.cat(corrects)


def check_streamed(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Check that a model's logits are its last norm's output through `W_U`, `b_U` and a soft-cap.

    In Granite, for example, they are not: it divides them by a constant. A user hook may do anything.

    Raises:
        ValueError: they are not; the message says why.

    Cost: two forward passes of at most 8 tokens.
    """
    why = _why_not_streamed(model, tokens)
    if why:
        raise ValueError(
            f"this model's logits are not its last norm's output through W_U, b_U and a soft-cap ({why}), so "
            "reading the residual stream through these would not show what it predicts"
        )


def _why_not_streamed(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> str:
    """Empty if the logits are the last norm's output through the unembedding."""
    behind = hooks_on_logits(model)
    if behind:
        return f"your hook at {behind[0]} changes them"
    some = probe(model, tokens)
    if some.shape[1] < 2:
        if model.cfg.n_ctx < 2:
            return ""
        # a single token has no next token to compare, so it is repeated
        some = some.repeat(1, 2)
    streamed, whole = _streamed(model, some)[0], _whole(model, some)[0]
    # a narrow dtype rounds the model's own logits; ours are in float32
    tolerance = 1e-3 if model.W_U.dtype in (torch.float32, torch.float64) else 0.5
    # damaged weights make both nan, which is no disagreement
    off = (streamed - whole).abs().masked_fill(streamed.isnan() & whole.isnan(), 0.0).max()
    return "" if off <= tolerance else f"the next token's log probability is {float(off):.2g} nats off"


def final_norm(
    model: LensModel, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """The model's last norm, with its learned scale and bias; the residual itself if there is no norm."""
    norm = getattr(model, "ln_final", None)
    return residual if norm is None or model.cfg.normalization_type is None else norm(residual)


def bare_norm(model: LensModel, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The model's last norm, without its learned scale and bias; the residual itself if there is no norm."""
    kind = model.cfg.normalization_type
    if kind is None:
        return residual
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    if kind.startswith("LN"):
        wide = wide - wide.mean(-1, keepdim=True)
    return wide / (wide.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()


def token_log_probs(
    model: LensModel, residual: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Log probability in nats of one token at each position, and whether it is the most likely one.

    Args:
        residual: the last `resid_post`; the log probability is differentiable with respect to it.
        tokens: one for each position, on any device.
    """
    vectors = final_norm(model, residual)
    ids = tokens.to(vectors.device)
    log_prob, correct = unembedding(model).log_prob(vectors.flatten(0, 1), ids.flatten())
    return log_prob.view(ids.shape), correct.view(ids.shape)


def unembedding(model: LensModel) -> Unembedding:
    """The map from the last norm's output to logits."""
    return Unembedding(model.W_U.detach(), model.b_U.detach(), soft_cap(model))


def soft_cap(model: LensModel) -> float | None:
    """The bound c in `c * tanh(logit / c)`, or None."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap if cap is not None and cap > 0 else None
