"""What shortcuts need of a model, tried where a shortcut is taken: at its lengths, its layers, on its tokens.

Kinds of attention, rotary tables, hooks of the user's and what an engine makes of padding are too many to
list, so each property is measured on the model itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch
from mechlens.models.run.user_hooks import probe, user_hooks


def key_value_heads(model: LensModel) -> int:
    """How many heads the activations `k` and `v` have: fewer than queries where several share one, unless the
    model was told to give each query head its own (`set_ungroup_grouped_query_attention`)."""
    cfg = model.cfg
    apart = getattr(cfg, "ungroup_grouped_query_attention", False)
    return int((None if apart else getattr(cfg, "n_key_value_heads", None)) or cfg.n_heads)


def key_value_head(model: LensModel, head: int) -> int:
    """The head of `k` and `v` that a query head reads."""
    return head // (model.cfg.n_heads // key_value_heads(model))


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same numbers agree but for rounding: other shapes sum in another
    order."""
    if found.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    scale = expected.float().abs().max()
    return bool((found.float() - expected.float()).abs().max() <= tolerance * scale)


def last_residual(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
    """What the logits are read from."""
    kept: list[Tensor] = []
    watch(model, tokens, {f"blocks.{model.cfg.n_layers - 1}.hook_resid_post": kept.append})
    return kept.pop()


def reads_alike_in(model: LensModel, tokens: Int[Tensor, " pos"], width: int) -> bool:
    """Whether a sequence is read alone as it is at the beginning of one of `width` tokens.

    Not so with tables of rotary positions that depend on how long the sequence is (longrope, dynamic NTK),
    and with hooks.

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
    """Whether sequences that run together are each read as one that runs alone.

    Cost: nothing for a model without hooks of the user's, which may act at one row; else two forward passes.
    """
    if not user_hooks(model):
        return True
    apart = torch.cat([last_residual(model, row) for row in tokens.split(1)])
    return alike(last_residual(model, tokens), apart)


def check_rows_alike(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Refuse a hook of the user's that treats the rows of a batch in different ways, where many runs that
    have nothing to do with each other make a batch.

    Raises:
        ValueError: there is such a hook.

    Cost: as `rows_run_alike`.
    """
    if not rows_run_alike(model, tokens):
        raise ValueError(
            f"your hook at {user_hooks(model)[0]} treats the rows of a batch in different ways, so that runs "
            "cannot share one: remove it, or let it act on all rows alike"
        )


def check_adds_up(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Refuse a model whose `attn_out` and `mlp_out` are not what its blocks add to the stream.

    Raises:
        ValueError: such a model.

    Cost: a forward pass of at most 8 tokens; of one row, where there are hooks of the user's.
    """
    names = {name: f"blocks.{{}}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")}
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
                f"layer {layer} of this model does not add attn_out and mlp_out to the residual stream as "
                "they are, or a hook changes what it adds: what they write cannot be read or patched by "
                "itself"
            )
