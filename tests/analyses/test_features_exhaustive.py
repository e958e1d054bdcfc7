"""Exhaustive search compared with the published loop on Hugging Face's models, and with single runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mechlens.analyses.features import Features, Prefix, exhaustive, search_exhaustive
from mechlens.models.load.loading import load_model
from mechlens.models.run import next_token_scan as runs
from tests.close import assert_close, assert_same
from tests.counting import positions_run
from tests.reference import features as reference
from tests.shared import STORIES, needs_shared
from tests.tiny_models import VOCAB, tiny_hf_model, write_toy

KINDS = ("gpt2", "gpt_neox", "llama", "gemma2")
LAYERS, WIDTH = 2, 32
# sums in a different order: a few rounding errors of activations around 10
CLOSE = {"atol": 2e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def loaded(tiny_directories):
    models = {}

    def load(kind, **options):
        key = (kind, *options.items())
        if key not in models:
            models[key] = load_model(tiny_directories / kind, **({"processing": False} | options))
        return models[key]

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_every_feature_of_every_layer_matches_the_published_loop(kind, loaded):
    result = search_exhaustive(loaded(kind), batch_size=9)
    hf_model = tiny_hf_model(kind)
    for layer in range(LAYERS):
        output = reference.hf_block_output(hf_model, layer)
        tokens = [reference.search_maximal(output, VOCAB, 1, m, batch_size=20)[0] for m in range(WIDTH)]
        assert result.ids[layer, :, 0].tolist() == tokens
        own = output(torch.arange(VOCAB)[:, None])[:, 0]
        torch.testing.assert_close(result.activations[layer, :, 0], own.amax(0), **CLOSE)
        torch.testing.assert_close(result.lowest_activations[layer, :, 0], own.amin(0), **CLOSE)
        assert result.lowest_ids[layer, :, 0].tolist() == own.argmin(0).tolist()
    assert result.prepend_bos is False
    assert len(result.prefix) == 0


SITES = {
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "post": "blocks.{}.mlp.hook_post",
}


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("prefix", [(), (5, 9, 7)])
def test_each_site_and_both_ends(kind, site, prefix, loaded):
    model, features = loaded(kind), [3, 0, 17]
    given = torch.tensor(prefix) if prefix else None
    result = search_exhaustive(
        model, Features([1], features, site=site), top_k=4, batch_size=10, prefix=given
    )
    name = SITES[site].format(1)
    values = reference.by_hand(model, [name], prefix)[name][:, features].T
    for end, ids, activations in (
        (True, result.ids, result.activations),
        (False, result.lowest_ids, result.lowest_activations),
    ):
        ordered, tokens = values.sort(-1, descending=end)
        assert ids[0].tolist() == tokens[:, :4].tolist()
        torch.testing.assert_close(activations[0], ordered[:, :4], **CLOSE)
    assert result.prefix.tolist() == list(prefix)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bos_comes_first(kind, loaded):
    model = loaded(kind)
    result = search_exhaustive(model, Features([0], [2]), prefix=Prefix("ab", prepend_bos=True))
    tokens = model.tokenizer("ab")["input_ids"]
    bos = model.tokenizer.bos_token_id
    prefix = [bos, *(token for token in tokens if token != bos)]
    assert result.prefix.tolist() == prefix
    assert result.prepend_bos
    name = "blocks.0.hook_resid_post"
    values = reference.by_hand(model, [name], prefix)[name][:, 2]
    assert int(result.ids) == int(values.argmax())
    # it changes the result
    assert float(result.activations) != float(search_exhaustive(model, Features([0], [2])).activations)


def test_directions_of_the_stream(loaded):
    model = loaded("gpt2")
    vectors = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    result = search_exhaustive(model, Features(indices=[2, 0], directions=vectors))
    for layer in range(LAYERS):
        output = reference.hf_block_output(tiny_hf_model("gpt2"), layer)(torch.arange(VOCAB)[:, None])
        products = output[:, 0] @ vectors[[2, 0]].T
        assert result.ids[layer, :, 0].tolist() == products.argmax(0).tolist()
        torch.testing.assert_close(result.activations[layer, :, 0], products.amax(0), **CLOSE)
    assert result.site == "direction"
    unit = search_exhaustive(model, Features(directions=torch.eye(WIDTH)))
    torch.testing.assert_close(unit.activations, search_exhaustive(model).activations, **CLOSE)


def test_a_selection_of_layers_and_features_matches_the_full_search(loaded):
    model = loaded("llama")
    whole = search_exhaustive(model, top_k=2)
    some = search_exhaustive(model, Features([-1, 0], [5, -1]), top_k=2)
    assert some.layers == (1, 0)
    assert some.features == (5, WIDTH - 1)
    assert torch.equal(some.ids, whole.ids[[1, 0]][:, [5, WIDTH - 1]])
    # the same runs, read differently
    assert_close(some.activations, whole.activations[[1, 0]][:, [5, WIDTH - 1]])


def test_ties_go_to_the_smaller_id(loaded, tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        # one after the other, in different batches
        model.W_E[20:] = model.W_E[19].clone()
    result = search_exhaustive(model, top_k=VOCAB, batch_size=8)
    for ids in (*result.ids.flatten(0, 1), *result.lowest_ids.flatten(0, 1)):
        equal = [token for token in ids.tolist() if token >= 19]
        assert equal == list(range(19, VOCAB))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("prefix", [(), (7,), (4, 9)])
def test_a_padding_token_is_run_like_any_other(kind, prefix, tiny_directories):
    model = load_model(tiny_directories / kind, processing=False)
    # HookedTransformer would mask it at the start of a run
    model.tokenizer.padding_side, model.tokenizer.pad_token_id = "left", 7
    given = torch.tensor(prefix, dtype=torch.long)
    result = search_exhaustive(model, Features([1]), top_k=VOCAB, prefix=given)
    behind = torch.cat([given.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)
    rows = reference.hf_block_output(tiny_hf_model(kind), 1)(behind)[:, -1]
    torch.testing.assert_close(result.activations[0], rows.T.sort(-1, descending=True).values, **CLOSE)


# -- what is not computed --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_alone_needs_no_queries_and_later_layers_are_not_run(kind, loaded):
    model = loaded(kind)
    names = ["blocks.0.attn.hook_q", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    seen = positions_run(model, names, lambda: search_exhaustive(model, Features([0])))
    # first 4 tokens are tested, by full runs and by the shortcut
    assert seen == dict(zip(names, [4, 4 + 4 + VOCAB, 0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_run_once(kind, loaded):
    model, name = loaded(kind), "blocks.0.hook_resid_post"
    prefix = torch.arange(5, 15)
    seen = positions_run(model, [name], lambda: search_exhaustive(model, Features([0]), prefix=prefix))
    # the prefix, 4 test tokens in full runs and 4 with cached keys and values, and the vocabulary
    assert seen[name] <= 10 + 4 * 11 + 4 + VOCAB


@pytest.mark.parametrize("prefix", [None, torch.tensor([5, 9])])
def test_full_runs_are_made_where_the_shortcut_is_wrong(prefix, loaded, monkeypatch):
    model = loaded("gpt2")
    right = search_exhaustive(model, prefix=prefix)

    def wrong(model, layer):
        return torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH)

    def wrong_past(model, tokens, **options):
        return right_past(model, tokens + 1, **options)

    right_past = runs.CleanRun.of
    monkeypatch.setattr(runs, "_attention_of_one", wrong)
    monkeypatch.setattr(runs.CleanRun, "of", wrong_past)
    found = search_exhaustive(model, prefix=prefix)
    assert torch.equal(found.ids, right.ids)
    torch.testing.assert_close(found.activations, right.activations, **CLOSE)


def test_the_model_is_left_as_it_was(loaded, monkeypatch):
    model, tokens = loaded("gpt2"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(tokens)

    def broken(self, activation):
        raise ZeroDivisionError

    monkeypatch.setattr(exhaustive.FeatureSpec, "read", broken)
    with pytest.raises(ZeroDivisionError):
        search_exhaustive(model)
    assert all("forward" not in vars(block.attn) for block in model.blocks)
    with torch.no_grad():
        assert_close(model(tokens), before)


# -- memory, and interruptions ---------------------------------------------------------------------


def test_batches_are_halved_when_memory_runs_out(loaded, monkeypatch):
    model, sizes = loaded("gpt2"), []
    right = search_exhaustive(model, top_k=3)
    read = exhaustive.FeatureSpec.read

    def short_of_memory(self, activation):
        sizes.append(len(activation))
        # only in the second layer, after the first has been recorded
        if len(activation) > 10 and len(sizes) % 2 == 0:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return read(self, activation)

    monkeypatch.setattr(exhaustive.FeatureSpec, "read", short_of_memory)
    found = search_exhaustive(model, top_k=3, batch_size=40)
    assert sizes[:6] == [40, 40, 20, 20, 10, 10]
    assert torch.equal(found.ids, right.ids)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_test_of_a_long_prefix_is_halved_too(kind, loaded, monkeypatch):
    model, prefix = loaded(kind), torch.arange(5, 15)
    right, watch, sizes = search_exhaustive(model, prefix=prefix), runs.watch, []

    def short_of_memory(model, tokens, readers):
        # full runs of the prefix, except those that end at the embedding
        if "blocks.1.hook_resid_post" in readers:
            sizes.append(len(tokens))
            if len(tokens) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        watch(model, tokens, readers)

    monkeypatch.setattr(runs, "watch", short_of_memory)
    assert_same(search_exhaustive(model, prefix=prefix), right)
    # half, then a quarter, and one at a time from then on
    assert sizes == [4, 2, 1, 1, 1, 1]


def test_an_interrupted_search_resumes(loaded, tmp_path, monkeypatch):
    model, file = loaded("gpt2"), tmp_path / "checkpoint.safetensors"
    whole = search_exhaustive(model, top_k=3, batch_size=10)
    read, rows = exhaustive.FeatureSpec.read, []

    def interrupted(self, activation):
        rows.append(len(activation))
        if len(rows) == 6:
            raise KeyboardInterrupt
        return read(self, activation)

    monkeypatch.setattr(exhaustive.FeatureSpec, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search_exhaustive(model, top_k=3, batch_size=10, resume=file)
    # two batches finished both layers; the third had recorded the first
    assert sum(rows) == 60
    rest = []

    def counting(self, activation):
        rest.append(len(activation))
        return read(self, activation)

    monkeypatch.setattr(exhaustive.FeatureSpec, "read", counting)
    found = search_exhaustive(model, top_k=3, batch_size=10, resume=file)
    assert sum(rest) == 2 * (VOCAB - 20)
    assert_same(found, whole)
    rest.clear()
    assert_same(search_exhaustive(model, top_k=3, resume=file), whole)
    assert rest == []


def test_it_announces_how_long_it_will_take(loaded, tmp_path, monkeypatch, capsys):
    model = loaded("gpt2")
    file = tmp_path / "checkpoint.safetensors"
    # per block: query, key, value and output, two MLP matrices, and attention to one token
    d, mlp = model.cfg.d_model, model.cfg.d_mlp
    block = 2 * (4 * d * d + 2 * d * mlp + 2 * d)
    monkeypatch.setattr(exhaustive, "block_rate", lambda _: VOCAB * 2 * block / 90)
    search_exhaustive(model, Features([0, 1], [3]), resume=file, progress=True)
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"search: {VOCAB} tokens through 2 blocks for 1 features of 2 layers (")
    assert said.endswith(f"TFLOP), about 1.5 minutes; progress is saved to {file}")
    monkeypatch.setattr(exhaustive, "block_rate", lambda _: pytest.fail("nothing is measured for nobody"))
    search_exhaustive(model, Features([0], [3]), progress=False)
    assert capsys.readouterr().err == ""


def test_another_search_is_refused_by_name(loaded, tmp_path, tiny_directories):
    file = tmp_path / "checkpoint.safetensors"
    search_exhaustive(loaded("gpt2"), resume=file)
    for change, message in (
        ({"top_k": 2}, "begun with top_k 1, not 2"),
        ({"features": Features(0)}, r"begun with layers \[0, 1\], not \[0\]"),
        ({"features": Features(indices=[0])}, "begun with features"),
        ({"prefix": torch.tensor([3])}, "begun with prefix"),
        ({"features": Features(site="mlp_out")}, "begun with site 'resid_post'"),
    ):
        with pytest.raises(ValueError, match=message):
            search_exhaustive(loaded("gpt2"), resume=file, **change)
    other = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        # the same numbers for other tokens
        other.W_E[1:] = other.W_E[1:].flip(0)
    with pytest.raises(ValueError, match="begun with other weights"):
        search_exhaustive(other, resume=file)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gpt2", {"activation_function": "relu"}),
        ("gpt2", {"layer_norm_epsilon": 1e-6}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}),
        ("gemma2", {"sliding_window": 4}),
    ],
)
def test_a_checkpoint_of_other_settings_of_the_model_is_refused(kind, change, tiny_directories, tmp_path):
    here, file = tmp_path / kind, tmp_path / "checkpoint.safetensors"
    shutil.copytree(tiny_directories / kind, here)
    found = search_exhaustive(load_model(tiny_directories / kind, processing=False), resume=file)
    # a model of the same name in another place
    moved = load_model(here, processing=False)
    assert search_exhaustive(moved, resume=file) == found
    # earlier runs and requested hooks do not matter either
    moved(torch.tensor([[1, 2, 3]]))
    moved.cfg.use_attn_result = True
    assert search_exhaustive(moved, resume=file) == found
    config = json.loads((here / "config.json").read_text()) | change
    (here / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="begun with another configuration: use the same"):
        search_exhaustive(load_model(here, processing=False), resume=file)


def test_short_differences_are_named(loaded, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    search_exhaustive(loaded("gpt2"), Features(indices=[4]), resume=file)
    with pytest.raises(ValueError, match=r"begun with features \[4\], not \[5\]"):
        search_exhaustive(loaded("gpt2"), Features(indices=[5]), resume=file)
    with pytest.raises(ValueError, match=r"begun with features \[4\], not '32 of them \("):
        search_exhaustive(loaded("gpt2"), resume=file)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": Features([2])}, "layer 2 is out of range"),
        ({"features": Features(indices=[WIDTH])}, f"feature {WIDTH} is out of range"),
        ({"features": Features(indices=[])}, "no feature selected"),
        (
            {"features": Features(directions=torch.ones(2, 5))},
            r"directions must be \[direction, d_model\] with d_model 32",
        ),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 65}, "top_k must be at most 64, the size of the vocabulary, got 65"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"prefix": torch.ones(32, dtype=torch.long)}, "a prefix of 32 tokens leaves no room"),
        ({"prefix": torch.tensor([64])}, "token id 64 is not in the model's vocabulary of 64"),
        ({"prefix": torch.ones(2, 3, dtype=torch.long)}, "a prefix must be one sequence, got 2 sequences"),
    ],
)
def test_invalid_arguments_are_refused(loaded, options, message):
    with pytest.raises(ValueError, match=message):
        search_exhaustive(loaded("gpt2"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid_pre"}, "site must be one of resid_post, attn_out, mlp_out, post, got 'resid_pre'"),
        ({"directions": torch.ones(2, WIDTH), "site": "post"}, "directions are read from resid_post"),
        ({"directions": torch.full((1, WIDTH), torch.nan)}, "directions must be finite numbers"),
    ],
)
def test_features_are_checked_without_a_model(options, message):
    with pytest.raises(ValueError, match=message):
        Features(**options)


def test_an_empty_prefix_is_no_prefix(loaded):
    assert_same(search_exhaustive(loaded("gpt2"), prefix=""), search_exhaustive(loaded("gpt2")))


def test_processed_weights_are_refused_with_the_reason(loaded):
    with pytest.raises(ValueError, match=r"has processed weights, and processing changes the basis"):
        search_exhaustive(loaded("gpt2", processing=True))


def test_a_model_without_tokenizer_or_mlps_is_searched_where_possible(tmp_path):
    write_toy(tmp_path / "toy")
    model = load_model(tmp_path / "toy", processing=False)
    result = search_exhaustive(model, Features([1], [0, 1]))
    name = "blocks.1.hook_resid_post"
    values = reference.by_hand(model, [name])[name][:, [0, 1]].T
    assert result.ids[0, :, 0].tolist() == values.argmax(-1).tolist()
    assert result.strings[str(int(result.ids[0, 0, 0]))] == str(int(result.ids[0, 0, 0]))
    with pytest.raises(ValueError, match="no tokenizer: pass token ids"):
        search_exhaustive(model, prefix="a")
    with pytest.raises(ValueError, match="this model has no MLPs"):
        search_exhaustive(model, Features(site="post"))


def test_broken_weights_are_refused(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        model.W_E[7] = torch.nan
    with pytest.raises(ValueError, match=r"activations at blocks\.0\.hook_resid_post are nan"):
        search_exhaustive(model)


# -- a trained model -------------------------------------------------------------------------------


@needs_shared
def test_a_trained_llama_agrees_with_running_each_token_by_hand():
    model = load_model(STORIES, processing=False)
    result = search_exhaustive(model)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    for layer, rows in enumerate(reference.by_hand(model, names).values()):
        assert result.ids[layer, :, 0].tolist() == rows.argmax(0).tolist()
        torch.testing.assert_close(result.activations[layer, :, 0], rows.amax(0), **CLOSE)
