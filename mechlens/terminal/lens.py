"""The logit lens in a terminal: top guesses by layer and position, on coloured ground."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows

if TYPE_CHECKING:
    from rich.text import Text

    from mechlens.results import LogitLensResult

FEW_ROWS = 26
"""Up to so many layers each has its line; in a deeper model a run of layers with the same guesses is told in
one."""
MAX_ROWS = 40
"""Lines of layers below one another; where there are more, those with the most similar guesses are told in
one."""
LAST_ROWS = 8
"""The last layers, where predictions form, each have their line."""
MAX_POSITIONS = 64
"""Of a longer text the last ones are shown."""


def print_lens(
    found: LogitLensResult, stat: str = "kl", *, target: str | None = None, high: float | None = None
) -> None:
    """Print the first sequence as `plot_logit_lens` draws it, in stretches as wide as the terminal is.

    Above the guesses stands what really follows, below them what was read; a right guess has a star. Where
    there are colours, the ground has that of the statistic. What is left out is said, as is the colours'
    range. Ranks and probabilities of targets after the last position stand in a table of their own.

    Raises:
        ValueError: as `plot_logit_lens`.
    """
    from rich.console import Console
    from rich.text import Text

    from mechlens.plots.logit_lens import lens_stat, shown_positions

    shown = lens_stat(found, stat, target)
    positions = shown_positions(found, 0)
    console = Console(highlight=False)
    console.print(Text(_title(found), style="bold"), soft_wrap=True)
    last = positions[-MAX_POSITIONS:]
    console.print("Each row's top guess after each token, * where it is what follows.", soft_wrap=True)
    columns = [found.positions.index(position) for position in last]
    runs = _runs(found, columns)
    left_out = _left_out(runs, len(last), len(positions))
    if left_out:
        console.print(left_out, soft_wrap=True)
    coloured = console.color_system is not None and not console.no_color
    top = shown.bound(shown.values[:, 0, columns], high)
    without = f"Without colours {_named(shown)} is not shown; --csv and --json have it."
    console.print(_legend(shown, top) if coloured else without, soft_wrap=True)
    label = max(map(len, found.rows))
    size = min(7 if console.width < 100 else 9, _widest(found, last)) + 1
    at_once = max(1, (console.width - label) // (size + 1))
    count = math.ceil(len(last) / at_once)
    length = math.ceil(len(last) / count)
    for at in range(0, len(last), length):
        console.print()
        for line in _stretch(found, shown, runs, last[at : at + length], label, size, top, coloured):
            line.truncate(console.width)
            console.print(line, no_wrap=True, crop=False, overflow="ignore")
    if found.target_ids:
        console.print()
        _print_targets(found, positions[-1])


def lens_json(found: LogitLensResult) -> dict[str, Any]:
    """The result as one object: what was read and how, and a cell for each row, sequence and position."""
    from dataclasses import asdict

    cells = found.to_dataframe().to_dict(orient="records")
    where = {position: at for at, position in enumerate(found.positions)}
    for cell in cells:
        place = found.rows.index(cell["row"]), cell["sequence"], where[cell["pos"]]
        probabilities = found.top_probabilities[place].tolist()
        cell["guesses"] = [
            {"guess": guess, "probability": probability}
            for guess, probability in zip(found.texts(found.top_ids[place]), probabilities, strict=True)
        ]
        del cell["guess"], cell["probability"]
    names = ("component", "onto_stream", "decoder", "last_blocks", "prepend_bos", "rows")
    return {"model": asdict(found.model), **{name: getattr(found, name) for name in names}, "cells": cells}


# -- steps -----------------------------------------------------------------------------------------


def _title(found: LogitLensResult) -> str:
    from mechlens.plots.logit_lens import facts

    return f"Logit lens: {', '.join(facts(found))}"


def _runs(found: LogitLensResult, columns: Sequence[int]) -> list[list[int]]:
    """The rows in runs, from below: a run's last row is shown, and stands for the others.

    Heads stand alone, as do `embed` and the last layers. A run of two would save no line, so there is none.
    """
    ids = found.top_ids[:, 0, columns, 0]
    n_rows = len(found.rows)
    runs = [[row] for row in range(n_rows)]
    if found.component == "result" or n_rows <= FEW_ROWS:
        return runs

    def cost(at: int) -> tuple[int, int]:
        """Most cells in which a row would differ from the one shown for it, and the length of the run."""
        run, other = runs[at], runs[at + 1]
        return int((ids[run] != ids[other[-1]]).sum(1).max()), len(run) + len(other)

    def lines() -> int:
        return sum(min(len(run), 2) for run in runs)

    while len(runs) > LAST_ROWS + 2:
        # the first run is embed
        least = min(range(1, len(runs) - 1 - LAST_ROWS), key=cost)
        if cost(least)[0] and lines() <= MAX_ROWS:
            break
        runs[least : least + 2] = [runs[least] + runs[least + 1]]
    return [part for run in runs for part in ([run] if len(run) > 2 else [[row] for row in run])]


def _run_words(found: LogitLensResult, run: Sequence[int], columns: Sequence[int]) -> str:
    """What is said of the rows that are not shown: `layers 3 to 9: as layer 10`."""
    ids = found.top_ids[:, 0, columns, 0]
    first, last, shown = (found.rows[row] for row in (run[0], run[-2], run[-1]))
    share = float((ids[run[:-1]] == ids[run[-1]]).double().mean())
    # nearly all is not all
    alike = "" if share == 1 else f" in {math.floor(100 * share)}% of the guesses"
    return f"layers {first} to {last}: as layer {shown}{alike}"


def _left_out(runs: Sequence[Sequence[int]], n_shown: int, n_pos: int) -> str:
    said = []
    n_rows = sum(map(len, runs))
    if len(runs) < n_rows:
        said.append(f"{len(runs)} of {n_rows} rows, one for each run of layers with like guesses")
    if n_shown < n_pos:
        said.append(f"the last {n_shown} of {n_pos} positions")
    others = ", --position chooses" if n_shown < n_pos else ""
    return f"Shown: {'; '.join(said)}. --csv has all{others}." if said else ""


def _named(shown: Any) -> str:
    """The statistic's title as the command's help writes it: few encodings have the sign in a KL."""
    return str(shown.title).replace("\N{DOUBLE VERTICAL LINE}", "||")


def _legend(shown: Any, top: float) -> Text:
    """What the colours mean, with their range."""
    from rich.text import Text

    from mechlens.text.color import sequential

    low = shown.written(1.0) if shown.is_rank else "0"
    line = Text(f"Colour: {_named(shown)}, from {low} ")
    for step in range(6):
        line.append("  ", style=_style(sequential(step / 5)))
    line.append(f" to {shown.written(top)}")
    if bool((shown.values > top).any()):
        line.append(" and beyond")
    return line


def _stretch(
    found: LogitLensResult,
    shown: Any,
    runs: Sequence[Sequence[int]],
    positions: Sequence[int],
    label: int,
    size: int,
    top: float,
    coloured: bool,
) -> Iterator[Text]:
    """The lines of some positions, the last layer first."""
    from rich.text import Text

    from mechlens.plots.logit_lens import followers
    from mechlens.text.color import sequential

    columns = [found.positions.index(position) for position in positions]
    read, follows = found.texts(found.tokens[0]), followers(found, 0)
    above = Text(" " * label)
    below = Text(" " * label)
    for position in positions:
        above.append(" " + _fit(read[position + 1], size) if position in follows else " " * (size + 1), "dim")
        below.append(" " + _fit(read[position], size), "bold")
    yield above
    scaled = shown.scaled(shown.values[:, 0]) / max(math.log10(top) if shown.is_rank else top, 1e-12)
    for run in reversed(runs):
        row = run[-1]
        line = Text(f"{found.rows[row]:>{label}}")
        guesses = found.texts(found.top_ids[row, 0, columns, 0])
        ids = found.top_ids[row, 0, columns, 0].tolist()
        for guess, token, position, column in zip(guesses, ids, positions, columns, strict=True):
            share = float(scaled[row, column])
            ground = _style(sequential(share)) if coloured and share == share else ""
            right = follows.get(position) == token
            line.append(" ")
            line.append(_fit(guess, size, star=right), ground + " bold" * right)
        yield line
        if len(run) > 1:
            yield Text(f"{'':>{label}} {_run_words(found, run, columns)}", "dim")
    yield below


def _fit(token: str, size: int, *, star: bool = False) -> str:
    """A token in so many columns of the terminal, with a star in the last where it is asked for."""
    from rich.cells import cell_len, set_cell_size

    from mechlens.text.display import visible_token

    text = visible_token(token)
    if cell_len(text) > size - 1:
        text = set_cell_size(text, size - 2) + "…"
    return set_cell_size(text + "*" * star, size)


def _widest(found: LogitLensResult, positions: Sequence[int]) -> int:
    from rich.cells import cell_len

    from mechlens.text.display import visible_token

    columns = [found.positions.index(position) for position in positions]
    texts = {*found.texts(found.tokens[0]), *found.texts(found.top_ids[:, 0, columns, 0])}
    return max(cell_len(visible_token(text)) for text in texts)


def _style(colour: tuple[int, int, int]) -> str:
    """Ground of a colour, with a text that stands out from it."""
    from mechlens.text.color import is_dark

    return f"{'#ffffff' if is_dark(colour) else '#000000'} on #{{:02x}}{{:02x}}{{:02x}}".format(*colour)


def _print_targets(found: LogitLensResult, position: int) -> None:
    """Rank and probability of each target after one position, by row: all rows, however many."""
    from mechlens.text.display import visible_token

    column = found.positions.index(position)
    lines = []
    for row in reversed(range(len(found.rows))):
        line = [found.rows[row]]
        for name in found.target_ids:
            rank, probability = found.rank[name], found.probability(name)
            line += [f"{rank[row, 0, column]:,.0f}", f"{probability[row, 0, column]:.3g}"]
        lines.append(line)
    names = [visible_token(name) for name in found.target_ids]
    heads = [head for name in names for head in (f"{name} rank", "probability")]
    read = visible_token(found.strings[str(int(found.tokens[0, position]))])
    print_rows(f"Targets after {read}, position {position}", ("row", *heads), lines)
