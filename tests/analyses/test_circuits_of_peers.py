"""Edges and faithfulness against TransformerLens 4's own, on the same model, prompts and replacements.

Theirs are by position, ours sum over positions; their gradient is taken in the corrupted run, so ours is here
given the two prompts the other way round. They refuse grouped queries and parallel blocks.
"""

from __future__ import annotations

import pytest
import torch

from mechlens.analyses.tasks import Task
from mechlens.models.run.graph import Graph
from tests.shared import HAS_HOOKED

pytestmark = pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has no such tools")
ROW = {"clean": "abcd", "corrupted": "dcba", "answer": "e", "wrong": "f"}


@pytest.fixture
def peer(load_once, tiny_directories):
    return load_once(tiny_directories / "gpt2", backend="bridge")


def name_of(node):
    """A node of theirs as we call it."""
    kinds = {"attn_head_out": "H{}", "q_input": "H{}.q", "k_input": "H{}.k", "v_input": "H{}.v"}
    if node.kind in ("embed", "logits"):
        return node.kind
    return f"L{node.layer}{kinds.get(node.kind, '.mlp').format(node.head)}"


def metric_of(prompt):
    return lambda logits: logits[..., -1, prompt.answers[0]].sum() - logits[..., -1, prompt.wrong[0]].sum()


def test_edges_are_those_of_attribution_patch(peer):
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    swapped = ROW | {"clean": ROW["corrupted"], "corrupted": ROW["clean"]}
    task = Task.from_file([swapped], peer)
    (prompt,) = task.encoded
    theirs = attribution_patch(
        peer, prompt.corrupted, prompt.clean, metric_of(prompt), EdgeAttributionConfig(granularity="edge")
    )
    ours = task.edges()
    summed = torch.zeros_like(ours.effect)
    for (writer, reader), score in theirs.edge_scores.items():
        summed[ours.senders.index(name_of(writer)), ours.receivers.index(name_of(reader))] += score
    there = ~ours.effect.isnan()
    assert float(ours.effect[there].abs().max()) > 0.01
    torch.testing.assert_close(ours.effect[there], summed[there], atol=1e-5, rtol=1e-4)
    assert not summed[~there].any()


def test_faithfulness_is_theirs(peer):
    from transformer_lens.tools.analysis.attribution_patching import (
        EdgeAttributionConfig,
        attribution_patch,
        faithfulness,
    )

    task = Task.from_file([ROW], peer)
    (prompt,) = task.encoded
    metric, graph = metric_of(prompt), Graph.of(peer)
    theirs = attribution_patch(
        peer, prompt.clean, prompt.corrupted, metric, EdgeAttributionConfig(granularity="edge")
    )
    draw = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.9):
        names = graph.edge_names((torch.rand(graph.possible.shape, generator=draw) < share) & graph.possible)
        kept = [edge for edge in theirs.edge_scores if "->".join(map(name_of, edge)) in names]
        expected = faithfulness(peer, prompt.clean, prompt.corrupted, metric, kept)
        found = task.keep(list(names))
        assert found.faithfulness[0] == pytest.approx(expected.recovered, rel=1e-3, abs=1e-4)
        assert float(found.full[0]) == pytest.approx(float(expected.full_metric), abs=1e-5)
        assert float(found.empty[0]) == pytest.approx(float(expected.corrupt_metric), abs=1e-5)
