"""The code in the README and the tour runs in order and prints the output shown below it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import mechlens
from tests.shared import HAS_SMOLLM2

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/tour.md")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.S | re.M)


@pytest.mark.parametrize("page", PAGES)
def test_code_on_a_page_runs_and_prints_the_output_below_it(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert blocks
    names = {"mechlens": mechlens}
    for code, printed in blocks:
        if "smollm2" in code and not HAS_SMOLLM2:
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, page, "exec"), names)
        assert not printed or out.getvalue() == printed, code


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    first, _ = BLOCK.findall(text)[0]
    assert len(first.splitlines()) <= 10
