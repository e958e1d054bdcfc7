"""The post's claims about features as numbers: known searches, and small models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.analyses.features import feature_alignment
from mechlens.models.load import load_model
from mechlens.published import FEATURE_TOKENS, FEATURES
from mechlens.results import load
from mechlens.studies import feature_search
from mechlens.studies.feature_search import (
    CLAIMS,
    compare,
    compare_tokens,
    decoded,
    reproduce_feature_search,
    some_layers,
)
from tests.reference import features as reference
from tests.tiny_models import VOCAB, tiny_hf_model

BY_NAME = {claim.what: claim for claim in FEATURES}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second one gains nothing on such small tensors, and waits for its core where others use it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def study(tiny_directories, one_thread):
    # of the name that the post's tables are of, and for once of the right depth
    model = load_model(tiny_directories / "gpt2", processing=False)
    tables = tuple(dataclasses.replace(each, n_layers=2) for each in FEATURE_TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_search, "FEATURE_TOKENS", tables)
        return reproduce_feature_search(model, n_features=4, n_tokens=2, top_k=3)


def measured(what, study):
    found = compare(BY_NAME[what], study)
    return found.measured, found.verdict


def decoding(search, token):
    """The search, had its embedding stood for another token."""
    return dataclasses.replace(search, decoded_ids={"pinv": torch.tensor([[token]])})


def test_every_claim_is_measured(study):
    assert set(CLAIMS) == set(BY_NAME)
    own = [each for each in FEATURE_TOKENS if "gpt2" in each.models]
    assert len(study.comparisons) == len(FEATURES) + len(own)
    assert [each.published for each in study.comparisons[: len(FEATURES)]] == [c.value for c in FEATURES]
    assert set(study.to_dataframe().verdict) <= {"reproduced", "not reproduced", "not judged"}


def test_the_tables_hold_what_the_seeds_loop_finds(study):
    output = reference.hf_block_output(tiny_hf_model("gpt2"), 0)
    tokens = [reference.search_maximal(output, VOCAB, 1, m)[0] for m in range(4)]
    strings = study.complete["trained"].strings
    (claim,) = (
        each
        for each in FEATURE_TOKENS
        if each.search == "complete" and each.block == 1 and "gpt2" in each.models
    )
    found = compare_tokens(claim, study)
    assert found.measured == " | ".join(strings[str(token)].strip() for token in tokens)
    assert found.verdict == "not reproduced"
    own = dataclasses.replace(claim, inputs=tuple(strings[str(token)] for token in tokens))
    assert compare_tokens(own, study).verdict == "reproduced"
    three = dataclasses.replace(own, inputs=(*own.inputs[:3], "other"))
    assert compare_tokens(three, study).verdict == "not reproduced"


def test_greedy_inputs_are_compared_without_spaces(study):
    (claim,) = (each for each in FEATURE_TOKENS if each.search == "greedy" and each.block == 1)
    search = study.greedy[0]
    texts = tuple("".join(search.strings[str(token)] for token in ids) for ids in search.ids[:, 0].tolist())
    assert compare_tokens(dataclasses.replace(claim, inputs=texts), study).verdict == "reproduced"
    assert compare_tokens(claim, study).verdict == "not reproduced"


def test_what_is_not_there_or_not_said_is_not_judged(study):
    verdicts = {(c.search, c.block): compare_tokens(c, study) for c in FEATURE_TOKENS if "gpt2" in c.models}
    # the tiny model has two blocks
    assert verdicts["complete", 8].verdict == verdicts["greedy", 12].verdict == "not judged"
    assert verdicts["complete", 8].measured == "nothing"
    assert verdicts["softmax", 1].verdict == "not reproduced"
    assert verdicts["l1", 1].verdict == verdicts["cosine", 1].verdict == "not judged"
    assert verdicts["l1", 1].measured.endswith("from another start")


def test_alignment_claims_follow_the_shares(study):
    whole = study.complete["trained"]
    same = dataclasses.replace(whole, ids=whole.ids[:1].expand(2, -1, -1).clone())
    aligned, learned = feature_alignment(same), {**study.alignments, "trained": feature_alignment(same)}
    agreeing = dataclasses.replace(study, alignments=learned)
    assert aligned.share().value == 1
    for what in ("layers_agree", "layers_agree_beyond_chance", "agreement_is_learned"):
        assert measured(what, agreeing)[1] == "reproduced"
    assert measured("layers_agree", agreeing)[0].startswith("1.000 (")
    random = dataclasses.replace(study, alignments={**study.alignments, "random": aligned})
    assert measured("untrained_layers_do_not", random)[1] == "not reproduced"
    assert measured("agreement_is_learned", random)[1] == "not reproduced"
    # no token is the best of feature m in one layer and of the same feature in the other
    apart = whole.ids.clone()
    apart[0], apart[1] = torch.arange(32)[:, None], torch.arange(32).roll(1)[:, None]
    alone = feature_alignment(dataclasses.replace(whole, ids=apart))
    none = dataclasses.replace(study, alignments={**study.alignments, "trained": alone, "random": alone})
    assert measured("layers_agree_beyond_chance", none)[1] == "not reproduced"
    assert measured("untrained_layers_do_not", none)[1] == "reproduced"
    # in the first layer each id is its feature's number; what gradients decode is judged
    assert "complete search 0.5000" in measured("id_is_number", none)[0]
    numbers = dataclasses.replace(
        study, descents=tuple(decoding(each, int(each.selected[0, 1])) for each in study.descents)
    )
    assert measured("id_is_number", numbers)[1] == "reproduced"
    others = dataclasses.replace(study, descents=tuple(decoding(each, 63) for each in study.descents))
    assert measured("id_is_number", others)[1] == "not reproduced"


def test_one_layer_agrees_with_none(study):
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
    assert measured("alone_as_the_first", alone)[1] == "not judged"
    for what in ("layers_agree", "layers_agree_beyond_chance", "agreement_is_learned"):
        assert measured(what, alone)[1] == "not judged"
    assert measured("later_tokens_agree_less", alone)[1] == "not judged"


def test_gradient_claims_count(study):
    table = study.to_features()
    trained = study.complete["trained"]
    assert table.best_token.tolist() == [trained.strings[str(int(i))] for i in trained.ids[0, :4, 0]]
    assert table.optimum.tolist() == trained.activations[0, :4, 0].tolist()
    differ = sum(
        decoded(each) != int(best) for each, best in zip(study.descents, trained.ids[0, :4, 0], strict=True)
    )
    near = int((table.share_of_optimum >= 0.95).sum())
    text, verdict = measured("gradient_differs", study)
    assert text.startswith(f"{differ} of 4 ")
    assert f"by default {near} of 4 reach 95%" in text
    assert verdict == ("reproduced" if differ >= 2 else "not reproduced")
    assert measured("last_is_sum", study) == ("8 of 8 (0.63 to 1.00)", "reproduced")
    other = dataclasses.replace(study.summed[0], ids=study.summed[0].ids + 1)
    wrong = dataclasses.replace(study, summed=(other, *study.summed[1:]))
    assert measured("last_is_sum", wrong)[1] == "not reproduced"


def test_a_descent_is_decoded_by_the_pseudo_inverse(study):
    E = tiny_hf_model("gpt2").get_input_embeddings().weight.detach().double()
    for each in study.descents:
        expected = int((each.embeddings[0, 0].double() @ torch.linalg.pinv(E)).argmax())
        assert decoded(each) == expected


def test_later_tokens(study):
    one = study.greedy[0]
    # of two layers: all first tokens agree, no later one does
    ids = one.ids.clone()
    ids[..., 1:] += 1
    agree = dataclasses.replace(study, greedy=(one, dataclasses.replace(one, ids=ids)))
    assert measured("later_tokens_agree_less", agree) == ("first token 1.000, later ones 0.000", "reproduced")
    same = dataclasses.replace(study, greedy=(one, one))
    assert measured("later_tokens_agree_less", same)[1] == "not reproduced"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [0]), (4, [0, 1, 2, 3]), (12, [0, 3, 7, 11]), (32, [0, 10, 20, 31])],
)
def test_some_layers(layers, expected, study):
    search = dataclasses.replace(study.complete["trained"], layers=tuple(range(layers)))
    assert some_layers(search) == expected


def test_real_contexts_are_searched_in_a_corpus(tiny_directories):
    model = load_model(tiny_directories / "llama", processing=False)
    texts = ["the cat sat on the mat and the dog sat on the log " * 30]
    found = reproduce_feature_search(model, n_features=1, n_tokens=1, corpus=texts, limit=3)
    assert found.examples is not None
    assert found.examples.read == 3
    assert found.examples.layers == (0, 1)
    assert "examples" in found.results
    # nothing of the post's tables is of this model
    assert len(found.comparisons) == len(FEATURES)


def test_another_model_of_the_same_name_is_not_judged_by_the_tables(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    found = reproduce_feature_search(model, n_features=1, n_tokens=1)
    assert len(found.comparisons) == len(FEATURES)


def test_what_cannot_be_is_said_before_the_work(tiny_directories, monkeypatch):
    model = load_model(tiny_directories / "gpt2", processing=False)
    monkeypatch.setattr(feature_search, "search_complete", None)
    with pytest.raises(ValueError, match="40 tokens do not fit into the model's context of 32"):
        reproduce_feature_search(model, n_tokens=40)
    with pytest.raises(ValueError, match="is no file or folder"):
        reproduce_feature_search(model, corpus="nope")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        reproduce_feature_search(model, corpus=["a b c"], limit=0)


def test_it_is_saved_whole(study, tmp_path):
    written = study.save(tmp_path)
    names = {path.name for path in written}
    assert {"comparison.csv", "complete_trained.safetensors", "alignment_trained_random.csv"} <= names
    assert load(tmp_path / "complete_embeddings.safetensors") == study.complete["embeddings"]
    assert study.complete["embeddings"].model.name.endswith("seed 0, trained embeddings)")


def test_bad_input(tiny_directories):
    with pytest.raises(ValueError, match="processing=False"):
        reproduce_feature_search(load_model(tiny_directories / "gpt2"))
    model = load_model(tiny_directories / "gpt2", processing=False)
    with pytest.raises(ValueError, match="n_features must be at least 1, but is 0"):
        reproduce_feature_search(model, n_features=0)


def test_a_share_of_nothing_is_undefined():
    from mechlens.studies.feature_search import share_of

    assert share_of(3.0, 4.0) == 0.75
    assert math.isnan(share_of(-2.0, -1.0))
