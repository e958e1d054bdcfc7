"""If a model violates the assumptions of a shortcut, the shortcut is skipped or the call refused.

Each case was once a bug. The references are Hugging Face's own model and full runs with hooks.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf

import mechlens
from mechlens.models.load.loading import load_model
from mechlens.models.load.tiny_architectures import architecture, random_model, write_model, write_tokenizer
from mechlens.models.run.patched_runs import PatchedRuns
from mechlens.models.run.sites import SITES
from mechlens.models.run.unembedding import next_token_log_probs
from mechlens.models.run.user_hooks import user_hooks
from tests.tiny_models import tiny_hf_model, write_model_of, write_tiny_model

HAS_HOOKED = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
BACKENDS = ["hooked", "bridge"] if HAS_HOOKED else ["bridge"]
N_POS, LAYERS = 12, 4
# sums in a different order, in losses and log probabilities of a few nats
CLOSE = 5e-5


def gradient_search(model, steps):
    """One token for feature 1 of layer 0."""
    objective = mechlens.Maximize(mechlens.Features(0, 1))
    return mechlens.search_gradient(model, objective, n_tokens=1, optimizer=mechlens.Optimizer(steps=steps))


def tokens_for(rows=1, length=N_POS, seed=3):
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "gpt_neox"):
        deep = {"n_layer": LAYERS} if kind == "gpt2" else {"num_hidden_layers": LAYERS}
        write_tiny_model(root / kind, kind, **deep)
    return root


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def vector(size=2.0):
    return size * torch.randn(32, generator=torch.Generator().manual_seed(5))


def everywhere(activation, hook):
    return activation + vector()


def at_the_last(activation, hook):
    activation = activation.clone()
    activation[:, -1] += vector()
    return activation


def at_the_fourth(activation, hook):
    activation = activation.clone()
    activation[:, 4] *= -1
    return activation


def of_the_first_row(activation, hook):
    activation = activation.clone()
    activation[0] += vector()
    return activation


def zeroed(model, tokens, site="z", at=None, **options):
    """A grid of zeros."""
    return mechlens.Patching(model, tokens, metric=mechlens.Loss(at)).grid(site, values="zero", **options)


def log_probs(model, tokens):
    with torch.no_grad():
        return model(tokens).float().log_softmax(-1)


def loss(logits, tokens):
    return float(-logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None]).mean())


# -- user hooks ------------------------------------------------------------------------------------


# each hook at two places, and two hooks at each place
@pytest.mark.parametrize(
    ("hook", "place"),
    [
        *(
            (hook, place)
            for hook in (everywhere, at_the_fourth)
            for place in ("hook_resid_pre", "hook_resid_post")
        ),
        *(
            (hook, place)
            for hook in (at_the_last, of_the_first_row)
            for place in ("hook_mlp_out", "attn.hook_z")
        ),
    ],
)
def test_with_a_users_hook_patches_are_full_runs(directories, backend, hook, place):
    model, tokens = load_model(directories / "llama", backend=backend), tokens_for()
    if place == "attn.hook_z":
        own = hook

        def hook(activation, hook):
            return own(activation.flatten(2), hook).view_as(activation)

    model.add_hook(f"blocks.1.{place}", hook, is_permanent=True)
    for site, layer in (("z", 1), ("resid_pre", 1), ("mlp_out", 0), ("resid_post", 1), ("resid_pre", 2)):
        found = zeroed(model, tokens, site, layers=[layer], positions=[5], at=[6, 8])

        def zero(activation, hook):
            activation = activation.clone()
            activation[:, 5] = 0
            return activation

        with torch.no_grad():
            whole = model.run_with_hooks(tokens, fwd_hooks=[(SITES[site].format(layer), zero)])
        terms = whole[0, [6, 8]].log_softmax(-1).gather(1, tokens[0, [7, 9], None])
        assert float(found.values) == pytest.approx(-float(terms.mean()), abs=CLOSE), (site, layer)
        assert "your hook at" in found.note
        nothing = mechlens.Patching(model, tokens).grid(site, values=lambda a, layer: a, over="layer")
        assert nothing.effect.abs().max() < CLOSE, "a patch that changes nothing has no effect"
    assert model.hook_dict[f"blocks.1.{place}"].fwd_hooks, "the user's hook is still there"


@pytest.mark.parametrize("hook", [None, everywhere, at_the_last, of_the_first_row])
def test_paths_of_several_prompts_match_full_runs_of_each(directories, backend, hook):
    """The keys of L3's group 1 with L1H2 zeroed in their input, with and without a user's hook."""
    model, tokens = load_model(directories / "llama", backend=backend), tokens_for(3)
    if hook is not None:
        model.add_hook("blocks.2.hook_resid_pre", hook, is_permanent=True)
    out, keys = "blocks.1.hook_attn_out", "blocks.3.attn.hook_k"
    pattern = "blocks.3.attn.hook_pattern"

    def keep(kept, name):
        return name, lambda activation, hook: kept.__setitem__(name, activation.clone())

    def zero(activation, hook):
        activation = activation.clone()
        activation[:, :, 2] = 0
        return activation

    attention, losses = [], []
    for row in tokens.split(1):
        clean, patched, seen, last = {}, {}, {}, {}
        with torch.no_grad():
            model.run_with_hooks(row, fwd_hooks=[keep(clean, out)])
            model.run_with_hooks(row, fwd_hooks=[("blocks.1.attn.hook_z", zero), keep(patched, out)])
            change = patched[out] - clean[out]
            enters = ("blocks.3.hook_resid_pre", lambda activation, hook, change=change: activation + change)
            model.run_with_hooks(row, fwd_hooks=[enters, keep(seen, keys)])

            def put(activation, hook, seen=seen):
                activation = activation.clone()
                activation[:, :, 1] = seen[keys][:, :, 1]
                return activation

            logits = model.run_with_hooks(row, fwd_hooks=[(keys, put), keep(last, pattern)])
        attention.append(last[pattern][0, 3])
        losses.append(loss(logits, row))
    experiment = mechlens.Patching(model, tokens)
    found = experiment.path_attention("L1H2", "L3H3.k", values="zero")
    torch.testing.assert_close(found, torch.stack(attention), atol=CLOSE, rtol=0)
    path = experiment.path("L1H2", "L3H1.k", values="zero")
    assert path.values.flatten().tolist() == pytest.approx(losses, abs=CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_a_users_hook_a_lens_shows_the_hooked_models_predictions(directories, backend, kind):
    model, tokens = load_model(directories / kind, backend=backend), tokens_for(3)
    model.add_hook("blocks.1.hook_mlp_out", at_the_last, is_permanent=True)
    lens = mechlens.logit_lens(model, tokens, targets=5, positions=[0, 3, N_POS - 1])
    expected = log_probs(model, tokens)[:, [0, 3, N_POS - 1], 5]
    assert (lens.log_prob["5"][-1] - expected).abs().max() < CLOSE


def test_ragged_rows_are_not_padded_if_a_hook_would_see_it(directories, backend):
    model = load_model(directories / "llama", backend=backend)
    model.add_hook("blocks.1.hook_resid_pre", at_the_last, is_permanent=True)
    texts = ["abcdefgh", "xy", "abcd"]
    lens = mechlens.logit_lens(model, texts)
    for row, text in enumerate(texts):
        alone = mechlens.logit_lens(model, text)
        n_pos = alone.tokens.shape[1]
        torch.testing.assert_close(
            lens.entropy[:, row, :n_pos], alone.entropy[:, 0], atol=CLOSE, rtol=0, msg=lambda m: m
        )
        own = log_probs(model, alone.tokens)[0]
        entropy = -(own.exp() * own).sum(-1)
        assert (lens.entropy[-1, row, :n_pos] - entropy).abs().max() < CLOSE


def test_a_torch_hook_is_detected(directories, backend):
    model, tokens = load_model(directories / "llama", backend=backend), tokens_for()
    handle = model.blocks[2].mlp.register_forward_hook(lambda module, given, made: made * 2)
    found = zeroed(model, tokens, over="layer", layers=[1])
    assert "your hook at blocks.2" in found.note
    handle.remove()
    assert zeroed(model, tokens, over="layer", layers=[1]).note == ""


def test_with_a_users_hook_searches_run_full_inputs(directories, backend):
    model = load_model(directories / "gpt2", backend=backend, processing=False)
    model.add_hook("blocks.0.hook_resid_pre", everywhere, is_permanent=True)
    prefix = torch.tensor([5, 9])
    found = mechlens.search_exhaustive(model, mechlens.Features([2]), top_k=64, prefix=prefix)
    rows = torch.cat([prefix.expand(64, -1), torch.arange(64)[:, None]], dim=1)
    name = "blocks.2.hook_resid_post"
    with torch.no_grad():
        own = model.run_with_cache(rows, names_filter=lambda each: each == name)[1][name][:, -1]
    torch.testing.assert_close(
        found.activations[0], own.T.sort(-1, descending=True).values, atol=2e-4, rtol=1e-5
    )


@pytest.mark.parametrize(
    "work",
    [
        lambda model: mechlens.search_exhaustive(model, mechlens.Features([0])),
        lambda model: mechlens.search_greedy(model, mechlens.Features(0, [1]), n_tokens=2),
        lambda model: gradient_search(model, 1),
        lambda model: mechlens.feature_examples(model, mechlens.Features([0], [1]), tokens_for(3)),
    ],
    ids=["complete", "greedy", "gradient", "examples"],
)
def test_a_hook_on_one_row_of_a_batch_is_refused_if_rows_are_separate_runs(directories, backend, work):
    model = load_model(directories / "gpt2", backend=backend, processing=False)
    model.add_hook("blocks.0.hook_resid_mid", of_the_first_row)
    with pytest.raises(ValueError, match=r"your hook at blocks\.0.* treats the rows of a batch differently"):
        work(model)


def test_a_hook_on_the_logits_is_not_part_of_a_lens(directories, backend):
    model, tokens = load_model(directories / "llama", backend=backend), tokens_for(2)
    # on a bridge, a hook inside the norm makes the engine compute it itself, with a warning
    place = "ln_final.hook_normalized" if backend == "hooked" else "unembed.hook_in"
    model.add_hook(place, lambda a, hook: a * 0.5, is_permanent=True)
    for work in (
        lambda: mechlens.logit_lens(model, tokens),
        lambda: mechlens.direct_logit_attribution(model, tokens, 5),
        lambda: zeroed(model, tokens),
        lambda: mechlens.sample_tokens(model, batch=1, seq_len=3),
    ):
        with pytest.raises(ValueError, match=r"your hook at (ln_final|unembed).* changes them"):
            work()
    # the loss on a continuation then comes from the model's own logits
    found = mechlens.repeated_token_performance(model, mechlens.RepeatedTokens(seq_len=5, batch=2, seeds=[0]))
    own = log_probs(model, found.tokens[0])[:, :-1].gather(2, found.tokens[0][:, 1:, None])[..., 0]
    assert (found.log_prob[0][:, :-1] - own).abs().max() < CLOSE


def test_circuits_depend_only_on_weights_not_on_hooks(directories, backend):
    model = load_model(directories / "gpt2", backend=backend)
    before = mechlens.full_QK(model, (1, 2)), mechlens.positional_attention(model, (0, 1))
    for place in ("hook_embed", "blocks.0.hook_resid_pre", "blocks.1.ln1.hook_normalized", "hook_pos_embed"):
        model.add_hook(place, everywhere)
    after = mechlens.full_QK(model, (1, 2)), mechlens.positional_attention(model, (0, 1))
    torch.testing.assert_close(after[0].A, before[0].A)
    torch.testing.assert_close(after[1].pattern, before[1].pattern)
    assert len(model.hook_dict["hook_embed"].fwd_hooks) == 1


def test_blocks_are_not_rerun_after_a_users_hook(directories):
    model = load_model(directories / "gpt2", backend=BACKENDS[0])
    model.add_hook("blocks.2.hook_resid_pre", everywhere)
    for work in (
        lambda: mechlens.logit_lens(model, tokens_for(), decoder=mechlens.LastBlocks(1)),
        lambda: mechlens.Patching(model, tokens_for()).blocks("repeat"),
    ):
        with pytest.raises(ValueError, match=r"your hook at blocks\.2"):
            work()


def test_the_engines_own_hooks_are_not_user_hooks(tmp_path):
    """For OPT, which has no MLP module, the bridge of TransformerLens 4 uses hooks on two other modules."""
    write_model(tmp_path / "opt", random_model(architecture("OPT").config()))
    write_tokenizer(tmp_path / "opt")
    model = load_model(tmp_path / "opt", backend=BACKENDS[-1])
    assert user_hooks(model) == ()
    assert PatchedRuns.of(model, tokens_for(1), "mlp_out").start is not None
    wired = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    mechlens.full_QK(model, (1, 2))
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == wired
    for place in ("blocks.1.hook_mlp_out", "hook_embed"):
        model.add_hook(place, everywhere)
        assert len(user_hooks(model)) == 1
        model.reset_hooks()
        assert user_hooks(model) == ()


# -- positions that depend on the length -----------------------------------------------------------


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def long_rope(directory, **changes):
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = {
        **SIZES,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "rope_parameters": rope | {"original_max_position_embeddings": 32},
    }
    write_model_of(directory, hf.Phi3Config(**config | changes))
    return hf.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def dynamic_rope(directory):
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    write_tiny_model(directory, "llama", rope_parameters=rope, max_position_embeddings=32)
    return hf.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def bridge_of(directory, n_ctx=128):
    model = load_model(directory, backend="bridge")
    # beyond the training length, for which the scaling is made
    model.cfg.n_ctx = n_ctx
    return model


@pytest.mark.parametrize("make", [long_rope, dynamic_rope])
def test_rows_beyond_the_original_context_are_neither_cut_nor_padded(tmp_path, make):
    reference = make(tmp_path / "model")
    model, tokens = bridge_of(tmp_path / "model"), tokens_for(3, 48, 1)
    with torch.no_grad():
        whole = reference(tokens).logits.log_softmax(-1)
    for positions in ([5, 10, 19], None):
        lens = mechlens.logit_lens(model, tokens, targets=5, positions=positions)
        expected = whole[..., 5] if positions is None else whole[:, positions, 5]
        assert (lens.log_prob["5"][-1] - expected).abs().max() < CLOSE
    # a short row next to a long one is read as if alone
    mask = torch.ones(3, 48, dtype=torch.long)
    mask[1, 20:] = 0
    lens = mechlens.logit_lens(model, {"input_ids": tokens, "attention_mask": mask}, targets=5)
    with torch.no_grad():
        short = reference(tokens[1:2, :20]).logits.log_softmax(-1)
    assert (lens.log_prob["5"][-1, 1, :20] - short[0, :, 5]).abs().max() < CLOSE
    # full runs include positions that the metric does not read
    found = zeroed(model, tokens[:1], "mlp_out", positions=[3], at=[5])
    expected = -whole[0, 5].log_softmax(-1)[tokens[0, 6]]
    assert float(found.clean) == pytest.approx(float(expected), abs=CLOSE)
    name = "blocks.1.hook_mlp_out"

    def zero(activation, hook):
        activation = activation.clone()
        activation[:, 3] = 0
        return activation

    with torch.no_grad():
        patched = model.run_with_hooks(tokens[:1], fwd_hooks=[(name, zero)])[0, 5].log_softmax(-1)
    assert float(found.values[0, 1, 0]) == pytest.approx(-float(patched[tokens[0, 6]]), abs=CLOSE)


def test_a_length_dependent_model_generates_its_own_predictions(tmp_path):
    reference = long_rope(tmp_path / "model")
    model = bridge_of(tmp_path / "model")
    # so confident that sampling is deterministic
    tokens = mechlens.sample_tokens(model, batch=2, seq_len=40, temperature=1e-4)
    with torch.no_grad():
        for pos in (10, 31, 32, 38):
            logits = reference(tokens[:, : pos + 1]).logits[:, -1]
            drawable = torch.arange(64) < 60
            drawable[0] = False
            assert (logits.masked_fill(~drawable, -torch.inf).argmax(-1) == tokens[:, pos + 1]).all()


# -- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["left", "right"])
def test_leading_tokens_that_equal_the_padding_token_are_tokens(tmp_path, backend, pad):
    write_tiny_model(tmp_path / "m", "gpt2")
    settings = tmp_path / "m" / "tokenizer_config.json"
    text = settings.read_text()
    settings.write_text(text.rstrip().rstrip("}") + f', "padding_side": "{pad}"}}')
    reference = tiny_hf_model("gpt2")
    tokens = torch.tensor([[0, 0, 7, 8, 20, 21]])
    with torch.no_grad():
        logits = reference(tokens).logits
        alone = reference(torch.tensor([[0, 0]]), output_hidden_states=True).hidden_states[1][0, -1]
    model = load_model(tmp_path / "m", backend=backend)
    assert model.tokenizer.padding_side == pad
    raw = load_model(tmp_path / "m", backend=backend, processing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = mechlens.logit_lens(model, tokens, targets=5)
        clean = zeroed(model, tokens, over="layer").clean
        patterns = mechlens.attention_patterns(model, tokens, [(1, 2)]).patterns[0]
        found = mechlens.search_exhaustive(raw, mechlens.Features([0]), top_k=64, prefix=torch.tensor([0]))
        written = mechlens.sample_tokens(model, batch=2, seq_len=8, temperature=1e-4)
    assert (lens.log_prob["5"][-1] - logits.log_softmax(-1)[..., 5]).abs().max() < CLOSE
    assert float(clean) == pytest.approx(loss(logits, tokens), abs=CLOSE)
    with torch.no_grad():
        attention = reference(tokens, output_attentions=True).attentions[1][0, 2]
        own = reference(written).logits[:, :-1]
    assert (patterns - attention).abs().max() < CLOSE
    of_0 = torch.stack([found.activations[0][f][found.ids[0][f] == 0][0] for f in range(32)])
    assert (of_0 - alone).abs().max() < 2e-4
    own[..., 0], own[..., 60:] = -torch.inf, -torch.inf
    assert torch.equal(own.argmax(-1)[:, 1:], written[:, 2:])


@pytest.mark.parametrize("side", ["begins", "ends"])
def test_undeclared_padding_gives_a_warning(tiny_directories, side):
    model = load_model(tiny_directories / "gpt2")
    tokens = tokens_for(2)
    tokens[1, slice(3) if side == "begins" else slice(-3, None)] = 0
    for work in (
        lambda: zeroed(model, tokens, over="layer"),
        lambda: mechlens.score_heads(model, tokens),
        lambda: mechlens.logit_lens(model, tokens),
        lambda: mechlens.direct_logit_attribution(model, tokens, 5),
    ):
        with pytest.warns(UserWarning, match=f"row 1 of the prompt {side} with 3 padding tokens"):
            work()


def test_a_sequence_may_begin_with_bos_and_end_with_eos(tiny_directories):
    model = load_model(tiny_directories / "gpt2")
    tokens = tokens_for(2)
    tokens[:, 0] = tokens[:, -1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mechlens.score_heads(model, tokens)


# -- text and BOS ----------------------------------------------------------------------------------


def test_a_text_that_begins_with_bos_does_not_get_another(bundled, tiny_directories):
    bos = bundled.tokenizer.bos_token
    assert (
        mechlens.text_tokens(bundled, f"{bos}The cat").tolist()
        == mechlens.text_tokens(bundled, "The cat").tolist()
    )
    tokens = mechlens.text_tokens(bundled, "The cat sat.")
    again = bundled.tokenizer.decode(tokens[0])
    assert torch.equal(mechlens.text_tokens(bundled, again, prepend_bos=True), tokens)
    lens = mechlens.logit_lens(bundled, [again, "The"])
    assert lens.tokens[0].tolist() == tokens[0].tolist()
    (window,) = mechlens.token_windows(bundled, [again], length=5, limit=1)
    assert window.tolist() == tokens[0, :5].tolist()
    raw = load_model(tiny_directories / "gpt2", processing=False)
    found = mechlens.search_exhaustive(
        raw, prefix=mechlens.Prefix(f"{raw.tokenizer.bos_token}ab", prepend_bos=True)
    )
    assert found.prefix.tolist() == mechlens.text_tokens(raw, "ab")[0].tolist()


def test_a_rendered_chat_template_is_read_unchanged(tiny_directories):
    model = load_model(tiny_directories / "llama")
    model.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "abc"}]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False)
    expected = model.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert mechlens.text_tokens(model, text)[0].tolist() == list(expected)


# -- heads that are scaled or shared ---------------------------------------------------------------


GRANITE = {
    **SIZES,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def test_head_outputs_that_a_model_scales_are_not_read_unscaled(tmp_path):
    write_model_of(
        tmp_path / "granite", hf.GraniteConfig(**GRANITE, residual_multiplier=0.22, logits_scaling=1.0)
    )
    model = load_model(tmp_path / "granite", backend="bridge", processing=False)
    with pytest.raises(ValueError, match=r"heads of layer 1 .*their sum is 4\.55 times as long"):
        mechlens.logit_lens(model, tokens_for(), "result", layers=[1])
    # attention's total output can be read
    lens = mechlens.logit_lens(model, tokens_for(), "resid_pre+attn_out", layers=[1])
    middle = mechlens.logit_lens(model, tokens_for(), "resid_mid", layers=[1])
    assert (lens.entropy[1] - middle.entropy[1]).abs().max() < CLOSE


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2"])
def test_heads_and_bias_sum_to_what_attention_adds(tiny_directories, backend, kind):
    model = load_model(tiny_directories / kind, backend=backend, processing=False)
    read: list[torch.Tensor] = []
    mechlens.logit_lens(
        model, tokens_for(), "result", layers=[1], decoder=lambda v: read.append(v.clone()) or v
    )
    seen = {}
    hook = ("blocks.1.hook_attn_out", lambda a, hook: seen.update(a=a.clone()))
    with torch.inference_mode(), model.hooks(fwd_hooks=[hook]):
        model(tokens_for())
    # the embedding, four heads and the stream after the last block, in the order of decoding
    heads = {tuple(each.flatten().tolist()): each for each in read}
    assert len(heads) >= 5
    added = seen["a"] - bias_behind(model)
    sums = [sum(four) for four in itertools.combinations(heads.values(), 4)]
    assert min((each - added).abs().max() for each in sums) < 1e-4


def bias_behind(model):
    """Attention's output bias."""
    bias = getattr(model.blocks[1].attn, "b_O", None)
    return torch.zeros(32) if bias is None else bias.detach()


@pytest.mark.skipif(not HAS_HOOKED, reason="a bridge has no such switch")
def test_query_heads_with_their_own_keys_are_found_by_their_own_index(directories):
    model, tokens = load_model(directories / "llama", backend="hooked"), tokens_for()
    experiment = mechlens.Patching(model, tokens)
    shared = experiment.path_attention("L0H1", "L2H3.k", values="zero")
    model.set_ungroup_grouped_query_attention(True)
    apart = experiment.path_attention("L0H1", "L2H3.k", values="zero")
    assert (apart - shared).abs().max() < CLOSE
    clean = mechlens.attention_patterns(model, tokens, ["L2H3"]).patterns[0]
    assert (apart[0] - clean).abs().max() > 0.01
    assert zeroed(model, tokens, "k", over=("layer", "head")).labels("head") == (0, 1, 2, 3)


# -- threads and settings --------------------------------------------------------------------------


def test_one_model_in_several_threads_gives_every_thread_its_own_numbers(directories, backend):
    model = load_model(directories / "llama", backend=backend)
    raw = load_model(directories / "llama", backend=backend, processing=False)
    jobs = []
    for seed in range(4):
        tokens = tokens_for(1, 8 + seed, seed)
        jobs += [
            lambda tokens=tokens: mechlens.logit_lens(model, tokens).entropy,
            lambda tokens=tokens: zeroed(model, tokens, over="layer").values,
            lambda tokens=tokens: mechlens.Patching(model, tokens).attribution("z", values="zero").estimate,
            lambda tokens=tokens: mechlens.attention_patterns(model, tokens, ["L1H2"]).patterns,
            lambda seed=seed: mechlens.search_exhaustive(raw, mechlens.Features([1], [seed])).activations,
        ]
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(job) for job in jobs * 2]]
    for one, other in zip(expected * 2, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_users_run_in_another_thread_is_not_affected_by_our_hooks(directories, backend):
    model, tokens, stop = load_model(directories / "llama", backend=backend), tokens_for(), threading.Event()
    with torch.no_grad():
        expected = model(tokens)

    def theirs() -> list[torch.Tensor]:
        made = []
        while not stop.is_set() or not made:
            with torch.no_grad():
                made.append(model(tokens))
        return made

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(theirs)
        for _ in range(5):
            zeroed(model, tokens, over="layer")
            mechlens.attention_patterns(model, tokens, ["L1H2"])
        stop.set()
        found = running.result()
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=CLOSE, rtol=0)


def past_the_eighth(activation, hook):
    activation = activation.clone()
    activation[:, 9] += 0.5
    return activation


def test_a_hook_beyond_the_positions_of_property_checks_is_applied(directories, backend):
    """It would fail on a prompt cut before that position."""
    model, tokens = load_model(directories / "gpt2", backend=backend), tokens_for()
    model.add_hook("blocks.0.hook_mlp_out", past_the_eighth, is_permanent=True)
    with torch.no_grad():
        whole = model(tokens).log_softmax(-1)
    entropy = -(whole.exp() * whole).sum(-1)
    torch.testing.assert_close(mechlens.logit_lens(model, tokens).entropy[-1], entropy, atol=1e-4, rtol=0)
    expected = whole[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    found = next_token_log_probs(model, tokens)[0][:, :-1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_hook_on_one_row_is_refused_if_a_batch_is_split(directories, backend, monkeypatch):
    """Which row it affects would depend on how many fit into memory."""
    model, tokens = load_model(directories / "gpt2", backend=backend), tokens_for(4)
    model.add_hook("blocks.0.hook_mlp_out", of_the_first_row, is_permanent=True)
    together = mechlens.logit_lens(model, tokens).entropy
    with torch.no_grad():
        whole = model(tokens).log_softmax(-1)
    expected = -(whole.exp() * whole).sum(-1)
    torch.testing.assert_close(together[-1], expected, atol=1e-4, rtol=0)
    for name in (
        "mechlens.models.run.forward.MAX_POSITIONS",
        "mechlens.analyses.logit_lens.windows.MAX_POSITIONS",
    ):
        monkeypatch.setattr(name, tokens.shape[1])
    for work in (
        lambda: mechlens.logit_lens(model, tokens),
        lambda: mechlens.direct_logit_attribution(model, tokens, 5),
        lambda: next_token_log_probs(model, tokens),
        lambda: mechlens.train_tuned_lens(model, tokens, training=mechlens.Training(1, 24), held_out=1),
        lambda: mechlens.Patching(model, tokens[:1]).grid("z", values=mechlens.Mean(tokens)),
    ):
        with pytest.raises(ValueError, match=r"your hook at .* treats the rows of a batch differently"):
            work()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_number(directories, backend, dtype):
    tokens, other = tokens_for(), tokens_for(seed=4)
    model = load_model(directories / "gpt2", backend=backend)
    raw = load_model(directories / "gpt2", backend=backend, processing=False)
    jobs = [
        lambda: zeroed(model, tokens).values,
        lambda: mechlens.Patching(model, tokens, other).grid("resid_pre").values,
        lambda: mechlens.direct_logit_attribution(model, tokens, 5).contributions,
        lambda: mechlens.score_heads(model, tokens).scores["induction_score"],
        lambda: mechlens.score_heads(
            model, mechlens.RepeatedTokens(batch=2, seeds=[0]), ["copying_score"]
        ).scores["copying_score"],
        lambda: mechlens.logit_lens(model, tokens).entropy,
        lambda: mechlens.logit_variance(model, tokens, nulls=2).variance,
        lambda: mechlens.Patching(model, tokens).attribution("z", values="zero").estimate,
        lambda: mechlens.composition_scores(model, "k", draws=4).scores,
        lambda: mechlens.full_OV(model, (1, 2)).A,
        lambda: mechlens.search_exhaustive(raw, top_k=2).activations,
        lambda: gradient_search(raw, 3).activations,
        lambda: (
            mechlens.train_tuned_lens(
                model, tokens_for(20), training=mechlens.Training(2, 24), held_out=2
            ).weight
        ),
        lambda: mechlens.positional_attention(model, (1, 2)).pattern,
    ]
    expected = [job() for job in jobs]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [job() for job in jobs]
        again = load_model(directories / "gpt2", backend=backend)
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert {each.dtype for each in again.parameters()} == {torch.float32}


def test_a_model_loaded_in_inference_mode_has_gradients(directories, backend):
    with torch.inference_mode():
        model = load_model(directories / "gpt2", backend=backend)
    tokens = tokens_for()
    usual = load_model(directories / "gpt2", backend=backend)
    found, expected = (
        mechlens.Patching(each, tokens).attribution("z", values="zero") for each in (model, usual)
    )
    torch.testing.assert_close(found.estimate, expected.estimate)
