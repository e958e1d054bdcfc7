"""Results come back as they were saved, or the file says why not."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechlens.results import (
    FORMAT,
    AttentionPatterns,
    AttributionPatchResult,
    Circuit,
    CircuitSummary,
    CompositionScores,
    HeadScores,
    InductionCircuits,
    LogitAttribution,
    LogitLensResult,
    LogitVariance,
    ModelInfo,
    PatchGridResult,
    PositionalAttention,
    RepeatedTokenPerformance,
    Result,
    TunedLens,
    VectorLens,
    head_label,
    load,
)
from mechlens.results.induction_circuits import COUNTED, EVIDENCE
from mechlens.results.lens import STATISTICS
from tests import feature_results
from tests.hand_made import attention_spread, deep_lens, facts, indirect_object, input_probe

MODEL = ModelInfo(
    name="tiny",
    revision=None,
    architecture="GPT2LMHeadModel",
    engine="HookedTransformer",
    engine_version="3.9.0",
    processing=None,
    dtype="float32",
    n_layers=1,
    n_heads=2,
    d_model=4,
    d_vocab=9,
    n_ctx=16,
)


def performance() -> RepeatedTokenPerformance:
    """Two sequences of BOS + 2 tokens + the same 2, of one seed."""
    return RepeatedTokenPerformance(
        model=MODEL,
        tokens=torch.tensor([[[0, 5, 6, 5, 6], [0, 7, 8, 7, 8]]]),
        log_prob=torch.tensor([[[-4.0, -3.0, -2.0, -1.0, math.nan], [-4.5, -3.5, -2.5, -1.5, math.nan]]]),
        correct=torch.tensor([[[False, False, True, True, False], [False, False, False, True, False]]]),
        estimates={"first_half_log_prob": (-3.75, -4.0, -3.5), "second_half_log_prob": (-1.75, -2.0, -1.5)},
        single_draws={"first_half_log_prob": (-4.0, -3.5), "second_half_log_prob": (math.nan, math.inf)},
        seq_len=2,
        seeds=(7,),
        prepend_bos=True,
        confidence=0.9,
    )


def head_scores() -> HeadScores:
    """Two heads in one layer, two seeds of one sequence; the copying score of a head is undefined."""
    return HeadScores(
        model=dataclasses.replace(MODEL, revision="step1000", processing=False),
        scores={
            "induction_score": torch.tensor([[[[0.1, 0.7]]], [[[0.3, 0.9]]]]),
            "copying_score": torch.tensor([[[[math.nan, -0.5]]], [[[math.nan, 0.5]]]]),
        },
        nulls={"induction_score": torch.tensor([[[[0.0, 0.1]]], [[[0.2, 0.3]]]])},
        intervals={
            "induction_score": torch.tensor([[[0.1, 0.7]], [[0.3, 0.9]]]),
            "copying_score": torch.tensor([[[math.nan, -0.5]], [[math.nan, 0.5]]]),
        },
        tokens={
            "repeated": torch.tensor([[[0, 5, 5]], [[0, 6, 6]]]),
            "sample": torch.tensor([[[0, 5]], [[0, 6]]]),
        },
        seq_len=None,
        jitter=0,
        seeds=(0, 1),
        prepend_bos=False,
        confidence=0.95,
    )


def patterns() -> AttentionPatterns:
    return AttentionPatterns(
        model=MODEL,
        tokens=torch.tensor([0, 5]),
        token_strings=("<script>", "\u2028ü\n"),
        heads=((0, 1), (0, 0)),
        patterns=torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]),
    )


def lens() -> LogitLensResult:
    """Two rows (embed, 0), one sequence of 2 tokens, one target; the last position has no label."""
    numbers = torch.tensor([[[1.5, 2.0]], [[0.25, 0.5]]])
    unlabeled = torch.tensor([[[-1.0, math.nan]], [[-2.0, math.nan]]])
    return LogitLensResult(
        model=MODEL,
        tokens=torch.tensor([[0, 5]]),
        mask=torch.tensor([[True, True]]),
        positions=(0, 1),
        context_length=torch.tensor([[1, 2]]),
        rows=("embed", "0"),
        read="resid_post",
        decoder="final_norm",
        statistics=STATISTICS,
        top_ids=torch.tensor([[[[5], [6]]], [[[6], [6]]]]),
        top_probabilities=torch.tensor([[[[0.5], [0.25]]], [[[0.75], [0.5]]]]),
        entropy=numbers,
        kl_final=numbers / 2,
        kl_input=torch.full_like(numbers, math.nan),
        final_ids=torch.tensor([[6, 6]]),
        log_prob={"next": unlabeled, "7": -numbers},
        rank={"next": -unlabeled, "7": numbers * 4},
        target_ids={"7": torch.tensor([[7, 7]])},
        strings={"0": "<s>", "5": " a", "6": "\n", "7": "tensors"},
        prepend_bos=True,
    )


def patch_grid_result() -> PatchGridResult:
    """Two prompts, one layer, two positions; no corrupted run."""
    return PatchGridResult(
        model=MODEL,
        tokens=torch.tensor([[0, 5, 6], [0, 6, 5]]),
        site="mlp_out",
        source="1 positions earlier",
        given={},
        weight=1.0,
        into="clean",
        axes=("layer", "pos"),
        layers=(0,),
        heads=(),
        positions=(1, 2),
        metric="loss",
        unit="nats",
        about="",
        at=(0, 1),
        values=torch.tensor([[[2.0, 3.0]], [[4.0, 5.0]]]),
        clean=torch.tensor([1.0, 2.0]),
        corrupted=torch.full((2,), math.nan),
        strings=("<s>", " a", "b"),
        seed=None,
        prepend_bos=True,
        note="",
    )


def attribution_patch() -> AttributionPatchResult:
    """One prompt, two heads of one layer; no exact grid beside it."""
    return AttributionPatchResult(
        model=MODEL,
        tokens=torch.tensor([[0, 5, 6]]),
        site="z",
        source="zero",
        given={"target": torch.tensor([[6, 7]])},
        weight=1.0,
        into="clean",
        axes=("layer", "head"),
        layers=(0,),
        heads=((0, 0), (0, 1)),
        positions=(),
        metric="loss",
        unit="nats",
        about="",
        at=(0, 1),
        estimate=torch.tensor([[[0.5, -0.25]]]),
        clean=torch.tensor([1.0]),
        corrupted=torch.tensor([math.nan]),
        correlation=None,
        strings=("<s>", " a", "b"),
        seed=None,
        prepend_bos=True,
    )


def induction_circuits() -> InductionCircuits:
    """One pair, whose rank is undefined."""
    return InductionCircuits(
        model=MODEL,
        pairs=((0, 1, 2, 3),),
        **{each.name: torch.tensor([0.9]) for each in EVIDENCE}
        | {"k_rank": torch.tensor([math.nan]), "n_earlier": torch.tensor([4.0])},
        verdicts=("in part",),
        reasons=("attends as a circuit does",),
        clean_loss=0.5,
        chance=0.01,
        n_tokens=4,
        intervals={name: torch.tensor([[0.25], [0.75]]) for name in COUNTED},
        confidence=0.95,
        tokens=torch.tensor([[0, 5, 6, 5, 6]]),
        seq_len=2,
        seed=0,
        how="mean",
        prepend_bos=True,
        relative_position=None,
        note="",
    )


def vector_lens() -> VectorLens:
    return VectorLens(
        model=MODEL,
        vectors=torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        decoder="none",
        top_ids=torch.tensor([[5, 0]]),
        top_probabilities=torch.tensor([[0.5, 0.25]]),
        entropy=torch.tensor([1.0]),
        log_prob={" a": torch.tensor([-0.5])},
        rank={" a": torch.tensor([1.0])},
        strings={"0": "<s>", "5": " a"},
    )


def tuned_lens() -> TunedLens:
    """Of a model with two layers; not everything is known of its training."""
    draw = torch.Generator().manual_seed(0)
    return TunedLens(
        model=dataclasses.replace(MODEL, n_layers=2, processing=False),
        rows=("embed", "0"),
        weight=torch.randn(2, 4, 4, generator=draw),
        bias=torch.randn(2, 4, generator=draw),
        kl_plain=torch.tensor([2.0, 1.0, 0.0]),
        kl_tuned=torch.tensor([1.5, math.nan, 0.0]),
        source="a checkpoint",
        steps=3,
        batch_tokens=64,
        length=8,
        train_tokens=None,
        held_out_tokens=16,
        learning_rate=1e-3,
        seed=None,
        prepend_bos=True,
    )


def attribution() -> LogitAttribution:
    """One sequence of 2 tokens, the last of them read: the logit of 6 less that of 7."""
    return LogitAttribution(
        model=MODEL,
        tokens=torch.tensor([[0, 5]]),
        positions=(1,),
        components=("embed", "L0H0", "L0H1", "L0 bias", "L0 MLP", "final bias"),
        contributions=torch.tensor([1.0, -0.5, 0.25, 0.0, 2.0, 0.125]).view(6, 1, 1),
        logit=torch.tensor([[2.875]]),
        target_ids=torch.tensor([[6]]),
        against_ids=torch.tensor([[7]]),
        strings={"0": "<s>", "5": " a", "6": "\n", "7": "tensors"},
        prepend_bos=True,
    )


def variance() -> LogitVariance:
    """Rows embed and 0, two bins of 9 tokens, one sequence of 2 tokens, the last of them read; two nulls."""
    by_row = torch.tensor([[1.0, -0.25], [2.0, -0.5]]).view(2, 2, 1, 1)
    return LogitVariance(
        model=MODEL,
        tokens=torch.tensor([[0, 5]]),
        positions=(1,),
        rows=("embed", "0"),
        bins=((1, 1), (2, 9)),
        probability=torch.tensor([0.75, 0.25]).view(2, 1, 1),
        variance=torch.tensor([2.0, 0.5]).view(2, 1, 1),
        null_variance=torch.tensor([[1.0, 0.5], [0.5, 0.5]]),
        elsewhere_variance=torch.full((2, 1, 1), math.nan),
        mean_logit=by_row,
        spread=by_row.abs(),
        excess=by_row.abs() - 1,
        seed=3,
        prepend_bos=True,
    )


def circuit() -> Circuit:
    """A K-composition of rank 1 of two, over 3 query and 4 key tokens."""
    return Circuit(
        model=MODEL,
        A=torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0]]),
        B=torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        axes=("query", "key"),
        spaces=("tokens", "tokens"),
        name="K-composition of L0H0 with L1H1",
        heads=((0, 0), (1, 1)),
        embedding="W_E",
        rotary="relative",
        relative_position=3,
        normalized_positions=False,
    )


def circuit_summary() -> CircuitSummary:
    """The same with its largest entry, and a part of two tokens."""
    return CircuitSummary(
        **vars(circuit()),
        ks=(1, 2),
        accuracy=torch.tensor([[0.25, 0.5], [math.nan, 1.0]]),
        pairs=torch.tensor([[1, 1]]),
        values=torch.tensor([8.0]),
        shown=(1, 0),
        strings={"0": " a", "1": "b"},
    )


def composition() -> CompositionScores:
    """Two layers of one head: the one pair."""
    scores = torch.full((2, 1, 2, 1), math.nan)
    scores[0, 0, 1, 0] = 0.5
    return CompositionScores(
        model=dataclasses.replace(MODEL, n_layers=2, n_heads=1),
        kind="k",
        scores=scores,
        baseline_mean=0.125,
        baseline_std=0.25,
        baseline_draws=16,
        seed=0,
        rotary="none",
        relative_position=None,
    )


def positional() -> PositionalAttention:
    """Two positions."""
    return PositionalAttention(
        model=MODEL,
        head=(0, 1),
        pattern=torch.tensor([[1.0, 0.0], [0.25, 0.75]]),
        scale=0.5,
        normalized_positions=True,
    )


RESULTS = {
    "attention_spread": attention_spread,
    "gradient_search": feature_results.gradient,
    "exhaustive_search": feature_results.exhaustive,
    "feature_alignment": feature_results.alignment,
    "feature_examples": feature_results.examples,
    "greedy_search": feature_results.greedy,
    "circuit": circuit,
    "circuit_summary": circuit_summary,
    "induction_circuits": induction_circuits,
    "composition": composition,
    "positional": positional,
    "attribution": attribution,
    "attribution_patch": attribution_patch,
    "variance": variance,
    "input_probe": input_probe,
    "lens": lens,
    "vector_lens": vector_lens,
    "performance": performance,
    "head_scores": head_scores,
    "patterns": patterns,
    "tuned_lens": tuned_lens,
    "patch_grid": patch_grid_result,
    "facts": facts,
    "indirect_object": indirect_object,
}


@pytest.fixture(params=RESULTS)
def result(request: pytest.FixtureRequest) -> Result:
    return RESULTS[request.param]()


def test_every_type_of_result_is_tried() -> None:
    assert {type(make()) for make in RESULTS.values()} == set(_shipped_types())


def _shipped_types() -> list[type[Result]]:
    ours = [cls for cls in Result.types.values() if cls.__module__.startswith("mechlens.results.")]
    # what several have in common is no result by itself
    return [cls for cls in ours if not cls.__name__.startswith("_") and "__dataclass_fields__" in vars(cls)]


# -- there and back --------------------------------------------------------------------------------


def test_round_trip(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    assert result.save(path) == path
    for back in (load(path), type(result).load(str(path))):
        assert back == result
        for field in dataclasses.fields(result):
            was, came = getattr(result, field.name), getattr(back, field.name)
            # Equality calls (1, 2) and [1, 2] different, but 1 and 1.0 or True the same.
            assert repr(came) == repr(was), field.name
    assert os.listdir(tmp_path) == ["result.safetensors"]


def test_saving_changes_nothing_and_repeats_itself(result: Result, tmp_path: Path) -> None:
    before = repr(result)
    first = result.save(tmp_path / "a.safetensors").read_bytes()
    assert repr(result) == before
    assert load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors").read_bytes() == first


def test_tensors_that_share_or_stride_are_saved(tmp_path: Path) -> None:
    # safetensors itself refuses tensors that share memory or are no contiguous block.
    base = torch.rand(2, 3, 1, 2)
    result = dataclasses.replace(
        head_scores(),
        scores={"induction_score": base[:, :1], "copying_score": base[:, 1:2]},
        nulls={"induction_score": base.transpose(0, 1)[:1].transpose(0, 1)},
    )
    assert load(result.save(tmp_path / "a.safetensors")) == result


def test_empty_dicts_and_tuples_come_back(tmp_path: Path) -> None:
    result = dataclasses.replace(head_scores(), nulls={}, seeds=())
    back = HeadScores.load(result.save(tmp_path / "a.safetensors"))
    assert back == result
    assert back.nulls == {}
    assert back.seeds == ()


@dataclasses.dataclass(frozen=True, eq=False)
class Odd(Result):
    """Fields that no shipped result has, but a later one may."""

    pairs: tuple[tuple[int, ...], ...]
    nothing: None
    settings: dict[str, Any]
    whole: Float[Tensor, ""]
    narrow: Float[Tensor, " n"]


def test_odd_fields_come_back(tmp_path: Path) -> None:
    result = Odd(
        model=MODEL,
        pairs=((1, 2), (), (3,)),
        nothing=None,
        settings={"a": ((1, "x"), (None, True)), "tensors": ("no", "tensor")},
        whole=torch.tensor(1.5),
        narrow=torch.tensor([1.0, math.nan], dtype=torch.bfloat16),
    )
    assert load(result.save(tmp_path / "a.safetensors")) == result
    # what a dict of tensors looks like in the header
    only = dataclasses.replace(result, settings={"tensors": ("no", "tensor")})
    assert load(only.save(tmp_path / "b.safetensors")) == only


def test_a_tensor_on_the_graph_is_saved_without_it(tmp_path: Path) -> None:
    result = dataclasses.replace(patterns(), patterns=patterns().patterns.requires_grad_())
    back = AttentionPatterns.load(result.save(tmp_path / "a.safetensors"))
    assert not back.patterns.requires_grad
    assert back == patterns()


# -- equality --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"confidence": 0.8},
        {"seq_len": 2},
        {"seeds": (0, 2)},
        {"model": dataclasses.replace(MODEL, name="other")},
        {"nulls": {}},
        {"tokens": {"repeated": torch.tensor([[[0, 5, 5]], [[0, 6, 6]]])}},
        {"scores": {"copying_score": torch.zeros(2, 1, 1, 2), "induction_score": torch.zeros(2, 1, 1, 2)}},
    ],
)
def test_another_value_is_unequal(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(head_scores(), **changes) != head_scores()


def test_equality_is_by_value() -> None:
    assert head_scores() == head_scores()
    assert performance() == performance()
    assert head_scores() != performance()
    assert head_scores() != "head scores"
    twice = patterns()
    assert dataclasses.replace(twice, patterns=twice.patterns.double()) != twice
    assert dataclasses.replace(twice, patterns=torch.full((2, 2, 2), math.nan)) != twice


def test_what_is_long_is_shown_by_its_length() -> None:
    many = dataclasses.replace(lens(), strings={str(i): "x" for i in range(500)})
    assert "strings=<500 entries>" in repr(many)
    assert len(repr(many)) < 1500


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        head_scores().jitter = 3  # type: ignore[misc]


def test_shapes_of_fields_are_checked_here() -> None:
    # jaxtyping.TypeCheckError is a TypeError; without the import hook of conftest.py nothing is raised.
    with pytest.raises(TypeError, match="log_prob"):
        dataclasses.replace(performance(), log_prob=torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match="intervals"):
        dataclasses.replace(head_scores(), intervals={"induction_score": torch.zeros(2, 1, 3)})
    with pytest.raises(TypeError, match="heads"):
        dataclasses.replace(patterns(), heads=(0, 1))
    with pytest.raises(TypeError, match="patterns"):
        dataclasses.replace(patterns(), patterns=torch.ones(2, 2, 2, dtype=torch.long))


# -- a save that is killed -------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import {module}
from tests.results.test_results import head_scores, patterns

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

{module}.{name} = die
patterns().save(sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill without notice")
@pytest.mark.parametrize(
    ("module", "name", "there"),
    [
        ("mechlens.results.base", "save_file", True),
        ("os", "fsync", True),
        ("os", "replace", True),
        ("os", "replace", False),
    ],
)
def test_a_killed_save_leaves_the_old_file(tmp_path: Path, module: str, name: str, there: bool) -> None:
    path = tmp_path / "result.safetensors"
    if there:
        head_scores().save(path)
    code = KILLED.format(module=module, name=name)
    ran = subprocess.run([sys.executable, "-c", code, str(path)], stdin=subprocess.DEVNULL, check=False)
    assert ran.returncode == -signal.SIGKILL
    if there:
        assert load(path) == head_scores()
    else:
        assert not path.exists()
    leftovers = [entry for entry in os.listdir(tmp_path) if entry != path.name]
    # The part is named so that no pattern for results finds it, and .gitignore does.
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".result.safetensors.")
    assert leftovers[0].endswith(".part")
    assert [each.name for each in tmp_path.glob("*.safetensors")] == [path.name] * there
    patterns().save(path)
    assert load(path) == patterns()


def test_a_failing_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = head_scores().save(tmp_path / "result.safetensors")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        patterns().save(path)
    assert load(path) == head_scores()
    assert os.listdir(tmp_path) == ["result.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        path = patterns().save(tmp_path / "a.safetensors")
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == mode


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pt", "a", "a.safetensors.gz", "a.json"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"saved as \.safetensors files, but the path is .*" + name):
        patterns().save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        patterns().save(tmp_path / "nowhere" / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such result file: .*a\.safetensors"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no such result file"):
        load(tmp_path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = patterns().save(tmp_path / "a.safetensors")
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a complete \.safetensors file"):
            load(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match="not a result that mechlens saved"):
            load(path)


def test_another_type_of_result_is_refused(tmp_path: Path) -> None:
    path = patterns().save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds a AttentionPatterns, not a HeadScores"):
        HeadScores.load(path)
    assert Result.load(path) == patterns()


def _with_header(path: Path, change: Any) -> Path:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["mechlens"])
    change(header)
    save_file(load_file(path), path, metadata={"mechlens": json.dumps(header)})
    return path


def test_a_newer_format_or_an_unknown_type_is_refused(tmp_path: Path) -> None:
    path = patterns().save(tmp_path / "a.safetensors")
    newer = _with_header(path, lambda header: header.update(format=FORMAT + 1))
    with pytest.raises(ValueError, match="which this version of mechlens does not know"):
        load(newer)
    unknown = _with_header(path, lambda header: header.update(format=FORMAT, type="CircuitScores"))
    with pytest.raises(ValueError, match="holds a CircuitScores, which this version"):
        load(unknown)


def test_a_header_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = patterns().save(tmp_path / "a.safetensors")
    for header in ("{", "[]", "{}", '{"type": "AttentionPatterns", "format": 1, "fields": {}}'):
        save_file({"tokens": torch.zeros(2)}, path, metadata={"mechlens": header})
        with pytest.raises(ValueError, match="is damaged"):
            load(path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    code = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    path.write_bytes(code)
    with pytest.raises(ValueError, match=r"is not a complete \.safetensors file"):
        load(path)
    torch.save(head_scores().scores, path)
    with pytest.raises(ValueError, match=r"is not a complete \.safetensors file"):
        load(path)
    assert os.listdir(tmp_path) == ["a.safetensors"]


# -- tables ----------------------------------------------------------------------------------------


def test_table_of_performance() -> None:
    table = performance().to_dataframe()
    assert list(table.columns) == ["seed", "sequence", "pos", "id", "log_prob", "correct", "half"]
    # BOS predicts token 1 of the first copy, position 1 token 2; positions 2 and 3 predict the second copy.
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        (7, 0, 0, 0, -4.0, False, 1),
        (7, 0, 1, 5, -3.0, False, 1),
        (7, 0, 2, 6, -2.0, True, 2),
        (7, 0, 3, 5, -1.0, True, 2),
        (7, 1, 0, 0, -4.5, False, 1),
        (7, 1, 1, 7, -3.5, False, 1),
        (7, 1, 2, 8, -2.5, False, 2),
        (7, 1, 3, 7, -1.5, True, 2),
    ]


def test_table_of_performance_without_bos() -> None:
    result = performance()
    cut = dataclasses.replace(
        result,
        tokens=result.tokens[..., 1:],
        log_prob=result.log_prob[..., 1:],
        correct=result.correct[..., 1:],
        prepend_bos=False,
    )
    assert cut.to_dataframe()["half"].tolist() == [1, 2, 2, 1, 2, 2]


def test_columns_mean_the_same_in_every_table(result: Result) -> None:
    for table in (result.to_dataframe(),):
        names = list(table.columns)
        assert len(set(names)) == len(names)
        assert not any(c.isspace() for name in names for c in name), names
        assert ("row" in names) <= ("layer" in names)
        for name in names:
            values = table[name]
            if name in ("layer", "head", "id", "pos") or name.endswith(("_layer", "_head")):
                assert pd.api.types.is_integer_dtype(values), name
            elif name != "row":
                assert not values.map(lambda value: bool(re.fullmatch(r"embed|\d+", str(value)))).all() or (
                    pd.api.types.is_numeric_dtype(values)
                ), f"{name} holds numbers as text"
        if "row" in names:
            assert table["row"].tolist() == ["embed" if n < 0 else str(n) for n in table["layer"]]
        if "token" in names:
            # what the model read at `pos`
            assert set(table["token"]) <= set(result.strings.values())
        if {"token", "sequence", "pos"} <= set(names):
            there = [
                result.strings[str(int(result.tokens[s, p]))]
                for s, p in zip(table["sequence"], table["pos"], strict=True)
            ]
            assert table["token"].tolist() == there


@pytest.mark.parametrize("make", [lens, vector_lens])
def test_what_is_predicted_is_a_guess(make: Any) -> None:
    result = make()
    table = result.to_dataframe()
    assert set(table["guess"]) <= {result.strings[str(i)] for i in result.top_ids.flatten().tolist()}
    assert ("token" in table) == isinstance(result, LogitLensResult)


def test_a_deep_lens_is_ordered_by_its_layer() -> None:
    rows = ("embed", *map(str, range(30)))
    table = deep_lens(30).to_dataframe()
    pivot = table.pivot(index="layer", columns="pos", values="kl_final")
    assert pivot.index.tolist() == list(range(-1, 30))
    assert table["row"].tolist() == [row for row in rows for _ in range(3)]


def test_a_lens_on_heads_has_their_layer_and_head() -> None:
    heads = dataclasses.replace(lens(), read="result", rows=("embed", "L12H3")).to_dataframe()
    assert heads["layer"].tolist() == [-1, -1, 12, 12]
    assert heads["head"].tolist() == [pd.NA, pd.NA, 3, 3]
    assert "head" not in lens().to_dataframe()


def test_columns_of_targets_have_no_blanks_and_are_never_the_same() -> None:
    names = (" Paris", "Paris", "·Paris", "\\xb7Paris", "\n", "\\n", "\u3000", "7")
    of = {name: torch.full((2, 1, 2), float(at)) for at, name in enumerate(names)}
    result = dataclasses.replace(lens(), rank=of, log_prob=of)
    table = result.to_dataframe()
    ranks = [name for name in table.columns if name.startswith("rank_")]
    assert ranks == [
        "rank_·Paris",
        "rank_Paris",
        r"rank_\xb7Paris",
        r"rank_\\xb7Paris",
        r"rank_\n",
        r"rank_\\n",
        r"rank_\u3000",
        "rank_7",
    ]
    for at, (rank, name) in enumerate(zip(ranks, names, strict=True)):
        assert set(table[rank]) == set(table[rank.replace("rank", "log_prob")]) == {at}, name


def test_table_of_head_scores() -> None:
    table = head_scores().to_dataframe()
    columns = ["kind", "layer", "head", "label", "score", "low", "high", "null", "sequences"]
    assert list(table.columns) == columns
    rows = [tuple(row) for row in table.itertuples(index=False)]
    expected = [
        ("induction_score", 0, 0, "L0H0", 0.2, 0.1, 0.3, 0.1, 2),
        ("induction_score", 0, 1, "L0H1", 0.8, 0.7, 0.9, 0.2, 2),
        ("copying_score", 0, 0, "L0H0", math.nan, math.nan, math.nan, math.nan, 2),
        ("copying_score", 0, 1, "L0H1", 0.0, -0.5, 0.5, math.nan, 2),
    ]
    for row, wanted in zip(rows, expected, strict=True):
        assert row[:4] + row[8:] == wanted[:4] + wanted[8:]
        # float32's rounding of 0.1 and the like
        assert row[4:8] == pytest.approx(wanted[4:8], abs=1e-7, nan_ok=True)


def test_table_of_patterns() -> None:
    rows = [tuple(row) for row in patterns().to_dataframe().itertuples(index=False)]
    assert rows == [
        (0, 1, 0, 0, 1.0),
        (0, 1, 1, 0, 0.25),
        (0, 1, 1, 1, 0.75),
        (0, 0, 0, 0, 1.0),
        (0, 0, 1, 0, 0.5),
        (0, 0, 1, 1, 0.5),
    ]


def test_table_of_a_circuit() -> None:
    rows = [tuple(row) for row in circuit().to_dataframe().itertuples(index=False)]
    assert [row[0] for row in rows] == [0, 1]
    # one row of 5 times one column of 2, which a QR and an SVD in float32 find up to rounding
    assert [row[1] for row in rows] == pytest.approx([10, 0], abs=1e-5)
    assert [row[2] for row in rows] == pytest.approx([1, 0], abs=1e-5)
    assert circuit().shape == (3, 4)


def test_table_of_composition() -> None:
    rows = [tuple(row) for row in composition().to_dataframe().itertuples(index=False)]
    assert rows == [("L0H0", "L1H0", 0, 0, 1, 0, "k", 0.5, 0.375, 1.5)]
    assert composition().over_baseline[0, 0, 1, 0] == 0.375
    assert composition().over_baseline[1, 0, 0, 0].isnan()


def test_composition_is_ranked_by_score() -> None:
    scores = torch.full((2, 2, 2, 2), math.nan)
    scores[0, :, 1, :] = torch.tensor([[0.125, math.nan], [0.75, 0.5]])
    table = dataclasses.replace(composition(), scores=scores).to_dataframe()
    # a head without weights has no score, and comes last
    assert list(table["earlier"] + table["later"]) == ["L0H1L1H0", "L0H1L1H1", "L0H0L1H0", "L0H0L1H1"]


def test_table_of_positional_attention() -> None:
    rows = [tuple(row) for row in positional().to_dataframe().itertuples(index=False)]
    assert rows == [(0, 0, 1.0), (1, 0, 0.25), (1, 1, 0.75)]


def test_a_table_can_be_made_of_what_was_loaded(result: Result, tmp_path: Path) -> None:
    back = load(result.save(tmp_path / "a.safetensors"))
    assert back.to_dataframe().equals(result.to_dataframe())


# -- what head scores tell -------------------------------------------------------------------------


def test_means_and_rank() -> None:
    result = head_scores()
    assert result.kinds == ("induction_score", "copying_score")
    torch.testing.assert_close(result.mean("induction_score"), torch.tensor([[0.2, 0.8]]))
    torch.testing.assert_close(result.null("induction_score"), torch.tensor([[0.1, 0.2]]))
    ranked = list(result.ranked("induction_score"))
    assert [head for head, _ in ranked] == [(0, 1), (0, 0)]
    assert [score for _, score in ranked] == pytest.approx([0.8, 0.2])
    assert list(result.ranked("copying_score")) == [((0, 1), 0.0)]


def test_rank_over_layers_keeps_ties_in_order() -> None:
    scores = torch.tensor([[0.5, 0.1], [math.nan, 0.9], [0.5, 0.5]])[None, None]
    result = dataclasses.replace(
        head_scores(),
        scores={"induction_score": scores},
        nulls={},
        intervals={"induction_score": torch.stack([scores[0, 0], scores[0, 0]])},
        tokens={"repeated": torch.zeros(1, 1, 3, dtype=torch.long)},
        seeds=(0,),
    )
    heads = [head for head, _ in result.ranked("induction_score")]
    assert heads == [(1, 1), (0, 0), (2, 0), (2, 1), (0, 1)]
    assert head_label(*heads[0]) == "L1H1"


def test_an_unknown_score_is_an_error_that_lists_the_scores() -> None:
    with pytest.raises(
        ValueError, match="kind must be one of induction_score, copying_score, got 'inductoin'"
    ):
        head_scores().mean("inductoin")
    with pytest.raises(ValueError, match="kind must be one of induction_score, got 'copying_score'"):
        head_scores().null("copying_score")
    with pytest.raises(ValueError, match="this result has no null baselines"):
        dataclasses.replace(head_scores(), nulls={}).null("induction_score")
