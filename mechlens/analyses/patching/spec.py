"""The checked arguments of patching: prompts, metric, and the cells of a grid."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechlens.analyses.patching.metrics import Loss, Metric, Readout, metric_of
from mechlens.analyses.patching.sources import OtherRun, Source, Values, source_of
from mechlens.arguments import check_counts, chosen, names_of
from mechlens.errors import ArgumentError
from mechlens.measures.hashing import content_hash
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.forward import check_tokens
from mechlens.models.run.patched_runs import Patches, check_site
from mechlens.models.run.properties import key_value_heads
from mechlens.models.run.sites import PER_HEAD, by_position
from mechlens.models.run.unembedding import check_streamed
from mechlens.results import head_label
from mechlens.results.heads import Heads, parse_heads
from mechlens.text.prompts import Prompt, prompt_tokens
from mechlens.text.tokens import all_bos, token_strings

AXES = ("layer", "head", "pos")
INTO = ("clean", "corrupted")


class Experiment:
    """The prompts of a patching experiment, their corrupted counterparts, and the metric."""

    def __init__(
        self,
        model: LensModel,
        clean: Prompt,
        corrupted: Prompt | None = None,
        *,
        metric: Metric | Callable[[Tensor], Tensor] | None = None,
        prepend_bos: bool | None = None,
        token_budget: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self.info = describe(model)
        self.model = model
        self.tokens = prompt_tokens(model, clean, prepend_bos=prepend_bos)
        check_tokens(model, self.tokens)
        check_counts(token_budget=token_budget)
        self.metric = Loss() if metric is None else metric_of(metric)
        self.readout = Readout.of(model, self.metric, self.tokens)
        self.corrupted = None
        if corrupted is not None:
            self.corrupted = _corrupted(model, corrupted, self.tokens, prepend_bos)
        self.token_budget, self.progress = token_budget, progress

    def source(self, values: Any, into: str | None) -> tuple[Source, str]:
        """The source of values, and the run to patch."""
        if into is None:
            into = "clean" if values is not None or self.corrupted is None else "corrupted"
        if into not in INTO:
            raise ArgumentError("into", "'clean' or 'corrupted'", into)
        if self.corrupted is None and into == "corrupted":
            raise ValueError("into='corrupted' needs a corrupted run: Patching(model, clean, corrupted)")
        if self.corrupted is None and values is None:
            raise ValueError(
                "without a corrupted run, values must say what to put into the clean one: 'zero', "
                "Earlier(shift), Mean(tokens), ...; or give a corrupted run: Patching(model, clean, "
                "corrupted)"
            )
        if values is None:
            return OtherRun("corrupted" if into == "clean" else "the clean run"), into
        return source_of(values), into

    def runs(self, index: int, into: str) -> tuple[Int[Tensor, "1 pos"], Int[Tensor, "1 pos"] | None]:
        """One prompt's tokens: those of the patched run, and those of the other run, if any."""
        own, other = self.prompts(into)
        return own[index : index + 1], None if other is None else other[index : index + 1]

    def prompts(self, into: str) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"] | None]:
        """The same for all prompts."""
        if into == "corrupted":
            assert self.corrupted is not None
            return self.corrupted, self.tokens
        return self.tokens, self.corrupted

    def fields(self) -> dict[str, Any]:
        """The result fields that describe the experiment."""
        return {
            "model": self.info,
            "tokens": self.tokens,
            "metric": self.metric.name,
            "unit": self.metric.unit,
            "about": self.readout.about(),
            "at": self.readout.at,
            "strings": token_strings(self.model, self.tokens[0]),
            "prepend_bos": all_bos(self.model.tokenizer, self.tokens[:, 0]),
        }


def _corrupted(
    model: LensModel, given: Prompt, tokens: Int[Tensor, "prompt pos"], prepend_bos: bool | None
) -> Int[Tensor, "prompt pos"]:
    found = prompt_tokens(model, given, prepend_bos=prepend_bos)
    check_tokens(model, found)
    if found.shape[1] != tokens.shape[1] or len(found) not in (1, len(tokens)):
        raise ValueError(
            f"the corrupted tokens have shape {tuple(found.shape)}, but the clean ones have "
            f"{tuple(tokens.shape)}: give one sequence of the same length, or one for each prompt (BOS is "
            f"prepended to texts, not to ids)"
        )
    return found.expand(len(tokens), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class GridSpec:
    """A grid of patches: which values are put where, in which run."""

    experiment: Experiment
    site: str
    source: Source
    into: str
    weight: float
    cells: Cells

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        site: str,
        *,
        over: Iterable[str] | str,
        into: str | None,
        values: Any,
        weight: float,
        layers: Sequence[int] | None,
        heads: Heads | None,
        positions: Sequence[int] | None,
    ) -> GridSpec:
        """Check all arguments, and that the logits come from the final norm, `W_U`, `b_U` and soft-cap."""
        model, tokens = experiment.model, experiment.tokens
        source, into = experiment.source(values, into)
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ArgumentError("weight", "a finite number", weight)
        check_site(model, site)
        source.check(model, site, tokens)
        if site == "attn_scores" and weight != 1 and source.knocks_out:
            raise ValueError(
                f"knocking an edge out makes its score minus infinity, which cannot be mixed in with weight "
                f"{weight:g}: use the site pattern"
            )
        n_pos = tokens.shape[1]
        cells = Cells.of(model, site, over, layers, heads, positions, n_pos, source.positions(n_pos))
        check_streamed(model, tokens)
        return cls(experiment, site, source, into, float(weight), cells)

    def keep(self, own: bool) -> Collection[str]:
        """The hooks that values are read from, in the patched run or in the other run."""
        return () if own == self.source.reads_other else self.source.keep(self.site, self.cells.layers)

    def patches(self, values: Values, left: Int[Tensor, " patch"], own: CleanRun, other: CleanRun) -> Patches:
        """One patch for each cell number in `left`."""
        same = 0
        if self.source.reads_other:
            # up to the first token that differs, both runs have the same activations
            same = int((own.tokens != other.tokens)[0].int().cummax(0).values.eq(0).sum())
        return self.cells.patches(self.site, values, self.weight, left, same)

    def fields(self) -> dict[str, Any]:
        """The result fields that describe the grid."""
        return self.experiment.fields() | {
            "site": self.site,
            "source": self.source.label,
            "given": self.given(),
            "weight": self.weight,
            "into": self.into,
            "axes": self.cells.axes,
            "layers": self.cells.layers,
            "heads": self.cells.heads or (),
            "positions": self.cells.positions or (),
            "seed": self.source.seed,
        }

    def given(self) -> dict[str, Tensor]:
        """All token ids given besides the prompts."""
        corrupted = self.experiment.corrupted
        others = {} if corrupted is None else {"corrupted": corrupted}
        return others | self.source.tokens() | self.experiment.readout.given

    def arguments(self) -> dict[str, Any]:
        """The arguments that a checkpoint must have been started with to be resumed."""
        known = {
            name: [list(each) if isinstance(each, tuple) else each for each in value]
            if isinstance(value, tuple)
            else value
            for name, value in self.fields().items()
            if name not in ("strings", "model", "given", "about", "unit")
        }
        return known | {
            "model": dataclasses.asdict(self.experiment.info),
            "tokens": content_hash(self.experiment.tokens),
            **{f"ids of {name}": content_hash(ids) for name, ids in self.given().items()},
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a grid; each is a separate patch."""

    axes: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...] | None
    """(layer, head) of the patched heads; None is all, together."""
    positions: tuple[int, ...] | None
    """The patched positions; None is all, together."""

    @classmethod
    def of(
        cls,
        model: LensModel,
        site: str,
        over: Iterable[str] | str,
        layers: Sequence[int] | None,
        heads: Heads | None,
        positions: Sequence[int] | None,
        n_pos: int,
        defined: range,
    ) -> Cells:
        """Check the arguments.

        Args:
            defined: the positions for which the source has values.
        """
        asked = names_of("axis", over, AXES, may_be_empty=True)
        axes = tuple(axis for axis in AXES if axis in asked)
        if ("head" in axes or heads is not None) and site not in PER_HEAD:
            raise ValueError(f"heads are for the sites {', '.join(PER_HEAD)}, but site is {site!r}")
        if "head" in axes and "layer" not in axes:
            raise ValueError("over has 'head' without 'layer', but heads of different layers are unrelated")
        n_heads = key_value_heads(model) if site in ("k", "v") else model.cfg.n_heads
        pairs: tuple[tuple[int, int], ...] | None = None
        if heads is not None:
            if layers is not None:
                raise ValueError("heads name their layers (L5H5), so leave out layers")
            pairs = _pairs(heads, model.cfg.n_layers, n_heads)
            layers = sorted({layer for layer, _ in pairs})
        rows = chosen("layer", layers, model.cfg.n_layers)
        if pairs is None and "head" in axes:
            pairs = tuple(itertools.product(rows, range(n_heads)))
        return cls(axes, rows, pairs, _positions(positions, n_pos, defined, "pos" in axes))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The columns of the axis `head`."""
        return tuple(sorted({head for _, head in self.heads or ()}))

    @property
    def _by_axis(self) -> list[Sequence[int]]:
        """The labels of each axis; -1 means everything together."""
        every = {"layer": self.layers, "head": self.numbers, "pos": self.positions or ()}
        return [every[axis] if axis in self.axes else (-1,) for axis in AXES]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(
            len(labels) for axis, labels in zip(AXES, self._by_axis, strict=True) if axis in self.axes
        )

    @property
    def asked(self) -> Bool[Tensor, "*grid"]:
        """The cells that are run. A grid by layer and head also has cells for heads that are not patched."""
        found = [
            "head" not in self.axes or (layer, head) in (self.heads or ())
            for layer, head, _ in itertools.product(*self._by_axis)
        ]
        return torch.tensor(found).reshape(self.shape)

    def heads_in(self, layer: int, head: int = -1) -> int | slice | list[int]:
        """The heads that a cell patches in a layer, as an index."""
        if head >= 0:
            return head
        if self.heads is None:
            return slice(None)
        return [each for at, each in self.heads if at == layer]

    def patches(
        self, site: str, values: Values, weight: float, left: Int[Tensor, " patch"], same: int
    ) -> Patches:
        """One patch for each cell number in `left`.

        Args:
            same: positions at the beginning whose values are the run's own.
        """
        every = list(itertools.product(*self._by_axis))
        cells = [every[index] for index in left.tolist()]
        first = same if self.positions is None else min(self.positions)

        def place(layer: int, head: int, position: int, start: int) -> tuple[Any, ...]:
            """The positions and heads of a cell, as an index into activations from position `start` on."""
            at: Any = position - start if position >= 0 else slice(None)
            if position < 0 and self.positions is not None:
                at = torch.tensor(self.positions) - start
            heads = self.heads_in(layer, head)
            if isinstance(at, Tensor) and isinstance(heads, list):
                at = at[:, None]
            return (at,) if isinstance(heads, slice) else (at, heads)

        def write(activation: Tensor, which: Tensor, start: int, layer: int) -> Tensor:
            replacement = values(layer).to(activation)
            # [pos, head, ...] at every site
            view = by_position(activation, site)
            new = replacement[start : start + view.shape[1]]
            for row, index in enumerate(which.tolist()):
                _, head, position = cells[index]
                here = place(layer, head, position, start)
                own, put = view[row], new[here][..., : view.shape[-1]]
                # weight 1 replaces exactly, without the rounding of a mix
                if weight != 1:
                    old = own[here]
                    # minus infinity (a masked score) mixed with itself would be nan
                    put = torch.where(old == put, old, old.lerp(put, weight))
                own[here] = put
            return activation

        begin = torch.tensor([layer if layer >= 0 else self.layers[0] for layer, _, _ in cells])
        firsts = torch.tensor([position if position >= 0 else first for _, _, position in cells])
        later = () if "layer" in self.axes else self.layers[1:]
        return Patches(site, begin, firsts, write, later)


def _pairs(heads: Heads, n_layers: int, n_heads: int) -> tuple[tuple[int, int], ...]:
    pairs = parse_heads(heads)
    for layer, head in pairs:
        chosen("layer", [layer], n_layers)
        chosen("head", [head], n_heads)
    if not pairs or len(set(pairs)) < len(pairs):
        names = ", ".join(head_label(*pair) for pair in pairs)
        raise ValueError(f"heads must be one or several different heads, got {names or 'none'}")
    return tuple(sorted(pairs))


def _positions(given: Sequence[int] | None, n_pos: int, defined: range, each: bool) -> tuple[int, ...] | None:
    if given is None and not each:
        return None
    found = chosen("position", given, n_pos)
    some = tuple(at for at in found if at in defined)
    if (given is not None and some != found) or not some:
        raise ValueError(
            f"the source has values for positions {defined.start} to {defined.stop - 1}, but positions are "
            f"{', '.join(map(str, found))}"
        )
    return some
