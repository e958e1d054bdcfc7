"""Sections on the edges and circuits of a task."""

from __future__ import annotations

from mechlens.results.task_circuits import FAITHFULNESS, CircuitCurve, ComponentSet, EdgeEffects, TaskCircuit
from mechlens.show.section import Figure, Section, Table, drawn, joined
from mechlens.text.display import count, number

_TERMS = {
    "Faithfulness": f"{FAITHFULNESS}.",
    "Edge": "What one component writes, as one input of a later component reads it.",
    "CPR and CMD": "The area under the curve of faithfulness, and the area between it and 1, over the shares "
    "of edges that are kept.",
}


def edges_section(result: EdgeEffects, *, top: int = 10, title: str = "Edges", text: str = "") -> Section:
    """The edges with the largest effects, as a graph and as a table.

    Args:
        top: edges to list.
    """
    said = (
        f"{result.described()} The effect of each of the {result.n_edges:,} edges is estimated by "
        f"{result.method}. {result.said_of_effects()}"
    )
    if len(result.exact_edges) > 1:
        said += (
            f" For {count(len(result.exact_edges), 'edge')} it was also measured exactly: half have the "
            "largest estimates, half were drawn from the others. The rank correlation of both is "
            f"{number(result.correlation)}."
        )
    figure = Figure(
        drawn("plot_edge_graph", result),
        "The edges with the largest effects. Hover over the middle of an edge for its effect.",
        keeps_width=True,
    )
    table = Table.of(
        result.summary(top),
        [result.column(name) for name in result.summary(1).columns],
        "The largest effects, either way",
    )
    terms = {"Edge": _TERMS["Edge"]}
    return Section(title, joined(text, said, _note(result.note)), [figure, table], terms)


def curve_section(
    result: CircuitCurve, *, top: int = 10, title: str = "Faithfulness by size", text: str = ""
) -> Section:
    """The curve of faithfulness as a figure and a table.

    Args:
        top: ignored, because every size is shown.
    """
    said = (
        f"{result.described()} {'Edges' if result.of_edges else 'Heads and MLPs'} are ranked by "
        f"{result.ranking}; CPR is {number(result.cpr)}, CMD "
        f"{number(result.cmd)}."
    )
    if len(result.exact):
        said += f" Ranked by exact effects, CPR is {number(result.areas(result.exact_faithfulness)[0])}."
    figure = Figure(drawn("plot_circuit_curve", result), "Faithfulness by the share that is kept.")
    shown = result.summary(top)
    table = Table.of(shown, [result.column(str(name)) for name in shown], "Faithfulness by size")
    terms = {name: _TERMS[name] for name in ("Faithfulness", "CPR and CMD")}
    return Section(title, joined(text, said, _note(result.note)), [figure, table], terms)


def circuit_section(result: TaskCircuit, *, top: int = 10, title: str = "Circuit", text: str = "") -> Section:
    """How faithful, complete and minimal a circuit is, beside random sets.

    Args:
        top: members to list.
    """
    rows = []
    for name, (mean, low, high), random in (
        ("the circuit alone (faithfulness)", result.faithfulness, result.random_faithfulness),
        ("the model without it (completeness: near 0)", result.left, result.random_left),
    ):
        null = f"mean {number(float(random.mean()))}, at most {number(float(random.max()))}"
        rows.append((name, number(mean), f"{number(low)} to {number(high)}", null))
    share = len(result.components) / result.n_possible
    said = f"{result.described()} The circuit has {result.size}, {share:.1%} of the model's."
    tables = [
        Table(
            ("", "share of the task", "95% interval", count(len(result.random_kept), "random set")),
            rows,
            "Faithfulness and completeness",
        )
    ]
    if len(result.without):
        caption = "What members add to the faithfulness of the circuit"
        tables.append(Table.of(result.summary(top), result.columns, caption))
    else:
        names = ", ".join(result.components[:top])
        more = len(result.components) - top
        said += f" Its members: {names}{f' and {more:,} more' if more > 0 else ''}."
    terms = {"Faithfulness": _TERMS["Faithfulness"]}
    return Section(title, joined(text, said, _note(result.note)), tables, terms)


def set_section(result: ComponentSet, *, top: int = 10, title: str = "Components", text: str = "") -> Section:
    """The metric with a set of components kept or knocked out.

    Args:
        top: prompts to list.
    """
    mean, low, high = result.faithfulness
    done = "kept, and everything else replaced" if result.kept else "replaced"
    said = (
        f"{result.described()} With {result.size} {done}, {number(mean)} of the task is left (95% interval "
        f"{number(low)} to {number(high)})."
    )
    table = Table.of(result.summary(top), result.columns, "The first prompts", folded=True)
    return Section(
        title, joined(text, said, _note(result.note)), [table], {"Faithfulness": _TERMS["Faithfulness"]}
    )


def _note(note: str) -> str:
    return f"Note: {note}." if note else ""


SECTIONS = {
    EdgeEffects: edges_section,
    CircuitCurve: curve_section,
    TaskCircuit: circuit_section,
    ComponentSet: set_section,
}
