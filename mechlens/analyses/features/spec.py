"""Which features to search, after which prefix: arguments shared by all searches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import check_model, check_type, chosen
from mechlens.errors import ArgumentError
from mechlens.measures.hashing import content_hash
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import check_tokens
from mechlens.models.run.sites import NEURONS
from mechlens.models.run.sites import SITES as HOOKS
from mechlens.models.weights.access import settings_hash, weights_hash
from mechlens.models.weights.folding import is_blind_to_mean
from mechlens.results import ModelInfo
from mechlens.text.prompts import bos_to_prepend, prompt_tokens
from mechlens.text.tokens import all_bos, own_bos_token_id, token_strings

SITES = {name: HOOKS[name] for name in ("resid_post", "attn_out", "mlp_out")}
SITES |= {"post": NEURONS}
MOST_NAMED = 16
"""Features or tokens that a message lists."""
_OF_MLPS = ("mlp_out", "post")


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Which features to search: basis dimensions of an activation, or directions in the residual stream.

    Args:
        layers: one or several layers, negative ones from the end; None is every layer.
        indices: dimensions of the activation, or rows of `directions`; None is all.
        site: `resid_post` (a block's output), `attn_out`, `mlp_out`, or `post` (the MLP's neurons).
        directions: vectors `[direction, d_model]`; a feature is then the dot product of `resid_post` with one
            of them. For a logit difference, multiply by the final norm's weights, because raw weights do not
            have them folded into `W_U`: `(W_U[:, a] - W_U[:, b]) * ln_final.w`.

    Raises:
        TypeError: directions that are not a tensor of real numbers.
        ArgumentError: an unknown site.
        ValueError: directions with a site other than `resid_post`, of the wrong shape, or not finite.

    Example:
        >>> features = mechlens.Features(layers=2, indices=range(4))
        >>> found = mechlens.search_exhaustive(raw, features)
        >>> found.layers, found.features
        ((2,), (0, 1, 2, 3))
        >>> neurons = mechlens.Features(layers=[0, 1], site="post")
        >>> directions = mechlens.Features(layers=-1, directions=raw.W_U[:, :3].T)
    """

    layers: Sequence[int] | int | None = None
    indices: Sequence[int] | int | None = None
    site: str = "resid_post"
    directions: Float[Tensor, "direction d_model"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.site, str) or self.site not in SITES:
            raise ArgumentError("site", f"one of {', '.join(SITES)}", self.site)
        if self.directions is not None:
            object.__setattr__(self, "directions", _directions(self.site, self.directions))

    def width(self, model: LensModel) -> int:
        """How many features each layer has: dimensions of the activation, or directions.

        Raises:
            ValueError: an MLP site in a model without MLPs.
        """
        if self.site in _OF_MLPS and getattr(model.cfg, "attn_only", False):
            raise ValueError(f"this model has no MLPs, so it has no {self.site} to search")
        if self.directions is not None:
            return len(self.directions)
        return int(model.cfg.d_mlp if self.site == "post" else model.cfg.d_model)


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens before the searched ones.

    Args:
        tokens: a text or token ids; None is no text.
        prepend_bos: whether to prepend BOS, unless the tokens already begin with it.

    Example:
        >>> after_the = mechlens.Prefix("The", prepend_bos=True)
        >>> mechlens.search_exhaustive(raw, mechlens.Features(0, 3), prefix=after_the).prepend_bos
        True
    """

    tokens: str | Int[Tensor, "*one prefix"] | None = None
    prepend_bos: bool = False

    def ids(self, model: LensModel) -> Int[Tensor, " prefix"]:
        """The prefix's token ids for a model.

        Raises:
            TypeError: neither text nor a tensor of ids.
            ValueError: several sequences, or tokens that the model cannot read.
        """
        if self.prepend_bos and own_bos_token_id(model.tokenizer) is None:
            raise ArgumentError("prepend_bos", "False for this model", True, "it has no BOS token")
        bos = bos_to_prepend(model, self.prepend_bos)
        begin = torch.tensor([] if bos is None else [bos], dtype=torch.long)
        if self.tokens is None or (isinstance(self.tokens, str) and not self.tokens):
            return begin
        tokens = prompt_tokens(model, self.tokens, prepend_bos=False)
        if len(tokens) != 1:
            raise ValueError(f"a prefix must be one sequence, got {len(tokens)} sequences")
        if not tokens.shape[1]:
            return begin
        check_tokens(model, tokens)
        # rendered chat templates and decoded tokens already begin with BOS
        return tokens[0] if bos is not None and int(tokens[0, 0]) == bos else torch.cat([begin, tokens[0]])


PrefixLike = Prefix | str | Int[Tensor, "*one prefix"] | None
"""A prefix without BOS may be given as text or ids."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSpec:
    """The features and prefix of one search in one model, checked and resolved."""

    model: LensModel
    info: ModelInfo
    site: str
    layers: tuple[int, ...]
    features: tuple[int, ...]
    directions: Float[Tensor, "direction d_model"] | None
    prefix: Int[Tensor, " prefix"]

    @classmethod
    def of(cls, model: LensModel, features: Features | None = None, prefix: Any = None) -> FeatureSpec:
        """Check everything except whether the hook point exists.

        Raises:
            TypeError: features or a prefix of the wrong type.
            ValueError: processed weights, a layer or feature out of range or none selected, directions of
                the wrong width, or a prefix that the model cannot read.
        """
        check_model(model)
        features = Features() if features is None else features
        check_type("features", features, Features)
        info = own_basis(model, features.site)
        width = features.width(model)
        directions = features.directions
        if directions is not None and directions.shape[1] != info.d_model:
            raise ValueError(
                f"directions must be [direction, d_model] with d_model {info.d_model}, got "
                f"{tuple(directions.shape)}"
            )
        return cls(
            model,
            info,
            features.site if directions is None else "direction",
            chosen("layer", features.layers, info.n_layers),
            chosen("feature", features.indices, width),
            directions,
            (prefix if isinstance(prefix, Prefix) else Prefix(prefix)).ids(model),
        )

    def of_one_layer(self) -> FeatureSpec:
        """Check that there is only one layer.

        Raises:
            ArgumentError: there are several layers.
        """
        if len(self.layers) > 1:
            raise ArgumentError("layers", "a single layer for this search", list(self.layers))
        return self

    @property
    def layer(self) -> int:
        """The only layer."""
        (layer,) = self.layers
        return layer

    @property
    def names(self) -> list[str]:
        """The hook point of each layer."""
        return [self.name(layer) for layer in self.layers]

    def name(self, layer: int) -> str:
        return SITES["resid_post" if self.directions is not None else self.site].format(layer)

    def read(self, activation: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch feature"]:
        """The features of an activation, in float32."""
        if self.directions is not None:
            vectors = self.directions.to(activation.device)[list(self.features)]
            return activation.float() @ vectors.T
        if len(self.features) == activation.shape[-1]:
            order = torch.tensor(self.features)
            if torch.equal(order, torch.arange(len(order))):
                return activation.float()
        return activation[..., list(self.features)].float()

    def fields(self) -> dict[str, Any]:
        """The fields that every result has."""
        return {
            "model": self.info,
            "site": self.site,
            "features": self.features,
            "directions": self.directions,
            "prefix": self.prefix,
            "prepend_bos": all_bos(self.model.tokenizer, self.prefix[:1]),
        }

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The arguments that must match those of a checkpoint. Reads all weights."""
        return {
            "model": dataclasses.asdict(self.info),
            "site": self.site,
            "layers": list(self.layers),
            "features": _short(self.features),
            "directions": None if self.directions is None else content_hash(self.directions),
            "prefix": _short(self.prefix.tolist()),
            "weights": weights_hash(self.model),
            "settings": settings_hash(self.model),
        }

    def strings(self, *ids: Int[Tensor, "..."]) -> dict[str, str]:
        """The text of these tokens and of the prefix's, by id."""
        seen = torch.cat([each.flatten() for each in (self.prefix, *ids)]).unique()
        return dict(zip(map(str, seen.tolist()), token_strings(self.model, seen), strict=True))


def own_basis(model: LensModel, site: str) -> ModelInfo:
    """Describe a model, after checking that its activations at a site are in their original basis.

    Processing centers the weights that write to the residual stream if only LayerNorm reads it. It does not
    change the basis in RMSNorm models or of an MLP's neurons.

    Raises:
        ValueError: the weights are centered, or may be.
    """
    info = describe(model)
    if info.processing is not False and site != "post" and is_blind_to_mean(model):
        what = "has processed weights" if info.processing else "has weights that may be processed"
        raise ValueError(
            f"{info.name} {what}, and processing changes the basis of features, because it centers what is "
            "written to the residual stream: load it with load_model(..., processing=False)"
        )
    return info


def check_numbers(rows: Float[Tensor, "row feature"], name: str) -> None:
    """Raise if some activations are nan."""
    if bool(rows.isnan().any()):
        raise ValueError(f"some of the model's activations at {name} are nan, so none is the largest")


def _short(ids: Sequence[int]) -> list[int] | str:
    """A few ids as they are, many as their count and a hash."""
    if len(ids) <= MOST_NAMED:
        return list(ids)
    return f"{len(ids)} of them ({content_hash(torch.tensor(ids))})"


def _directions(site: str, directions: Any) -> Float[Tensor, "direction d_model"]:
    if not isinstance(directions, Tensor):
        raise TypeError(f"directions must be a tensor [direction, d_model], got {type(directions).__name__}")
    if directions.is_complex():
        raise TypeError("directions must be real numbers, got complex ones")
    if site != "resid_post":
        raise ValueError(f"directions are read from resid_post, but site is {site!r}")
    if directions.ndim != 2 or len(directions) == 0:
        raise ValueError(
            f"directions must be [direction, d_model], got {tuple(directions.shape)}"
            + (": give directions[None]" if directions.ndim == 1 else "")
        )
    if not bool(directions.isfinite().all()):
        raise ValueError("directions must be finite numbers, but some are not")
    # a copy, so that later changes to the caller's tensor do not affect results
    return directions.detach().to("cpu", torch.float32, copy=True)
