"""How a model's attention scores depend on position: its rotation and its scale, as the engine has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.runs import running, watch

_TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3}
_TOLERANCE_REDUCED = 0.1
"""Of scores of vectors of length 1, against what they should be: a soft-cap bends them a little, and a wrong
pairing of dimensions is off by their whole size."""


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
        ValueError: a distance that the context does not hold, or a rotation that cannot be found out.

    Cost: on a bridge one run of `distance + 1` tokens and two of 2 up to the layer.
    """
    n_ctx = model.cfg.n_ctx
    if not 0 <= distance < n_ctx:
        raise ValueError(
            f"relative_position is how many tokens the key comes before the query, 0 to {n_ctx - 1} in this "
            f"model's context, but it is {distance}"
        )
    with torch.inference_mode():
        if engine_of(model) == "HookedTransformer":
            turn = _hooked(model, layer)
        else:
            turn = _bridge(model, layer, distance)
        return (turn(distance) @ turn(0).T).clone()


def unrotated(model: LensModel, layer: int) -> tuple[int, ...]:
    """Which of a head's dimensions are not rotated; empty where all are."""
    R = rotation(model, layer, 1)
    fixed = torch.eye(len(R), device=R.device)
    # the slowest rotation turns by too little for its cosine to show, but not for its sine
    return tuple((fixed == R).all(1).nonzero()[:, 0].tolist())


def attention_scale(model: LensModel, layer: int) -> float:
    """What a model without rotation multiplies the product of a query and a key by, read off its attention.

    Raises:
        ValueError: the model's attention is no softmax of such products.

    Cost: two runs of two tokens up to the layer.
    """
    d_head = model.cfg.d_head
    vector = torch.full((d_head,), d_head**-0.5, device=model.W_U.device)
    zero = torch.zeros_like(vector)
    before = _preference(model, layer, vector, vector, zero)
    same = _preference(model, layer, vector, zero, vector)
    if abs(before + same) > _TOLERANCE.get(model.W_U.dtype, _TOLERANCE_REDUCED) * abs(before):
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
    try:
        tokens = torch.zeros(1, max(distance, 1) + 1, dtype=torch.long)
        watch(model, tokens, {hook: keep(name) for hook, name in names.items()})
    except ValueError as error:
        raise ValueError(f"{lost} ({error}): the circuit without rotation would be wrong") from error
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(model.cfg.d_head, generator=draw).to(model.W_U.device) for _ in range(2))
    q, k = q / q.norm(), k / k.norm()
    zero = torch.zeros_like(k)
    before, same = _preference(model, layer, q, k, zero), -_preference(model, layer, q, zero, k)
    allowed = _TOLERANCE.get(model.W_U.dtype, _TOLERANCE_REDUCED) * max(abs(same), abs(before))
    for pairing in ("halves", "adjacent", "adjacent, tables by halves"):

        def turn(position: int, pairing: str = pairing) -> Tensor:
            return _turned(tables["cos"][position], tables["sin"][position], model.cfg.d_head, pairing)

        # the attention scale is the same in both
        apart, together = (float(q @ turn(at) @ turn(0).T @ k) for at in (1, 0))
        if abs(before * together - same * apart) <= allowed:
            return turn
    raise ValueError(f"{lost}: its scores are none that a rotation of pairs of dimensions gives")


def _turned(
    cos: Float[Tensor, " rotary"], sin: Float[Tensor, " rotary"], d_head: int, pairing: str
) -> Float[Tensor, "d_head d_head"]:
    """The rotation as a matrix for row vectors, from the tables of one position."""
    n, adjacent = len(cos), pairing != "halves"
    if pairing.endswith("tables by halves"):
        cos, sin = (table[: n // 2].repeat_interleave(2) for table in (cos, sin))
    R = torch.eye(d_head, device=cos.device)
    first = torch.arange(0, n, 2) if adjacent else torch.arange(n // 2)
    second = first + (1 if adjacent else n // 2)
    R[:n, :n] = torch.diag(cos)
    # x @ R = x * cos + (-x[second], x[first]) * sin
    R[second, first] = -sin[first]
    R[first, second] = sin[second]
    return R


def _preference(
    model: LensModel,
    layer: int,
    q: Float[Tensor, " d_head"],
    before: Float[Tensor, " d_head"],
    same: Float[Tensor, " d_head"],
) -> float:
    """How much higher a query at position 1 scores with one key at position 0 than with another at its own
    position, by the model's own attention in its first head.

    Taken from the pattern, because a bridge that leaves attention to the model it wraps (OPT) has the
    pattern in place of the scores.
    """

    def instead(values: Tensor) -> Callable[..., Tensor]:
        return lambda activation, hook: values.to(activation)[None, :, None].expand_as(activation).clone()

    at = f"blocks.{layer}.attn.hook_"
    kept: list[Tensor] = []
    hooks = [(f"{at}q", instead(torch.stack([q, q]))), (f"{at}k", instead(torch.stack([before, same])))]
    with running(model, hooks):
        watch(model, torch.zeros(1, 2, dtype=torch.long), {f"{at}pattern": kept.append})
    attention = kept[0][0, 0, 1].float().log()
    return float(attention[0] - attention[1])
