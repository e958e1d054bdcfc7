"""Neurons of a direct logit attribution compared with vectors built one by one, and their exact sum."""

from __future__ import annotations

import importlib.metadata
from functools import partial

import pytest
import torch
import transformers

from mechlens.analyses.attribution import NAMED, direct_logit_attribution
from mechlens.errors import ArgumentError
from mechlens.models.load.loading import load_model
from mechlens.models.run import forward, neurons
from mechlens.results import LogitAttribution, NeuronAttribution, neuron_label
from tests.close import assert_close, assert_same
from tests.counting import peak_bytes
from tests.reference import attribution as reference
from tests.tiny_models import write_model_of, write_tiny_model, write_toy
from tests.written_models import load_written

KINDS = ("gpt2", "gpt_neox", "llama", "gemma2")
TOYS = {
    "toy without norm": {"normalization_type": None, "act_fn": "gelu"},
    "toy with a norm in the MLP": {"act_fn": "solu_ln"},
}
HAS_HOOKED = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4


def tokens_for(batch=2, length=9):
    return torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def directories(tiny_directories, tmp_path_factory):
    root = tmp_path_factory.mktemp("neurons")
    for name, changes in TOYS.items():
        write_toy(root / name, attn_only=False, d_mlp=48, **changes)
    return {kind: tiny_directories / kind for kind in KINDS} | {name: root / name for name in TOYS}


@pytest.fixture(params=[True, False], ids=["processed", "raw"])
def processing(request):
    return request.param


@pytest.fixture(params=[*KINDS, *TOYS])
def model(request, load_once, directories, processing):
    """Ungated and gated MLPs, parallel blocks, norms behind the MLPs and inside them; processed and raw."""
    return load_once(directories[request.param], processing=processing)


def n_neurons(model):
    return model.cfg.n_layers * model.cfg.d_mlp


def by_place(found, batch, read):
    """{(layer, neuron): (contribution, activation)} as the reference has it."""
    fields = (found.layers, found.indices, found.contributions, found.activations)
    rows = zip(*(each[batch, read].tolist() for each in fields), strict=True)
    return {(layer, neuron): (added, activation) for layer, neuron, added, activation in rows}


def test_every_neuron_equals_the_slow_reference(model):
    tokens = tokens_for()
    draw = torch.Generator().manual_seed(8)
    targets, against = (torch.randint(4, 50, tokens.shape, generator=draw) for _ in range(2))
    found = direct_logit_attribution(
        model, tokens, targets, against=against, neurons=n_neurons(model)
    ).neurons
    for batch, pos in ((0, 0), (1, 4), (1, 8)):
        for_target, of_target = reference.neurons(model, tokens, batch, pos, int(targets[batch, pos]))
        for_other, of_other = reference.neurons(model, tokens, batch, pos, int(against[batch, pos]))
        got = by_place(found, batch, pos)
        assert got.keys() == for_target.keys()
        # float32 activations; the reference only sums them in float64
        for place, (added, activation) in got.items():
            assert added == pytest.approx(for_target[place][0] - for_other[place][0], abs=1e-5)
            assert activation == pytest.approx(for_target[place][1], abs=1e-5)
        biases = [a - b for a, b in zip(of_target, of_other, strict=True)]
        assert found.biases[:, batch, pos].tolist() == pytest.approx(biases, abs=1e-5)


def test_the_neurons_and_the_bias_of_each_layer_sum_to_its_mlp(model):
    found = direct_logit_attribution(model, tokens_for(), 7, neurons=n_neurons(model))
    for layer in range(model.cfg.n_layers):
        of_layer = found.neurons.contributions * (found.neurons.layers == layer)
        assert_close(of_layer.sum(-1) + found.neurons.biases[layer], found.of(f"L{layer} MLP"))


def test_the_first_ranks_are_the_largest_of_all_layers(model):
    tokens = tokens_for()
    every = direct_logit_attribution(model, tokens, 7, neurons=n_neurons(model))
    found = direct_logit_attribution(model, tokens, 7, neurons=6, positions=[2, -1])
    sizes = every.neurons.contributions.abs()
    assert (sizes.diff(dim=-1) <= 0).all()
    # neurons of nearly the same size may change places
    assert_close(found.neurons.contributions.abs(), sizes[:, [2, -1], :6])
    for read, pos in enumerate((2, 8)):
        whole = by_place(every.neurons, 1, pos)
        for place, numbers in by_place(found.neurons, 1, read).items():
            assert numbers == pytest.approx(whole[place], abs=1e-5)
    assert found.neurons.n_neurons == n_neurons(model)
    assert_close(
        found.contributions, direct_logit_attribution(model, tokens, 7, positions=[2, -1]).contributions
    )


def test_the_tokens_named_are_those_that_the_output_weights_promote(model):
    found = direct_logit_attribution(model, tokens_for(), 7, neurons=4).neurons
    assert found.promoted.shape == found.suppressed.shape == (len(found.listed), NAMED)
    places = zip(found.layers.flatten().tolist(), found.indices.flatten().tolist(), strict=True)
    assert list(found.places()) == sorted(set(places))
    for (layer, neuron), row in found.places().items():
        raised = reference.promotion(model, layer, neuron)
        scale = float(raised.abs().max())
        # by value, because tokens may tie
        for ids, best in ((found.promoted, raised.topk(NAMED)), (found.suppressed, (-raised).topk(NAMED))):
            sign = 1 if ids is found.promoted else -1
            torch.testing.assert_close(sign * raised[ids[row]], best.values, atol=1e-5 * scale, rtol=0)


def test_a_written_neuron_is_found_with_its_activation_and_token(tmp_path):
    """L0N0 reads that the token was `a` with 2 - 0.5 and writes twice that."""
    model = load_written(tmp_path, "mlp", processing=False)
    found = direct_logit_attribution(model, "ac", "a", positions=[-1], neurons=1, prepend_bos=False)
    row = found.neurons_to_dataframe().iloc[0]
    assert row["label"] == "L0N0" == neuron_label(0, 0)
    assert (row["activation"], row["contribution"]) == pytest.approx((1.5, 3.0), abs=1e-3)
    assert row["promoted"][0] == row["target"] == "a"


def test_a_batch_larger_than_one_pass_is_split(tiny_bos_model, monkeypatch):
    tokens = tokens_for(batch=5)
    once = direct_logit_attribution(tiny_bos_model, tokens, 7, positions=[5, 8], neurons=3)
    monkeypatch.setattr(forward, "MAX_POSITIONS", 2 * 9)
    monkeypatch.setattr(neurons, "TILE_ROWS", 4)
    assert_same(direct_logit_attribution(tiny_bos_model, tokens, 7, positions=[5, 8], neurons=3), once)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_neurons_are_summed_in_float32(directories, kind):
    narrow = load_model(directories[kind], processing=False, dtype="bfloat16")
    found = direct_logit_attribution(narrow, tokens_for(), 7, neurons=n_neurons(narrow)).neurons
    exact = direct_logit_attribution(
        load_model(directories[kind], processing=False), tokens_for(), 7, neurons=n_neurons(narrow)
    ).neurons
    assert found.contributions.dtype == found.activations.dtype == torch.float32
    whole = by_place(exact, 0, 4)
    # each operation before the neurons rounds to 8 bits
    for place, (added, _) in by_place(found, 0, 4).items():
        assert added == pytest.approx(whole[place][0], abs=0.05, rel=0.05)


def test_listed_neurons_make_a_table_a_summary_and_a_file(tiny_bos_model, tmp_path):
    found = direct_logit_attribution(tiny_bos_model, "abc", "d", against="e", neurons=3)
    back = LogitAttribution.load(found.save(tmp_path / "a.safetensors"))
    assert back == found
    assert isinstance(back.neurons, NeuronAttribution)
    table = found.neurons_to_dataframe()
    assert len(table) == 4 * 3
    row = table[(table["pos"] == 2) & (table["rank"] == 2)].iloc[0]
    assert (row["token"], row["target"], row["against"]) == ("b", "d", "e")
    assert row["contribution"] == float(found.neurons.contributions[0, 2, 1])
    assert row["label"] == neuron_label(int(row["layer"]), int(row["neuron"]))
    assert len(row["promoted"]) == len(row["suppressed"]) == NAMED
    assert found.to_json()["neurons"] == table.to_dict("records")
    summary = found.neuron_summary()
    assert summary["component"].tolist()[3:] == ["253 others", "MLP biases", "sum of MLPs"]
    assert summary["contribution"][:-1].sum() == pytest.approx(summary["contribution"].iloc[-1])
    assert summary["contribution"].iloc[-1] == pytest.approx(
        float(found.of("L0 MLP")[0, -1] + found.of("L1 MLP")[0, -1])
    )
    every = direct_logit_attribution(tiny_bos_model, "abc", "d", neurons=256).neuron_summary()
    assert every["component"].tolist()[256:] == ["MLP biases", "sum of MLPs"]


def test_without_neurons_there_is_no_table_of_them(tiny_bos_model):
    found = direct_logit_attribution(tiny_bos_model, "abc", "d")
    assert found.neurons is None
    assert found.to_json()["neurons"] is None
    with pytest.raises(
        ValueError, match="no neurons were listed: call direct_logit_attribution with neurons="
    ):
        found.neurons_to_dataframe()


@pytest.mark.parametrize(
    ("given", "message"), [(-1, "at least 0, got -1"), (257, "at most the model's 256, got 257")]
)
def test_a_wrong_number_of_neurons_is_refused(tiny_bos_model, given, message):
    with pytest.raises(ArgumentError, match=f"neurons must be {message}"):
        direct_logit_attribution(tiny_bos_model, "abc", 7, neurons=given)


def test_a_model_without_mlps_has_no_neurons(tmp_path):
    write_toy(tmp_path / "toy")
    with pytest.raises(ValueError, match="layer 0 of this model has no MLP, so it has no neurons"):
        direct_logit_attribution(load_model(tmp_path / "toy"), tokens_for(), 7, neurons=1)


@pytest.mark.parametrize("backend", ["hooked", "bridge"] if HAS_HOOKED else ["bridge"])
def test_a_mixture_of_experts_has_no_single_neurons(tmp_path, backend):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    write_model_of(tmp_path, transformers.MixtralConfig(**sizes, bos_token_id=0, eos_token_id=0))
    model = load_model(tmp_path, backend=backend)
    with pytest.raises(ValueError, match=r"the MLP of layer 0 has no W_out .* as in a mixture of experts"):
        direct_logit_attribution(model, tokens_for(), 7, neurons=1)


def test_a_scaled_mlp_is_refused(tiny_model):
    """Its components sum to the logit, but its neurons do not sum to the component."""
    with tiny_model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda written, hook: 1.01 * written)]):
        direct_logit_attribution(tiny_model, tokens_for(), 7)
        with pytest.raises(ValueError, match=r"the neurons of layer 1 .* do not sum to what its MLP adds"):
            direct_logit_attribution(tiny_model, tokens_for(), 7, neurons=1)


def test_broken_weights_give_no_numbers(tmp_path):
    write_tiny_model(tmp_path, "gpt2")
    model = load_model(tmp_path)
    with torch.no_grad():
        model.blocks[0].mlp.W_out[:] = torch.nan
    assert direct_logit_attribution(model, tokens_for(), 7, neurons=2).neurons.contributions.isnan().all()


def test_memory_holds_the_neurons_of_one_layer(tmp_path):
    """A wide MLP, so that everything else is small."""
    batch, length, d_mlp, peaks = 16, 24, 1024, []
    for n_layers in (2, 6):
        path = tmp_path / str(n_layers)
        write_toy(path, attn_only=False, d_mlp=d_mlp, act_fn="relu", n_layers=n_layers)
        model, tokens = load_model(path), tokens_for(batch, length)
        work = partial(direct_logit_attribution, model, tokens, 7, neurons=2)
        peaks.append(peak_bytes(work, mapped=0))
    one_layer = batch * length * d_mlp * 4
    assert peaks[0] > one_layer
    assert peaks[1] - peaks[0] < one_layer / 2
