"""Circuits compared with full float64 matrices of Hugging Face's weights, and with running models."""

from __future__ import annotations

import dataclasses
import functools
import math

import jaxtyping
import numpy
import pytest
import torch
from transformers import Olmo2Config, Qwen3Config

from mechlens.analyses.circuits.composition import (
    composition_scores,
    k_composition_circuit,
    q_composition_circuit,
    v_composition_circuit,
)
from mechlens.analyses.circuits.ov import OV, full_OV
from mechlens.analyses.circuits.positional import positional_attention, positional_QK
from mechlens.analyses.circuits.qk import QK, full_QK
from mechlens.analyses.circuits.tokens import circuit_corner, largest_pairs, singular_tokens
from mechlens.models.load import engines
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import describe
from tests.close import assert_same
from tests.reference import circuits as reference
from tests.tiny_models import tiny_hf_model, write_model_of, write_tiny_model, write_toy

KINDS = ("gpt2", "gpt_neox", "llama", "gemma2", "toy")
EARLIER, LATER = (0, 1), (1, 2)
ROTARY = ("gpt_neox", "llama", "gemma2")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("circuits") / "toy"
    return directory, write_toy(directory)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Learned positions; partial rotary; grouped heads; norms after attention; no MLP."""
    return request.param


@pytest.fixture(scope="module")
def truth(kind, toys):
    if kind == "toy":
        return reference.of_toy(toys[1], 2)
    return reference.of_hf(tiny_hf_model(kind), kind)


@pytest.fixture(scope="module")
def loaded(tiny_directories, toys):
    """Each model, created once, whatever the order of the tests."""
    return functools.cache(
        lambda kind, processing: load_model(
            toys[0] if kind == "toy" else tiny_directories / kind, processing=processing
        )
    )


@pytest.fixture(scope="module", params=[True, False], ids=["processed", "raw"])
def model(request, kind, loaded):
    return loaded(kind, request.param)


@pytest.fixture(scope="module")
def at(kind):
    """Arguments that a model's QK circuits need."""
    return {"relative_position": 3} if kind in ROTARY else {}


@pytest.fixture(scope="module")
def gpt2(loaded):
    return loaded("gpt2", True)


@pytest.fixture(scope="module")
def llama(loaded):
    return loaded("llama", True)


def same(circuit, expected):
    """Equal up to float32 rounding of sums of a few hundred terms, some of which cancel."""
    whole = circuit.matrix.AB.double()
    assert circuit.A.dtype == torch.float32
    assert whole.shape == expected.shape == circuit.shape
    return torch.allclose(whole, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# -- each circuit against its reference, on processed and on raw weights -------------------------------


def test_ov(model, truth):
    found = OV(model, EARLIER)
    assert same(found, reference.ov(truth, *EARLIER))
    assert (found.axes, found.spaces) == (("source", "destination"), ("d_model", "d_model"))
    assert (found.name, found.heads, found.embedding) == ("OV of L0H1", (EARLIER,), "none")
    assert not same(found, reference.ov(truth, 0, 2))


def test_qk(model, truth, at):
    found = QK(model, "L1H2", **at)
    assert same(found, reference.qk(truth, *LATER, **at))
    assert (found.axes, found.relative_position) == (("query", "key"), at.get("relative_position"))
    # queries differ from keys
    assert not same(found, reference.qk(truth, *LATER, **at).T)


def test_full_ov_of_one_and_of_several(model, truth):
    assert same(full_OV(model, "1.2"), reference.full_ov(truth, [LATER], truth.W_E))
    several = full_OV(model, [LATER, EARLIER, (1, 0)])
    assert same(several, reference.full_ov(truth, [EARLIER, LATER, (1, 0)], truth.W_E))
    assert several.name == "full OV of L0H1 + L1H0 + L1H2"
    assert several.A.shape[1] == 3 * model.cfg.d_head
    assert several.spaces == ("tokens", "tokens")


def test_full_qk(model, truth, at):
    assert same(full_QK(model, LATER, **at), reference.full_qk(truth, LATER, truth.W_E, **at))


def test_effective_embedding(model, truth, at, kind):
    if kind == "toy":
        with pytest.raises(ValueError, match="this model has no MLP: use embedding='W_E'"):
            full_QK(model, LATER, embedding="effective", **at)
        return
    effective = {"embedding": "effective"}
    assert same(full_OV(model, LATER, **effective), reference.full_ov(truth, [LATER], truth.effective))
    found = full_QK(model, LATER, **effective, **at)
    assert same(found, reference.full_qk(truth, LATER, truth.effective, **at))
    assert found.embedding == "effective"


def test_compositions(model, truth, at):
    found = k_composition_circuit(model, EARLIER, LATER, **at)
    assert same(found, reference.k_composition(truth, EARLIER, LATER, truth.W_E, **at))
    assert (found.axes, found.heads) == (("query", "key"), (EARLIER, LATER))
    found = q_composition_circuit(model, EARLIER, LATER, **at)
    assert same(found, reference.q_composition(truth, EARLIER, LATER, truth.W_E, **at))
    assert found.axes == ("query", "key")
    found = v_composition_circuit(model, EARLIER, LATER)
    assert same(found, reference.v_composition(truth, EARLIER, LATER, truth.W_E))
    assert found.axes == ("source", "destination")


def test_the_articles_circuit(gpt2):
    """Its line `Q = W_E @ W_Q; K = W_E @ W_V @ W_O @ W_K`, on processed weights as there."""
    W_E, W_Q, W_K, W_V, W_O = (getattr(gpt2, name).detach() for name in ("W_E", "W_Q", "W_K", "W_V", "W_O"))
    Q = W_E @ W_Q[1, 2]
    K = W_E @ W_V[0, 1] @ W_O[0, 1] @ W_K[1, 2]
    assert same(k_composition_circuit(gpt2, (0, 1), (1, 2)), (Q @ K.T).double())


@pytest.mark.parametrize("kind", ROTARY, scope="module")
def test_a_rotation_depends_on_the_distance(model, truth, kind):
    for distance in (0, 1, 7, 31):
        positions = {"relative_position": distance}
        assert same(QK(model, LATER, **positions), reference.qk(truth, *LATER, **positions)), distance
    assert not same(QK(model, LATER, relative_position=7), reference.qk(truth, *LATER, relative_position=-7))


@pytest.mark.parametrize("kind", ["gpt_neox"], scope="module")
def test_the_unrotated_part(model, truth):
    found = full_QK(model, LATER, rotary="unrotated")
    assert same(found, reference.full_qk(truth, LATER, truth.W_E, unrotated=True))
    assert (found.rotary, found.relative_position, found.A.shape[1]) == ("unrotated", None, 4)
    found = k_composition_circuit(model, EARLIER, LATER, rotary="unrotated")
    assert same(found, reference.k_composition(truth, EARLIER, LATER, truth.W_E, unrotated=True))


# -- composition scores ----------------------------------------------------------------------------


def test_composition_scores(model, truth, at):
    n_heads = model.cfg.n_heads
    for which in "qkv":
        positions = at if which != "v" else {}
        found = composition_scores(model, which, draws=2, **positions)
        for i in range(n_heads):
            for j in range(n_heads):
                expected = reference.composition(truth, which, (0, i), (1, j), **positions)
                # float32 norms
                assert float(found.scores[0, i, 1, j]) == pytest.approx(expected, rel=1e-5)
        pairs = torch.zeros(2, n_heads, 2, n_heads, dtype=torch.bool)
        pairs[0, :, 1] = True
        assert found.scores[~pairs].isnan().all()
        assert found.rotary == ("relative" if positions else "none")


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "toy"], scope="module")
@pytest.mark.parametrize("model", [True], indirect=True, ids=["processed"], scope="module")
def test_composition_scores_are_those_of_the_engine(model, kind):
    """Processed like ours; the engine omits the scale of a norm after attention (Gemma 2)."""
    for which in "qkv":
        found = composition_scores(model, which, draws=2)
        own = model.all_composition_scores(which.upper())
        own = getattr(own, "scores", own)
        # float32 norms; the engine's come from singular values
        assert torch.allclose(found.scores[0, :, 1], own[0, :, 1].detach(), atol=1e-5)
        assert found.rotary == ("ignored" if kind in ROTARY and which != "v" else "none")


def test_the_baseline_is_for_unrelated_heads(gpt2):
    found = composition_scores(gpt2, "k", seed=3, draws=100)
    # for random weights the mean square is 1 / d_model; 100 draws determine it to about 2%
    assert found.baseline_mean**2 + found.baseline_std**2 == pytest.approx(1 / 32, rel=0.08)
    assert_same(composition_scores(gpt2, "v", seed=3, draws=100).baseline_mean, found.baseline_mean)
    assert composition_scores(gpt2, "k", seed=4, draws=2).baseline_mean != found.baseline_mean
    # the tiny model's weights are random, so its 16 pairs match the baseline (about 3 standard errors)
    rest = found.over_baseline[0, :, 1]
    assert abs(float(rest.mean())) < 3 * found.baseline_std / 4
    assert len(found.to_dataframe()) == 16


# -- compared with running models ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"], scope="module")
@pytest.mark.parametrize("distance", [0, 2, 9])
def test_qk_matches_the_models_own_scores(model, kind, distance):
    """Biases cancel in differences between the scores of two queries with two keys and, where one vector is
    both query and key, between the scores of x, -x and 0."""
    layer, head, src = 1, 2, 4
    dest = src + distance
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, model.cfg.d_model, generator=draw)
    pairs = [(x[a], y[b]) for a in (0, 1) for b in (0, 1)]
    if distance == 0:
        pairs = [(each, each) for each in (x[0], -x[0], torch.zeros_like(x[0]))]
    stream = torch.zeros(len(pairs), dest + 1, model.cfg.d_model)
    for row, (query, key) in enumerate(pairs):
        stream[row, src], stream[row, dest] = key, query
    kept = []
    hooks = [
        (f"blocks.{layer}.hook_resid_pre", lambda resid, hook: stream),
        (f"blocks.{layer}.attn.hook_attn_scores", lambda scores, hook: kept.append(scores.clone())),
    ]
    with torch.no_grad():
        model.run_with_hooks(torch.zeros(len(pairs), dest + 1, dtype=torch.long), fwd_hooks=hooks)
    scores = kept[0][:, head, dest, src].double()
    at = {} if kind == "gpt2" else {"relative_position": distance}
    M = QK(model, (layer, head), **at).matrix.AB.double()

    def normed(vector):
        vector = vector.double()
        if kind != "llama":
            vector = vector - vector.mean()
        return vector / (vector.square().mean() + model.cfg.eps).sqrt()

    if distance:
        found = scores[0] - scores[1] - scores[2] + scores[3]
        expected = (normed(x[0]) - normed(x[1])) @ M @ (normed(y[0]) - normed(y[1]))
    else:
        found = (scores[0] + scores[1]) / 2 - scores[2]
        expected = normed(x[0]) @ M @ normed(x[0])
    # float32, and 1 / sqrt(d_head)
    assert float(found) == pytest.approx(float(expected) / 8**0.5, abs=2e-5)


def test_full_ov_is_what_the_head_adds_to_the_logits(tmp_path):
    """In an attention-only model without norms and biases, a single token attends to itself."""
    write_toy(tmp_path / "toy", normalization_type=None, n_layers=1)
    model = load_model(tmp_path / "toy", processing=False)
    ids = torch.arange(model.cfg.d_vocab)[:, None]

    def only(layer_head):
        def keep(z, hook):
            out = torch.zeros_like(z)
            out[:, :, layer_head] = z[:, :, layer_head]
            return out

        return keep

    def zero(value, hook):
        return torch.zeros_like(value)

    with torch.no_grad():
        hooks = [("hook_pos_embed", zero)]
        with_head = model.run_with_hooks(ids, fwd_hooks=[*hooks, ("blocks.0.attn.hook_z", only(3))])[:, 0]
        without = model.run_with_hooks(ids, fwd_hooks=[*hooks, ("blocks.0.attn.hook_z", zero)])[:, 0]
    added = (with_head - without).double()
    # b_V adds the same for every source, and a constant over the vocabulary does not matter
    added = added - added.mean(0)
    added = added - added.mean(1, keepdim=True)
    found = full_OV(model, (0, 3)).matrix.AB.double()
    found = found - found.mean(0)
    # differences between float32 logits
    assert torch.allclose(found, added, atol=1e-5)


# -- positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "toy"], scope="module")
@pytest.mark.parametrize("normalize", [False, True])
def test_positional_qk(model, truth, normalize):
    vectors = truth.W_pos
    if normalize:
        centered = vectors - vectors.mean(1, keepdim=True)
        vectors = vectors / (centered.square().mean(1, keepdim=True) + model.cfg.eps).sqrt()
    expected = torch.einsum("im,mn,jn->ij", vectors, reference.qk(truth, *LATER), vectors)
    found = positional_QK(model, LATER, normalize=normalize)
    assert same(found, expected)
    assert (found.spaces, found.normalized_positions) == (("positions", "positions"), normalize)


def test_positional_attention_is_the_models_own_where_only_positions_are_in_the_stream(tmp_path):
    hf_model = write_tiny_model(tmp_path / "gpt2", "gpt2")
    for name, value in hf_model.state_dict().items():
        if name.endswith((".ln_1.bias", ".c_attn.bias")):
            value.zero_()
    hf_model.save_pretrained(tmp_path / "gpt2")
    for processing in (True, False):
        model = load_model(tmp_path / "gpt2", processing=processing)
        found = positional_attention(model, LATER, n_positions=20)
        kept = []
        hooks = [
            ("blocks.1.hook_resid_pre", lambda resid, hook: model.W_pos.detach()[None, :20]),  # noqa: B023
            ("blocks.1.attn.hook_pattern", lambda pattern, hook: kept.append(pattern.clone())),  # noqa: B023
        ]
        with torch.no_grad():
            model.run_with_hooks(torch.zeros(1, 20, dtype=torch.long), fwd_hooks=hooks)
        # float32 scores of about 10, exponentiated
        assert torch.allclose(found.pattern, kept[0][0, 2], atol=1e-5)
        assert found.scale == pytest.approx(8**-0.5, rel=1e-5)
        plain = positional_attention(model, LATER, n_positions=20, normalize=False)
        assert not torch.allclose(found.pattern, plain.pattern, atol=1e-2)
        assert not plain.normalized_positions


def test_positions_default_to_the_whole_context(gpt2):
    assert positional_attention(gpt2, LATER).pattern.shape == (32, 32)
    with pytest.raises(ValueError, match="n_positions must be between 1 and the context of 32, got 33"):
        positional_attention(gpt2, LATER, n_positions=33)


def test_an_attention_scale_other_than_the_square_root(tiny_directories):
    """GPT-Neo does not scale its scores."""
    model = load_model(tiny_directories / "gpt_neo")
    assert positional_attention(model, EARLIER).scale == pytest.approx(1, rel=1e-5)


def test_padding_on_the_left_hides_no_position(tiny_directories):
    """HookedTransformer would mask the padding token, here the tokenizer's first."""
    model = load_model(tiny_directories / "gpt2")
    circuit, attention = positional_QK(model, LATER), positional_attention(model, LATER)
    assert model.tokenizer.pad_token_id in (None, 0)
    model.tokenizer.pad_token_id, model.tokenizer.padding_side = 0, "left"
    assert_same(positional_QK(model, LATER), circuit)
    assert_same(positional_attention(model, LATER), attention)
    assert not attention.pattern.isnan().any()


def test_nan_attention_has_no_scale(tiny_directories, monkeypatch):
    model = load_model(tiny_directories / "gpt2")
    pattern = model.hook_dict["blocks.1.attn.hook_pattern"]
    monkeypatch.setattr(pattern, "forward", lambda value: value * math.nan)
    with pytest.raises(ValueError, match=r"attention in layer 1 .* so its scale cannot be measured"):
        positional_attention(model, LATER)


# -- states of a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("fold_ln", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_a_partially_processed_model(tiny_directories, monkeypatch, fold_ln, center):
    truth = reference.of_hf(tiny_hf_model("gpt2"), "gpt2")
    monkeypatch.setattr(
        engines, "sound_processing", lambda *_, **__: engines.Processing(fold_ln, center, not center, False)
    )
    model = load_model(tiny_directories / "gpt2")
    assert same(OV(model, EARLIER), reference.ov(truth, *EARLIER))
    assert same(full_OV(model, LATER), reference.full_ov(truth, [LATER], truth.W_E))
    found = composition_scores(model, "v", draws=2).scores[0, 1, 1, 2]
    # float32 norms
    assert float(found) == pytest.approx(reference.composition(truth, "v", (0, 1), (1, 2)), rel=1e-5)


def test_bfloat16_weights_give_float32_circuits(tiny_directories):
    truth = reference.of_hf(tiny_hf_model("gpt2"), "gpt2")
    model = load_model(tiny_directories / "gpt2", dtype=torch.bfloat16, processing=False)
    found = k_composition_circuit(model, EARLIER, LATER)
    assert found.A.dtype == found.B.dtype == torch.float32
    expected = reference.k_composition(truth, EARLIER, LATER, truth.W_E)
    # six weights and two scales, each rounded to 8 bits
    assert torch.allclose(found.matrix.AB.double(), expected, atol=0.02 * float(expected.abs().max()))


def test_a_bfloat16_rotation(tiny_directories):
    truth = reference.of_hf(tiny_hf_model("gpt_neox"), "gpt_neox")
    model = load_model(tiny_directories / "gpt_neox", dtype=torch.bfloat16, processing=False)
    expected = reference.qk(truth, *LATER, relative_position=3)
    found = QK(model, LATER, relative_position=3).matrix.AB.double()
    # weights and the engine's own sines, rounded to 8 bits
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))


def test_the_bundled_model(bundled):
    found = k_composition_circuit(bundled, EARLIER, LATER, rotary="unrotated")
    assert found.shape == (bundled.cfg.d_vocab,) * 2
    assert found.A.shape[1] == bundled.cfg.d_head - bundled.cfg.d_head // 4


# -- tokens ----------------------------------------------------------------------------------------


def test_largest_pairs(gpt2):
    circuit = full_QK(gpt2, LATER)
    whole = circuit.matrix.AB
    table = largest_pairs(gpt2, circuit, 7)
    values, places = whole.flatten().topk(7)
    assert list(table["query_id"] * 64 + table["key_id"]) == places.tolist()
    assert list(table["value"]) == pytest.approx(values.tolist(), rel=1e-5)
    decode = gpt2.tokenizer.decode
    assert table["query"].iloc[0] == decode([places[0] // 64])
    assert table["key"].iloc[0] == decode([places[0] % 64])
    positions = largest_pairs(gpt2, positional_QK(gpt2, LATER), 3)
    assert list(positions["key"]) == [str(each) for each in positions["key_id"]]
    with pytest.raises(ValueError, match="the OV of L0H1 is between directions of the stream"):
        largest_pairs(gpt2, OV(gpt2, EARLIER))


def test_a_corner_has_the_entries_of_its_tokens(gpt2):
    circuit = full_OV(gpt2, LATER)
    whole = circuit.matrix.AB
    ids = gpt2.tokenizer("a")["input_ids"][-1], gpt2.tokenizer("b")["input_ids"][-1]
    corner = circuit_corner(gpt2, circuit, ["b", 5], ["a"])
    assert corner.shape == (2, 1)
    assert (corner.index.name, corner.columns.name) == ("source", "destination")
    assert corner.loc["b", "a"] == pytest.approx(float(whole[ids[1], ids[0]]), rel=1e-5)
    assert corner.iloc[1, 0] == pytest.approx(float(whole[5, ids[0]]), rel=1e-5)
    square = circuit_corner(gpt2, circuit)
    assert square.shape == (10, 10)
    assert square.iloc[2, 9] == pytest.approx(float(whole[2, 9]), rel=1e-5)
    stream = circuit_corner(gpt2, OV(gpt2, LATER), [31], [0])
    assert list(stream.index) == ["31"]
    with pytest.raises(ValueError, match="no tokens on its axis 'source': give numbers"):
        circuit_corner(gpt2, OV(gpt2, LATER), ["a"])


def test_singular_tokens(gpt2):
    """Against the dense SVD, of tokens and of directions read through the vocabulary."""
    circuit = full_QK(gpt2, LATER)
    U, S, Vh = torch.linalg.svd(circuit.matrix.AB.double())
    table = singular_tokens(gpt2, circuit, n=2, k=3)
    assert len(table) == 2 * 2 * 2 * 3
    for direction in range(2):
        for axis, vectors in (("query", U), ("key", Vh.T)):
            rows = table[(table["direction"] == direction) & (table["axis"] == axis)]
            # float32 against float64
            assert rows["singular_value"].iloc[0] == pytest.approx(float(S[direction]), rel=1e-5)
            vector = vectors[:, direction]
            for end in ("positive", "negative"):
                at_end = rows[rows["end"] == end]
                assert list(at_end["place"]) == [1, 2, 3]
                # the sign of a pair of singular vectors is arbitrary
                sign = 1 if end == "positive" else -1
                flip = math.copysign(1, float(vector[at_end["id"].iloc[0]])) * sign
                expected = (sign * flip * vector).topk(3)
                assert list(at_end["id"]) == expected.indices.tolist()
                assert list(at_end["value"] * sign) == pytest.approx(expected.values.tolist(), abs=1e-5)
    first = table.iloc[0]
    assert first["token"] == gpt2.tokenizer.decode([first["id"]])


def test_directions_are_read_through_the_vocabulary(gpt2):
    truth = reference.of_hf(tiny_hf_model("gpt2"), "gpt2")
    table = singular_tokens(gpt2, OV(gpt2, LATER), n=1, k=64)
    U, _, Vh = torch.linalg.svd(reference.ov(truth, *LATER))
    for axis, expected in (
        ("source", truth.W_E @ reference.centering(32) @ U[:, 0]),
        ("destination", Vh[0] @ reference.unembed(truth)),
    ):
        rows = table[(table["axis"] == axis) & (table["end"] == "positive")].sort_values("id")
        found = torch.tensor(rows["value"].to_numpy()).double()
        found = found * torch.sign(found @ expected)
        # float32 against float64
        assert torch.allclose(found, expected, atol=1e-5), axis


def test_the_two_ends_of_a_direction_match(gpt2):
    """Tokens that are positive on both axes get a positive entry from the direction alone."""
    circuit = full_OV(gpt2, LATER)
    table = singular_tokens(gpt2, circuit, n=1, k=1)
    ends = {(row.axis, row.end): row.id for row in table.itertuples()}
    whole = circuit.matrix.AB
    U, S, Vh = torch.linalg.svd(whole)
    strongest = S[0] * U[:, 0, None] * Vh[0]
    for end in ("positive", "negative"):
        assert strongest[ends["source", end], ends["destination", end]] > 0
    assert strongest[ends["source", "positive"], ends["destination", "negative"]] < 0


def test_a_circuit_of_another_model(gpt2, llama):
    for look in (largest_pairs, circuit_corner, singular_tokens):
        with pytest.raises(ValueError, match=r"from another model \(its name is 'gpt2', here 'llama'\): "):
            look(llama, full_OV(gpt2, EARLIER))
    with pytest.raises(ValueError, match="k must be between 1 and 64, the circuit's tokens, got 65"):
        singular_tokens(gpt2, full_OV(gpt2, EARLIER), k=65)


@pytest.mark.parametrize(
    ("changed", "size", "value"),
    [({"n_embd": 48}, "d_model", 48), ({"n_layer": 3}, "n_layers", 3), ({"n_head": 2}, "n_heads", 2)],
)
def test_a_circuit_of_another_model_of_the_same_name(gpt2, tmp_path, changed, size, value):
    write_tiny_model(tmp_path / "gpt2", "gpt2", **changed)
    other = load_model(tmp_path / "gpt2")
    for look in (largest_pairs, circuit_corner, singular_tokens):
        with pytest.raises(ValueError, match=rf"from another model \(its {size} is \d+, here {value}\): "):
            look(other, full_OV(gpt2, EARLIER))


def test_a_circuit_of_another_revision(gpt2):
    circuit = full_OV(gpt2, EARLIER)
    earlier = dataclasses.replace(circuit, model=dataclasses.replace(circuit.model, revision="step1000"))
    with pytest.raises(ValueError, match=r"\(its revision is 'step1000', here None\): "):
        largest_pairs(gpt2, earlier)


def test_a_circuit_of_the_same_model_in_another_state(gpt2, loaded):
    circuit = full_OV(loaded("gpt2", False), LATER)
    # float32
    assert largest_pairs(gpt2, circuit, 3)["value"].tolist() == pytest.approx(
        largest_pairs(gpt2, full_OV(gpt2, LATER), 3)["value"].tolist(), rel=1e-4
    )


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_missing_heads_are_refused(gpt2, head):
    for circuit in (OV, QK, full_OV, full_QK, positional_QK, positional_attention):
        with pytest.raises(
            ValueError, match=r"head L.* is out of range: the model has layers 0 to 1 with heads 0 to 3"
        ):
            circuit(gpt2, head)
    with pytest.raises(ValueError, match="out of range"):
        full_OV(gpt2, [(0, 0), head])


@pytest.fixture
def unchecked():
    """As for users, without the tests' type checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: OV(m, (0.7, 1.9)), r"with integers, got \(0.7, 1.9\)"),
        (lambda m: QK(m, (0.7, 1.9)), r"with integers, got \(0.7, 1.9\)"),
        (lambda m: OV(m, torch.tensor([0.7, 1.9])), "with integers, got"),
        (lambda m: OV(m, 5), "heads must be one head or a list of them, .*, got 5"),
        (lambda m: OV(m, None), "heads must be one head or a list of them, .*, got None"),
        (lambda m: OV(m, [(0, 1), None]), "with integers, got None"),
        (lambda m: QK(m, 5), "with integers, got 5"),
        (lambda m: QK(m, [(0, 1), (0, 2)]), r"takes one head, .* got a list: \[\(0, 1\), \(0, 2\)\]"),
        (lambda m: QK(m, ["0.1", "0.2"]), "takes one head"),
        (lambda m: k_composition_circuit(m, [(0, 1)], (1, 1)), "takes one head"),
        (
            lambda m: circuit_corner(m, full_OV(m, EARLIER), "ab"),
            "the source tokens must be a list of ids or texts, got 'ab'",
        ),
        (
            lambda m: circuit_corner(m, full_OV(m, EARLIER), ["a"], ""),
            "the destination tokens must be a list",
        ),
    ],
)
def test_arguments_of_wrong_types_are_refused(gpt2, unchecked, ask, message):
    with pytest.raises(TypeError, match=message):
        ask(gpt2)


def test_a_distance_is_an_integer(llama, unchecked):
    for wrong in (2.5, "2"):
        with pytest.raises(TypeError, match=f"relative_position must be an integer, got {wrong!r}"):
            QK(llama, LATER, relative_position=wrong)


def test_a_head_can_be_written_in_several_ways(gpt2, unchecked):
    for head in ("0.1", "L0H1", (0, 1), [0, 1], numpy.array([0, 1]), torch.tensor([0, 1]), ["0.1"], [(0, 1)]):
        assert OV(gpt2, head).heads == ((0, 1),)
    assert OV(gpt2, torch.tensor([[0, 1], [1, 2]])).heads == ((0, 1), (1, 2))


def test_an_empty_corner_is_refused(gpt2):
    with pytest.raises(ValueError, match="a corner needs at least one source, got an empty list"):
        circuit_corner(gpt2, full_OV(gpt2, EARLIER), [])
    with pytest.raises(ValueError, match="at least one destination"):
        circuit_corner(gpt2, full_OV(gpt2, EARLIER), [1], [])


def test_heads_that_cannot_be_summed_are_refused(gpt2):
    with pytest.raises(ValueError, match="heads must be one or several different heads, got"):
        full_OV(gpt2, [])
    with pytest.raises(ValueError, match="heads must be one or several different heads, got"):
        OV(gpt2, [(0, 1), "0.1"])


@pytest.mark.parametrize("pair", [((1, 0), (0, 1)), ((1, 0), (1, 1))])
def test_the_earlier_head_must_be_in_an_earlier_layer(gpt2, pair):
    for circuit in (k_composition_circuit, q_composition_circuit, v_composition_circuit):
        with pytest.raises(
            ValueError, match=r"reads only what layers before . write, and L1H0 is in layer 1"
        ):
            circuit(gpt2, *pair)


def qk_circuits():
    return {
        "QK": lambda model, **o: QK(model, LATER, **o),
        "full_QK": lambda model, **o: full_QK(model, LATER, **o),
        "k": lambda model, **o: k_composition_circuit(model, EARLIER, LATER, **o),
        "q": lambda model, **o: q_composition_circuit(model, EARLIER, LATER, **o),
    }


@pytest.mark.parametrize("make", qk_circuits().values(), ids=qk_circuits())
def test_a_rotation_is_not_ignored(gpt2, llama, make):
    with pytest.raises(ValueError, match=r"depends on their distance: .*neither was given"):
        make(llama)
    with pytest.raises(ValueError, match="both were given"):
        make(llama, relative_position=1, rotary="unrotated")
    with pytest.raises(ValueError, match="rotates all 8 dimensions of its heads: give"):
        make(llama, rotary="unrotated")
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=f"between 0 and 31, .*, got {wrong}"):
            make(llama, relative_position=wrong)
    with pytest.raises(ValueError, match="rotary must be None or 'unrotated', got 'none'"):
        make(llama, rotary="none")
    for option in ({"relative_position": 1}, {"rotary": "unrotated"}):
        with pytest.raises(ValueError, match="this model's positions are 'standard': leave them out"):
            make(gpt2, **option)


def test_positions_that_are_not_learned_are_refused(llama):
    with pytest.raises(
        ValueError, match=r"no learned positions .* but 'rotary': use QK with relative_position"
    ):
        positional_QK(llama, LATER)
    with pytest.raises(ValueError, match="no learned positions"):
        positional_attention(llama, LATER)


def test_invalid_composition_options_are_refused(gpt2, llama):
    with pytest.raises(ValueError, match="kind must be one of k, q, v, got 'K'"):
        composition_scores(gpt2, "K")
    with pytest.raises(ValueError, match="relative_position must be left out for V-composition"):
        composition_scores(llama, "v", relative_position=1)
    with pytest.raises(ValueError, match="leave them out"):
        composition_scores(gpt2, "k", relative_position=1)
    with pytest.raises(ValueError, match="embedding must be one of W_E, effective, got 'W_U'"):
        full_OV(gpt2, EARLIER, embedding="W_U")


GROUPED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def test_normalized_queries_have_no_qk_circuit(tmp_path):
    write_model_of(tmp_path / "qwen3", Qwen3Config(**GROUPED, head_dim=8))
    model = load_model(tmp_path / "qwen3")
    with pytest.raises(ValueError, match="this model normalizes queries and keys"):
        QK(model, LATER, relative_position=1)
    with pytest.raises(ValueError, match="this model normalizes queries and keys"):
        composition_scores(model, "k")
    assert composition_scores(model, "v", draws=2).rotary == "none"
    assert OV(model, LATER).shape == (32, 32)


def test_norms_only_after_attention_are_not_supported(tmp_path):
    write_model_of(tmp_path / "olmo2", Olmo2Config(**GROUPED))
    model = load_model(tmp_path / "olmo2", backend="bridge")
    with pytest.raises(ValueError, match="its norm comes after attention, not before"):
        OV(model, LATER)


def test_a_circuit_describes_itself(llama):
    found = k_composition_circuit(llama, "0.1", "1.2", relative_position=4)
    assert found.name == "K-composition of L0H1 with L1H2"
    assert (found.rotary, found.relative_position, found.embedding) == ("relative", 4, "W_E")
    assert found.model == describe(llama)
    assert "16x" not in repr(found)
    assert found == dataclasses.replace(found)
