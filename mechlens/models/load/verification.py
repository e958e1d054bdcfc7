"""Whether a converted model predicts what the original does, as far as arithmetic lets it.

The original is run twice, in its own dtype and in a wider one, which says how much rounding there is to
expect.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import ModelLoadError
from mechlens.models.load import engines
from mechlens.models.run.forward import seen_whole

FACTOR = 16.0
"""How many times its own rounding a converted model may be from the original: its weights are rounded anew
where norms are folded into them, and its sums are in another order. The distance is a KL, a square of what is
rounded."""
FLOOR = 1e-9
"""KL in nats that is never held against a model: 5e-5 nats of each log-probability. Rounding in float32 gives
about 1e-13; a wrong rotation or a lost bias gives far more."""
_UNMEASURED = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
"""Rounding where a model cannot be run in a wider dtype."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What a model predicts on a few tokens, on the CPU."""

    tokens: Int[Tensor, "1 pos"]
    log_probs: Float[Tensor, "1 pos d_vocab"]
    """In float64, made in a wider dtype than the weights'."""
    rounding: float
    """KL in nats between these and what the model makes of the tokens in its own dtype."""

    @property
    def limit(self) -> float:
        return max(FLOOR, FACTOR * self.rounding)

    def distance(self, model: Any) -> float:
        """KL in nats between this and what a model predicts, on its device and in its dtype."""
        given = self.tokens.to(model.cfg.device)
        with torch.no_grad(), engines.quiet():
            return self._kl(model(given, return_type="logits", **seen_whole(model, given)))

    def _kl(self, logits: Tensor) -> float:
        own = logits.cpu().double().log_softmax(-1)
        return float((self.log_probs.exp() * (self.log_probs - own)).nan_to_num().sum(-1).mean())

    @classmethod
    def of(cls, tokens: Int[Tensor, "1 pos"], wide: Tensor, own: Tensor) -> Reference:
        """From logits that were made in a wider dtype, and in the weights' own."""
        exact = cls(tokens, wide.double().log_softmax(-1), 0.0)
        return dataclasses.replace(exact, rounding=exact._kl(own))

    @classmethod
    @torch.no_grad()
    def of_hf(cls, hf_model: Any) -> Reference:
        """What a Hugging Face model predicts on 16 ids from all over its vocabulary.

        Cost: two forward passes; in one, one module's weights at a time are widened.
        """
        n_ctx = getattr(hf_model.config, "max_position_embeddings", None) or 16
        ids = torch.linspace(0, hf_model.config.vocab_size - 1, min(16, n_ctx), dtype=torch.double)
        tokens = ids.long()[None]
        own, dtype = hf_model(tokens).logits, next(hf_model.parameters()).dtype
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64
        try:
            with widened(hf_model, wide):
                return cls.of(tokens, hf_model(tokens).logits, own)
        except RuntimeError:
            # code of the model's own that mixes dtypes
            return dataclasses.replace(cls.of(tokens, own, own), rounding=_UNMEASURED.get(dtype, 0.0))


@contextlib.contextmanager
def widened(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let each module compute with its weights in a wider dtype, one module's at a time.

    They are widened into the same memory again and again: to be given new pages takes longer than to fill
    them.
    """
    modules = [module for module in model.modules() if list(module.parameters(recurse=False))]
    sizes = {id(module): sum(each.numel() for each in module.parameters(recurse=False)) for module in modules}
    room = torch.empty(max(sizes.values(), default=0), dtype=dtype)
    narrow: dict[int, list[Tensor]] = {}
    taken = 0

    def widen(module: Any, given: Any) -> None:
        nonlocal taken
        own = list(module.parameters(recurse=False))
        narrow[id(module)] = [each.data for each in own]
        start, taken = taken, taken + sizes[id(module)]
        for each in own:
            wide = room[start : start + each.numel()]
            start += each.numel()
            # one with weights of its own and modules inside that have some, too
            fits = wide.numel() == each.numel()
            each.data = wide.view(each.shape).copy_(each.data) if fits else each.data.to(dtype)

    def restore(module: Any, given: Any = None, made: Any = None) -> None:
        nonlocal taken
        if id(module) not in narrow:
            return
        taken -= sizes[id(module)]
        for each, data in zip(module.parameters(recurse=False), narrow.pop(id(module)), strict=True):
            each.data = data

    handles = [module.register_forward_pre_hook(widen) for module in modules]
    handles += [module.register_forward_hook(restore) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            restore(module)


def check_converted(model: Any, reference: Reference, *, advice: str) -> None:
    """See that a converted model predicts what the original did, on the CPU.

    Raises:
        ModelLoadError: it does not; the engine misunderstands a setting of this model.
    """
    kl = reference.distance(model)
    if not kl <= reference.limit:
        raise ModelLoadError(
            f"TransformerLens's version of this model predicts something else than the original (KL {kl:.2g} "
            f"nats, where rounding allows {reference.limit:.2g}): the engine does not support one of its "
            f"settings, so every result would be wrong{advice}"
        )


def check_on_device(model: Any, reference: Reference, device: torch.device) -> None:
    """See that a model predicts on a device what it does on the CPU.

    Raises:
        ModelLoadError: it does not; the device, or PyTorch's code for it, computes something else.
    """
    kl = reference.distance(model)
    if not kl <= reference.limit:
        raise ModelLoadError(
            f"on {device} this model predicts something else than on the CPU (KL {kl:.2g} nats, where "
            f"rounding allows {reference.limit:.2g}), as is known of some versions of PyTorch on MPS: every "
            "result would be wrong; use device='cpu'"
        )
