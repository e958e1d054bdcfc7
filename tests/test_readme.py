"""The README's first examples print what the README says."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

from tests.shared import needs_smollm2

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S)


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        pytest.param(*example, marks=needs_smollm2 if "smollm2" in example[0] else (), id=str(at))
        for at, example in enumerate(EXAMPLES)
    ],
)
def test_an_example_prints_what_stands_below_it(code, printed, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(script))
    assert out.getvalue() == printed


def test_the_first_examples_are_of_the_real_model_and_of_the_bundled_one():
    assert ["smollm2-135m" in code for code, _ in EXAMPLES[:2]] == [True, False]
    assert all(len([line for line in code.splitlines() if line]) <= 7 for code, _ in EXAMPLES[:2])
