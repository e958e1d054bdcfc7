"""Results as a terminal shows them: tables for people, JSON for programs."""

from __future__ import annotations

from mechlens.terminal.circuits import (
    circuit_json,
    composition_json,
    print_circuit,
    print_composition,
)
from mechlens.terminal.induction_circuits import induction_circuits_json, print_induction_circuits
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
    "circuit_json",
    "composition_json",
    "effects_json",
    "induction_circuits_json",
    "lens_json",
    "number",
    "plain",
    "print_circuit",
    "print_composition",
    "print_effects",
    "print_estimates",
    "print_heads",
    "print_induction_circuits",
    "print_json",
    "print_lens",
    "print_table",
    "tolerance",
]
