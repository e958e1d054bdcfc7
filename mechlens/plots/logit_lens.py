"""Pictures of the logit lens: top guesses by layer and position, and statistics by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.plots.style import (
    ABSENT,
    BLUE,
    GREEN,
    HEIGHT,
    INK,
    PURPLE,
    TEMPLATE,
    VERMILION,
    WIDTH,
    figure_text,
    heatmap,
    titles,
    top_margin,
)
from mechlens.results import LogitLensResult
from mechlens.text.color import is_dark, sequential
from mechlens.text.display import number, turns, visible_token

STATS = {
    "probability": "probability of the top guess",
    "rank": "rank of the model's final guess",
    "kl": "KL(final ‖ layer), nats",
    "kl_input": "KL(input ‖ layer), nats",
    "input_rank": "rank of the input token",
    "next_rank": "rank of the token that follows",
    "entropy": "entropy, nats",
}
"""What a lens can be coloured by, and what it is called there."""
RANKS = ("rank", "input_rank", "next_rank")
OF_TARGET = ("rank", "probability")
_OWN = {"final": "the model's final guess", "input": "the input token", "next": "the token that follows"}

_LETTERS = (10, 8, 6)
"""Of a token, from which on an ellipsis stands for the rest: as many as fit."""
_BESIDE = 168
"""Width of what stands beside the cells: layers and the colour bar; in pixels."""
MAX_LINES = 12
"""As many lines as have a marker of their own."""
_SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "x", "star"),
    *("circle-open", "square-open", "diamond-open", "triangle-down-open", "cross-open", "hexagram-open"),
)
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE)
_PAIRS = {("attn_out", "mlp_out"), ("resid_mid", "resid_post")}
# What two results must agree on to stand in one picture.
_SHARED = (
    "model",
    "tokens",
    "mask",
    "positions",
    "rows",
    "onto_stream",
    "decoder",
    "last_blocks",
    "statistics",
)


@dataclasses.dataclass(frozen=True, eq=False)
class LensStat:
    """A statistic of a lens, as pictures and tables show it."""

    title: str
    values: Tensor
    """`[row, batch, read]`; nan where it is undefined."""
    is_rank: bool
    """Whether it belongs on a logarithmic axis that begins at 1."""
    is_probability: bool

    def written(self, value: float) -> str:
        if self.is_rank and value == value:
            return f"{value:,.0f}"
        return "undefined" if value != value else number(value)

    def scaled(self, values: Tensor) -> Tensor:
        """As they are coloured: ranks by their logarithm."""
        return values.double().log10() if self.is_rank else values.double()

    def bound(self, values: Tensor, high: float | None) -> float:
        """The value at the dark end of the colours: `high`, or the largest there is."""
        if high is not None:
            lowest = 1 if self.is_rank else 0
            if not lowest < high < math.inf:
                raise ValueError(
                    f"the colours of the {self.title} need a high above {lowest} (finite), but it is {high}"
                )
            return float(high)
        if self.is_probability:
            return 1.0
        seen = values[values.isfinite()]
        return max(float(seen.max()) if len(seen) else 0.0, 10.0 if self.is_rank else 1e-6)


def lens_stat(result: LogitLensResult, stat: str, target: str | None = None) -> LensStat:
    """A statistic of a lens by its name.

    Args:
        stat: one of `STATS`.
        target: for `rank` and `probability`: whose; `final`, `input`, `next` or one of the result's targets.
            None is the final guess's rank, and the probability of each cell's own top guess.

    Raises:
        ValueError: no such statistic or target, or one that is undefined for this model.
    """
    check_stat(stat, target)
    title = STATS[stat]
    if target is not None and target not in result.rank:
        raise ValueError(f"no token {target!r} in this result, which has {', '.join(map(repr, result.rank))}")
    needed = statistic_of(stat, target)
    if needed is not None and needed not in result.statistics:
        raise ValueError(
            f"this lens was made without {needed}, which {stat} needs: make it with statistics={needed!r} "
            "among others, or leave statistics out"
        )
    if target is not None:
        title = f"{stat} of {_OWN.get(target) or visible_token(target)}"
    if stat in RANKS:
        values = result.rank[target or {"rank": "final", "input_rank": "input", "next_rank": "next"}[stat]]
    elif stat == "probability":
        values = result.probability(target) if target else result.top_probabilities[..., 0]
    else:
        values = {"kl": result.kl_final, "kl_input": result.kl_input, "entropy": result.entropy}[stat]
    if stat == "kl_input" and values.isnan().all():
        raise ValueError(
            f"{title} is undefined: this model's unembedding is not tied to its embedding, so the row embed "
            "says nothing of the input; input_rank is defined"
        )
    return LensStat(title, values, stat in RANKS, stat == "probability")


def statistic_of(stat: str, target: str | None = None) -> str | None:
    """What a lens must have been asked for, so that this can be shown; None where every lens has it."""
    if stat == "probability":
        return "log_prob" if target else None
    if stat in RANKS:
        return "rank"
    return "kl_final" if stat == "kl" else stat


def check_stat(stat: str, target: str | None = None) -> None:
    """Make sure that there is such a statistic, and that it is one of a target where there is one.

    Raises:
        ValueError: there is not.
    """
    if stat not in STATS:
        raise ValueError(f"stat must be one of {', '.join(STATS)}, but is {stat!r}")
    if target is not None and stat not in OF_TARGET:
        raise ValueError(f"only {' and '.join(OF_TARGET)} are of a target, but {target!r} came with {stat}")


def plot_logit_lens(
    result: LogitLensResult,
    stat: str = "kl",
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    target: str | None = None,
    high: float | None = None,
) -> go.Figure:
    """Draw the top guess of each layer at each position, coloured by a statistic; layers go upwards.

    Below stand the tokens read, with the role where a turn of a conversation begins, above the tokens that
    really follow, starred where the model's own guess is right; a guess that is what follows is bold. Under
    the cursor stand the most likely tokens with their probabilities and the statistic. Padding is left out.

    Args:
        stat: one of `probability`, `rank`, `kl`, `kl_input`, `input_rank`, `next_rank`, `entropy`; ranks are
            coloured on a logarithmic scale, and what is undefined is grey.
        row: which sequence of the batch.
        positions: which of the positions that were read; None draws the last that fit into 1,100 pixels, and
            says so where there are more.
        target: for `rank` and `probability`: whose; `final`, `input`, `next` or a target by its name.
        high: the value that gets the darkest colour, as do all beyond it; None is the largest there is, for
            probabilities 1. The original post takes 100 for ranks of the final guess, 1000 for the input's.

    Raises:
        ValueError: no such statistic, sequence, position or target, or a statistic that is undefined for this
            model.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    check_type("result", result, LogitLensResult)
    named = "head" if result.component == "result" else "layer"
    return _draw(result, lens_stat(result, stat, target), row, positions, high, named, "Logit lens")


def plot_sub_blocks(
    attn: LogitLensResult,
    mlp: LogitLensResult,
    stat: str = "kl",
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    target: str | None = None,
    high: float | None = None,
) -> go.Figure:
    """Draw two lenses as one, each layer's MLP above its attention; all else is as in `plot_logit_lens`.

    Args:
        attn: a lens on `attn_out`, or on `resid_mid`.
        mlp: the same of `mlp_out`, or of `resid_post`.

    Raises:
        ValueError: the two are no such pair, or differ in model, tokens, layers or decoder, and as
            `plot_logit_lens`.
    """
    check_type("attn", attn, LogitLensResult)
    check_type("mlp", mlp, LogitLensResult)
    both = stacked(attn, mlp)
    return _draw(
        both, lens_stat(both, stat, target), row, positions, high, "sub-block", "Logit lens by sub-block"
    )


def plot_lens_lines(
    result: LogitLensResult,
    stats: str | Sequence[str] = ("rank", "kl"),
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    target: str | None = None,
) -> go.Figure:
    """Draw statistics by layer, a line for each position, and the statistics below one another.

    Ranks have a logarithmic axis. Each line has a marker of its own.

    Args:
        stats: one or several of those that `plot_logit_lens` takes.
        row: which sequence of the batch.
        positions: which of the positions that were read, at most 12; None draws the last 6.
        target: whose `rank` and `probability`, as for `plot_logit_lens`.

    Raises:
        ValueError: more positions than can be told apart, no statistic, and as `plot_logit_lens`.
    """
    check_type("result", result, LogitLensResult)
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    if not stats:
        raise ValueError(f"no stat is asked for; there are {', '.join(STATS)}")
    of_target = [stat for stat in stats if stat in ("rank", "probability")]
    shown = [
        lens_stat(result, stat, target if stat in of_target or not of_target else None) for stat in stats
    ]
    columns = _columns(result, row, positions)
    if positions is None:
        columns = columns[-6:]
    if len(columns) > MAX_LINES:
        raise ValueError(
            f"{len(columns)} lines cannot be told apart: choose at most {MAX_LINES} positions with positions="
        )
    read = _read(result, row)
    places = list(range(len(result.rows)))
    height = _lines_height(len(stats))
    # between two panels stand labels only where there are more, or a long figure would have them far below
    apart = {1: 0, 2: 48}.get(len(stats), 84)
    figure = make_subplots(
        rows=len(stats), shared_xaxes=True, vertical_spacing=apart / (height - sum(_LINES_MARGIN.values()))
    )
    for line, column in enumerate(columns):
        position = result.positions[column]
        label = f"{position} {figure_text(visible_token(read[position], longest=16))}"
        look = {
            "line": {"color": _COLOURS[line % 4], "dash": _DASHES[line // 4 % 4], "width": 2},
            "marker": {"symbol": _SYMBOLS[line], "size": 8, "color": _COLOURS[line % 4]},
        }
        for at, each in enumerate(shown, start=1):
            values = each.values[:, row, column].tolist()
            hovers = [
                f"<b>{label}</b>, {name}<br>{figure_text(each.title)}: {each.written(value)}"
                for name, value in zip(result.rows, values, strict=True)
            ]
            trace = go.Scatter(
                x=places,
                y=[None if value != value else value for value in values],
                name=label,
                mode="lines+markers",
                cliponaxis=False,
                legendgroup=str(column),
                showlegend=at == 1,
                text=hovers,
                hoverinfo="text",
                **look,
            )
            figure.add_trace(trace, row=at, col=1)
    _lay_out_lines(figure, result, shown, columns)
    return figure


# -- heatmaps --------------------------------------------------------------------------------------


def _draw(
    result: LogitLensResult,
    stat: LensStat,
    row: int,
    positions: Sequence[int] | None,
    high: float | None,
    named: str,
    title: str,
) -> go.Figure:
    columns = _columns(result, row, positions)
    n_read = len(columns)
    for longest in _LETTERS:
        size = 12 if longest > min(_LETTERS) else 11
        guesses, below, above = _texts(result, row, columns, longest)
        widest = max(map(len, [*below, *above, *(guess for line in guesses for guess in line)]))
        # letters are somewhat wider than half their height
        column_width = max(34, 10 + 0.58 * size * widest)
        if _BESIDE + column_width * len(columns) <= WIDTH:
            break
    if positions is None:
        columns = columns[-int((WIDTH - _BESIDE) / column_width) :]
        guesses, below, above = _texts(result, row, columns, longest)
    values = stat.values[:, row, columns].double()
    bound = stat.bound(values, high)
    colours = stat.scaled(values)
    top = math.log10(bound) if stat.is_rank else bound
    n_rows = len(result.rows)
    row_height = 34 if n_rows <= 16 else max(14, min(24, (HEIGHT - 220) // n_rows))
    # in rows of a hundred heads letters are as small as can be read
    size = min(size, round(0.65 * row_height))
    undefined = values.isnan()
    cells: dict[str, Any] = {
        "x": list(range(len(columns))),
        "y": list(range(len(result.rows))),
        "texttemplate": "%{text}",
        "textfont": {"size": size, "color": INK},
        "hovers": _hovers(result, stat, row, columns),
        "xgap": 1,
        "ygap": 1,
    }
    marked = _marked(result, row, columns, guesses, (colours / top).tolist())
    figure = go.Figure(heatmap(colours.numpy(), low=0.0, high=top, text=marked, **cells))
    figure.data[0].colorbar.update(_colour_bar(stat, top, len(result.rows), cut=bool((values > bound).any())))
    if undefined.any():
        grey = torch.where(undefined, 1.0, torch.nan).numpy()
        # where the other trace has a value its text is enough
        only = [
            [text if absent else "" for text, absent in zip(*line, strict=True)]
            for line in zip(marked, undefined.tolist(), strict=True)
        ]
        figure.add_trace(heatmap(grey, low=0.0, high=1.0, text=only, **cells))
        figure.data[-1].update(colorscale=[ABSENT, ABSENT], showscale=False)
    title_text = titles(
        f"{title}: {stat.title.removesuffix(', nats')}",
        " · ".join(facts(result)),
        *(
            [f"the last {len(columns)} of {n_read} positions; positions= chooses others"]
            if len(columns) < n_read
            else []
        ),
        "cells: top guess, bold where it is what follows",
    )
    top_room = top_margin(title_text, 38)
    axis = {
        "tickmode": "array",
        "tickvals": cells["x"],
        "tickangle": 0,
        "tickfont": {"size": size},
        "range": [-0.5, len(columns) - 0.5],
        "showgrid": False,
        "ticks": "",
    }
    # an axis is drawn only where something is on it
    figure.add_trace(
        go.Scatter(x=[0], y=[0], xaxis="x2", mode="markers", opacity=0, hoverinfo="skip", showlegend=False)
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=title_text,
        width=int(max(520, _BESIDE + column_width * len(columns))),
        height=top_room + 76 + row_height * n_rows,
        margin={"t": top_room, "b": 62, "r": 16},
        xaxis={
            "title": {"text": "token read"},
            "ticktext": _with_turns(figure, result, row, columns, [figure_text(text) for text in below]),
            **axis,
        },
        xaxis2={
            "title": {"text": "token that follows, * where the model's guess is right", "font": {"size": 12}},
            "overlaying": "x",
            "matches": "x",
            "side": "top",
            "ticktext": [figure_text(text) for text in above],
            **axis,
        },
        yaxis={
            "title": {"text": named},
            "tickmode": "array",
            "tickvals": cells["y"],
            "ticktext": list(result.rows),
            "tickfont": {"size": size},
            "range": [-0.5, len(result.rows) - 0.5],
            "showgrid": False,
            "ticks": "",
            "ticklabelstandoff": 4,
        },
    )
    return figure


def _with_turns(
    figure: go.Figure, result: LogitLensResult, row: int, columns: Sequence[int], labels: Sequence[str]
) -> list[str]:
    """The labels with the role below them where a turn of a conversation begins, which gets a line."""
    begins, named = turns(_read(result, row)), list(labels)
    for at, column in enumerate(columns):
        place = result.positions[column]
        before = [start for start in begins if start <= place]
        # the first column tells whose turn it is in, wherever that began
        if before and (at == 0 or before[-1] == place):
            named[at] += f"<br><b>{begins[before[-1]]}</b>"
            if at:
                figure.add_vline(at - 0.5, line={"color": INK, "width": 1.5, "dash": "dot"})
    return named


def _columns(result: LogitLensResult, row: int, positions: Sequence[int] | None) -> list[int]:
    """Where the chosen positions of a sequence stand among those that were read; padding is left out."""
    if not 0 <= row < len(result.tokens):
        raise ValueError(f"there is no sequence {row}: there are {len(result.tokens)}")
    n_pos = result.tokens.shape[1]
    if positions is None:
        columns = [at for at, position in enumerate(result.positions) if result.mask[row, position]]
        if not columns:
            raise ValueError(f"sequence {row} has only padding where it was read")
        return columns
    columns = []
    for position in positions:
        if not -n_pos <= position < n_pos or position % n_pos not in result.positions:
            raise ValueError(f"position {position} was not read")
        if not result.mask[row, position]:
            raise ValueError(f"position {position} of sequence {row} is padding")
        columns.append(result.positions.index(position % n_pos))
    if not columns:
        raise ValueError("no position is asked for")
    return columns


def shown_positions(result: LogitLensResult, row: int) -> list[int]:
    """The positions of a sequence that were read and are no padding.

    Raises:
        ValueError: no such sequence, or nothing but padding was read.
    """
    return [result.positions[column] for column in _columns(result, row, None)]


def followers(result: LogitLensResult, row: int) -> dict[int, int]:
    """The id of the token that follows each position of a sequence; nothing follows the last."""
    tokens, mask = result.tokens[row].tolist(), result.mask[row].tolist()
    return {at: tokens[at + 1] for at in range(len(tokens) - 1) if mask[at] and mask[at + 1]}


def _read(result: LogitLensResult, row: int) -> list[str]:
    return result.texts(result.tokens[row])


def _texts(
    result: LogitLensResult, row: int, columns: Sequence[int], longest: int
) -> tuple[list[list[str]], list[str], list[str]]:
    """What stands in the cells, below and above them."""
    read, follows = _read(result, row), followers(result, row)
    places = [result.positions[column] for column in columns]
    guesses = [
        [visible_token(text, longest=longest) for text in result.texts(ids)]
        for ids in result.top_ids[:, row, columns, 0]
    ]
    below = [visible_token(read[place], longest=longest) for place in places]
    above = []
    for column, place in zip(columns, places, strict=True):
        right = follows.get(place) == int(result.final_ids[row, column])
        shown = visible_token(read[place + 1], longest=longest) if place in follows else ""
        if right and len(shown) > longest:
            # the star takes a letter's room
            shown = visible_token(read[place + 1], longest=longest - 1)
        above.append(shown + "*" * right)
    return guesses, below, above


def _marked(
    result: LogitLensResult,
    row: int,
    columns: Sequence[int],
    guesses: Sequence[Sequence[str]],
    shares: Sequence[Sequence[float]],
) -> list[list[str]]:
    """Each guess, bold where it is what follows, and light where its colour is dark."""
    follows = followers(result, row)
    wanted = [follows.get(result.positions[column]) for column in columns]
    ids = result.top_ids[:, row, columns, 0].tolist()
    lines = []
    for at, line in enumerate(guesses):
        marked = []
        for text, guess, follow, share in zip(line, ids[at], wanted, shares[at], strict=True):
            shown = figure_text(text)
            shown = f"<b>{shown}</b>" if guess == follow else shown
            light = share == share and is_dark(sequential(share))
            marked.append(f'<span style="color:#fff">{shown}</span>' if light else shown)
        lines.append(marked)
    return lines


def _hovers(result: LogitLensResult, stat: LensStat, row: int, columns: Sequence[int]) -> list[list[str]]:
    read = [figure_text(visible_token(text)) for text in _read(result, row)]
    seen = result.mask[row].long().cumsum(0)
    heads = []
    for column in columns:
        position, context = result.positions[column], int(result.context_length[row, column])
        window = f" ({context} tokens seen)" if context != seen[position] else ""
        heads.append(f"after <b>{read[position]}</b>, position {position}{window}")
    lines = []
    for index, label in enumerate(result.rows):
        line = []
        for head, column in zip(heads, columns, strict=True):
            texts = result.texts(result.top_ids[index, row, column])
            probabilities = result.top_probabilities[index, row, column].tolist()
            guesses = "<br>".join(
                f"{number(probability)} {figure_text(visible_token(text))}"
                for text, probability in zip(texts, probabilities, strict=True)
            )
            value = stat.written(float(stat.values[index, row, column]))
            line.append(f"{head}<br>row {label}: {figure_text(stat.title)} {value}<br>{guesses}")
        lines.append(line)
    return lines


def _colour_bar(stat: LensStat, top: float, n_rows: int, *, cut: bool) -> dict[str, Any]:
    """Ticks of the colour bar; where values are cut, the last says so."""
    bar: dict[str, Any] = {
        "title": {"text": figure_text(stat.title), "side": "right", "font": {"size": 12}},
        "y": 1,
        "yanchor": "top",
    }
    if n_rows > 24:
        bar |= {"lenmode": "pixels", "len": 420}
    if not (stat.is_rank or cut):
        return bar | {"dtick": None, "nticks": 6}
    if stat.is_rank:
        # what would stand on the last tick's toes is left out
        ticks = [float(power) for power in range(math.ceil(top)) if power < top - 0.15] + [top]
        texts = [f"{10**tick:,.0f}" for tick in ticks]
    else:
        ticks = [top * quarter / 4 for quarter in range(5)]
        texts = [f"{tick:.3g}" for tick in ticks]
    if cut:
        texts[-1] = f"≥ {texts[-1]}"
    return bar | {"dtick": None, "tickmode": "array", "tickvals": ticks, "ticktext": texts}


def facts(result: LogitLensResult) -> list[str]:
    """What was read and how, in a few words each."""
    facts = [result.model.name, result.component + (" onto the stream" if result.onto_stream else "")]
    if result.decoder != "final_norm":
        facts.append(f"decoder {result.decoder}")
    if result.last_blocks:
        count = result.last_blocks
        facts.append("through the last block" if count == 1 else f"through the last {count} blocks")
    if result.component == "result":
        facts.append("embed: the stream at its start, no head")
    return facts


def stacked(attn: LogitLensResult, mlp: LogitLensResult) -> LogitLensResult:
    """Two lenses as one: the row embed, then of each layer a row of the first and one of the second."""
    if (attn.component, mlp.component) not in _PAIRS:
        raise ValueError(
            "sub-blocks are attn_out and mlp_out, or resid_mid and resid_post, but these are "
            f"{attn.component} and {mlp.component}"
        )
    first, second = (
        {name: getattr(each, name) for name in _SHARED} | {"targets": tuple(each.target_ids)}
        for each in (attn, mlp)
    )
    for name, value in first.items():
        other = second[name]
        same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
        if not same:
            raise ValueError(f"the two lenses differ in {name}: make them with the same arguments")

    def merge(one: Tensor, two: Tensor) -> Tensor:
        layers = torch.stack([one[1:], two[1:]], dim=1).flatten(0, 1)
        return torch.cat([one[:1], layers])

    k = min(attn.top_ids.shape[-1], mlp.top_ids.shape[-1])
    labels = [f"{layer} {block}" for layer in attn.rows[1:] for block in ("attn", "MLP")]
    return dataclasses.replace(
        attn,
        rows=("embed", *labels),
        component=f"{attn.component} and {mlp.component}",
        top_ids=merge(attn.top_ids[..., :k], mlp.top_ids[..., :k]),
        top_probabilities=merge(attn.top_probabilities[..., :k], mlp.top_probabilities[..., :k]),
        entropy=merge(attn.entropy, mlp.entropy),
        kl_final=merge(attn.kl_final, mlp.kl_final),
        kl_input=merge(attn.kl_input, mlp.kl_input),
        log_prob={name: merge(values, mlp.log_prob[name]) for name, values in attn.log_prob.items()},
        rank={name: merge(values, mlp.rank[name]) for name, values in attn.rank.items()},
        strings=attn.strings | mlp.strings,
    )


# -- lines -----------------------------------------------------------------------------------------


_LINES_MARGIN = {"t": 104, "b": 56}


def _lines_height(n_panels: int) -> int:
    return 198 + (250 if n_panels <= 2 else 290) * n_panels


def _lay_out_lines(
    figure: go.Figure, result: LogitLensResult, shown: Sequence[LensStat], columns: Sequence[int]
) -> None:
    n_rows = len(result.rows)
    named = "head" if result.component == "result" else "layer"
    title = " and ".join(each.title.removesuffix(", nats") for each in shown)
    if len(shown) > 2:
        # they would not fit, and each stands at its own axis
        title = "logit lens"
    step = math.ceil(n_rows / 28)
    # the row embed, then layer 0 or the first that leaves the label room
    ticks = [0, *range(step, n_rows, step)] if step == 1 else [0, *range(1 + step, n_rows, step)]
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"{title[0].upper()}{title[1:]} by {named}",
            " · ".join(facts(result)),
        ),
        width=min(WIDTH, 620 + 22 * n_rows),
        height=_lines_height(len(shown)),
        margin=_LINES_MARGIN,
        legend={
            "orientation": "v",
            "x": 1.02,
            "y": 1,
            "yanchor": "top",
            "title": {"text": "position, token"},
            "itemwidth": 48,
        },
    )
    figure.update_xaxes(
        tickmode="array",
        tickvals=ticks,
        ticktext=[result.rows[at] for at in ticks],
        range=[-0.4, n_rows - 0.6],
        tickangle=-90 if named == "head" else 0,
        showgrid=False,
    )
    for at in range(1, len(shown) + 1) if len(shown) > 2 else (len(shown),):
        figure.update_xaxes(title_text=named, showticklabels=True, row=at, col=1)
    for at, each in enumerate(shown, start=1):
        values = each.values[..., list(columns)]
        axis: dict[str, Any] = {"title": {"text": each.title}}
        if each.is_rank:
            highest = math.log10(each.bound(values, None))
            axis |= {
                "type": "log",
                "dtick": 1,
                "range": [-0.08 * highest, 1.04 * highest],
                "tickformat": ",d",
            }
        else:
            axis |= {"rangemode": "tozero"}
        figure.update_yaxes(axis, row=at, col=1)
