"""Head scores and repeated-token performance compared with literal loops, on real small models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mechlens.analyses.attention import attention_patterns
from mechlens.analyses.heads.kinds import KINDS, VARIANTS
from mechlens.analyses.heads.performance import repeated_token_performance
from mechlens.analyses.heads.scores import detect_heads, performance_and_scores, score_heads
from mechlens.models.load.loading import load_model
from mechlens.results import HeadScores
from mechlens.text.prompts import RepeatedTokens
from tests.close import assert_close, assert_same
from tests.reference import heads as reference
from tests.shared import needs_shared
from tests.tiny_models import write_tiny_model

GOLDEN = Path(__file__).parent / "data" / "bundled_head_scores.safetensors"
ON_REPEATED = (
    "induction_score",
    "induction_diagonal_score",
    "duplicate_token_score",
    "previous_token_score",
    "first_token_score",
    "attention_sink_score",
)


def patterns_of(model, tokens):
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(model.cfg.n_layers)], cache


def test_pattern_scores_equal_the_published_loops(tiny_model):
    result = score_heads(tiny_model, RepeatedTokens(seq_len=7, batch=3, seeds=(0, 4)), ON_REPEATED)
    bos = int(result.prepend_bos)
    for at in range(2):
        patterns, _ = patterns_of(tiny_model, result.tokens["repeated"][at])
        for layer, pattern in enumerate(patterns):
            for row in range(3):
                for head in range(tiny_model.cfg.n_heads):
                    p = pattern[row, head]
                    expected = {
                        "induction_score": reference.induction(p, 7, bos),
                        "induction_diagonal_score": reference.induction_diagonal(p, 7),
                        "duplicate_token_score": reference.duplicate(p, 7, bos),
                        "previous_token_score": reference.previous(p),
                        "first_token_score": reference.first(p),
                        "attention_sink_score": reference.sink(p),
                    }
                    for kind, value in expected.items():
                        # float32 means of a few probabilities
                        got = float(result.scores[kind][at, row, layer, head])
                        assert got == pytest.approx(value, abs=1e-6), (kind, layer, head)


def test_nulls_are_the_same_mask_on_unrelated_tokens(tiny_model):
    result = score_heads(tiny_model, RepeatedTokens(seq_len=6, batch=2, seeds=(1,)), ON_REPEATED)
    bos = int(result.prepend_bos)
    unrelated = result.tokens["repeated_unrelated"][0]
    assert unrelated.shape == result.tokens["repeated"][0].shape
    assert not torch.equal(unrelated[:, bos : bos + 6], unrelated[:, bos + 6 :])
    assert not torch.equal(unrelated[:, : bos + 6], result.tokens["repeated"][0][:, : bos + 6])
    patterns, _ = patterns_of(tiny_model, unrelated)
    for layer, pattern in enumerate(patterns):
        for head in range(tiny_model.cfg.n_heads):
            value = reference.induction(pattern[1, head], 6, bos)
            got = float(result.nulls["induction_score"][0, 1, layer, head])
            assert got == pytest.approx(value, abs=1e-6)
    # a score that depends only on positions has uniform attention as its null
    n = 12 + bos
    uniform = sum(1 / (dest + 1) for dest in range(1, n)) / (n - 1)
    assert torch.allclose(result.nulls["previous_token_score"], torch.tensor(uniform))
    # uniform attention falls mostly on the first position
    causal = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    assert reference.sink(causal) == pytest.approx(uniform)
    assert torch.allclose(result.nulls["attention_sink_score"], torch.tensor(uniform))


def test_a_head_at_a_fixed_distance_scores_no_higher_than_its_null(fixed_distance_model):
    """It always attends S - 1 tokens back. Only the null or jitter exposes it."""
    model, seq_len = fixed_distance_model
    fixed = score_heads(
        model, RepeatedTokens(seq_len=seq_len, batch=8, seeds=(0,), prepend_bos=False), ["induction_score"]
    )
    # all attention is on the mask, in both
    assert float(fixed.mean("induction_score")[0, 0]) == pytest.approx(1, abs=1e-3)
    assert float(fixed.null("induction_score")[0, 0]) == pytest.approx(1, abs=1e-3)
    jittered = score_heads(
        model,
        RepeatedTokens(seq_len=seq_len, batch=64, seeds=(0,), jitter=3, prepend_bos=False),
        ["induction_score"],
    )
    # right by chance if the gap is 0: a quarter of 64 rows, within 0.25 by the binomial distribution
    assert float(jittered.mean("induction_score")[0, 0]) < 0.5


def test_prefix_matching_equals_its_loop(tiny_model_with_room):
    model = tiny_model_with_room
    result = score_heads(model, RepeatedTokens(batch=2, seeds=(0,)), ["prefix_matching_score"])
    bos = int(result.prepend_bos)
    patterns, _ = patterns_of(model, result.tokens["prefix"][0])
    for layer, pattern in enumerate(patterns):
        for head in range(model.cfg.n_heads):
            value = reference.prefix_matching(pattern[1, head], 25, 4, bos)
            got = float(result.scores["prefix_matching_score"][0, 1, layer, head])
            assert got == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_copying_equals_the_loop_on_the_raw_weights(kind, tmp_path):
    """Values, norms and unembedding come from Hugging Face's modules, nothing from mechlens."""
    room = {"n_positions": 128} if kind == "gpt2" else {"max_position_embeddings": 128}
    hf = write_tiny_model(tmp_path / kind, kind, **room)
    hf.set_attn_implementation("eager")
    result = score_heads(load_model(tmp_path / kind), RepeatedTokens(batch=2, seeds=(0,)), ["copying_score"])
    tokens = result.tokens["sample"][0]
    with torch.no_grad():
        out = hf(tokens, output_attentions=True, output_hidden_states=True)
    n_heads, d_head = 4, 16 if kind == "gemma2" else 8
    for layer in range(2):
        x = out.hidden_states[layer][0]
        if kind == "gpt2":
            block, final = hf.transformer.h[layer], hf.transformer.ln_f
            normed = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
            values = (normed * block.ln_1.weight) @ block.attn.c_attn.weight[:, 2 * n_heads * d_head :]
            W_O = block.attn.c_proj.weight
        else:
            block, final = hf.model.layers[layer], hf.model.norm
            normed = x / x.pow(2).mean(-1, keepdim=True).sqrt()
            one = int(kind == "gemma2")  # its norms multiply by 1 + weight
            values = (normed * (one + block.input_layernorm.weight)) @ block.self_attn.v_proj.weight.T
            W_O = block.self_attn.o_proj.weight.T
            if kind == "gemma2":
                W_O = W_O * (one + block.post_attention_layernorm.weight)
        W_U = (int(kind == "gemma2") + final.weight)[:, None] * hf.lm_head.weight.T
        if kind == "gpt2":
            W_U = W_U - W_U.mean(0)  # LayerNorm removes the mean
        for head in range(n_heads):
            source = head if kind == "gpt2" else head // 2  # two query heads share one value head
            v = values[:, source * d_head : (source + 1) * d_head].detach()
            rows = W_O[head * d_head : (head + 1) * d_head].detach()
            pattern = out.attentions[layer][0, head]
            expected = reference.copying(pattern, v, rows, W_U.detach(), tokens[0], 1)
            got = float(result.scores["copying_score"][0, 0, layer, head])
            # contributions nearly cancel in the ReLU, and eps = 1e-5 is omitted here
            assert got == pytest.approx(expected, abs=2e-3), (layer, head)


def test_copying_is_the_same_on_processed_and_unprocessed_weights(tiny_directory_with_room):
    scores = [
        score_heads(
            load_model(tiny_directory_with_room, processing=processing),
            RepeatedTokens(batch=3, seeds=(0,)),
            ["copying_score"],
        ).scores["copying_score"]
        for processing in (True, False)
    ]
    # folding and centering add a rounding in float32
    assert torch.allclose(*scores, atol=2e-3, equal_nan=True)


def test_performance_equals_the_literal_halves(tiny_model):
    result = repeated_token_performance(tiny_model, RepeatedTokens(seq_len=7, batch=4, seeds=(0, 1)))
    bos = int(result.prepend_bos)
    first, second, right = [], [], []
    for at in range(2):
        with torch.no_grad():
            logits = tiny_model(result.tokens[at])
        for row in range(4):
            log_probs, hits = reference.log_probs(logits[row], result.tokens[at, row])
            for pos, (value, hit) in enumerate(zip(log_probs, hits, strict=True)):
                predicted = pos + 1
                if predicted < bos + 7:
                    first.append(value)
                else:
                    second.append(value)
                    right.append(hit)
    assert len(second) == 2 * 4 * 7
    assert result.estimates["first_half_log_prob"][0] == pytest.approx(sum(first) / len(first), abs=1e-4)
    assert result.estimates["second_half_log_prob"][0] == pytest.approx(sum(second) / len(second), abs=1e-4)
    assert result.estimates["second_half_accuracy"][0] == pytest.approx(sum(right) / len(right), abs=1e-6)
    low, high = result.estimates["second_half_log_prob"][1:]
    assert low < result.estimates["second_half_log_prob"][0] < high
    assert result.log_prob[..., -1].isnan().all()
    frame = result.to_dataframe()
    assert len(frame) == 2 * 4 * (14 + bos - 1)
    assert frame.loc[frame.half == 2, "log_prob"].mean() == pytest.approx(sum(second) / len(second), abs=1e-4)


def test_shared_runs_give_the_same_performance_and_scores_as_separate_runs(tiny_model_with_room):
    shape = {"seq_len": 7, "batch": 3, "seeds": (1, 2), "prepend_bos": False}
    runs = []
    hook = tiny_model_with_room.hook_dict["blocks.0.hook_resid_pre"]
    hook.add_perma_hook(lambda value, hook: runs.append(tuple(value.shape[:2])))
    performance, scores = performance_and_scores(
        tiny_model_with_room, RepeatedTokens(**shape), KINDS, progress=False
    )
    tiny_model_with_room.reset_hooks(including_permanent=True)
    # per seed: both copies, prefix matching, a null of each length, copying; probes have one row
    assert [n_pos for n_rows, n_pos in runs if n_rows == 3] == [14, 100, 14, 100, 25] * 2
    assert_same(
        performance, repeated_token_performance(tiny_model_with_room, RepeatedTokens(**shape), progress=False)
    )
    assert_same(scores, score_heads(tiny_model_with_room, RepeatedTokens(**shape), KINDS, progress=False))


def test_scores_on_a_text_agree_with_detect_head(tiny_model):
    head_detector = pytest.importorskip("transformer_lens.head_detector")
    text = "abcabdabcabe"
    kinds = {
        "induction_score": "induction_head",
        "previous_token_score": "previous_token_head",
        "duplicate_token_score": "duplicate_token_head",
    }
    tokens = tiny_model.to_tokens(text)
    result = score_heads(tiny_model, tokens, tuple(kinds))
    n_pos = tokens.shape[1]
    for kind, theirs in kinds.items():
        mask = getattr(head_detector, f"get_{theirs}_detection_pattern")(tokens)
        expected = head_detector.detect_head(tiny_model, text, theirs, error_measure="mul")
        on_mask = score_heads(tiny_model, tokens, (), masks={"theirs": mask})
        # detect_head divides by the total attention (1 per position), mechlens by the number of entries
        entries = int(mask.bool().sum())
        rescaled = on_mask.mean("theirs") * entries / n_pos
        assert torch.allclose(rescaled, expected.cpu(), atol=1e-5), kind
        assert torch.allclose(result.mean(kind), on_mask.mean("theirs"), atol=1e-6), kind


def test_a_cache_gives_the_same_as_a_run(tiny_model):
    tokens = torch.randint(4, 50, (3, 12), generator=torch.Generator().manual_seed(2))
    kinds = ("previous_token_score", "first_token_score", "attention_sink_score", "induction_score")
    _, cache = tiny_model.run_with_cache(tokens)
    ran = score_heads(tiny_model, tokens, kinds)
    cached = score_heads(tiny_model, tokens, kinds, cache=cache)
    for kind in kinds:
        assert torch.allclose(ran.scores[kind], cached.scores[kind], atol=1e-7, equal_nan=True)


def test_a_sink_is_found_wherever_it_is(bundled):
    first = score_heads(
        bundled, RepeatedTokens(20, batch=4, seeds=[0]), ["first_token_score", "attention_sink_score"]
    )
    largest = first.mean("attention_sink_score")
    assert bool((largest >= first.mean("first_token_score") - 1e-6).all())
    # a head at rest on the first token has its sink there
    assert first.mean("first_token_score").amax() == pytest.approx(float(largest.amax()), abs=1e-6)
    assert float(first.mean("first_token_score").amax()) > 0.9
    tokens = torch.arange(4, 12)[None]
    pattern = torch.eye(8).repeat(1, bundled.cfg.n_heads, 1, 1)
    pattern[:, 1, 4:], pattern[:, 1, 4:, 3] = 0, 1  # all that follow the fourth token attend to it
    pattern[:, 2] = torch.eye(8).roll(-1, 1)  # each attends to the one before it, the first to the last
    cache = {f"blocks.{layer}.attn.hook_pattern": pattern for layer in range(bundled.cfg.n_layers)}
    found = score_heads(bundled, tokens, ["attention_sink_score", "first_token_score"], cache=cache)
    assert found.mean("attention_sink_score")[0, :3].tolist() == pytest.approx([0, 1, 1 / 4])
    assert found.mean("first_token_score")[0, 1] == 0


def test_attention_patterns_equal_the_models_own(tiny_model):
    tokens = torch.arange(4, 20)
    result = attention_patterns(tiny_model, tokens, [(1, 2), (0, 0)])
    patterns, _ = patterns_of(tiny_model, tokens[None])
    assert torch.allclose(result.patterns[0], patterns[1][0, 2], atol=1e-7)
    assert torch.allclose(result.patterns[1], patterns[0][0, 0], atol=1e-7)
    _, cache = tiny_model.run_with_cache(tokens[None])
    cached = attention_patterns(tiny_model, tokens, [(1, 2), (0, 0)], cache=cache)
    assert torch.allclose(cached.patterns, result.patterns, atol=1e-7)
    named = attention_patterns(tiny_model, tokens[None], ["L1H2", "0.0"])
    # one row of a batch, with heads by name
    assert_same(named, result)
    _, bare = tiny_model.run_with_cache(tokens[None], remove_batch_dim=True)
    assert_same(attention_patterns(tiny_model, tokens, [(1, 2), (0, 0)], cache=bare), cached)
    with pytest.raises(ValueError, match=r"but the tokens are \(1, 5\)"):
        attention_patterns(tiny_model, tokens[:5], [(0, 0)], cache=cache)


@needs_shared
def test_stories260k_has_previous_token_heads_and_no_induction_head(stories260k):
    result = score_heads(stories260k, RepeatedTokens(batch=15, seeds=(0, 1)))
    assert detect_heads(result, "previous_token_score", 0.75) == ["L3H6", "L1H3"]
    # published as 0.88 and 0.80, from other random draws
    assert float(result.mean("previous_token_score")[3, 6]) == pytest.approx(0.88, abs=0.015)
    assert float(result.mean("previous_token_score")[1, 3]) == pytest.approx(0.80, abs=0.015)
    assert detect_heads(result, "induction_score", 0.1) == []


def test_the_bundled_model_has_the_heads_of_its_model_card(bundled):
    performance = repeated_token_performance(bundled, RepeatedTokens(batch=30, seeds=(0,)))
    assert performance.estimates["second_half_accuracy"][0] >= 0.90
    assert performance.estimates["first_half_accuracy"][0] < 0.01
    result = score_heads(
        bundled, RepeatedTokens(batch=30, seeds=(0,)), ("induction_score", "previous_token_score")
    )
    (layer, head), score = next(result.ranked("induction_score"))
    assert score >= 0.80
    assert score > 10 * float(result.null("induction_score")[layer, head])
    (earlier, previous), score = next(result.ranked("previous_token_score"))
    assert score >= 0.90
    assert score > 10 * float(result.null("previous_token_score")[earlier, previous])
    assert earlier < layer


def golden_scores(model) -> HeadScores:
    return score_heads(model, RepeatedTokens(seq_len=20, batch=2, seeds=(0,)), (*KINDS, *VARIANTS))


def test_both_engines_give_the_same_scores(bundled):
    """The file was written with HookedTransformer 3.9; the suite runs on both engines.

    When the bundled model or a definition changes, rewrite it with MECHLENS_WRITE_GOLDEN=1.
    """
    result = golden_scores(bundled)
    if os.environ.get("MECHLENS_WRITE_GOLDEN"):
        assert result.model.engine == "HookedTransformer"
        GOLDEN.parent.mkdir(exist_ok=True)
        result.save(GOLDEN)
    golden = HeadScores.load(GOLDEN)
    assert golden.model.engine == "HookedTransformer"
    for name, tokens in golden.tokens.items():
        assert torch.equal(tokens, result.tokens[name]), name
    for kind, scores in golden.scores.items():
        assert torch.allclose(scores, result.scores[kind], atol=1e-5, equal_nan=True), kind
        assert torch.allclose(golden.nulls[kind], result.nulls[kind], atol=1e-5, equal_nan=True), kind


def test_default_scores_that_do_not_fit_the_context_are_left_out_with_a_warning(tiny_bos_model):
    with pytest.warns(UserWarning, match="prefix_matching_score is left out: it needs 101 positions"):
        result = score_heads(tiny_bos_model, RepeatedTokens(seq_len=8, batch=2, seeds=(0,)))
    assert "prefix_matching_score" not in result.kinds
    assert "copying_score" in result.kinds
    with pytest.raises(ValueError, match="make 101 positions, but the model's context is 32"):
        score_heads(tiny_bos_model, RepeatedTokens(batch=2, seeds=(0,)), ["prefix_matching_score"])
    jittered = score_heads(tiny_bos_model, RepeatedTokens(seq_len=8, batch=2, seeds=(0,), jitter=3))
    assert "prefix_matching_score" not in jittered.kinds
    with pytest.raises(ValueError, match="prefix_matching_score needs a fixed period"):
        score_heads(tiny_bos_model, RepeatedTokens(jitter=3), ["prefix_matching_score"])


def test_a_model_without_tokenizer_is_scored_on_any_ids(tiny_directory_with_room):
    """A HookedTransformer or bridge that mechlens did not load, without a tokenizer."""
    ours = load_model(tiny_directory_with_room)
    ours.tokenizer = None
    with pytest.warns(UserWarning, match="no tokenizer, so no BOS"):
        result = score_heads(ours, RepeatedTokens(seq_len=9, batch=9, seeds=(0,)), ["previous_token_score"])
    assert not result.prepend_bos
    assert result.tokens["repeated"].max() > 59, "without a tokenizer all ids may be drawn"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: score_heads(m, kinds=["induction"]),
            r"unknown score 'induction' \(did you mean induction_score\?\): choose from",
        ),
        (lambda m: score_heads(m, kinds=[]), "no score selected"),
        (lambda m: score_heads(m, RepeatedTokens(seeds=())), "seeds must be a list of at least one integer"),
        (lambda m: score_heads(m, RepeatedTokens(seeds=(1, 1))), "seeds must be distinct"),
        (
            lambda m: score_heads(m, RepeatedTokens(seq_len=16), ["induction_score"]),
            "the largest seq_len that fits is 15",
        ),
        (lambda m: score_heads(m, RepeatedTokens(seq_len=5, jitter=2), list(VARIANTS)), "use jitter=0"),
        (
            lambda m: repeated_token_performance(m, RepeatedTokens(seq_len=50)),
            "the largest seq_len that fits is 15",
        ),
        (lambda m: score_heads(m, "abc", ("copying_score",)), "unknown score 'copying_score'"),
        (lambda m: score_heads(m, ""), "the text is empty"),
        (
            lambda m: score_heads(m, torch.arange(4, 9), masks={"x": torch.ones(3, 3)}),
            r"the mask 'x' must be \[5, 5\] for this prompt, got \(3, 3\)",
        ),
        (
            lambda m: attention_patterns(m, torch.arange(5), [(2, 0)]),
            "head L2H0 is out of range: the model has layers 0 to 1",
        ),
        (lambda m: attention_patterns(m, torch.arange(5), []), "at least one"),
        (lambda m: attention_patterns(m, torch.ones(2, 5).long(), [(0, 0)]), "need one sequence, got"),
        (lambda m: attention_patterns(m, "abc", ["five"]), "a head is written L5H5, 5.5 or"),
    ],
)
def test_errors_state_what_was_needed_and_given(tiny_bos_model, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_bos_model)


def test_token_strings_are_visible_parts_of_the_text(bundled):
    ids = torch.tensor(bundled.tokenizer("é the", add_special_tokens=False)["input_ids"])
    strings = attention_patterns(bundled, ids, [(0, 0)]).token_strings
    assert "".join(strings).endswith(" the")
    assert "�" not in "".join(strings)


def test_ids_beyond_the_tokenizer_have_names_too(tiny_bos_model):
    patterns = attention_patterns(tiny_bos_model, torch.tensor([5, 63]), [(0, 0)])
    assert patterns.token_strings == (tiny_bos_model.tokenizer.decode([5]), "[63]")


def test_a_sequence_without_repeats_is_left_out_of_the_mean(tiny_bos_model):
    tokens = torch.tensor([[5, 6, 5, 7], [5, 6, 7, 8]])  # the second row repeats nothing
    result = score_heads(tiny_bos_model, tokens, ("induction_score",))
    assert result.scores["induction_score"][0, 1].isnan().all()
    assert_close(result.mean("induction_score"), result.scores["induction_score"][0, 0])
    assert not result.intervals["induction_score"].isnan().any()
