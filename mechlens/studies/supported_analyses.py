"""Which analyses support a model: each is called, and its result compared with Hugging Face's model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.attribution import direct_logit_attribution
from mechlens.analyses.circuits.qk import QK
from mechlens.models.protocol import LensModel
from mechlens.models.run.patched_runs import PatchedRuns, Patches
from mechlens.models.weights.access import norm_scale
from mechlens.models.weights.rotary import is_rotary
from mechlens.results import Circuit

_SHARE = 1e-3
"""How far an analysis may be from Hugging Face's numbers, as a share of their magnitude."""
_LONGEST = 256
"""Maximum tokens of a text whose attention patterns are all kept."""
_TARGET, _AGAINST = 7, 11
"""Any two tokens."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Whether an analysis supports a model."""

    verdict: str
    """`yes`, `no`, or what is supported."""
    reason: str = ""
    """Why not, or why not everything."""


def supported_analyses(
    model: LensModel,
    original: Any,
    tokens: Int[Tensor, "1 pos"],
    begins: Mapping[str, int],
    lengths: tuple[int, ...],
) -> tuple[Analysis, Analysis, Analysis]:
    """QK circuits, resumed runs and direct logit attribution.

    Args:
        original: the model as transformers loads it.
        begins: the model's limits, from `tiny_architectures.limits`.
        lengths: token counts of the texts to compare.
    """
    return (
        _qk(model, original, begins, lengths),
        _resuming(model, tokens, begins, lengths),
        _attribution(model, original, tokens[:, : max(each for each in lengths if each <= model.cfg.n_ctx)]),
    )


def _resuming(
    model: LensModel, tokens: Int[Tensor, "1 pos"], begins: Mapping[str, int], lengths: tuple[int, ...]
) -> Analysis:
    within = [length for length in lengths if length <= model.cfg.n_ctx]
    why = [PatchedRuns.of(model, tokens[:, :length], "resid_pre") for length in within]
    failed = {length: each.why for length, each in zip(within, why, strict=True) if each.start is None}
    if len(failed) < len(within):
        resumed = next(each for each in why if each.start is not None)
        whole = "at any layer and position" if _skips_earlier_layers(resumed) else "at any position"
    if not failed:
        return Analysis(whole)
    if len(failed) == len(within):
        return Analysis("no", failed[within[0]])
    return Analysis(f"{whole}, not of {max(failed)} tokens", failed[max(failed)])


def _skips_earlier_layers(runs: PatchedRuns) -> bool:
    """Whether a patch in the last layer runs without the first block."""
    model, called = runs.clean.model, []
    nothing = Patches(
        "resid_pre",
        torch.tensor([model.cfg.n_layers - 1]),
        torch.tensor([runs.end // 2]),
        lambda activation, which, start, layer: activation,
    )
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: called.append(True))
    try:
        list(runs.run(nothing))
    finally:
        handle.remove()
    return not called


def _attribution(model: LensModel, original: Any, tokens: Int[Tensor, "1 pos"]) -> Analysis:
    """Whether the parts sum to the original's logit; without a soft-cap, to a difference of two logits,
    because a processed model shifts all logits alike."""
    cap = getattr(original.config, "final_logit_softcapping", None)
    try:
        found = direct_logit_attribution(model, tokens, _TARGET, against=None if cap else _AGAINST)
    except ValueError as error:
        return Analysis("no", str(error))
    with torch.no_grad():
        logits = original(tokens).logits[0]
    made, expected = found.contributions.sum(0)[0], logits[:, _TARGET]
    if cap:
        made = cap * torch.tanh(made / cap)
    else:
        expected = expected - logits[:, _AGAINST]
    off = float((made - expected).abs().max() / expected.abs().max())
    if off > _SHARE:
        return Analysis("no", f"the parts miss the original's logits by {off:.1%} of their size")
    return Analysis("yes")


def _qk(model: LensModel, original: Any, begins: Mapping[str, int], lengths: tuple[int, ...]) -> Analysis:
    """Whether the circuit gives the original's attention scores.

    Compared for the last head of the first layer, whose input is known, and for tokens one position apart.
    Patterns give differences of scores. A difference of such differences, between two keys and between two
    queries, cancels biases and the scores of tokens with themselves, and leaves the circuit's scores, up to
    the attention scale."""
    head, distance = (0, model.cfg.n_heads - 1), 1 if is_rotary(model) else None
    try:
        circuit = QK(model, head, relative_position=distance)
    except ValueError as error:
        return Analysis("no", str(error))
    whole = "yes" if distance is None else "at a distance"
    off = _misfit(model, circuit, original, 2)
    # also true for nan
    if not off <= _SHARE:
        return Analysis("no", f"the circuit misses the original's scores by {off:.1%} of their size")
    if not begins:
        return Analysis(whole)
    if lengths[-1] > _LONGEST:
        return Analysis(whole, f"compared in texts of 2 tokens, not in texts of {lengths[-1]}")
    if not _misfit(model, circuit, original, lengths[-1]) <= _SHARE:
        return Analysis(
            f"{whole}, in texts up to {min(begins.values())} tokens",
            "the rotation of queries and keys depends on the length of the text",
        )
    return Analysis(whole)


def _misfit(model: LensModel, circuit: Circuit, original: Any, length: int) -> float:
    """How far a circuit's scores are from a multiple of the original's, for the last two tokens of random
    texts."""
    ((layer, head),) = circuit.heads
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(0, original.config.vocab_size, (2, 2, 32, length), generator=draw)
    # [query, key, draw, position]; earlier tokens do not change the input of a first layer
    texts[:, :, :, -1] = texts[:, :1, :, -1]
    texts[:, :, :, -2] = texts[:1, :, :, -2]
    with torch.no_grad(), _uncapped(original):
        ran = original(texts.flatten(0, 2), output_attentions=True, output_hidden_states=True)
    streams = ran.hidden_states[layer].unflatten(0, texts.shape[:3])
    scores = ran.attentions[layer][:, head, -1, -2:].log().unflatten(0, texts.shape[:3])
    measured = (scores[..., 0] - scores[..., 1]).diff(dim=1).diff(dim=0).flatten()
    normed = streams / norm_scale(model, streams)[..., None]
    query, key = normed[1, 0, :, -1] - normed[0, 0, :, -1], normed[0, 1, :, -2] - normed[0, 0, :, -2]
    A, B = circuit.matrix.A.cpu(), circuit.matrix.B.cpu()
    expected = ((query @ A) * (key @ B.T)).sum(-1)
    scale = (expected @ measured).clamp(min=0) / (expected @ expected)
    return float((measured - scale * expected).norm() / measured.norm())


@contextlib.contextmanager
def _uncapped(original: Any) -> Iterator[None]:
    """A context without soft-caps on attention scores, which circuits do not model."""
    name = "attn_logit_softcapping"
    capped = [(each, getattr(each, name)) for each in original.modules() if getattr(each, name, None)]
    try:
        for module, _ in capped:
            setattr(module, name, None)
        yield
    finally:
        for module, cap in capped:
            setattr(module, name, cap)
