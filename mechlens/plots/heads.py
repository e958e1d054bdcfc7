"""Figures of the repeated-token experiment: log-probabilities, head scores, attention patterns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from mechlens.arguments import check_counts, check_type
from mechlens.plots.circuitsvis import View
from mechlens.plots.style import (
    BLUE,
    DIVERGING,
    GRID,
    INK,
    MUTED,
    NO_TICKS,
    TEMPLATE,
    VERMILION,
    WIDTH,
    figure_text,
    head_heatmap,
    heatmap,
    titles,
    top_margin,
)
from mechlens.results import AttentionPatterns, HeadScores, RepeatedTokenPerformance, head_label
from mechlens.results.heads import score_range, score_title, written_range
from mechlens.text.color import SEQUENTIAL
from mechlens.text.display import count, number, turns, visible_token

COVERAGE = 0.9
"""Share of the sequences inside the band of `plot_log_probs`."""

_LABEL = 16
"""Characters of a token's label. Tokens of a hundred characters would push the figure off the page."""
_PATTERNS = 4
"""Patterns drawn by default."""


def plot_log_probs(result: RepeatedTokenPerformance) -> go.Figure:
    """Draw the log-probability of the correct token at each position of the first and the second copy.

    The line is the mean over all sequences of all seeds, and the band contains the central 90% of them. The
    dotted line is a uniform guess over the vocabulary.

    Returns:
        A figure in nats, with the traces `band`, `mean` and `uniform guess`. `x` is the position of the
        *predicted* token, so the last position, which predicts nothing, has no point.

    Raises:
        TypeError: `result` is not a `RepeatedTokenPerformance`.

    Example:
        >>> on = mechlens.RepeatedTokens(seq_len=10, batch=2, seeds=[0])
        >>> found = mechlens.repeated_token_performance(model, on)
        >>> [trace.name for trace in mechlens.plot_log_probs(found).data]
        ['band', 'mean', 'uniform guess']
    """
    check_type("result", result, RepeatedTokenPerformance)
    log_prob = result.log_prob[..., :-1].flatten(0, 1).double().cpu()
    positions = list(range(1, log_prob.shape[1] + 1))
    edges = torch.tensor([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], dtype=torch.float64)
    low, high = log_prob.quantile(edges, dim=0).tolist()
    uniform = -math.log(result.model.d_vocab)

    figure = go.Figure(
        [
            go.Scatter(
                name="band",
                x=positions + positions[::-1],
                y=high + low[::-1],
                # by default plotly draws markers on short lines
                mode="lines",
                fill="toself",
                fillcolor="rgba(0, 114, 178, 0.22)",
                line={"width": 0},
                hoverinfo="skip",
            ),
            go.Scatter(
                name="mean",
                x=positions,
                y=log_prob.mean(0).tolist(),
                mode="lines",
                line={"color": BLUE, "width": 2.5},
                customdata=list(zip(low, high, strict=True)),
                hovertemplate=(
                    "position %{x}<br>mean %{y:.3f} nats<br>"
                    f"{COVERAGE:.0%} of sequences: %{{customdata[0]:.2f}} to %{{customdata[1]:.2f}}"
                    "<extra></extra>"
                ),
            ),
            go.Scatter(
                name="uniform guess",
                x=[positions[0] - 0.5, positions[-1] + 0.5],
                y=[uniform, uniform],
                mode="lines",
                line={"color": MUTED, "width": 1.5, "dash": "dot"},
                hovertemplate=f"uniform guess: {number(uniform)} nats<extra></extra>",
            ),
        ]
    )
    first = int(result.prepend_bos)
    halves = (("first", first, "white"), ("second", first + result.seq_len, "#eef3f7"))
    for name, start, color in halves:
        left, right = max(start, 1) - 0.5, start + result.seq_len - 0.5
        mean = result.estimates[f"{name}_half_log_prob"][0]
        accuracy = result.estimates[f"{name}_half_accuracy"][0]
        figure.add_vrect(left, right, fillcolor=color, line_width=0, layer="below")
        figure.add_annotation(
            x=(left + right) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            text=f"<b>{name} copy</b><br>mean {number(mean, 2)} nats<br>accuracy {number(accuracy, 2)}",
        )
    figure.add_vline(first + result.seq_len - 0.5, line={"color": MUTED, "width": 1, "dash": "dash"})
    n_sequences = log_prob.shape[0]
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            "Log-probability of the correct token (nats)",
            result.model.name,
            f"line: mean of {n_sequences} sequences; band: {COVERAGE:.0%} of them",
            f"dotted: uniform guess, {number(uniform, 2)} nats",
        ),
        width=960,
        height=460,
        margin={"t": 150},
        showlegend=False,
        xaxis={
            "title": {"text": "position of the predicted token"},
            "range": [0.5, positions[-1] + 0.5],
            "showgrid": False,
        },
        yaxis={"title": {"text": "log-probability (nats)"}},
    )
    return figure


def plot_head_scores(result: HeadScores, kind: str, *, labeled: int | None = None) -> go.Figure:
    """Draw one score of every head as a heatmap, with layer 0 at the bottom.

    The colors span the whole range of the score ([0, 1], or [-1, 1] around a neutral 0 for the copying
    score), so figures of different models are comparable. A head without a score is gray. Hover for a head's
    name, score, interval and null.

    Args:
        kind: a score of the result, such as `"induction_score"`.
        labeled: write the score into the cells of this many heads, strongest first. None labels all heads
            of a model with at most 48, and 5 heads of a larger one. Layers of more than 16 heads have no
            room for labels.

    Returns:
        A heatmap `[layer, head]`.

    Raises:
        TypeError: `result` is not a `HeadScores`.
        ValueError: the result has no such score.

    Example:
        >>> on = mechlens.RepeatedTokens(seq_len=10, batch=2, seeds=[0])
        >>> found = mechlens.score_heads(model, on)
        >>> mechlens.plot_head_scores(found, "induction_score").data[0].z.shape
        (4, 6)
    """
    check_type("result", result, HeadScores)
    mean = result.mean(kind).double().cpu()
    n_heads = mean.shape[1]
    if labeled is None:
        labeled = mean.numel() if mean.numel() <= 48 else 5
    strongest = list(result.ranked(kind))[:labeled]
    written = [[""] * n_heads for _ in mean]
    for (layer, head), score in strongest if n_heads <= 16 else ():
        written[layer][head] = number(score, 2).replace("0.", ".").replace("1.00", "1.0")
    low, high = score_range(kind)
    figure = head_heatmap(
        mean,
        _words(result, kind),
        low=low,
        high=high,
        name=figure_text(kind),
        text=written,
        texttemplate="%{text}",
        textfont={"size": 12 if n_heads <= 8 else 10 if n_heads <= 12 else 9},
    )
    top = ", ".join(f"{head_label(*head)} {number(score, 2)}" for head, score in strongest[:3])
    return figure.update_layout(
        title_text=titles(
            f"{score_title(kind)} ({number(low, 0)} to {number(high, 0)})",
            result.model.name,
            f"highest: {top}" if top else "no head has a score",
        )
    )


def plot_scores_against_nulls(result: HeadScores, kind: str, *, top: int = 10) -> go.Figure:
    """Draw the scores of the strongest heads with their intervals and null baselines.

    A score is evidence only if it is well above its null: the same measure without its cause. The strongest
    head is at the top.

    Args:
        kind: a score of the result, such as `"induction_score"`.
        top: number of heads to draw, at least 1.

    Returns:
        A figure with the traces `null` (if the score has one) and `score, 95% interval`.

    Raises:
        TypeError: `result` is not a `HeadScores`.
        ValueError: the result has no such score, or `top` is below 1.

    Example:
        >>> on = mechlens.RepeatedTokens(seq_len=10, batch=2, seeds=[0])
        >>> found = mechlens.score_heads(model, on)
        >>> figure = mechlens.plot_scores_against_nulls(found, "induction_score", top=3)
        >>> [trace.name for trace in figure.data]
        ['null', 'score, 95% interval']
    """
    check_type("result", result, HeadScores)
    check_counts(top=top)
    ranked = list(result.ranked(kind))[:top]
    heads = [head for head, _ in ranked]
    scores = [score for _, score in ranked]
    labels = [head_label(*head) for head in heads]
    lows, highs = ([float(bound[head]) for head in heads] for bound in result.intervals[kind])
    words = _words(result, kind)
    figure = go.Figure()
    if kind in result.nulls:
        null = result.null(kind)
        figure.add_trace(
            go.Scatter(
                name="null",
                x=[float(null[head]) for head in heads],
                y=labels,
                mode="markers",
                marker={"symbol": "diamond-open", "size": 10, "color": VERMILION, "line": {"width": 2}},
                hovertemplate="<b>%{y}</b><br>null %{x:.3f}<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            name=f"score, {result.confidence:.0%} interval",
            x=scores,
            y=labels,
            mode="markers",
            marker={"symbol": "circle", "size": 7, "color": BLUE},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - score for high, score in zip(highs, scores, strict=True)],
                "arrayminus": [score - low for low, score in zip(lows, scores, strict=True)],
                "color": INK,
                "thickness": 1.5,
                "width": 6,
            },
            text=[f"<b>{label}</b><br>{words(*head)}" for label, head in zip(labels, heads, strict=True)],
            hoverinfo="text",
        )
    )
    low, high = score_range(kind)
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"{score_title(kind)} ({number(low, 0)} to {number(high, 0)}), top {len(heads)}",
            result.model.name,
            "with each head's null" if kind in result.nulls else "this score has no null",
        ),
        width=560,
        height=210 + 25 * len(heads),
        margin={"b": 92},
        showlegend=True,
        legend={"y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "reversed"},
        xaxis={"title": {"text": "score"}, "range": [low - 0.03, high + 0.03]},
        # Categories, because plotly would read labels such as `1E5` as numbers.
        yaxis={"type": "category", "autorange": "reversed", "categoryarray": labels, "gridcolor": GRID},
    )
    return figure


def plot_attention(patterns: AttentionPatterns) -> View:
    """Show attention patterns as an interactive circuitsvis view: choose a head to enlarge its pattern.

    It works offline. Jupyter shows it, and `.write_html("attention.html")` saves it as a page. Attention is
    rounded to 3 decimals. Spaces and newlines in tokens are made visible, and long tokens are cut. The first
    token of each turn of a conversation is preceded by its role.

    Returns:
        A view, to display or save.

    Raises:
        TypeError: `patterns` is not an `AttentionPatterns`.

    Example:
        >>> found = mechlens.attention_patterns(model, "Mr. Pickwick met Mr. Winkle.", ["L0H3", "L1H2"])
        >>> mechlens.plot_attention(found).write_html("attention.html").name
        'attention.html'

    References: circuitsvis, https://github.com/TransformerLensOrg/CircuitsVis.
    """
    check_type("patterns", patterns, AttentionPatterns)
    return View(
        "AttentionHeads",
        {
            "attention": patterns.patterns.double().cpu().round(decimals=3).tolist(),
            "attentionHeadNames": list(patterns.labels),
            "tokens": patterns.shown_tokens,
            "maxValue": 1,
            "minValue": -1,
            "positiveColor": SEQUENTIAL[-1],
            "negativeColor": DIVERGING[0],
            "maskUpperTri": True,
        },
    )


def plot_attention_heatmap(patterns: AttentionPatterns, index: int | None = None) -> go.Figure:
    """Draw attention patterns as heatmaps: rows are attending (dest), columns attended (src) positions.

    Positions that a row cannot attend to are gray. Hover for both tokens and their positions. Dotted lines
    separate the turns of a conversation, and the first token of each is preceded by its role.

    Args:
        index: the pattern to draw; a negative index counts from the end. None draws the first 4 patterns, two
            in a row.

    Returns:
        A figure with one heatmap `[dest, src]` for each pattern drawn.

    Raises:
        TypeError: `patterns` is not an `AttentionPatterns`.
        ValueError: `index` is out of range.

    Example:
        >>> found = mechlens.attention_patterns(model, "Mr. Pickwick met Mr. Winkle.", ["L0H3", "L1H2"])
        >>> len(mechlens.plot_attention_heatmap(found).data)
        2
    """
    check_type("patterns", patterns, AttentionPatterns)
    n_patterns = len(patterns.heads)
    if index is not None and not -n_patterns <= index < n_patterns:
        raise ValueError(f"index {index} is out of range: there are {count(n_patterns, 'pattern')}")
    shown = list(range(min(n_patterns, _PATTERNS))) if index is None else [index]
    several = len(shown) > 1
    n_rows = math.ceil(len(shown) / 2)
    names = [patterns.labels[at] for at in shown]
    axis = _token_axis(patterns, crowded=several)
    width, height = (WIDTH, 120 + 480 * n_rows) if several else (720, 720)
    figure = make_subplots(
        rows=n_rows,
        cols=1 + several,
        horizontal_spacing=0.12 if several else 0,
        vertical_spacing=130 / (height - 160) if n_rows > 1 else 0,
        subplot_titles=names if several else None,
    )
    for at, which in enumerate(shown):
        place = {"row": at // 2 + 1, "col": at % 2 + 1}
        trace = _attention(patterns, which, named=several).update(showscale=at == 0)
        figure.add_trace(trace, **place)
        figure.update_xaxes(title_text="attended token (src)", tickangle=-90, **axis, **place)
        figure.update_yaxes(
            title_text="attending token (dest)",
            autorange="reversed",
            scaleanchor=f"x{at + 1}" if at else "x",
            **axis,
            **place,
        )
    about = f"one of {n_patterns} heads"
    if index is None:
        about = f"the first {len(shown)} of {n_patterns} heads; index= draws one"
    title = titles(
        f"Attention of {', '.join(names)} (0 to 1)",
        patterns.model.name,
        *([about] if len(shown) < n_patterns else []),
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=width,
        height=height,
        margin={"t": top_margin(title, 24 if several else 0)},
        plot_bgcolor=GRID,
    )
    for start in filter(None, turns(patterns.token_strings)):
        for add in (figure.add_vline, figure.add_hline):
            add(start - 0.5, line={"color": MUTED, "width": 1, "dash": "dot"}, row="all", col="all")
    return figure


def _attention(patterns: AttentionPatterns, index: int, *, named: bool) -> go.Heatmap:
    """One pattern, without the positions that a row cannot attend to; `named` hovers name the head."""
    pattern = patterns.patterns[index].double().cpu()
    future = torch.ones_like(pattern, dtype=torch.bool).triu(1)
    # only exact zeros are hidden: attention to later positions must show
    pattern = pattern.masked_fill(future & (pattern == 0), torch.nan)
    label = patterns.labels[index]
    tokens = [f"<b>{figure_text(visible_token(token))}</b>" for token in patterns.token_strings]
    first = f"<b>{label}</b><br>" if named else ""
    hovers = [
        [
            f"{first}from {tokens[dest]} ({dest})<br>to {tokens[src]} ({src})<br>attention {number(value)}"
            for src, value in enumerate(row)
        ]
        for dest, row in enumerate(pattern.tolist())
    ]
    return heatmap(pattern.numpy(), low=0.0, high=1.0, hovers=hovers, name=label)


def _token_axis(patterns: AttentionPatterns, *, crowded: bool) -> dict[str, Any]:
    """An axis of tokens: as many labels as have room, and always the first token of each turn."""
    n_pos, begins = len(patterns.token_strings), turns(patterns.token_strings)
    step = math.ceil(n_pos / (24 if crowded else 40))
    ticks = {at for at in range(0, n_pos, step) if not any(abs(at - start) < step for start in begins)}
    longest = _LABEL // 2 if crowded else _LABEL
    return {
        "tickvals": sorted(ticks | set(begins)),
        "ticktext": [
            (f"<b>{begins[at]}</b> " if at in begins else "")
            + figure_text(visible_token(patterns.token_strings[at], longest=longest))
            for at in sorted(ticks | set(begins))
        ],
        **NO_TICKS,
        "constrain": "domain",
    }


def _words(result: HeadScores, kind: str) -> Callable[[int, int], str]:
    """The hover text of (layer, head)."""
    mean, (low, high) = result.mean(kind), result.intervals[kind]
    null = result.null(kind) if kind in result.nulls else None
    title = figure_text(score_title(kind).lower())

    def words(*head: int) -> str:
        if mean[head].isnan():
            return "no score"
        interval = written_range(float(low[head]), float(high[head]))
        lines = (
            f"{title} {number(float(mean[head]))}",
            f"{result.confidence:.0%} interval {interval}" if interval else "no interval",
            f"null {number(float(null[head]))}" if null is not None else "this score has no null",
        )
        return "<br>".join(lines)

    return words
