"""Properties of a model that shortcuts rely on, measured wherever a shortcut is taken.

Kinds of attention, rotary tables, user hooks and ways to treat padding are too many to list. So each property
is measured on the model itself, with the tokens, lengths and layers of the computation.
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
    """The number of heads in the activations `k` and `v`.

    With grouped-query attention there are fewer than in `q`, unless the model repeats them for each query
    head (`set_ungroup_grouped_query_attention`).
    """
    cfg = model.cfg
    apart = getattr(cfg, "ungroup_grouped_query_attention", False)
    return int((None if apart else getattr(cfg, "n_key_value_heads", None)) or cfg.n_heads)


def key_value_head(model: LensModel, head: int) -> int:
    """The head of `k` and `v` that a query head uses."""
    return head // (model.cfg.n_heads // key_value_heads(model))


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two results agree up to rounding; computations with other shapes sum in a different order."""
    if found.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    scale = expected.float().abs().max()
    return bool((found.float() - expected.float()).abs().max() <= tolerance * scale)


def last_residual(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """The last `resid_post`, from which the logits are computed."""
    kept: list[Tensor] = []
    watch(model, tokens, {last_hook(model): kept.append})
    return kept.pop()


def reads_alike_in(model: LensModel, tokens: Int[Tensor, " pos"], width: int) -> bool:
    """Whether a sequence has the same residual stream alone as at the beginning of `width` tokens.

    It does not if rotary positions depend on the sequence length (longrope, dynamic NTK). If the user has
    hooks, the answer is no without a test.

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

    Only user hooks can make a difference, by acting on one row.

    Cost: none without user hooks; two forward passes with them.
    """
    if not user_hooks(model):
        return True
    apart = torch.cat([last_residual(model, row) for row in tokens.split(1)])
    return alike(last_residual(model, tokens), apart)


def check_rows_alike(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Check that unrelated runs can share a batch.

    Raises:
        ValueError: a user hook treats the rows of a batch differently.

    Cost: as `rows_run_alike`.
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
