"""The section on copy scores."""

from __future__ import annotations

from mechlens.results import CopyScores
from mechlens.show.section import Section, Table, joined
from mechlens.text.display import count


def copying_section(
    result: CopyScores, *, top: int = 10, title: str = "Copying and suppressing heads", text: str = ""
) -> Section:
    """The heads that copy or suppress most.

    Args:
        top: heads to list.
    """
    said = (
        f"By weights alone, for {count(len(result.ids), 'token')}: a head copies a token if the token is "
        f"among the {result.top_k} logits that its output for that token raises most, and suppresses it if "
        f"it is among the {result.top_k} that it lowers most. It attends to the predicted token if the "
        "token's unembedding, as the query, matches the token's own key best, without positions. A head that "
        "suppresses and attends to the predicted token does copy suppression. The null asks the same about "
        "another token."
    )
    table = Table.of(result.summary(top), result.columns, "The heads that copy or suppress most")
    return Section(title, joined(text, said), [table])


SECTIONS = {CopyScores: copying_section}
