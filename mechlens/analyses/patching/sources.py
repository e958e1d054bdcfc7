"""Where the values come from that a patch puts into a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import generator_of
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import check_tokens, watch
from mechlens.models.run.patched_runs import SITES, TOKEN_BUDGET
from mechlens.models.run.properties import check_rows_alike
from mechlens.text.prompts import as_ids, prompt_tokens

ATTENTION = ("pattern", "attn_scores")


@dataclasses.dataclass(frozen=True, eq=False)
class Earlier:
    """Patch with what stands `shift` positions earlier in the same run."""

    shift: int


@dataclasses.dataclass(frozen=True, eq=False)
class Corrupted:
    """Patch with a run on other tokens."""

    tokens: Int[Tensor, "*prompt pos"] | str | Sequence[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
    """Patch with the mean over a reference set of sequences, as long as the prompt, position by position."""

    tokens: Int[Tensor, "reference pos"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _references(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Resampled:
    """Patch each prompt with one sequence of a reference set, as long as the prompt.

    The set is shuffled by `seed`, and each prompt takes the next of it; after the last comes the first again.
    """

    tokens: Int[Tensor, "reference pos"]
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _references(self))


@dataclasses.dataclass(frozen=True, eq=False)
class NextEmbedding:
    """Patch with the embedding of the token that really follows: what do later layers do when told?"""


@dataclasses.dataclass(frozen=True, eq=False)
class Edges:
    """Patch attention with itself less some edges `(dest, src)`: `dest` no longer reads `src`.

    At `attn_scores` what is left of the attention is shared out anew, at `pattern` it is not. Give the grid
    `positions=None` to take all of them away together.
    """

    edges: Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """Patch with what another analysis makes for each prompt; of use within this package only."""

    name: str
    make: Callable[[Int[Tensor, "1 pos"], int], dict[int, Tensor]]
    """`(prompt, its index) -> [pos, ...]` by layer."""
    of: Source = "zero"
    """What it is made of; the corrupted run, where it has one, is judged as well."""


Source = (
    str
    | Earlier
    | Corrupted
    | Mean
    | Resampled
    | NextEmbedding
    | Edges
    | Made
    | Callable[[Tensor, int], Tensor]
)
Values = Callable[[int], Tensor]
"""By layer: what is put at each position of the site (of scores and patterns: `[dest, head, src]`)."""


def check_source(
    model: LensModel,
    source: Source,
    site: str,
    tokens: Int[Tensor, "prompt pos"],
    direction: str,
    prepend_bos: bool | None = None,
) -> None:
    if direction not in ("noising", "denoising"):
        raise ValueError(f"direction must be noising or denoising, but is {direction!r}")
    made_of = source.of if isinstance(source, Made) else source
    if direction == "denoising" and not isinstance(made_of, Corrupted):
        raise ValueError("denoising restores a corrupted run: give source=Corrupted(tokens)")
    known = (Earlier, Corrupted, Mean, Resampled, NextEmbedding, Edges, Made)
    if source != "zero" and not isinstance(source, known) and (not callable(source) or source in known):
        raise ValueError(
            "source must be 'zero', Earlier, Corrupted, Mean, Resampled, NextEmbedding, Edges or a function, "
            f"but is {_shown(source)}"
        )
    if isinstance(source, Earlier) and not isinstance(source.shift, Integral):
        raise TypeError(f"Earlier(shift) is a number of positions, but is {source.shift!r}")
    if isinstance(source, Earlier) and not 0 < source.shift < tokens.shape[1]:
        raise ValueError(
            f"Earlier(shift) must lie between 1 and {tokens.shape[1] - 1} for {tokens.shape[1]} tokens, but "
            f"is {source.shift}"
        )
    if isinstance(source, Edges):
        _check_edges(source, site, tokens.shape[1])
    if isinstance(source, NextEmbedding) and not site.startswith("resid"):
        raise ValueError(f"an embedding belongs into the residual stream, but site is {site!r}")
    if isinstance(source, (Mean, Resampled)):
        check_tokens(model, source.tokens)
        if source.tokens.shape[1] != tokens.shape[1]:
            raise ValueError(
                f"the reference sequences have {source.tokens.shape[1]} tokens, the prompt has "
                f"{tokens.shape[1]}: they must be equally long"
            )
    if isinstance(source, Corrupted):
        other_tokens(model, source, tokens, prepend_bos)


def defined(source: Source, n_pos: int) -> range:
    """The positions for which a source has something."""
    if isinstance(source, Earlier):
        return range(int(source.shift), n_pos)
    return range(n_pos - 1) if isinstance(source, NextEmbedding) else range(n_pos)


def _check_edges(source: Edges, site: str, n_pos: int) -> None:
    if site not in ATTENTION:
        raise ValueError(f"edges are taken away at {' or '.join(ATTENTION)}, but site is {site!r}")
    if not source.edges:
        raise ValueError("Edges needs at least one (dest, src)")
    for dest, src in source.edges:
        if not 0 <= src <= dest < n_pos:
            raise ValueError(
                f"an edge (dest, src) must have 0 <= src <= dest < {n_pos}, the prompt's length, but one is "
                f"{(dest, src)}"
            )
    for dest in {dest for dest, _ in source.edges}:
        if site == "attn_scores" and len({src for to, src in source.edges if to == dest}) == dest + 1:
            raise ValueError(
                f"without any edge position {dest} has nothing to share its attention among: use site pattern"
            )


def other_tokens(
    model: LensModel, source: Source, tokens: Int[Tensor, "prompt pos"], prepend_bos: bool | None = None
) -> Int[Tensor, "prompt pos"] | None:
    """The corrupted prompts, one for each prompt."""
    if isinstance(source, Made):
        source = source.of
    if not isinstance(source, Corrupted):
        return None
    other = prompt_tokens(model, source.tokens, prepend_bos=prepend_bos)
    check_tokens(model, other)
    if other.shape[1] != tokens.shape[1] or len(other) not in (1, len(tokens)):
        raise ValueError(
            f"the corrupted tokens are {tuple(other.shape)}, but the prompt's are {tuple(tokens.shape)}: "
            "give one sequence of the same length, or one for each prompt (BOS is put before texts, not "
            "before ids)"
        )
    return other.expand(len(tokens), -1)


def named(source: Source) -> str:
    """A source in words."""
    if isinstance(source, str):
        return source
    if isinstance(source, Made):
        return source.name
    if isinstance(source, Earlier):
        return f"{source.shift} positions earlier"
    if isinstance(source, Edges):
        return "without " + ", ".join(f"{dest} to {src}" for dest, src in source.edges)
    if isinstance(source, (Corrupted, Mean, Resampled, NextEmbedding)):
        return type(source).__name__.lower()
    return str(getattr(source, "__name__", type(source).__name__))


def seed_of(source: Source) -> int | None:
    """Of what is drawn to patch with; None where nothing is."""
    if isinstance(source, Made):
        source = source.of
    return int(source.seed) if isinstance(source, Resampled) else None


def values_of(
    model: LensModel,
    source: Source,
    site: str,
    given: Int[Tensor, "1 pos"],
    index: int,
    layers: Sequence[int],
    *,
    kept: dict[int, Tensor] | None = None,
) -> Values:
    """What is put into the patched run of prompt `index`.

    Args:
        given: the run that values are taken from, where the source has no tokens of its own.
        kept: that run's activations at the site, `[1, pos, ...]` by layer, where somebody has them already.
    """
    if isinstance(source, Made):
        made = source.make(given, index)
        return lambda layer: made[layer]
    at = by_layer(model, site, layers)
    if isinstance(source, Mean):
        check_rows_alike(model, source.tokens)
        means = _means(at, source.tokens)
        return lambda layer: means[layer]
    if isinstance(source, Resampled):
        order = torch.randperm(len(source.tokens), generator=generator_of(source.seed))
        drawn = int(order[index % len(order)])
        given, kept = source.tokens[drawn : drawn + 1], None
    if isinstance(source, NextEmbedding):
        # as it enters the stream: some models scale it first
        embedded: list[Tensor] = []
        watch(model, given, {"hook_embed": embedded.append})
        following, own = embedded.pop()[0], at(given)
        # the last position has no next token, and keeps what it has
        return lambda layer: torch.cat([following[1:], own[layer][0, -1:].to(following)])
    run = at(given) if kept is None else kept
    if isinstance(source, (Corrupted, Resampled)):
        return lambda layer: run[layer][0]
    void = -torch.inf if site == "attn_scores" else 0.0
    if isinstance(source, Edges):
        dest, src = (list(column) for column in zip(*source.edges, strict=True))

        def without(layer: int) -> Tensor:
            attention = run[layer][0].clone()
            attention[dest, :, src] = void
            return attention

        return without
    if source == "zero":
        return lambda layer: torch.full_like(run[layer][0], void)
    if isinstance(source, Earlier):
        shift = int(source.shift)
        # the first positions have nothing so far before them: they stay as they are
        return lambda layer: torch.cat([run[layer][0, :shift], run[layer][0, :-shift]])
    assert callable(source)

    # once for each layer, so that what a function draws does not depend on which patches run together
    @functools.cache
    def made_by(layer: int) -> Tensor:
        own = run[layer][0].clone()
        shape, value = own.shape, source(own, layer)
        if not isinstance(value, Tensor) or value.shape != shape:
            raise ValueError(
                f"a source function gives what it is given, {tuple(shape)} at {site}, but this gives "
                f"{_shown(value)}"
            )
        return value

    return made_by


def _references(source: Mean | Resampled) -> Int[Tensor, "reference pos"]:
    """The ids of a reference set, whatever they came as."""
    takes = (
        f"{type(source).__name__} takes token ids [reference, pos] of sequences as long as the prompt, but"
    )
    try:
        tokens, mask = as_ids(source.tokens)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{takes} has {_shown(source.tokens)}: text_tokens makes ids of a text") from None
    if mask is not None and not bool(mask.all()):
        raise ValueError(f"{takes} these have padding (zeros in attention_mask)")
    return tokens


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _means(
    at: Callable[[Tensor], dict[int, Tensor]], tokens: Int[Tensor, "reference pos"]
) -> dict[int, Float[Tensor, "pos *rest"]]:
    """Some sequences at a time."""
    sums: dict[int, Tensor] = {}
    for some in tokens.split(max(1, TOKEN_BUDGET // tokens.shape[1])):
        for layer, activation in at(some).items():
            total = activation.float().sum(0)
            sums[layer] = sums[layer] + total if layer in sums else total
    return {layer: total / len(tokens) for layer, total in sums.items()}


def by_layer(
    model: LensModel, site: str, layers: Sequence[int]
) -> Callable[[Int[Tensor, "row pos"]], dict[int, Tensor]]:
    """A run's activations at a site, `[row, pos, ...]` by layer."""

    def run(tokens: Int[Tensor, "row pos"]) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}

        def keep(activation: Tensor, layer: int) -> None:
            kept[layer] = activation.movedim(1, 2) if site in ATTENTION else activation

        watch(model, tokens, {SITES[site].format(layer): partial(keep, layer=layer) for layer in layers})
        return kept

    return run
