"""What running out of memory looks like, and what is done about it."""

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
    """Whether an error says that memory for a tensor was not to be had, on whichever device.

    PyTorch has a type of its own for GPUs; on the CPU it is a `RuntimeError` with a sentence in it.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def give_back() -> None:
    """Give memory that was freed back to the system, where glibc keeps it between what is still in use."""
    if sys.platform == "linux":
        trim = _trim()
        if trim is not None:
            trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    # musl has none
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def in_parts(work: Callable[[Tensor], T], rows: Tensor, size: int) -> Iterator[tuple[Tensor, T]]:
    """Do some work on rows, so many at a time, and on half as many from where memory runs out.

    Args:
        work: what is done with some of the rows; it is done anew, with fewer, where memory ran out.
        size: rows at a time, at least 1.

    Yields:
        Rows that are done, and what came of them.

    Raises:
        RuntimeError, MemoryError: memory ran out for a single row, or something else went wrong.
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
