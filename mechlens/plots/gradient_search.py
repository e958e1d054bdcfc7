"""Figure of a gradient search: the objective along its steps, and the tokens it found."""

from __future__ import annotations

import plotly.graph_objects as go
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.plots.style import ABSENT, BLUE, GRID, INK, MUTED, TEMPLATE, VERMILION, figure_text, titles
from mechlens.results import GradientSearch
from mechlens.results.features import place_words
from mechlens.results.gradient_search import DISTANCES
from mechlens.text.display import number

_MARKS = {"pinv": ("diamond", VERMILION), "nearest": ("square", INK)}


def plot_gradient_search(result: GradientSearch) -> go.Figure:
    """Draw the objective along the steps of a gradient search, and the values of the tokens it found.

    Each faint line is a restart; the strong one found the best tokens. Marks to the right of the last step
    are the decoded tokens of each restart, when run as tokens. The dashed line is the optimum of an
    exhaustive search, if it is known. Embeddings that belong to no token may exceed it.

    Args:
        result: from `search_gradient`. A continuation is drawn as its log-probability, a target as the
            distance to it, anything else as activations.

    Returns:
        A figure with the traces `restarts`, `restart of the best tokens`, one for each decoding, and
        `optimum`.

    Example:
        >>> one = mechlens.Maximize(mechlens.Features(layers=2, indices=7))
        >>> found = mechlens.search_gradient(raw, one, n_tokens=1, optimizer=mechlens.Optimizer(steps=3))
        >>> figure = mechlens.plot_gradient_search(found)
    """
    check_type("result", result, GradientSearch)
    what, values, true = result.judged_by
    values = values.double().cpu()
    n_restarts, n_steps = values.shape
    table = result.to_dataframe()
    way, restart = str(table["decoding"][0]), int(table["restart"][0])
    steps = list(range(n_steps))
    figure = go.Figure()
    others = [each for each in range(n_restarts) if each != restart]
    if others:
        lines = {each: values[each].tolist() for each in others}
        # a gap after each line makes them one trace
        figure.add_trace(
            go.Scatter(
                name="restarts",
                x=[x for _ in others for x in [*steps, None]],
                y=[y for each in others for y in [*lines[each], None]],
                customdata=[each for each in others for _ in range(n_steps + 1)],
                mode="lines",
                line={"color": ABSENT, "width": 1},
                hovertemplate="restart %{customdata}, step %{x}<br>%{y:.3f}<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            name="restart of the best tokens",
            x=steps,
            y=values[restart].tolist(),
            mode="lines",
            line={"color": BLUE, "width": 3},
            hovertemplate=f"restart {restart}, of the best tokens, step %{{x}}<br>%{{y:.3f}}<extra></extra>",
        )
    )
    apart = max(1.0, 0.05 * n_steps)
    for at, (name, reached) in enumerate(true.items(), start=1):
        symbol, color = _MARKS.get(name, ("circle", MUTED))
        best = [name == way and each == restart for each in range(n_restarts)]
        figure.add_trace(
            go.Scatter(
                name=f"tokens by {figure_text(name)}",
                x=[steps[-1] + at * apart] * n_restarts,
                y=reached.double().tolist(),
                mode="markers",
                marker={
                    "symbol": symbol,
                    "color": color,
                    "size": [13 if each else 7 for each in best],
                    "opacity": [1.0 if each else 0.5 for each in best],
                },
                hovertext=_found(result, name, reached),
                hoverinfo="text",
            )
        )
    end = steps[-1] + (len(true) + 1) * apart
    # the last step is labeled, but none so near that the labels would touch
    every = max(1, round(n_steps / 8))
    is_activation = what.startswith("activation")
    if result.optimum is not None and is_activation:
        figure.add_trace(
            go.Scatter(
                name="optimum",
                x=[0, end],
                y=[result.optimum] * 2,
                mode="lines",
                line={"color": MUTED, "width": 1.5, "dash": "dash"},
                hovertemplate=f"largest activation of all tokens: {number(result.optimum)}<extra></extra>",
            )
        )
    towards = f" towards {cut(result.target)}" if result.objective in DISTANCES else ""
    best_value = float(true[way][restart])
    found = cut(result.text(result.best_ids(), " "))
    known = f"; optimum {number(result.optimum)}" if result.optimum is not None and is_activation else ""
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"Gradient search for {result.searched}",
            f"{result.model.name}"
            + ("" if result.objective == "continuation" else f", {place_words(result.site, result.layer)}")
            + (", this block alone" if result.isolated else "")
            + f", {result.begins}",
            f"objective {result.objective}{towards}, prior {result.prior}, {result.optimizer}, "
            f"{n_restarts} restarts",
            f"best tokens: {found}, {number(best_value)}{known}",
        ),
        width=760,
        height=500,
        margin={"t": 136, "b": 100},
        xaxis={
            "title": {"text": "step"},
            "range": [-0.02 * end, end],
            # marks to the right of the last step are not steps
            "tickvals": sorted({*range(0, n_steps - every // 2, every), n_steps - 1}),
            "showgrid": False,
        },
        yaxis={"title": {"text": what}, "gridcolor": GRID},
        legend={"y": -0.16},
    )
    return figure


def cut(text: str, longest: int = 60) -> str:
    """A text whose whitespace is already visible, shortened."""
    return text if len(text) <= longest else text[:longest] + "…"


def _found(result: GradientSearch, way: str, reached: Tensor) -> list[str]:
    """Hover texts: the tokens of each restart by one decoding, and their value."""
    cosines = result.nearest_cosine.double().mean(-1).tolist()
    return [
        f"<b>{figure_text(cut(result.text(ids, ' ')))}</b><br>restart {restart}, {way}"
        f"<br>{number(float(reached[restart]))}"
        f"<br>cosine of its embedding with the nearest real one {number(cosines[restart])}"
        for restart, ids in enumerate(result.ids[way].tolist())
    ]
