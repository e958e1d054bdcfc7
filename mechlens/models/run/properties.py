"""Properties of a model that shortcuts rely on, measured where a shortcut is taken.

Kinds of attention, rotary tables, the user's hooks and engines' treatment of padding are too many to list. So
each property is measured on the model itself, with the tokens, lengths and layers of the computation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch
from mechlens.models.run.sites import SITES, last_hook
from mechlens.models.run.user_hooks import probe, user_hooks


def key_value_heads(model: LensModel) -> int:
    """The number of heads of the activations `k` and `v`.

    It is smaller than that of `q` with grouped-query attention, unless the model repeats them for each query
    head (`set_ungroup_grouped_query_attention`).
    """
    cfg = model.cfg
    apart = getattr(cfg, "ungroup_grouped_query_attention", False)
    return int((None if apart else getattr(cfg, "n_key_value_heads", None)) or cfg.n_heads)


def key_value_head(model: LensModel, head: int) -> int:
    """The head of `k` and `v` that a query head attends with."""
    return head // (model.cfg.n_heads // key_value_heads(model))


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two results agree up to rounding: computations of other shapes sum in another order."""
    if found.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    scale = expected.float().abs().max()
    return bool((found.float() - expected.float()).abs().max() <= tolerance * scale)


def last_residual(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The last `resid_post`, which the logits are made from."""
    kept: list[Tensor] = []
    watch(model, tokens, {last_hook(model): kept.append})
    return kept.pop()


def reads_alike_in(model: LensModel, tokens: Int[Tensor, " pos"], width: int) -> bool:
    """Whether a sequence has the same residual stream alone and at the beginning of `width` tokens.

    It does not if rotary positions depend on the sequence's length (longrope, dynamic NTK); with the user's
    own hooks it is not assumed.

    Cost: two forward passes.
    """
    n_pos = len(tokens)
    if n_pos == width:
        return True
    if user_hooks(model):
        return False
    longer = torch.nn.functional.pad(tokens, (0, width - n_pos))[None]
    return alike(last_residual(model, longer)[:, :n_pos], last_residual(model, tokens[None]))


def rows_run_alike(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> bool:
    """Whether each row of a batch gets the same residual stream as when it runs alone.

    Only the user's own hooks can make a difference, by acting on one row.

    Cost: none without such hooks; two forward passes with them.
    """
    if not user_hooks(model):
        return True
    apart = torch.cat([last_residual(model, row) for row in tokens.split(1)])
    return alike(last_residual(model, tokens), apart)


def check_rows_alike(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Check that unrelated runs can share a batch.

    Raises:
        ValueError: a hook of the user's treats the rows of a batch differently.

    Cost: none without such hooks; two forward passes with them.
    """
    if not rows_run_alike(model, tokens):
        raise ValueError(
            f"your hook at {user_hooks(model)[0]} treats the rows of a batch differently, so runs cannot "
            "share a batch: remove it, or make it act on all rows alike"
        )


def check_adds_up(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Check that a model's blocks add exactly `attn_out` and `mlp_out` to the residual stream.

    Raises:
        ValueError: they add something else.

    Cost: one forward pass of at most 8 tokens.
    """
    names = {name: SITES[name] for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")}
    if getattr(model.cfg, "attn_only", False):
        del names["mlp_out"]
    kept: dict[str, Tensor] = {}
    readers = {
        hook: lambda activation, hook=hook: kept.__setitem__(hook, activation.float())
        for layer in range(model.cfg.n_layers)
        for hook in (name.format(layer) for name in names.values())
    }
    watch(model, probe(model, tokens), readers)
    for layer in range(model.cfg.n_layers):
        before, *added, after = (kept[name.format(layer)] for name in names.values())
        if not alike(sum(added, before), after.to(model.W_U.dtype)):
            raise ValueError(
                f"layer {layer} of this model does not add attn_out and mlp_out to the residual stream "
                "unchanged, or a hook changes them: they cannot be read or patched separately"
            )
