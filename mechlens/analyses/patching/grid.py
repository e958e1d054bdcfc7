"""A grid of patches: one cell per forward pass."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.analyses.patching.spec import GridSpec
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.patched_runs import PatchedRuns
from mechlens.models.run.user_hooks import user_hooks
from mechlens.results import PatchGridResult
from mechlens.results.checkpoint import Checkpoint, checkpoint_path

POSITIONS = 512
"""Positions of counterpart runs that go together: enough for a processor, few to keep."""


def run_grid(spec: GridSpec, resume: str | os.PathLike[str] | None = None) -> PatchGridResult:
    """Run every cell; see `Patching.grid`."""
    path = checkpoint_path(resume)
    named = {"values": spec.source.label, "metric": spec.experiment.metric.name}
    for name, label in named.items():
        if path is not None and label == "<lambda>":
            raise ValueError(f"resume cannot tell lambdas apart: define {name} with `def`")
    notes: list[str] = []
    with Checkpoint(
        path, "sweep", spec.arguments, owner="a grid of patches", names=_Progress.names()
    ) as saved:
        done = _Progress.of(spec, saved.tensors, path)
        for _ in saved.loop(
            _parts(spec, done, notes),
            lambda: (vars(done.state), done.count),
            desc=f"patch {spec.site}",
            unit="run",
            total=done.total,
            progress=spec.experiment.progress,
            size=int,
        ):
            pass
    return PatchGridResult(
        **spec.fields(),
        values=done.state.values.masked_fill(~spec.cells.asked, torch.nan),
        clean=done.state.clean,
        corrupted=done.state.corrupted,
        note=notes[-1] if notes else "",
    )


def _parts(spec: GridSpec, done: _Progress, notes: list[str]) -> Iterator[int]:
    """Run the remaining cells, and yield how many were done each time."""
    experiment, read = spec.experiment, spec.experiment.readout.at
    counterparts = _Counterparts(spec)
    values_of = None
    for index in range(len(experiment.tokens)):
        left = done.left(index)
        if len(left) == 0:
            continue
        tokens, others = experiment.runs(index, spec.into)
        runs = PatchedRuns.of(
            experiment.model, tokens, spec.site, keep=spec.keep(own=True), last_read=max(read)
        )
        own = runs.clean
        other = own if others is None else counterparts.of(index)
        clean, corrupted = (own, other) if spec.into == "clean" else (other, own)
        readout = experiment.readout.of_prompt(index, clean.final)
        done.note_run("clean", index, readout.of_run(clean.final))
        if others is not None:
            done.note_run("corrupted", index, readout.of_run(corrupted.final))
        if runs.why and tokens.shape[1] > 1:
            notes.append(f"patches were whole runs: {runs.why}")
        if values_of is None:
            values_of = spec.source.values(experiment.model, spec.site, spec.cells.layers)
        patches = spec.patches(values_of(own, other, index), left, own, other)
        for part in runs.run(patches, token_budget=experiment.token_budget):
            found = readout.of_rows(part.final, part.start, own.final)
            done.note(index, left[part.which], found.cpu())
            yield len(part.which)


class _Counterparts:
    """The other run of each prompt, several at a time; one at a time if the user has hooks."""

    def __init__(self, spec: GridSpec) -> None:
        self.spec, (_, self.tokens) = spec, spec.experiment.prompts(spec.into)
        hooked = bool(user_hooks(spec.experiment.model))
        self.size = 1 if hooked else max(1, POSITIONS // spec.experiment.tokens.shape[1])
        self.begin = 0
        self.found: CleanRun | None = None

    def of(self, index: int) -> CleanRun:
        """Cost: one forward pass of each prompt if they are asked for in order."""
        assert self.tokens is not None
        if self.found is None or not self.begin <= index < self.begin + self.size:
            self.begin = index
            some = self.tokens[index : index + self.size]
            self.found = CleanRun.of(self.spec.experiment.model, some, self.spec.keep(own=False))
        return self.found.prompt(index - self.begin)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """The tensors of a checkpoint."""

    values: Float[Tensor, "prompt *grid"]
    cells: Bool[Tensor, "prompt *grid"]
    """The cells whose values are known."""
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Progress:
    """The grid so far."""

    state: _State
    asked: Bool[Tensor, "*grid"]
    path: Path | None

    @staticmethod
    def names() -> list[str]:
        return [field.name for field in dataclasses.fields(_State)]

    @classmethod
    def of(cls, spec: GridSpec, saved: Mapping[str, Tensor], path: Path | None) -> _Progress:
        n_prompts = len(spec.experiment.tokens)
        shape = (n_prompts, *spec.cells.shape)
        nothing = {
            "values": torch.full(shape, torch.nan, dtype=torch.float32),
            "cells": torch.zeros(shape, dtype=torch.bool),
            "clean": torch.full((n_prompts,), torch.nan, dtype=torch.float32),
            "corrupted": torch.full((n_prompts,), torch.nan, dtype=torch.float32),
        }
        return cls(_State(**(nothing | dict(saved))), spec.cells.asked, path)

    @property
    def count(self) -> int:
        return int(self.state.cells.sum())

    @property
    def total(self) -> int:
        return len(self.state.cells) * int(self.asked.sum())

    def left(self, index: int) -> Int[Tensor, " cell"]:
        """The numbers of a prompt's cells that are still to be run."""
        return (self.asked & ~self.state.cells[index]).reshape(-1).nonzero()[:, 0]

    def note_run(self, name: str, index: int, value: float) -> None:
        """Store the metric of an unpatched run. This detects a checkpoint made with other weights."""
        runs = getattr(self.state, name)
        known = float(runs[index])
        # float32, perhaps from another machine
        if known == known and abs(known - value) > 1e-3 * max(1.0, abs(known)):
            raise ValueError(
                f"{self.path} was begun with other weights: the metric of its {name} run is {known:.6g}, "
                f"but here it is {value:.6g}; delete the file to start again"
            )
        runs[index] = value

    def note(self, index: int, which: Int[Tensor, " row"], found: Float[Tensor, " row"]) -> None:
        self.state.values[index].view(-1)[which] = found
        # last, so that an interruption never leaves a cell marked known without its value
        self.state.cells[index].view(-1)[which] = True
