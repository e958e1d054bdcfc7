"""A section in each of its three renderers."""

from __future__ import annotations

import importlib
import subprocess
import sys

import plotly.graph_objects as go
import pytest

import mechlens
from mechlens.results import Result
from mechlens.results.columns import Column
from mechlens.show.page import table_html
from mechlens.show.section import Cell, Figure, Section, Table, section
from mechlens.show.terminal import print_section
from tests import examples


def a_section(**options):
    parts = (
        Table((Column("loss", unit="nats", digits=1), "token"), [(0.25, "<s>"), (None, "·a")], "Losses"),
        Table(("only",), [("on the page",)], "Page", where="page", folded=True),
        Table(("only",), [(Cell("shaded", 1.0),)], "Terminal", where="terminal"),
        Figure(lambda: go.Figure(), "How to read it."),
    )
    return Section("A title", "One.\n\nTwo.", parts, **options)


def test_a_terminal_prints_text_and_tables_and_draws_nothing(capsys):
    drawn = []
    print_section(Section("A title", "One.", [*a_section().parts[:3], Figure(lambda: drawn.append(1), "")]))
    out = capsys.readouterr().out
    assert out.startswith("A title\nOne.\nLosses\n")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert cells == [["0.2", "<s>"], ["—", "·a"], ["shaded"]]
    assert "on the page" not in out
    assert not drawn


def test_a_page_has_escaped_cells_right_aligned_numbers_and_shading():
    shown = table_html(a_section().parts[0])
    assert '<td class="number">0.2</td><td>&lt;s&gt;</td>' in shown
    assert '<th scope="col" class="number">loss, nats</th>' in shown
    assert table_html(a_section().parts[1]).startswith("<details")
    assert "background:rgb" in table_html(a_section().parts[2])


def test_jupyter_displays_tables_and_figures_in_order(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    a_section()._ipython_display_()
    kinds = [
        each.data[:4] if hasattr(each, "data") and isinstance(each.data, str) else each for each in shown
    ]
    assert kinds[0] == "<h3>"
    assert kinds[1] == "<div"
    assert kinds[2] == "<det"
    assert isinstance(kinds[3], go.Figure)
    assert "shaded" not in "".join(each for each in kinds if isinstance(each, str))


def test_markup_in_titles_and_captions_is_escaped_in_jupyter(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    Section("<b>title", "", [Figure(go.Figure(), "<b>caption")])._ipython_display_()
    texts = [each.data for each in shown if not isinstance(each, go.Figure)]
    assert len(texts) == 2
    assert not any("<b>" in text for text in texts)


def test_every_public_result_is_shown_by_the_module_of_its_name():
    public = {name: kind for name, kind in Result.types.items() if name in mechlens.__all__}
    missing = []
    for name, kind in public.items():
        home = importlib.import_module(f"mechlens.show.{kind.__module__.rsplit('.', 1)[1]}")
        if kind not in getattr(home, "SECTIONS", {}):
            missing.append(name)
    assert len(public) > 20
    assert not missing


def test_what_is_not_a_result_is_refused():
    with pytest.raises(TypeError, match="result must be a Result"):
        section("heads")  # type: ignore[arg-type]


def test_a_section_takes_only_options_of_its_result():
    found = section(examples.attention_spread(), top=1, title="My title")
    assert found.title == "My title"
    assert len(found.parts[0].rows) == 1
    with pytest.raises(TypeError, match="rows"):
        section(examples.attention_spread(), rows=3)


def test_sections_in_a_terminal_load_no_plotly():
    code = (
        "import sys, mechlens\n"
        "from mechlens.show.terminal import print_section\n"
        "from tests.examples import RESULTS\n"
        "made = [make() for make in RESULTS.values()]\n"
        "made = [each for each in made if type(each).__name__ in mechlens.__all__]\n"
        "for each in made: print_section(mechlens.section(each))\n"
        "assert 'plotly' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
