"""Plans: what an analysis would take, from a part of it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import mechlens
from mechlens.analyses.plan import measured
from mechlens.models.run.meter import Meter
from mechlens.progress import Sampling, progress_bar
from tests.cli.commands import run
from tests.counting import positions_run


@pytest.fixture(scope="module")
def bundled() -> Any:
    return mechlens.load_model()


@pytest.fixture(scope="module")
def task(bundled: Any) -> mechlens.Task:
    task = mechlens.load_task("agreement", bundled, n=6)
    assert task.note is not None  # measured now, so that every run below is the analysis's own
    return task


def test_counts_are_those_of_the_whole_run(bundled: Any, task: mechlens.Task) -> None:
    given = {"n_random": 3, "progress": False}
    plan = mechlens.plan(task.circuit, ["L1", "L3.mlp"], **given)
    found = positions_run(bundled, ["hook_embed"], lambda: task.circuit(["L1", "L3.mlp"], **given))
    assert plan.tokens == found["hook_embed"]
    assert plan.runs * task.encoded[0].clean.shape[1] == plan.tokens
    assert plan.loops == {}
    assert plan.note == ""


@pytest.mark.parametrize("n_random", [20, 60])
def test_a_part_is_scaled_to_the_whole(task: mechlens.Task, n_random: int) -> None:
    def work() -> Any:
        return task.circuit(["L1"], n_random=n_random, progress=False)

    whole = measured(work, "circuit", seconds=1000)
    part = measured(work, "circuit", seconds=0.0)
    assert whole.loops == {}
    ((done, total),) = part.loops.values()
    assert done == 1
    assert total == 4 + 7 + 2 * n_random
    assert part.runs == pytest.approx(whole.runs, rel=1e-6)
    # components that are replaced cost no less: only the hooks differ
    assert part.flop == pytest.approx(whole.flop, rel=0.02)


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("mechlens.progress.time.perf_counter", lambda: self.now)


def test_time_is_scaled_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing = Sampling(lambda: (clock.now,), 0.1)
    with timing:
        for _ in progress_bar(range(100), desc="naps", progress=None):
            clock.now += 0.015625
    (loop,) = timing.loops
    assert loop.done == 6  # a seventh would take more than 0.1 s
    assert timing.read() == pytest.approx((100 * 0.015625,))


def test_a_loop_within_a_loop_is_scaled_within_it() -> None:
    naps = 0

    def work() -> None:
        nonlocal naps
        for _ in progress_bar(range(10), desc="outer", progress=None):
            for _ in progress_bar(range(40), desc="inner", progress=None):
                naps += 1
                time.sleep(0.005)

    with Sampling(lambda: (naps,), 0.02) as counting:
        work()
    assert naps < 40
    assert counting.read()[0] == pytest.approx(400)


def test_the_part_is_spread_over_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def work() -> list[int]:
        seen = []
        for each in progress_bar(list(range(100)), desc="numbers", progress=None):
            clock.now += 0.015625
            seen.append(each)
        return seen

    with Sampling(lambda: (0.0,), 0.1) as sampling:
        seen = work()
    assert len(seen) == 6
    assert seen[0] == 0
    assert seen[-1] == 99
    assert max(after - before for before, after in itertools.pairwise(seen)) < 30
    assert sampling.loops[0].share == pytest.approx(100 / 6)
    assert work() == list(range(100))  # outside a plan


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_arithmetic_of_products_is_counted(mode: Any) -> None:
    a, b, c = torch.ones(3, 5), torch.ones(5, 7), torch.ones(2, 4, 6, requires_grad=True)
    with mode(), Meter() as meter:
        a @ b
        torch.nn.functional.linear(c, torch.ones(8, 6))
        torch.einsum("bij,bkj->bik", c, c)
    assert meter.flop == 2 * 3 * 5 * 7 + 2 * 2 * 4 * 6 * 8 + 2 * 2 * 4 * 4 * 6


def test_arithmetic_of_a_backward_pass_is_counted() -> None:
    x, w = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    with Meter() as meter:
        (x @ w).sum().backward()
    assert meter.flop == 2 * (2 * 3 * 5 * 7)


def test_arithmetic_of_a_run_is_that_of_its_weights(tiny_bos_model: Any) -> None:
    model = tiny_bos_model
    cfg, n_pos = model.cfg, 8
    tokens = torch.arange(n_pos)[None]
    with Meter() as meter, torch.inference_mode():
        model(tokens)
    weights = 4 * cfg.d_model * cfg.d_head * cfg.n_heads + 2 * cfg.d_model * cfg.d_mlp
    scores = 2 * n_pos * cfg.d_head * cfg.n_heads
    expected = 2 * n_pos * (cfg.n_layers * (weights + scores) + cfg.d_model * cfg.d_vocab)
    assert meter.flop == expected


def test_peak_counts_what_is_held_at_once() -> None:
    with Meter() as meter:
        one, two = torch.empty(2**20), torch.empty(2**20)
        view = one[:10]
        del two, one
        torch.empty(2**19)
        del view
        torch.empty(2**20)
    assert meter.peak == 2 * 2**22


def test_a_grid_of_patches_is_planned_without_a_file(bundled: Any, tmp_path: Path) -> None:
    tokens = torch.randint(0, 2000, (3, 30), generator=torch.Generator().manual_seed(0))
    experiment = mechlens.Patching(bundled, tokens[:2], tokens[1:], metric=mechlens.LogitDiff(5, 9))
    file = tmp_path / "grid.safetensors"
    plan = measured(lambda: experiment.grid("mlp_out", resume=file), "grid", seconds=0.0)
    assert not file.exists()
    assert plan.loops
    assert plan.runs > 60


def test_features_searches_are_planned(bundled: Any) -> None:
    features = mechlens.Features(layers=2, indices=[1], site="post")
    plan = measured(lambda: mechlens.search_exhaustive(bundled, features), "search", seconds=0.0)
    assert plan.runs == pytest.approx(bundled.cfg.d_vocab, rel=0.1)


def test_errors_of_the_analysis_are_its_own(bundled: Any, task: mechlens.Task) -> None:
    with pytest.raises(ValueError, match="L9"):
        mechlens.plan(task.keep, ["L9"])
    with pytest.raises(ValueError, match="an analysis of a model"):
        mechlens.plan(sorted, [2, 1])
    assert not any(point.fwd_hooks for point in bundled.hook_dict.values())
    # and nothing is shortened afterwards
    assert len(list(progress_bar(range(9), desc="numbers", progress=None))) == 9


def test_what_cannot_follow_a_part_is_named(bundled: Any) -> None:
    def work() -> None:
        seen = []
        for each in progress_bar(range(10), desc="first", progress=None):
            time.sleep(0.001)
            seen.append(each)
        assert len(seen) == 10, "the rest needs all of them"

    plan = measured(work, "work", [bundled], seconds=0.0)
    assert plan.note == "What comes after the loop “first” is not in it (AssertionError)"
    assert plan.words.endswith("(AssertionError).")


def test_a_dry_run_prints_a_plan_and_writes_nothing(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    given = ("task-circuit", "agreement", "--n", 6, "--out", out)
    code, printed, _ = run(capsys, *given, "--dry-run")
    assert code == 0
    assert printed.startswith("Plan (mechlens-books)")
    assert "TFLOP" in printed
    assert not out.exists()
