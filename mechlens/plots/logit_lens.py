"""Pictures of the logit lens: top guesses by layer and position."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from torch import Tensor

from mechlens.plots.style import TEMPLATE, figure_text, heatmap, number, titles, visible_token
from mechlens.results import LogitLensResult

STATS = {
    "probability": "probability of the top guess",
    "rank": "rank of the model's final guess",
    "kl": "KL(final || layer), nats",
    "kl_input": "KL(input || layer), nats",
    "input_rank": "rank of the input token",
    "entropy": "entropy, nats",
}
_LONGEST = 10


def plot_logit_lens(result: LogitLensResult, stat: str = "kl", *, row: int = 0) -> go.Figure:
    """Draw the top guess of each layer at each position, coloured by a statistic; layers go upwards.

    Below stand the tokens read, above the tokens that really follow, starred where the last row's guess
    is right. Under the cursor stand the most likely tokens with their probabilities and the statistic.

    Args:
        stat: one of `probability`, `rank`, `kl`, `kl_input`, `input_rank`, `entropy`; ranks are coloured on
            a logarithmic scale.
        row: which sequence of the batch.

    Raises:
        ValueError: no such statistic or sequence, or one that is undefined for this model.
    """
    if stat not in STATS:
        raise ValueError(f"stat must be one of {', '.join(STATS)}, but is {stat!r}")
    if not 0 <= row < len(result.tokens):
        raise ValueError(f"there is no sequence {row}: there are {len(result.tokens)}")
    values = _values(result, stat)[:, row].double()
    if values.isnan().all():
        raise ValueError(f"{STATS[stat]} is undefined: this model's unembedding is not tied to its embedding")
    ranks = stat in ("rank", "input_rank")
    colours = values.log10() if ranks else values
    high = 1.0 if stat == "probability" else max(1e-6, float(colours.nan_to_num(0).max()))
    top_ids, probabilities = result.top_ids[:, row], result.top_probabilities[:, row]
    read = [visible_token(result.strings[str(i)]) for i in result.tokens[row].tolist()]
    below = [read[position] for position in result.positions]
    above = [read[position + 1] if position + 1 < len(read) else "" for position in result.positions]
    guesses = [[visible_token(text) for text in result.texts(ids[:, 0])] for ids in top_ids]
    above = [
        text + "*" if text and text == guess else text for text, guess in zip(above, guesses[-1], strict=True)
    ]
    hovers = [
        [
            f"after <b>{figure_text(below[at])}</b>, row {label}<br>{figure_text(STATS[stat])} "
            f"{number(float(values[index, at]))}<br>"
            + "<br>".join(
                f"{figure_text(visible_token(text))} {number(probability)}"
                for text, probability in zip(
                    result.texts(top_ids[index, at]), probabilities[index, at].tolist(), strict=True
                )
            )
            for at in range(len(below))
        ]
        for index, label in enumerate(result.rows)
    ]
    columns = list(range(len(below)))
    figure = go.Figure(
        heatmap(
            colours.numpy(),
            low=0.0,
            high=high,
            hovers=hovers,
            x=columns,
            y=list(result.rows),
            text=[[figure_text(_short(guess)) for guess in line] for line in guesses],
            texttemplate="%{text}",
            textfont={"size": 12 if len(below) <= 20 else 10},
            xgap=1,
            ygap=1,
        )
    )
    if ranks:
        powers = list(range(math.ceil(high) + 1))
        ticks = {"tickmode": "array", "tickvals": powers, "ticktext": [f"{10**power:,}" for power in powers]}
        figure.data[0].colorbar.update(dtick=None, **ticks)
    axis = {"tickmode": "array", "tickvals": columns, "showgrid": False, "ticks": ""}
    # an axis is drawn only where something is on it
    figure.add_trace(
        go.Scatter(x=columns, y=[result.rows[0]] * len(columns), xaxis="x2", opacity=0, hoverinfo="skip")
    )
    figure.update_layout(
        template=TEMPLATE,
        showlegend=False,
        title_text=titles(
            f"Logit lens on {result.component}",
            result.model.name,
            f"top guess in each cell; colour: {STATS[stat]}; * guessed right",
        ),
        width=max(480, 150 + 62 * len(below)),
        height=220 + 34 * len(result.rows),
        margin={"t": 120, "b": 70},
        xaxis={
            "title": {"text": "token read"},
            "ticktext": [figure_text(_short(text)) for text in below],
            "range": [-0.5, len(below) - 0.5],
            **axis,
        },
        xaxis2={
            "overlaying": "x",
            "side": "top",
            "ticktext": [figure_text(_short(text)) for text in above],
            "range": [-0.5, len(below) - 0.5],
            **axis,
        },
        yaxis={"title": {"text": "layer"}, "type": "category", "showgrid": False, "ticks": ""},
    )
    return figure


def _values(result: LogitLensResult, stat: str) -> Tensor:
    return {
        "probability": lambda: result.top_probabilities[..., 0],
        "rank": lambda: result.rank["final"],
        "kl": lambda: result.kl_final,
        "kl_input": lambda: result.kl_input,
        "input_rank": lambda: result.rank["input"],
        "entropy": lambda: result.entropy,
    }[stat]()


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
