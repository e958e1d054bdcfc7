"""Patching against one whole run per cell, written by hand and by TransformerLens."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch

from mechlens.analyses.patching import (
    Corrupted,
    Earlier,
    Edges,
    Mean,
    NextEmbedding,
    Resampled,
    ablate_heads,
    ablate_mlps_from_first_half,
    grid,
    patch_grid,
)
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import engine_of
from mechlens.models.run.patched_runs import SITES
from mechlens.results import PatchGridResult
from tests.close import assert_close
from tests.reference import patching as reference

LENGTH = 10


def tokens_for(seed=0, rows=1, length=LENGTH):
    return torch.randint(4, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def patch_model(request, load_once, tiny_directories):
    return load_once(tiny_directories / request.param)


def has(model, site):
    return SITES[site].format(0) in model.hook_dict


POSITIONAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@pytest.mark.parametrize("site", POSITIONAL)
def test_the_articles_loop_for_every_site_of_the_stream(patch_model, site):
    if not has(patch_model, site):
        with pytest.raises(ValueError, match=f"this model has no {site}"):
            patch_grid(patch_model, tokens_for(), site=site, source=Earlier(5))
        return
    tokens, read = tokens_for(), range(5, LENGTH - 1)
    found = patch_grid(
        patch_model, tokens, site=site, source=Earlier(5), positions=range(5, LENGTH), read=read
    )
    expected = reference.earlier(patch_model, tokens, SITES[site], range(2), range(5, LENGTH), 5, read)
    # float32 through two layers
    assert torch.allclose(found.mean, expected, atol=2e-5)
    with torch.no_grad():
        clean = reference.loss(patch_model(tokens)[0], tokens[0], read)
    assert float(found.clean[0]) == pytest.approx(clean, abs=2e-5)
    assert torch.allclose(found.effect, expected - clean, atol=4e-5)
    assert found.axes == ("layer", "pos")


@pytest.mark.parametrize("site", ["q", "k", "v", "z"])
def test_heads_one_by_one_and_position_by_position(patch_model, site):
    tokens, other = tokens_for(), tokens_for(1)
    read = range(LENGTH - 1)
    _, cache = reference.cache_of(patch_model, other)
    name = SITES[site]
    n_heads = cache[name.format(0)].shape[2]
    cells = patch_grid(
        patch_model, tokens, site=site, source=Corrupted(other), heads="each", positions=[2, 7]
    )
    whole = patch_grid(patch_model, tokens, site=site, source=Corrupted(other), heads="each", positions=None)
    assert cells.mean.shape == (2, n_heads, 2)
    for layer in range(2):
        there = cache[name.format(layer)][0]
        for head in range(n_heads):
            for at, pos in enumerate((2, 7)):

                def one(activation, there=there, head=head, pos=pos):
                    activation[pos, head] = there[pos, head]

                expected = reference.loss(
                    reference.run(patch_model, tokens, name.format(layer), one), tokens[0], read
                )
                assert float(cells.mean[layer, head, at]) == pytest.approx(expected, abs=2e-5)

            def every(activation, there=there, head=head):
                activation[:, head] = there[:, head]

            expected = reference.loss(
                reference.run(patch_model, tokens, name.format(layer), every), tokens[0], read
            )
            assert float(whole.mean[layer, head]) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("site", ["pattern", "attn_scores"])
def test_what_a_head_attends_to_is_knocked_out(patch_model, site):
    tokens, read = tokens_for(), range(LENGTH - 1)
    found = patch_grid(patch_model, tokens, site=site, source=no_first, heads=[1], positions=[6])
    for layer in range(2):

        def patch(activation):
            activation[1, 6, 0] = -torch.inf if site == "attn_scores" else 0.0

        logits = reference.run(patch_model, tokens, SITES[site].format(layer), patch)
        assert float(found.mean[layer, 0, 0]) == pytest.approx(
            reference.loss(logits, tokens[0], read), abs=2e-5
        )


def no_first(activation, layer):
    """`[dest, head, src]`: without the edge to position 0."""
    activation[..., 0] = 0.0 if (activation >= 0).all() else -torch.inf
    return activation


@pytest.mark.parametrize("site", SITES)
def test_transformer_lens_own_loop(patch_model, site):
    """`patching.generic_activation_patch` calls a metric on whole logits for each cell."""
    from transformer_lens import patching

    if not has(patch_model, site):
        return
    if site == "resid_mid" and engine_of(patch_model) == "TransformerBridge":
        pytest.skip("its hook there is the MLP's input alone: TransformerLens's loop patches that")
    tokens, other = tokens_for(), tokens_for(1)
    _, cache = reference.cache_of(patch_model, other)

    def metric(logits):
        return torch.tensor(reference.loss(logits[0], tokens[0], range(LENGTH - 1)))

    positions = (0, 4, LENGTH - 2)
    by_head = site not in POSITIONAL
    axes, setter = ("layer", "pos"), patching.layer_pos_patch_setter
    if by_head:
        axes, setter = ("layer", "head", "pos"), patching.layer_pos_head_vector_patch_setter
    if site in ("pattern", "attn_scores"):

        def setter(patched, index, clean):
            _, head, dest = index
            patched[:, head, dest] = clean[:, head, dest]
            return patched

    n_heads = cache[SITES["z" if site in ("pattern", "attn_scores") else site].format(0)].shape[2]
    cells = [
        (layer, head, pos)
        for layer in range(patch_model.cfg.n_layers)
        for head in (range(n_heads) if by_head else [0])
        for pos in positions
    ]
    index = pd.DataFrame(cells, columns=["layer", "head", "pos"])[list(axes)]
    if by_head and site not in ("pattern", "attn_scores"):
        # the order in which TransformerLens's setter reads them
        index = index[["layer", "pos", "head"]]
    with torch.no_grad():
        expected = patching.generic_activation_patch(
            patch_model, tokens, cache, metric, patch_setter=setter, activation_name=site, index_df=index
        )
    found = patch_grid(
        patch_model,
        tokens,
        site=site,
        source=Corrupted(other),
        heads="each" if by_head else None,
        positions=positions,
    )
    assert torch.allclose(found.mean.flatten(), expected.float(), atol=2e-5)


@pytest.mark.parametrize("site", ["pattern", "attn_scores"])
def test_single_edges_are_knocked_out(patch_model, site):
    tokens, read = tokens_for(), range(LENGTH - 1)
    edges = [(6, 0), (6, 2), (8, 8)]
    together = patch_grid(patch_model, tokens, site=site, source=Edges(edges), heads=[1], positions=None)
    apart = patch_grid(patch_model, tokens, site=site, source=Edges(edges), heads=[1], positions=[6, 7])
    assert together.source == "without 6 to 0, 6 to 2, 8 to 8"
    for layer in range(2):

        def patch(activation, some):
            for dest, src in some:
                activation[1, dest, src] = -torch.inf if site == "attn_scores" else 0.0

        for found, some in (
            (together.mean[layer, 0], edges),
            (apart.mean[layer, 0, 0], edges[:2]),
            (apart.mean[layer, 0, 1], []),
        ):
            logits = reference.run(
                patch_model, tokens, SITES[site].format(layer), lambda a, some=some: patch(a, some)
            )
            assert float(found) == pytest.approx(reference.loss(logits, tokens[0], read), abs=2e-5)


@pytest.mark.parametrize(
    ("site", "edges", "message"),
    [
        ("z", [(3, 1)], "edges are taken away at pattern or attn_scores, but site is 'z'"),
        ("pattern", [], "Edges needs at least one"),
        ("pattern", [(1, 3)], r"0 <= src <= dest < 10, the prompt's length, but one is \(1, 3\)"),
        ("pattern", [(10, 0)], r"but one is \(10, 0\)"),
        ("attn_scores", [(1, 0), (1, 1)], "position 1 has nothing to share its attention among"),
    ],
)
def test_edges_that_are_none_are_refused(tiny_bos_model, site, edges, message):
    with pytest.raises(ValueError, match=message):
        patch_grid(tiny_bos_model, tokens_for(), site=site, source=Edges(edges))


def test_resid_pre_of_layer_0_is_the_other_tokens_run(patch_model):
    tokens, other = tokens_for(), tokens_for(1)
    found = patch_grid(
        patch_model, tokens, site="resid_pre", source=Corrupted(other), layers=[0], positions=None
    )
    with torch.no_grad():
        expected = reference.loss(patch_model(other)[0], tokens[0], range(LENGTH - 1))
    assert float(found.mean[0]) == pytest.approx(expected, abs=2e-5)
    assert float(found.corrupted[0]) == pytest.approx(expected, abs=2e-5)
    # patched all over, it is the other run: all of the way
    assert float(found.recovered[0]) == pytest.approx(1, abs=1e-3)


def test_a_run_patched_with_itself_is_unchanged(patch_model):
    tokens = tokens_for()
    for site in ("resid_post", "mlp_out", "z", "k", "pattern"):
        found = patch_grid(patch_model, tokens, site=site, source=Corrupted(tokens.clone()))
        # the same sums in another order
        assert found.effect.abs().max() < 1e-5, site


def test_denoising_restores_what_noising_takes_away(patch_model):
    tokens, other = tokens_for(), tokens_for(1)
    options = {"site": "resid_post", "source": Corrupted(other), "positions": None, "layers": [1]}
    noised = patch_grid(patch_model, tokens, **options)
    denoised = patch_grid(patch_model, tokens, direction="denoising", **options)
    assert torch.allclose(noised.mean[0], noised.corrupted[0], atol=2e-5)
    assert torch.allclose(denoised.mean[0], denoised.clean[0], atol=2e-5)
    assert float(denoised.recovered[0]) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(noised.effect, -denoised.effect, atol=4e-5)


def test_each_source_puts_there_what_it_says(tiny_bos_model):
    tokens, reference_tokens = tokens_for(rows=2), tokens_for(5, rows=3)
    name, read = SITES["mlp_out"], range(LENGTH - 1)
    _, cache = reference.cache_of(tiny_bos_model, reference_tokens)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(4)).tolist()
    there = cache[name.format(1)]
    expected = {
        "zero": lambda prompt: torch.zeros(32),
        Mean(reference_tokens): lambda prompt: there[:, 3].mean(0),
        Resampled(reference_tokens, seed=4): lambda prompt: there[order[prompt], 3],
    }
    for source, value in expected.items():
        found = patch_grid(tiny_bos_model, tokens, site="mlp_out", source=source, layers=[1], positions=[3])
        for prompt in range(2):
            one = tokens[prompt : prompt + 1]

            def patch(activation, value=value, prompt=prompt):
                activation[3] = value(prompt)

            own = reference.loss(reference.run(tiny_bos_model, one, name.format(1), patch), one[0], read)
            assert float(found.values[prompt, 0, 0]) == pytest.approx(own, abs=2e-5), source
        assert found.standard_error.isfinite().all()
        assert float(found.effect[0, 0]) == pytest.approx(float((found.values[:, 0, 0] - found.clean).mean()))


def test_the_next_token_is_mixed_in_by_its_weight(tiny_bos_model):
    tokens = tokens_for()
    found = patch_grid(
        tiny_bos_model,
        tokens,
        site="resid_post",
        source=NextEmbedding(),
        weight=0.25,
        layers=[1],
        positions=[4],
    )

    def patch(activation):
        activation[4] = 0.75 * activation[4] + 0.25 * tiny_bos_model.W_E[tokens[0, 5]]

    logits = reference.run(tiny_bos_model, tokens, SITES["resid_post"].format(1), patch)
    expected = reference.loss(logits, tokens[0], range(LENGTH - 1))
    assert float(found.mean[0, 0]) == pytest.approx(expected, abs=2e-5)


def test_each_metric_is_that_of_whole_logits(patch_model):
    tokens, other = tokens_for(), tokens_for(1)
    read, shift = (
        [3, 8],
        {"site": "resid_pre", "source": Corrupted(other), "layers": [1], "positions": [2, 6]},
    )
    targets, against = tokens_for(7), tokens_for(8)
    with torch.no_grad():
        clean = patch_model(tokens)[0].double()
    _, cache = reference.cache_of(patch_model, other)
    there = cache["blocks.1.hook_resid_pre"][0]

    def largest(logits):
        return logits.max() - logits[0].mean()

    kinds = {
        "log_prob": {"targets": targets},
        "logit_diff": {"targets": targets, "against": against},
        "kl": {},
        largest: {},
    }
    for metric, options in kinds.items():
        found = patch_grid(patch_model, tokens, metric=metric, read=read, **options, **shift)
        for at, pos in enumerate((2, 6)):

            def patch(activation, pos=pos):
                activation[pos] = there[pos]

            logits = reference.run(patch_model, tokens, "blocks.1.hook_resid_pre", patch).double()
            log_probs, own = logits.log_softmax(-1), clean.log_softmax(-1)
            if metric == "log_prob":
                expected = sum(log_probs[r, targets[0, r]] for r in read) / 2
            elif metric == "logit_diff":
                expected = sum(logits[r, targets[0, r]] - logits[r, against[0, r]] for r in read) / 2
            elif metric == "kl":
                expected = sum((own[r].exp() * (own[r] - log_probs[r])).sum() for r in read) / 2
            else:
                expected = largest(logits[read])
            # float32 against float64
            assert float(found.mean[0, at]) == pytest.approx(float(expected), abs=5e-5), metric


def test_the_plain_path_gives_the_same(patch_model, monkeypatch):
    tokens, other = tokens_for(), tokens_for(1)
    options = {"site": "attn_out", "source": Corrupted(other)}
    fast = patch_grid(patch_model, tokens, **options)
    assert fast.note == ""
    start = grid.start_sweeps

    def refuse(*given, **options):
        return dataclasses.replace(start(*given, **options), clean=None, why="this model cannot be resumed")

    monkeypatch.setattr(grid, "start_sweeps", refuse)
    plain = patch_grid(patch_model, tokens, **options)
    assert "cannot be resumed" in plain.note
    assert torch.allclose(fast.values, plain.values, atol=2e-5)
    small = patch_grid(patch_model, tokens, token_budget=1, **options)
    assert torch.allclose(fast.values, small.values, atol=2e-5)


def test_the_articles_experiment_by_name(bundled):
    found = ablate_mlps_from_first_half(bundled, seq_len=8)
    n = found.tokens.shape[1]
    read = range(n - 8, n - 1)
    expected = reference.earlier(bundled, found.tokens, SITES["mlp_out"], range(4), range(n - 8, n), 8, read)
    # float32 through four layers, in losses of some nats
    assert torch.allclose(found.mean, expected, atol=1e-4)


def test_induction_heads_show_by_what_their_absence_costs(bundled):
    """L3H5, L3H3 and L3H4 attend to what comes next, and L1H2 tells them where that is."""
    for how in ("zero", "mean", "resample"):
        found = ablate_heads(bundled, how=how, seq_len=20, batch=2)
        order = found.effect.flatten().argsort(descending=True).tolist()
        heads = [(index // 6, index % 6) for index in order[:3]]
        assert (1, 2) in heads, how
        assert found.effect[1, 2] > 1, how


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid"}, "site must be one of resid_pre"),
        ({"layers": [2]}, "layer 2 is out of range"),
        ({"positions": [10]}, "position 10 is out of range"),
        ({"heads": [0]}, "heads are for q, k, v, z"),
        ({"site": "z", "heads": [4]}, "head 4 is out of range"),
        ({"source": "mean"}, "source must be 'zero', Earlier"),
        ({"source": Earlier(10)}, "must be between 1 and 9 for 10 tokens, got 10"),
        ({"source": Corrupted(torch.ones(1, 9, dtype=torch.long))}, "give one sequence of the same length"),
        ({"source": Mean(torch.ones(4, 9, dtype=torch.long))}, "they must be equally long"),
        ({"source": NextEmbedding()}, "an embedding belongs into the residual stream"),
        ({"direction": "denoising"}, "give source=Corrupted"),
        ({"direction": "up"}, "direction must be noising or denoising"),
        ({"metric": "accuracy"}, "metric must be one of loss, log_prob"),
        (
            {"metric": "logit_diff", "targets": 5},
            "logit_diff is the logit of targets less that of against: it needs both",
        ),
        ({"targets": 5}, "targets are for log_prob and logit_diff"),
        ({"read": [9]}, "position 9 is the last: no token follows"),
        ({"metric": lambda logits: logits[0]}, "a metric gives one number"),
    ],
)
def test_errors_come_before_any_run(tiny_bos_model, options, message, monkeypatch):
    def ran(*args, **kwargs):
        raise AssertionError("a run was paid for")

    monkeypatch.setattr(type(tiny_bos_model), "forward", ran)
    with pytest.raises(ValueError, match=message):
        patch_grid(tiny_bos_model, tokens_for(), **{"site": "mlp_out", "source": "zero", **options})


def test_what_a_bridge_does_not_look_at_is_refused(tiny_directories):
    model = load_model(tiny_directories / "gpt_neo")
    if engine_of(model) == "HookedTransformer":
        found = patch_grid(model, tokens_for(), site="pattern", source="zero")
        assert found.effect.abs().max() > 1e-4
        return
    with pytest.raises(ValueError, match="without looking at a changed pattern: patch z or v"):
        patch_grid(model, tokens_for(), site="pattern", source="zero")


def test_a_model_without_mlps_says_so(fixed_distance_model):
    model, seq_len = fixed_distance_model
    with pytest.raises(ValueError, match="this model has no MLPs"):
        patch_grid(model, torch.zeros(1, 2 * seq_len, dtype=torch.long), site="mlp_out", source="zero")


def test_a_grid_makes_a_table_and_comes_back(tiny_bos_model, tmp_path):
    found = patch_grid(
        tiny_bos_model, tokens_for(rows=2), site="z", source="zero", heads="each", positions=None
    )
    assert PatchGridResult.load(found.save(tmp_path / "grid.safetensors")) == found
    table = found.to_dataframe()
    row = table[table.label == "L1H2"].iloc[0]
    assert row["mean"] == pytest.approx(float(found.mean[1, 2]))
    assert row.standard_error == pytest.approx(
        float((found.values - found.clean[:, None, None])[:, 1, 2].std() / 2**0.5)
    )
    one = dataclasses.replace(
        found,
        tokens=found.tokens[:1],
        values=found.values[:1],
        clean=found.clean[:1],
        corrupted=found.corrupted[:1],
    )
    assert one.standard_error.isnan().all()
    assert found.recovered.isnan().all()


@pytest.mark.parametrize("site", ["mlp_out", "k"])
def test_leading_tokens_that_equal_the_padding_token_are_read_like_others(tiny_directories, site):
    """HookedTransformer would mask them where its tokenizer pads on the left."""
    model = load_model(tiny_directories / "gpt2")
    tokens = tokens_for(rows=2)
    tokens[1, :4] = model.tokenizer.pad_token_id
    model.tokenizer.padding_side = "left"
    with pytest.warns(UserWarning, match="row 1 of the prompt begins with 4 padding tokens"):
        found = patch_grid(model, tokens, site=site, source="zero", positions=[5, 8], read=[6, 8])
    model.tokenizer.padding_side = "right"

    def patch(activation, pos):
        activation[pos] = 0.0

    for row in range(2):
        for layer in range(2):
            for at, pos in enumerate((5, 8)):
                logits = reference.run(
                    model, tokens[row : row + 1], SITES[site].format(layer), lambda a, pos=pos: patch(a, pos)
                )
                expected = reference.loss(logits, tokens[row], [6, 8])
                assert float(found.values[row, layer, at]) == pytest.approx(expected, abs=2e-5)


def test_what_follows_is_put_there_as_it_enters_the_stream(tiny_directories):
    """Gemma scales its embeddings, and one engine's `W_E` is not scaled."""
    model, tokens = load_model(tiny_directories / "gemma2"), tokens_for()
    _, cache = reference.cache_of(model, tokens)
    found = patch_grid(model, tokens, site="resid_post", source=NextEmbedding(), layers=[0])
    assert found.positions == tuple(range(LENGTH - 1)), "nothing follows the last"
    for at in (0, 3):

        def patch(activation, at=at):
            activation[at] = cache["hook_embed"][0, at + 1]

        logits = reference.run(model, tokens, SITES["resid_post"].format(0), patch)
        expected = reference.loss(logits, tokens[0], range(LENGTH - 1))
        assert float(found.mean[0, at]) == pytest.approx(expected, abs=2e-5)


def test_positions_that_have_no_source_are_left_out_or_refused(tiny_bos_model):
    found = patch_grid(tiny_bos_model, tokens_for(), site="mlp_out", source=Earlier(6))
    assert found.positions == (6, 7, 8, 9)
    with pytest.raises(ValueError, match="something for positions 6 to 9 only, but asked for are 5, 7"):
        patch_grid(tiny_bos_model, tokens_for(), site="mlp_out", source=Earlier(6), positions=[5, 7])


def test_a_function_that_draws_is_called_once_for_each_prompt_and_layer(tiny_bos_model):
    def run(budget):
        draw = torch.Generator().manual_seed(0)

        def noise(activation, layer):
            return activation + torch.randn(activation.shape, generator=draw)

        return patch_grid(
            tiny_bos_model, tokens_for(rows=2), site="attn_out", source=noise, layers=[0], token_budget=budget
        )

    # the same sums in other groups
    assert torch.allclose(run(None).values, run(12).values, atol=2e-5)


def test_each_prompt_has_its_own_answer(tiny_bos_model):
    tokens = tokens_for(rows=2)
    options = {"site": "z", "source": "zero", "heads": "each", "positions": None, "metric": "logit_diff"}
    whole = {"targets": torch.tensor([[7], [9]]).expand(2, LENGTH), "against": 5}
    expected = patch_grid(tiny_bos_model, tokens, **options, **whole)
    for targets in (torch.tensor([7, 9]), torch.tensor([[7], [9]]), [7, 9]):
        found = patch_grid(tiny_bos_model, tokens, **options, targets=targets, against=5)
        assert_close(found.values, expected.values)
    assert found.about == ""
    assert found.given["targets"].tolist() == [[7], [9]]
    same = patch_grid(tiny_bos_model, tokens, **options, targets=7, against=5)
    names = tiny_bos_model.tokenizer.batch_decode([[7], [5]])
    assert same.about == f"{names[0]!r} less {names[1]!r}"


def test_texts_are_a_batch_where_they_are_equally_long(tiny_bos_model):
    options = {"site": "z", "source": Corrupted(["b a", "b b"]), "heads": "each", "positions": None}
    found = patch_grid(tiny_bos_model, ["a b", "a a"], **options)
    alone = patch_grid(tiny_bos_model, "a a", **(options | {"source": Corrupted("b b")}))
    assert torch.allclose(found.values[1], alone.values[0], atol=2e-5)
    without = patch_grid(tiny_bos_model, "a a", **(options | {"source": Corrupted("b b")}), prepend_bos=False)
    assert without.given["corrupted"].shape == without.tokens.shape
    assert without.tokens.shape[1] == alone.tokens.shape[1] - 1
    with pytest.raises(ValueError, match="must have equally many tokens, but here are"):
        patch_grid(tiny_bos_model, ["a b", "a a a a a"], **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positions": "last"}, ValueError, "positions must be 'each', numbers, or None"),
        ({"site": "z", "heads": "L1H2"}, ValueError, "heads must be 'each', numbers, or None"),
        ({"source": lambda a, layer: a[:2]}, ValueError, r"\(10, 32\) at mlp_out, but this gives a tensor"),
        ({"source": lambda a, layer: None}, ValueError, "but this gives None"),
        ({"weight": float("nan")}, ValueError, "weight must be a finite number, got nan"),
        ({"site": "attn_scores", "weight": 0.5}, ValueError, "cannot be mixed in with weight 0.5"),
        ({"token_budget": 0}, ValueError, "token_budget must be at least 1"),
        ({"metric": "log_prob", "targets": 64}, ValueError, "token id 64 is not in"),
        (
            {"metric": "log_prob", "targets": torch.full((1, LENGTH), -1)},
            ValueError,
            "in the vocabulary of 64, but lie between -1 and -1",
        ),
    ],
)
def test_what_is_meant_otherwise_is_refused(tiny_bos_model, options, error, message):
    with pytest.raises(error, match=message):
        patch_grid(tiny_bos_model, tokens_for(), **({"site": "mlp_out", "source": "zero"} | options))
