"""The README's first example prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_six_lines_print_what_stands_below_them(tmp_path):
    text = README.read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.S).groups()
    assert len([line for line in code.splitlines() if line]) == 6
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(script))
    assert out.getvalue() == printed
