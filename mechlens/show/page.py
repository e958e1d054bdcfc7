"""One self-contained HTML page, which opens anywhere without a network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.io
from plotly.offline import get_plotlyjs

from mechlens.errors import ArgumentError
from mechlens.files import replacing
from mechlens.plots.circuitsvis import SHOW_VIEW, View, circuitsvis_bundle, html_head, script_json
from mechlens.results import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Comparison, ModelInfo, Result
from mechlens.results.claims import verdict_statement
from mechlens.show.page_style import CSS, SHOW_PLOTS, SHOW_VIEWS
from mechlens.show.section import Cell, Figure, Section, Table, section
from mechlens.text.color import is_dark, sequential

_COLUMNS = tuple(each.words.capitalize() for each in Comparison.columns)


def write_report(
    path: str | os.PathLike[str],
    *shown: Result | Section,
    title: str = "",
    model: ModelInfo | None = None,
    comparisons: Sequence[Comparison] | None = None,
    command: str = "",
) -> Path:
    """Write results to one HTML page that opens anywhere without a network.

    The same arguments give the same bytes. Scripts and data are embedded, and a content security policy
    forbids every request. The JavaScript of plotly (5 MB) and circuitsvis (1 MB) is included only if needed.

    Args:
        path: the file, ending in `.html`; its folder must exist.
        shown: results or sections, in the order of the page.
        title: empty takes the first section's.
        model: the model described at the top; None takes the first result's.
        comparisons: claims with their verdicts, for the table at the top; None leaves the table out.
        command: the command line that makes the same page.

    Returns:
        The path written.

    Raises:
        ValueError: nothing to show, a path without `.html`, or a folder that does not exist.

    Example:
        >>> found = mechlens.direct_logit_attribution(model, "The captain of the")
        >>> mechlens.write_report(tmp / "attribution.html", found).name
        'attribution.html'
    """
    target = Path(path)
    if target.suffix != ".html":
        raise ArgumentError("path", "an .html file", str(target))
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {target}: there is no folder {target.parent}")
    page = render_report(*shown, title=title, model=model, comparisons=comparisons, command=command)
    with replacing(target) as part:
        # A lone surrogate (half a character, from a byte-level token) has no UTF-8 form.
        part.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
    return target


def render_report(
    *shown: Result | Section,
    title: str = "",
    model: ModelInfo | None = None,
    comparisons: Sequence[Comparison] | None = None,
    command: str = "",
) -> str:
    """The page that `write_report` writes, as text."""
    if not shown and comparisons is None:
        raise ValueError("there is nothing to show: give at least one result or section")
    sections = [each if isinstance(each, Section) else section(each) for each in shown]
    model = model or next((each.model for each in shown if isinstance(each, Result)), None)
    title = title or (sections[0].title if sections else "Published and measured")
    terms = {term: text for each in sections for term, text in each.terms.items()}
    chapters = []
    if comparisons is not None:
        chapters.append(("published-and-measured", "Published and measured", _comparisons(comparisons)))
    used: list[tuple[Figure, Any]] = []
    for at, each in enumerate(sections, start=1):
        parts = "\n".join(
            _part(part, used)
            for part in each.parts
            if not (isinstance(part, Table) and part.where == "terminal")
        )
        body = paragraphs(each.text) + (f'\n<div class="parts">\n{parts}\n</div>' if parts else "")
        chapters.append((f"section-{at}", each.title, body))
    if terms:
        items = "".join(
            f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in sorted(terms.items())
        )
        chapters.append(("definitions", "Definitions", f'<dl class="terms">{items}</dl>'))
    if command:
        body = f'<p>This page was written by</p>\n<pre tabindex="0"><code>{escape(command)}</code></pre>'
        chapters.append(("reproduce", "How to reproduce", body))
    links = "".join(f'<li><a href="#{place}">{escape(name)}</a></li>' for place, name, _ in chapters)
    main = "\n".join(
        f'<section aria-labelledby="{place}">\n<h2 id="{place}">{escape(name)}</h2>\n{body}\n</section>'
        for place, name, body in chapters
    )
    return f"""\
{html_head(title)}
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<h1>{escape(title)}</h1>
{_facts(model) if model else ""}
<nav aria-label="Contents"><ol>{links}</ol></nav>
</header>
<noscript><p class="statement">The figures need JavaScript; the text and the tables do not.</p></noscript>
<main id="main" tabindex="-1">
{main}
</main>
{_scripts(used)}
</body>
</html>
"""


def _facts(model: ModelInfo) -> str:
    processing = {True: "LayerNorm folded in, centered", False: "as trained", None: "processing unknown"}
    facts = {
        "Model": model.name + (f" ({model.revision})" if model.revision else ""),
        "Architecture": model.architecture,
        "Layers": f"{model.n_layers}, with {model.n_heads} heads each",
        "Width (d_model)": str(model.d_model),
        "Vocabulary": str(model.d_vocab),
        "Context": f"{model.n_ctx} tokens",
        "Engine": f"{model.engine}, TransformerLens {model.engine_version}",
        "Weights": f"{model.dtype}, {processing[model.processing]}",
    }
    if model.quantization is not None:
        facts["From a GGUF file"] = f"{model.quantization}; results are those of the rounded weights"
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    statement = escape(verdict_statement(comparisons))
    if not comparisons:
        return f"<p>{statement}</p>"
    missed = any(each.verdict == NOT_REPRODUCED for each in comparisons)
    statement = f'<p class="statement{" missed" if missed else ""}">{statement}</p>'
    rows = "".join(map(_comparison, comparisons))
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in _COLUMNS)
    # The roles are explicit because the CSS that stacks the cells removes the implicit ones.
    return (
        f'{statement}\n<table class="comparisons" role="table" aria-label="Published and measured">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table>'
    )


def _comparison(each: Comparison) -> str:
    look, sign = {REPRODUCED: ("good", "✓"), NOT_JUDGED: ("open", "?")}.get(each.verdict, ("bad", "✗"))
    claim, *values, verdict = map(escape, each.row)
    cells = [*values, f'<span class="verdict {look}"><span aria-hidden="true">{sign}</span> {verdict}</span>']
    return (
        f'<tr role="row"><th scope="row" role="rowheader">{claim}<small>{escape(each.source)}</small></th>'
        + "".join(
            f'<td role="cell" data-column="{column}">{cell}</td>'
            for column, cell in zip(_COLUMNS[1:], cells, strict=True)
        )
        + "</tr>"
    )


def _part(part: Table | Figure, used: list[tuple[Figure, Any]]) -> str:
    if isinstance(part, Table):
        return table_html(part)
    drawn = part.figure
    used.append((part, drawn))
    place = f"figure-{len(used)}"
    caption = f"<figcaption>{escape(part.caption)}</figcaption>"
    label = escape(part.description or part.caption)
    if isinstance(drawn, View):
        return (
            f'<figure class="wide"><div id="{place}" class="view" role="group" aria-label="{label}">'
            f"</div>{caption}</figure>"
        )
    layout = drawn.layout
    style = f"height:{layout.height or 450}px"
    if part.keeps_width and layout.width:
        style += f";width:{layout.width}px"
    elif part.wide and layout.width:
        style += f";max-width:{layout.width}px"
    plot = f'<div id="{place}" class="plot" role="img" aria-label="{label}" style="{style}"></div>'
    if part.keeps_width:
        # focusable, so that the keyboard can scroll it
        plot = f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{plot}</div>'
    return f"<figure{' class=wide' if part.wide else ''}>{plot}{caption}</figure>"


def table_html(table: Table) -> str:
    """A table as HTML, with its text escaped."""
    css = [' class="number"' if table.is_number(at) else "" for at in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{c}>{escape(name)}</th>' for name, c in zip(table.headings, css, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(_cell(cell, c) for cell, c in zip(row, css, strict=True))}</tr>"
        for row in table.cells()
    )
    caption = escape(table.caption)
    body = (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table>'
        f"{'' if table.folded else f'<caption>{caption}</caption>'}"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if table.folded:
        return f'<details class="wide"><summary>{caption}</summary>{body}</details>'
    return f'<div class="wide">{body}</div>'


def _cell(cell: Cell, css: str) -> str:
    if cell.shade != cell.shade:
        return f"<td{css}>{escape(cell.text)}</td>"
    ground = sequential(cell.shade)
    ink = "#fff" if is_dark(ground) else "#000"
    return f'<td style="background:rgb{ground};color:{ink}">{escape(cell.text)}</td>'


def paragraphs(text: str) -> str:
    """Plain text as HTML; an empty line starts a paragraph."""
    found = filter(None, map(str.strip, re.split(r"\n\s*\n", text)))
    return "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in found)


def _scripts(used: Sequence[tuple[Figure, Any]]) -> str:
    data = []
    for at, (_, drawn) in enumerate(used, start=1):
        if isinstance(drawn, View):
            value = {"component": drawn.component, "props": drawn.props}
        else:
            # The engine is named because another one, if installed, would give other bytes.
            value = json.loads(plotly.io.to_json(drawn, validate=False, engine="json"))
            value["layout"].pop("width", None)
            # A finger that scrolls the page must not zoom the figures that it crosses.
            value["layout"]["dragmode"] = False
        data.append(f'<script type="application/json" id="figure-{at}-data">{script_json(value)}</script>')
    code = []
    if any(not isinstance(drawn, View) for _, drawn in used):
        code += [get_plotlyjs(), SHOW_PLOTS]
    if any(isinstance(drawn, View) for _, drawn in used):
        code += [circuitsvis_bundle(), f"{SHOW_VIEW}\n{SHOW_VIEWS}"]
    return "\n".join(data + [f"<script>\n{each}\n</script>" for each in code])
