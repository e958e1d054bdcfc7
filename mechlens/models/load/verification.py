"""Whether a converted model predicts what the original does, up to rounding.

The original is run twice, in its own dtype and in a wider one, which shows how much rounding to expect.
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
"""How many times the original's own rounding the KL of a converted model may be. Folding norms rounds the
weights again, and sums run in another order. KL is quadratic in the rounding error."""
FLOOR = 1e-9
"""KL in nats that is always tolerated: 5e-5 nats in each log probability. Rounding in float32 gives about
1e-13; a wrong rotation or a lost bias gives far more."""
_UNMEASURED = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
"""Assumed rounding (KL in nats) of a model that cannot be run in a wider dtype."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What a model predicts on a few tokens, on the CPU."""

    tokens: Int[Tensor, "1 pos"]
    log_probs: Float[Tensor, "1 pos d_vocab"]
    """In float64, computed in a wider dtype than that of the weights."""
    rounding: float
    """KL in nats from these to the model's predictions in its own dtype."""

    @property
    def limit(self) -> float:
        return max(FLOOR, FACTOR * self.rounding)

    def distance(self, model: Any) -> float:
        """KL in nats from this to what a model predicts, on its device and in its dtype."""
        given = self.tokens.to(model.cfg.device)
        with torch.no_grad(), engines.quiet():
            return self._kl(model(given, return_type="logits", **seen_whole(model, given)))

    def _kl(self, logits: Tensor) -> float:
        own = logits.cpu().double().log_softmax(-1)
        return float((self.log_probs.exp() * (self.log_probs - own)).nan_to_num().sum(-1).mean())

    @classmethod
    def of(cls, tokens: Int[Tensor, "1 pos"], wide: Tensor, own: Tensor) -> Reference:
        """From logits computed in a wider dtype, and in that of the weights."""
        exact = cls(tokens, wide.double().log_softmax(-1), 0.0)
        return dataclasses.replace(exact, rounding=exact._kl(own))

    @classmethod
    @torch.no_grad()
    def of_hf(cls, hf_model: Any) -> Reference:
        """What a Hugging Face model predicts on 16 ids spread over its vocabulary.

        Cost: two forward passes. In one, weights are widened one module at a time.
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
            # the model's own code mixes dtypes
            return dataclasses.replace(cls.of(tokens, own, own), rounding=_UNMEASURED.get(dtype, 0.0))


@contextlib.contextmanager
def widened(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let modules compute with their weights in a wider dtype, one module at a time.

    The same memory is reused for all modules, because allocating new pages takes longer than filling them.
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
            # nothing left if a module with weights contains others with weights
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
    """Check that a converted model predicts what the original did, on the CPU.

    Raises:
        ModelLoadError: it does not, because the engine does not support one of this model's settings.
    """
    kl = reference.distance(model)
    if not kl <= reference.limit:
        raise ModelLoadError(
            f"TransformerLens's version of this model does not predict what the original does (KL {kl:.2g} "
            f"nats, where rounding allows {reference.limit:.2g}): the engine does not support one of its "
            f"settings, so every result would be wrong{advice}"
        )


def check_on_device(model: Any, reference: Reference, device: torch.device) -> None:
    """Check that a model predicts the same on a device as on the CPU.

    Raises:
        ModelLoadError: it does not, because the device, or PyTorch's code for it, computes wrong results.
    """
    kl = reference.distance(model)
    if not kl <= reference.limit:
        raise ModelLoadError(
            f"on {device} this model does not predict what it does on the CPU (KL {kl:.2g} nats, where "
            f"rounding allows {reference.limit:.2g}), a known problem of some versions of PyTorch on MPS: "
            "every result would be wrong, so use device='cpu'"
        )
