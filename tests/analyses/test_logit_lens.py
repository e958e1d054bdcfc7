"""The logit lens against whole logits of every layer, on real small models."""

from __future__ import annotations

import pytest
import torch

from mechlens.analyses.logit_lens import logit_lens
from mechlens.models.load import load_model
from mechlens.results import LogitLensResult
from tests.reference import vocabulary as reference


def tokens_for(batch=2, length=9):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(4, 50, (batch, length), generator=draw)


def dense(model, resid):
    """Whole logits of a residual, through the model's own parts."""
    with torch.no_grad():
        logits = model.ln_final(resid) @ model.W_U + model.b_U
    cap = model.cfg.output_logits_soft_cap
    return logits if cap <= 0 else cap * torch.tanh(logits / cap)


@pytest.fixture(scope="session", params=[True, False], ids=["processed", "raw"])
def lens_model(request, tiny_directories, tiny_model):
    """Every tiny model, processed and not."""
    kinds = {"GPT2LMHeadModel": "gpt2", "GPTNeoXForCausalLM": "gpt_neox"}
    kinds |= {"LlamaForCausalLM": "llama", "Gemma2ForCausalLM": "gemma2"}
    from mechlens.models.protocol import describe

    kind = kinds[describe(tiny_model).architecture]
    return load_model(tiny_directories / kind, processing=request.param)


def test_the_last_row_is_the_models_own_prediction(lens_model):
    tokens = tokens_for()
    lens = logit_lens(lens_model, tokens, top_k=3)
    with torch.no_grad():
        own = lens_model(tokens).log_softmax(-1)
    top = own.topk(3)
    assert torch.equal(lens.top_ids[-1], top.indices)
    # float32 log-probabilities
    assert torch.allclose(lens.top_probabilities[-1].log(), top.values, atol=1e-5)
    expected = own[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(lens.log_prob["next"][-1, :, :-1], expected, atol=1e-5)
    assert (lens.rank["final"][-1] == 1).all()
    assert torch.equal(lens.final_ids, top.indices[..., 0])
    assert lens.kl_final[-1].max() < 1e-5


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
                    # float32, against float64 of float32 logits
                    assert float(lens.log_prob[name][row, b, pos]) == pytest.approx(
                        expected["log_prob"], abs=5e-5
                    )
                    # two logits that differ by rounding may change places
                    assert abs(float(lens.rank[name][row, b, pos]) - expected["rank"]) <= 1
                assert float(lens.entropy[row, b, pos]) == pytest.approx(expected["entropy"], abs=5e-5)
                assert float(lens.kl_final[row, b, pos]) == pytest.approx(expected["kl"], abs=1e-4)
                against = reference.statistics(logits[b, pos], first[b, pos], 0)["kl"]
                if not lens.kl_input.isnan().any():
                    assert float(lens.kl_input[row, b, pos]) == pytest.approx(against, abs=1e-4)


def test_what_is_undefined_is_nan(lens_model):
    lens = logit_lens(lens_model, tokens_for())
    assert lens.rank["next"][..., -1].isnan().all()
    assert not lens.rank["next"][..., :-1].isnan().any()
    tied = lens.model.architecture in ("GPT2LMHeadModel", "Gemma2ForCausalLM")
    assert lens.kl_input.isnan().all().item() is not tied
    assert not lens.log_prob["input"].isnan().any()


def test_sub_blocks_on_their_stream_are_the_stream(lens_model):
    """resid_pre + attn_out = resid_mid, and what is added to that is resid_post."""
    tokens = tokens_for()
    parallel = lens_model.cfg.parallel_attn_mlp
    if parallel:
        with pytest.raises(ValueError, match=r"no hook point 'blocks\.0\.hook_resid_mid'"):
            logit_lens(lens_model, tokens, component="resid_mid")
        return
    on = logit_lens(lens_model, tokens, component="attn_out", onto_stream=True)
    mid = logit_lens(lens_model, tokens, component="resid_mid")
    # the same sum in another order
    assert torch.allclose(on.entropy, mid.entropy, atol=1e-4)
    on = logit_lens(lens_model, tokens, component="mlp_out", onto_stream=True)
    post = logit_lens(lens_model, tokens)
    assert torch.allclose(on.entropy, post.entropy, atol=1e-4)
    alone = logit_lens(lens_model, tokens, component="mlp_out")
    assert not torch.allclose(alone.entropy, post.entropy, atol=1e-2)


def test_layers_and_positions_are_rows_and_columns_of_the_whole(tiny_bos_model):
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
    centred = resid - resid.mean(-1, keepdim=True) if kind == "gpt2" else resid
    bare = centred / (centred.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    for decoder, vectors in (("norm_only", bare), ("none", resid), (torch.nn.functional.relu, resid.relu())):
        lens = logit_lens(model, tokens, decoder=decoder, top_k=1)
        with torch.no_grad():
            logits = vectors @ model.W_U + model.b_U
        # the raw stream has logits of some hundred, whose softmax float32 knows to 1e-4
        expected = logits.double().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        assert torch.allclose(lens.log_prob["input"][1].double(), expected, atol=1e-3), decoder
        assert lens.decoder == (decoder if isinstance(decoder, str) else "relu")


def test_a_saved_lens_comes_back_and_makes_a_table(tiny_bos_model, tmp_path):
    lens = logit_lens(tiny_bos_model, "abc", targets=["d"])
    path = lens.save(tmp_path / "lens.safetensors")
    assert LogitLensResult.load(path) == lens
    table = lens.to_dataframe()
    assert len(table) == 3 * 1 * 4
    row = table[(table.row == "1") & (table.pos == 2)].iloc[0]
    assert row.token == "b", "BOS, a, b"
    assert row.top == tiny_bos_model.tokenizer.decode([int(lens.top_ids[2, 0, 2, 0])])
    assert row.kl_final == float(lens.kl_final[2, 0, 2])
    target = next(name for name in lens.rank if name.isdigit())
    assert row[f"rank_{target}"] == float(lens.rank[target][2, 0, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"component": "resid"}, "component must be one of resid_pre, resid_mid"),
        ({"onto_stream": True}, "onto_stream is for attn_out and mlp_out"),
        ({"decoder": "bare"}, "decoder must be one of final_norm, norm_only, none or a function"),
        ({"decoder": "norm_only"}, "load the model with processing=False"),
        ({"layers": [2]}, "there is no layer 2: there are 2"),
        ({"layers": [1, -1]}, "the same layer is asked for twice"),
        ({"layers": []}, "no layer is asked for"),
        ({"positions": [4]}, "there is no position 4: there are 4"),
        ({"targets": ["ab"]}, r"the target 'ab' is 2 tokens, not one: \['a', 'b'\]"),
        ({"targets": [64]}, "token id 64 is not in"),
        ({"top_k": 0}, "top_k must lie between 1 and"),
    ],
)
def test_errors_say_what_came_and_what_is_needed(tiny_bos_model, options, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(tiny_bos_model, "abc", **options)
