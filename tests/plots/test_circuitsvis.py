"""A view is saved as a self-contained page."""

from __future__ import annotations

import json
import re

import pytest

from mechlens.plots.circuitsvis import POLICY, View
from mechlens.plots.features import plot_feature_examples
from mechlens.plots.heads import plot_attention
from tests import examples
from tests.examples import feature_examples
from tests.show.test_page import Page

VIEWS = {
    "attention": lambda: plot_attention(examples.attention(tokens=("</script><b>", "\ud800é"))),
    "examples": lambda: plot_feature_examples(feature_examples(), 1, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_saved_as_a_complete_page(tmp_path, name):
    view = VIEWS[name]()
    path = tmp_path / "view.html"
    assert view.write_html(path) == path
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert {"charset": "utf-8"} in page.of("meta")
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in page.of("meta")
    # no scripts, styles or images are fetched
    assert not [each for _, each in page.elements if {"src", "href", "data"} & set(each)]
    (script,) = page.scripts
    assert script.count("var CircuitsVis=") == 1
    # its last call fills the only element with the view's data
    call = re.search(r'showView\("(\w+)", "(\w+)", (\{.*\})\);\n\}\)\(\);$', script)
    assert call is not None
    assert [each["id"] for each in page.of("div")] == [call[1]]
    assert (call[2], json.loads(call[3])) == (view.component, view.props)


def test_a_page_replaces_the_old_one_and_is_the_same_each_time(tmp_path):
    view = View("AttentionHeads", {"tokens": ["a"]})
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    first.write_text("old")
    view.write_html(str(first))
    view.write_html(second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second], "nothing else is left"


def test_a_missing_folder_is_refused(tmp_path):
    path = tmp_path / "no" / "view.html"
    with pytest.raises(ValueError, match=f"^cannot write {re.escape(str(path))}: there is no folder"):
        View("AttentionHeads", {}).write_html(path)
    assert not list(tmp_path.iterdir())
