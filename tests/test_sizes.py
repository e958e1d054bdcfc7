"""Limits on the length of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 450, 100
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("mechlens", "experiments", "docs")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES)
def test_a_file_and_its_functions_are_short(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    long = {
        node.name: length
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := _own_lines(node)) > LONGEST_FUNCTION
    }
    assert not long


def _own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body after the docstring; the signature and docstring are for callers and do not count."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    assert node.end_lineno is not None
    assert first.end_lineno is not None
    return node.end_lineno - (first.end_lineno if documented else first.lineno - 1)
