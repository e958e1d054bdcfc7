"""Direct logit attribution compared with vectors built one by one, on real small models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from mechlens.analyses.attribution import direct_logit_attribution
from mechlens.models.load.loading import load_model
from mechlens.models.run import forward
from mechlens.results import LogitAttribution
from tests.reference import attribution as reference
from tests.tiny_models import write_model_of, write_tiny_model, write_toy

TOYS = {
    "toy": {},
    "toy without norm": {"normalization_type": None},
    "toy with MLP": {"attn_only": False, "d_mlp": 48, "act_fn": "gelu"},
}
SUM = {"atol": 1e-5, "rtol": 1e-5}
"""For float32 sums of a few dozen terms below 10."""


def tokens_for(batch=2, length=9):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(4, 50, (batch, length), generator=draw)


@pytest.fixture(scope="session")
def directories(tiny_directories, tmp_path_factory):
    root = tmp_path_factory.mktemp("attribution")
    for name, changes in TOYS.items():
        write_toy(root / name, **changes)
    return {kind: tiny_directories / kind for kind in ("gpt2", "gpt_neox", "llama", "gemma2")} | {
        name: root / name for name in TOYS
    }


@pytest.fixture(params=["gpt2", "gpt_neox", "llama", "gemma2", *TOYS])
def kind(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["processed", "raw"])
def model(request, load_once, directories, kind):
    """Parallel blocks, grouped heads, norms after the blocks, no MLP, no norm; processed and raw."""
    return load_once(directories[kind], processing=request.param)


@pytest.fixture
def of_7(model):
    return direct_logit_attribution(model, tokens_for(), 7)


def own_logits(model, tokens):
    """Logits before the soft-cap."""
    with torch.no_grad():
        logits = model(tokens)
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or -1.0
    return logits if cap <= 0 else cap * torch.atanh(logits / cap)


def test_components_sum_to_the_models_own_logit(model, of_7):
    found, logits = of_7, own_logits(model, tokens_for())[..., 7]
    # atanh of a logit near the cap of 3 loses two digits
    torch.testing.assert_close(found.logit, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.contributions.sum(0), found.logit, **SUM)
    assert found.positions == tuple(range(9))
    assert (found.target_ids == 7).all()
    assert found.against_ids is None


def test_every_component_equals_the_slow_reference(model):
    tokens = tokens_for()
    targets = torch.randint(4, 50, tokens.shape, generator=torch.Generator().manual_seed(8))
    found = direct_logit_attribution(model, tokens, targets)
    for batch, pos in ((0, 0), (1, 4), (1, 8)):
        expected, logit = reference.contributions(model, tokens, batch, pos, int(targets[batch, pos]))
        assert found.components == tuple(expected)
        got = dict(zip(found.components, found.contributions[:, batch, pos].tolist(), strict=True))
        # float32 activations; the reference only sums them in float64
        assert got == pytest.approx(expected, abs=1e-5)
        assert float(found.logit[batch, pos]) == pytest.approx(logit, abs=1e-5)


def test_a_difference_of_logits_is_the_difference_of_attributions(model, of_7):
    tokens = tokens_for()
    other = tokens.roll(1, -1)
    both = direct_logit_attribution(model, tokens, 7, against=other)
    two = direct_logit_attribution(model, tokens, other)
    torch.testing.assert_close(both.contributions, of_7.contributions - two.contributions, **SUM)
    torch.testing.assert_close(both.logit, of_7.logit - two.logit, **SUM)
    assert torch.equal(both.against_ids, other)


def test_the_default_target_is_the_models_own_guess(model):
    tokens = tokens_for()
    found = direct_logit_attribution(model, tokens, positions=[3, -1])
    with torch.no_grad():
        best = model(tokens)[:, [3, 8]].max(-1)
    assert torch.equal(found.target_ids, best.indices)
    assert found.positions == (3, 8)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_a_logit_difference_is_the_same_processed_and_raw(directories, kind):
    tokens = tokens_for()
    raw, processed = (
        direct_logit_attribution(load_model(directories[kind], processing=state), tokens, 7, against=9)
        for state in (False, True)
    )
    torch.testing.assert_close(raw.logit, processed.logit, atol=2e-5, rtol=1e-5)
    # folding moves value biases from the heads into their layer's bias; all else is equal
    for layer in range(2):
        heads = [name for name in raw.components if name.startswith((f"L{layer}H", f"L{layer} bias"))]
        sums = [sum(result.of(name) for name in heads) for result in (raw, processed)]
        torch.testing.assert_close(sums[0], sums[1], atol=2e-5, rtol=1e-5)
        mlps = [result.of(f"L{layer} MLP") for result in (raw, processed)]
        torch.testing.assert_close(mlps[0], mlps[1], atol=2e-5, rtol=1e-5)


def test_positions_are_columns_of_the_whole_and_rows_are_independent(tiny_bos_model):
    tokens = tokens_for()
    targets = tokens.roll(-1, -1)
    whole = direct_logit_attribution(tiny_bos_model, tokens, targets)
    part = direct_logit_attribution(tiny_bos_model, tokens[1], targets[1], positions=[-2, 0])
    assert part.positions == (7, 0)
    torch.testing.assert_close(part.contributions, whole.contributions[:, 1:, [7, 0]], **SUM)
    assert torch.equal(part.target_ids, targets[1:, [7, 0]])


def test_a_batch_larger_than_one_pass_is_split(tiny_bos_model, monkeypatch):
    tokens = tokens_for(batch=5)
    once = direct_logit_attribution(tiny_bos_model, tokens, against=tokens, positions=[5, 8])
    monkeypatch.setattr(forward, "MAX_POSITIONS", 2 * 9)
    found = direct_logit_attribution(tiny_bos_model, tokens, against=tokens, positions=[5, 8])
    # other batch sizes sum in a different order
    torch.testing.assert_close(found.contributions, once.contributions, **SUM)
    assert torch.equal(found.target_ids, once.target_ids)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_bfloat16_is_summed_in_float32(directories, name):
    narrow = load_model(directories[name], processing=False, dtype="bfloat16")
    tokens = tokens_for()
    found = direct_logit_attribution(narrow, tokens, 7)
    assert found.contributions.dtype == torch.float32
    # each addition rounds the residual stream to 8 bits
    torch.testing.assert_close(found.contributions.sum(0), found.logit, atol=0.05, rtol=0)
    exact = direct_logit_attribution(load_model(directories[name], processing=False), tokens, 7)
    torch.testing.assert_close(found.contributions, exact.contributions, atol=0.05, rtol=0.05)


def test_other_additions_to_the_stream_are_refused(tiny_directories):
    model = load_model(tiny_directories / "gpt2")

    def shift(resid, hook):
        return resid + 0.01 * torch.arange(32.0)

    # a user's hook on an activation that no component is read from
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", shift)]),
        pytest.raises(ValueError, match="adds something to its residual stream besides"),
    ):
        direct_logit_attribution(model, tokens_for(), 7)


def test_scaled_sub_blocks_or_logits_are_refused(tmp_path):
    """Granite scales its blocks' outputs and divides its logits; only a bridge runs it."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0}
    for name, message, changes in (
        ("blocks", "or scales what they add", {"residual_multiplier": 0.5}),
        ("logits", "this model's logits are not its last norm", {"logits_scaling": 3.0}),
    ):
        write_model_of(tmp_path / name, transformers.GraniteConfig(**sizes, **changes))
        model = load_model(tmp_path / name, backend="bridge")
        with pytest.raises(ValueError, match=message):
            direct_logit_attribution(model, tokens_for(), 7)


def test_an_attribution_makes_a_table_and_a_file(tiny_bos_model, tmp_path):
    found = direct_logit_attribution(tiny_bos_model, "abc", "d", against="e")
    assert found.prepend_bos
    assert found.tokens.shape == (1, 4)
    assert LogitAttribution.load(found.save(tmp_path / "a.safetensors")) == found
    alone = dataclasses.replace(found, against_ids=None)
    assert LogitAttribution.load(alone.save(tmp_path / "b.safetensors")) == alone
    table = found.to_dataframe()
    assert len(table) == len(found.components) * 4
    row = table[(table.component == "L1H2") & (table.pos == 3)].iloc[0]
    assert (row.layer, row["head"], row.token, row.target, row.against) == (1, 2, "c", "d", "e")
    assert row.contribution == float(found.of("L1H2")[0, 3])
    embed = table[table.component == "embed"]
    assert embed.layer.isna().all()
    assert embed["head"].isna().all()
    mlp = table[table.component == "L1 MLP"]
    assert (mlp.layer == 1).all()
    assert mlp["head"].isna().all()
    # a tidy table sums to the logit by position
    sums = table.groupby("pos").contribution.sum()
    assert sums.tolist() == pytest.approx(found.logit[0].tolist(), abs=1e-5)
    assert "against" not in alone.to_dataframe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "ab"}, r"the target 'ab' is 2 tokens, not one: \['a', 'b'\]"),
        ({"targets": 64}, "token id 64 is not in"),
        ({"targets": torch.tensor([1, 2, 3, -1])}, "token id -1 is not in"),
        ({"targets": torch.tensor([1, 2, 64, 1])}, "token id 64 is not in"),
        ({"targets": torch.tensor([1, 2])}, r"targets needs one id for every position of the prompt, \(1"),
        ({"targets": 1, "against": torch.tensor([[1]])}, "against needs one id for every position"),
        ({"positions": [4]}, "position 4 is out of range"),
        ({"positions": [1, -3]}, "position 1 is given twice"),
        ({"positions": []}, "no position selected"),
    ],
)
def test_errors_state_what_was_needed_and_given(tiny_bos_model, options, message):
    with pytest.raises(ValueError, match=message):
        direct_logit_attribution(tiny_bos_model, "abc", **options)


def test_a_prompt_past_the_context_and_an_unknown_component(tiny_bos_model):
    with pytest.raises(ValueError, match="33 tokens do not fit into the model's context of 32"):
        direct_logit_attribution(tiny_bos_model, tokens_for(length=33), 7)
    found = direct_logit_attribution(tiny_bos_model, "a", 7)
    with pytest.raises(ValueError, match=r"there is no component 'L9H0': there are embed, pos_embed, L0H0"):
        found.of("L9H0")


def test_broken_weights_give_no_numbers(tmp_path):
    write_tiny_model(tmp_path, "gpt2")
    model = load_model(tmp_path)
    with torch.no_grad():
        model.b_U[:] = torch.nan
    assert direct_logit_attribution(model, tokens_for(), 7).logit.isnan().all()
