"""The study `greater-than`: a circuit for later years, and the published one of GPT-2 small."""

from __future__ import annotations

import functools

import pytest
import torch

from mechlens.analyses.tasks import load_task
from mechlens.models.run.graph import Graph
from mechlens.results import ModelInfo
from mechlens.studies import greater_than
from mechlens.studies.published import GREATER_THAN_GPT2, figures_of
from tests import examples
from tests.shared import needs_smollm2


def test_gpt2_small_has_figures_and_a_circuit_of_its_edges():
    gpt2 = examples.model("gpt2", n_layers=12, n_heads=12)
    info = ModelInfo(**(vars(gpt2) | {"d_model": 768, "d_vocab": 50257, "revision": None}))
    assert set(GREATER_THAN_GPT2) <= set(figures_of(info))
    graph = Graph(12, 12, 12, mlps=True, sequential=True)
    chosen = set(graph.edge_names(graph.edges(greater_than.published_edges())))
    # the parts as Hanna et al. draw them
    assert {"embed->L0H3.q", "L0H5->L5H5.k", "L3.mlp->L9H1.v", "L8H11->L8.mlp", "L11.mlp->logits"} <= chosen
    assert {"L7.mlp->L8H11.q", "embed->L5H5.q"} <= chosen
    # what they do not have: first heads to late MLPs, early MLPs to the logits, later MLPs to earlier heads
    assert (
        not {"L0H1->L9.mlp", "L3.mlp->logits", "L8.mlp->L8H11.q", "embed->L5H5.k", "embed->logits"} & chosen
    )
    assert sum(name.endswith("->logits") for name in chosen) == 6 + 4
    assert len(chosen) < 0.01 * int(graph.possible.sum())


@needs_smollm2
def test_the_circuit_of_a_real_model_finds_later_years(load_once, monkeypatch):
    smollm2 = load_once("smollm2-135m")
    edges = ["embed->logits", "L29.mlp->logits", "L20->logits"]
    monkeypatch.setattr(greater_than, "published_edges", lambda: edges)
    monkeypatch.setattr(greater_than, "figures_of", lambda model: GREATER_THAN_GPT2)
    fewer = functools.partial(greater_than.find_circuit, n_random=2, exact=0)
    monkeypatch.setattr(greater_than, "find_circuit", fewer)
    study = greater_than.study_greater_than(smollm2, n=8, progress=False).holding_card(GREATER_THAN_GPT2)
    measured = study.quantities()
    task = load_task("greater-than", smollm2, n=8)
    assert measured["probability_diff"].value == pytest.approx(
        task.performance().estimates["probability_diff"][0], abs=1e-4
    )
    assert measured["probability_diff"].value > 0.1
    assert study.greater_than_circuit.metric == "probability_diff"
    assert study.greater_than_circuit.prompts == tuple(p.clean for p in task.halves()[1].prompts)
    assert float(study.greater_than_circuit.random_faithfulness.abs().max()) < 0.5
    alone = task.keep(edges, metric="probability_diff")
    assert torch.allclose(study.greater_than_published.values, alone.values, atol=1e-5)
    assert measured["circuit_alone"].value == pytest.approx(
        float(alone.values.mean() / alone.full.mean()), abs=1e-3
    )
    assert len(study.comparisons) == 2
    assert len(study.sections()) == 5
