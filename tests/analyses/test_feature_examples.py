"""Maximally activating examples compared with one run per window."""

from __future__ import annotations

import pytest
import torch

from mechlens.analyses.features import Features, examples, feature_examples
from mechlens.models.load.loading import load_model
from mechlens.text.corpus import token_windows
from tests.close import assert_same
from tests.reference import features as reference
from tests.tiny_models import VOCAB

LAYERS, WIDTH = 2, 32
# sums in a different order: a few rounding errors of activations around 10
CLOSE = {"atol": 2e-4, "rtol": 1e-5}
LENGTH = 6


@pytest.fixture(scope="module")
def windows():
    draw = torch.Generator().manual_seed(5)
    return torch.randint(VOCAB, (23, LENGTH), generator=draw)


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "llama"])
def model(request, tiny_directories):
    return load_model(tiny_directories / request.param, processing=False)


@pytest.fixture
def five_at_once(monkeypatch):
    """Batches of five windows."""
    monkeypatch.setattr(examples, "_rows", lambda model, length: 5)


def special_of(model):
    return set(model.tokenizer.all_special_ids)


@pytest.mark.usefixtures("five_at_once")
@pytest.mark.parametrize(
    ("site", "name"), [("resid_post", "blocks.{}.hook_resid_post"), ("post", "blocks.{}.mlp.hook_post")]
)
def test_the_windows_match_single_runs(model, windows, site, name):
    result = feature_examples(model, Features(indices=[0, 5, 31], site=site), windows, top_k=4)
    assert result.read == len(windows)
    for layer in range(LAYERS):
        expected = reference.real_contexts(model, windows, name.format(layer), (0, 5, 31), special_of(model))
        for at, feature in enumerate((0, 5, 31)):
            best = torch.tensor([value for value, _, _ in expected[feature][:4]])
            torch.testing.assert_close(result.peaks[layer, at], best, **CLOSE)
            # by window and position, since two windows may differ only by rounding
            known = {(window, pos): value for value, window, pos in expected[feature]}
            rows = result.windows[layer, at]
            found = zip(result.numbers[rows].tolist(), result.positions[layer, at].tolist(), strict=True)
            values = torch.tensor([known[place] for place in found])
            torch.testing.assert_close(values, best, **CLOSE)
            assert len(set(rows.tolist())) == 4
    assert torch.equal(result.tokens, windows[result.numbers])


def test_every_position_but_special_tokens_is_shaded(model, windows):
    result = feature_examples(model, Features([1], [7]), windows, top_k=3)
    for rank in range(3):
        window = result.tokens[result.windows[0, 0, rank]]
        _, cache = model.run_with_cache(
            window[None], names_filter=lambda each: each == "blocks.1.hook_resid_post"
        )
        own = cache["blocks.1.hook_resid_post"][0, :, 7].detach().clone()
        silent = torch.isin(window, torch.tensor(sorted(special_of(model))))
        torch.testing.assert_close(
            result.activations[0, 0, rank], own.masked_fill(silent, torch.nan), equal_nan=True, **CLOSE
        )


def test_text_is_cut_into_windows_after_bos(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    texts = ["a b c d e f g h i j k l m n o p", "the cat sat on the mat and the dog sat on the log"]
    result = feature_examples(model, Features([0], [3]), texts, top_k=2, length=8)
    expected = torch.stack(list(token_windows(model, texts, length=8)))
    assert result.read == len(expected)
    assert torch.equal(result.tokens, expected[result.numbers])
    assert result.prepend_bos is True
    assert result.activations[0, 0, :, 0].isnan().all()
    assert (result.positions > 0).all()
    assert (
        feature_examples(model, Features([0], [3]), texts, length=8, prepend_bos=False).prepend_bos is False
    )


def test_a_direction(tiny_directories, windows):
    model = load_model(tiny_directories / "llama", processing=False)
    direction = torch.linspace(-1, 1, WIDTH)[None]
    result = feature_examples(model, Features([1], directions=direction), windows, top_k=2)
    window = result.tokens[result.windows[0, 0, 0]]
    _, cache = model.run_with_cache(
        window[None], names_filter=lambda name: name == "blocks.1.hook_resid_post"
    )
    own = (cache["blocks.1.hook_resid_post"][0] @ direction[0])[result.positions[0, 0, 0]]
    # a sum of 32 products
    assert float(result.peaks[0, 0, 0]) == pytest.approx(float(own), rel=1e-4, abs=1e-4)


def test_fewer_windows_than_places(tiny_directories, windows):
    model = load_model(tiny_directories / "gpt2", processing=False)
    result = feature_examples(model, Features([0], [1]), windows, top_k=3, limit=2)
    assert result.read == 2
    assert (result.windows[0, 0] >= 0).tolist() == [True, True, False]
    assert result.peaks[0, 0].isnan().tolist() == [False, False, True]
    assert len(result.to_dataframe()) == 2


def test_batches_are_halved_when_memory_runs_out(tiny_directories, windows, monkeypatch):
    model = load_model(tiny_directories / "gpt2", processing=False)
    whole = feature_examples(model, Features(indices=[1, 2]), windows, top_k=3)
    sizes, watch = [], examples.watch

    def small(model, tokens, readers):
        sizes.append(len(tokens))
        watch(model, tokens, readers)
        if len(tokens) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(examples, "watch", small)
    found = feature_examples(model, Features(indices=[1, 2]), windows, top_k=3)
    assert max(sizes) > 4
    assert found.read == whole.read
    assert torch.equal(found.numbers, whole.numbers)
    torch.testing.assert_close(found.activations, whole.activations, equal_nan=True, **CLOSE)


@pytest.mark.usefixtures("five_at_once")
class TestResume:
    def interrupted(self, model, windows, file, monkeypatch, after=2):
        calls, watch = [], examples.watch

        def breaks(model, tokens, readers):
            calls.append(len(tokens))
            if len(calls) > after:
                raise KeyboardInterrupt
            watch(model, tokens, readers)

        monkeypatch.setattr(examples, "watch", breaks)
        with pytest.raises(KeyboardInterrupt):
            feature_examples(model, Features(indices=[1, 2]), windows, top_k=3, resume=file)
        monkeypatch.setattr(examples, "watch", watch)

    def test_an_interrupted_search_resumes(self, tiny_directories, windows, tmp_path, monkeypatch):
        model = load_model(tiny_directories / "gpt_neox", processing=False)
        file = tmp_path / "checkpoint.safetensors"
        self.interrupted(model, windows, file, monkeypatch)
        runs, watch = [], examples.watch

        def counted(model, tokens, readers):
            runs.append(len(tokens))
            watch(model, tokens, readers)

        monkeypatch.setattr(examples, "watch", counted)
        found = feature_examples(model, Features(indices=[1, 2]), windows, top_k=3, resume=file)
        # the remaining three batches, and one run of the kept windows
        assert runs[:3] == [5, 5, 3]
        assert_same(found, feature_examples(model, Features(indices=[1, 2]), windows, top_k=3))

    def test_another_corpus_or_question_is_refused(self, tiny_directories, windows, tmp_path, monkeypatch):
        model = load_model(tiny_directories / "gpt_neox", processing=False)
        file = tmp_path / "checkpoint.safetensors"
        self.interrupted(model, windows, file, monkeypatch)
        with pytest.raises(ValueError, match="another corpus"):
            feature_examples(model, Features(indices=[1, 2]), windows.flip(0), top_k=3, resume=file)
        with pytest.raises(ValueError, match="has already read 10 windows, more than the limit of 4"):
            feature_examples(model, Features(indices=[1, 2]), windows, top_k=3, resume=file, limit=4)
        other = load_model(tiny_directories / "gpt_neox", processing=False)
        with torch.no_grad():
            other.W_E[1:] = other.W_E[1:].flip(0)
        with pytest.raises(ValueError, match="other weights"):
            feature_examples(other, Features(indices=[1, 2]), windows, top_k=3, resume=file)
        with pytest.raises(ValueError, match="top_k 3, not 4"):
            feature_examples(model, Features(indices=[1, 2]), windows, top_k=4, resume=file)


def test_a_checkpoint_of_windows_with_bos_is_refused_without_bos(tiny_directories, tmp_path):
    model = load_model(tiny_directories / "gpt2", processing=False)
    texts, file = ["the cat sat on the mat and the dog sat on the log"] * 3, tmp_path / "s.safetensors"
    feature_examples(model, Features([0], [3]), texts, length=8, resume=file)
    with pytest.raises(ValueError, match="begun with BOS 0, not None"):
        feature_examples(model, Features([0], [3]), texts, length=8, resume=file, prepend_bos=False)


def test_ids_may_begin_with_bos(tiny_directories, windows):
    model = load_model(tiny_directories / "gpt2", processing=False)
    bos = torch.cat([torch.zeros(len(windows), 1, dtype=torch.long), windows], dim=1)
    assert feature_examples(model, Features([0], [1]), bos).prepend_bos is True
    assert feature_examples(model, Features([0], [1]), windows).prepend_bos is False


def test_invalid_input_is_refused(tiny_directories, windows, tmp_path):
    model = load_model(tiny_directories / "gpt2", processing=False)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        feature_examples(model, None, windows, top_k=0)
    with pytest.raises(ValueError, match="shorter than one window of 16 tokens"):
        feature_examples(model, None, ["a b"], length=16)
    with pytest.raises(ValueError, match=r"processing=False"):
        feature_examples(load_model(tiny_directories / "gpt2"), None, windows)
    result = feature_examples(model, Features([0], [1]), windows)
    with pytest.raises(ValueError, match="feature 2 was not searched: the search covers 1"):
        result.at(0, 2)
    assert result.at(0, 1) == (0, 0)


def test_broken_weights_are_refused(tiny_directories, windows):
    model = load_model(tiny_directories / "gpt2", processing=False)
    with torch.no_grad():
        model.W_E[int(windows[4, 2])] = torch.nan
    with pytest.raises(ValueError, match=r"activations at blocks\.0\.hook_resid_post are nan"):
        feature_examples(model, Features([0]), windows)
