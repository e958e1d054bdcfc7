"""A reproduction in, its folder of results, tables and the report page out."""

from __future__ import annotations

from pathlib import Path

from mechlens.report.heads import attention_section, head_scores_section, repeated_token_section
from mechlens.report.page import Section, write_report
from mechlens.results import head_label
from mechlens.studies.reproduce import TIMES_NULL, Reproduction, detect_clear_heads

CLEAR_SCORE = 0.4
"""A head that scores this much is named among the findings."""


def write_reproduction(reproduction: Reproduction, folder: Path, *, command: str) -> list[Path]:
    """Write results (`.safetensors`), tables (`.csv`) and `report.html` into a folder.

    Args:
        folder: made where it is missing; files of an earlier run are replaced.
        command: the command line that makes the same report.

    Returns:
        The paths written, the report last.

    Raises:
        OSError: the folder is a file, or cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [*reproduction.save(folder), _report(reproduction, folder / "report.html", command)]


def _report(reproduction: Reproduction, path: Path, command: str) -> Path:
    heads = reproduction.heads
    names = [head_label(*head) for head in reproduction.patterns.heads]
    return write_report(
        path,
        title="Induction heads",
        model=heads.model,
        comparisons=reproduction.comparisons,
        sections=(
            Section("What was found", _findings(reproduction)),
            repeated_token_section(reproduction.performance),
            head_scores_section(heads),
            attention_section(
                reproduction.patterns,
                title="The strongest heads at work",
                text="The two highest heads by induction score and by previous-token score "
                f"({', '.join(names)}) on the first of the sequences. An induction head shows a second "
                f"diagonal over the later copy, {reproduction.performance.seq_len - 1} positions below the "
                "main one; a previous-token head shows one right below the main diagonal.",
            ),
        ),
        command=command,
    )


def _findings(reproduction: Reproduction) -> str:
    """The finding in two sentences, every figure and name from the results."""
    performance, heads = reproduction.performance, reproduction.heads
    first, second = (performance.estimates[f"{half}_half_accuracy"][0] for half in ("first", "second"))
    accuracy = (
        f"Of random tokens that it has not seen the model foretells {first:.1%}, of the same tokens when "
        f"they come again {second:.1%}."
    )
    named = {}
    for kind in ("induction_score", "previous_token_score"):
        clear = detect_clear_heads(heads, kind, CLEAR_SCORE)
        named[kind] = ", ".join(f"{head_label(*head)} ({score:.2f})" for head, score in clear[:5])
    return (
        f"{accuracy}\n\nInduction heads: {named['induction_score'] or 'none'}. Previous-token heads: "
        f"{named['previous_token_score'] or 'none'}. Named are heads with a score of at least {CLEAR_SCORE} "
        f"and at least {TIMES_NULL} times their null, the highest five."
    )
