"""Interactive views from circuitsvis, shown without a network.

circuitsvis's own display asks the network on every call and gives each view another copy of its
JavaScript. Here a view is its component's name and properties: in Jupyter it brings the JavaScript of
the installed package along, in a page many views share one copy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_displays = itertools.count()

# circuitsvis picks a head by mouse only; this makes the same choice possible by keyboard.
SHOW_VIEW = """\
function showView(id, component, props) {
  const place = document.getElementById(id);
  new MutationObserver((_, observer) => {
    const names = place.querySelectorAll("h4");
    if (!names.length) return;
    observer.disconnect();
    for (const name of names) {
      const choice = name.parentElement.parentElement;
      choice.tabIndex = 0;
      choice.setAttribute("role", "button");
      choice.setAttribute("aria-label", "Show " + name.textContent);
      choice.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        choice.firstElementChild.click();
      });
    }
  }).observe(place, { childList: true, subtree: true });
  CircuitsVis.render(id, CircuitsVis[component], props);
}"""


@functools.cache
def circuitsvis_bundle() -> str:
    """The JavaScript of the installed circuitsvis, fit for an inline script; defines `CircuitsVis`."""
    source = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    code, _, _ = source.rpartition("//# sourceMappingURL=")
    # The one closing tag is inside a string, where the escape means the same.
    return (code or source).replace("</script", r"<\/script").strip()


def script_json(value: object) -> str:
    """JSON that can stand inside a script element: no `<` can end the element or open a comment.

    Raises:
        ValueError: a number in it is nan or infinite, which JSON cannot say.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c")


@dataclasses.dataclass(frozen=True)
class View:
    """A circuitsvis component with its properties; Jupyter shows it as the last line of a cell."""

    component: str
    """Such as `AttentionHeads`."""
    props: Mapping[str, Any] = dataclasses.field(repr=False)
    """As the component's documentation names them; JSON. Not in the repr, which notebooks store too."""

    def _repr_html_(self) -> str:
        props = script_json(self.props)
        # Several notebooks can share a page, and one view can be shown twice in it.
        digest = hashlib.sha256(props.encode()).hexdigest()[:8]
        place = f"mechlens-{digest}-{next(_displays)}"
        return (
            f'<div id="{place}" style="background:white;color:black;font-family:sans-serif"></div>\n'
            f"<script>(() => {{\n{circuitsvis_bundle()}\n{SHOW_VIEW}\n"
            f"showView({json.dumps(place)}, {script_json(self.component)}, {props});\n}})();</script>"
        )
