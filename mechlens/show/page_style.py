"""The style sheet and the scripts of a report."""

from __future__ import annotations

SHOW_PLOTS = """\
for (const place of document.querySelectorAll(".plot")) {
  const { data, layout } = JSON.parse(document.getElementById(place.id + "-data").textContent);
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };
  Plotly.newPlot(place, data, layout, config);
}"""

SHOW_VIEWS = """\
for (const place of document.querySelectorAll(".view")) {
  const { component, props } = JSON.parse(document.getElementById(place.id + "-data").textContent);
  showView(place.id, component, props);
}"""

CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #52606d; --line: #d9dee3; --accent: #0b5a91; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1160px; padding: 0 20px 64px; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 40px 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 48px 0 12px; padding-top: 12px;
  border-top: 1px solid var(--line); }
p, dd { max-width: 75ch; overflow-wrap: break-word; }
a { color: var(--accent); text-underline-offset: 2px; }
:focus-visible { outline: 3px solid #e69f00; outline-offset: 2px; }
main:focus { outline: none; }
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 12px; top: 8px; background: #fff; padding: 6px 12px; z-index: 10; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px 24px;
  margin: 0; padding: 16px 20px; background: #f4f7f9; border-radius: 8px; }
dt { font-weight: 600; }
.facts dt { font-size: .8rem; font-weight: 500; color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
nav ol { display: flex; flex-wrap: wrap; gap: 4px 22px; list-style: none; margin: 18px 0 0; padding: 0; }
.statement { padding: 10px 16px; border-left: 4px solid #009e73; background: #f1f9f6; }
.statement.missed { border-color: #d55e00; background: #fdf5f0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding: 8px 0; }
th, td { padding: 8px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--ink); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
.number { text-align: right; }
th small { display: block; font-weight: 400; color: var(--muted); }
.comparisons td { text-align: right; }
.comparisons thead th:not(:first-child) { text-align: right; }
.verdict { font-weight: 600; }
.good { color: #00704f; }
.bad { color: #a84600; }
.parts { display: grid; grid-template-columns: minmax(0, 1fr); gap: 28px; margin-top: 20px; }
.parts > * { min-width: 0; margin: 0; }
figcaption { font-size: .9rem; color: var(--muted); max-width: 75ch; margin-top: 4px; }
summary { cursor: pointer; color: var(--accent); padding: 6px 0; }
.view { max-width: 860px; overflow: hidden; }
.view h2 { font-size: 1rem; border: 0; line-height: 1.4; }
.view h3 { font-size: 1rem; font-weight: 600; margin: 8px 0 8px -12px; }
.view h4 { font-size: .75rem; line-height: 1.4; }
.terms dd { margin: 0 0 12px; color: var(--muted); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 14px 16px; background: #f4f7f9;
  border-radius: 8px; font-size: .9rem; }
@media (min-width: 900px) {
  .parts { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .wide { grid-column: 1 / -1; }
}
@media (min-width: 561px) {
  .comparisons :is(td, thead th):last-child { text-align: left; min-width: 11em;
    padding-left: 28px; }
  .comparisons td { overflow-wrap: break-word; }
}
@media (max-width: 560px) {
  body { padding: 0 14px 48px; }
  .facts { grid-template-columns: 1fr 1fr; padding: 14px; gap: 10px 14px; font-size: .9rem; }
  table { font-size: .8rem; }
  th, td { padding: 6px 5px; }
  thead th { white-space: normal; }
  .comparisons { font-size: .9rem; }
  .comparisons thead { display: none; }
  .comparisons tr { display: grid; grid-template-columns: repeat(3, 1fr); padding: 10px 0;
    border-bottom: 1px solid var(--line); }
  .comparisons :is(th, td), .comparisons td:last-child { border: 0; padding: 3px 0; text-align: left; }
  .comparisons :is(th, td:last-child) { grid-column: 1 / -1; }
  .comparisons td:not(:last-child)::before { content: attr(data-column); display: block; font-size: .8rem;
    color: var(--muted); }
}
@media print { nav, .skip { display: none; } figure, tr { break-inside: avoid; } }
"""
