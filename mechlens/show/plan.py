"""The section on what an analysis would take."""

from __future__ import annotations

from mechlens.results import Plan
from mechlens.show.section import Section, joined


def plan_section(result: Plan, *, top: int = 10, title: str = "Plan", text: str = "") -> Section:
    """What an analysis would take, in words.

    Args:
        top: ignored, because there is no table.
    """
    return Section(title, joined(text, result.words))


SECTIONS = {Plan: plan_section}
