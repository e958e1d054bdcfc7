"""The logit lens compared with full logits of every layer, on real small models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mechlens.analyses.logit_lens import LastBlocks, lens_vector, logit_lens
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import describe
from mechlens.results import LogitLensResult, TunedLens
from mechlens.results.lens import STATISTICS
from tests.close import assert_close
from tests.reference import vocabulary as reference
from tests.tiny_models import write_toy


def tokens_for(batch=2, length=9):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(4, 50, (batch, length), generator=draw)


def dense(model, resid):
    """Full logits of a residual, through the model's own modules."""
    with torch.no_grad():
        logits = model.ln_final(resid) @ model.W_U + model.b_U
    cap = model.cfg.output_logits_soft_cap
    return logits if cap <= 0 else cap * torch.tanh(logits / cap)


def is_tied(lens):
    return lens.model.architecture in ("GPT2LMHeadModel", "Gemma2ForCausalLM")


@pytest.fixture(params=[True, False], ids=["processed", "raw"])
def lens_model(request, load_once, tiny_directories, tiny_model):
    """Every tiny model, processed and raw."""
    kinds = {"GPT2LMHeadModel": "gpt2", "GPTNeoXForCausalLM": "gpt_neox"}
    kinds |= {"LlamaForCausalLM": "llama", "Gemma2ForCausalLM": "gemma2"}
    kind = kinds[describe(tiny_model).architecture]
    return load_once(tiny_directories / kind, processing=request.param)


def test_the_last_row_is_the_models_own_prediction(lens_model):
    tokens = tokens_for()
    lens = logit_lens(lens_model, tokens, top_k=3)
    with torch.no_grad():
        own = lens_model(tokens).log_softmax(-1)
    top = own.topk(3)
    assert torch.equal(lens.top_ids[-1], top.indices)
    # float32 log probabilities
    assert torch.allclose(lens.top_probabilities[-1].log(), top.values, atol=1e-5)
    expected = own[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(lens.log_prob["next"][-1, :, :-1], expected, atol=1e-5)
    assert (lens.rank["final"][-1] == 1).all()
    assert torch.equal(lens.final_ids, top.indices[..., 0])
    assert lens.kl_final[-1].max() < 1e-5


@pytest.mark.parametrize(
    "asked", [[], ["rank"], ["log_prob"], ["entropy"], ["kl_final"], ["entropy", "rank"]], ids=str
)
def test_some_statistics_equal_those_of_a_lens_with_all(tiny_model, asked):
    tokens = tokens_for()
    whole = logit_lens(tiny_model, tokens, targets=[7])
    some = logit_lens(tiny_model, tokens, targets=[7], statistics=asked)
    assert some.statistics == tuple(name for name in STATISTICS if name in asked)
    assert torch.equal(some.top_ids, whole.top_ids)
    assert torch.allclose(some.top_probabilities, whole.top_probabilities, atol=1e-6)
    for name in STATISTICS:
        mine, full = getattr(some, name), getattr(whole, name)
        pairs = [(mine[key], full[key]) for key in full] if isinstance(full, dict) else [(mine, full)]
        for one, other in pairs:
            if name in asked:
                assert torch.allclose(one, other, atol=1e-5, equal_nan=True), name
            else:
                assert one.isnan().all(), name


def test_every_row_equals_the_slow_reference(lens_model):
    tokens = tokens_for()
    lens = logit_lens(lens_model, tokens, targets=[7], top_k=2)
    with torch.no_grad():
        _, cache = lens_model.run_with_cache(tokens)
    n_layers = lens_model.cfg.n_layers
    residuals = [cache["blocks.0.hook_resid_pre"]]
    residuals += [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(n_layers)]
    final, first = dense(lens_model, residuals[-1]), dense(lens_model, residuals[0])
    assert lens.rows == ("embed", *(str(layer) for layer in range(n_layers)))
    for row, resid in enumerate(residuals):
        logits = dense(lens_model, resid)
        for b in range(2):
            for pos in range(9):
                named = {"final": int(final[b, pos].argmax()), "input": int(tokens[b, pos]), "7": 7}
                if pos < 8:
                    named["next"] = int(tokens[b, pos + 1])
                for name, token in named.items():
                    expected = reference.statistics(logits[b, pos], final[b, pos], token)
                    # float32, compared with float64 from float32 logits
                    assert float(lens.log_prob[name][row, b, pos]) == pytest.approx(
                        expected["log_prob"], abs=5e-5
                    )
                    # logits that differ only by rounding may swap
                    own = logits[b, pos] - logits[b, pos, token]
                    least, most = (1 + int((own > off).sum()) for off in (1e-4, -1e-4))
                    assert least <= float(lens.rank[name][row, b, pos]) <= most
                assert float(lens.entropy[row, b, pos]) == pytest.approx(expected["entropy"], abs=5e-5)
                assert float(lens.kl_final[row, b, pos]) == pytest.approx(expected["kl"], abs=1e-4)
                against = reference.statistics(logits[b, pos], first[b, pos], 0)["kl"]
                expected_kl = against if is_tied(lens) else math.nan
                assert float(lens.kl_input[row, b, pos]) == pytest.approx(expected_kl, abs=1e-4, nan_ok=True)


def test_undefined_statistics_are_nan(lens_model):
    lens = logit_lens(lens_model, tokens_for())
    assert lens.rank["next"][..., -1].isnan().all()
    assert not lens.rank["next"][..., :-1].isnan().any()
    assert lens.kl_input.isnan().all().item() is not is_tied(lens)
    assert not lens.log_prob["input"].isnan().any()


def test_a_stream_plus_its_output_is_the_next_stream(lens_model):
    if lens_model.cfg.parallel_attn_mlp:
        pytest.skip("attention and MLP both read resid_pre")
    tokens = tokens_for()
    # the same sum in a different order
    added, mid = (logit_lens(lens_model, tokens, read) for read in ("resid_pre+attn_out", "resid_mid"))
    assert torch.allclose(added.entropy, mid.entropy, atol=1e-4)
    added, post = (logit_lens(lens_model, tokens, read) for read in ("resid_mid+mlp_out", "resid_post"))
    assert torch.allclose(added.entropy, post.entropy, atol=1e-4)
    alone = logit_lens(lens_model, tokens, "mlp_out")
    assert not torch.allclose(alone.entropy, post.entropy, atol=1e-2)


def test_resid_mid_of_a_parallel_model_is_refused(tiny_directories):
    model = load_model(tiny_directories / "gpt_neox")
    for read in ("resid_mid", "resid_mid+mlp_out"):
        with pytest.raises(ValueError, match=r"no resid_mid, .* use resid_pre or resid_pre\+mlp_out"):
            logit_lens(model, tokens_for(), read)
    assert logit_lens(model, tokens_for(), "resid_pre+mlp_out").read == "resid_pre+mlp_out"


def test_layers_and_positions_select_rows_and_columns(tiny_bos_model):
    tokens = tokens_for()
    whole = logit_lens(tiny_bos_model, tokens)
    part = logit_lens(tiny_bos_model, tokens, layers=[-1], positions=[2, -1])
    assert part.rows == ("embed", "1")
    assert part.positions == (2, 8)
    assert torch.allclose(part.entropy, whole.entropy[[0, 2]][:, :, [2, 8]], atol=1e-5)
    assert part.rank["next"][..., 1].isnan().all()
    assert not part.rank["next"][..., 0].isnan().any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_decoders_of_raw_weights(tiny_directories, kind):
    model = load_model(tiny_directories / kind, processing=False)
    tokens = tokens_for()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    resid = cache["blocks.0.hook_resid_post"]
    centered = resid - resid.mean(-1, keepdim=True) if kind == "gpt2" else resid
    bare = centered / (centered.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    for decoder, vectors in (("norm_only", bare), ("none", resid), (torch.nn.functional.relu, resid.relu())):
        lens = logit_lens(model, tokens, decoder=decoder, top_k=1)
        with torch.no_grad():
            logits = vectors @ model.W_U + model.b_U
        # raw logits reach several hundred, so their float32 softmax is accurate to 1e-4
        expected = logits.double().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        assert torch.allclose(lens.log_prob["input"][1].double(), expected, atol=1e-3), decoder
        assert lens.decoder == (decoder if isinstance(decoder, str) else "relu")


def test_a_lens_can_be_saved_and_makes_a_table(tiny_bos_model, tmp_path):
    lens = logit_lens(tiny_bos_model, "abc", targets=["d"])
    path = lens.save(tmp_path / "lens.safetensors")
    assert LogitLensResult.load(path) == lens
    table = lens.to_dataframe()
    assert len(table) == 3 * 1 * 4
    row = table[(table.row == "1") & (table.pos == 2)].iloc[0]
    assert row.token == "b", "BOS, a, b"
    assert row.guess == tiny_bos_model.tokenizer.decode([int(lens.top_ids[2, 0, 2, 0])])
    assert row.kl_final == float(lens.kl_final[2, 0, 2])
    assert row["rank_d"] == float(lens.rank["d"][2, 0, 2])
    assert_close(lens.probability("d"), lens.log_prob["d"].exp())
    with pytest.raises(ValueError, match="this lens has no token 'e'"):
        lens.probability("e")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read": "resid"}, "read must be one of resid_pre, resid_mid, .* got 'resid'"),
        ({"read": "resid_pre+resid_mid"}, "read must be one of"),
        ({"read": "resid_post+attn_out"}, "read must be one of"),
        ({"read": ["L0H1", "resid_pre+L0H2"]}, "read must be one of"),
        ({"read": []}, "read must be one of"),
        ({"read": "0.9"}, "head L0H9 is out of range: the model has layers 0 to 1"),
        ({"read": "0.1", "layers": [1]}, "layers must be left out where read names heads"),
        ({"decoder": lambda vectors: vectors[..., :3]}, r"it gets, \(1, 4, 32\), got \(1, 4, 3\)"),
        ({"decoder": lambda vectors: None}, "got NoneType"),
        (
            {"decoder": "bare"},
            "decoder must be one of final_norm, norm_only, none, a function, a TunedLens or",
        ),
        ({"decoder": LastBlocks(3)}, "count must be at most the model's 2 blocks, got 3"),
        ({"decoder": "norm_only"}, "load the model with processing=False"),
        ({"layers": [2]}, "layer 2 is out of range"),
        ({"positions": [4]}, "position 4 is out of range"),
        ({"targets": ["ab"]}, r"the target 'ab' is 2 tokens, not one: \['a', 'b'\]"),
        ({"targets": [64]}, "token id 64 is not in"),
        ({"targets": {"next": "a"}}, "every lens has a token 'next'"),
        ({"targets": [["a", "b"]]}, r"one id or text per position, \(1, 4\), got 2"),
        ({"top_k": 0}, "top_k must"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(tiny_bos_model, options, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(tiny_bos_model, "abc", **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the text is empty"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.tensor([[3, 64]]), "token id 64 is not in the model's vocabulary of 64"),
        (torch.tensor([[3, -1]]), "token id -1 is not in"),
    ],
)
def test_a_prompt_without_tokens_or_of_unknown_ids_is_refused(tiny_bos_model, prompt, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(tiny_bos_model, prompt)


def test_targets_are_texts_ids_tensors_or_one_per_position(tiny_bos_model):
    tokens, following = tokens_for(), tokens_for().roll(-1, 1)
    lens = logit_lens(tiny_bos_model, tokens, targets=following)
    assert torch.equal(lens.target_ids["target_0"], following)
    assert torch.equal(lens.rank["target_0"][..., :-1], lens.rank["next"][..., :-1])
    # numpy and torch integers are accepted
    lens = logit_lens(tiny_bos_model, tokens.int(), targets=[np.int64(7), torch.tensor(8)])
    assert {name: ids.unique().tolist() for name, ids in lens.target_ids.items()} == {
        "7": [7],
        "target_1": [8],
    }
    # an id and a text with the same label are two targets
    digit = tiny_bos_model.tokenizer("5")["input_ids"][-1]
    both = logit_lens(tiny_bos_model, tokens, targets=[5, "5"]).target_ids
    assert {name: ids.unique().tolist() for name, ids in both.items()} == {"5": [5], "target_1": [digit]}
    with pytest.raises(TypeError, match="a target is an id or a text of one token, but this is a NoneType"):
        logit_lens(tiny_bos_model, tokens, targets=[None])


def test_a_decoder_may_change_its_vectors_in_place(tiny_bos_model, monkeypatch):
    """With a small budget, the row `embed` is decoded repeatedly."""
    monkeypatch.setattr("mechlens.measures.readout.CPU_BUDGET", 1)

    def in_place(vectors):
        return vectors.mul_(0.5).add_(1)

    changed = logit_lens(tiny_bos_model, tokens_for(), decoder=in_place)
    kept = logit_lens(tiny_bos_model, tokens_for(), decoder=lambda vectors: vectors * 0.5 + 1)
    # the same products in other shapes
    assert torch.allclose(changed.kl_input, kept.kl_input, atol=1e-5)


def test_a_result_keeps_its_tokens(tiny_bos_model):
    tokens = tokens_for()
    lens = logit_lens(tiny_bos_model, tokens, positions=[2, 0])
    tokens[0, 0] = 63
    assert torch.equal(lens.tokens, tokens_for())


def test_a_model_without_mlps_has_no_mlp_out(tmp_path):
    write_toy(tmp_path / "toy")
    with pytest.raises(ValueError, match="hook_mlp_out"):
        logit_lens(load_model(tmp_path / "toy"), tokens_for(), "mlp_out")


@pytest.mark.parametrize("prompt", [None, 3, {"text": "a"}])
def test_a_prompt_of_a_wrong_type_is_a_type_error(tiny_bos_model, prompt):
    with pytest.raises(TypeError):  # from beartype or from mechlens
        logit_lens(tiny_bos_model, prompt)


def test_rows_are_in_the_order_of_the_layers(tiny_bos_model):
    assert logit_lens(tiny_bos_model, "abc", layers=[1, 0]).rows == ("embed", "0", "1")


def test_one_token_is_enough(tiny_bos_model):
    lens = logit_lens(tiny_bos_model, torch.tensor([5]))
    with torch.no_grad():
        own = tiny_bos_model(torch.tensor([[5]])).log_softmax(-1)
    assert float(lens.log_prob["input"][-1, 0, 0]) == pytest.approx(float(own[0, 0, 5]), abs=1e-5)
    assert lens.rank["next"].isnan().all()


# -- heads, further blocks, tuned lenses ------------------------------------------------------------


def test_a_head_is_read_by_its_output(lens_model):
    tokens = tokens_for()
    heads = [(0, 3), (1, 2)]
    lens = logit_lens(lens_model, tokens, ["L1H2", (0, 3)])
    onto = logit_lens(lens_model, tokens, ["resid_pre+L0H3", "resid_pre+L1H2"])
    assert lens.rows == onto.rows == ("embed", "L0H3", "L1H2")
    with torch.no_grad():
        _, cache = lens_model.run_with_cache(tokens)
    for row, (layer, head) in enumerate(heads, start=1):
        written = cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ lens_model.W_O[layer, head]
        norm = getattr(lens_model.blocks[layer], "ln1_post", None)
        if norm is not None:
            # linear once the scale is fixed, so the parts sum to the whole
            z = cache[f"blocks.{layer}.attn.hook_z"]
            whole = sum(z[:, :, h] @ lens_model.W_O[layer, h] for h in range(lens_model.cfg.n_heads))
            written = written * cache[f"blocks.{layer}.hook_attn_out"] / whole
        stream = cache[f"blocks.{layer}.hook_resid_pre"]
        for found, vectors in ((lens, written), (onto, stream + written)):
            expected = dense(lens_model, vectors).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
            # a head's small output is divided by its own small scale
            assert torch.allclose(found.log_prob["input"][row], expected, atol=1e-4)
    every = logit_lens(lens_model, tokens, "result", layers=[1], positions=[4])
    assert every.rows == ("embed", "L1H0", "L1H1", "L1H2", "L1H3")
    assert torch.allclose(every.entropy[3, :, 0], lens.entropy[2, :, 4], atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_last_blocks_equals_a_run_from_the_rows_vectors(lens_model, k):
    """As if each row's vectors entered block n - k, or the next block if that is later."""
    tokens = tokens_for()
    lens = logit_lens(lens_model, tokens, decoder=LastBlocks(k))
    n_layers = lens_model.cfg.n_layers
    with torch.no_grad():
        own, cache = lens_model.run_with_cache(tokens)
    residuals = [cache["blocks.0.hook_resid_pre"]]
    residuals += [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(n_layers)]
    for row, resid in enumerate(residuals):
        first = max(row, n_layers - k)
        if first == n_layers:
            logits = own
        else:
            with torch.no_grad():
                logits = lens_model.run_with_hooks(
                    tokens, fwd_hooks=[(f"blocks.{first}.hook_resid_pre", lambda a, hook, r=resid: r)]
                )
        expected = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        # float32 log probabilities
        assert torch.allclose(lens.log_prob["input"][row], expected, atol=2e-5), row
    plain = logit_lens(lens_model, tokens)
    assert not torch.allclose(lens.entropy[0], plain.entropy[0], atol=1e-3)


def test_a_tuned_lens_translates_each_row(tiny_directories):
    model = load_model(tiny_directories / "llama", processing=False)
    tokens = tokens_for()
    lens = tuned(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    residuals = [cache["blocks.0.hook_resid_pre"]]
    residuals += [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(2)]
    found = logit_lens(model, tokens, decoder=lens)
    assert found.decoder == "tuned_lens"
    before = logit_lens(model, tokens, "resid_pre", decoder=lens)
    for row, resid in enumerate(residuals):
        if row < 2:
            resid = resid + resid @ lens.weight[row] + lens.bias[row]
        expected = dense(model, resid).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        # float32 log probabilities
        assert torch.allclose(found.log_prob["input"][row], expected, atol=2e-5)
        if row < 2:
            # the stream before block l is the stream after block l - 1
            assert torch.allclose(before.log_prob["input"][1 + row], expected, atol=2e-5)
    with pytest.raises(ValueError, match="between two blocks"):
        logit_lens(model, tokens, "mlp_out", decoder=lens)
    with pytest.raises(ValueError, match="processing"):
        logit_lens(load_model(tiny_directories / "llama"), tokens, decoder=lens)


def tuned(model):
    """A lens with small random translators."""
    draw = torch.Generator().manual_seed(1)
    d_model = model.cfg.d_model
    return TunedLens(
        model=describe(model),
        rows=("embed", "0"),
        weight=torch.randn(2, d_model, d_model, generator=draw) * 0.1,
        bias=torch.randn(2, d_model, generator=draw),
        kl_plain=torch.full((3,), torch.nan),
        kl_tuned=torch.full((3,), torch.nan),
        source="by hand",
        steps=None,
        batch_tokens=None,
        length=None,
        train_tokens=None,
        held_out_tokens=None,
        learning_rate=None,
        seed=None,
        prepend_bos=None,
    )


# -- ragged batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row_and_is_nan(lens_model, side):
    rows = [tokens_for(1, 9), tokens_for(1, 4) + 1]
    tokens, mask = torch.full((2, 9), -100), torch.zeros(2, 9)
    for row, own in enumerate(rows):
        places = slice(9 - own.shape[1], 9) if side == "left" else slice(0, own.shape[1])
        tokens[row, places], mask[row, places] = own[0], 1
    lens = logit_lens(
        lens_model, {"input_ids": tokens, "attention_mask": mask}, decoder=LastBlocks(1), targets=[7]
    )
    for row, own in enumerate(rows):
        alone = logit_lens(lens_model, own, decoder=LastBlocks(1), targets=[7])
        real = mask[row].bool()
        for name in ("final", "input", "next", "7"):
            # the same sums in matrices of other sizes
            there, expected = lens.log_prob[name][:, row, real], alone.log_prob[name][:, 0]
            assert torch.allclose(there, expected, atol=1e-5, equal_nan=True), name
            assert lens.rank[name][:, row, ~real].isnan().all()
        assert torch.allclose(lens.kl_final[:, row, real], alone.kl_final[:, 0], atol=1e-5)
        assert lens.entropy[:, row, ~real].isnan().all()
        assert lens.top_probabilities[:, row, ~real].isnan().all()
    assert len(lens.to_dataframe()) == 3 * (9 + 4)


def test_texts_of_unequal_length_are_padded(tiny_bos_model):
    lens = logit_lens(tiny_bos_model, ["abc", "a"], targets=[[["a", "b", "c", "d"], ["d"] * 4]])
    alone = logit_lens(tiny_bos_model, "a", targets="d")
    assert torch.allclose(lens.log_prob["target_0"][:, 1, :2], alone.log_prob["d"][:, 0], atol=1e-5)
    own = logit_lens(tiny_bos_model, "abc", targets=["c"])
    assert torch.allclose(lens.log_prob["target_0"][:, 0, 2], own.log_prob["c"][:, 0, 2], atol=1e-5)
    assert lens.context_length.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    ids, mask = torch.ones(1, 3, dtype=torch.long), torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="positions contains only padding"):
        logit_lens(tiny_bos_model, {"input_ids": ids, "attention_mask": mask}, positions=[2])


def test_a_document_longer_than_the_context_is_read_in_windows(lens_model):
    n_ctx = lens_model.cfg.n_ctx
    tokens = tokens_for(1, 2 * n_ctx + 5)
    lens = logit_lens(lens_model, tokens, positions=[3, n_ctx, n_ctx + 7, 2 * n_ctx + 4])
    assert lens.context_length[0, 0] == 4
    for at, pos in enumerate(lens.positions):
        seen = int(lens.context_length[0, at])
        assert n_ctx // 2 <= seen <= n_ctx or pos == 3
        with torch.no_grad():
            own = lens_model(tokens[:, pos + 1 - seen : pos + 1])[0, -1].log_softmax(-1)
        # float32 log probabilities
        assert float(lens.log_prob["input"][-1, 0, at]) == pytest.approx(float(own[tokens[0, pos]]), abs=1e-5)
        if pos + 1 < tokens.shape[1]:
            expected = float(own[tokens[0, pos + 1]])
            assert float(lens.log_prob["next"][-1, 0, at]) == pytest.approx(expected, abs=1e-5)


def test_a_smaller_budget_changes_nothing(tiny_bos_model, monkeypatch):
    # longer than the context of 32
    tokens = tokens_for(2, 17).repeat(1, 2)
    whole = logit_lens(tiny_bos_model, tokens, targets=[3])
    monkeypatch.setattr("mechlens.analyses.logit_lens.windows.RESIDUAL_BYTES", 1)
    monkeypatch.setattr("mechlens.measures.readout.CPU_BUDGET", 1)
    small = logit_lens(tiny_bos_model, tokens, targets=[3])
    for name in ("entropy", "kl_final", "kl_input", "top_probabilities"):
        # the same sums in matrices of other sizes
        assert torch.allclose(getattr(small, name), getattr(whole, name), atol=1e-5), name
    assert torch.allclose(small.log_prob["3"], whole.log_prob["3"], atol=1e-5)
    assert torch.equal(small.context_length, whole.context_length)


def test_bfloat16_is_read_in_float32(tiny_directories):
    model = load_model(tiny_directories / "gpt2", dtype=torch.bfloat16)
    tokens = tokens_for()
    lens = logit_lens(model, tokens, targets=[7])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        resid = cache["blocks.0.hook_resid_post"]
        logits = model.ln_final(resid).float() @ model.W_U.float() + model.b_U.float()
    assert lens.entropy.dtype == torch.float32
    for b, pos in ((0, 0), (1, 5)):
        expected = reference.statistics(logits[b, pos], logits[b, pos], 7)
        # float32; in bfloat16 each logit would be off by about 1e-2
        assert float(lens.log_prob["7"][1, b, pos]) == pytest.approx(expected["log_prob"], abs=2e-5)
        assert float(lens.entropy[1, b, pos]) == pytest.approx(expected["entropy"], abs=2e-5)


# -- single vectors ---------------------------------------------------------------------------------


def test_a_vector_reads_as_it_does_in_its_row(lens_model):
    tokens = tokens_for()
    with torch.no_grad():
        _, cache = lens_model.run_with_cache(tokens)
    lens = logit_lens(lens_model, tokens, targets={"seven": 7})
    resid = cache["blocks.0.hook_resid_post"]
    found = lens_vector(lens_model, resid[1, 2:4], top_k=5, targets={"seven": 7})
    # the same sums in matrices of other sizes
    assert torch.allclose(found.log_prob["seven"], lens.log_prob["seven"][1, 1, 2:4], atol=1e-5)
    assert torch.equal(found.rank["seven"], lens.rank["seven"][1, 1, 2:4])
    assert torch.equal(found.top_ids, lens.top_ids[1, 1, 2:4])
    single = lens_vector(lens_model, resid[1, 2], top_k=2)
    assert len(single.to_dataframe()) == 2
    assert torch.allclose(single.entropy[0], lens.entropy[1, 1, 2], atol=1e-5)
    with pytest.raises(ValueError, match=r"a vector needs the model.s 32 elements, got shape \(31,\)"):
        lens_vector(lens_model, resid[1, 2, :31])


def test_a_constant_vector_decodes_to_the_biases(tiny_directories):
    """LayerNorm maps it to zero, so only `b_U` is left."""
    model = load_model(tiny_directories / "gpt2")
    found = lens_vector(model, torch.full((32,), 3.0), targets=[4])
    expected = model.b_U.detach().log_softmax(0)[4]
    # the mean of equal float32 numbers differs from them by rounding, which the norm's epsilon keeps small
    assert float(found.log_prob["4"]) == pytest.approx(float(expected), abs=1e-3)
