"""The script that trains the bundled model: a small run, resuming, and its parts."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "experiments" / "train_bundled_model.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sentences from a small grammar, as text and as compressed JSON lines."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = torch.Generator().manual_seed(0)
    words = [["the", "a"], ["old", "red", "small"], ["dog", "cat", "ship"], ["sees", "has"], ["it.", "us."]]

    def text(n: int) -> str:
        picks = torch.randint(6, (n, 5), generator=draw).tolist()
        return " ".join(words[k][p % len(words[k])] for row in picks for k, p in enumerate(row))

    (folder / "a.txt").write_text(text(3000))
    with gzip.open(folder / "b.jsonl.gz", "wt") as lines:
        lines.write(json.dumps({"title": "b", "text": text(1500)}) + "\n")
    return folder


def small(script, **changes):
    shape = {"vocab_size": 280, "n_layers": 2, "d_model": 32, "n_heads": 2, "context": 32}
    length = {"steps": 60, "batch_tokens": 256, "warmup": 5, "learning_rate": 1e-2}
    return script.Recipe(**(shape | length | changes))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_a_small_run_learns_and_ends_in_a_loadable_model(script, corpus, tmp_path, capsys):
    record = script.train(small(script), [corpus], [], tmp_path, "cpu", log_every=30)
    first, last = record["log"][0]["validation_loss"], record["validation_loss"]
    assert first == pytest.approx(math.log(280), abs=0.3), "an untrained model is uniform"
    assert last < first - 1
    assert "validation loss" in capsys.readouterr().out
    from mechlens.models.load.loading import load_model

    model = load_model(tmp_path)
    assert model.cfg.n_ctx == 32
    assert {"step-000000", "step-000008", "step-000060"} <= {
        p.name for p in (tmp_path / "checkpoints").iterdir()
    }
    early = load_model(tmp_path, checkpoint=8)
    assert not torch.equal(early.W_E, model.W_E)
    for file in (tmp_path / "training.json", tmp_path / "config.json"):
        assert str(tmp_path) not in file.read_text()


def test_an_interrupted_run_ends_like_an_uninterrupted_one(script, corpus, tmp_path):
    recipe = small(script, steps=12)
    script.train(recipe, [corpus], [], tmp_path / "whole", "cpu")
    script.train(recipe, [corpus], [], tmp_path / "parts", "cpu", stop_after=5)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    script.train(recipe, [corpus], [], tmp_path / "parts", "cpu")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        # the same batches and arithmetic; float16 on disk
        assert torch.allclose(value.float(), parts[name].float(), atol=2e-3), name
    with pytest.raises(ValueError, match=r"was begun with learning_rate 0\.01, not 0\.001"):
        script.train(small(script, steps=12, learning_rate=1e-3), [corpus], [], tmp_path / "parts", "cpu")


def test_batches_depend_only_on_the_seed_and_the_step(script):
    recipe = small(script)
    text, valid = torch.arange(2000) % 270, torch.arange(1, 270)
    batch = script.make_batch(recipe, 7, text, 0, valid)
    assert batch.shape == (256 // 32, 32)
    assert (batch[:, 0] == 0).all()
    assert torch.equal(batch, script.make_batch(recipe, 7, text, 0, valid))
    assert not torch.equal(batch, script.make_batch(recipe, 8, text, 0, valid))


def test_stories_repeat_at_many_distances(script):
    """There is no fixed period, so the distance to the previous occurrence varies."""
    draw = torch.Generator().manual_seed(0)
    distances = set()
    for _ in range(20):
        base = torch.arange(15)
        row = importlib.import_module("bundled_model_data").story(120, base, 6.0, draw)
        assert len(row) == 120
        assert torch.equal(row[:2], base[:2])
        last: dict[int, int] = {}
        for pos, token in enumerate(row.tolist()):
            if token in last:
                distances.add(pos - last[token])
            last[token] = pos
    assert len(distances) > 20
    follow = sum(int(b == a + 1) for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True))
    assert follow > 119 / 2, "chunks of at least two tokens: most tokens follow their predecessor"


def test_bigram_probabilities_sum_to_one_and_fit_the_text(script):
    """For each token, over all possible next tokens."""
    train = torch.randint(6, (300,), generator=torch.Generator().manual_seed(1))
    train = torch.where(train == 5, 0, train)  # token 5 never occurs
    for before in range(6):
        total = sum(
            math.exp(-script.bigram_loss(train, torch.tensor([before, after]), 6)) for after in range(6)
        )
        assert total == pytest.approx(1, abs=1e-9)
    cycle = torch.arange(4).repeat(50)
    assert script.bigram_loss(cycle, cycle, 4) < 0.05
    assert script.bigram_loss(cycle, torch.tensor([0, 2, 0, 2]), 4) > 2


def test_the_learning_rate_rises_and_falls(script):
    recipe = small(script, steps=100, warmup=10, decay=0.5, learning_rate=1.0)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(9) == recipe.rate(50) == 1
    assert recipe.rate(75) == pytest.approx(0.5)
    assert recipe.rate(100) == 0


def test_a_corpus_that_is_too_small_is_an_error(script, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(ValueError, match="the corpus is too small"):
        script.train(small(script), [tmp_path / "short.txt"], [], tmp_path / "out2", "cpu")
