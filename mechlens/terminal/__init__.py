"""Results as a terminal shows them: tables for people, JSON for programs."""

from __future__ import annotations

from mechlens.show.terminal import (
    number,
    plain,
    print_json,
    print_rows,
    tolerance,
)
from mechlens.terminal.attention import attention_json, print_attention
from mechlens.terminal.circuits import (
    circuit_json,
    composition_json,
    print_circuit,
    print_composition,
)
from mechlens.terminal.features import (
    complete_search_json,
    feature_alignment_json,
    feature_examples_json,
    gradient_search_json,
    greedy_search_json,
    print_complete_search,
    print_feature_alignment,
    print_feature_examples,
    print_gradient_search,
    print_greedy_search,
)
from mechlens.terminal.induction_circuits import induction_circuits_json, print_induction_circuits

__all__ = [
    "attention_json",
    "best_heads",
    "circuit_json",
    "complete_search_json",
    "composition_json",
    "feature_alignment_json",
    "feature_examples_json",
    "gradient_search_json",
    "greedy_search_json",
    "induction_circuits_json",
    "number",
    "plain",
    "print_attention",
    "print_circuit",
    "print_complete_search",
    "print_composition",
    "print_feature_alignment",
    "print_feature_examples",
    "print_gradient_search",
    "print_greedy_search",
    "print_induction_circuits",
    "print_json",
    "print_rows",
    "tolerance",
]
