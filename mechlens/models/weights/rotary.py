"""How a model's attention scores depend on position: its rotation and its scale, as the engine has them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.forward import running, watch
from mechlens.models.run.user_hooks import without_user_hooks

_TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3}
_TOLERANCE_REDUCED = 0.1
"""Of measured scores, against what they should be, as a share of their size: a soft-cap bends them a little,
and a narrow dtype rounds them."""
_BETTER = 4.0
"""How many times nearer to the model's scores one pairing of dimensions must be than the others."""
_PAIRINGS = ("halves", "adjacent", "adjacent, tables by halves")
_FARTHEST = 4
"""Distance up to which pairings are told apart: a rotation that is slowed down turns by little at 1."""
_SCORE = 0.5
"""Of what pairings are told apart by: far above what bfloat16 rounds, far below where soft-caps bend."""


def is_rotary(model: LensModel) -> bool:
    """Whether attention rotates queries and keys by their positions."""
    return getattr(model.cfg, "positional_embedding_type", None) == "rotary"


def rotation(model: LensModel, layer: int, distance: int) -> Float[Tensor, "d_head d_head"]:
    """What turns a query so that it meets a key `distance` positions before it as the model lets it.

    With row vectors before rotation, the model's score is `query @ R @ key` times its attention scale. The
    engine's own rotation is used, so that its base, its scaling, its pairing of dimensions and the
    dimensions that it leaves alone are in R; no head's weights are.

    Args:
        distance: 0 or more, and less than the context.

    Raises:
        TypeError: a distance that is no whole number.
        ValueError: a distance that the context does not hold, or a rotation that cannot be found out.

    Cost: on a bridge one run of `distance + 1` tokens and two of a few up to the layer.
    """
    try:
        distance = operator.index(distance)
    except TypeError:
        raise TypeError(f"relative_position must be a whole number, but is {distance!r}") from None
    n_ctx = model.cfg.n_ctx
    if not 0 <= distance < n_ctx:
        raise ValueError(
            f"relative_position is how many tokens the key comes before the query, 0 to {n_ctx - 1} in this "
            f"model's context, but it is {distance}"
        )
    with torch.inference_mode(), without_user_hooks(model):
        if engine_of(model) == "HookedTransformer":
            turn = _hooked(model, layer)
        else:
            turn = _bridge(model, layer, distance)
        return (turn(distance) @ turn(0).T).clone()


def unrotated(model: LensModel, layer: int) -> tuple[int, ...]:
    """Which of a head's dimensions are not rotated; empty where all are."""
    R = rotation(model, layer, 1)
    fixed = torch.eye(len(R), dtype=R.dtype, device=R.device)
    # the slowest rotation turns by too little for its cosine to show, but not for its sine
    return tuple((fixed == R).all(1).nonzero()[:, 0].tolist())


def attention_scale(model: LensModel, layer: int) -> float:
    """What a model without rotation multiplies the product of a query and a key by, read off its attention.

    Raises:
        ValueError: the model's attention is no softmax of such products.

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
            f"attention in layer {layer} depends on more than its queries and keys (windows, positions), so "
            "its scale cannot be read off"
        )
    return (before - same) / 2


def _hooked(model: Any, layer: int) -> Callable[[int], Tensor]:
    attention = model.blocks[layer].attn
    # the basis, as the heads of one position
    basis = torch.eye(model.cfg.d_head, dtype=model.W_U.dtype, device=model.W_U.device)[None, None]
    return lambda position: attention.apply_rotary(basis, position)[0, 0].float()


def _bridge(model: LensModel, layer: int, distance: int) -> Callable[[int], Tensor]:
    """From the tables that the bridge gives to its attention. How it pairs dimensions is in its code alone:
    the pairing is taken that gives the model's own scores."""
    tables: dict[str, Tensor] = {}
    names = {f"blocks.{layer}.attn.hook_{name}": name for name in ("cos", "sin")}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda table: tables.update({name: table[0].float()})

    lost = f"how this model rotates queries and keys in layer {layer} cannot be found out"
    farthest = max(1, min(_FARTHEST, model.cfg.n_ctx - 1))
    try:
        tokens = torch.zeros(1, max(distance, farthest) + 1, dtype=torch.long)
        watch(model, tokens, {hook: keep(name) for hook, name in names.items()})
    except ValueError as error:
        raise ValueError(f"{lost} ({error}): the circuit without rotation would be wrong") from error

    def turns(pairing: str) -> Callable[[int], Tensor]:
        return lambda at: _turned(tables["cos"][at], tables["sin"][at], model.cfg.d_head, pairing)

    # by pairing: what the score of a query with a key 1, 2, ... before it is made with
    rotations: dict[str, Tensor] = {}
    for pairing in _PAIRINGS:
        turn = turns(pairing)
        R = torch.stack([turn(at) @ turn(0).T for at in range(1, farthest + 1)])
        # of two dimensions all pairings are one, up to rounding; others differ by whole sines
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
        raise ValueError(f"{lost}: its scores are none that a rotation of pairs of dimensions gives")
    return turns(best)


def _probes(
    rotations: list[Float[Tensor, "distance d_head d_head"]],
) -> tuple[Float[Tensor, "probe d_head"], Float[Tensor, "probe d_head"]]:
    """Queries and keys of length 1 whose scores tell rotations apart, and some that see all dimensions."""
    first = rotations[0]
    draw = torch.Generator().manual_seed(0)
    anywhere = torch.randn(8, first.shape[-1], generator=draw, dtype=torch.float32).to(first)
    anywhere = anywhere / anywhere.norm(dim=1, keepdim=True)
    pairs = []
    for index, R in enumerate(rotations):
        turned = anywhere @ R[0]
        pairs.append((anywhere, turned / turned.norm(dim=1, keepdim=True)))
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
    """What the model makes of each query with each key at distance 1, 2, ..., up to a factor."""
    zero = torch.zeros_like(q)
    # the size of a score at its own position, made what it should be by the length of both
    length = (model.cfg.d_head**0.5 * _SCORE) ** 0.5
    one = -_preferences(model, layer, length * q[:1], zero[:1], length * q[:1])
    length = length * (_SCORE / one.abs()) ** 0.5
    return _preferences(model, layer, length * q, length * k, zero, farthest)


def _misfit(expected: Float[Tensor, "probe distance"], measured: Float[Tensor, "probe distance"]) -> float:
    """How far what was measured is from a multiple of what was expected, as a share of its size."""
    factor = (expected * measured).sum() / expected.square().sum()
    return float((measured - factor * expected).norm() / measured.norm())


def _turned(
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
    """How much higher each query, 1, 2, ... `farthest` positions after one key, scores with it than with
    another key at its own position, by the model's own attention in its first head.

    Taken from the pattern, because a bridge that leaves attention to the model it wraps (OPT) has the
    pattern in place of the scores.
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
