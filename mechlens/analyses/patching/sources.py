"""Sources of values: what a patch puts into a run.

To add a source, subclass `Source` and define `label` and `values`, and where needed `check`, `positions`,
`tokens`, `keep` and `seed`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import generator_of
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.forward import check_tokens
from mechlens.models.run.patched_runs import TOKEN_BUDGET
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.sites import ATTENTION, SITES
from mechlens.text.prompts import as_ids

Values: TypeAlias = "Callable[[int], Tensor]"
"""From a layer to the values at each position, `[pos, ...]`; for scores and patterns `[dest, head, src]`."""
ValuesOf: TypeAlias = "Callable[[CleanRun, CleanRun, int], Values]"
"""From `(the run to patch, the other run or else the same run, index of the prompt)` to values."""


class Source(abc.ABC):
    """Where a patch's values come from."""

    seed: int | None = None
    """The random seed; None if nothing is random."""
    reads_other: ClassVar[bool] = False
    """Whether the values come from the other run, not from the patched one."""
    knocks_out: ClassVar[bool] = False
    """Whether patched attention scores become minus infinity."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The source in words, for a result."""

    def check(  # noqa: B027  # some have nothing to check
        self, model: LensModel, site: str, tokens: Int[Tensor, "prompt pos"]
    ) -> None:
        """Raise if the source does not fit the model, the site or the prompts, before anything is run."""

    def positions(self, n_pos: int) -> range:
        """The positions that have a value."""
        return range(n_pos)

    def tokens(self) -> dict[str, Int[Tensor, "reference pos"]]:
        """The token ids that the values are made from, for a result."""
        return {}

    def keep(self, site: str, layers: Sequence[int]) -> list[str]:
        """The hooks whose activations `values` reads from the clean runs."""
        return [SITES[site].format(layer) for layer in layers]

    @abc.abstractmethod
    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        """The function that makes each prompt's values. Anything shared by all prompts is made here, once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Zero(Source):
    """Replace the activation with zeros, or attention scores with minus infinity, which knocks edges out.

    Zeros in `z` remove `b_V` only if the weights are raw: processing moves it into `b_O`.

    Example:
        >>> mechlens.Zero().label
        'zero'
    """

    knocks_out: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return "zero"

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        return lambda own, other, index: lambda layer: torch.full_like(own.at(site, layer)[0], _void(site))


@dataclasses.dataclass(frozen=True, eq=False)
class OtherRun(Source):
    """The other of the clean and the corrupted run."""

    name: str
    reads_other: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return self.name

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        return lambda own, other, index: lambda layer: other.at(site, layer)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Earlier(Source):
    """Replace the activation with that `shift` positions earlier in the same run.

    Args:
        shift: number of positions, at least 1. The first `shift` positions have no value.

    Example:
        >>> mechlens.Earlier(50).label
        '50 positions earlier'
    """

    shift: int

    def __post_init__(self) -> None:
        if not isinstance(self.shift, Integral):
            raise TypeError(f"Earlier(shift) takes a number of positions, got {self.shift!r}")

    @property
    def label(self) -> str:
        return f"{self.shift} positions earlier"

    def check(self, model: LensModel, site: str, tokens: Int[Tensor, "prompt pos"]) -> None:
        n_pos = tokens.shape[1]
        if not 0 < self.shift < n_pos:
            raise ValueError(
                f"Earlier({self.shift}) is out of range: a prompt of {n_pos} tokens takes 1 to {n_pos - 1}"
            )

    def positions(self, n_pos: int) -> range:
        return range(int(self.shift), n_pos)

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        shift = int(self.shift)

        def shifted(own: CleanRun, layer: int) -> Tensor:
            activation = own.at(site, layer)[0]
            # the first positions are not patched
            return torch.cat([activation[:shift], activation[:-shift]])

        return lambda own, other, index: functools.partial(shifted, own)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reference(Source):
    """Other sequences as long as the prompt."""

    reference: Int[Tensor, "reference pos"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference", _reference_ids(type(self).__name__, self.reference))

    @property
    def label(self) -> str:
        return type(self).__name__.lower()

    def check(self, model: LensModel, site: str, tokens: Int[Tensor, "prompt pos"]) -> None:
        check_tokens(model, self.reference)
        if self.reference.shape[1] != tokens.shape[1]:
            raise ValueError(
                f"the reference sequences of {type(self).__name__} must be as long as the prompt, "
                f"{tokens.shape[1]} tokens, but they have {self.reference.shape[1]}"
            )

    def tokens(self) -> dict[str, Int[Tensor, "reference pos"]]:
        return {"reference": self.reference}

    def keep(self, site: str, layers: Sequence[int]) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True, eq=False)
class Mean(_Reference):
    """Replace the activation with its mean over other sequences, position by position.

    Args:
        reference: token ids `[reference, pos]` of sequences as long as the prompt.

    Example:
        >>> mechlens.Mean(torch.randint(5, 100, (32, 10))).label
        'mean'
    """

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        check_rows_alike(model, self.reference)
        sums: dict[int, Tensor] = {}
        for some in self.reference.split(max(1, TOKEN_BUDGET // self.reference.shape[1])):
            run = CleanRun.of(model, some, Source.keep(self, site, layers))
            for layer in layers:
                total = run.at(site, layer).float().sum(0)
                sums[layer] = sums[layer] + total if layer in sums else total
        means = {layer: total / len(self.reference) for layer, total in sums.items()}
        return lambda own, other, index: means.__getitem__


@dataclasses.dataclass(frozen=True, eq=False)
class Resampled(_Reference):
    """Replace the activation with that of another sequence.

    The sequences are shuffled, and each prompt takes the next one, starting over after the last.

    Args:
        reference: token ids `[reference, pos]` of sequences as long as the prompt.
        seed: for shuffling.

    Example:
        >>> mechlens.Resampled(torch.randint(5, 100, (8, 10)), seed=1).label
        'resampled'
    """

    seed: int = 0

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        order = torch.randperm(len(self.reference), generator=generator_of(self.seed)).tolist()

        def drawn(own: CleanRun, other: CleanRun, index: int) -> Values:
            at = order[index % len(order)]
            run = CleanRun.of(model, self.reference[at : at + 1], Source.keep(self, site, layers))
            return lambda layer: run.at(site, layer)[0]

        return drawn


@dataclasses.dataclass(frozen=True, eq=False)
class NextEmbedding(Source):
    """Replace the residual stream with the embedding of the true next token.

    This shows what later layers do when they are given the answer. The last position has no value.

    Example:
        >>> mechlens.NextEmbedding().positions(4)
        range(0, 3)
    """

    @property
    def label(self) -> str:
        return "nextembedding"

    def check(self, model: LensModel, site: str, tokens: Int[Tensor, "prompt pos"]) -> None:
        if not site.startswith("resid"):
            raise ValueError(f"NextEmbedding is for the residual stream, but site is {site!r}")

    def positions(self, n_pos: int) -> range:
        return range(n_pos - 1)

    def keep(self, site: str, layers: Sequence[int]) -> list[str]:
        # the embedding as it enters the stream, because some models scale it first
        return [*super().keep(site, layers), "hook_embed"]

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        def following(own: CleanRun, layer: int) -> Tensor:
            embedded = own.kept["hook_embed"][0]
            return torch.cat([embedded[1:], own.at(site, layer)[0, -1:].to(embedded)])

        return lambda own, other, index: functools.partial(following, own)


@dataclasses.dataclass(frozen=True, eq=False)
class Edges(Source):
    """Knock out attention edges: `dest` no longer attends to `src`.

    At `attn_scores` the remaining attention is renormalized; at `pattern` it is not.

    Args:
        edges: pairs `(dest, src)` of positions, with `src` not after `dest`. Leave "pos" out of `over` to
            knock all of them out together.

    Example:
        >>> mechlens.Edges([(5, 2), (9, 3)]).label
        'without 5 to 2, 9 to 3'
    """

    edges: Sequence[tuple[int, int]]
    knocks_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.edges:
            raise ValueError("Edges needs at least one (dest, src)")

    @property
    def label(self) -> str:
        return "without " + ", ".join(f"{dest} to {src}" for dest, src in self.edges)

    def check(self, model: LensModel, site: str, tokens: Int[Tensor, "prompt pos"]) -> None:
        n_pos = tokens.shape[1]
        if site not in ATTENTION:
            raise ValueError(f"Edges is for the sites {' and '.join(ATTENTION)}, but site is {site!r}")
        for dest, src in self.edges:
            if not 0 <= src <= dest < n_pos:
                raise ValueError(
                    f"the edge {(dest, src)} is out of range: (dest, src) must have 0 <= src <= dest < "
                    f"{n_pos}, the prompt's length"
                )
        for dest in {dest for dest, _ in self.edges}:
            if site == "attn_scores" and len({src for to, src in self.edges if to == dest}) == dest + 1:
                raise ValueError(
                    f"without these edges, position {dest} attends to nothing, so its scores have no "
                    "softmax: use the site pattern"
                )

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        dest, src = (list(column) for column in zip(*self.edges, strict=True))

        def without(own: CleanRun, layer: int) -> Tensor:
            attention = own.at(site, layer)[0].clone()
            attention[dest, :, src] = _void(site)
            return attention

        return lambda own, other, index: functools.partial(without, own)


@dataclasses.dataclass(frozen=True, eq=False)
class Function(Source):
    """A function of the run's own activation."""

    function: Callable[[Tensor, int], Tensor]

    @property
    def label(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        def of_prompt(own: CleanRun, other: CleanRun, index: int) -> Values:
            # once per layer, so that random values do not depend on which patches run together
            @functools.cache
            def made(layer: int) -> Tensor:
                activation = own.at(site, layer)[0].clone()
                shape, value = activation.shape, self.function(activation, layer)
                if not isinstance(value, Tensor) or value.shape != shape:
                    raise ValueError(
                        f"a function for values must return a tensor of the shape it is given, "
                        f"{tuple(shape)} at {site}, but this one returned {_shown(value)}"
                    )
                return value

            return made

        return of_prompt


def source_of(given: Any) -> Source:
    """The source given as an object, "zero", or a function."""
    if isinstance(given, Source):
        return given
    if isinstance(given, str) and given == "zero":
        return Zero()
    if isinstance(given, (str, type)) or not callable(given):
        raise ArgumentError(
            "values",
            "'zero', Earlier(shift), Mean(tokens), Resampled(tokens), NextEmbedding(), Edges(pairs) or a "
            "function (activation, layer) -> activation",
            tuple(given.shape) if isinstance(given, Tensor) else given,
        )
    return Function(given)


def _void(site: str) -> float:
    return -torch.inf if site == "attn_scores" else 0.0


def _reference_ids(name: str, given: Any) -> Int[Tensor, "reference pos"]:
    """The ids of a reference set, in any accepted form."""
    takes = f"{name} takes token ids [reference, pos] of sequences as long as the prompt, but"
    try:
        tokens, mask = as_ids(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{takes} got {_shown(given)}: text_tokens turns a text into ids") from None
    if mask is not None and not bool(mask.all()):
        raise ValueError(f"{takes} these have padding (zeros in attention_mask)")
    return tokens


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
