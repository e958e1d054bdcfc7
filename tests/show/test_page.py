"""The report is one self-contained page that fetches nothing and escapes all markup."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from mechlens.plots.heads import plot_attention_heatmap
from mechlens.results import Comparison
from mechlens.show.heads import attention_section, performance_section, scores_section
from mechlens.show.lens import lens_section
from mechlens.show.page import render_report, write_report
from mechlens.show.section import Figure, Section, Table
from tests import examples

EVIL = "<script>alert(1)</script></script><!--<img src=x onerror=alert(1)>\"' onclick='x'&lt;"
GOOD = Comparison("accuracy", 0.93, 0.912361, 0.9, None, "reproduced", "an article")
MISSED = Comparison(
    "induction_score of L5H5", -0.91, float("nan"), 0.88, 0.95, "not reproduced", "an article"
)
BUNDLES = {"plotly": "window.Plotly = Plotly;", "circuitsvis": "var CircuitsVis="}


class Page(HTMLParser):
    """A page's elements, and its text inside and outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def sections(name: str = "tiny", token: str = " a") -> list[Section]:
    patterns = examples.attention(name, tokens=("<bos>", token, "\n"))
    return [
        performance_section(examples.performance(name)),
        scores_section(examples.head_scores(name)),
        attention_section(patterns),
        Section("More", parts=[Figure(plot_attention_heatmap(patterns), "caption", "description")]),
    ]


def report(name: str = "tiny", token: str = " a", *, comparisons: tuple[Comparison, ...] = ()) -> str:
    return render_report(
        *sections(name, token),
        title=name,
        model=examples.model(name),
        comparisons=comparisons,
        command=f"mechlens reproduce --model {name}",
    )


def figure_data(page: str) -> list[dict[str, Any]]:
    scripts = [each for each in Page(page).scripts if each.startswith('{"data"')]
    return [json.loads(each) for each in scripts]


def test_each_script_library_is_in_the_page_once() -> None:
    page = report()
    assert page.count(BUNDLES["plotly"]) == 1
    assert page.count(BUNDLES["circuitsvis"]) == 1


@pytest.mark.parametrize(
    ("chosen", "libraries"), [(slice(0, 0), set()), (slice(0, 2), {"plotly"}), (slice(2, 3), {"circuitsvis"})]
)
def test_a_page_has_only_the_libraries_it_needs(chosen: slice, libraries: set[str]) -> None:
    page = render_report(*sections()[chosen], title="t", model=examples.model(), comparisons=())
    assert {name for name, mark in BUNDLES.items() if mark in page} == libraries


def test_a_page_fetches_nothing_and_forbids_it() -> None:
    page = Page(report(comparisons=(GOOD, MISSED)))
    fetching = {"src", "srcset", "action", "data", "poster", "background", "xlink:href"}
    for tag, attributes in page.elements:
        assert not fetching & set(attributes), tag
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    assert not page.of("link")
    (policy,) = [each["content"] for each in page.of("meta") if "http-equiv" in each]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("a.html", "b.html"):
        path = write_report(
            tmp_path / name, *sections(), title="t", model=examples.model(), comparisons=(GOOD,)
        )
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_every_figure_has_its_element_data_and_caption() -> None:
    page = Page(report())
    places = [each for each in page.of("div") if each.get("class") in ("plot", "view")]
    data = [each["id"] for each in page.of("script") if each.get("type") == "application/json"]
    # one curve, two kinds of score with two figures each, the view, one heatmap
    assert [each["id"] for each in places] == [f"figure-{at}" for at in range(1, 8)]
    assert data == [f"{each['id']}-data" for each in places]
    assert all(each["aria-label"] for each in places)
    assert page.text.count("with layer 0 at the bottom") == 2


def test_heatmap_data_names_the_head_on_hover() -> None:
    figures = figure_data(report())
    named = [each["data"][0]["hovertext"][1][2] for each in figures if "hovertext" in each["data"][0]]
    assert named[0].startswith("<b>L1H2</b><br>induction score 0.875<br>")
    assert named[1].startswith("<b>L1H2</b><br>copying score 0.750<br>")


def test_figures_fit_the_page_whatever_their_own_width() -> None:
    layouts = [each["layout"] for each in figure_data(report())]
    assert len(layouts) == 6
    assert not any("width" in layout for layout in layouts)


def counts(page: str) -> Counter[tuple[str, ...]]:
    """How often each element occurs in a page, with its attribute names."""
    return Counter((tag, *sorted(attributes)) for tag, attributes in Page(page).elements)


@pytest.mark.parametrize(("name", "token"), [(EVIL, " a"), ("tiny", EVIL), (EVIL, EVIL)])
def test_a_name_or_token_with_markup_adds_no_element(name: str, token: str) -> None:
    plain, attacked = report(), report(name, token)
    assert counts(attacked) == counts(plain)
    assert "alert(1)" in attacked
    assert "<script>alert" not in attacked
    assert "<img src=x" not in attacked


def test_markup_is_shown_as_text() -> None:
    page = Page(report(EVIL, EVIL))
    assert page.text.count(EVIL) == 4  # title, heading, model, command
    (views,) = [json.loads(each) for each in page.scripts if each.startswith('{"component"')]
    assert views["props"]["tokens"][1] == EVIL.replace(" ", "·")[:16] + "…"


def test_markup_in_every_text_of_a_section_and_a_comparison_adds_no_element() -> None:
    def page(text: str) -> str:
        figure = go.Figure(go.Scatter(x=[1], y=[1], text=[text]))
        parts = [
            Figure(figure, text, text),
            Table((text, text), [(text, 1.0)], text),
            Table((text,), [(text,)], text, folded=True),
        ]
        claim = Comparison(text, text, text, None, None, text, text)
        section = Section(text, text, parts, {text: text})
        return render_report(section, title=text, model=examples.model(), comparisons=[claim], command=text)

    assert counts(page(EVIL)) == counts(page("plain"))


def test_the_table_has_published_next_to_measured() -> None:
    text = re.sub(r"<[^>]*>", " ", report(comparisons=(GOOD, MISSED)).split("<main")[1].split("</table>")[0])
    cells = " ".join(text.split())
    assert "accuracy an article 0.9300 0.9124 at least 0.90 ✓ reproduced" in cells
    assert "L5H5 an article −0.9100 not measured 0.8800 to 0.9500 ✗ not reproduced" in cells  # noqa: RUF001


def test_terms_of_all_sections_are_defined_once() -> None:
    page = report()
    assert page.count("<dt>Interval</dt>") == 1
    assert "<dt>Copying score</dt>" in page
    assert "<dt>Prefix matching score</dt>" not in page


def test_numbers_in_tables_match_the_results() -> None:
    text = " ".join(re.sub(r"<[^>]*>", " ", report()).split())
    assert "log-probability, nats, second copy −0.250 −0.500 to −0.125 −1.000 to −0.062" in text  # noqa: RUF001
    assert "induction_score L1H2 0.875 0.750 to 0.938 0.062" in text
    assert "copying_score L1H0 1.000 0.875 to 1.062 —" in text


def test_a_lone_surrogate_does_not_stop_the_report(tmp_path: Path) -> None:
    path = write_report(
        tmp_path / "r.html", Section("\ud800", "\ud800"), title="t", model=examples.model(), comparisons=()
    )
    assert "&#55296;" in path.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_report(path, title="t", model=examples.model(), comparisons=())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_invalid_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be an .html file, got .*r\.txt"):
        write_report(tmp_path / "r.txt", title="t", model=examples.model(), comparisons=())
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        write_report(tmp_path / "missing" / "r.html", title="t", model=examples.model(), comparisons=())


# -- the lens --------------------------------------------------------------------------------------


def test_a_lens_in_a_page_keeps_its_width_and_is_scrolled() -> None:
    page = render_report(lens_section(examples.lens(), "kl_final"), title="t", model=examples.model())
    elements = Page(page)
    scrolled = next(
        each for each in elements.of("div") if each.get("class") == "scroll" and "Heatmap" in str(each)
    )
    assert scrolled["tabindex"] == "0"
    styles = [each["style"] for each in elements.of("div") if each.get("class") == "plot"]
    assert re.fullmatch(r"height:\d+px;width:\d+px", str(styles[0]))
    assert "max-width" in str(styles[1])
    assert "Published and measured" not in page
    assert "Kullback-Leibler divergence" in page


def test_markup_in_a_token_of_a_lens_adds_no_element() -> None:
    def page(token: str) -> str:
        found = dataclasses.replace(examples.lens(), strings=dict.fromkeys("0123", token))
        return render_report(lens_section(found), title="t", model=examples.model(), comparisons=())

    assert counts(page(EVIL)) == counts(page("plain"))
