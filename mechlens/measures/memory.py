"""What running out of memory looks like."""

from __future__ import annotations

import torch

_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory for a tensor was not to be had, on whichever device.

    PyTorch has a type of its own for GPUs; on the CPU it is a `RuntimeError` with a sentence in it.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
