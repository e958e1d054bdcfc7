"""Direct logit attribution in a terminal: the largest parts of a logit, or all of them for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mechlens.terminal.tables import print_table

if TYPE_CHECKING:
    from mechlens.results import LogitAttribution


def print_attribution(found: LogitAttribution, top: int) -> None:
    """Print the largest components of the first sequence's last position, what is left, and their sum."""
    from mechlens.plots.attribution import attribution_title, largest_parts

    parts = largest_parts(found, largest=top)
    rows = [(name, f"{value:+.3f}") for name, value in parts.items()]
    rows.append(("sum", f"{float(found.logit[0, -1]):+.3f}"))
    title, *more = attribution_title(found)
    print_table(f"{title}; {', '.join(more)}", ("component", "added to the logit"), rows)


def attribution_json(found: LogitAttribution) -> dict[str, Any]:
    """What was explained, and every component."""
    against = found.against_ids
    return {
        "model": asdict(found.model),
        "tokens": [found.strings[str(token)] for token in found.tokens[0].tolist()],
        "position": found.positions[-1],
        "target": found.strings[str(int(found.target_ids[0, -1]))],
        "against": None if against is None else found.strings[str(int(against[0, -1]))],
        "logit": float(found.logit[0, -1]),
        "prepend_bos": found.prepend_bos,
        "components": [
            {"component": name, "contribution": value}
            for name, value in zip(found.components, found.contributions[:, 0, -1].tolist(), strict=True)
        ],
    }
