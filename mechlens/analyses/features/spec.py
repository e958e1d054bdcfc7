"""Which features are asked for, checked before anything is run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import chosen
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run import sites
from mechlens.models.run.forward import check_tokens
from mechlens.models.weights.access import settings_hash, weights_hash
from mechlens.models.weights.folding import is_blind_to_mean
from mechlens.results import ModelInfo
from mechlens.text.prompts import bos_to_prepend, prompt_tokens
from mechlens.text.tokens import all_bos, token_strings

SITES = {name: sites.SITES[name] for name in ("resid_post", "attn_out", "mlp_out")}
SITES |= {"post": "blocks.{}.mlp.hook_post"}
MOST_NAMED = 16
"""Features or tokens that a message lists."""
_OF_MLPS = ("mlp_out", "post")


@dataclasses.dataclass(frozen=True, eq=False)
class Sought:
    """Features of some layers, and what stands before the tokens that are searched for."""

    model: LensModel
    info: ModelInfo
    site: str
    layers: tuple[int, ...]
    features: tuple[int, ...]
    directions: Float[Tensor, "direction d_model"] | None
    prefix: Int[Tensor, " prefix"]

    @classmethod
    def of(
        cls,
        model: LensModel,
        *,
        site: str,
        layers: Sequence[int] | None,
        features: Sequence[int] | None,
        directions: Float[Tensor, "direction d_model"] | None,
        prefix: str | Int[Tensor, "*one prefix"] | None,
        prepend_bos: bool,
    ) -> Sought:
        """Check everything but whether there is such a hook point.

        Raises:
            TypeError: a prefix that is neither text nor a tensor of ids.
            ValueError: processed weights, an unknown site, a layer or feature out of range or none at all,
                directions of another size, or a prefix that the model cannot be run on.
        """
        info = own_basis(model, site)
        if not isinstance(site, str) or site not in SITES:
            raise ValueError(f"site must be one of {', '.join(SITES)}, but is {site!r}")
        if site in _OF_MLPS and getattr(model.cfg, "attn_only", False):
            raise ValueError(f"this model has no MLPs, so there is no {site} to search")
        width = model.cfg.d_mlp if site == "post" else info.d_model
        if directions is not None:
            directions = _directions(model, site, directions)
            width = len(directions)
        return cls(
            model,
            info,
            site if directions is None else "direction",
            chosen("layer", layers, info.n_layers),
            chosen("feature", features, width),
            directions,
            _prefix(model, prefix, prepend_bos),
        )

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
        """What every result says of them."""
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
        """The arguments that a checkpoint must agree with; reads all weights."""
        return {
            "model": dataclasses.asdict(self.info),
            "site": self.site,
            "layers": list(self.layers),
            "features": _short(self.features),
            "directions": None if self.directions is None else hashed(self.directions),
            "prefix": _short(self.prefix.tolist()),
            "weights": weights_hash(self.model),
            "settings": settings_hash(self.model),
        }

    def strings(self, *ids: Int[Tensor, "..."]) -> dict[str, str]:
        """The tokens that occur, by their id."""
        seen = torch.cat([each.flatten() for each in (self.prefix, *ids)]).unique()
        return dict(zip(map(str, seen.tolist()), token_strings(self.model, seen), strict=True))


def own_basis(model: LensModel, site: str) -> ModelInfo:
    """Describe a model whose features at a site are its own.

    Processing takes the mean out of what is written to the stream, where all that reads it is LayerNorm; of
    RMSNorm models, and of an MLP's neurons, it changes nothing.

    Raises:
        ValueError: weights that are centred, or of which it cannot be told.
    """
    info = describe(model)
    if info.processing is not False and site != "post" and is_blind_to_mean(model):
        what = "has processed weights" if info.processing else "has weights that may be processed"
        raise ValueError(
            f"{info.name} {what}, and processing changes the basis that features live in, by centring what "
            "is written to the stream: load it with load_model(..., processing=False)"
        )
    return info


def check_numbers(rows: Float[Tensor, "row feature"], name: str) -> None:
    """Refuse activations that are no numbers."""
    if bool(rows.isnan().any()):
        raise ValueError(f"some of the model's activations at {name} are nan, so that none is the largest")


def hashed(values: Tensor) -> str:
    """Of shape and numbers, in short."""
    whole = values.detach().cpu().contiguous()
    return hashlib.sha256(str(tuple(whole.shape)).encode() + whole.numpy().tobytes()).hexdigest()[:12]


def _short(ids: Sequence[int]) -> list[int] | str:
    """As they stand in messages: many of them by their count and a hash."""
    if len(ids) <= MOST_NAMED:
        return list(ids)
    return f"{len(ids)} of them ({hashed(torch.tensor(ids))})"


def _directions(
    model: LensModel, site: str, directions: Float[Tensor, "direction d_model"]
) -> Float[Tensor, "direction d_model"]:
    d_model = model.cfg.d_model
    if not isinstance(directions, Tensor):
        raise TypeError(
            f"directions are a tensor [direction, d_model], but here is a {type(directions).__name__}"
        )
    if directions.is_complex():
        raise TypeError("directions are real numbers, but these are complex")
    if site != "resid_post":
        raise ValueError(f"directions are of resid_post, but site is {site!r}")
    if directions.ndim != 2 or directions.shape[1] != d_model or len(directions) == 0:
        raise ValueError(
            f"directions must be [direction, d_model] with d_model {d_model}, but are "
            f"{tuple(directions.shape)}" + (": give directions[None]" if directions.ndim == 1 else "")
        )
    if not bool(directions.isfinite().all()):
        raise ValueError("some of the directions' numbers are not finite")
    # a copy, so that a result does not change with what its maker does to them afterwards
    return directions.detach().to("cpu", torch.float32, copy=True)


def _prefix(
    model: LensModel, prefix: str | Int[Tensor, "*one prefix"] | None, prepend_bos: bool
) -> Int[Tensor, " prefix"]:
    bos = bos_to_prepend(model, prepend_bos)
    begin = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    if prefix is None or (isinstance(prefix, str) and not prefix):
        return begin
    tokens = prompt_tokens(model, prefix, prepend_bos=False)
    if len(tokens) != 1:
        raise ValueError(f"a prefix is one sequence, but here are {len(tokens)}")
    if not tokens.shape[1]:
        return begin
    check_tokens(model, tokens)
    # a rendered chat template and decoded tokens begin with their own
    return tokens[0] if bos is not None and int(tokens[0, 0]) == bos else torch.cat([begin, tokens[0]])
