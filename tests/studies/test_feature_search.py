"""The claims of Badger's "Language Model Features" as numbers: known searches, and small models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.analyses.features import (
    Features,
    Maximize,
    Optimizer,
    feature_alignment,
    search_exhaustive,
    search_gradient,
)
from mechlens.models.load.loading import load_model
from mechlens.models.weights.randomize import random_like
from mechlens.studies import feature_claims as claims
from mechlens.studies import feature_search
from mechlens.studies.feature_search import decoded, share_of, some_layers, study_feature_search
from mechlens.studies.published import FEATURE_TOKENS
from tests.close import assert_same
from tests.reference import features as reference
from tests.tiny_models import VOCAB, tiny_hf_model

LAST = 3
ONE_START = Optimizer(restarts=1)
"""One of the study's four features; a search takes a second, so only this one is searched again."""


@pytest.fixture(scope="module")
def study(tiny_directories):
    # with the name and depth of the model in the post's tables
    model = load_model(tiny_directories / "gpt2", processing=False)
    tables = tuple(dataclasses.replace(each, n_layers=2) for each in FEATURE_TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_search, "FEATURE_TOKENS", tables)
        found = study_feature_search(model, n_features=4, n_tokens=2, top_k=3)
        return found.holding(claims.claims_of(found))


def measured(claim, study):
    found = claim.compare(study)
    return found.measured, found.verdict


def decoding(search, token):
    """The search as if its embeddings were decoded to other tokens."""
    n_tokens = search.embeddings.shape[1]
    return dataclasses.replace(search, decoded_ids={"pinv": torch.full((1, n_tokens), token)})


def descending(study, name, searches):
    return dataclasses.replace(study, descents={**study.descents, name: tuple(searches)})


def test_every_claim_is_measured(study):
    own = [each for each in FEATURE_TOKENS if "gpt2" in each.models]
    expected = [*(each.text for each in claims.CLAIMS), *(claims.tokens_claim(each).text for each in own)]
    assert [each.claim for each in study.comparisons] == expected
    assert {each.verdict for each in study.comparisons} == {"reproduced", "not reproduced", "not judged"}


def test_the_tables_are_compared_with_the_results_of_the_posts_loop(study):
    output = reference.hf_block_output(tiny_hf_model("gpt2"), 0)
    tokens = [reference.search_maximal(output, VOCAB, 1, m)[0] for m in range(4)]
    strings = study.complete["trained"].strings
    (claim,) = (
        each
        for each in FEATURE_TOKENS
        if each.search == "complete" and each.block == 1 and "gpt2" in each.models
    )
    found = claims.tokens_claim(claim).compare(study)
    assert found.measured == " | ".join(strings[str(token)].strip() for token in tokens)
    assert found.verdict == "not reproduced"
    own = dataclasses.replace(claim, inputs=tuple(strings[str(token)] for token in tokens))
    assert claims.tokens_claim(own).compare(study).verdict == "reproduced"
    three = dataclasses.replace(own, inputs=(*own.inputs[:3], "other"))
    assert claims.tokens_claim(three).compare(study).verdict == "not reproduced"


def test_greedy_inputs_are_compared_without_spaces(study):
    (claim,) = (each for each in FEATURE_TOKENS if each.search == "greedy" and each.block == 1)
    search = study.greedy[0]
    texts = tuple("".join(search.strings[str(token)] for token in ids) for ids in search.ids[:, 0].tolist())
    assert (
        claims.tokens_claim(dataclasses.replace(claim, inputs=texts)).compare(study).verdict == "reproduced"
    )
    assert claims.tokens_claim(claim).compare(study).verdict == "not reproduced"


def test_missing_layers_and_unpublished_values_are_not_judged(study):
    verdicts = {
        (c.search, c.block): claims.tokens_claim(c).compare(study)
        for c in FEATURE_TOKENS
        if "gpt2" in c.models
    }
    # the tiny model has two blocks
    assert verdicts["complete", 8].verdict == verdicts["greedy", 12].verdict == "not judged"
    assert verdicts["complete", 8].measured == "not measured"
    assert verdicts["softmax", 1].verdict == "not reproduced"
    assert verdicts["l1", 1].verdict == verdicts["cosine", 1].verdict == "not judged"
    assert verdicts["l1", 1].measured.endswith("(from another start)")


def test_alignment_claims_follow_the_shares(study):
    whole = study.complete["trained"]
    same = dataclasses.replace(whole, ids=whole.ids[:1].expand(2, -1, -1).clone())
    aligned, learned = feature_alignment(same), {**study.alignments, "trained": feature_alignment(same)}
    agreeing = dataclasses.replace(study, alignments=learned)
    assert aligned.share().value == 1
    for what in (claims.LAYERS_AGREE, claims.AGREE_BEYOND_CHANCE, claims.AGREEMENT_IS_LEARNED):
        assert measured(what, agreeing)[1] == "reproduced"
    assert measured(claims.LAYERS_AGREE, agreeing)[0].startswith("1.000 (")
    random = dataclasses.replace(study, alignments={**study.alignments, "random": aligned})
    assert measured(claims.RANDOM_LAYERS_DO_NOT, random)[1] == "not reproduced"
    assert measured(claims.AGREEMENT_IS_LEARNED, random)[1] == "not reproduced"
    # feature m has different best tokens in the two layers
    apart = whole.ids.clone()
    apart[0], apart[1] = torch.arange(32)[:, None], torch.arange(32).roll(1)[:, None]
    alone = feature_alignment(dataclasses.replace(whole, ids=apart))
    none = dataclasses.replace(study, alignments={**study.alignments, "trained": alone, "random": alone})
    assert measured(claims.AGREE_BEYOND_CHANCE, none)[1] == "not reproduced"
    assert measured(claims.RANDOM_LAYERS_DO_NOT, none)[1] == "reproduced"
    # in the first layer each id is its feature's index; tokens decoded from gradients are judged
    assert "exhaustive search 0.5000" in measured(claims.ID_IS_NUMBER, none)[0]
    descents = study.descents["trained"]
    own = [decoding(each, int(each.selected[0, 1])) for each in descents]
    assert measured(claims.ID_IS_NUMBER, descending(study, "trained", own))[1] == "reproduced"
    others = [decoding(each, 63) for each in descents]
    assert measured(claims.ID_IS_NUMBER, descending(study, "trained", others))[1] == "not reproduced"
    # one of four by chance is not an artifact: its interval reaches below chance
    assert measured(claims.ID_IS_NUMBER, descending(study, "trained", [*own[:1], *others[1:]]))[1] == (
        "not reproduced"
    )
    assert (
        "random weights 4, random blocks"
        in measured(claims.ID_IS_NUMBER, descending(study, "random", own))[0]
    )


def test_an_effect_of_training_needs_disjoint_intervals(study):
    """Those of 1 and 3 in 32 features overlap."""
    whole = study.complete["trained"]

    def agreeing(count):
        # no token twice, except those that layers share
        ids = torch.arange(64).view(2, 32, 1).expand(-1, -1, 3).clone()
        ids[1, :count] = ids[0, :count]
        return feature_alignment(dataclasses.replace(whole, ids=ids), top_k=1)

    for trained, random, verdict in (
        (3, 1, "not reproduced"),
        (20, 1, "reproduced"),
        (1, 3, "not reproduced"),
    ):
        shares = {**study.alignments, "trained": agreeing(trained), "random": agreeing(random)}
        other = dataclasses.replace(study, alignments=shares)
        assert measured(claims.AGREEMENT_IS_LEARNED, other)[1] == verdict


def test_untrained_models_are_decoded_like_the_trained_one(study):
    trained = study.descents["trained"]
    for what, name, verdict in (
        (claims.RANDOM_IS_LIKE_TRAINED, "random", "reproduced"),
        # the post does not say
        (claims.EMBEDDINGS_MAKE_IT_SO, "embeddings", "not judged"),
    ):
        same = sum(
            one.decoded_ids["pinv"][0, 0] == other.decoded_ids["pinv"][0, 0]
            for one, other in zip(trained, study.descents[name], strict=True)
        )
        assert measured(what, study)[0].startswith(f"{same} of 4 decoded")
        said, found = measured(what, descending(study, name, trained))
        assert (said[: len("4 of 4 decoded")], found) == ("4 of 4 decoded", verdict)
    apart = [decoding(each, (decoded(each)[0] + 1) % VOCAB) for each in trained]
    assert measured(claims.RANDOM_IS_LIKE_TRAINED, descending(study, "random", apart))[1] == "not reproduced"


def test_untrained_models_are_searched_themselves(study, tiny_directories):
    """Each starts elsewhere than the trained one, or they might agree because of that."""
    model = load_model(tiny_directories / "gpt2", processing=False)
    for name in ("random", "embeddings"):
        other = random_like(model, 0, keep_embeddings=name == "embeddings")
        alone = search_gradient(other, Maximize(Features(0, LAST)), n_tokens=1, optimizer=ONE_START, seed=1)
        assert_same(study.descents[name][LAST], alone)


def test_one_layer_has_no_agreement(study):
    whole = study.complete["trained"]
    one = dataclasses.replace(
        whole,
        layers=(0,),
        **{
            name: getattr(whole, name)[:1]
            for name in ("ids", "activations", "lowest_ids", "lowest_activations")
        },
    )
    names = ("trained", "random")
    alone = dataclasses.replace(
        study,
        alignments={**study.alignments, **{name: feature_alignment(one) for name in names}},
        greedy=study.greedy[:1],
        complete={**study.complete, "trained": one},
    )
    assert measured(claims.ALONE_AS_THE_FIRST, alone)[1] == "not judged"
    for what in (claims.LAYERS_AGREE, claims.AGREE_BEYOND_CHANCE, claims.AGREEMENT_IS_LEARNED):
        assert measured(what, alone)[1] == "not judged"
    assert measured(claims.LATER_AGREE_LESS, alone)[1] == "not judged"


def test_gradient_claims_of_known_searches(study):
    table = study.to_features()
    trained = study.complete["trained"]
    assert table.best_token.tolist() == [trained.strings[str(int(i))] for i in trained.ids[0, :4, 0]]
    assert table.optimum.tolist() == trained.activations[0, :4, 0].tolist()
    differ = sum(
        decoded(each) != [int(best)]
        for each, best in zip(study.descents["trained"], trained.ids[0, :4, 0], strict=True)
    )
    near = int((table.share_of_optimum >= 0.95).sum())
    text, verdict = measured(claims.GRADIENT_DIFFERS, study)
    assert text.startswith(f"{differ} of 4 ")
    assert f"by default {near} of 4 reach 95%" in text
    assert verdict == ("reproduced" if differ >= 2 else "not reproduced")
    assert measured(claims.LAST_IS_SUM, study) == (
        "8 of 8, each compared with up to 256 others (0.63 to 1.00)",
        "reproduced",
    )
    wrong = dataclasses.replace(study, summed=(False, *study.summed[1:]))
    assert measured(claims.LAST_IS_SUM, wrong)[1] == "not reproduced"


def test_last_and_sum_match_full_runs(study, tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    search = study.greedy[1]
    output = reference.hf_block_output(tiny_hf_model("gpt2"), search.layer)
    for number, feature in enumerate(search.features):
        found = search.ids[number, 0].tolist()
        # the post's second loop: the token with the largest sum over the whole input
        inputs = torch.tensor([[*found[:-1], token] for token in range(VOCAB)])
        assert int(output(inputs)[..., feature].sum(1).argmax()) == found[-1]
    assert feature_search._sums_agree(model, search, 0) == [True] * 4
    ids = search.ids.clone()
    ids[2, 0, -1] = (ids[2, 0, -1] + 1) % VOCAB
    assert feature_search._sums_agree(model, dataclasses.replace(search, ids=ids), 0) == [
        True,
        True,
        False,
        True,
    ]


def test_random_models_are_searched_from_one_start(study, tiny_directories):
    """From one random start, as in the post: among many, some would consist of special tokens."""
    model = load_model(tiny_directories / "gpt2", processing=False)
    alone = search_gradient(model, Maximize(Features(0, LAST)), n_tokens=5, optimizer=ONE_START)
    assert_same(study.repeated[LAST], alone)
    same = sum(len(set(each.decoded_ids["pinv"][0].tolist())) == 1 for each in study.repeated)
    assert measured(claims.ONE_WORD_REPEATED, study)[0].startswith(f"{same} of 4 decoded")
    words = dataclasses.replace(study, repeated=tuple(decoding(each, 7) for each in study.repeated))
    assert measured(claims.ONE_WORD_REPEATED, words)[1] == "reproduced"


def test_the_last_block_is_searched_on_its_own(study, tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    block = Maximize(Features(1, LAST), isolated=True)
    assert_same(study.alone[LAST], search_gradient(model, block, n_tokens=1))
    same = sum(
        torch.equal(one.best_ids(), other.best_ids())
        for one, other in zip(study.alone, study.gradient, strict=True)
    )
    assert measured(claims.ALONE_AS_THE_FIRST, study)[0].startswith(f"{same} of 4 ")
    alike = dataclasses.replace(study, alone=study.gradient)
    assert measured(claims.ALONE_AS_THE_FIRST, alike)[1] == "reproduced"


def test_found_embeddings_are_closer_to_real_ones_than_those_to_each_other(study):
    for cosine, verdict in ((0.4, "reproduced"), (0.2, "not reproduced")):
        descents = [
            dataclasses.replace(each, nearest_cosine=torch.full((1, 1), cosine), token_cosine=0.3)
            for each in study.descents["trained"]
        ]
        found = measured(claims.FOUND_RESEMBLE_REAL, descending(study, "trained", descents))
        assert found == (f"cosine to the nearest real one {cosine:.3f}; between neighbors 0.300", verdict)


def test_a_model_of_another_size(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    found = study_feature_search(model, n_features=1, n_tokens=1, against=random_like(model, 3))
    share = feature_alignment(
        search_exhaustive(model, top_k=5), search_exhaustive(random_like(model, 3), top_k=5)
    ).share()
    assert measured(claims.SIZES_AGREE, found) == (str(share), "not reproduced")
    same = dataclasses.replace(
        found,
        alignments=found.alignments | {"trained_other": feature_alignment(*[found.complete["trained"]] * 2)},
    )
    assert measured(claims.SIZES_AGREE, same)[1] == "reproduced"
    other = load_model(tiny_directories / "llama", processing=False)
    other.tokenizer = None
    with pytest.raises(ValueError, match="against must be a model with the same tokenizer"):
        study_feature_search(model, against=other)


def test_a_descent_is_decoded_with_the_pseudoinverse(study):
    E = tiny_hf_model("gpt2").get_input_embeddings().weight.detach().double()
    for each in study.descents["trained"]:
        expected = int((each.embeddings[0, 0].double() @ torch.linalg.pinv(E)).argmax())
        assert decoded(each) == [expected]


def test_later_tokens(study):
    one = study.greedy[0]
    # two layers: all first tokens agree, and no later ones
    ids = one.ids.clone()
    ids[..., 1:] += 1
    agree = dataclasses.replace(study, greedy=(one, dataclasses.replace(one, ids=ids)))
    # for four features, 1.000 means at least 0.398, and 0.000 at most 0.602
    assert measured(claims.LATER_AGREE_LESS, agree) == (
        "first token 1.000, later ones 0.000, of 4 features",
        "not judged",
    )
    both = [
        dataclasses.replace(
            each,
            features=tuple(range(8)),
            ids=torch.cat([each.ids, each.ids]),
            activations=torch.cat([each.activations, each.activations]),
        )
        for each in agree.greedy
    ]
    of_eight = dataclasses.replace(study, greedy=tuple(both))
    assert measured(claims.LATER_AGREE_LESS, of_eight)[1] == "reproduced"
    same = dataclasses.replace(study, greedy=(one, one))
    assert measured(claims.LATER_AGREE_LESS, same)[1] == "not reproduced"


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [0]), (4, [0, 1, 2, 3]), (12, [0, 3, 7, 11]), (32, [0, 10, 20, 31])]
)
def test_some_layers(layers, expected, study):
    search = dataclasses.replace(study.complete["trained"], layers=tuple(range(layers)))
    assert some_layers(search) == expected


def test_another_model_of_the_same_name_is_not_compared_with_the_tables(study):
    # two layers, while the tables are for models with 12
    assert len(claims.claims_of(study)) == len(claims.CLAIMS)


def test_invalid_sizes_are_refused_before_any_search(tiny_directories, monkeypatch):
    model = load_model(tiny_directories / "gpt2", processing=False)
    monkeypatch.setattr(feature_search, "search_exhaustive", None)
    with pytest.raises(ValueError, match="n_tokens must be at most 32, the model's context, got 40"):
        study_feature_search(model, n_tokens=40)
    with pytest.raises(ValueError, match="n_features must be at least 1, got 0"):
        study_feature_search(model, n_features=0)


def test_the_results_have_names(study):
    names = set(study.results)
    assert {"complete_trained", "alignments_trained_random", "greedy_layer_0", "gradient"} <= names
    assert study.complete["embeddings"].model.name.endswith("seed 0, trained embeddings)")


def test_processed_weights_are_refused(tiny_directories):
    with pytest.raises(ValueError, match="processing=False"):
        study_feature_search(load_model(tiny_directories / "gpt2"))


def test_a_share_of_nothing_is_undefined():
    assert share_of(3.0, 4.0) == 0.75
    assert math.isnan(share_of(-2.0, -1.0))
