"""The study `ioi`: a circuit is found on half of the prompts and measured on the others."""

from __future__ import annotations

import functools

import pytest
import torch

from mechlens.analyses.tasks import load_task
from mechlens.results import REPRODUCED, ModelInfo
from mechlens.studies import ioi
from mechlens.studies.published import IOI_GPT2, figures_of
from mechlens.text.prompts import text_tokens
from mechlens.text.tokens import target_id
from tests import examples
from tests.shared import needs_smollm2


def test_gpt2_small_has_figures_and_a_circuit_of_26_heads():
    gpt2 = examples.model("gpt2", n_layers=12, n_heads=12)
    info = ModelInfo(**(vars(gpt2) | {"d_model": 768, "d_vocab": 50257, "revision": None}))
    assert set(IOI_GPT2) <= set(figures_of(info))
    assert len(set(ioi.HEADS)) == 26


@needs_smollm2
def test_the_circuit_is_measured_on_prompts_that_did_not_rank_it(load_once, monkeypatch):
    smollm2 = load_once("smollm2-135m")
    monkeypatch.setattr(ioi, "HEADS", ("L23H3", "L20H0", "L23H0"))
    monkeypatch.setattr(ioi, "COPYING", ("L23H0", "L23H2"))
    monkeypatch.setattr(ioi, "NEGATIVE", ("L23H3",))
    monkeypatch.setattr(ioi, "figures_of", lambda model: IOI_GPT2)
    monkeypatch.setattr(ioi, "find_circuit", functools.partial(ioi.find_circuit, n_random=3, exact=2))
    study = ioi.study_ioi(smollm2, n=8, progress=False).holding_card(IOI_GPT2)
    task = load_task("ioi", smollm2, n=8)
    ranking, measuring = task.halves()
    assert study.ioi_edges.prompts == tuple(each.clean for each in ranking.prompts)
    assert study.ioi_circuit.prompts == tuple(each.clean for each in measuring.prompts)
    # at most 5% of the edges do most of the task, and random ones none of it
    assert len(study.ioi_circuit.components) <= 0.05 * study.ioi_edges.n_edges
    assert study.ioi_circuit.faithfulness[0] > 0.6
    assert float(study.ioi_circuit.random_faithfulness.median().abs()) < 0.1
    assert study.overlap >= 0.6
    alone = load_task("ioi", smollm2, n=8, counterfactual="other-names").keep(
        [*ioi.HEADS, *(f"L{layer}.mlp" for layer in range(30))], by="mean"
    )
    assert study.ioi_published is not None
    assert torch.allclose(study.ioi_published.values, alone.values, atol=1e-4)
    measured = study.quantities()
    assert measured["heads_alone"].value == pytest.approx(
        float(alone.values.mean() / alone.full.mean()), abs=1e-4
    )
    assert measured["copies"].value > 0.9
    assert measured["suppresses"].value > 0.9
    logits = smollm2(text_tokens(smollm2, ioi.PROMPT))[0, -1].detach()
    mary, john = (target_id(smollm2, name) for name in (" Mary", " John"))
    assert float(study.ioi_attribution.contributions[:, 0, -1].sum()) == pytest.approx(
        float(logits[mary] - logits[john]), abs=2e-3
    )
    # L23H3 keeps the subject down
    assert measured["attribution of L23H3"].value > 1
    assert [each.claim for each in study.comparisons][2].startswith("logit difference of the 26 heads")
    # 8 prompts are too few to judge a mean of 100,000
    assert study.comparisons[0].verdict != REPRODUCED
    # the eight prompts: each swapped with its neighbor
    demo = study.ioi_demo
    assert demo.clean[:2] == demo.corrupted[1::-1]
    assert demo.clean[7].startswith("After Martin and Amy went")
    assert demo.answers[7] == " Martin"
    assert measured["demo clean"].value == pytest.approx(float(demo.logit_diff.mean()))
    assert measured["demo corrupted"].value == pytest.approx(-measured["demo clean"].value, abs=1e-3)
    plain = ranking.curve(ranking.edges(), absolute=True, n_random=0)
    assert measured["cmd"].value == pytest.approx(plain.cmd, abs=1e-3)
    assert len(study.sections()) == 10
