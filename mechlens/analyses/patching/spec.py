"""What is asked of a grid of patches, checked before anything is run."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.patching.metrics import Judge, Metric, read_positions
from mechlens.analyses.patching.sources import (
    ATTENTION,
    Edges,
    Made,
    Mean,
    Resampled,
    Source,
    Values,
    check_source,
    defined,
    named,
    other_tokens,
    seed_of,
)
from mechlens.arguments import chosen
from mechlens.models.protocol import LensModel, describe, engine_of
from mechlens.models.run.forward import check_tokens
from mechlens.models.run.patched_runs import SITES, Patches, patterns_count
from mechlens.models.run.properties import key_value_heads
from mechlens.models.run.unembedding import check_streamed
from mechlens.models.run.user_hooks import user_hooks
from mechlens.results import ModelInfo
from mechlens.text.prompts import Prompt, prompt_tokens
from mechlens.text.tokens import own_bos_token_id, token_strings

PER_HEAD = ("q", "k", "v", "z", *ATTENTION)
_KEY_VALUE = ("k", "v")


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """The arguments of a grid of patches, all of them in order."""

    info: ModelInfo
    model: LensModel
    tokens: Int[Tensor, "prompt pos"]
    other: Int[Tensor, "prompt pos"] | None
    """The corrupted prompts."""
    site: str
    source: Source
    grid: Grid
    weight: float
    metric: Metric
    read: tuple[int, ...]
    judge: Judge
    direction: str

    @classmethod
    def of(
        cls,
        model: LensModel,
        prompt: Prompt,
        *,
        site: str,
        source: Source,
        layers: Sequence[int] | None,
        heads: Sequence[int] | str | None,
        positions: Sequence[int] | str | None,
        weight: float,
        metric: Metric,
        read: Sequence[int] | None,
        targets: Any,
        against: Any,
        direction: str,
        prepend_bos: bool | None,
    ) -> Asked:
        """Check everything, and that this model's logits are what we make them from."""
        info = describe(model)
        tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
        check_tokens(model, tokens)
        n_pos = tokens.shape[1]
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"weight must be a finite number, but is {weight!r}")
        grid = Grid.of(model, site, layers, heads, positions, n_pos)
        read_at = read_positions(metric, read, n_pos)
        check_source(model, source, site, tokens, direction, prepend_bos)
        if site == "attn_scores" and weight != 1 and (source == "zero" or isinstance(source, Edges)):
            raise ValueError(
                f"an edge is knocked out by a score of minus infinity, which cannot be mixed in with weight "
                f"{weight:g}: use site pattern"
            )
        grid = grid.within(defined(source, n_pos), given=not isinstance(positions, str))
        judge = Judge.of(model, metric, tokens, read_at, targets, against)
        check_streamed(model, tokens)
        other = other_tokens(model, source, tokens, prepend_bos)
        return cls(
            info, model, tokens, other, site, source, grid, float(weight), metric, read_at, judge, direction
        )

    def runs(self, index: int) -> tuple[Int[Tensor, "1 pos"], Int[Tensor, "1 pos"]]:
        """Of a prompt: the run that is patched, and the one that values are taken from."""
        own = self.tokens[index : index + 1]
        if self.other is None:
            return own, own
        other = self.other[index : index + 1]
        return (own, other) if self.direction == "noising" else (other, own)

    def fields(self) -> dict[str, Any]:
        """What every result of such a grid says of it."""
        bos = own_bos_token_id(self.model.tokenizer)
        return {
            "model": self.info,
            "tokens": self.tokens,
            "site": self.site,
            "source": "the clean run" if self.direction == "denoising" else named(self.source),
            "given": self.given(),
            "weight": self.weight,
            "direction": self.direction,
            "axes": self.grid.axes,
            "layers": self.grid.layers,
            "heads": self.grid.heads or (),
            "positions": self.grid.positions or (),
            "metric": (
                self.metric
                if isinstance(self.metric, str)
                else getattr(self.metric, "__name__", type(self.metric).__name__)
            ),
            "about": self.judge.about(),
            "read": self.read,
            "strings": token_strings(self.model, self.tokens[0]),
            "seed": seed_of(self.source),
            "prepend_bos": bos is not None and bool((self.tokens[:, 0] == bos).all()),
        }

    def given(self) -> dict[str, Tensor]:
        """Every other token id that was given."""
        source = self.source.of if isinstance(self.source, Made) else self.source
        ids = {
            "corrupted": self.other,
            "reference": source.tokens if isinstance(source, (Mean, Resampled)) else None,
            # those of the loss are the prompts' own
            "targets": None if self.metric == "loss" else self.judge.targets,
            "against": self.judge.against,
        }
        return {name: value for name, value in ids.items() if value is not None}

    def fingerprint(self) -> dict[str, Any]:
        """What a state must have been begun with, to be gone on with."""
        known = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.fields().items()
            if name not in ("strings", "model", "given", "about")
        }
        return known | {
            "model": dataclasses.asdict(self.info),
            "tokens": _hash(self.tokens),
            **{f"ids of {name}": _hash(value) for name, value in self.given().items()},
        }


def _hash(ids: Tensor) -> str:
    """Of shape and numbers; short, for it stands in messages."""
    whole = ids.cpu().long().contiguous()
    return hashlib.sha256(str(tuple(whole.shape)).encode() + whole.numpy().tobytes()).hexdigest()[:12]


def _each(what: str, given: Sequence[int] | str) -> Sequence[int] | None:
    if isinstance(given, str) and given != "each":
        raise ValueError(f"{what} must be 'each', numbers, or None for all together, but is {given!r}")
    return None if isinstance(given, str) else given


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    positions: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        model: LensModel,
        site: str,
        layers: Sequence[int] | None,
        heads: Sequence[int] | str | None,
        positions: Sequence[int] | str | None,
        n_pos: int,
    ) -> Grid:
        if not isinstance(site, str) or site not in SITES:
            raise ValueError(f"site must be one of {', '.join(SITES)}, but is {site!r}")
        if site == "mlp_out" and getattr(model.cfg, "attn_only", False):
            raise ValueError("this model has no MLPs, so there is no mlp_out to patch")
        if SITES[site].format(0) not in model.hook_dict:
            raise ValueError(f"this model has no {site}: its attention and MLP read the same stream")
        if site in ATTENTION and not patterns_count(model):
            raise ValueError(
                f"a bridge computes GPT-Neo's attention without looking at a changed {site}: patch z or v, "
                "or use HookedTransformer"
            )
        if site == "resid_mid" and engine_of(model) == "TransformerBridge" and user_hooks(model):
            raise ValueError(
                "a bridge has no hook where its stream carries resid_mid past the MLP, so that it is patched "
                f"there and added behind the block, where your hook at {user_hooks(model)[0]} might see it: "
                "remove the hook, or patch attn_out"
            )
        if heads is not None and site not in PER_HEAD:
            raise ValueError(f"heads are for {', '.join(PER_HEAD)}, but site is {site!r}")
        n_heads = key_value_heads(model) if site in _KEY_VALUE else model.cfg.n_heads
        return cls(
            chosen("layer", layers, model.cfg.n_layers),
            None if heads is None else chosen("head", _each("heads", heads), n_heads),
            None if positions is None else chosen("position", _each("positions", positions), n_pos),
        )

    def within(self, positions: range, *, given: bool) -> Grid:
        """Without the positions that have nothing to be patched with; they are refused where they were
        `given`."""
        if self.positions is None:
            return self
        some = tuple(at for at in self.positions if at in positions)
        if (given and some != self.positions) or not some:
            raise ValueError(
                f"the source has something for positions {positions.start} to {positions.stop - 1} only, but "
                f"asked for are {', '.join(map(str, self.positions))}"
            )
        return dataclasses.replace(self, positions=some)

    @property
    def axes(self) -> tuple[str, ...]:
        heads, positions = ("head",) * (self.heads is not None), ("pos",) * (self.positions is not None)
        return ("layer", *heads, *positions)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(each) for each in (self.layers, self.heads, self.positions) if each is not None)

    def patches(self, site: str, values: Values, weight: float, left: Int[Tensor, " patch"]) -> Patches:
        """One patch for each cell that is left to do, by its number."""
        cells = torch.cartesian_prod(
            torch.tensor(self.layers),
            torch.tensor(self.heads if self.heads is not None else (-1,)),
            torch.tensor(self.positions if self.positions is not None else (-1,)),
        ).view(-1, 3)[left]
        whole, every = slice(None), cells.tolist()

        def write(activation: Tensor, which: Tensor, start: int) -> Tensor:
            replacement = values(every[int(which[0])][0]).to(activation)
            # by position, head and the rest, wherever the site has its heads
            view = activation.movedim(1, 2) if site in ATTENTION else activation
            for row, index in enumerate(which.tolist()):
                _, head, position = every[index]
                here = whole if position < 0 else position - start
                there = slice(start, start + view.shape[1]) if position < 0 else position
                one = (here,) if head < 0 else (here, head)
                put = replacement[(there,) if head < 0 else (there, head)]
                put = put[..., : view.shape[-1]]
                # exactly, where the source replaces: what is not mixed is not rounded
                if weight != 1:
                    old = view[(row, *one)]
                    # minus infinity, as masked scores have it, mixes to nan even with itself
                    put = torch.where(old == put, old, old.lerp(put, weight))
                view[(row, *one)] = put
            return activation

        return Patches(site, cells[:, 0], cells[:, 2].clamp(min=0), write)
