"""Patching compared with one full run per cell, by hand and with TransformerLens."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch

from mechlens.analyses.patching import (
    KL,
    Earlier,
    Edges,
    LogitDiff,
    LogitFunction,
    LogProb,
    Loss,
    Mean,
    NextEmbedding,
    Patching,
    Resampled,
    ablate_heads,
    ablate_mlps,
    grid,
)
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import engine_of
from mechlens.models.run import patched_runs
from mechlens.models.run.sites import SITES
from mechlens.results import PatchGridResult
from mechlens.text.prompts import RepeatedTokens
from tests.close import assert_close
from tests.counting import positions_run
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
            Patching(patch_model, tokens_for()).grid(site, values=Earlier(5))
        pytest.skip(f"no {site} here")
    tokens, read = tokens_for(), range(5, LENGTH - 1)
    found = Patching(patch_model, tokens, metric=Loss(at=read)).grid(site, values=Earlier(5))
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
    experiment = Patching(patch_model, tokens, other)
    cells = experiment.grid(site, into="clean", over=("layer", "head", "pos"), positions=[2, 7])
    whole = experiment.grid(site, into="clean", over=("layer", "head"))
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


@pytest.mark.parametrize("site", ["z", "k", "pattern", "mlp_out"])
@pytest.mark.parametrize("into", ["clean", "corrupted"])
def test_runs_begin_at_the_first_token_that_differs(patch_model, site, into, monkeypatch):
    """Before it both runs are the same, and what is patched is the run's own value."""
    if not has(patch_model, site):
        pytest.skip(f"no {site} here")
    clean, shared = tokens_for(), 6
    corrupted = torch.cat([clean[:, :shared], tokens_for(1)[:, shared:]], 1)
    assert bool(clean[0, shared] != corrupted[0, shared])
    experiment = Patching(patch_model, clean, corrupted)
    with monkeypatch.context() as patch:
        begun = []
        groups = patched_runs._groups

        def noted(*given, **options):
            for start, which in groups(*given, **options):
                begun.append(start)
                yield start, which

        patch.setattr(patched_runs, "_groups", noted)
        found = experiment.grid(site, into=into, over=("layer",))
    assert set(begun) == {shared}
    own, other = (clean, corrupted) if into == "clean" else (corrupted, clean)
    _, cache = reference.cache_of(patch_model, other)
    for layer in range(2):
        name = SITES[site].format(layer)

        def patch(activation, there=cache[name][0]):
            activation[:] = there

        expected = reference.loss(reference.run(patch_model, own, name, patch), clean[0], range(LENGTH - 1))
        assert float(found.mean[layer]) == pytest.approx(expected, abs=2e-5)
    same = Patching(patch_model, clean, clean).grid(site, into=into, over=("layer",))
    assert same.effect.tolist() == [0, 0]


@pytest.mark.parametrize("site", ["pattern", "attn_scores"])
def test_attention_scores_are_knocked_out(patch_model, site):
    tokens, read = tokens_for(), range(LENGTH - 1)
    found = Patching(patch_model, tokens).grid(
        site, values=no_first, over=("layer", "head", "pos"), heads=["L0H1", "L1H1"], positions=[6]
    )
    for layer in range(2):

        def patch(activation):
            activation[1, 6, 0] = -torch.inf if site == "attn_scores" else 0.0

        logits = reference.run(patch_model, tokens, SITES[site].format(layer), patch)
        assert float(found.mean[layer, 0, 0]) == pytest.approx(
            reference.loss(logits, tokens[0], read), abs=2e-5
        )


def no_first(activation, layer):
    """`[dest, head, src]`: scores without the edge to position 0."""
    activation[..., 0] = 0.0 if (activation >= 0).all() else -torch.inf
    return activation


@pytest.mark.parametrize("site", SITES)
def test_transformer_lens_own_loop(patch_model, site):
    """`patching.generic_activation_patch` calls a metric on full logits for each cell."""
    from transformer_lens import patching

    if not has(patch_model, site):
        pytest.skip(f"no {site} here")
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
        # the order that TransformerLens's setter expects
        index = index[["layer", "pos", "head"]]
    with torch.no_grad():
        expected = patching.generic_activation_patch(
            patch_model, tokens, cache, metric, patch_setter=setter, activation_name=site, index_df=index
        )
    over = ("layer", "head", "pos") if by_head else ("layer", "pos")
    found = Patching(patch_model, tokens, other).grid(site, into="clean", over=over, positions=positions)
    assert torch.allclose(found.mean.flatten(), expected.float(), atol=2e-5)


@pytest.mark.parametrize("site", ["pattern", "attn_scores"])
def test_single_edges_are_knocked_out(patch_model, site):
    tokens, read = tokens_for(), range(LENGTH - 1)
    edges = [(6, 0), (6, 2), (8, 8)]
    experiment, heads = Patching(patch_model, tokens), [(0, 1), (1, 1)]
    together = experiment.grid(site, values=Edges(edges), over=("layer", "head"), heads=heads)
    apart = experiment.grid(
        site, values=Edges(edges), over=("layer", "head", "pos"), heads=heads, positions=[6, 7]
    )
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
        ("z", [(3, 1)], "Edges is for the sites pattern and attn_scores, but site is 'z'"),
        ("pattern", [], "Edges needs at least one"),
        ("pattern", [(1, 3)], r"the edge \(1, 3\) is out of range"),
        ("pattern", [(10, 0)], r"the edge \(10, 0\) is out of range"),
        ("attn_scores", [(1, 0), (1, 1)], "position 1 attends to nothing"),
    ],
)
def test_invalid_edges_are_refused(tiny_bos_model, site, edges, message):
    with pytest.raises(ValueError, match=message):
        Patching(tiny_bos_model, tokens_for()).grid(site, values=Edges(edges))


def test_patching_resid_pre_of_layer_0_gives_the_other_run(patch_model):
    tokens, other = tokens_for(), tokens_for(1)
    found = Patching(patch_model, tokens, other).grid("resid_pre", over="layer", into="clean", layers=[0])
    with torch.no_grad():
        expected = reference.loss(patch_model(other)[0], tokens[0], range(LENGTH - 1))
    assert float(found.mean[0]) == pytest.approx(expected, abs=2e-5)
    assert float(found.corrupted[0]) == pytest.approx(expected, abs=2e-5)
    # patched everywhere, it is the other run: everything is recovered
    assert float(found.recovered[0]) == pytest.approx(1, abs=1e-3)


def test_a_run_patched_with_itself_is_unchanged(patch_model):
    tokens = tokens_for()
    for site in ("resid_post", "mlp_out", "z", "k", "pattern"):
        found = Patching(patch_model, tokens, tokens.clone()).grid(site)
        # the same sums in a different order
        assert found.effect.abs().max() < 1e-5, site


def test_denoising_mirrors_noising(patch_model):
    tokens, other = tokens_for(), tokens_for(1)
    experiment = Patching(patch_model, tokens, other)
    noised = experiment.grid("resid_post", over="layer", layers=[1], into="clean")
    denoised = experiment.grid("resid_post", over="layer", layers=[1])
    assert denoised.into == "corrupted", "the default where there is a corrupted run"
    assert torch.allclose(noised.mean[0], noised.corrupted[0], atol=2e-5)
    assert torch.allclose(denoised.mean[0], denoised.clean[0], atol=2e-5)
    assert float(denoised.recovered[0]) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(noised.effect, -denoised.effect, atol=4e-5)


def test_each_source_of_values_is_as_documented(tiny_bos_model):
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
        found = Patching(tiny_bos_model, tokens).grid("mlp_out", values=source, layers=[1], positions=[3])
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
    found = Patching(tiny_bos_model, tokens).grid(
        "resid_post", values=NextEmbedding(), weight=0.25, layers=[1], positions=[4]
    )

    def patch(activation):
        activation[4] = 0.75 * activation[4] + 0.25 * tiny_bos_model.W_E[tokens[0, 5]]

    logits = reference.run(tiny_bos_model, tokens, SITES["resid_post"].format(1), patch)
    expected = reference.loss(logits, tokens[0], range(LENGTH - 1))
    assert float(found.mean[0, 0]) == pytest.approx(expected, abs=2e-5)


def test_each_metric_matches_full_logits(patch_model):
    tokens, other = tokens_for(), tokens_for(1)
    read = [3, 8]
    targets, against = tokens_for(7), tokens_for(8)
    with torch.no_grad():
        clean = patch_model(tokens)[0].double()
    _, cache = reference.cache_of(patch_model, other)
    there = cache["blocks.1.hook_resid_pre"][0]

    def largest(logits):
        return logits.max() - logits[0].mean()

    kinds = {
        "log_prob": LogProb(targets, at=read),
        "logit_diff": LogitDiff(targets, against, at=read),
        "kl": KL(at=read),
        "largest": LogitFunction(largest, at=read),
    }
    for kind, metric in kinds.items():
        found = Patching(patch_model, tokens, other, metric=metric).grid(
            "resid_pre", into="clean", layers=[1], positions=[2, 6]
        )
        assert found.metric == kind
        for at, pos in enumerate((2, 6)):

            def patch(activation, pos=pos):
                activation[pos] = there[pos]

            logits = reference.run(patch_model, tokens, "blocks.1.hook_resid_pre", patch).double()
            log_probs, own = logits.log_softmax(-1), clean.log_softmax(-1)
            if kind == "log_prob":
                expected = sum(log_probs[r, targets[0, r]] for r in read) / 2
            elif kind == "logit_diff":
                expected = sum(logits[r, targets[0, r]] - logits[r, against[0, r]] for r in read) / 2
            elif kind == "kl":
                expected = sum((own[r].exp() * (own[r] - log_probs[r])).sum() for r in read) / 2
            else:
                expected = largest(logits[read])
            # float32 against float64
            assert float(found.mean[0, at]) == pytest.approx(float(expected), abs=5e-5), kind


def test_the_plain_path_gives_the_same(patch_model, monkeypatch):
    tokens, other = tokens_for(), tokens_for(1)
    fast = Patching(patch_model, tokens, other).grid("attn_out")
    assert fast.note == ""
    start = grid.PatchedRuns.of

    def refuse(*given, **options):
        return dataclasses.replace(start(*given, **options), start=None, why="this model cannot be resumed")

    monkeypatch.setattr(grid.PatchedRuns, "of", refuse)
    plain = Patching(patch_model, tokens, other).grid("attn_out")
    assert "cannot be resumed" in plain.note
    assert torch.allclose(fast.values, plain.values, atol=2e-5)
    small = Patching(patch_model, tokens, other, token_budget=1).grid("attn_out")
    assert torch.allclose(fast.values, small.values, atol=2e-5)


def test_the_articles_experiment_can_be_run_by_name(bundled):
    found = ablate_mlps(bundled, on=RepeatedTokens(8, batch=1, seeds=[0]))
    n = found.tokens.shape[1]
    read = range(n - 8, n - 1)
    expected = reference.earlier(bundled, found.tokens, SITES["mlp_out"], range(4), range(n - 8, n), 8, read)
    # float32 through four layers, in losses of a few nats
    assert torch.allclose(found.mean, expected, atol=1e-4)


def test_ablating_induction_heads_raises_the_loss(bundled):
    """L3H5, L3H3 and L3H4 are induction heads, and L1H2 is their previous-token head."""
    for how in ("zero", "mean", "resample"):
        found = ablate_heads(bundled, how, on=RepeatedTokens(20, batch=2, seeds=[0]))
        order = found.effect.flatten().argsort(descending=True).tolist()
        heads = [(index // 6, index % 6) for index in order[:3]]
        assert (1, 2) in heads, how
        assert found.effect[1, 2] > 1, how


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid"}, "site must be one of resid_pre"),
        ({"layers": [2]}, "layer 2"),
        ({"positions": [10]}, "position 10"),
        ({"heads": ["L0H0"]}, "heads are for the sites q, k, v, z"),
        ({"over": ("layer", "head")}, "heads are for the sites q, k, v, z"),
        ({"over": "batch"}, "batch"),
        ({"site": "z", "over": "head"}, "'head' without 'layer'"),
        ({"site": "z", "heads": [(0, 4)]}, "head 4"),
        ({"site": "z", "heads": ["L0H1", (0, 1)]}, "several different heads, got L0H1, L0H1"),
        ({"site": "z", "heads": ["L0H1"], "layers": [0]}, "leave out layers"),
        ({"values": "mean"}, "values must be 'zero', Earlier"),
        ({"values": None}, "without a corrupted run, values must say"),
        ({"values": Earlier(10)}, r"Earlier\(10\) is out of range"),
        ({"values": Earlier(6), "positions": [5, 7]}, "values for positions 6 to 9"),
        ({"values": Mean(torch.ones(4, 9, dtype=torch.long))}, "as long as the prompt, 10 tokens"),
        ({"values": NextEmbedding()}, "for the residual stream"),
        ({"into": "corrupted"}, "needs a corrupted run"),
        ({"into": "up"}, "into must be 'clean' or 'corrupted'"),
        ({"weight": float("nan")}, "weight must be a finite number, got nan"),
        ({"site": "attn_scores", "weight": 0.5}, "cannot be mixed in with weight 0.5"),
        ({"metric": Loss(at=[9])}, "position 9 is the last, and no token follows it"),
        ({"metric": LogProb()}, "give a target"),
        ({"metric": LogProb(64)}, "token id 64 is not in"),
        ({"metric": LogProb(torch.full((1, LENGTH), -1))}, "target is out of range"),
        ({"metric": lambda logits: logits[0]}, "a metric must return one number"),
        ({"corrupted": torch.ones(1, 9, dtype=torch.long)}, "give one sequence of the same length"),
        ({"token_budget": 0}, "token_budget must be at least 1"),
    ],
)
def test_errors_come_before_any_run(tiny_bos_model, options, message, monkeypatch):
    def ran(*args, **kwargs):
        raise AssertionError("a run was paid for")

    monkeypatch.setattr(type(tiny_bos_model), "forward", ran)
    about = {name: options.pop(name) for name in ("metric", "token_budget", "corrupted") if name in options}
    with pytest.raises((TypeError, ValueError), match=message):
        Patching(tiny_bos_model, tokens_for(), **about).grid(
            **{"site": "mlp_out", "values": "zero", **options}
        )


def test_sites_that_a_bridge_ignores_are_refused(tiny_directories):
    model = load_model(tiny_directories / "gpt_neo")
    if engine_of(model) == "HookedTransformer":
        found = Patching(model, tokens_for()).grid("pattern", values="zero")
        assert found.effect.abs().max() > 1e-4
        return
    with pytest.raises(ValueError, match="ignores patches of pattern: patch z or v"):
        Patching(model, tokens_for()).grid("pattern", values="zero")


def test_a_model_without_mlps_is_named_in_the_error(fixed_distance_model):
    model, seq_len = fixed_distance_model
    with pytest.raises(ValueError, match="this model has no MLPs"):
        Patching(model, torch.zeros(1, 2 * seq_len, dtype=torch.long)).grid("mlp_out", values="zero")


def test_a_grid_makes_a_table_and_can_be_saved(tiny_bos_model, tmp_path):
    found = Patching(tiny_bos_model, tokens_for(rows=2)).grid("z", values="zero", over=("layer", "head"))
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
def test_leading_padding_tokens_are_read_like_others(tiny_directories, site):
    """HookedTransformer would mask them if its tokenizer pads on the left."""
    model = load_model(tiny_directories / "gpt2")
    tokens = tokens_for(rows=2)
    tokens[1, :4] = model.tokenizer.pad_token_id
    model.tokenizer.padding_side = "left"
    with pytest.warns(UserWarning, match="row 1 of the prompt begins with 4 padding tokens"):
        found = Patching(model, tokens, metric=Loss(at=[6, 8])).grid(site, values="zero", positions=[5, 8])
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


def test_the_next_embedding_is_patched_in_as_it_enters_the_stream(tiny_directories):
    """Gemma scales its embeddings, but one engine's `W_E` is not scaled."""
    model, tokens = load_model(tiny_directories / "gemma2"), tokens_for()
    _, cache = reference.cache_of(model, tokens)
    found = Patching(model, tokens).grid("resid_post", values=NextEmbedding(), layers=[0])
    assert found.positions == tuple(range(LENGTH - 1)), "nothing follows the last"
    for at in (0, 3):

        def patch(activation, at=at):
            activation[at] = cache["hook_embed"][0, at + 1]

        logits = reference.run(model, tokens, SITES["resid_post"].format(0), patch)
        expected = reference.loss(logits, tokens[0], range(LENGTH - 1))
        assert float(found.mean[0, at]) == pytest.approx(expected, abs=2e-5)


def test_positions_without_values_are_left_out(tiny_bos_model):
    found = Patching(tiny_bos_model, tokens_for()).grid("mlp_out", values=Earlier(6))
    assert found.positions == (6, 7, 8, 9)


def test_a_random_function_is_called_once_per_prompt_and_layer(tiny_bos_model):
    def run(budget):
        draw = torch.Generator().manual_seed(0)

        def noise(activation, layer):
            return activation + torch.randn(activation.shape, generator=draw)

        experiment = Patching(tiny_bos_model, tokens_for(rows=2), token_budget=budget)
        return experiment.grid("attn_out", values=noise, layers=[0])

    # the same sums in other groups
    assert torch.allclose(run(None).values, run(12).values, atol=2e-5)


def test_each_prompt_has_its_own_answer(tiny_bos_model):
    def found(target):
        experiment = Patching(tiny_bos_model, tokens_for(rows=2), metric=LogitDiff(target, 5))
        return experiment.grid("z", values="zero", over=("layer", "head"))

    expected = found(torch.tensor([[7], [9]]).expand(2, LENGTH))
    for target in (torch.tensor([7, 9]), torch.tensor([[7], [9]]), [7, 9]):
        assert_close(found(target).values, expected.values)
    assert expected.about == ""
    assert expected.given["target"].tolist() == [[7], [9]]
    names = tiny_bos_model.tokenizer.batch_decode([[7], [5]])
    assert found(7).about == f"{names[0]!r} less {names[1]!r}"


def test_equally_long_texts_form_a_batch(tiny_bos_model):
    def found(clean, corrupted, **options):
        experiment = Patching(tiny_bos_model, clean, corrupted, **options)
        return experiment.grid("z", over=("layer", "head"), into="clean")

    both, alone = found(["a b", "a a"], ["b a", "b b"]), found("a a", "b b")
    assert torch.allclose(both.values[1], alone.values[0], atol=2e-5)
    without = found("a a", "b b", prepend_bos=False)
    assert without.given["corrupted"].shape == without.tokens.shape
    assert without.tokens.shape[1] == alone.tokens.shape[1] - 1
    with pytest.raises(ValueError, match="must have the same number of tokens, got"):
        found(["a b", "a a a a a"], "b a")


def test_a_function_must_return_the_shape_that_it_is_given(tiny_bos_model):
    for wrong, shown in ((lambda a, layer: a[:2], r"a tensor \(2, 32\)"), (lambda a, layer: None, "None")):
        with pytest.raises(ValueError, match=rf"\(10, 32\) at mlp_out.*returned {shown}"):
            Patching(tiny_bos_model, tokens_for()).grid("mlp_out", values=wrong)


def together(model, tokens, other, cells):
    """The loss of a run with z at some (layer, head, position) from the other run."""
    _, cache = reference.cache_of(model, other)

    def patch(activation, hook):
        for layer, head, pos in cells:
            if hook.name.startswith(f"blocks.{layer}."):
                activation[0, pos, head] = cache[hook.name][0, pos, head]
        return activation

    hooks = [(SITES["z"].format(layer), patch) for layer in {layer for layer, _, _ in cells}]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return reference.loss(logits[0], tokens[0], range(LENGTH - 1))


def test_axes_outside_over_are_patched_together(patch_model):
    """Axes outside `over`, and selections along them."""
    tokens, other = tokens_for(), tokens_for(1)
    experiment = Patching(patch_model, tokens, other)
    all_at, layers = range(LENGTH), (0, 1)
    every = [(layer, head, pos) for layer in layers for head in range(4) for pos in all_at]
    two = [(layer, head, pos) for layer, head in ((0, 1), (1, 2)) for pos in all_at]
    few = [(1, head, pos) for head in (0, 3) for pos in (2, 5)]
    for over, chosen, cells in (
        ((), {}, {(): every}),
        ((), {"heads": ["L0H1", "1.2"]}, {(): two}),
        ("layer", {"heads": [(1, 0), (1, 3)], "positions": [2, 5]}, {(0,): few}),
        ("pos", {"positions": [3, 8]}, {(1,): [cell for cell in every if cell[2] == 8]}),
        (("layer", "head"), {"positions": [4]}, {(1, 2): [(1, 2, 4)]}),
    ):
        found = experiment.grid("z", over=over, into="clean", **chosen)
        for index, some in cells.items():
            assert float(found.mean[index]) == pytest.approx(
                together(patch_model, tokens, other, some), abs=2e-5
            )


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "k"])
def test_layers_are_patched_together_at_any_site(patch_model, site):
    tokens, other = tokens_for(), tokens_for(1)
    found = Patching(patch_model, tokens, other).grid(site, over="pos", into="clean", positions=[3])
    _, cache = reference.cache_of(patch_model, other)

    def patch(activation, hook):
        activation[:, 3] = cache[hook.name][:, 3]
        return activation

    with torch.no_grad():
        logits = patch_model.run_with_hooks(
            tokens, fwd_hooks=[(SITES[site].format(layer), patch) for layer in (0, 1)]
        )
    expected = reference.loss(logits[0], tokens[0], range(LENGTH - 1))
    assert float(found.mean[0]) == pytest.approx(expected, abs=2e-5)


def test_a_grid_of_any_heads_runs_only_their_cells(tiny_bos_model):
    def run(**options):
        calls = []
        experiment = Patching(
            tiny_bos_model, tokens_for(), metric=lambda logits: calls.append(1) or logits.max()
        )
        return experiment.grid("z", values="zero", over=("layer", "head"), **options), len(calls)

    (whole, all_calls), (some, calls) = run(), run(heads=["L0H3", "L1H2"])
    assert some.effect.shape == (2, 2)
    assert some.effect.isnan().tolist() == [[True, False], [False, True]]
    assert torch.allclose(some.effect[0, 1], whole.effect[0, 3], atol=1e-6)
    assert list(some.to_dataframe().label) == ["L0H3", "L1H2"]
    assert all_calls - calls == 6, "8 heads, of which 2 are asked for"


@pytest.mark.parametrize("corrupted", [None, tokens_for(1, rows=2)])
def test_every_sweep_runs_each_prompt_and_its_counterpart_once(tiny_bos_model, corrupted):
    """Counted in embedded positions: 2 prompts of 10 tokens, after checks on 8 of them."""
    experiment = Patching(tiny_bos_model, tokens_for(rows=2), corrupted)
    options = {"into": "clean", "values": "zero" if corrupted is None else None, "positions": [9]}
    hooked = engine_of(tiny_bos_model) == "HookedTransformer"
    clean, logits, adds_up = 2 * LENGTH * (1 if corrupted is None else 2), 2 * 8, 8
    # a bridge also embeds resumed runs: a test of two rows of 5 positions, or three runs of a path
    for work, expected in (
        (lambda: experiment.grid("z", **options), clean + logits + (0 if hooked else 2 * 2 * 5)),
        (lambda: experiment.attribution("z", **options), clean + logits),
        (
            lambda: experiment.path("L0H1", "L1H2.k", **options),
            clean + logits + adds_up + (0 if hooked else 3 * 2 * LENGTH),
        ),
    ):
        assert positions_run(tiny_bos_model, ["hook_embed"], work) == {"hook_embed": expected}
