"""Write docs/add-an-analysis.md from the files that it shows.

python docs/make_analysis_page.py
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add-an-analysis.md"
COMPUTATION = ("measures/attention_spread.py", "analyses/attention_spread.py")
AROUND = {
    "results/attention_spread.py": "The result has the numbers and describes them. Data frames, tables, "
    "hover text and JSON use its columns. Saving, loading, JSON and display in Jupyter come with `Result`.",
    "plots/attention_spread.py": "A plot function takes the result and returns a plotly figure. Shared "
    "layout is in `plots/style.py`.",
    "show/attention_spread.py": "A section is what to show of the result, in a terminal, on a page or in "
    "Jupyter. Figures are drawn only when displayed.",
    "cli/attention_spread.py": "A command declares its own options. The runner adds the shared ones, saves, "
    "prints, and reports errors about arguments as errors about options.",
}
LISTED = ("cli/commands.py", "__init__.pyi", "results/__init__.py")
"""Files in which the analysis is listed."""


def listing(path: str) -> list[str]:
    """The lines of a file that name the analysis, including the rest of a multiline entry."""
    lines = (ROOT / "mechlens" / path).read_text(encoding="utf-8").splitlines()
    if path != "cli/commands.py":
        return [line for line in lines if "attention_spread" in line or "AttentionSpread" in line]
    first = next(at for at, line in enumerate(lines) if '"attention-spread": ' in line)
    return lines[first : next(at for at in range(first, len(lines)) if lines[at] == "    ),") + 1]


def page() -> tuple[str, int]:
    """The text of the page, and the number of lines around the computation."""
    sources = {
        name: (ROOT / "mechlens" / name).read_text(encoding="utf-8") for name in (*COMPUTATION, *AROUND)
    }
    listed = {name: listing(name) for name in LISTED}
    around = sum(len(sources[name].splitlines()) for name in AROUND) + sum(map(len, listed.values()))
    computing = sum(len(sources[name].splitlines()) for name in COMPUTATION)
    parts = [
        "# Add an analysis",
        "`attention_spread` measures how widely each head spreads its attention. This page shows all of its "
        f"code: {computing} lines of computation, with docstrings, and {around} lines that name, save, plot, "
        "show and run it, using the mechanisms of [the design](design.md).",
        "## The computation",
        "A measure takes tensors and is independent of any model. An analysis takes a model and arguments, "
        "and returns a result.",
    ]
    for name in COMPUTATION:
        parts += [f"`mechlens/{name}`:", f"```python\n{sources[name].rstrip()}\n```"]
    parts.append("## The code around it")
    for name, about in AROUND.items():
        parts += [about, f"`mechlens/{name}`, {len(sources[name].splitlines())} lines:"]
        parts.append(f"```python\n{sources[name].rstrip()}\n```")
    parts.append("The names, which `mechlens` imports on first use:")
    parts += [
        f"`mechlens/{name}`:\n\n```python\n" + "\n".join(lines) + "\n```" for name, lines in listed.items()
    ]
    parts += [
        "## Its tests",
        "`tests/analyses/test_attention_spread.py` compares it with loops over single positions. Other tests "
        "fail until an analysis is complete. They need a handmade result in `tests/examples.py` (it must "
        "save, load and show), its figure in `tests/plots/gallery.py` (it must fit on a page), an example in "
        "each public docstring, and imports that respect the layers in `tests/test_layers.py`.",
    ]
    return "\n\n".join(parts) + "\n", around


if __name__ == "__main__":
    PAGE.write_text(page()[0], encoding="utf-8")
    print(PAGE, page()[1])
