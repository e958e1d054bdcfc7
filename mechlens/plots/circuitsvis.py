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
import os
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mechlens.files import replacing

_displays = itertools.count()

# Inline code only: the page can fetch nothing, and send nothing anywhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

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


def html_head(title: str) -> str:
    """How a page of ours begins, up to its title: it may run its own code, and fetch nothing."""
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>"""


@dataclasses.dataclass(frozen=True)
class View:
    """A circuitsvis component with its properties; Jupyter shows it as the last line of a cell.

    `write_html` saves it as a page, as it does plotly's figures.
    """

    component: str
    """Such as `AttentionHeads`."""
    props: Mapping[str, Any] = dataclasses.field(repr=False)
    """As the component's documentation names them; JSON. Not in the repr, which notebooks store too."""

    def _repr_html_(self) -> str:
        # Several notebooks can share a page, and one view can be shown twice in it.
        digest = hashlib.sha256(script_json(self.props).encode()).hexdigest()[:8]
        return self._html(f"mechlens-{digest}-{next(_displays)}")

    def write_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the view as one HTML page (about 1 MB) that fetches nothing, whole or not at all.

        Args:
            path: the file; its folder must exist. Of the same view it gets the same bytes.

        Returns:
            The path written.

        Raises:
            ValueError: no such folder.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise ValueError(f"cannot write {target}: there is no folder {target.parent}")
        page = f"""\
{html_head(self.component)}
</head>
<body>
<noscript>The view needs JavaScript.</noscript>
{self._html("view")}
</body>
</html>
"""
        with replacing(target) as part:
            part.write_text(page, encoding="utf-8", newline="\n")
        return target

    def _html(self, place: str) -> str:
        """The element of this id, with the script that fills it."""
        return (
            f'<div id="{place}" style="background:white;color:black;font-family:sans-serif"></div>\n'
            f"<script>(() => {{\n{circuitsvis_bundle()}\n{SHOW_VIEW}\n"
            f"showView({json.dumps(place)}, {script_json(self.component)}, {script_json(self.props)});\n"
            "})();</script>"
        )
