"""Patched runs in a terminal: the largest effects as a table, or all of it for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows

if TYPE_CHECKING:
    from mechlens.results import PatchGridResult


def print_effects(found: PatchGridResult, top: int) -> None:
    """Print the cells that change the metric most, either way, with their standard errors."""
    from mechlens.plots.patching import largest_effects, metric_unit, metric_words, put_there
    from mechlens.text.display import visible_token

    several = len(found.tokens) > 1
    with_tokens = "pos" in found.axes and not several
    rows = []
    for row in largest_effects(found, top).to_dict("records"):
        cells = [row["cell"]]
        if with_tokens:
            cells.append(visible_token(found.strings[row["pos"]], longest=16))
        cells.append(f"{row['effect']:+.3f}")
        if several:
            cells.append(f"{row['standard_error']:.3f}")
        cells.append(f"{row['mean']:.3f}")
        if row["recovered"] == row["recovered"]:
            cells.append(f"{row['recovered']:.3f}")
        rows.append(cells)
    unit = metric_unit(found.metric)
    base = found.clean if found.direction == "noising" else found.corrupted
    has_recovered = not bool(found.recovered.isnan().all())
    print_rows(
        f"{found.site} of {found.model.name}, patched with: {put_there(found)}; {metric_words(found)} "
        f"without a patch {float(base.mean()):.3f}{f' {unit}' if unit else ''}",
        (
            "patched",
            *(["token"] if with_tokens else []),
            "change",
            *(["standard error"] if several else []),
            "patched run",
            *(["recovered"] if has_recovered else []),
        ),
        rows,
    )
    if found.note:
        print(f"Note: {found.note}.")


def effects_json(found: PatchGridResult) -> dict[str, Any]:
    """What was patched, and every cell."""
    return {
        "model": asdict(found.model),
        "site": found.site,
        "source": found.source,
        "direction": found.direction,
        "metric": found.metric,
        "about": found.about,
        "clean": float(found.clean.mean()),
        "corrupted": float(found.corrupted.mean()),
        "n_prompts": len(found.tokens),
        "tokens": list(found.strings) if len(found.tokens) == 1 else None,
        "note": found.note,
        "cells": found.to_dataframe().to_dict("records"),
    }
