"""Results in, one self-contained HTML page out: `page` makes it, one file per analysis its sections."""

from __future__ import annotations

from mechlens.show.attribution import attribution_section
from mechlens.show.circuits import circuit_section, composition_section
from mechlens.show.feature_alignment import feature_alignment_section
from mechlens.show.features import (
    complete_search_section,
    feature_examples_section,
    gradient_search_section,
    greedy_search_section,
)
from mechlens.show.heads import attention_section, head_scores_section, repeated_token_section
from mechlens.show.induction_circuits import induction_circuits_section
from mechlens.show.lens import lens_section, sub_blocks_section
from mechlens.show.page import (
    Interactive,
    Plot,
    Section,
    Table,
    render_report,
    verdict_statement,
    write_report,
)
from mechlens.show.patching import patching_section

__all__ = [
    "Interactive",
    "Plot",
    "Section",
    "Table",
    "attention_section",
    "attribution_section",
    "circuit_section",
    "complete_search_section",
    "composition_section",
    "feature_alignment_section",
    "feature_examples_section",
    "gradient_search_section",
    "greedy_search_section",
    "head_scores_section",
    "induction_circuits_section",
    "lens_section",
    "patching_section",
    "render_report",
    "repeated_token_section",
    "sub_blocks_section",
    "verdict_statement",
    "write_report",
]
