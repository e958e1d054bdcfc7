"""Mechanistic interpretability of GPT-style language models, built on TransformerLens.

Names are imported when they are first used, so that `import mechlens` costs nothing.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechlens.analyses.attention import attention_patterns
    from mechlens.analyses.attribution import direct_logit_attribution
    from mechlens.analyses.circuit_tokens import circuit_corner, largest_pairs, singular_tokens
    from mechlens.analyses.circuits import (
        OV,
        QK,
        composition_scores,
        full_OV,
        full_QK,
        k_composition_circuit,
        positional_attention,
        positional_QK,
        q_composition_circuit,
        v_composition_circuit,
    )
    from mechlens.analyses.features import (
        feature_alignment,
        feature_examples,
        search_complete,
        search_gradient,
        search_greedy,
    )
    from mechlens.analyses.heads import (
        detect_heads,
        repeated_token_performance,
        score_heads,
        score_heads_on,
    )
    from mechlens.analyses.input_probe import probe_input
    from mechlens.analyses.logit_lens import lens_vector, logit_lens
    from mechlens.analyses.logit_variance import logit_variance
    from mechlens.analyses.patching import (
        Corrupted,
        Earlier,
        Edges,
        Mean,
        NextEmbedding,
        Resampled,
        ablate_heads,
        ablate_mlps_from_first_half,
        attribution_patching,
        patch_blocks,
        patch_grid,
        patch_path,
        path_attention,
    )
    from mechlens.analyses.tuned_lens import train_tuned_lens
    from mechlens.errors import ArgumentError, ModelLoadError
    from mechlens.measures.weights import diagonal_ranks, eigenvalue_copying_score, top_k_accuracy
    from mechlens.models.load.loading import load_model
    from mechlens.models.load.published_lens import load_tuned_lens
    from mechlens.models.run.sampling import sample_tokens
    from mechlens.models.weights.randomize import random_like
    from mechlens.plots.attribution import plot_attribution
    from mechlens.plots.circuits import (
        plot_circuit_corner,
        plot_composition_scores,
        plot_eigenvalues,
        plot_head_graph,
        plot_positional_attention,
    )
    from mechlens.plots.facts import plot_facts
    from mechlens.plots.feature_alignment import plot_feature_alignment
    from mechlens.plots.features import (
        plot_feature_examples,
        plot_feature_tokens,
        plot_gradient_search,
    )
    from mechlens.plots.heads import (
        plot_attention,
        plot_attention_heatmap,
        plot_head_scores,
        plot_log_probs,
        plot_scores_against_nulls,
    )
    from mechlens.plots.input_probe import plot_input_probe
    from mechlens.plots.logit_lens import plot_lens_lines, plot_logit_lens, plot_sub_blocks
    from mechlens.plots.logit_variance import plot_logit_variance
    from mechlens.plots.patching import plot_head_effects, plot_patch_grid
    from mechlens.plots.tuned_lens import plot_tuned_lens
    from mechlens.results import load
    from mechlens.show.page import write_report
    from mechlens.show.section import Section, section
    from mechlens.studies.facts import read_facts
    from mechlens.studies.feature_search import reproduce_feature_search
    from mechlens.studies.findings import reproduce_findings
    from mechlens.studies.heads import reproduce
    from mechlens.studies.indirect_object import indirect_object
    from mechlens.studies.induction_circuits import (
        find_induction_circuits,
        reproduce_composition_circuit,
    )
    from mechlens.studies.logit_lens import reproduce_logit_lens
    from mechlens.studies.mlp_patching import reproduce_mlp_patching
    from mechlens.text.corpus import read_texts, token_windows
    from mechlens.text.prompts import RepeatedTokens, chat_tokens, repeated_tokens, text_tokens

_HOMES = {
    "mechlens.analyses.attention": ("attention_patterns",),
    "mechlens.analyses.attribution": ("direct_logit_attribution",),
    "mechlens.analyses.circuit_tokens": ("circuit_corner", "largest_pairs", "singular_tokens"),
    "mechlens.analyses.circuits": (
        "OV",
        "QK",
        "composition_scores",
        "full_OV",
        "full_QK",
        "k_composition_circuit",
        "positional_attention",
        "positional_QK",
        "q_composition_circuit",
        "v_composition_circuit",
    ),
    "mechlens.analyses.features": (
        "feature_alignment",
        "feature_examples",
        "search_complete",
        "search_gradient",
        "search_greedy",
    ),
    "mechlens.analyses.heads": (
        "detect_heads",
        "repeated_token_performance",
        "score_heads",
        "score_heads_on",
    ),
    "mechlens.analyses.input_probe": ("probe_input",),
    "mechlens.analyses.logit_lens": ("lens_vector", "logit_lens"),
    "mechlens.analyses.patching": (
        "Corrupted",
        "Earlier",
        "Edges",
        "Mean",
        "NextEmbedding",
        "Resampled",
        "ablate_heads",
        "ablate_mlps_from_first_half",
        "attribution_patching",
        "patch_blocks",
        "patch_grid",
        "patch_path",
        "path_attention",
    ),
    "mechlens.analyses.tuned_lens": ("train_tuned_lens",),
    "mechlens.text.corpus": ("read_texts", "token_windows"),
    "mechlens.analyses.logit_variance": ("logit_variance",),
    "mechlens.errors": ("ArgumentError", "ModelLoadError"),
    "mechlens.measures.weights": ("diagonal_ranks", "eigenvalue_copying_score", "top_k_accuracy"),
    "mechlens.models.load.loading": ("load_model",),
    "mechlens.models.run.sampling": ("sample_tokens",),
    "mechlens.models.load.published_lens": ("load_tuned_lens",),
    "mechlens.models.weights.randomize": ("random_like",),
    "mechlens.plots.attribution": ("plot_attribution",),
    "mechlens.plots.circuits": (
        "plot_circuit_corner",
        "plot_composition_scores",
        "plot_eigenvalues",
        "plot_head_graph",
        "plot_positional_attention",
    ),
    "mechlens.plots.facts": ("plot_facts",),
    "mechlens.plots.feature_alignment": ("plot_feature_alignment",),
    "mechlens.plots.features": (
        "plot_feature_examples",
        "plot_feature_tokens",
        "plot_gradient_search",
    ),
    "mechlens.plots.heads": (
        "plot_attention",
        "plot_attention_heatmap",
        "plot_head_scores",
        "plot_log_probs",
        "plot_scores_against_nulls",
    ),
    "mechlens.plots.input_probe": ("plot_input_probe",),
    "mechlens.plots.logit_lens": ("plot_lens_lines", "plot_logit_lens", "plot_sub_blocks"),
    "mechlens.plots.logit_variance": ("plot_logit_variance",),
    "mechlens.plots.patching": ("plot_head_effects", "plot_patch_grid"),
    "mechlens.plots.tuned_lens": ("plot_tuned_lens",),
    "mechlens.text.prompts": ("RepeatedTokens", "chat_tokens", "repeated_tokens", "text_tokens"),
    "mechlens.show.page": ("write_report",),
    "mechlens.show.section": ("Section", "section"),
    "mechlens.results": ("load",),
    "mechlens.studies.facts": ("read_facts",),
    "mechlens.studies.feature_search": ("reproduce_feature_search",),
    "mechlens.studies.findings": ("reproduce_findings",),
    "mechlens.studies.indirect_object": ("indirect_object",),
    "mechlens.studies.induction_circuits": ("find_induction_circuits", "reproduce_composition_circuit"),
    "mechlens.studies.logit_lens": ("reproduce_logit_lens",),
    "mechlens.studies.mlp_patching": ("reproduce_mlp_patching",),
    "mechlens.studies.heads": ("reproduce",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # the lazy names; a test compares them with the block above
    *sorted(_HOME_OF),
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mechlens-toolkit")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mechlens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _warn_of_the_other_project() -> None:
    """Say so if the package index's `mechlens`, with the same import name, was installed into our folder.

    It may have replaced some of our files. Where it has replaced this one, nothing of ours runs.
    """
    installed = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    others = [name for name in os.listdir(installed) if re.fullmatch(r"mechlens-\d.*\.dist-info", name)]
    if others:
        warnings.warn(
            "another project called mechlens is installed in the same folder as this one (mechlens-toolkit): "
            "uninstall both, then install mechlens-toolkit again",
            stacklevel=3,
        )


_warn_of_the_other_project()
