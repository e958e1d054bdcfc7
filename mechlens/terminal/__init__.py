"""Results as a terminal shows them: tables for people, JSON for programs."""

from __future__ import annotations

from mechlens.terminal.lens import lens_json, print_lens
from mechlens.terminal.patching import effects_json, print_effects
from mechlens.terminal.tables import (
    best_heads,
    number,
    plain,
    print_estimates,
    print_heads,
    print_json,
    print_table,
    tolerance,
)

__all__ = [
    "best_heads",
    "effects_json",
    "lens_json",
    "number",
    "plain",
    "print_effects",
    "print_estimates",
    "print_heads",
    "print_json",
    "print_lens",
    "print_table",
    "tolerance",
]
