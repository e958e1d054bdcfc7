"""What gradient search minimizes: objectives as users give them, and bound to a model."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.spec import Features, FeatureSpec, PrefixLike
from mechlens.arguments import check_reals, check_type
from mechlens.errors import ArgumentError
from mechlens.measures.memory import in_parts
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import check_tokens
from mechlens.models.run.from_embeddings import run_embedded
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.sites import last_hook
from mechlens.models.run.unembedding import check_streamed, token_log_probs
from mechlens.results import ExhaustiveSearch
from mechlens.text.prompts import prompt_tokens

HOW = ("constant", "mean", "min")
DISTANCES = ("l1", "cosine")
LARGE = 1000.0
"""The constant, unless activations are near it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Maximize:
    """Make features, basis dimensions of an activation or directions, as large as possible.

    Args:
        features: features of one layer.
        at: an index into `[pos, feature]`, where `pos` counts the searched tokens and `feature` the features:
            a position such as 2, `np.s_[:, 0:4]`, `np.s_[[0, 2], [5, 6]]`. None is every feature at every
            position.
        how: `constant` minimizes the mean L1 distance to a large constant, as in Badger's "Language Model
            Features"; `mean` maximizes the mean activation; `min` maximizes the smallest activation, to
            activate several features together.
        constant: for `how="constant"`. Activations above it are reduced. None is 1000, or ten times the
            largest activation of the starting embeddings if that is more.
        isolated: run the layer's block alone, on the first block's input.
        optimum: an exhaustive search for the same feature, whose best token is shown for comparison; only
            for a single token and feature.

    Raises:
        TypeError: features or an optimum of the wrong type, or a constant that is not a number.
        ArgumentError: an unknown `how`, or a constant that is not finite or not used.

    Example:
        >>> one = mechlens.Maximize(mechlens.Features(layers=2, indices=7))
        >>> both = mechlens.Maximize(mechlens.Features(layers=2, indices=[7, 9]), how="min")
    """

    features: Features
    at: Any = None
    how: str = "constant"
    constant: float | None = None
    isolated: bool = False
    optimum: ExhaustiveSearch | None = None

    def __post_init__(self) -> None:
        check_type("features", self.features, Features)
        if self.how not in HOW:
            raise ArgumentError("how", f"one of {', '.join(HOW)}", self.how)
        check_reals(constant=self.constant)
        if self.constant is not None and self.how != "constant":
            raise ArgumentError("constant", f"None with how={self.how!r}", self.constant)
        check_type("isolated", self.isolated, bool)
        if self.optimum is not None:
            check_type("optimum", self.optimum, ExhaustiveSearch)

    @property
    def name(self) -> str:
        return self.how

    def loss(self, own: Float[Tensor, "row selected"], bound: Objective) -> Float[Tensor, " row"]:
        if self.how == "constant":
            return (bound.constant - own).abs().mean(-1)
        return -own.mean(-1) if self.how == "mean" else -own.amin(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """Make features, basis dimensions of an activation or directions, match those of another input.

    Args:
        features: features of one layer.
        target: the other input, a text or token ids, with as many tokens as are searched.
        distance: `l1`, the mean absolute difference, or `cosine`, 1 minus the cosine.
        at: an index into `[pos, feature]`, as in `Maximize`; None is every feature at every position.
        isolated: run the layer's block alone, on the first block's input.

    Raises:
        TypeError: features of the wrong type.
        ArgumentError: an unknown distance.

    Example:
        >>> like = mechlens.Match(mechlens.Features(layers=1), " ship", "cosine")
    """

    features: Features
    target: str | Int[Tensor, "*one target"]
    distance: str = "l1"
    at: Any = None
    isolated: bool = False

    def __post_init__(self) -> None:
        check_type("features", self.features, Features)
        if self.distance not in DISTANCES:
            raise ArgumentError("distance", f"one of {', '.join(DISTANCES)}", self.distance)
        check_type("isolated", self.isolated, bool)

    @property
    def name(self) -> str:
        return self.distance

    def loss(self, own: Float[Tensor, "row selected"], bound: Objective) -> Float[Tensor, " row"]:
        assert bound.wanted is not None
        if self.distance == "l1":
            return (own - bound.wanted).abs().mean(-1)
        return 1 - torch.nn.functional.cosine_similarity(own, bound.wanted[None], dim=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Continue:
    """Make the model predict a continuation of the searched tokens; no feature is read.

    Args:
        target: the continuation, a text or token ids. Its log-probability (nats) is maximized.

    Example:
        >>> says_the = mechlens.Continue(" the")
    """

    target: str | Int[Tensor, "*one target"]

    name = "continuation"


AnyObjective: TypeAlias = Maximize | Match | Continue


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """An objective bound to one model, as a function of embeddings."""

    asked: AnyObjective
    spec: FeatureSpec
    embeddings: Float[Tensor, "d_vocab d_model"]
    tokens: Int[Tensor, "... pos"]
    """The prefix, placeholders for the searched tokens, and the continuation."""
    n_tokens: int
    places: Int[Tensor, "selected 2"]
    """(pos, index into the spec's features) of every selected element."""
    target: Int[Tensor, " target"] | None
    constant: float
    wanted: Float[Tensor, " selected"] | None = None
    """The selected activations of the target."""

    @classmethod
    def of(
        cls,
        asked: AnyObjective,
        model: LensModel,
        n_tokens: int,
        prefix: PrefixLike,
        embeddings: Float[Tensor, "d_vocab d_model"],
    ) -> Objective:
        """Check an objective and bind it to a model.

        Raises:
            TypeError: not an objective.
            ValueError: the model cannot run the objective, or the objective selects nothing.
        """
        check_type("objective", asked, Maximize, Match, Continue)
        continued = isinstance(asked, Continue)
        # a continuation reads the last layer
        features = asked.features if isinstance(asked, (Maximize, Match)) else Features(layers=-1)
        spec = FeatureSpec.of(model, features, prefix).of_one_layer()
        target = None if isinstance(asked, Maximize) else _target(model, asked, n_tokens)
        after = target if continued and target is not None else torch.tensor([], dtype=torch.long)
        tokens = torch.cat([spec.prefix, torch.zeros(n_tokens, dtype=torch.long), after])
        if len(tokens) > model.cfg.n_ctx:
            raise ValueError(
                f"{len(tokens)} tokens, {n_tokens} of them searched, do not fit into the model's context of "
                f"{model.cfg.n_ctx}: search fewer"
            )
        places = torch.zeros(0, 2, dtype=torch.long)
        if isinstance(asked, Continue):
            check_streamed(model, tokens[None])
        else:
            places = _places(asked.at, n_tokens, len(spec.features))
            if asked.isolated and getattr(model.cfg, "positional_embedding_type", None) == "shortformer":
                raise ArgumentError("isolated", "False", True, "this model adds positions inside its blocks")
        check_rows_alike(model, tokens.repeat(2, 1))
        if asked.name == "cosine" and len(places) < 2:
            raise ValueError(
                "the cosine of a single number is 1 or -1: select several elements, or use the distance l1"
            )
        constant = getattr(asked, "constant", None)
        found = cls(
            asked, spec, embeddings, tokens, n_tokens, places, target, LARGE if constant is None else constant
        )
        if isinstance(asked, Match):
            assert target is not None
            wanted = found._read(found.embeddings[target.to(embeddings.device)[None]])[0].detach()
            found = dataclasses.replace(found, wanted=wanted)
        return found

    @property
    def alone(self) -> int | None:
        """The layer whose block runs alone, if any."""
        return self.spec.layer if getattr(self.asked, "isolated", False) else None

    @property
    def selected(self) -> Int[Tensor, "selected 2"]:
        """(pos, feature) of every selected element."""
        numbers = torch.tensor(self.spec.features)
        return torch.stack([self.places[:, 0], numbers[self.places[:, 1]]], dim=1)

    @torch.no_grad()
    def beyond(self, starts: Float[Tensor, "row pos d_model"]) -> Objective:
        """The same, with a constant far above the activations of the starting embeddings."""
        parts = in_parts(lambda some: float(self._read(some).abs().max()), starts, len(starts))
        largest = max(found for _, found in parts)
        return dataclasses.replace(self, constant=max(self.constant, 10 * largest))

    def __call__(
        self, embedded: Float[Tensor, "row pos d_model"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """The objective, and the mean of the selected activations (nan for a continuation)."""
        if isinstance(self.asked, Continue):
            objective = -self._log_prob(embedded)
            return objective, torch.full_like(objective, torch.nan)
        own = self._read(embedded)
        return self.asked.loss(own, self), own.mean(-1)

    def of_tokens(self, ids: Int[Tensor, "row pos"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """The objective of tokens, and the mean of the selected activations."""
        return self(self.embeddings[ids])

    @torch.no_grad()
    def activations(self, ids: Int[Tensor, "row pos"], at_once: int) -> Float[Tensor, "row selected"]:
        """The selected activations of tokens; none for a continuation."""
        if isinstance(self.asked, Continue):
            return torch.zeros(len(ids), 0, dtype=torch.float32)
        parts = in_parts(
            lambda some: self._read(self.embeddings[some]), ids.to(self.embeddings.device), at_once
        )
        return torch.cat([made.cpu() for _, made in parts])

    def _run(self, embedded: Float[Tensor, "row pos d_model"], name: str) -> Tensor:
        given = embedded.to(self.embeddings.dtype)
        return run_embedded(
            self.spec.model, self.tokens, given, len(self.spec.prefix), name, alone=self.alone
        )

    def _read(self, embedded: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row selected"]:
        (name,) = self.spec.names
        start = len(self.spec.prefix)
        own = self.spec.read(self._run(embedded, name)[:, start : start + self.n_tokens])
        pos, column = self.places.to(own.device).T
        return own[:, pos, column]

    def _log_prob(self, embedded: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        model = self.spec.model
        assert self.target is not None
        last = self._run(embedded, last_hook(model))
        # each position predicts the token after it
        ahead = last[:, -len(self.target) - 1 : -1]
        return token_log_probs(model, ahead, self.target.expand(len(ahead), -1))[0].sum(-1)


def _target(model: LensModel, asked: Match | Continue, n_tokens: int) -> Int[Tensor, " target"]:
    target: Any = asked.target
    one_id = hasattr(target, "__index__") and np.ndim(target) == 0
    ids = prompt_tokens(model, [target] if one_id else target, prepend_bos=False)
    check_tokens(model, ids)
    if len(ids) != 1:
        raise ValueError(f"a target must be one sequence, got {len(ids)} sequences")
    if isinstance(asked, Match) and ids.shape[1] != n_tokens:
        raise ValueError(
            f"the target must have as many tokens as are searched, {n_tokens}, got {ids.shape[1]}"
        )
    return ids[0]


def _places(at: Any, n_tokens: int, width: int) -> Int[Tensor, "selected 2"]:
    """The (pos, feature) pairs that an index into `[pos, feature]` selects, by NumPy's rules."""
    grid = np.arange(n_tokens * width).reshape(n_tokens, width)
    parts = at if isinstance(at, tuple) else (at,)
    try:
        index = tuple(part.cpu().numpy() if isinstance(part, torch.Tensor) else part for part in parts)
        flat = torch.from_numpy(grid[index].flatten())
    except (IndexError, TypeError, ValueError) as error:
        raise ArgumentError(
            "at", f"an index of [{n_tokens} positions, {width} features]", at, str(error)
        ) from error
    if not len(flat):
        raise ValueError(f"at={at!r} selects nothing: there are {n_tokens} positions and {width} features")
    return torch.stack([flat // width, flat % width], dim=1)
