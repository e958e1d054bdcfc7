"""Patch one head's output only as another component sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.patching.sources import Source
from mechlens.analyses.patching.spec import Experiment
from mechlens.arguments import check_model, chosen
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.models.run.batched_runs import BatchedRuns, Hooks
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.properties import check_adds_up, key_value_head, key_value_heads
from mechlens.models.run.sites import SITES, last_hook
from mechlens.models.run.unembedding import check_streamed
from mechlens.results import PatchGridResult, head_label, parse_head

Read = Callable[[Tensor], Tensor]
"""What to keep of an activation."""
EVERYWHERE = slice(None)
_INPUTS = ("q", "k", "v", "mlp")


def run_path(
    experiment: Experiment,
    sender: str | tuple[int, int],
    receiver: str,
    *,
    into: str | None,
    values: Any,
    positions: Sequence[int] | None,
) -> PatchGridResult:
    """Patch one path; see `Patching.path`."""
    path = HeadPath.of(experiment.model, sender, receiver)
    source, into, runs = _runs(experiment, [path], into, values, positions)
    last = last_hook(experiment.model)
    final = runs.through(path, {last: lambda activation: activation})[last]
    own, other = runs.runs.clean, runs.other
    clean = own if into == "clean" or other is None else other
    readouts = [experiment.readout.of_prompt(at, run.final) for at, run in _each(clean)]

    def metric(found: Tensor) -> Float[Tensor, " prompt"]:
        each = [readout.of_run(found[at : at + 1]) for at, readout in enumerate(readouts)]
        return torch.tensor(each, dtype=torch.float32)

    of_own = metric(own.final)
    of_other = torch.full_like(of_own, torch.nan) if other is None else metric(other.final)
    corrupted = {} if experiment.corrupted is None else {"corrupted": experiment.corrupted}
    shape = (-1, 1) if path.head is None else (-1, 1, 1)
    return PatchGridResult(
        **experiment.fields(),
        site=path.site,
        source=f"{head_label(*path.sender)} ({source.label}) as {path.name} sees it",
        given=corrupted | source.tokens() | experiment.readout.given,
        weight=1.0,
        into=into,
        axes=("layer",) if path.head is None else ("layer", "head"),
        layers=(path.layer,),
        heads=() if path.head is None else ((path.layer, path.head),),
        positions=() if positions is None else tuple(chosen("position", positions, own.tokens.shape[1])),
        seed=source.seed,
        clean=of_own if into == "clean" else of_other,
        corrupted=of_other if into == "clean" else of_own,
        values=metric(final).reshape(shape),
        note="",
    )


def attention_on_path(
    experiment: Experiment,
    sender: str | tuple[int, int],
    receiver: str | tuple[int, int],
    *,
    into: str | None,
    values: Any,
    positions: Sequence[int] | None,
) -> Float[Tensor, "prompt dest src"]:
    """The receiver's attention pattern; see `Patching.path_attention`."""
    model = experiment.model
    component, _, read = receiver.rpartition(".") if isinstance(receiver, str) else (receiver, "", "")
    through = read if read in ("q", "k") else None
    layer, head = parse_head(component if through else receiver)
    (head,) = chosen("head", [head], model.cfg.n_heads)
    path = HeadPath.of(
        model,
        sender,
        f"{head_label(layer, key_value_head(model, head) if read == 'k' else head)}.{through or 'q'}",
    )
    _, _, runs = _runs(experiment, [path], into, values, positions)
    pattern = SITES["pattern"].format(layer)
    wanted = {pattern: lambda activation: activation[:, head].float().cpu()}
    found = runs.through(path, wanted) if through else runs.altogether(path.sender, wanted)
    return found[pattern]


def _runs(
    experiment: Experiment,
    paths: Sequence[HeadPath],
    into: str | None,
    values: Any,
    positions: Sequence[int] | None,
) -> tuple[Source, str, PathRuns]:
    model, tokens = experiment.model, experiment.tokens
    source, into = experiment.source(values, into)
    source.check(model, "z", tokens)
    at = EVERYWHERE if positions is None else list(chosen("position", positions, tokens.shape[1]))
    check_streamed(model, tokens)
    check_adds_up(model, tokens)
    own, other = experiment.prompts(into)
    return source, into, PathRuns.of(model, own, source, paths, others=other, at=at)


def _each(run: CleanRun) -> list[tuple[int, CleanRun]]:
    return [(index, run.prompt(index)) for index in range(len(run.tokens))]


@dataclasses.dataclass(frozen=True)
class HeadPath:
    """A path from one head to an input of another component."""

    sender: tuple[int, int]
    layer: int
    head: int | None
    """The receiver's head; None for an MLP."""
    readers: tuple[tuple[int, int], ...]
    """The receiving query heads: one, or all those that share a key/value head."""
    site: str
    enter: str
    """The site where the change in the sender's output is added."""

    @classmethod
    def of(cls, model: LensModel, sender: str | tuple[int, int], receiver: str) -> HeadPath:
        """Check both ends.

        Args:
            sender: (layer, head) or `L5H5`.
            receiver: an input of a head, such as `L5H5.k`, or an MLP, such as `L5.mlp`.
        """
        check_model(model)
        component, _, input = receiver.rpartition(".") if isinstance(receiver, str) else ("", "", "")
        if input not in _INPUTS or not component:
            raise ArgumentError(
                "receiver", "an input of a head (L3H5.q, L3H5.k or L3H5.v) or an MLP (L3.mlp)", receiver
            )
        sender = parse_head(sender)
        (from_layer,) = chosen("layer", [sender[0]], model.cfg.n_layers)
        (from_head,) = chosen("head", [sender[1]], model.cfg.n_heads)
        to, head = (_layer(component), None) if input == "mlp" else parse_head(component)
        (layer,) = chosen("layer", [to], model.cfg.n_layers)
        if head is not None:
            n_heads = model.cfg.n_heads if input == "q" else key_value_heads(model)
            (head,) = chosen("head", [head], n_heads)
        # in sequential blocks, the MLP reads what the heads of its own block write
        within = input == "mlp" and SITES["resid_mid"].format(0) in model.hook_dict
        if layer < from_layer + (not within):
            raise ValueError(
                f"{receiver} does not read what {head_label(from_layer, from_head)} writes: the receiver "
                f"must come after the sender"
                + (
                    ", and this model's attention and MLP read the same stream"
                    if input == "mlp" and layer == from_layer
                    else ""
                )
            )
        shared = (
            model.cfg.n_heads // key_value_heads(model) if input in ("k", "v") and head is not None else 1
        )
        first = shared * (head or 0)
        return cls(
            (from_layer, from_head),
            layer,
            head,
            tuple((layer, each) for each in range(first, first + shared)),
            "mlp_out" if input == "mlp" else input,
            SITES["resid_mid" if within else "resid_pre"].format(layer),
        )

    @property
    def name(self) -> str:
        if self.head is None:
            return f"layer {self.layer}'s MLP"
        return f"the {self.site} of {' and '.join(head_label(*each) for each in self.readers)}"


@dataclasses.dataclass(frozen=True, eq=False)
class PathRuns:
    """Runs in which heads are patched, either as seen by one other component or for all components."""

    runs: BatchedRuns
    other: CleanRun | None
    """The unpatched counterpart runs, if any."""
    there: Mapping[int, Float[Tensor, "prompt pos head d_head"]]
    """The new values of `z`, by the sender's layer."""
    at: slice | list[int]
    """The positions at which senders are patched."""
    changes: dict[tuple[int, int], Float[Tensor, "prompt pos d_model"]] = dataclasses.field(
        default_factory=dict
    )
    """The change in what each sender's layer adds to the stream, for senders run so far. It is a difference
    of `attn_out`, so any norm after the heads is included."""

    @classmethod
    def of(
        cls,
        model: LensModel,
        tokens: Int[Tensor, "prompt pos"],
        source: Source,
        paths: Sequence[HeadPath],
        *,
        others: Int[Tensor, "prompt pos"] | None = None,
        at: slice | list[int] = EVERYWHERE,
        keep: Collection[str] = (),
    ) -> PathRuns:
        """Run the prompts clean, and make the values of the senders' `z`.

        Args:
            paths: the paths of all heads that will be patched.
            others: the prompts of the counterpart runs, if any.
            at: the positions at which senders are patched.
            keep: other hooks whose activations to keep from the clean run.

        Cost: that of `BatchedRuns`, and what the source needs. Each path then takes three runs: up to the
        sender's output, up to the receiver's input, and from there on. Each starts at the layer it patches if
        the model allows it, otherwise from the beginning.
        """
        senders = sorted({path.sender[0] for path in paths})
        layers = {*senders, *(path.layer for path in paths)}
        outs = [SITES["attn_out"].format(layer) for layer in senders]
        reads = source.keep("z", senders)
        of_own, of_other = ((), reads) if source.reads_other else (reads, ())
        runs = BatchedRuns.of(model, tokens, layers=layers, keep={*of_own, *outs, *keep})
        other = None if others is None else CleanRun.of(model, others, of_other, parts=runs.parts)
        values_of = source.values(model, "z", senders)
        by_prompt = [
            values_of(run, run if other is None else other.prompt(index), index)
            for index, run in _each(runs.clean)
        ]
        there = {layer: torch.stack([values(layer) for values in by_prompt]) for layer in senders}
        return cls(runs, other, there, at)

    def altogether(self, sender: tuple[int, int], wanted: Mapping[str, Read]) -> dict[str, Tensor]:
        """Activations when the sender is patched for all components; see `BatchedRuns.read`."""
        layer, head = sender
        out = SITES["attn_out"].format(layer)
        hooks = _put(SITES["z"].format(layer), (EVERYWHERE, self.at, head), self.there[layer])
        found = self.runs.read(layer, hooks, {**wanted, out: lambda activation: activation})
        self.changes[sender] = found.pop(out) - self.runs.clean.kept[out]
        return found

    def seen(self, path: HeadPath) -> Float[Tensor, "prompt pos *rest"]:
        """The activation at the path's site in the receiver's layer when it reads the patched sender."""
        if path.sender not in self.changes:
            self.altogether(path.sender, {})
        change = self.changes[path.sender]

        def hooks(rows: slice) -> Hooks:
            return [(path.enter, lambda activation, hook: activation + change[rows])]

        site = SITES[path.site].format(path.layer)
        return self.runs.read(path.layer, hooks, {site: lambda activation: activation})[site]

    def through(
        self, path: HeadPath, wanted: Mapping[str, Read], *, alone: int | None = None
    ) -> dict[str, Tensor]:
        """Activations when only the receiver sees the sender patched; see `BatchedRuns.read`.

        Args:
            alone: if several query heads share the key, the one head that uses the patched key; the others
                attend as in the clean run. None is all of them.
        """
        head = () if path.head is None else (path.head,)
        hooks = _put(SITES[path.site].format(path.layer), (EVERYWHERE, EVERYWHERE, *head), self.seen(path))
        if alone is not None:
            pattern = SITES["pattern"].format(path.layer)
            patched = self.runs.read(path.layer, hooks, {pattern: lambda activation: activation})[pattern]
            hooks = _put(pattern, (EVERYWHERE, alone), patched)
        return self.runs.read(path.layer, hooks, wanted)


def _put(name: str, place: tuple[Any, ...], there: Float[Tensor, "prompt *rest"]) -> Callable[[slice], Hooks]:
    """Hooks that put values at an index of an activation."""

    def hooks(rows: slice) -> Hooks:
        def put(activation: Tensor, hook: Any) -> Tensor:
            changed = activation.clone()
            changed[place] = there[rows][place].to(changed)
            return changed

        return [(name, put)]

    return hooks


def _layer(name: str) -> int:
    """The layer of an MLP, written `L3` or `3`."""
    number = name[1:] if name[:1] in ("L", "l") else name
    if not number.isdigit():
        raise ValueError(f"an MLP as receiver is written L3.mlp, but the layer is {name!r}")
    return int(number)
