"""How long files and functions may be, and that docs/add-an-analysis.md counts right."""

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
def test_a_file_and_its_functions_are_short_enough_to_read(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    long = {
        node.name: length
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := _own_lines(node)) > LONGEST_FUNCTION
    }
    assert not long


def _own_lines(node: ast.FunctionDef) -> int:
    """Lines without the docstring, which says what a caller needs."""
    assert node.end_lineno is not None
    length = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        assert first.end_lineno is not None
        length -= first.end_lineno - first.lineno + 1
    return length
