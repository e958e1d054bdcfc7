"""Float tensors name their dtype; torch's default belongs to the caller."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mechlens

PACKAGE = Path(mechlens.__file__).parent
OF_FLOATS = {"zeros", "ones", "empty", "full", "rand", "randn", "normal", "eye", "linspace", "logspace"}
OF_WHAT_IS_GIVEN = {"arange", "tensor", "as_tensor"}


def without_dtype(source: str) -> list[str]:
    """Every torch call that creates a float tensor without a dtype; `**options` may have one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")):
            continue
        name = ast.unparse(node.func).removeprefix("torch.")
        floats = any(
            isinstance(part, ast.Constant) and isinstance(part.value, float)
            for given in node.args
            for part in ast.walk(given)
        )
        if (name in OF_FLOATS or (name in OF_WHAT_IS_GIVEN and floats)) and not {
            keyword.arg for keyword in node.keywords
        } & {"dtype", None}:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_every_float_tensor_names_its_dtype(path):
    assert without_dtype(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("torch.zeros(3)", True),
        ("torch.full((2,), x, device=x.device)", True),
        ("a + torch.linspace(0, 1, 5)", True),
        ("torch.tensor([1, -2.5])", True),
        ("torch.arange(0.0, n)", True),
        ("torch.zeros(3, dtype=x.dtype)", False),
        ("torch.ones(3, **where)", False),
        ("torch.tensor([1, 2])", False),
        ("torch.arange(n)", False),
        ("x.new_zeros(3)", False),
    ],
)
def test_calls_without_dtype_are_detected(source, refused):
    assert len(without_dtype(source)) == refused
