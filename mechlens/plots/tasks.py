"""The figure of patches by role."""

from __future__ import annotations

import dataclasses

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.errors import ArgumentError
from mechlens.plots.style import (
    NO_TICKS,
    TEMPLATE,
    WIDTH,
    figure_text,
    heatmap,
    strongest_heads,
    titles,
    top_margin,
)
from mechlens.results import RoleGrid, head_label
from mechlens.text.display import count, number

VALUES = ("effect", "recovered")
_WRITTEN = 12
"""Up to this many columns, cells show their numbers."""


def plot_role_grid(result: RoleGrid, *, value: str = "recovered") -> go.Figure:
    """Draw what each patch of a task does to the logit difference, with layer 0 at the bottom.

    A grid by layer, head and role has a row for each head, but only for the 40 with the largest effects.
    Blue raises the logit difference, orange lowers it. Hover for numbers with their standard error.

    Args:
        value: `recovered`, the share of the way to the other run, or `effect`, in logits.

    Returns:
        A heatmap, usually `[layer, role]`.

    Raises:
        TypeError: `result` is not a `RoleGrid`.
        ArgumentError: `value` is unknown.

    Example:
        >>> found = mechlens.load_task("agreement", model, n=4).grid("resid_pre")
        >>> mechlens.plot_role_grid(found).data[0].z.shape
        (4, 3)
    """
    check_type("result", result, RoleGrid)
    if value not in VALUES:
        raise ArgumentError("value", f"one of {', '.join(VALUES)}", value)
    view = _View.of(result)
    values = view.values(value)
    high = max(float(values.abs().nan_to_num(0).max()), 1.0 if value == "recovered" else 1e-6)
    effect, error, recovered = (view.values(name) for name in ("effect", "standard_error", "recovered"))
    hovers = [
        [
            f"<b>{view.place(row, column)}</b>"
            f"<br>change {number(float(effect[row, column]))} logits"
            f"<br>standard error {number(float(error[row, column]))}"
            f"<br>recovered {number(float(recovered[row, column]))}"
            for column in range(len(view.columns))
        ]
        for row in range(len(view.rows))
    ]
    drawn = heatmap(values.numpy(), low=-high, high=high, hovers=hovers, name=value, xgap=1, ygap=1)
    drawn.update(y=view.rows, x=view.columns)
    written = len(view.columns) <= _WRITTEN
    if written:
        drawn.update(
            text=[[number(each, 2) for each in row] for row in values.tolist()], texttemplate="%{text}"
        )
    drawn.colorbar.update(tickformat=".3~g")
    title = titles(
        f"Share of the way to the {'clean' if result.into == 'corrupted' else 'corrupted'} run"
        if value == "recovered"
        else "Change in the logit difference (logits)",
        f"{result.model.name}, task {result.task}, {count(len(result.prompts), 'prompt')}",
        f"{result.place} patched with: {result.source}; into the {result.into} run",
        *([view.note] if view.note else []),
        *([result.note] if result.note else []),
    )
    return go.Figure(drawn).update_layout(
        template=TEMPLATE,
        title_text=title,
        width=max(520, min(WIDTH, 170 + (90 if written else 28) * len(view.columns))),
        height=top_margin(title) + 70 + 22 * max(len(view.rows), 6),
        margin={"t": top_margin(title)},
        xaxis={"title": {"text": view.across}, "type": "category", **NO_TICKS},
        yaxis={"title": {"text": view.up}, "type": "category", **NO_TICKS},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _View:
    """The rows and columns of a grid with one to three axes."""

    result: RoleGrid
    up: str
    """The title of the vertical axis."""
    across: str
    rows: list[str | int]
    columns: list[str]
    which: list[int]
    """The rows of the flat grid that are drawn."""
    note: str = ""
    """How many heads are drawn, if not all."""

    @classmethod
    def of(cls, result: RoleGrid) -> _View:
        axes = result.axes
        across = axes[-1] if axes and axes[-1] != "layer" else ""
        columns = [figure_text(str(each)) for each in result.labels(across)] if across else [""]
        if len(axes) == 3:
            which, note = strongest_heads(result.effect.flatten(0, 1))
            heads: list[str | int] = [head_label(*result.heads[at]) for at in which]
            return cls(result, "head", across, heads, columns, which, note)
        rows: list[str | int] = [*result.layers] if "layer" in axes else ["all"]
        return cls(result, "layer", across, rows, columns, list(range(len(rows))))

    def values(self, name: str) -> Float[Tensor, "_ _"]:
        found: Tensor = getattr(self.result, name)
        return found.reshape(-1, len(self.columns))[self.which].double()

    def place(self, row: int, column: int) -> str:
        """A cell in words."""
        label, other = self.rows[row], self.columns[column]
        up = label if self.up == "head" else "all layers" if label == "all" else f"layer {label}"
        if self.across == "head":
            up = head_label(self.result.layers[row], int(other))
        return f"{up}, {other}" if self.across == "role" else str(up)
