"""Patching sweeps compared with one full run per patch."""

from __future__ import annotations

import pytest
import torch

from mechlens.models.protocol import engine_of
from mechlens.models.run import patched_runs
from mechlens.models.run.forward import watch_from
from mechlens.models.run.patched_runs import PatchedRuns, Patches, patterns_count
from mechlens.models.run.sites import ATTENTION, SITES

LENGTH = 11


def is_safe(model, tokens):
    return PatchedRuns.of(model, tokens, "resid_pre").start is not None


def sweep(model, tokens, patches, last_read=None, **options):
    return PatchedRuns.of(model, tokens, patches.site, last_read=last_read).run(patches, **options)


def tokens_for(seed=0, length=LENGTH):
    return torch.randint(4, 50, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gpt2", "gpt_neo", "gpt_neox", "llama", "gemma2"])
def sweep_model(request, load_once, tiny_directories):
    return load_once(tiny_directories / request.param)


def available(model, site):
    if site == "resid_mid":
        return SITES[site].format(0) in model.hook_dict
    return patterns_count(model) or site not in ATTENTION


def literal(model, tokens, site, layer, write, index):
    """The last residual of one full run with one hook."""
    kept, changes = [], []

    def patch(activation, hook):
        patched = write(activation.clone(), torch.tensor([index]), 0, layer)
        changes.append(patched - activation)
        return patched

    hooks = [(SITES[site].format(layer), patch)]
    if site == "resid_mid" and engine_of(model) == "TransformerBridge":
        # its hook affects only the MLP's input
        hooks.append((f"blocks.{layer}.hook_resid_post", lambda a, hook: a + changes[0]))
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, (last, lambda a, hook: kept.append(a.clone()))])
    return kept.pop()[0]


def patches_for(model, site, end, seed=1):
    """Random values for every layer and some positions; for patterns, an edge knocked out."""
    cells = [(layer, pos) for pos in (0, 3, 4, end - 1) for layer in range(model.cfg.n_layers)]
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(len(cells), 64, generator=draw)

    def write(activation, which, start, layer):
        for row, index in enumerate(which.tolist()):
            pos = cells[index][1] - start
            if site in ATTENTION:
                activation[row, 1, pos, 0] = 0.25
            else:
                one = activation[row, pos]
                one += values[index].flatten()[: one.shape[-1]]
        return activation

    layers, firsts = (torch.tensor(column) for column in zip(*cells, strict=True))
    return Patches(site, layers, firsts, write)


@pytest.mark.parametrize("site", SITES)
def test_every_row_matches_a_full_run(sweep_model, site):
    if not available(sweep_model, site):
        pytest.skip(f"{site} cannot be patched here")
    tokens = tokens_for()
    patches = patches_for(sweep_model, site, LENGTH)
    expected = [
        literal(sweep_model, tokens, site, int(layer), patches.write, index)
        for index, layer in enumerate(patches.layer)
    ]
    # one row at a time, some, and all
    for budget in (1, 40, 100000):
        seen = []
        for part in sweep(sweep_model, tokens, patches, token_budget=budget):
            for index, final in zip(part.which.tolist(), part.final, strict=True):
                own = expected[index]
                # the same sums in a different order, through several layers
                assert (final - own[part.start :]).abs().max() < 1e-5 * own.abs().max()
                seen.append(index)
        assert sorted(seen) == list(range(len(patches)))


def test_the_fast_path_is_taken_where_it_is_safe(sweep_model):
    assert is_safe(sweep_model, tokens_for())
    assert not is_safe(sweep_model, tokens_for(length=1))


def test_a_model_without_a_tokenizer_can_be_patched(fixed_distance_model):
    model, _ = fixed_distance_model
    tokens = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    # the bridge of a non-Hugging Face model takes no past keys, so its runs are full
    assert is_safe(model, tokens) is (engine_of(model) == "HookedTransformer")

    def write(activation, which, start, layer):
        activation[:, 5 - start] += 1
        return activation

    patches = Patches("resid_pre", torch.tensor([0]), torch.tensor([5]), write)
    (part,) = sweep(model, tokens, patches)
    expected = literal(model, tokens, "resid_pre", 0, write, 0)
    # exact numbers: a handwritten model
    assert torch.allclose(part.final[0], expected[part.start :], atol=1e-6)


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")  # it is tested here
def test_blocks_with_further_inputs_are_not_called_one_by_one(tiny_bos_model):
    """Shortformer also gives each block the positions; without them it runs, but with wrong results."""
    if engine_of(tiny_bos_model) != "HookedTransformer":
        pytest.skip("a bridge's blocks are never called one by one")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=16,
            d_head=8,
            n_heads=2,
            n_ctx=16,
            d_vocab=64,
            attn_only=True,
            normalization_type="LN",
            positional_embedding_type="shortformer",
            device="cpu",
        )
    )
    torch.nn.init.normal_(model.pos_embed.W_pos)
    tokens = tokens_for()
    assert not is_safe(model, tokens)
    with pytest.raises(ValueError, match="cannot start at a middle layer"):
        watch_from(model, 1, torch.zeros(1, LENGTH, 16), {"blocks.1.hook_resid_post": print})
    patches = patches_for(model, "resid_post", LENGTH)
    for part in sweep(model, tokens, patches):
        for index, final in zip(part.which.tolist(), part.final, strict=True):
            own = literal(model, tokens, "resid_post", int(patches.layer[index]), patches.write, index)
            # the same sums in rows of another batch
            assert (final - own[part.start :]).abs().max() < 1e-5 * own.abs().max()


def test_nothing_before_a_patch_is_run(tiny_bos_model, monkeypatch):
    """Counted in positions x layers, on the engine that can call single blocks."""
    if engine_of(tiny_bos_model) != "HookedTransformer":
        pytest.skip("a bridge runs all layers")
    tokens = tokens_for()
    patches = patches_for(tiny_bos_model, "mlp_out", LENGTH)
    run = 0
    block = type(tiny_bos_model.blocks[0])
    forward = block.forward

    def counted(self, resid_pre, *args, **options):
        nonlocal run
        run += resid_pre.shape[0] * resid_pre.shape[1]
        return forward(self, resid_pre, *args, **options)

    monkeypatch.setattr(patched_runs, "SATURATED_POSITIONS", 1)
    runs = PatchedRuns.of(tiny_bos_model, tokens, "mlp_out")
    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", counted)
        list(runs.run(patches))
    # rows patched in layer 0 run through layer 1, each from its position on
    assert run == sum(LENGTH - pos for pos in (0, 3, 4, LENGTH - 1))


def test_nothing_after_the_last_reader_is_run(sweep_model):
    tokens = tokens_for()
    patches = patches_for(sweep_model, "resid_pre", 6)
    short = {
        index: final
        for part in sweep(sweep_model, tokens, patches, last_read=5)
        for index, final in zip(part.which.tolist(), part.final, strict=True)
    }
    for part in sweep(sweep_model, tokens, patches):
        for index, final in zip(part.which.tolist(), part.final, strict=True):
            whole = final[: LENGTH - part.start - (LENGTH - 6)]
            assert (short[index][-len(whole) :] - whole).abs().max() < 1e-5 * whole.abs().max()


def test_batches_that_do_not_fit_are_halved(sweep_model):
    """Memory for only three rows; every patch still runs once, with the same values."""
    tokens = tokens_for()
    patches = patches_for(sweep_model, "mlp_out", LENGTH)
    tried = []

    def narrow(activation, which, start, layer):
        tried.append(len(which))
        if len(which) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return patches.write(activation, which, start, layer)

    narrowed = Patches(patches.site, patches.layer, patches.first, narrow)
    whole = {
        index: final
        for part in sweep(sweep_model, tokens, patches)
        for index, final in zip(part.which.tolist(), part.final, strict=True)
    }
    seen = []
    for part in sweep(sweep_model, tokens, narrowed):
        for index, final in zip(part.which.tolist(), part.final, strict=True):
            # a group begins at its first position, and so do its halves
            assert (final - whole[index][-len(final) :]).abs().max() < 1e-5 * final.abs().max()
            seen.append(index)
    assert sorted(seen) == list(range(len(patches)))
    assert max(tried) > 3, "memory did run out"
    assert not any(point.fwd_hooks for point in sweep_model.hook_dict.values())

    def nothing(activation, which, start, layer):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(sweep(sweep_model, tokens, Patches("mlp_out", torch.tensor([0]), torch.tensor([2]), nothing)))


def test_no_hook_is_left_after_an_exception(sweep_model):
    def broken(activation, which, start, layer):
        raise KeyboardInterrupt

    patches = Patches("mlp_out", torch.tensor([0]), torch.tensor([2]), broken)
    with pytest.raises(KeyboardInterrupt):
        list(sweep(sweep_model, tokens_for(), patches))
    assert not any(point.fwd_hooks for point in sweep_model.hook_dict.values())
