"""The section on successor scores."""

from __future__ import annotations

from mechlens.results import SuccessorScores
from mechlens.show.section import Section, Table, joined
from mechlens.text.display import count


def successors_section(
    result: SuccessorScores, *, top: int = 10, title: str = "Successor heads", text: str = ""
) -> Section:
    """The heads that turn most tokens into their successors.

    Args:
        top: heads to list.
    """
    classes = ", ".join(f"{name} ({n})" for name, n in zip(result.classes, result.sizes, strict=True))
    said = (
        f"By weights alone, for {count(len(result.ids), 'token')} with a successor, of these classes: "
        f"{classes}. Counted are tokens for which the head's output raises their successor most of the "
        "class. The null asks the same about the successor of another token of the class."
    )
    table = Table.of(result.summary(top), result.columns, "The heads with the highest successor scores")
    return Section(title, joined(text, said), [table])


SECTIONS = {SuccessorScores: successors_section}
