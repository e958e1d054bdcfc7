"""Results as a terminal shows them: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechlens.results import HeadScores, RepeatedTokenPerformance


def best_heads(found: HeadScores, top: int | dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    best = {}
    for kind in found.kinds:
        low, high = found.intervals[kind]
        null = found.null(kind) if kind in found.nulls else None
        count = top if isinstance(top, int) else top[kind]
        best[kind] = [
            {
                "head": f"L{head[0]}H{head[1]}",
                "score": score,
                "low": float(low[head]),
                "high": float(high[head]),
                "null": None if null is None else float(null[head]),
            }
            for head, score in list(found.ranked(kind))[:count]
        ]
    return best


def print_heads(found: HeadScores, top: int | dict[str, int]) -> None:
    rows = []
    for kind, listed in best_heads(found, top).items():
        for place, row in enumerate(listed):
            interval = tolerance(row["low"], row["high"], 3)
            null = "" if row["null"] is None else f"{row['null']:.3f}"
            rows.append((kind if place == 0 else "", row["head"], f"{row['score']:.3f}", interval, null))
        if not listed:
            rows.append((kind, "none", "", "", ""))
    sequences = max(values.shape[0] * values.shape[1] for values in found.scores.values())
    plural = "s" if sequences != 1 else ""
    print_table(
        f"Head scores of {found.model.name}, {sequences} sequence{plural}"
        + ("" if found.prepend_bos else ", no BOS"),
        ("score", "head", "mean", f"{found.confidence:.0%} interval", "null"),
        rows,
    )


def print_estimates(performance: RepeatedTokenPerformance) -> None:
    sequences = performance.tokens.shape[0] * performance.tokens.shape[1]
    rows = [
        (
            name.replace("_", " ").replace("log prob", "log-probability, nats"),
            f"{mean:.3f}",
            tolerance(low, high, 3),
        )
        for name, (mean, low, high) in performance.estimates.items()
    ]
    tokens = f"{'BOS + ' if performance.prepend_bos else ''}{performance.seq_len} random tokens"
    print_table(
        f"{performance.model.name} on {tokens} + the same again, {sequences} sequences",
        ("", "mean", f"{performance.confidence:.0%} interval"),
        rows,
    )


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        # a file or a pipe has no width: the table decides
        console = Console(width=Console(width=10_000).measure(table).maximum)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def number(value: float | str) -> str:
    return str(value) if isinstance(value, (str, int)) else f"{value:.4f}"


def tolerance(low: float | None, high: float | None, digits: int = 4) -> str:
    """From low to high; nothing where there is no interval (nan: of a single sequence)."""
    if low is None or high is None or low != low:
        return ""
    if isinstance(low, int) and isinstance(high, int):
        return f"{low} to {high}"
    return f"{low:.{digits}f} to {high:.{digits}f}"


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else str(value)


def print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: Any) -> Any:
    """JSON has neither nan nor infinity: what is undefined is null, and so is the logarithm of 0."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
