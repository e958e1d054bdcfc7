"""The pages in docs/ match the package, and their pictures and links exist."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from mechlens.studies.published import CARDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_the_real_model_matches_its_card():
    page = runpy.run_path(str(ROOT / "experiments" / "real_model_page.py"))["page"]
    card = json.loads((CARDS / "smollm2-135m.json").read_text(encoding="utf-8"))
    assert page(card) == (ROOT / "docs" / "smollm2-135m.md").read_text(encoding="utf-8")


def test_the_page_on_adding_an_analysis_shows_the_files_and_they_are_short():
    text, around = runpy.run_path(str(ROOT / "docs" / "make_analysis_page.py"))["page"]()
    assert text == (ROOT / "docs" / "add-an-analysis.md").read_text(encoding="utf-8")
    assert around <= 160


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_exist(path):
    links = re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing
