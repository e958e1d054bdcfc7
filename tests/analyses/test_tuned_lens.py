"""Tuned-lens training compared with autograd and PyTorch's optimizer, on real small models."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch

from mechlens.analyses.tuned_lens import Training, plan, train_tuned_lens, training, translators
from mechlens.analyses.tuned_lens.windows import batch_windows, training_windows
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import describe
from mechlens.models.run.sampling import sample_tokens
from mechlens.results import TunedLens
from mechlens.text.corpus import token_windows
from tests.close import assert_close, assert_same
from tests.reference import tuned_lens as reference
from tests.shared import SHARED, needs_shared


def windows(count=40, length=8):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(4, 50, (count, length), generator=draw)


def trained(model, corpus=None, *, held_out=8, held_out_corpus=None, resume=None, progress=None, **changes):
    """A lens of 6 steps, each of 3 windows of 8 tokens."""
    options = {"steps": 6, "batch_tokens": 24, "learning_rate": 0.01} | changes
    return train_tuned_lens(
        model,
        windows() if corpus is None else corpus,
        training=Training(**options),
        held_out=held_out,
        held_out_corpus=held_out_corpus,
        resume=resume,
        progress=progress,
    )


@pytest.fixture(params=["gpt2", "gpt_neox", "llama", "gemma2"])
def wide_model(request, load_once, tiny_directories):
    """In float64, where Adam's division by the gradient's size does not amplify rounding."""
    return load_once(tiny_directories / request.param, dtype="float64", processing=request.param != "gpt2")


def test_training_matches_autograd_and_torchs_adam(wide_model) -> None:
    corpus = windows()
    lens = trained(wide_model, corpus, seed=2)
    # 6 x 3 training and 8 held-out windows are read; every third of these 26 is held out
    aside = [2, 5, 8, 11, 14, 17, 20, 23]
    train = corpus[[index for index in range(26) if index not in aside]]
    order = torch.randperm(18, generator=torch.Generator().manual_seed(2))
    layers = reference.train(wide_model, [train[some] for some in order.view(6, 3)], 0.01)
    assert lens.rows == ("embed", "0")
    for row, layer in enumerate(layers):
        assert lens.weight[row].abs().max() > 0.005
        for ours, theirs in ((lens.weight[row], layer.weight.T), (lens.bias[row], layer.bias)):
            difference = (ours - theirs).abs()
            if difference.max() > 1e-8:  # float64 sums in a different order
                # the RMS norms of a bridge are Hugging Face's, which round to float32
                assert lens.model.engine == "TransformerBridge"
                assert wide_model.cfg.normalization_type.startswith("RMS")
                assert difference.max() < 1e-3
                assert difference.mean() < 1e-5
    rest = corpus[aside]
    with torch.no_grad():
        final = wide_model(rest)
        for row, resid in enumerate(reference.residuals(wide_model, rest)):
            plain = reference.kl(final, reference.logits(wide_model, resid)).mean()
            translated = lens.translate(["embed", "0", "1"][row], resid)
            tuned = reference.kl(final, reference.logits(wide_model, translated)).mean()
            # the lens keeps its KL in float32
            assert float(lens.kl_plain[row]) == pytest.approx(float(plain), rel=1e-6, abs=1e-9)
            assert float(lens.kl_tuned[row]) == pytest.approx(float(tuned), rel=1e-6, abs=1e-9)
    assert lens.held_out_tokens == 64
    assert lens.train_tokens == 144
    assert (lens.batch_tokens, lens.length, lens.steps, lens.seed) == (24, 8, 6, 2)


def test_training_in_pieces_gives_the_same_lens(tiny_bos_model, monkeypatch) -> None:
    whole = trained(tiny_bos_model)
    # one window is run at a time, with logits for three positions
    monkeypatch.setattr(translators, "RESIDUAL_BYTES", 1)
    monkeypatch.setattr(translators, "CHUNK", 3)
    pieces = trained(tiny_bos_model)
    # float32 sums in a different order, which Adam divides by their own size
    assert torch.allclose(pieces.weight, whole.weight, atol=2e-3)
    assert (pieces.weight - whole.weight).abs().mean() < 1e-5
    assert torch.allclose(pieces.kl_tuned, whole.kl_tuned, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_trains_in_inference_mode(tiny_bos_model, mode) -> None:
    options = {"steps": 2, "batch_tokens": 16, "held_out": 2, "learning_rate": None}
    expected = trained(tiny_bos_model, **options)
    with mode():
        found = trained(tiny_bos_model, **options)
    assert torch.allclose(found.weight, expected.weight, atol=1e-6)


def test_a_corpus_too_short_for_all_steps_is_reused(tiny_bos_model) -> None:
    lens = trained(tiny_bos_model, windows(14))
    assert lens.train_tokens == 6 * 8
    again = batch_windows(1, 4, 6, seed=1).tolist()
    first = batch_windows(0, 4, 6, seed=1).tolist()
    assert sorted(first + again[:2]) == [0, 1, 2, 3, 4, 5], "each window once before any comes again"


@pytest.mark.parametrize("processing", [True, False])
def test_it_lowers_the_kl_of_every_row_of_the_bundled_model(processing) -> None:
    model = load_model(processing=processing)
    text = sample_tokens(model, batch=112, seq_len=24)
    lens = train_tuned_lens(model, text, training=Training(24, 192), held_out=16)
    assert lens.rows == ("embed", "0", "1", "2")
    assert (lens.kl_tuned[:-1] < 0.9 * lens.kl_plain[:-1]).all()
    # the last row is the model itself, up to float32 rounding
    assert [*map(float, (lens.kl_plain[-1], lens.kl_tuned[-1]))] == pytest.approx([0, 0], abs=1e-5)
    assert lens.prepend_bos
    lens.check_fits(describe(model))


@needs_shared
def test_it_lowers_the_kl_of_every_row_on_unseen_books(bundled) -> None:
    corpus = SHARED / "corpus"
    lens = train_tuned_lens(
        bundled,
        token_windows(bundled, corpus / "books-train.jsonl.gz", length=64),
        held_out_corpus=corpus / "books-validation.jsonl.gz",
        training=Training(16, 256),
        held_out=16,
    )
    assert (lens.kl_tuned[:-1] < 0.9 * lens.kl_plain[:-1]).all()
    assert lens.held_out_tokens == 16 * 64


def test_a_bfloat16_model_is_trained_in_float32(tiny_directories) -> None:
    """Rounding would hide small weight updates and spoil the statistics."""
    narrow = load_model(tiny_directories / "llama", dtype="bfloat16")
    lens = trained(narrow, windows(120), steps=30)
    assert lens.weight.dtype == lens.kl_tuned.dtype == torch.float32
    assert (lens.kl_tuned[:-1] < lens.kl_plain[:-1]).all()
    same = trained(load_model(tiny_directories / "llama"), windows(120), steps=30)
    # bfloat16 has 8 bits
    assert torch.allclose(lens.kl_tuned, same.kl_tuned, rtol=0.05, atol=0.02)


def test_training_leaves_the_model_unchanged(tiny_bos_model) -> None:
    before = {name: value.clone() for name, value in tiny_bos_model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in tiny_bos_model.parameters()]
    for part in tiny_bos_model.modules():
        part.training = True
    try:
        trained(tiny_bos_model)
        assert all(part.training for part in tiny_bos_model.modules())
    finally:
        tiny_bos_model.eval()
    assert all(parameter.grad is None for parameter in tiny_bos_model.parameters())
    assert [parameter.requires_grad for parameter in tiny_bos_model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in tiny_bos_model.state_dict().items())
    assert not any(point.fwd_hooks for point in tiny_bos_model.hook_dict.values())


# -- resuming --------------------------------------------------------------------------------------


class Stop(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


def interrupted(model, *, after: int, **options) -> None:
    """Train until the model has run a given number of times."""
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1
        if runs > after:
            raise Stop

    handle = model.blocks[0].register_forward_pre_hook(count)
    try:
        with pytest.raises(Stop):
            trained(model, **options)
    finally:
        handle.remove()


def test_an_interrupted_training_resumes(load_once, tiny_directories, tmp_path) -> None:
    model, file = load_once(tiny_directories / "gpt2", dtype="float64"), tmp_path / "checkpoint.safetensors"
    whole = trained(model)
    for after in (9, 7):
        interrupted(model, after=after, resume=file)
    # two runs before each training check that the model can be read; because the counter is a hook, four more
    # check that it treats rows alike; each step takes one
    assert _step(file) == 4
    resumed = trained(model, resume=file)
    assert_same(resumed, whole)
    assert _step(file) == 6
    # nothing left to do
    assert_same(trained(model, resume=file), whole)
    assert list(tmp_path.glob(".*")) == []


def _step(path) -> int:
    import json

    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return int(json.loads(file.metadata()["mechlens_training"])["step"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "begun with seed 0, not 1: use the same arguments"),
        ({"steps": 7, "learning_rate": 0.02}, "begun with steps 6, not 7, learning_rate 0.01, not"),
        ({"batch_tokens": 16}, "batch_tokens 24, not 16"),
        ({"held_out": 9}, "begun with held_out 8, not 9: use"),
        ({"corpus": windows(count=41)[1:]}, "begun with another corpus: use"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tiny_bos_model, tmp_path, change, message) -> None:
    file = tmp_path / "checkpoint.safetensors"
    trained(tiny_bos_model, resume=file)
    with pytest.raises(ValueError, match=message):
        trained(tiny_bos_model, resume=file, **change)


def test_a_checkpoint_of_another_model_is_refused(tiny_directories, tiny_bos_model, tmp_path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    trained(tiny_bos_model, resume=file)
    raw = load_model(tiny_directories / "gpt2", processing=False)
    with pytest.raises(ValueError, match="model's processing True, not False"):
        trained(raw, resume=file)


def test_a_file_that_is_not_a_checkpoint_is_refused(tiny_bos_model, tmp_path) -> None:
    lens = trained(tiny_bos_model)
    saved = lens.save(tmp_path / "lens.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for file, message in (
        (saved, "is not a checkpoint of the training of a tuned lens"),
        (tmp_path / "junk.safetensors", "is damaged or not a .safetensors file"),
        (tmp_path / "lens.pt", "must be a .safetensors file"),
        (tmp_path / "no" / "checkpoint.safetensors", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(tiny_bos_model, resume=file)
    assert TunedLens.load(saved) == lens, "what was refused is not overwritten"


# -- errors and the bar ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"held_out": 0}, "held_out must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"held_out": 38}, "makes 40 windows, but a batch takes 3 and 38 are held out: give more text"),
        ({"corpus": ["abc"]}, "the corpus is shorter than one window: give more text"),
        ({"held_out_corpus": ["abc"]}, "held_out_corpus has no window of 8 tokens"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(tiny_bos_model, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tiny_bos_model, **change)


def test_the_bar_shows_the_loss(tiny_bos_model, capsys) -> None:
    trained(tiny_bos_model)
    assert capsys.readouterr() == ("", "")
    trained(tiny_bos_model, progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    loss = float(shown.rsplit("loss=", 1)[1].split("]")[0])
    assert 0 < loss < math.log(64) * 10


@pytest.mark.parametrize(
    ("count", "steps", "held_out"),
    [
        (9, 50, 1),  # 3 windows make a batch
        (62, 50, 6),  # a tenth of all windows
        (200, 6, 2),  # 18 for training; no more are read
        (2000, 400, 64),
    ],
)
def test_a_tenth_of_the_windows_is_held_out_by_default(tiny_bos_model, count, steps, held_out) -> None:
    train, rest = training_windows(
        tiny_bos_model, windows(count), None, steps=steps, batch_tokens=24, held_out=None
    )
    assert len(rest) == held_out
    assert len(train) == min(3 * steps, count - held_out)
    found = {tuple(row) for row in rest.tolist()}
    assert len(found) == held_out
    assert not found & {tuple(row) for row in train.tolist()}


def test_a_text_that_is_too_short_for_its_share_is_refused(tiny_bos_model) -> None:
    with pytest.raises(ValueError, match="makes 3 windows, but a batch takes 3 and 1 is held out: give more"):
        trained(tiny_bos_model, windows(3), steps=1, held_out=None)


# -- what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_plan_counts_the_products_of_a_step(load_once, tiny_directories, family) -> None:
    """As counted by PyTorch at run time."""
    from torch.utils.flop_counter import FlopCounterMode

    def in_place(_self, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    counter = partial(FlopCounterMode, display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    model = load_once(tiny_directories / family)
    batch = windows(4)
    head, state = translators.Head.of(model), translators.translators(model)
    found = plan.training_plan(model, batch_tokens=batch.numel(), length=8, held_out=4)
    # 7 copies of 2 rows of 32 x 32 and 32, 3 residuals of 32 tokens, and W_U; 4 bytes each
    assert found.bytes == 4 * (7 * 2 * (32 * 32 + 32) + 3 * 32 * 32 + 32 * 64)
    with counter() as step:
        translators.gradients(model, head, batch, state)
    assert found.step_flop == step.get_total_flops()
    with counter() as measuring:
        translators.held_out_kl(model, head, batch, state)
    # the logits of single tokens are also recomputed
    assert found.held_out_flop == pytest.approx(measuring.get_total_flops(), rel=0.1)


def test_training_announces_its_duration(tiny_bos_model, monkeypatch, capsys) -> None:
    found = plan.training_plan(tiny_bos_model, batch_tokens=24, length=8, held_out=2)
    # a step takes 30 s, the held-out evaluation 45
    found = dataclasses.replace(found, step_flop=30 * 10**9, held_out_flop=45 * 10**9)
    monkeypatch.setattr(training, "training_plan", lambda *_, **__: found)
    monkeypatch.setattr(training, "measured_rate", lambda _: 1e9)
    trained(tiny_bos_model, held_out=None, progress=True)
    said = capsys.readouterr().err.splitlines()[0]
    assert said == (
        "tuned lens: about 3.8 minutes for 6 steps of 24 tokens, of which 45 s measure it on 16 tokens held "
        "out (0.03 TFLOP a step, 0.001 a second here); 10 minutes buy 16 steps"
    )
    trained(tiny_bos_model, held_out=2, progress=True)
    # (600 - 45) / 30
    assert "10 minutes buy 18 steps" in capsys.readouterr().err
    monkeypatch.setattr(training, "measured_rate", lambda _: pytest.fail("nothing is measured for nobody"))
    trained(tiny_bos_model, progress=False)
    assert capsys.readouterr().err == ""


# -- the lens itself -------------------------------------------------------------------------------


def test_translate_adds_the_affine_map_of_the_row(tiny_bos_model) -> None:
    lens = trained(tiny_bos_model)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for row, name in enumerate(("embed", "0")):
        expected = x.clone()
        for b in range(2):
            for pos in range(5):
                expected[b, pos] += lens.weight[row].T @ x[b, pos] + lens.bias[row]
        # float32 sums in a different order
        assert torch.allclose(lens.translate(name, x), expected, atol=1e-5)
    assert_close(lens.translate("1", x), x)
    narrow = lens.translate("0", x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, lens.translate("0", x.bfloat16().float()).bfloat16()), (
        "rounded once, at the end"
    )
    with pytest.raises(ValueError, match="no row '2': it has embed, 0, 1"):
        lens.translate("2", x)


def test_a_lens_of_other_weights_does_not_fit(tiny_bos_model, tiny_directories) -> None:
    lens = trained(tiny_bos_model)
    lens.check_fits(describe(load_model(tiny_directories / "gpt2", dtype="bfloat16")))
    raw = describe(load_model(tiny_directories / "gpt2", processing=False))
    states = (
        r"processed weights \(processing=True\), but this model has unprocessed weights "
        r"\(processing=False\)"
    )
    with pytest.raises(ValueError, match=f"trained on {states}; load the model with processing=True"):
        lens.check_fits(raw)
    other = describe(load_model(tiny_directories / "gpt_neox"))
    with pytest.raises(
        ValueError, match=r"belongs to name 'gpt2', not 'gpt_neox', architecture .*; train a lens on"
    ):
        lens.check_fits(other)


def test_the_table_has_both_kls_of_every_row(tiny_bos_model) -> None:
    lens = trained(tiny_bos_model)
    table = lens.to_dataframe()
    assert list(table.row) == ["embed", "0", "1"]
    assert torch.equal(torch.tensor(table.kl_tuned.to_numpy()).float(), lens.kl_tuned)
    assert torch.equal(torch.tensor(table.kl_plain.to_numpy()).float(), lens.kl_plain)
