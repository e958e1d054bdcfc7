"""Comparison up to rounding, for numbers that are computed twice.

Two float computations of the same numbers are never compared bit for bit: the processor, the number of
threads, the shapes of the matrices and even their memory layout determine the order in which sums are
rounded. Copies, saved and reloaded values, integers, and draws from one seed are compared exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

ROUNDING = 1e-5
"""For float32 sums of a few dozen terms of about 1; relative for larger numbers."""


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same numbers, computed twice in float32; nan equals nan."""
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


def assert_same(found: Any, expected: Any) -> None:
    """The same result, computed twice: floats up to rounding, everything else exactly."""
    if isinstance(found, float):
        assert found == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING, nan_ok=True)
        return
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(found, torch.Tensor):
        assert_close(found, expected)
    elif isinstance(found, dict):
        assert list(found) == list(expected)
        for key, value in found.items():
            assert_same(value, expected[key])
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
