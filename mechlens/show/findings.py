"""Sections on facts and on the indirect object."""

from __future__ import annotations

from mechlens.results import Facts, IndirectObject
from mechlens.results.columns import Column
from mechlens.show.section import Figure, Section, Table, drawn, joined
from mechlens.text.display import count, number

_TERMS = {
    "Logit difference": "The logit of one token minus that of another: the log of the ratio of their "
    "probabilities."
}


def facts_section(
    result: Facts, *, without_bos: Facts | None = None, title: str = "Facts", text: str = ""
) -> Section:
    """The figure, and every fact after the last layer as a table.

    Args:
        without_bos: the same facts read without BOS, for an extra column.
    """
    columns = [
        result.column(name) for name in ("relation", "prompt", "answer", "guess", "rank", "probability")
    ]
    table = result.summary(len(result.prompts))
    if without_bos is not None:
        columns.append(Column("without_bos", "probability without BOS"))
        table["without_bos"] = without_bos.log_prob[:, -1].exp().numpy()
    said = (
        f"After the last layer {float(result.share(1)[-1]):.0%} of the answers are the top-1 prediction and "
        f"{float(result.share(10)[-1]):.0%} are in the top 10."
    )
    return Section(
        title,
        joined(
            text,
            "The logit lens reads the answer to each prompt off the residual stream after every layer. The "
            f"null baseline is the answer to another fact of the same relation, which is wrong here. {said}",
        ),
        (
            Figure(
                drawn("plot_facts", result),
                "Share of facts whose answer is the top-1 prediction or in the top 10, and the mean "
                "probability of the answers, after each layer. Dotted: the same for wrong answers.",
                said,
            ),
            Table.of(table, columns, "Each fact, after the last layer", folded=True, where="page"),
        ),
    )


def indirect_object_section(
    result: IndirectObject, *, title: str = "The indirect object", text: str = ""
) -> Section:
    """How often the model is right, in words, and the prompts as a table."""
    right = float((result.logit_diff > 0).float().mean())
    example = result.templates[0].format(a=result.subjects[0], b=result.objects[0], s=result.subjects[0])
    said = (
        f"The right continuation of {example!r} is {result.objects[0].strip()}. Over "
        f"{count(len(result.tokens), 'prompt')} the logit of the indirect object exceeds that of the subject "
        f"by {number(float(result.logit_diff.mean()))}, and the indirect object is the more likely of the "
        f"two in {right:.0%} of them. For two names that do not occur in the prompt, the difference is "
        f"{number(float(result.null.mean()))}."
    )
    table = Table.of(result.to_dataframe(), result.columns, "Each prompt", folded=True, where="page")
    return Section(title, joined(text, said), (table,), _TERMS)


SECTIONS = {Facts: facts_section, IndirectObject: indirect_object_section}
