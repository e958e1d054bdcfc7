"""Greedy search compared with the published loop on Hugging Face's models, and beams with full runs."""

from __future__ import annotations

import itertools

import pytest
import torch

from mechlens.analyses.features import Features, greedy, search_exhaustive, search_greedy
from mechlens.models.load.loading import load_model
from tests.close import assert_close, assert_same
from tests.counting import positions_run
from tests.reference import features as reference
from tests.tiny_models import VOCAB, tiny_hf_model

KINDS = ("gpt2", "gpt_neox", "llama")
# sums in a different order: a few rounding errors of activations around 10
CLOSE = {"atol": 2e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def loaded(tiny_directories):
    models = {kind: load_model(tiny_directories / kind, processing=False) for kind in KINDS}
    return models.__getitem__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregate", ["last", "sum"])
def test_one_to_four_tokens_match_the_published_loop(kind, aggregate, loaded):
    features, layer = [0, 7, 30], 1
    output = reference.hf_block_output(tiny_hf_model(kind), layer)
    found = {
        n: search_greedy(
            loaded(kind), Features(layer, features), n_tokens=n, aggregate=aggregate, batch_size=25
        )
        for n in range(1, 5)
    }
    for i, feature in enumerate(features):
        tokens = reference.search_maximal(output, VOCAB, 4, feature, summed=aggregate == "sum")
        # an additional token changes none of the earlier ones
        for n, result in found.items():
            assert result.ids[i, 0].tolist() == tokens[:n]
        own = output(torch.tensor([tokens]))[0, :, feature]
        torch.testing.assert_close(found[4].activations[i, 0], own, **CLOSE)
        score = own.sum() if aggregate == "sum" else own[-1]
        torch.testing.assert_close(found[4].scores[i, 0], score, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregate", ["last", "sum"])
def test_a_beam_after_a_prefix(kind, aggregate, loaded):
    output = reference.hf_block_output(tiny_hf_model(kind), 1)
    options = {"n_tokens": 3, "beam": 3, "aggregate": aggregate}
    result = search_greedy(loaded(kind), Features(1, [4, 9]), **options, prefix=torch.tensor([8, 3]))
    for i, feature in enumerate([4, 9]):
        inputs = reference.beam_search(output, VOCAB, 3, feature, 3, aggregate == "sum", [8, 3])
        assert result.ids[i].tolist() == [tokens for _, tokens in inputs]
        assert result.scores[i].tolist() == pytest.approx([score for score, _ in inputs], abs=2e-4)


def test_aggregates_differ_in_a_beam(loaded):
    last, total = (
        search_greedy(loaded("gpt2"), Features(1, range(4)), n_tokens=3, beam=3, aggregate=aggregate)
        for aggregate in ("last", "sum")
    )
    assert not torch.equal(last.ids, total.ids)


def test_a_beam_of_the_whole_vocabulary_is_exhaustive(loaded):
    output, feature = reference.hf_block_output(tiny_hf_model("llama"), 0), 11
    pairs = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
    own = output(pairs)[:, 1, feature]
    result = search_greedy(loaded("llama"), Features(0, [feature]), n_tokens=2, beam=VOCAB)
    best = own.sort(descending=True)
    assert result.ids[0, 0].tolist() == pairs[best.indices[0]].tolist()
    torch.testing.assert_close(result.scores[0], best.values[:VOCAB], **CLOSE)


def test_one_token_is_exhaustive_search(loaded):
    model, vectors = loaded("gpt2"), torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    for options in (
        {"indices": [3, 1], "site": "post"},
        {"indices": [2], "site": "attn_out"},
        {"directions": vectors},
    ):
        one = search_greedy(model, Features(1, **options), n_tokens=1, beam=2, prefix="ab")
        complete = search_exhaustive(model, Features(1, **options), top_k=2, prefix="ab")
        assert torch.equal(one.ids[:, :, 0], complete.ids[0])
        # the same runs
        assert_close(one.activations[:, :, 0], complete.activations[0])
        assert (one.features, one.site) == (complete.features, complete.site)


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_costs_one_token_per_candidate(kind, loaded):
    model, name = loaded(kind), "blocks.0.hook_resid_post"
    seen = positions_run(model, [name], lambda: search_greedy(model, Features(0, [5]), n_tokens=4))
    # before each step, 4 tokens are tested in full runs and 4 with the prefix, which is run once
    tried = sum(4 * (n + 1) + 4 + n for n in range(4))
    assert seen[name] == 4 * VOCAB + tried


def test_features_with_the_same_input_share_a_pass(loaded):
    model, passes = loaded("gpt2"), []
    vectors = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    # the same direction with two lengths, and its opposite
    three = torch.cat([vectors, 2 * vectors, -vectors])
    run = greedy._best_after

    def counting(sought, before, columns, *others):
        passes.append((before.tolist(), columns.tolist()))
        return run(sought, before, columns, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "_best_after", counting)
        result = search_greedy(model, Features(1, directions=three), n_tokens=2)
    assert passes[0] == ([], [0, 1, 2])
    assert [columns for _, columns in passes[1:]] == [[0, 1], [2]]
    assert torch.equal(result.ids[0], result.ids[1])
    assert_close(result.activations[1], 2 * result.activations[0])


def test_ties_go_to_the_first_input(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        # all tokens have the same embedding
        model.W_E[:] = model.W_E[5].clone()
    result = search_greedy(model, Features(1, [3, 9]), n_tokens=2, beam=3, batch_size=8)
    assert result.ids.tolist() == [[[0, 0], [0, 1], [0, 2]]] * 2


def test_an_interrupted_search_resumes(loaded, tmp_path, monkeypatch):
    model, file = loaded("gpt2"), tmp_path / "checkpoint.safetensors"
    options = {"features": Features(1, [1, 2, 3]), "n_tokens": 3, "beam": 2}
    whole, run, passes = search_greedy(model, **options), greedy._best_after, []

    def interrupted(*given):
        if len(passes) == stop:
            raise KeyboardInterrupt
        passes.append(given[1].tolist())
        return run(*given)

    monkeypatch.setattr(greedy, "_best_after", interrupted)
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        search_greedy(model, resume=file, **options)
    stop = None
    assert_same(search_greedy(model, resume=file, **options), whole)
    assert len({tuple(each) for each in passes}) == len(passes), "no pass is made twice"
    before = len(passes)
    assert_same(search_greedy(model, resume=file, **options), whole)
    assert len(passes) == before
    for change, message in (
        ({"beam": 1}, "begun with beam 2, not 1"),
        ({"aggregate": "sum"}, "begun with aggregate 'last'"),
        ({"features": Features(0, [1, 2, 3])}, r"begun with layers \[1\], not \[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            search_greedy(model, resume=file, **(options | change))
    with pytest.raises(ValueError, match="is not a checkpoint of an exhaustive search"):
        search_exhaustive(model, Features([1], [1, 2, 3]), resume=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": Features(2)}, "layer 2 is out of range"),
        ({"features": Features(0, [])}, "no feature selected"),
        ({"features": Features([0, 1])}, r"layers must be a single layer for this search, got \[0, 1\]"),
        ({"n_tokens": 0}, "n_tokens must be at least 1, got 0"),
        ({"n_tokens": 33}, "33 tokens after a prefix of 0 do not fit into the model's context of 32"),
        ({"n_tokens": 3, "prefix": torch.ones(30, dtype=torch.long)}, "3 tokens after a prefix of 30"),
        ({"beam": 0}, "beam must be at least 1"),
        ({"beam": VOCAB + 1}, f"beam must be at most {VOCAB}, the size of the vocabulary"),
        ({"aggregate": "mean"}, "aggregate must be one of last, sum, got 'mean'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_invalid_arguments_are_refused(loaded, options, message):
    with pytest.raises(ValueError, match=message):
        search_greedy(loaded("gpt2"), **({"features": Features(0, [0]), "n_tokens": 1} | options))


def test_processed_weights_are_refused(tiny_bos_model):
    with pytest.raises(ValueError, match="processing changes the basis"):
        search_greedy(tiny_bos_model, Features(0, [0]), n_tokens=1)
