"""Saved results load as equal objects, or the error says why not."""

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

from mechlens.results import FORMAT, AttentionPatterns, HeadScores, LogitLensResult, Result, head_label, load
from tests import examples
from tests.examples import RESULTS


@pytest.fixture(params=RESULTS)
def result(request: pytest.FixtureRequest) -> Result:
    return RESULTS[request.param]()


def test_every_type_of_result_is_tested() -> None:
    assert {type(make()) for make in RESULTS.values()} == set(_shipped_types())


def _shipped_types() -> list[type[Result]]:
    ours = [cls for cls in Result.types.values() if cls.__module__.startswith("mechlens.results.")]
    # a shared base class is not a result
    return [cls for cls in ours if not cls.__name__.startswith("_") and "__dataclass_fields__" in vars(cls)]


# -- saving and loading ----------------------------------------------------------------------------


def test_a_loaded_result_equals_the_saved_one(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    assert result.save(path) == path
    for back in (load(path), type(result).load(str(path))):
        assert back == result
        for field in dataclasses.fields(result):
            was, came = getattr(result, field.name), getattr(back, field.name)
            # == distinguishes (1, 2) from [1, 2], but not 1 from 1.0 or True.
            assert repr(came) == repr(was), field.name
    assert os.listdir(tmp_path) == ["result.safetensors"]


def test_saving_changes_nothing_and_is_deterministic(result: Result, tmp_path: Path) -> None:
    before = repr(result)
    first = result.save(tmp_path / "a.safetensors").read_bytes()
    assert repr(result) == before
    assert load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors").read_bytes() == first


def test_shared_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    # safetensors itself refuses tensors that share memory or are not contiguous.
    base = torch.rand(1, 4, 2, 3)
    result = dataclasses.replace(
        examples.head_scores(),
        scores={"induction_score": base[:, :2], "copying_score": base[:, 1:3]},
        nulls={"induction_score": base.transpose(2, 3)[:, :2].contiguous().transpose(2, 3)},
    )
    assert load(result.save(tmp_path / "a.safetensors")) == result


def test_empty_dicts_and_tuples_are_restored(tmp_path: Path) -> None:
    result = dataclasses.replace(examples.head_scores(), nulls={}, seeds=())
    back = HeadScores.load(result.save(tmp_path / "a.safetensors"))
    assert back == result
    assert back.nulls == {}
    assert back.seeds == ()


@dataclasses.dataclass(frozen=True, eq=False)
class Odd(Result):
    """Fields that no existing result has, but a later one may."""

    pairs: tuple[tuple[int, ...], ...]
    nothing: None
    settings: dict[str, Any]
    whole: Float[Tensor, ""]
    narrow: Float[Tensor, " n"]


def test_unusual_fields_are_restored(tmp_path: Path) -> None:
    result = Odd(
        model=examples.model(),
        pairs=((1, 2), (), (3,)),
        nothing=None,
        settings={"a": ((1, "x"), (None, True)), "tensors": ("no", "tensor")},
        whole=torch.tensor(1.5),
        narrow=torch.tensor([1.0, math.nan], dtype=torch.bfloat16),
    )
    assert load(result.save(tmp_path / "a.safetensors")) == result
    # looks like a dict of tensors in the header
    only = dataclasses.replace(result, settings={"tensors": ("no", "tensor")})
    assert load(only.save(tmp_path / "b.safetensors")) == only


def test_a_tensor_on_the_graph_is_saved_without_it(tmp_path: Path) -> None:
    result = dataclasses.replace(
        examples.attention(), patterns=examples.attention().patterns.requires_grad_()
    )
    back = AttentionPatterns.load(result.save(tmp_path / "a.safetensors"))
    assert not back.patterns.requires_grad
    assert back == examples.attention()


# -- equality --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"confidence": 0.8},
        {"seq_len": 2},
        {"seeds": (0, 2)},
        {"model": dataclasses.replace(examples.model(), name="other")},
        {"nulls": {}},
        {"tokens": {"repeated": torch.ones(1, 2, 7, dtype=torch.long)}},
        {"scores": {"copying_score": torch.zeros(1, 2, 2, 3), "induction_score": torch.zeros(1, 2, 2, 3)}},
    ],
)
def test_another_value_is_unequal(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(examples.head_scores(), **changes) != examples.head_scores()


def test_equality_is_by_value() -> None:
    assert examples.head_scores() == examples.head_scores()
    assert examples.performance() == examples.performance()
    assert examples.head_scores() != examples.performance()
    assert examples.head_scores() != "head scores"
    twice = examples.attention()
    assert dataclasses.replace(twice, patterns=twice.patterns.double()) != twice
    assert dataclasses.replace(twice, patterns=torch.full((2, 3, 3), math.nan)) != twice


def test_long_fields_are_shown_by_their_length() -> None:
    many = dataclasses.replace(examples.lens(), strings={str(i): "x" for i in range(500)})
    assert "strings=<500 entries>" in repr(many)
    assert len(repr(many)) < 1500


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        examples.head_scores().jitter = 3


def test_shapes_of_fields_are_checked_in_tests() -> None:
    # jaxtyping.TypeCheckError is a TypeError. Without the import hook of conftest.py nothing is raised.
    with pytest.raises(TypeError, match="log_prob"):
        dataclasses.replace(examples.performance(), log_prob=torch.zeros(2, 2, 6))
    with pytest.raises(TypeError, match="intervals"):
        dataclasses.replace(examples.head_scores(), intervals={"induction_score": torch.zeros(2, 1, 3)})
    with pytest.raises(TypeError, match="heads"):
        dataclasses.replace(examples.attention(), heads=(0, 1))
    with pytest.raises(TypeError, match="patterns"):
        dataclasses.replace(examples.attention(), patterns=torch.ones(2, 3, 3, dtype=torch.long))


# -- a save that is killed -------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import {module}
from tests import examples

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

{module}.{name} = die
examples.attention().save(sys.argv[1])
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
        examples.head_scores().save(path)
    code = KILLED.format(module=module, name=name)
    ran = subprocess.run([sys.executable, "-c", code, str(path)], stdin=subprocess.DEVNULL, check=False)
    assert ran.returncode == -signal.SIGKILL
    if there:
        assert load(path) == examples.head_scores()
    else:
        assert not path.exists()
    leftovers = [entry for entry in os.listdir(tmp_path) if entry != path.name]
    # No pattern for results matches the temporary file's name, but .gitignore does.
    assert len(leftovers) == 1
    assert leftovers[0].startswith(".result.safetensors.")
    assert leftovers[0].endswith(".part")
    assert [each.name for each in tmp_path.glob("*.safetensors")] == [path.name] * there
    examples.attention().save(path)
    assert load(path) == examples.attention()


def test_a_failing_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = examples.head_scores().save(tmp_path / "result.safetensors")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        examples.attention().save(path)
    assert load(path) == examples.head_scores()
    assert os.listdir(tmp_path) == ["result.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        path = examples.attention().save(tmp_path / "a.safetensors")
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == mode


# -- refused files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pt", "a", "a.safetensors.gz", "a.json"])
def test_another_file_extension_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"saved as \.safetensors files, but the path is .*" + name):
        examples.attention().save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        examples.attention().save(tmp_path / "nowhere" / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such result file: .*a\.safetensors"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no such result file"):
        load(tmp_path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = examples.attention().save(tmp_path / "a.safetensors")
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
    path = examples.attention().save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="contains AttentionPatterns, not HeadScores"):
        HeadScores.load(path)
    assert Result.load(path) == examples.attention()


def _with_header(path: Path, change: Any) -> Path:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["mechlens"])
    change(header)
    save_file(load_file(path), path, metadata={"mechlens": json.dumps(header)})
    return path


def test_a_newer_format_or_an_unknown_type_is_refused(tmp_path: Path) -> None:
    path = examples.attention().save(tmp_path / "a.safetensors")
    newer = _with_header(path, lambda header: header.update(format=FORMAT + 1))
    with pytest.raises(ValueError, match="which this version of mechlens does not know"):
        load(newer)
    unknown = _with_header(path, lambda header: header.update(format=FORMAT, type="CircuitScores"))
    with pytest.raises(ValueError, match="contains CircuitScores, which this version"):
        load(unknown)


def test_a_header_that_is_not_a_result_is_refused(tmp_path: Path) -> None:
    path = examples.attention().save(tmp_path / "a.safetensors")
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
    torch.save(examples.head_scores().scores, path)
    with pytest.raises(ValueError, match=r"is not a complete \.safetensors file"):
        load(path)
    assert os.listdir(tmp_path) == ["a.safetensors"]


# -- tables ----------------------------------------------------------------------------------------


def test_table_of_performance() -> None:
    table = examples.performance().to_dataframe()
    assert list(table.columns) == ["seed", "sequence", "pos", "id", "log_prob", "correct", "half"]
    # BOS and two tokens of the first copy predict the first copy; its third token predicts the second copy
    last = [tuple(row) for row in table.itertuples(index=False)][-6:]
    assert [row[:4] + row[5:] for row in last] == [
        (1, 1, 0, 0, False, 1),
        (1, 1, 1, 5, False, 1),
        (1, 1, 2, 6, False, 1),
        (1, 1, 3, 7, False, 2),
        (1, 1, 4, 5, True, 2),
        (1, 1, 5, 6, True, 2),
    ]
    # float32 rounding of 1.3 etc.
    assert [row[4] for row in last] == pytest.approx([-1.3, -2.3, -3.3, -4.3, -5.3, -6.3], abs=1e-6)


def test_table_of_performance_without_bos() -> None:
    table = examples.performance(prepend_bos=False).to_dataframe()
    assert table["half"].tolist() == [1, 1, 2, 2, 2] * 4


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
            # the input token at `pos`
            assert set(table["token"]) <= set(result.strings.values())
        if {"token", "sequence", "pos"} <= set(names):
            there = [
                result.strings[str(int(result.tokens[s, p]))]
                for s, p in zip(table["sequence"], table["pos"], strict=True)
            ]
            assert table["token"].tolist() == there


@pytest.mark.parametrize("make", [examples.lens, examples.vector_lens])
def test_predicted_tokens_are_guesses(make: Any) -> None:
    result = make()
    table = result.to_dataframe()
    assert set(table["guess"]) <= {result.strings[str(i)] for i in result.top_ids.flatten().tolist()}
    assert ("token" in table) == isinstance(result, LogitLensResult)


def test_a_deep_lens_is_ordered_by_its_layer() -> None:
    rows = ("embed", *map(str, range(30)))
    table = examples.deep_lens(30).to_dataframe()
    pivot = table.pivot(index="layer", columns="pos", values="kl_final")
    assert pivot.index.tolist() == list(range(-1, 30))
    assert table["row"].tolist() == [row for row in rows for _ in range(3)]


def test_a_lens_on_heads_has_their_layer_and_head() -> None:
    heads = dataclasses.replace(examples.lens(), read="result", rows=("embed", "L12H3")).to_dataframe()
    assert heads["layer"].tolist() == [-1] * 3 + [12] * 3
    assert heads["head"].tolist() == [pd.NA] * 3 + [3] * 3
    assert "head" not in examples.lens().to_dataframe()


def test_columns_of_targets_have_no_blanks_and_are_distinct() -> None:
    names = (" Paris", "Paris", "·Paris", "\\xb7Paris", "\n", "\\n", "\u3000", "7")
    of = {name: torch.full((2, 1, 3), float(at)) for at, name in enumerate(names)}
    result = dataclasses.replace(examples.lens(), rank=of, log_prob=of)
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


def two_seeds() -> HeadScores:
    """Two heads, two seeds of one sequence; the copying score of one is undefined."""
    copying = torch.tensor([[[math.nan, -0.5]], [[math.nan, 0.5]]])
    return dataclasses.replace(
        examples.head_scores(),
        scores={
            "induction_score": torch.tensor([[[[0.125, 0.75]]], [[[0.375, 1.0]]]]),
            "copying_score": copying[:, None],
        },
        nulls={"induction_score": torch.tensor([[[[0.0, 0.125]]], [[[0.25, 0.375]]]])},
        intervals={
            "induction_score": torch.tensor([[[0.125, 0.75]], [[0.375, 1.0]]]),
            "copying_score": copying,
        },
        tokens={"repeated": torch.zeros(2, 1, 3, dtype=torch.long)},
        seeds=(0, 1),
    )


def test_table_of_head_scores() -> None:
    table = two_seeds().to_dataframe()
    columns = ["kind", "layer", "head", "label", "score", "low", "high", "null", "sequences"]
    assert list(table.columns) == columns
    nan = pytest.approx(math.nan, nan_ok=True)
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        ("induction_score", 0, 0, "L0H0", 0.25, 0.125, 0.375, 0.125, 2),
        ("induction_score", 0, 1, "L0H1", 0.875, 0.75, 1.0, 0.25, 2),
        ("copying_score", 0, 0, "L0H0", nan, nan, nan, nan, 2),
        ("copying_score", 0, 1, "L0H1", 0.0, -0.5, 0.5, nan, 2),
    ]


def test_table_of_patterns() -> None:
    table = examples.attention(tokens=("<script>", "\u2028ü\n")).to_dataframe()
    assert [tuple(row) for row in table.itertuples(index=False)] == [
        (0, 2, 0, 0, 1.0),
        (0, 2, 1, 0, 0.5),
        (0, 2, 1, 1, 0.5),
        (1, 0, 0, 0, 1.0),
        (1, 0, 1, 0, 0.0),
        (1, 0, 1, 1, 1.0),
    ]


def test_table_of_a_circuit() -> None:
    table = examples.circuit(B=torch.ones(2, 4)).to_dataframe()
    # the columns 2, -1 and 0, four times: one row of length sqrt(5), from a float32 QR and SVD
    assert table["index"].tolist() == [0, 1]
    assert table["singular_value"].tolist() == pytest.approx([20**0.5, 0], abs=1e-5)
    assert table["share"].tolist() == pytest.approx([1, 0], abs=1e-5)
    assert examples.circuit(B=torch.ones(2, 4)).shape == (3, 4)


def test_table_of_composition() -> None:
    result = examples.composition()
    first = tuple(result.to_dataframe().iloc[0])
    assert first[:7] == ("L1H1", "L2H1", 1, 1, 2, 1, "k")
    # the score, its excess over the baseline, and that in standard deviations, in float32
    assert first[7:] == pytest.approx((0.43, 0.18, 1.8), abs=1e-6)
    assert float(result.over_baseline[1, 1, 2, 1]) == pytest.approx(0.18, abs=1e-6)
    assert result.over_baseline[1, 0, 0, 0].isnan()


def test_composition_is_ranked_by_score() -> None:
    scores = torch.full((2, 2, 2, 2), math.nan)
    scores[0, :, 1, :] = torch.tensor([[0.125, math.nan], [0.75, 0.5]])
    table = dataclasses.replace(examples.composition(), scores=scores).to_dataframe()
    # a head with zero weights has no score, and comes last
    assert list(table["earlier"] + table["later"]) == ["L0H1L1H0", "L0H1L1H1", "L0H0L1H0", "L0H0L1H1"]


def test_table_of_positional_attention() -> None:
    rows = [tuple(row) for row in examples.positional().to_dataframe().itertuples(index=False)]
    assert rows == [(0, 0, 1.0), (1, 0, 0.25), (1, 1, 0.75)]


def test_a_loaded_result_makes_a_table(result: Result, tmp_path: Path) -> None:
    back = load(result.save(tmp_path / "a.safetensors"))
    assert back.to_dataframe().equals(result.to_dataframe())


# -- rankings of head scores -----------------------------------------------------------------------


def test_means_and_rank() -> None:
    result = two_seeds()
    assert result.kinds == ("induction_score", "copying_score")
    assert result.mean("induction_score").tolist() == [[0.25, 0.875]]
    assert result.null("induction_score").tolist() == [[0.125, 0.25]]
    assert list(result.ranked("induction_score")) == [((0, 1), 0.875), ((0, 0), 0.25)]
    assert list(result.ranked("copying_score")) == [((0, 1), 0.0)]


def test_rank_over_layers_keeps_ties_in_order() -> None:
    scores = torch.tensor([[0.5, 0.1], [math.nan, 0.9], [0.5, 0.5]])[None, None]
    result = dataclasses.replace(
        examples.head_scores(),
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
        examples.head_scores().mean("inductoin")
    with pytest.raises(ValueError, match="kind must be one of induction_score, got 'copying_score'"):
        examples.head_scores().null("copying_score")
    with pytest.raises(ValueError, match="this result has no null baselines"):
        dataclasses.replace(examples.head_scores(), nulls={}).null("induction_score")
