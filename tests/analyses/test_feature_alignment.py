"""Feature alignment compared with literal loops, and on models with known features."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.analyses.features import Features, feature_alignment, search_exhaustive
from mechlens.measures.statistics import exact_interval
from mechlens.models.load.loading import load_model
from mechlens.models.weights.randomize import random_like
from mechlens.results import ExhaustiveSearch
from tests import examples
from tests.reference import features as reference
from tests.tiny_models import write_tiny_model

D_VOCAB = 9


def search(ids, **changes):
    """An exhaustive search that found these tokens, `[layer][feature][k]`."""
    ids = torch.tensor(ids) if not isinstance(ids, torch.Tensor) else ids
    ones = torch.ones(ids.shape)
    fields = {
        "model": dataclasses.replace(examples.model(), d_vocab=D_VOCAB, processing=False),
        "site": "resid_post",
        "layers": tuple(range(ids.shape[0])),
        "features": tuple(range(ids.shape[1])),
        "directions": None,
        "prefix": torch.tensor([], dtype=torch.long),
        "prepend_bos": False,
        "ids": ids,
        "activations": ones,
        "lowest_ids": ids,
        "lowest_activations": -ones,
        "strings": {str(i): str(i) for i in range(D_VOCAB)},
        "vocabulary": "a",
    }
    return ExhaustiveSearch(**fields | changes)


def test_a_known_case():
    # the two layers agree on features 0 and 1 of three; token 5 is the best of two features
    found = feature_alignment(search([[[5], [6], [7]], [[5], [6], [5]]]))
    assert found.same[0, 1].tolist() == [True, True, False]
    assert found.same[0, 0].tolist() == [True] * 3
    # among the six pairs of different features, only (0, 2) has 5 on both sides
    assert found.chance_same[0, 1] == pytest.approx(1 / 6)
    assert found.share().value == pytest.approx(2 / 3)
    assert found.pairs() == [(0, 1)]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_number_matches_literal_loops(top_k):
    draw = torch.Generator().manual_seed(3)
    mine, theirs = (
        torch.stack([torch.randperm(D_VOCAB, generator=draw)[:4] for _ in range(layers * 6)]).view(
            layers, 6, 4
        )
        for layers in (3, 2)
    )
    found = feature_alignment(search(mine), search(theirs, vocabulary="a"), top_k=top_k)
    for i in range(3):
        for j in range(2):
            same, overlap = reference.alignment(mine[i].tolist(), theirs[j].tolist(), top_k)
            assert found.same[i, j].tolist() == same.diagonal().bool().tolist()
            torch.testing.assert_close(found.overlap[i, j], overlap.diagonal().float())
            apart = ~torch.eye(6, dtype=torch.bool)
            # the same ratio in float32
            assert float(found.chance_same[i, j]) == pytest.approx(float(same[apart].mean()), rel=1e-6)
            assert float(found.chance_overlap[i, j]) == pytest.approx(float(overlap[apart].mean()), rel=1e-6)
    assert found.is_index.tolist() == [[row[m][0] == m for m in range(6)] for row in mine.tolist()]
    assert found.other_is_index.tolist() == [[row[m][0] == m for m in range(6)] for row in theirs.tolist()]


def test_features_are_matched_by_index_not_by_place():
    a = search([[[1], [2], [3]]], features=(4, 7, 2))
    b = search([[[3], [1]]], features=(2, 4))
    found = feature_alignment(a, b)
    assert found.features == (4, 2)
    assert found.same.tolist() == [[[True, True]]]
    assert found.is_index.tolist() == [[False, False]]


def test_random_tokens_agree_as_often_as_chance_predicts():
    # many features, so that share and chance are close: 3 standard deviations of 4000 draws
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(D_VOCAB, (2, 4000, 1), generator=draw)
    share = feature_alignment(search(ids, features=tuple(range(4000)))).share()
    assert share.chance == pytest.approx(1 / D_VOCAB, abs=0.002)
    assert share.value == pytest.approx(share.chance, abs=3 * math.sqrt(share.chance / 4000))
    assert share.low < share.chance < share.high
    assert share.verdict == "no more than chance"


def test_one_token_that_is_best_for_everything_is_not_alignment():
    # one token is best for every feature, so different features agree, too
    share = feature_alignment(search(torch.full((2, 50, 1), 4))).share()
    assert share.value == share.chance == 1
    assert share.verdict == "no more than chance"


def test_the_summary_is_over_pairs_of_layers():
    a = search([[[1], [2]], [[1], [3]], [[4], [3]]])
    within = feature_alignment(a)
    assert within.pairs() == [(0, 1), (0, 2), (1, 2)]
    # 1 of 2, 0 of 2 and 1 of 2
    assert within.share().value == pytest.approx(1 / 3)
    across = feature_alignment(a, search([[[1], [2]], [[1], [4]]]))
    assert across.pairs() == [(0, 0), (1, 1)]
    assert across.share().value == pytest.approx(3 / 4)
    apart = feature_alignment(search([[[1], [2]]], layers=(5,)), search([[[1], [4]]], layers=(0,)))
    assert apart.pairs() == [(5, 0)]
    one = feature_alignment(search([[[1], [2]]]))
    assert one.pairs() == []
    assert math.isnan(one.share().value)
    assert one.share().verdict == ""


def test_the_table_has_each_pair_of_two_searches():
    a, b = search([[[1], [2]], [[1], [3]]]), search([[[1], [2]], [[4], [3]]])
    table = feature_alignment(a, b).to_dataframe()
    assert table[["layer", "other_layer", "same"]].to_numpy().tolist() == [
        [0, 0, 1.0],
        [0, 1, 0.0],
        [1, 0, 0.5],
        [1, 1, 0.5],
    ]
    assert table["same_chance"].notna().all()


def test_the_table_of_one_search_has_each_pair_once_and_no_layer_with_itself():
    found = feature_alignment(search([[[1], [2]], [[1], [3]], [[4], [3]]]))
    table = found.to_dataframe()
    assert table[["layer", "other_layer", "same"]].to_numpy().tolist() == [
        [0, 1, 0.5],
        [0, 2, 0.0],
        [1, 2, 0.5],
    ]
    assert table["same"].mean() == pytest.approx(found.share().value)
    alone = feature_alignment(search([[[1], [2]]])).to_dataframe()
    assert len(alone) == 0
    assert list(alone) == list(table)


def test_one_feature_has_no_chance():
    share = feature_alignment(search([[[1]], [[1]]])).share()
    assert share.value == 1
    assert math.isnan(share.chance)
    assert share.verdict == ""


def test_searches_that_cannot_be_compared_are_refused():
    a = search([[[1, 2], [2, 3]]])
    with pytest.raises(ValueError, match="different vocabularies"):
        feature_alignment(a, search([[[1], [2]]], vocabulary="b"))
    without = dataclasses.replace(a, vocabulary=None)
    other = dataclasses.replace(without, model=dataclasses.replace(a.model, d_vocab=D_VOCAB + 1))
    with pytest.raises(ValueError, match="different vocabularies"):
        feature_alignment(without, other)
    with pytest.raises(ValueError, match="no feature in common"):
        feature_alignment(a, search([[[1], [2]]], features=(5, 6)))
    with pytest.raises(ValueError, match="share only their indices"):
        feature_alignment(a, search([[[1], [2]]], site="post"))
    with pytest.raises(ValueError, match="top_k must be between 1 and 1, the tokens that both"):
        feature_alignment(a, search([[[1], [2]]]), top_k=2)
    with pytest.raises(ValueError, match="layers 0 and 3 were not compared"):
        feature_alignment(a).share(pairs=[(0, 3)])
    with pytest.raises(ValueError, match="what must be one of same, overlap, got 'both'"):
        feature_alignment(a).share("both")


def test_directions_are_compared_only_with_themselves():
    some = {"site": "direction", "directions": torch.eye(2, 4)}
    a = search([[[1], [2]], [[1], [3]]], **some)
    assert feature_alignment(a).share().value == 0.5
    assert feature_alignment(a, search([[[1], [2]]], **some)).share().value == 1
    # a direction's index means nothing
    assert math.isnan(feature_alignment(a).index_share().value)
    with pytest.raises(ValueError, match="have different directions"):
        feature_alignment(a, search([[[1], [2]]], **(some | {"directions": torch.ones(2, 4)})))


def test_one_coincidence_is_not_alignment():
    # one of 50 features agrees, where one in 500 would by chance
    ids = torch.arange(100).view(2, 50, 1) % 97
    ids[1, 7] = ids[0, 7]
    found = search(ids, model=dataclasses.replace(examples.model(), d_vocab=100))
    share = feature_alignment(found).share()
    assert share.value == pytest.approx(1 / 50)
    assert share.verdict == "no more than chance"


def test_sites_of_the_stream_may_differ():
    found = feature_alignment(search([[[1], [2]]]), search([[[1], [3]]], site="mlp_out"))
    assert (found.site, found.other_site) == ("resid_post", "mlp_out")
    assert found.same.tolist() == [[[True, False]]]


def test_a_feature_that_no_token_activates_is_left_out():
    # feature 0 has no best token in layer 1, feature 3 in neither; the lowest id is stored there, and agrees
    ids = torch.tensor([[[0], [5], [6], [0]], [[0], [5], [7], [0]]])
    activations = torch.tensor([[[1.0], [1.0], [1.0], [0.0]], [[0.0], [1.0], [1.0], [-0.0]]])
    found = feature_alignment(search(ids, activations=activations, site="post"))
    assert found.compared[0, 1].tolist() == [False, True, True, False]
    assert found.same[0, 1].tolist() == [False, True, False, False]
    assert found.overlap[0, 1].isnan().tolist() == [True, False, False, True]
    share = found.share()
    assert share.value == 1 / 2
    assert (share.low, share.high) == exact_interval(1 / 2, 2)
    # 5 with 7 and 6 with 5
    assert share.chance == 0
    assert found.to_dataframe()["features"].tolist() == [2]
    # token 0 is the best token of feature 0, and only in layer 0
    assert found.is_index.tolist() == [[True, False, False, False], [False] * 4]
    index = found.index_share()
    assert index.value == pytest.approx((1 / 3 + 0 / 2) / 2)
    # layers are not independent observations: the harmonic mean of 3 and 2 features, rounded down
    assert (index.low, index.high) == exact_interval(index.value, 2)
    nothing = feature_alignment(search(ids, activations=torch.zeros(2, 4, 1), site="post"))
    assert math.isnan(nothing.share().value)
    assert math.isnan(nothing.index_share().value)
    assert nothing.to_dataframe()["features"].tolist() == [0]


def test_pairs_of_layers_may_count_different_numbers_of_features():
    # layers 0 and 1 agree on 4 of 6; in layer 2 only features 0 and 1 have a best token, the same for both;
    # in layer 3 only one has, so there is no chance level
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [1, 2, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    found = feature_alignment(search(ids[..., None], activations=(ids[..., None] > 0).float()))
    assert found.to_dataframe()["features"].tolist() == [6, 2, 1, 2, 1, 1]
    some = found.share(pairs=[(0, 1), (0, 2)])
    assert some.value == pytest.approx((4 / 6 + 1) / 2)
    # the harmonic mean of 6 and 2 is 3
    assert (some.low, some.high) == exact_interval(some.value, 3)
    # (0, 1), (0, 2) and (1, 2)
    assert found.share().value == pytest.approx((4 / 6 + 1 + 1) / 3)
    assert not math.isnan(found.share().chance)
    alone = found.share(pairs=[(0, 3)])
    assert alone.value == 1
    assert math.isnan(alone.chance)


@pytest.mark.parametrize("top_k", [1, 3])
def test_with_dead_neurons_every_number_matches_literal_loops(tmp_path, top_k):
    body = write_tiny_model(tmp_path / "dead", "gpt2", n_inner=24)
    with torch.no_grad():
        for block, dead, rare in zip(
            body.transformer.h, ((0, 8), (4, 12)), ((12, 18), (14, 20)), strict=True
        ):
            # some are 0 for every token, others above 0 for a few
            block.mlp.c_fc.bias[slice(*dead)] = -1000.0
            block.mlp.c_fc.bias[slice(*rare)] = -2.5
    body.save_pretrained(tmp_path / "dead")
    model = load_model(tmp_path / "dead", processing=False)
    found = feature_alignment(search_exhaustive(model, Features(site="post"), top_k=top_k))
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(2)]
    best = [
        [
            [token for token in column.argsort(descending=True, stable=True).tolist() if column[token] > 0][
                :top_k
            ]
            for column in values.T
        ]
        for values in reference.by_hand(model, names).values()
    ]
    lengths = {len(tokens) for layer in best for tokens in layer}
    assert {0, top_k} <= lengths
    if top_k > 1:
        assert lengths & set(range(1, top_k)), "no list is cut short"
    for i in range(2):
        for j in range(2):
            same, overlap = reference.alignment(best[i], best[j], top_k)
            counted = [m for m in range(24) if best[i][m] and best[j][m]]
            assert len(counted) < 17
            assert found.compared[i, j].nonzero().flatten().tolist() == counted
            apart = [(m, n) for m in counted for n in counted if m != n]
            for what, values, chance in (
                ("same", same, found.chance_same),
                ("overlap", overlap, found.chance_overlap),
            ):
                share = found.share(what, [(i, j)])
                # the same ratios in float32
                value = sum(float(values[m, m]) for m in counted) / len(counted)
                assert share.value == pytest.approx(value, rel=1e-6)
                assert (share.low, share.high) == exact_interval(share.value, len(counted))
                expected = sum(float(values[m, n]) for m, n in apart) / len(apart)
                assert share.chance == float(chance[i, j]) == pytest.approx(expected, rel=1e-6)


def test_a_model_agrees_with_itself_and_not_with_random_weights(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    own = search_exhaustive(model, top_k=2)
    assert feature_alignment(own, search_exhaustive(model, top_k=2)).share().value == 1
    random = search_exhaustive(random_like(model, 0), top_k=2)
    share = feature_alignment(own, random).share()
    assert share.low <= share.chance
    assert share.value < 0.3
