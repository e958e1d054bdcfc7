"""Results as a terminal shows them: tables for people, JSON for programs."""

from __future__ import annotations

from mechlens.show.terminal import (
    number,
    plain,
    print_json,
    print_rows,
    tolerance,
)
from mechlens.terminal.circuits import (
    circuit_json,
    composition_json,
    print_circuit,
    print_composition,
)
from mechlens.terminal.induction_circuits import induction_circuits_json, print_induction_circuits

__all__ = [
    "circuit_json",
    "composition_json",
    "induction_circuits_json",
    "number",
    "plain",
    "print_circuit",
    "print_composition",
    "print_induction_circuits",
    "print_json",
    "print_rows",
    "tolerance",
]
