"""Write docs/add-an-analysis.md from the files that it shows.

python docs/make_analysis_page.py
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add-an-analysis.md"
COMPUTATION = ("measures/attention_spread.py", "analyses/attention_spread.py")
AROUND = {
    "results/attention_spread.py": "The result holds the numbers and their words. Its columns say once what "
    "a data frame, a table, a hover text and JSON need. Saving, loading, JSON and the view in Jupyter come "
    "with `Result`.",
    "plots/attention_spread.py": "A figure takes the result and returns a plotly figure. Layout that figures "
    "share is in `plots/style.py`.",
    "show/attention_spread.py": "A section says what there is to show. A terminal, a page and Jupyter render "
    "it. Figures are drawn only where they are shown.",
    "cli/attention_spread.py": "A command declares its own options. The runner adds the shared ones, saves, "
    "prints, and turns errors about arguments into errors about options.",
}
LISTED = ("cli/commands.py", "__init__.pyi", "results/__init__.py")
"""Files in which the analysis is listed."""


def listing(path: str) -> list[str]:
    """The lines of a file that name the analysis; an entry of several lines is whole."""
    lines = (ROOT / "mechlens" / path).read_text(encoding="utf-8").splitlines()
    if path != "cli/commands.py":
        return [line for line in lines if "attention_spread" in line or "AttentionSpread" in line]
    first = next(at for at, line in enumerate(lines) if '"attention-spread": ' in line)
    return lines[first : next(at for at in range(first, len(lines)) if lines[at] == "    ),") + 1]


def page() -> tuple[str, int]:
    """The text of the page, and the lines around the computation."""
    sources = {
        name: (ROOT / "mechlens" / name).read_text(encoding="utf-8") for name in (*COMPUTATION, *AROUND)
    }
    listed = {name: listing(name) for name in LISTED}
    around = sum(len(sources[name].splitlines()) for name in AROUND) + sum(map(len, listed.values()))
    computing = sum(len(sources[name].splitlines()) for name in COMPUTATION)
    parts = [
        "# Add an analysis",
        "`attention_spread` asks how widely each head spreads its attention. It was added with the "
        f"mechanisms of [the design](design.md). Its computation is {computing} lines with their docstrings. "
        f"Everything around it, which names, saves, draws, shows and runs it, is {around} lines, all of them "
        "on this page.",
        "## The computation",
        "A measure takes tensors and knows no model. An analysis takes a model and arguments, and returns a "
        "result.",
    ]
    for name in COMPUTATION:
        parts += [f"`mechlens/{name}`:", f"```python\n{sources[name].rstrip()}\n```"]
    parts.append("## What is around it")
    for name, about in AROUND.items():
        parts += [about, f"`mechlens/{name}`, {len(sources[name].splitlines())} lines:"]
        parts.append(f"```python\n{sources[name].rstrip()}\n```")
    parts.append("The names, which `mechlens` imports when they are first used:")
    parts += [
        f"`mechlens/{name}`:\n\n```python\n" + "\n".join(lines) + "\n```" for name, lines in listed.items()
    ]
    parts += [
        "## Its tests",
        "`tests/analyses/test_attention_spread.py` compares it with loops over single positions. Guards that "
        "fail until an analysis is complete: a hand-made result in `tests/results` (it must save, load and "
        "show), its figure in `tests/plots/gallery.py` (it must fit a page), an example in each public "
        "docstring, and the floors of `tests/test_layers.py`.",
    ]
    return "\n\n".join(parts) + "\n", around


if __name__ == "__main__":
    PAGE.write_text(page()[0], encoding="utf-8")
    print(PAGE, page()[1])
