"""Results in, one self-contained HTML page out: `page` makes it, one file per analysis its sections."""

from __future__ import annotations

from mechlens.report.attribution import attribution_section
from mechlens.report.circuits import circuit_section, composition_section
from mechlens.report.feature_alignment import feature_alignment_section
from mechlens.report.features import (
    complete_search_section,
    feature_examples_section,
    gradient_search_section,
    greedy_search_section,
)
from mechlens.report.heads import attention_section, head_scores_section, repeated_token_section
from mechlens.report.induction_circuits import induction_circuits_section
from mechlens.report.lens import lens_section, sub_blocks_section
from mechlens.report.page import (
    Interactive,
    Plot,
    Section,
    Table,
    render_report,
    verdict_statement,
    write_report,
)
from mechlens.report.patching import patching_section

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
