"""Interactive views from circuitsvis, shown without a network.

The display of circuitsvis itself makes a network request on every call, and gives each view its own copy of
the JavaScript. Here a view is just the name and properties of a component. In Jupyter it includes the
JavaScript of the installed package; views on one page can share a copy.
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

# Only inline code runs: the page can neither fetch nor send anything.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

# In circuitsvis, heads can be chosen by mouse only. This adds the keyboard.
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
    """The JavaScript of the installed circuitsvis, for an inline script; it defines `CircuitsVis`."""
    source = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    code, _, _ = source.rpartition("//# sourceMappingURL=")
    # The only closing tag is inside a string, where the escape has the same meaning.
    return (code or source).replace("</script", r"<\/script").strip()


def script_json(value: object) -> str:
    """JSON for use in a script element: no `<` can end the element or open a comment.

    Raises:
        ValueError: a number is nan or infinite, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c")


def html_head(title: str) -> str:
    """The start of a page, up to its title. The page may run its own code but fetch nothing."""
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
    """A circuitsvis component with its properties, which Jupyter displays.

    `write_html` saves it as a page, as for plotly figures.
    """

    component: str
    """Such as `AttentionHeads`."""
    props: Mapping[str, Any] = dataclasses.field(repr=False)
    """JSON values, named as in the component's documentation. Left out of the repr, which notebooks store."""

    def _repr_html_(self) -> str:
        # Several notebooks can share a page, and one view can be shown twice on it.
        digest = hashlib.sha256(script_json(self.props).encode()).hexdigest()[:8]
        return self._html(f"mechlens-{digest}-{next(_displays)}")

    def write_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the view as one HTML page (about 1 MB) that fetches nothing.

        Args:
            path: the file; its folder must exist. The same view gives the same bytes.

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
        """An element with this id, and the script that fills it."""
        return (
            f'<div id="{place}" style="background:white;color:black;font-family:sans-serif"></div>\n'
            f"<script>(() => {{\n{circuitsvis_bundle()}\n{SHOW_VIEW}\n"
            f"showView({json.dumps(place)}, {script_json(self.component)}, {script_json(self.props)});\n"
            "})();</script>"
        )
