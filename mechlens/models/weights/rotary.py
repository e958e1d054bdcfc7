"""How attention scores depend on positions: the engine's own rotation and scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import whole_number
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.forward import running, watch
from mechlens.models.run.user_hooks import without_user_hooks
from mechlens.models.weights.folding import normalizes_queries

_TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3}
_TOLERANCE_REDUCED = 0.1
"""Largest relative error of measured scores: soft-caps bend them a little, and narrow dtypes round them."""
_BETTER = 4.0
"""How many times closer to the model's scores the best pairing of dimensions must be than any other."""
_PAIRINGS = ("halves", "adjacent", "adjacent, tables by halves")
_FARTHEST = 4
"""Largest distance at which pairings are compared; at 1, slow rotations hardly move anything."""
_SCORE = 0.5
"""Size of the scores used to compare pairings: far above bfloat16's rounding, far below soft-caps."""


def is_rotary(model: LensModel) -> bool:
    """Whether attention rotates queries and keys by their positions."""
    return getattr(model.cfg, "positional_embedding_type", None) == "rotary"


def rotation(model: LensModel, layer: int, distance: int) -> Float[Tensor, "d_head d_head"]:
    """The rotation `R` with `score = q @ R @ k` for a key `distance` positions before the query.

    `q` and `k` are row vectors before the rotation; the score excludes the attention scale. R comes from the
    engine's own rotation, with its base, scaling, pairing of dimensions, and unrotated dimensions.

    Args:
        distance: from 0 to the context length minus 1.

    Raises:
        TypeError: the distance is not an integer.
        ValueError: the distance is out of range, or the rotation cannot be determined.

    Cost: on a bridge, one run of `distance + 1` tokens and two short ones up to the layer.
    """
    distance = whole_number("relative_position", distance)
    n_ctx = model.cfg.n_ctx
    if not 0 <= distance < n_ctx:
        raise ArgumentError(
            "relative_position", f"between 0 and {n_ctx - 1}, the context length minus 1", distance
        )
    with torch.inference_mode(), without_user_hooks(model):
        if engine_of(model) == "HookedTransformer":
            rotate = _hooked(model, layer)
        else:
            rotate = _bridge(model, layer, distance)
        return (rotate(distance) @ rotate(0).T).clone()


def unrotated(model: LensModel, layer: int) -> tuple[int, ...]:
    """The dimensions of a head that are not rotated; empty if all are."""
    R = rotation(model, layer, 1)
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    # the slowest rotation's cosine rounds to 1, but its sine does not round to 0
    return tuple((identity == R).all(1).nonzero()[:, 0].tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class HeadRotation:
    """What positions do to a layer's query and key weights."""

    kind: str
    """`none`, `ignored`, `relative` or `unrotated`, as in a `Circuit`."""
    relative_position: int | None
    apply: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """`W_Q` and `W_K`, `[..., d_model, d_head]`, such that `W_Q @ W_K.mT` gives the scores."""


NO_ROTATION = HeadRotation("none", None, lambda W_Q, W_K: (W_Q, W_K))


def head_rotation(
    model: LensModel,
    layer: int,
    relative_position: int | None,
    rotary: str | None,
    *,
    may_ignore: bool = False,
) -> HeadRotation:
    """How a QK circuit handles the rotation of queries and keys.

    Args:
        relative_position: how many tokens the key comes before the query.
        rotary: `unrotated` keeps only the dimensions that are not rotated.
        may_ignore: leave the rotation out if neither is given.

    Raises:
        ValueError: the model normalizes queries and keys; a rotary model gets both arguments or neither; a
            model that is not rotary gets one; or no dimension is left.
    """
    if normalizes_queries(model, layer):
        raise ValueError(
            "this model normalizes queries and keys before it computes scores, so its QK circuits are not "
            "products of weights"
        )
    if rotary not in (None, "unrotated"):
        raise ArgumentError("rotary", "None or 'unrotated'", rotary)
    if not is_rotary(model):
        if relative_position is not None or rotary is not None:
            raise ValueError(
                "relative_position and rotary are for rotary models, but this model's positions are "
                f"{model.cfg.positional_embedding_type!r}: leave them out"
            )
        return NO_ROTATION
    if may_ignore and relative_position is None:
        return dataclasses.replace(NO_ROTATION, kind="ignored")
    if (relative_position is None) == (rotary is None):
        given = "neither was given" if rotary is None else "both were given"
        raise ValueError(
            "this model is rotary, so how queries and keys match depends on their distance: give "
            "relative_position (how many tokens the key comes before the query) or rotary='unrotated' (only "
            f"the dimensions that are not rotated); {given}"
        )
    if relative_position is not None:
        R = rotation(model, layer, relative_position)
        return HeadRotation("relative", relative_position, lambda W_Q, W_K: (W_Q @ R, W_K))
    kept = list(unrotated(model, layer))
    if not kept:
        raise ValueError(
            f"this model rotates all {model.cfg.d_head} dimensions of its heads: give relative_position (how "
            "many tokens the key comes before the query; on the command line --relative-position)"
        )
    return HeadRotation("unrotated", None, lambda W_Q, W_K: (W_Q[..., kept], W_K[..., kept]))


def attention_scale(model: LensModel, layer: int) -> float:
    """The factor by which a model without rotation multiplies the product of a query and a key.

    Raises:
        ValueError: the model's attention is not a softmax of such scaled products.

    Cost: one run of two sequences of two tokens up to the layer.
    """
    d_head = model.cfg.d_head
    vector = torch.full((d_head,), d_head**-0.5, dtype=torch.float32, device=model.W_U.device)
    zero = torch.zeros_like(vector)
    given = torch.stack([vector, zero])
    queries = torch.stack([vector, vector])
    with without_user_hooks(model):
        before, same = _preferences(model, layer, queries, given, given.flip(0))[:, 0].tolist()
    # a comparison with nan is false
    if not abs(before + same) <= _TOLERANCE.get(model.W_U.dtype, _TOLERANCE_REDUCED) * abs(before):
        raise ValueError(
            f"attention in layer {layer} depends on more than queries and keys (windows, positions), so its "
            "scale cannot be measured"
        )
    return (before - same) / 2


def _hooked(model: Any, layer: int) -> Callable[[int], Tensor]:
    attention = model.blocks[layer].attn
    # the basis vectors, as the heads at one position
    basis = torch.eye(model.cfg.d_head, dtype=model.W_U.dtype, device=model.W_U.device)[None, None]
    return lambda position: attention.apply_rotary(basis, position)[0, 0].float()


def _bridge(model: LensModel, layer: int, distance: int) -> Callable[[int], Tensor]:
    """Rotations from the cos and sin tables that the bridge passes to its attention.

    The tables do not tell how dimensions are paired, so the pairing is chosen that gives the model's scores.
    """
    tables: dict[str, Tensor] = {}
    names = {f"blocks.{layer}.attn.hook_{name}": name for name in ("cos", "sin")}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda table: tables.update({name: table[0].float()})

    unknown = f"cannot determine how this model rotates queries and keys in layer {layer}"
    farthest = max(1, min(_FARTHEST, model.cfg.n_ctx - 1))
    try:
        tokens = torch.zeros(1, max(distance, farthest) + 1, dtype=torch.long)
        watch(model, tokens, {hook: keep(name) for hook, name in names.items()})
    except ValueError as error:
        raise ValueError(f"{unknown} ({error}): a circuit without rotation would be wrong") from error

    def rotations_of(pairing: str) -> Callable[[int], Tensor]:
        return lambda at: _matrix(tables["cos"][at], tables["sin"][at], model.cfg.d_head, pairing)

    # by pairing, the rotations for keys 1, 2, ... positions before the query
    rotations: dict[str, Tensor] = {}
    for pairing in _PAIRINGS:
        rotate = rotations_of(pairing)
        R = torch.stack([rotate(at) @ rotate(0).T for at in range(1, farthest + 1)])
        # with two dimensions, all pairings agree up to rounding; otherwise they differ by whole sines
        if not any(torch.allclose(R, other, atol=1e-4) for other in rotations.values()):
            rotations[pairing] = R
    q, k = _probes(list(rotations.values()))
    measured = _scores(model, layer, q, k, farthest)
    off = {
        pairing: _misfit(einsum(q, R, k, "probe i, distance i j, probe j -> probe distance"), measured)
        for pairing, R in rotations.items()
    }
    best, *others = sorted(off, key=lambda pairing: off[pairing])
    # a comparison with nan is false
    fits = off[best] <= _TOLERANCE.get(model.W_U.dtype, _TOLERANCE_REDUCED)
    if not (fits and all(off[other] >= _BETTER * off[best] for other in others)):
        raise ValueError(f"{unknown}: no rotation of pairs of dimensions gives its scores")
    return rotations_of(best)


def _probes(
    rotations: list[Float[Tensor, "distance d_head d_head"]],
) -> tuple[Float[Tensor, "probe d_head"], Float[Tensor, "probe d_head"]]:
    """Queries and keys of norm 1: some that separate the rotations, and some that cover all dimensions."""
    first = rotations[0]
    draw = torch.Generator().manual_seed(0)
    anywhere = torch.randn(8, first.shape[-1], generator=draw, dtype=torch.float32).to(first)
    anywhere = anywhere / anywhere.norm(dim=1, keepdim=True)
    pairs = []
    for index, R in enumerate(rotations):
        rotated = anywhere @ R[0]
        pairs.append((anywhere, rotated / rotated.norm(dim=1, keepdim=True)))
        for other in rotations[:index]:
            # the directions in which two rotations differ most
            U, _, Vh = torch.linalg.svd(R[-1] - other[-1])
            pairs.append((U[:, :4].T, Vh[:4]))
    q, k = (torch.cat(side) for side in zip(*pairs, strict=True))
    return q, k


def _scores(
    model: LensModel,
    layer: int,
    q: Float[Tensor, "probe d_head"],
    k: Float[Tensor, "probe d_head"],
    farthest: int,
) -> Float[Tensor, "probe distance"]:
    """The model's score of each query with its key at distance 1, 2, ..., up to a factor."""
    zero = torch.zeros_like(q)
    # scale both so that the score at the query's own position has the intended size
    length = (model.cfg.d_head**0.5 * _SCORE) ** 0.5
    one = -_preferences(model, layer, length * q[:1], zero[:1], length * q[:1])
    length = length * (_SCORE / one.abs()) ** 0.5
    return _preferences(model, layer, length * q, length * k, zero, farthest)


def _misfit(expected: Float[Tensor, "probe distance"], measured: Float[Tensor, "probe distance"]) -> float:
    """Relative distance of the measured scores from the best multiple of the expected ones."""
    factor = (expected * measured).sum() / expected.square().sum()
    return float((measured - factor * expected).norm() / measured.norm())


def _matrix(
    cos: Float[Tensor, " rotary"], sin: Float[Tensor, " rotary"], d_head: int, pairing: str
) -> Float[Tensor, "d_head d_head"]:
    """The rotation as a matrix for row vectors, from the tables of one position."""
    n, adjacent = len(cos), pairing != "halves"
    if pairing.endswith("tables by halves"):
        cos, sin = (table[: n // 2].repeat_interleave(2) for table in (cos, sin))
    R = torch.eye(d_head, dtype=cos.dtype, device=cos.device)
    first = torch.arange(0, n, 2) if adjacent else torch.arange(n // 2)
    second = first + (1 if adjacent else n // 2)
    R[:n, :n] = torch.diag(cos)
    # x @ R = x * cos + (-x[second], x[first]) * sin
    R[second, first] = -sin[first]
    R[first, second] = sin[second]
    return R


def _preferences(
    model: LensModel,
    layer: int,
    q: Float[Tensor, "probe d_head"],
    before: Float[Tensor, "probe d_head"],
    same: Float[Tensor, "probe d_head"],
    farthest: int = 1,
) -> Float[Tensor, "probe distance"]:
    """Score of each query with a key 1, 2, ... `farthest` positions before it, minus its score with another
    key at its own position, in the first head.

    Measured from the pattern, because a bridge that leaves attention to the wrapped model (OPT) has no hook
    for scores.
    """

    def instead(values: Float[Tensor, "probe pos d_head"]) -> Callable[..., Tensor]:
        return lambda activation, hook: values.to(activation)[:, :, None].expand_as(activation).clone()

    keys = torch.stack([before, *[same] * farthest], dim=1)
    at = f"blocks.{layer}.attn.hook_"
    kept: list[Tensor] = []
    hooks = [(f"{at}q", instead(q[:, None].expand_as(keys))), (f"{at}k", instead(keys))]
    with running(model, hooks):
        watch(model, torch.zeros(keys.shape[:2], dtype=torch.long), {f"{at}pattern": kept.append})
    attention = kept[0][:, 0].float().log()
    return (attention[:, :, 0] - attention.diagonal(dim1=1, dim2=2))[:, 1:]
