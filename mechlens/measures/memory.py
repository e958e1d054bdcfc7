"""Recognizing that memory ran out, and working in smaller parts."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device.

    PyTorch has an error type for GPUs; on the CPU it raises a `RuntimeError`, told apart by its message.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def give_back() -> None:
    """Return freed memory to the system; glibc would keep it."""
    if sys.platform == "linux":
        trim = _trim()
        if trim is not None:
            trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    # not in musl
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def in_parts(work: Callable[[Tensor], T], rows: Tensor, size: int) -> Iterator[tuple[Tensor, T]]:
    """Call `work` on some rows at a time, halving their number whenever memory runs out.

    Args:
        work: called again on fewer rows if memory runs out.
        size: rows at a time, at least 1.

    Yields:
        The rows of each part, and its result.

    Raises:
        RuntimeError, MemoryError: memory ran out for a single row, or `work` raised something else.
    """
    begin = 0
    while begin < len(rows):
        part = rows[begin : begin + size]
        try:
            made = work(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(part) == 1:
                raise
            size = len(part) // 2
            continue
        begin += len(part)
        yield part, made
