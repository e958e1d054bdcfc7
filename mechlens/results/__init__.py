"""What analyses return: frozen dataclasses that explain themselves, make tables, save and load."""

from __future__ import annotations

from mechlens.results.attention_spread import AttentionSpread
from mechlens.results.attribution import LogitAttribution, component_place
from mechlens.results.base import FORMAT, ModelInfo, Result, load, write_table
from mechlens.results.circuits import Circuit, CircuitSummary, CompositionScores, PositionalAttention
from mechlens.results.claims import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Comparison
from mechlens.results.copying import CopyScores
from mechlens.results.feature_alignment import FeatureAlignment, Share
from mechlens.results.features import ExhaustiveSearch, FeatureExamples, GreedySearch
from mechlens.results.findings import Facts, IndirectObject
from mechlens.results.gradient_search import GradientSearch
from mechlens.results.heads import (
    AttentionPatterns,
    HeadScores,
    RepeatedTokenPerformance,
    half_means,
    head_label,
    parse_head,
    parse_heads,
)
from mechlens.results.induction_circuits import InductionCircuits
from mechlens.results.input_probe import InputProbe
from mechlens.results.lens import LogitLensResult, VectorLens
from mechlens.results.logit_variance import LogitVariance
from mechlens.results.neurons import NeuronAttribution, neuron_label
from mechlens.results.patching import AttributionPatchResult, PatchGridResult
from mechlens.results.plan import Plan
from mechlens.results.successors import SuccessorScores
from mechlens.results.task_circuits import CircuitCurve, ComponentSet, EdgeEffects, TaskCircuit
from mechlens.results.task_heads import TaskHeads
from mechlens.results.tasks import RoleGrid, TaskPerformance
from mechlens.results.tuned_lens import TunedLens

__all__ = [
    "FORMAT",
    "NOT_JUDGED",
    "NOT_REPRODUCED",
    "REPRODUCED",
    "AttentionPatterns",
    "AttentionSpread",
    "AttributionPatchResult",
    "Circuit",
    "CircuitCurve",
    "CircuitSummary",
    "Comparison",
    "ComponentSet",
    "CompositionScores",
    "CopyScores",
    "EdgeEffects",
    "ExhaustiveSearch",
    "Facts",
    "FeatureAlignment",
    "FeatureExamples",
    "GradientSearch",
    "GreedySearch",
    "HeadScores",
    "IndirectObject",
    "InductionCircuits",
    "InputProbe",
    "LogitAttribution",
    "LogitLensResult",
    "LogitVariance",
    "ModelInfo",
    "NeuronAttribution",
    "PatchGridResult",
    "Plan",
    "PositionalAttention",
    "RepeatedTokenPerformance",
    "Result",
    "RoleGrid",
    "Share",
    "SuccessorScores",
    "TaskCircuit",
    "TaskHeads",
    "TaskPerformance",
    "TunedLens",
    "VectorLens",
    "component_place",
    "half_means",
    "head_label",
    "load",
    "neuron_label",
    "parse_head",
    "parse_heads",
    "write_table",
]
