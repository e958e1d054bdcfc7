"""What was verified of models, as a table for people, JSON for programs and Markdown for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows

if TYPE_CHECKING:
    from mechlens.studies.architectures import Verified

COLUMNS = ("model", "engine", "begins", "before", "beyond", "QK circuits", "resuming", "attribution")


def architecture_row(found: Verified) -> tuple[str, ...]:
    """The cells of `COLUMNS`."""
    before, beyond = (*map(_difference, found.differences), "", "")[:2]
    return (
        found.name,
        found.engine or "does not load",
        ", ".join(f"{what} {tokens}" for what, tokens in found.limits.items()),
        before,
        beyond,
        found.qk.verdict,
        found.resuming.verdict,
        found.attribution.verdict,
    )


def print_architectures(found: Sequence[Verified]) -> None:
    print_rows(f"Models on {_versions()}", COLUMNS, map(architecture_row, found))
    for each in found:
        for reason in each.reasons:
            print(f"{each.name}: {reason}")


def architectures_json(found: Sequence[Verified]) -> dict[str, Any]:
    return {
        **{name.replace("-", "_"): version(name) for name in _LIBRARIES},
        "models": [asdict(each) | {"right": each.right} for each in found],
    }


def architectures_markdown(found: Sequence[Verified]) -> str:
    """A section with the table and the reasons."""
    lines = [f"## {_versions()}", ""]
    lines += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(architecture_row(each)) for each in found]
    lines += ["", "Why not:", ""]
    lines += [f"- {each.name}: {reason}" for each in found for reason in each.reasons]
    return "\n".join([*lines, ""])


_LIBRARIES = ("transformer-lens", "transformers", "torch")


def _versions() -> str:
    lens, *others = (version(name) for name in _LIBRARIES)
    return f"TransformerLens {lens}, with transformers {others[0]} and torch {others[1].split('+')[0]}"


def _difference(nats: float | None) -> str:
    from mechlens.studies.architectures import TOLERANCE

    if nats is None:
        return "past its context"
    # a comparison with nan is false
    return f"{nats:.0e}".replace("e-0", "e-") if nats <= TOLERANCE else f"{nats:.2g}, wrong"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
