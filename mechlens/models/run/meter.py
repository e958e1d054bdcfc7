"""Count the arithmetic and the memory of any computation while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

unmetered = _disable_current_modes
"""A context in which no meter counts."""


class Meter(TorchDispatchMode):
    """A context in which `flop` and `peak` grow with what is computed.

    PyTorch's own `FlopCounterMode` also follows modules, and loses track where a run stops in the middle.
    """

    flop: int = 0
    """Additions and multiplications of matrix products and attention."""
    peak: int = 0
    """Most bytes that tensors made in the context took at once."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = flop_registry.get(func.overloadpacket)
        if counted is None:
            # in inference mode, composite operations arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        found = func(*args, **kwargs)
        if counted is not None:
            self.flop += counted(*args, **kwargs, out_val=found)
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._made.get(key)
        if known is not None and not known[0].expired():
            return
        self._held += storage.nbytes() - (known[1] if known else 0)
        self._made[key] = StorageWeakRef(storage), storage.nbytes()
        if self._held > self.peak:
            self._made = {key: each for key, each in self._made.items() if not each[0].expired()}
            self._held = sum(size for _, size in self._made.values())
            self.peak = max(self.peak, self._held)
