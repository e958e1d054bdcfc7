"""Direct paths and rearranged blocks compared with hooked forward passes."""

from __future__ import annotations

import pytest
import torch

from mechlens.analyses.patching import LogProb, Patching
from mechlens.models.load.loading import load_model
from mechlens.models.run.sites import SITES
from tests.reference import patching as reference
from tests.tiny_models import write_tiny_model

LENGTH = 6
READ = range(LENGTH - 1)


def tokens_for(seed=0):
    return torch.randint(4, 50, (1, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def patch_model(request, load_once, tiny_directories):
    return load_once(tiny_directories / request.param)


@pytest.fixture(params=["gpt2", "gpt_neox", "llama", "gemma2"])
def path_model(request, load_once, tiny_directories):
    return load_once(tiny_directories / request.param)


def path_by_hand(model, tokens, other, sender, layer, head, name, at):
    """Apply W_O to the sender's change, run the receiver's block with it, and hook the last run."""
    _, cache = reference.cache_of(model, tokens)
    _, there = reference.cache_of(model, other)
    z = f"blocks.{sender[0]}.attn.hook_z"
    change = torch.zeros(LENGTH, model.cfg.d_model)
    for pos in at:
        change[pos] = (there[z][0, pos, sender[1]] - cache[z][0, pos, sender[1]]) @ model.W_O[sender]
    norm = getattr(model.blocks[sender[0]], "ln1_post", None)
    if norm is not None:
        # the heads' output passes another norm before it joins the stream
        W_O = model.W_O[sender[0]]
        written = torch.einsum("phd,hdm->pm", cache[z][0], W_O)
        with torch.no_grad():
            change = norm((written + change)[None])[0] - norm(written[None])[0]
    seen = {}

    def add(activation, hook):
        return activation + change

    def keep(activation, hook):
        seen["input"] = activation[0].clone()

    sequential = f"blocks.{layer}.hook_resid_mid" in model.hook_dict
    enter = "hook_resid_mid" if name == "hook_mlp_out" and sequential else "hook_resid_pre"
    receiver = f"blocks.{layer}.{name}"
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.{enter}", add), (receiver, keep)])

    def patch(activation):
        if head is None:
            activation[:] = seen["input"]
        else:
            activation[:, head] = seen["input"][:, head]

    return reference.loss(reference.run(model, tokens, receiver, patch), tokens[0], READ)


@pytest.mark.parametrize("input", ["q", "k", "v", "mlp"])
def test_only_the_receiver_sees_what_the_sender_changed(path_model, input):
    tokens, other = tokens_for(), tokens_for(1)
    name = "hook_mlp_out" if input == "mlp" else f"attn.hook_{input}"
    receiver, head = ("L1.mlp", None) if input == "mlp" else (f"L1H1.{input}", 1)
    for positions in (None, [1, 3]):
        found = Patching(path_model, tokens, other).path((0, 2), receiver, into="clean", positions=positions)
        at = range(LENGTH) if positions is None else positions
        expected = path_by_hand(path_model, tokens, other, (0, 2), 1, head, name, at)
        # float32 through two layers; the change is a difference between sums
        assert float(found.mean) == pytest.approx(expected, abs=2e-5)
        assert abs(float(found.effect)) > 1e-4, "something is measured"
    assert found.axes == (("layer",) if input == "mlp" else ("layer", "head"))
    assert "L0H2 (corrupted) as" in found.source
    with torch.no_grad():
        assert float(found.corrupted[0]) == pytest.approx(
            reference.loss(path_model(other)[0], tokens[0], READ), abs=2e-5
        )


def test_a_path_is_restored_in_the_corrupted_run(path_model):
    """Denoising is noising with the prompts swapped, but with the clean prompt's labels."""
    tokens, other = tokens_for(), tokens_for(1)
    found = Patching(path_model, tokens, other, metric=LogProb(7)).path("L0H2", "L1H1.k")
    exchanged = Patching(path_model, other, tokens, metric=LogProb(7)).path("0.2", "1.1.k", into="clean")
    assert torch.allclose(found.values, exchanged.values, atol=1e-6)
    assert torch.allclose(found.corrupted, exchanged.clean, atol=1e-6)
    assert torch.allclose(found.effect, exchanged.effect, atol=1e-6)


@pytest.mark.parametrize("input", ["q", "k", None])
def test_attention_patterns_after_path_patching(path_model, input):
    """Compared with a run in which the sender, or the stream read by q or k, is changed by hand."""
    tokens, other = tokens_for(), tokens_for(1)
    receiver = "L1H1" if input is None else f"L1H1.{input}"
    found = Patching(path_model, tokens, other).path_attention("L0H2", receiver, into="clean")
    _, cache = reference.cache_of(path_model, tokens)
    _, there = reference.cache_of(path_model, other)
    sender = "blocks.0.attn.hook_z"

    def change(z, hook):
        z = z.clone()
        z[:, :, 2] = there[sender][:, :, 2]
        return z

    seen = {}
    with torch.no_grad():
        if input is None:
            hooks = [(sender, change)]
        else:
            path_model.run_with_hooks(
                tokens,
                fwd_hooks=[
                    (sender, change),
                    ("blocks.0.hook_attn_out", lambda a, hook: seen.__setitem__("out", a.clone())),
                ],
            )
            added = seen["out"] - cache["blocks.0.hook_attn_out"]
            name = f"blocks.1.attn.hook_{input}"
            path_model.run_with_hooks(
                tokens,
                fwd_hooks=[
                    ("blocks.1.hook_resid_pre", lambda a, hook: a + added),
                    (name, lambda a, hook: seen.__setitem__("input", a.clone())),
                ],
            )
            hooks = [(name, lambda a, hook: seen["input"])]
        path_model.run_with_hooks(
            tokens,
            fwd_hooks=[
                *hooks,
                ("blocks.1.attn.hook_pattern", lambda a, hook: seen.__setitem__("p", a.clone())),
            ],
        )
    # float32 through two layers
    assert torch.allclose(found[0], seen["p"][0, 1].float(), atol=1e-5)
    clean = cache["blocks.1.attn.hook_pattern"][0, 1]
    assert (found[0] - clean).abs().max() > 1e-3, "something is measured"


def test_the_mlp_of_the_senders_own_layer_reads_it_unless_they_are_parallel(patch_model):
    tokens, other = tokens_for(), tokens_for(1)
    experiment = Patching(patch_model, tokens, other)
    if SITES["resid_mid"].format(0) not in patch_model.hook_dict:
        with pytest.raises(ValueError, match=r"L1\.mlp does not read what L1H0 writes"):
            experiment.path("L1H0", "L1.mlp", into="clean")
        pytest.skip("its attention and MLP are parallel")
    expected = path_by_hand(patch_model, tokens, other, (1, 0), 1, None, "hook_mlp_out", range(LENGTH))
    assert float(experiment.path("L1H0", "L1.mlp", into="clean").mean) == pytest.approx(expected, abs=5e-5)


def block_by_hand(model, tokens, layer, how, other):
    """The block's output comes from a run that starts there."""
    _, cache = reference.cache_of(model, tokens)
    name = f"blocks.{layer}.hook_resid_post"
    value = cache[f"blocks.{layer}.hook_resid_pre"]
    if how != "skip":
        given = cache[name] if how == "repeat" else value
        kept = {}

        def keep(activation, hook):
            kept["out"] = activation.clone()

        hooks = [(f"blocks.{layer}.hook_resid_pre", lambda a, hook: given), (name, keep)]
        with torch.no_grad():
            other.run_with_hooks(tokens, fwd_hooks=hooks)
        value = kept["out"]

    def patch(activation):
        activation[:] = value[0]

    return reference.loss(reference.run(model, tokens, name, patch), tokens[0], READ)


@pytest.mark.parametrize("how", ["skip", "repeat", "another"])
def test_blocks_are_skipped_repeated_and_swapped(patch_model, tiny_bos_model, how):
    tokens = tokens_for()
    # learned positions are added before the blocks, so any architecture's blocks work
    other = tiny_bos_model if how == "another" else patch_model
    found = Patching(patch_model, tokens).blocks(tiny_bos_model if how == "another" else how)
    for layer in range(2):
        expected = block_by_hand(patch_model, tokens, layer, how, other)
        assert float(found.mean[layer]) == pytest.approx(expected, abs=5e-5)
    assert found.axes == ("layer",)
    assert found.source == ("block of gpt2" if how == "another" else how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"receiver": "L0H1.q"}, "L0H1.q does not read what L0H2 writes"),
        ({"receiver": "L1H0"}, "receiver must be an input of a head .L3H5"),
        ({"receiver": "L1H0.mlp"}, "an MLP as receiver is written L3.mlp"),
        ({"receiver": "L1.q"}, "a head is written L5H5"),
        ({"receiver": "L1H0.z"}, "receiver must be an input"),
        ({"sender": (0, 4)}, "head 4"),
        ({"receiver": "L2H0.q"}, "layer 2"),
        ({"values": "mean"}, "values must be"),
        ({"positions": [6]}, "position 6"),
    ],
)
def test_an_impossible_path_is_refused(tiny_bos_model, options, message):
    usual = {"sender": (0, 2), "receiver": "L1H0.q", "values": "zero"}
    with pytest.raises(ValueError, match=message):
        Patching(tiny_bos_model, tokens_for()).path(**{**usual, **options})


def test_blocks_of_another_shape_are_refused(tiny_bos_model, tmp_path):
    experiment = Patching(tiny_bos_model, tokens_for())
    with pytest.raises(ValueError, match="how must be 'skip', 'repeat' or a model, got 'swap'"):
        experiment.blocks("swap")
    write_tiny_model(tmp_path / "deep", "gpt2", n_layer=3)
    with pytest.raises(ValueError, match="the other model has 3 layers and d_model 32, this one 2 and 32"):
        experiment.blocks(load_model(tmp_path / "deep"))
