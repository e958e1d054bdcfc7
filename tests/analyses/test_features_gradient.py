"""Gradient search compared with plain gradient descent on Hugging Face's models."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
import transformers as hf

from mechlens.analyses.features import (
    Continue,
    Features,
    Match,
    Maximize,
    Optimizer,
    Prior,
    objectives,
    optimization,
    search_exhaustive,
    search_gradient,
)
from mechlens.models.load.loading import load_model
from mechlens.models.run import from_embeddings
from mechlens.models.run.from_embeddings import run_embedded, token_embeddings
from mechlens.results import checkpoint
from mechlens.text.tokens import drawable_tokens
from tests.close import assert_close, assert_same
from tests.reference import features as reference
from tests.tiny_models import VOCAB, tiny_hf_model, write_model_of

KINDS = ("gpt2", "gpt_neox", "llama")
WIDTH = 32
# sums in a different order: a few rounding errors of activations around 10
CLOSE = {"atol": 2e-4, "rtol": 1e-5}
FEW = {"steps": 5, "restarts": 3}


@pytest.fixture(scope="module")
def loaded(tiny_directories):
    models = {kind: load_model(tiny_directories / kind, processing=False) for kind in KINDS}
    return models.__getitem__


def search(model, *, n_tokens, layer=None, selection=None, objective="constant", target=None, **asked):
    """`search_gradient` with the fields of its argument objects as keywords."""
    about = {name: asked.pop(name) for name in ("site", "directions") if name in asked}
    features = Features(layer, **about)
    read = {name: asked.pop(name) for name in ("isolated",) if name in asked} | {"at": selection}
    if objective == "continuation":
        asked.pop("constant", None)
        stated = Continue(target)
    elif objective in objectives.DISTANCES:
        asked.pop("constant", None)
        stated = Match(features, target, objective, **read)
    else:
        more = {name: asked.pop(name) for name in ("constant", "optimum") if name in asked}
        if objective != "constant":
            more.pop("constant", None)
        stated = Maximize(features, how=objective, **read, **more)
    names = ("learning_rate", "steps", "patience", "restarts")
    how = {name: asked.pop(name) for name in names if name in asked}
    optimizer = Optimizer(asked.pop("optimizer", "Adam"), **how)
    weight = asked.pop("prior_weight", None)
    prior = asked.pop("prior", None)
    prior = None if prior in (None, "none") else Prior(prior, weight)
    return search_gradient(model, stated, n_tokens=n_tokens, optimizer=optimizer, prior=prior, **asked)


def first_tokens(model, restarts, n_tokens, seed):
    """The initial tokens of each restart."""
    ids = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    draw = torch.Generator().manual_seed(seed)
    first = ids[torch.randint(len(ids), (restarts, n_tokens), generator=draw)]
    special = sorted(set(model.tokenizer.all_special_ids))
    for row, token in enumerate(special[: restarts // 2]):
        first[row] = token
    return first


def hf_embeddings(hf_model):
    return hf_model.get_input_embeddings().weight.detach()


def nearest_token(embedded, E):
    return torch.nn.functional.cosine_similarity(embedded[..., None, :], E, dim=-1).argmax(-1)


# -- running embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
@pytest.mark.parametrize("alone", [None, 1])
def test_real_embeddings_run_like_their_tokens(kind, alone, loaded, tiny_directories):
    model = load_model(tiny_directories / kind, processing=False) if kind == "gemma2" else loaded(kind)
    tokens = torch.tensor([[7, 8, 9, 10], [7, 30, 40, 11]])
    E = token_embeddings(model)
    name = "blocks.1.hook_resid_post"
    # the last token is read; earlier tokens and the prefix are not replaced
    found = run_embedded(model, torch.tensor([7, 0, 0, 10]), E[tokens[:1, 1:3]], 1, name, alone=alone)
    hf_model = tiny_hf_model(kind)
    if alone is not None:
        hf_model = reference.only_block(hf_model, alone)
    expected = reference.hf_block_output(hf_model, 1 if alone is None else 0)(tokens[:1])
    torch.testing.assert_close(found, expected, **CLOSE)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [(), (0,), (4, 9)])
@pytest.mark.filterwarnings("ignore:row 0 of the prompt begins with:UserWarning")
def test_padding_tokens_are_run_like_any_other(kind, prefix, tiny_directories):
    model = load_model(tiny_directories / kind, processing=False)
    # HookedTransformer would mask the padding token, here 0, at the start of a run
    other = load_model(tiny_directories / kind, processing=False)
    model.tokenizer.padding_side, other.tokenizer.padding_side = "left", "right"
    name, begin = "blocks.1.hook_resid_post", torch.tensor(prefix, dtype=torch.long)
    asked = {"layer": 1, "selection": np.s_[-1, 3], "n_tokens": 2, "steps": 3, "restarts": 6}

    def own(ids):
        rows = torch.cat([begin.expand(len(ids), -1), ids], dim=1)
        return other.run_with_cache(rows, names_filter=lambda each: each == name)[1][name].detach()

    result = search(model, prefix=begin, **asked)
    for way, ids in result.ids.items():
        torch.testing.assert_close(result.true_activations[way], own(ids)[:, -1, 3], **CLOSE)
        torch.testing.assert_close(result.selected_activations[way], own(ids)[:, -1, 3:4], **CLOSE)
    # the first restart has padding tokens, and so may a target
    target = torch.tensor([0, 0])
    result = search(model, prefix=begin, objective="l1", target=target, **asked)
    wanted = own(target[None])[0, -1, 3]
    for way, ids in result.ids.items():
        off = (own(ids)[:, -1, 3] - wanted).abs()
        torch.testing.assert_close(result.true_objectives[way], off, **CLOSE)


# -- the descent -----------------------------------------------------------------------------------

SELECTIONS = {
    "one": (np.s_[2, 7], [(2, 7)]),
    "all_positions": (np.s_[:, 7], [(0, 7), (1, 7), (2, 7)]),
    "some_features": (np.s_[1, 0:3], [(1, 0), (1, 1), (1, 2)]),
    "a_list": (([0, 2], [5, 6]), [(0, 5), (2, 6)]),
    "tensors": ((torch.tensor([0, 2]), torch.tensor([5, 6])), [(0, 5), (2, 6)]),
    "backwards": (np.s_[::-1, 3], [(2, 3), (1, 3), (0, 3)]),
    "features_backwards": (np.s_[1, 5:2:-1], [(1, 5), (1, 4), (1, 3)]),
    "lists_of_lists": (([[0], [2]], [[5, 6]]), [(0, 5), (0, 6), (2, 5), (2, 6)]),
    "from_the_end": (np.s_[..., -1], [(0, 31), (1, 31), (2, 31)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_three_steps_match_the_published_loop(kind, selection, loaded):
    model, hf_model = loaded(kind), tiny_hf_model(kind)
    index, pairs = SELECTIONS[selection]
    E, rate = hf_embeddings(hf_model), 0.05
    pos, feature = torch.tensor(pairs).T

    def loss_of(embedded):
        own = reference.embedded_output(hf_model, 1, embedded, (4, 9))[:, pos, feature]
        return (1000.0 - own).abs().mean(-1)

    start = E[first_tokens(model, 3, 3, seed=5)]
    losses, _ = reference.descend(loss_of, start, rate * float(E.square().mean().sqrt()), 4)
    result = search(
        model,
        layer=1,
        selection=index,
        n_tokens=3,
        prefix=torch.tensor([4, 9]),
        optimizer="SGD",
        learning_rate=rate,
        steps=3,
        restarts=3,
        seed=5,
    )
    assert result.selected.tolist() == [list(pair) for pair in pairs]
    torch.testing.assert_close(result.objectives, losses, **CLOSE)
    torch.testing.assert_close(result.activations, 1000 - losses, **CLOSE)
    assert not torch.allclose(losses[:, 0], losses[:, 3], atol=0.1), "the steps must move something"


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_after_each_step_matches_the_published_loop(kind, loaded):
    model, hf_model = loaded(kind), tiny_hf_model(kind)
    E = hf_embeddings(hf_model)

    def loss_of(chances):
        return -reference.embedded_output(hf_model, 0, chances @ E)[:, 1, 3]

    draw = torch.Generator().manual_seed(2)
    start = torch.randn(2, 2, VOCAB, generator=draw).softmax(-1)
    passed = [start]

    def after(value):
        passed.append(value.softmax(-1))
        return passed[-1]

    losses, _ = reference.descend(loss_of, start, 3.0, 5, after)
    result = search(
        model,
        layer=0,
        selection=np.s_[1, 3],
        n_tokens=2,
        objective="mean",
        prior="softmax",
        optimizer="SGD",
        learning_rate=3.0,
        steps=4,
        restarts=2,
        seed=2,
    )
    torch.testing.assert_close(result.objectives, losses, **CLOSE)
    # a distribution determines its token
    best = torch.stack([passed[step][row] for row, step in enumerate(losses.argmin(1).tolist())])
    torch.testing.assert_close(result.embeddings, best @ E, **CLOSE)
    assert torch.equal(result.decoded_ids["pinv"], best.argmax(-1))
    assert torch.equal(result.decoded_ids["nearest"], nearest_token(best @ E, E))


@pytest.mark.parametrize("kind", KINDS)
def test_each_objective_is_as_documented(kind, loaded):
    model, hf_model = loaded(kind), tiny_hf_model(kind)
    first, target, layer = first_tokens(model, 3, 2, seed=0), torch.tensor([20, 33]), 1
    output = reference.hf_block_output(hf_model, layer)
    own, wanted = output(first)[:, :, 4:9].flatten(1), output(target[None])[:, :, 4:9].flatten(1)
    with torch.no_grad():
        longer = torch.cat([first, target.expand(3, -1)], dim=1)
        log_probs = hf_model(longer).logits.log_softmax(-1)[:, 1:3]
    follows = log_probs.gather(-1, target.expand(3, -1)[..., None])[..., 0].sum(-1)
    expected = {
        "constant": (50.0 - own).abs().mean(-1),
        "mean": -own.mean(-1),
        "min": -own.amin(-1),
        "l1": (own - wanted).abs().mean(-1),
        "cosine": 1 - (own * wanted).sum(-1) / own.norm(dim=-1) / wanted.norm(),
        "continuation": -follows,
    }
    assert set(expected) == {*objectives.HOW, *objectives.DISTANCES, "continuation"}
    for objective, values in expected.items():
        result = search(
            model,
            layer=None if objective == "continuation" else layer,
            selection=None if objective == "continuation" else np.s_[:, 4:9],
            n_tokens=2,
            objective=objective,
            target=target if objective in ("l1", "cosine", "continuation") else None,
            constant=50.0,
            steps=4,
            restarts=3,
        )
        torch.testing.assert_close(result.objectives[:, 0], values, **CLOSE)
        # it improves each restart
        assert bool((result.objectives.amin(1) < result.objectives[:, 0]).all())


@pytest.mark.parametrize("kind", ["gemma2", "gptj"])
def test_a_continuation_uses_the_complete_unembedding(kind, tiny_directories, tmp_path):
    """Including a soft-cap and an unembedding bias."""
    directory = tmp_path / kind if kind == "gptj" else tiny_directories / kind
    if kind == "gptj":
        sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "rotary_dim": 4}
        config = hf.GPTJConfig(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes)
        hf_model = write_model_of(directory, config)
        with torch.no_grad():
            hf_model.lm_head.bias.copy_(torch.linspace(-2, 2, VOCAB))
        hf_model.save_pretrained(directory)
    else:
        hf_model = tiny_hf_model(kind)
    model, target = load_model(directory, processing=False), torch.tensor([20, 33])
    asked = {"n_tokens": 2, "objective": "continuation", "target": target, "steps": 2, "restarts": 3}
    result = search(model, **asked)
    for way, ids in result.ids.items():
        with torch.no_grad():
            rows = torch.cat([ids, target.expand(len(ids), -1)], dim=1)
            log_probs = hf_model(rows).logits.log_softmax(-1)[:, 1:3]
        follows = log_probs.gather(-1, target.expand(len(ids), -1)[..., None])[..., 0].sum(-1)
        torch.testing.assert_close(result.true_objectives[way], -follows, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isolated", [False, True])
def test_decoded_tokens_are_run(kind, isolated, loaded):
    model, hf_model = loaded(kind), tiny_hf_model(kind)
    E = hf_embeddings(hf_model)
    result = search(
        model,
        layer=1,
        selection=np.s_[-1, 9],
        n_tokens=3,
        objective="mean",
        isolated=isolated,
        prefix=torch.tensor([6]),
        steps=15,
        restarts=3,
        learning_rate=0.3,
    )
    if isolated:
        hf_model = reference.only_block(hf_model, 1)
    output = reference.hf_block_output(hf_model, 0 if isolated else 1)
    for way in ("pinv", "nearest"):
        rows = torch.cat([torch.full((3, 1), 6), result.ids[way]], dim=1)
        own = output(rows)[:, -1, 9]
        torch.testing.assert_close(result.true_activations[way], own, **CLOSE)
        torch.testing.assert_close(result.true_objectives[way], -own, **CLOSE)
        # better tokens than the initial ones were found and kept
        assert not torch.equal(result.ids[way], first_tokens(model, 3, 3, seed=0))
    unit = torch.nn.functional.normalize
    cosines = unit(result.embeddings, dim=-1) @ unit(E, dim=-1).T
    # products of 32 numbers up to 1
    torch.testing.assert_close(result.nearest_cosine, cosines.amax(-1), atol=1e-5, rtol=0)
    assert result.isolated is isolated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prior", "objective"), [("none", "mean"), ("norm", "mean"), ("none", "constant")])
def test_the_last_embeddings_are_decoded(kind, prior, objective, loaded):
    model, hf_model = loaded(kind), tiny_hf_model(kind)
    E = hf_embeddings(hf_model)
    options = {"layer": 1, "selection": np.s_[:, 9], "n_tokens": 3, "objective": objective, "prior": prior}
    # the search passes this constant, so the best embeddings are not the last
    options |= {"constant": 2.0, "steps": 12, "restarts": 6, "learning_rate": 0.3}
    result = search(model, **options)
    coefficients = result.embeddings.double() @ torch.linalg.pinv(E.double())
    decoded = {"pinv": coefficients.argmax(-1), "nearest": nearest_token(result.embeddings, E)}
    if objective == "mean":
        assert not torch.equal(decoded["pinv"], decoded["nearest"])
    else:
        assert int((result.objectives.argmin(1) < 12).sum()) >= 3
    output = reference.hf_block_output(hf_model, 1)
    for way, ids in decoded.items():
        assert torch.equal(result.decoded_ids[way], ids)
        own = output(ids)[..., 9]
        reached = -own.mean(-1) if objective == "mean" else (2.0 - own).abs().mean(-1)
        # up to rounding
        assert bool((reached > result.true_objectives[way] - 2e-4).all())
        if objective == "mean":
            assert not torch.equal(ids, result.ids[way]), "better tokens were passed on the way"
        assert set(map(str, ids.flatten().tolist())) <= set(result.strings)


def test_decoding(loaded):
    model = loaded("llama")
    E = token_embeddings(model)
    space = optimization.Space.of(E)
    some = torch.randn(4, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    # float64's pseudo-inverse, rounded once
    expected = (some.double() @ torch.linalg.pinv(E.double())).float()
    torch.testing.assert_close(space.coefficients(some), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(space.cosines(E).argmax(-1), torch.arange(VOCAB))
    cosines = torch.nn.functional.cosine_similarity(E[:, None], E[None], dim=-1) - 3 * torch.eye(VOCAB)
    assert space.between_tokens() == pytest.approx(float(cosines.amax(-1).mean()), abs=1e-5)


def test_decoding_with_an_ill_conditioned_embedding():
    draw = torch.Generator().manual_seed(3)
    ends, _ = torch.linalg.qr(torch.randn(200, WIDTH, generator=draw))
    turned, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw))
    # the Gram matrix's eigenvalues range from 1 to 1e-6, which float32 cannot tell from 0
    E = ends * torch.logspace(0, -3, WIDTH) @ turned
    some = torch.randn(5, WIDTH, generator=draw)
    expected = (some.double() @ torch.linalg.pinv(E.double())).float()
    found = optimization.Space.of(E).coefficients(some)
    # float32 products with an inverse of up to 1e6
    assert float((found - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_priors_keep_embeddings_near_real_ones(loaded):
    model = loaded("gpt2")
    options = {"layer": 1, "selection": np.s_[0, 3], "n_tokens": 1, "objective": "mean"}
    options |= {"steps": 15, "restarts": 4, "learning_rate": 0.3}
    free = search(model, **options)
    norm = search(model, prior="norm", prior_weight=1000.0, **options)
    near = search(model, prior="nearest", prior_weight=1000.0, **options)
    mean = float(token_embeddings(model).norm(dim=-1).mean())
    # within a thousandth of the objective's scale
    assert float((norm.embeddings.norm(dim=-1) / mean - 1).abs().max()) < 0.1
    assert float((free.embeddings.norm(dim=-1) / mean - 1).abs().max()) > 0.3
    assert float(near.nearest_cosine.min()) > 0.95 > float(free.nearest_cosine.min())


def test_default_settings_reach_the_optimum_on_the_bundled_model():
    model = load_model(processing=False)
    complete = search_exhaustive(model, Features([0, 1]))
    reached = missed = 0
    for feature in range(0, 192, 24):
        layer = int(feature % 48 == 24)
        result = search(model, layer=layer, selection=np.s_[0, feature], n_tokens=1, optimum=complete)
        best = float(complete.activations[layer, feature, 0])
        assert result.optimum == best
        assert result.below_optimum == best - result.best_activation()
        # no token exceeds the optimum, up to rounding
        assert result.below_optimum > -1e-3
        if result.best_activation() >= 0.95 * best:
            reached += 1
        else:
            missed += 1
        # decided, so stop: each search costs a second
        if reached == 7 or missed == 2:
            break
    assert reached == 7, "seven in eight features"


# -- progress of a search --------------------------------------------------------------------------


def test_a_seed_repeats_a_search(loaded):
    options = {"layer": 0, "selection": np.s_[:, 2], "n_tokens": 2} | FEW
    with torch.inference_mode():
        one = search(loaded("gpt2"), **options)
    assert_same(one, search(loaded("gpt2"), **options))
    other = search(loaded("gpt2"), seed=1, **options)
    assert not torch.equal(one.embeddings, other.embeddings)


def test_a_stalled_search_stops(loaded):
    options = {"layer": 0, "selection": np.s_[:, 2], "n_tokens": 1, "optimizer": "SGD", "restarts": 2}
    # steps too small to change a float32
    result = search(loaded("gpt2"), learning_rate=1e-12, steps=50, patience=4, **options)
    # the first check, four without progress, and the end
    assert result.objectives.shape[1] == 1 + 4 + 1


def test_restarts_run_in_parts_when_memory_runs_out(loaded, monkeypatch):
    options = {"layer": 1, "selection": np.s_[:, 2], "n_tokens": 2, "steps": 2, "restarts": 5}
    right, sizes, call = search(loaded("llama"), **options), [], objectives.Objective.__call__

    def short_of_memory(self, embedded):
        sizes.append(len(embedded))
        if len(embedded) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return call(self, embedded)

    monkeypatch.setattr(objectives.Objective, "__call__", short_of_memory)
    found = search(loaded("llama"), **options)
    # halves at first, and from then on as many as fitted
    assert sizes[:7] == [5, 2, 2, 1, 2, 2, 1]
    torch.testing.assert_close(found.objectives, right.objectives, **CLOSE)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_embeddings_are_looked_up_in_parts_when_memory_runs_out(kind, loaded, monkeypatch):
    right, watch, sizes = token_embeddings(loaded(kind)), from_embeddings.watch, []

    def short_of_memory(model, tokens, readers):
        sizes.append(len(tokens))
        if len(tokens) > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        watch(model, tokens, readers)

    monkeypatch.setattr(from_embeddings, "watch", short_of_memory)
    assert_close(token_embeddings(loaded(kind)), right)
    assert sizes == [64, 32, 16, 16, 16, 16]


# more than two lookups of tokens
WHOLE = {"layer": 1, "selection": np.s_[:, 2], "n_tokens": 2, "objective": "mean"}
WHOLE |= {"steps": 11, "restarts": 3, "learning_rate": 2.0}
WAYS = {optimizer: {"optimizer": optimizer} for optimizer in optimization.OPTIMIZERS}
WAYS |= {prior: {"prior": prior} for prior in optimization.PRIORS}
# the best step is not the last
WAYS["passed"] = {"objective": "constant", "constant": 2.0, "learning_rate": 0.3}
WAYS["continuation"] = {
    "objective": "continuation",
    "target": torch.tensor([20, 33]),
    "selection": None,
    "layer": None,
}


def noted_judge(monkeypatch, interrupt_at=None):
    """Records for each batch whether it makes a step or evaluates tokens.

    Evaluating tokens after the given step raises an interruption.
    """
    steps, call = [], objectives.Objective.__call__

    def noting(self, embedded):
        steps.append(embedded.requires_grad)
        if sum(steps) == interrupt_at and not steps[-1]:
            raise KeyboardInterrupt
        return call(self, embedded)

    monkeypatch.setattr(objectives.Objective, "__call__", noting)
    return steps


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_search_resumes(way, loaded, tmp_path, monkeypatch):
    model, file, options = loaded("gpt2"), tmp_path / "checkpoint.safetensors", WHOLE | WAYS[way]
    whole = search(model, **options)
    with monkeypatch.context() as patched:
        # the optimizer has made and recorded the 10th step
        noted_judge(patched, interrupt_at=10)
        with pytest.raises(KeyboardInterrupt):
            search(model, resume=file, **options)
    with monkeypatch.context() as patched:
        rest = noted_judge(patched)
        assert_same(search(model, resume=file, **options), whole)
        # the 10th step again, the 11th, and the end
        assert sum(rest) == 3
        rest.clear()
        assert_same(search(model, resume=file, **options), whole)
        assert sum(rest) == 1


def test_progress_is_saved_during_a_search(loaded, tmp_path, monkeypatch):
    steps, save = [], checkpoint.Checkpoint.save

    def noting(self):
        steps.append(self._state()[1])
        save(self)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", noting)
    search(loaded("gpt2"), resume=tmp_path / "checkpoint.safetensors", **GOOD)
    assert steps == [5]
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    search(loaded("gpt2"), resume=tmp_path / "other.safetensors", **GOOD)
    assert steps == [5, 1, 2, 3, 4, 5, 5]


def test_a_stalled_search_is_still_stalled_when_it_resumes(loaded, tmp_path, monkeypatch):
    options = {"layer": 0, "selection": np.s_[:, 2], "n_tokens": 1, "optimizer": "SGD", "restarts": 2}
    # steps too small to change a float32
    options |= {
        "learning_rate": 1e-12,
        "steps": 50,
        "patience": 7,
        "resume": tmp_path / "checkpoint.safetensors",
    }
    with monkeypatch.context() as patched:
        noted_judge(patched, interrupt_at=5)
        with pytest.raises(KeyboardInterrupt):
            search(loaded("gpt2"), **options)
    result = search(loaded("gpt2"), **options)
    assert result.objectives.shape[1] == 1 + 7 + 1


def test_another_search_is_refused_by_name(loaded, tmp_path, tiny_directories):
    file = tmp_path / "checkpoint.safetensors"
    asked = {"layer": 0, "selection": np.s_[:, 2], "n_tokens": 2, "resume": file} | FEW
    search(loaded("gpt2"), **asked)
    for change, message in (
        ({"layer": 1}, r"begun with layers \[0\], not \[1\]"),
        ({"selection": np.s_[:, 3]}, "begun with selection"),
        ({"n_tokens": 3}, "n_tokens 2, not 3"),
        ({"objective": "mean"}, "begun with objective 'constant', not 'mean'"),
        ({"objective": "l1", "target": torch.tensor([3, 4])}, "target None, not '"),
        ({"constant": 10.0}, "begun with constant 1000.0, not 10.0"),
        ({"prior": "norm"}, "begun with prior None, not 'norm', prior_weight None, not 1.0"),
        ({"prior": "softmax"}, "begun with prior None, not 'softmax':"),
        ({"optimizer": "SGD"}, "begun with optimizer 'Adam', not 'SGD'"),
        ({"learning_rate": 0.2}, "begun with learning_rate 0.1, not 0.2"),
        ({"steps": 6}, "begun with steps 5, not 6"),
        ({"patience": 9}, "begun with patience 10, not 9"),
        ({"restarts": 4}, "begun with restarts 3, not 4"),
        ({"seed": 1}, "begun with seed 0, not 1"),
        ({"isolated": True}, "begun with isolated False, not True"),
        ({"prefix": torch.tensor([3])}, "begun with prefix"),
        ({"site": "mlp_out"}, "begun with site 'resid_post', not 'mlp_out'"),
        ({"directions": torch.eye(WIDTH)}, "begun with site 'resid_post', not 'direction', directions"),
    ):
        with pytest.raises(ValueError, match=message):
            search(loaded("gpt2"), **(asked | change))
    with pytest.raises(ValueError, match="begun with model's "):
        search(loaded("llama"), **asked)
    other = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        # the same numbers for other tokens
        other.W_E[1:] = other.W_E[1:].flip(0)
    with pytest.raises(ValueError, match="begun with other weights"):
        search(other, **asked)
    asked["resume"] = tmp_path / "complete.safetensors"
    search_exhaustive(loaded("gpt2"), resume=asked["resume"])
    with pytest.raises(ValueError, match="is not a checkpoint of a gradient search"):
        search(loaded("gpt2"), **asked)


def test_the_checkpoint_covers_all_weights_that_the_search_reads(loaded, tmp_path, tiny_directories):
    file = tmp_path / "checkpoint.safetensors"
    asked = {"n_tokens": 2, "objective": "continuation", "target": torch.tensor([5])} | FEW
    search(loaded("gpt2"), resume=file, **asked)
    other = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        other.blocks[1].mlp.W_out.mul_(1.5)
    with pytest.raises(ValueError, match="begun with other weights"):
        search(other, resume=file, **asked)


def test_the_constant_exceeds_all_activations(tiny_directories):
    # as in GPT-2, some of whose features are in the thousands at the first position
    model = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        b_out = model.blocks[1].mlp.b_out
        b_out[3] += 3000
    complete = search_exhaustive(model, Features([1], [3]))
    found = search(model, layer=1, selection=np.s_[:, 3], n_tokens=1, optimum=complete)
    assert found.constant is not None
    assert found.constant > 10 * 2990
    # float32 rounding at 3000, in a different batch
    assert found.best_activation() == pytest.approx(found.optimum, abs=2e-3)
    # a given constant is used unchanged: larger activations shrink
    low = search(model, layer=1, selection=np.s_[:, 3], n_tokens=1, constant=1000.0)
    assert low.best_activation() == pytest.approx(float(complete.lowest_activations[0, 0, 0]), abs=2e-3)


def test_the_constant_depends_on_size_not_sign(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        b_out = model.blocks[1].mlp.b_out
        b_out[3] -= 3000
    found = search(model, layer=1, selection=np.s_[:, 3], n_tokens=1, **FEW)
    assert found.constant is not None
    assert found.constant > 10 * 2990


@pytest.mark.parametrize("kind", KINDS)
def test_each_selected_activation_is_reported(kind, loaded):
    """Those of the best tokens, for the minimum over two features and for their mean."""
    model, chosen = loaded(kind), np.s_[:, [3, 9]]
    output = reference.hf_block_output(tiny_hf_model(kind), 1)
    every = torch.arange(64)[:, None]
    own = output(every)[:, 0][:, [3, 9]]
    for objective, worth in (("mean", own.mean(-1)), ("min", own.amin(-1))):
        found = search(model, layer=1, selection=chosen, n_tokens=1, objective=objective, restarts=64, seed=1)
        for way, ids in found.ids.items():
            torch.testing.assert_close(found.selected_activations[way], own[ids[:, 0]], **CLOSE)
        best = int(worth.argmax())
        assert found.best_ids().tolist() == [best]
        torch.testing.assert_close(found.best_activations(), own[best], **CLOSE)
        assert found.best_activation() == pytest.approx(float(own[best].mean()), abs=1e-4)
        # the table's first row has the best tokens
        smallest = found.to_dataframe()["smallest_activation"][0]
        assert smallest == pytest.approx(float(own[best].amin()), abs=1e-4)


def test_a_continuation_needs_no_layer(loaded):
    asked = {"n_tokens": 2, "objective": "continuation", "target": torch.tensor([5])} | FEW
    found = search(loaded("gpt2"), **asked)
    assert found.best_activations().tolist() == []
    assert found.best_objective() == min(float(each.min()) for each in found.true_objectives.values())


def test_broken_weights_are_refused(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        model.blocks[0].mlp.W_out[:] = torch.nan
    with pytest.raises(ValueError, match="the model's activations are nan"):
        search(model, **GOOD)


GOOD = {"layer": 0, "selection": np.s_[0, 0], "n_tokens": 1} | FEW


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": np.s_[0, WIDTH]}, r"must be an index of \[1 positions, 32 features\]"),
        ({"selection": np.s_[1:, 0]}, "selects nothing: there are 1 positions and 32 features"),
        ({"selection": "all"}, "must be an index of"),
        ({"selection": 0.5}, "must be an index of"),
        ({"selection": np.s_[0, 0, 0]}, "must be an index of"),
        ({"selection": torch.tensor([0.5])}, "must be an index of"),
        ({"selection": [[0, 0], [0]]}, "must be an index of"),
        ({"layer": 2}, "layer 2 is out of range"),
        ({"layer": [0, 1]}, r"layers must be a single layer for this search, got \[0, 1\]"),
        ({"objective": "largest"}, "how must be one of constant, mean, min, got 'largest'"),
        ({"prior": "bayes"}, "prior must be one of softmax, norm, nearest, got 'bayes'"),
        ({"prior": "softmax", "prior_weight": 1.0}, "weight must be None with the prior softmax, got 1.0"),
        ({"prior": "norm", "prior_weight": -1.0}, "weight must be at least 0, got -1"),
        ({"optimizer": "LBFGS"}, "optimizer must be one of"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and at most 1e.06, got 0.0"),
        ({"learning_rate": 1e300}, "learning_rate must be above 0"),
        ({"objective": "l1", "target": torch.tensor([3, 4])}, "as many tokens as are searched, 1, got 2"),
        ({"objective": "cosine", "target": torch.tensor([3])}, "the cosine of a single number is 1 or -1"),
        ({"objective": "continuation", "target": torch.tensor([64])}, "token id 64 is not in"),
        ({"constant": math.nan}, "constant must be a finite number, got nan"),
        ({"seed": 2**70}, r"seed must be below 2\*\*64, got 1180591620717411303424"),
        ({"n_tokens": 33}, "33 tokens, 33 of them searched, do not fit"),
    ],
)
def test_invalid_arguments_are_refused_by_name(loaded, options, message):
    with pytest.raises(ValueError, match=message):
        search(loaded("gpt2"), **(GOOD | options))


def test_an_unused_constant_is_refused():
    with pytest.raises(ValueError, match=r"constant must be None with how='mean', got 5.0"):
        Maximize(Features(0), how="mean", constant=5.0)


def test_values_of_wrong_types_are_refused(loaded):
    """Without the tests' type checker, which would refuse them first."""
    made = lambda cls, *given, **named: inspect.unwrap(cls.__init__)(object.__new__(cls), *given, **named)  # noqa: E731
    for make, message in (
        (lambda: made(Optimizer, learning_rate="x"), "learning_rate must be a number, got 'x'"),
        (lambda: made(Optimizer, steps=True), "steps must be an integer, got True"),
        (lambda: made(Prior, "norm", "a"), "weight must be a number, got 'a'"),
        (lambda: made(Maximize, Features(0), constant="5"), "constant must be a number, got '5'"),
        (lambda: made(Maximize, Features(0), isolated="no"), "isolated must be a bool"),
        (lambda: made(Features, 0, directions=torch.ones(1, WIDTH) * 1j), "must be real numbers, got"),
    ):
        with pytest.raises(TypeError, match=message):
            make()


def test_an_optimum_of_another_search_is_refused(loaded):
    model = loaded("gpt2")
    best = search_exhaustive(model, Features([1], [3]))
    at = {"layer": 1, "selection": np.s_[0, 3]}
    for options, message in (
        ({"layer": 0}, "with another layer"),
        ({"selection": np.s_[0, 4]}, "with another feature"),
        ({"prefix": torch.tensor([3])}, "with another prefix"),
        ({"site": "mlp_out"}, "with another site"),
        ({"selection": np.s_[:, 3], "n_tokens": 2}, "the search is for 2 activations of 2 tokens"),
        ({"isolated": True}, "but isolated is True: leave optimum out"),
        ({"constant": -50.0}, "is above the constant -50: leave optimum out"),
        ({"objective": "min"}, r"how='min'\): leave optimum out"),
    ):
        with pytest.raises(ValueError, match=message):
            search(model, optimum=best, **(GOOD | at | options))
    with pytest.raises(ValueError, match="with another model"):
        search(loaded("llama"), optimum=best, **(GOOD | at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimum_of_other_weights_is_refused(dtype, tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False, dtype=dtype)
    complete = search_exhaustive(model, Features([0, 1]))
    # unchanged, each belongs to this model
    for layer, feature in ((0, 0), (0, 9), (1, 3), (1, 31)):
        asked = {"layer": layer, "selection": np.s_[0, feature], "n_tokens": 1, "optimum": complete} | FEW
        search(model, **asked)
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(1.5)
    with pytest.raises(ValueError, match="optimum is from other weights: its best token has"):
        search(model, **asked)


def test_processed_weights_are_refused(tiny_bos_model):
    with pytest.raises(ValueError, match="processing changes the basis"):
        search(tiny_bos_model, **GOOD)
