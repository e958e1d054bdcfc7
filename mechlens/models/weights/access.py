"""Weights in the form that analyses need: the same shapes on both engines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from mechlens.models.protocol import LensModel, describe, provenance_of
from mechlens.models.run.properties import alike
from mechlens.models.run.user_hooks import alone, without_user_hooks


def per_query_head(values: Float[Tensor, "*batch kv d"], n_heads: int) -> Float[Tensor, "*batch head d"]:
    """Keys or values once per query head; grouped-query models share them among several."""
    shared = n_heads // values.shape[-2]
    return values if shared == 1 else repeat(values, "... kv d -> ... (kv shared) d", shared=shared)


def reading_bias(model: LensModel, layer: int, name: str) -> Float[Tensor, "head d_head"]:
    """The part of a layer's queries, keys or values that does not depend on the token; zeros if none.

    For values it is `b_V` plus the preceding norm's bias times `W_V`. Processing folds the norm's bias into
    `b_V`, and `b_V` into `b_O`, so only the values minus this part are the same with and without processing.

    Args:
        name: `Q`, `K` or `V`.
    """
    block = model.blocks[layer]
    W = getattr(block.attn, f"W_{name}").detach().float()
    _, norm_bias = norm_affine(getattr(block, "ln1", None), W.shape[1], model)
    bias = einsum(norm_bias, W, "d_model, kv d_model d_head -> kv d_head")
    # without a bias, a bridge has no such attribute and HookedTransformer has zeros
    own = getattr(block.attn, f"b_{name}", None)
    if own is not None:
        bias = bias + own.detach().float().reshape(bias.shape)
    return per_query_head(bias, model.cfg.n_heads)


def final_norm_scale(model: LensModel) -> Float[Tensor, " d_model"]:
    """The learned scale of the last norm; ones if it is folded into `W_U` or there is no norm."""
    return final_affine(model)[0]


def final_affine(model: LensModel) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """The learned scale and bias of the last norm; ones and zeros if they are folded or there is no norm."""
    return norm_affine(getattr(model, "ln_final", None), model.W_U.shape[0], model)


def output_weights(model: LensModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """A layer's `W_O` in float32 (`model.W_O` would copy all layers)."""
    return model.blocks[layer].attn.W_O.detach().float()


def output_bias(model: LensModel, layer: int) -> Float[Tensor, " d_model"]:
    """A layer's `b_O` in float32; zeros if it has none."""
    return _bias_of(model, model.blocks[layer].attn, "b_O")


def attention_out_affine(
    model: LensModel, layer: int
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]] | None:
    """The learned scale and bias of the norm between attention and the stream; None if there is none."""
    return _affine_behind(model, layer, "ln1_post")


def neuron_weights(model: LensModel, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """The `W_out` of a layer's MLP, in the weights' dtype: what each neuron writes for an activation of 1.

    Raises:
        ValueError: the layer has no MLP, or one without such weights (a mixture of experts).
    """
    mlp = getattr(model.blocks[layer], "mlp", None)
    if mlp is None:
        raise ValueError(f"layer {layer} of this model has no MLP, so it has no neurons")
    W_out = getattr(mlp, "W_out", None)
    if not isinstance(W_out, Tensor) or W_out.ndim != 2 or W_out.shape[1] != model.W_U.shape[0]:
        raise ValueError(
            f"the MLP of layer {layer} has no W_out [d_mlp, d_model], as in a mixture of experts, so its "
            "neurons cannot be read separately"
        )
    return W_out.detach()


def mlp_bias(model: LensModel, layer: int) -> Float[Tensor, " d_model"]:
    """The `b_out` of a layer's MLP in float32; zeros if it has none."""
    return _bias_of(model, model.blocks[layer].mlp, "b_out")


def mlp_out_affine(
    model: LensModel, layer: int
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]] | None:
    """The learned scale and bias of the norm between the MLP and the stream; None if there is none."""
    return _affine_behind(model, layer, "ln2_post")


def _bias_of(model: LensModel, module: Any, name: str) -> Float[Tensor, " d_model"]:
    # without a bias, a bridge has no such attribute and HookedTransformer has zeros
    bias = getattr(module, name, None)
    d_model = model.W_U.shape[0]
    return (
        torch.zeros(d_model, dtype=torch.float32, device=model.W_U.device)
        if bias is None
        else bias.detach().float()
    )


def _affine_behind(
    model: LensModel, layer: int, name: str
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]] | None:
    norm = getattr(model.blocks[layer], name, None)
    return None if norm is None else norm_affine(norm, model.W_U.shape[0], model)


def head_outputs(
    model: LensModel, layer: int, z: Float[Tensor, "row head d_head"], heads: Sequence[int]
) -> Float[Tensor, "row some d_model"]:
    """What some heads of a layer add to the stream, `z @ W_O`, in float32 and without biases.

    If there is a norm between attention and the stream (Gemma-2), each head's output is divided by the scale
    of the layer's attention output and multiplied by the norm's learned scale.
    """
    z, W_O, some = z.float(), output_weights(model, layer), list(heads)
    written = einsum(z[:, some], W_O[some], "row head d_head, head d_head d_model -> row head d_model")
    norm = attention_out_affine(model, layer)
    if norm is None:
        return written
    scale = norm_scale(model, z.flatten(1) @ W_O.flatten(0, 1) + output_bias(model, layer))
    if (model.cfg.normalization_type or "").startswith("LN"):
        written = written - written.mean(-1, keepdim=True)
    return written * norm[0] / scale[:, None, None]


def check_heads_add_up(
    model: LensModel, layer: int, z: Float[Tensor, "row head d_head"], attn_out: Float[Tensor, "row d_model"]
) -> None:
    """Check that a layer's head outputs (see `head_outputs`) sum to what attention adds to the stream.

    In Granite they do not: it multiplies their sum by a constant. A hook may do anything.

    Raises:
        ValueError: they do not.
    """
    bias, norm = output_bias(model, layer), attention_out_affine(model, layer)
    total = z.float().flatten(1) @ output_weights(model, layer).flatten(0, 1) + bias
    if norm is not None:
        total = before_norm(model, total, torch.ones_like(bias)) / norm_scale(model, total)[:, None]
        total = total * norm[0] + norm[1]
    if not alike(total.to(attn_out.dtype), attn_out):
        factor = float((total * attn_out).sum() / attn_out.float().square().sum())
        raise ValueError(
            f"the heads of layer {layer} (z @ W_O) do not sum to what its attention adds to the residual "
            f"stream (their sum is {factor:.3g} times as long): this model scales it, or a hook changes it, "
            "so heads cannot be read separately; use attn_out"
        )


def norm_scale(model: LensModel, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """What the model's norms divide vectors by, in float32; ones if the model has no norms."""
    kind = model.cfg.normalization_type
    wide = vectors.float()
    if kind is None:
        return torch.ones_like(wide[..., 0])
    if kind.startswith("LN"):
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide.pow(2).mean(-1) + model.cfg.eps).sqrt()


def before_norm(
    model: LensModel, directions: Float[Tensor, "*batch d_model"], scale: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """Turn directions that read a norm's output into directions that read its input.

    Includes the norm's learned scale and LayerNorm's subtraction of the mean; excludes the division by the
    vector's scale (`norm_scale`) and the bias.
    """
    moved = directions * scale
    if (model.cfg.normalization_type or "").startswith("LN"):
        moved = moved - moved.mean(-1, keepdim=True)
    return moved


def norm_affine(
    norm: Callable[[Tensor], Tensor] | None, d_model: int, model: LensModel
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Learned scale and bias of a norm, measured on a vector and its negative.

    The engines name, offset (Gemma) and fold the parameters differently, but their norms do the same.
    """
    like = model.W_U
    where: dict[str, Any] = {"dtype": torch.float32, "device": like.device}
    if norm is None or model.cfg.normalization_type is None:
        return torch.ones(d_model, **where), torch.zeros(d_model, **where)
    probe = torch.linspace(1, 2, d_model, **where)
    probe[1::2] *= -1
    probe -= probe.mean()
    probe /= probe.pow(2).mean().sqrt()
    probe = probe.to(like.dtype)
    with alone(model), without_user_hooks(norm), torch.inference_mode():
        up, down = (norm(x[None, None])[0, 0].float() for x in (probe, -probe))
    # the probe has a mean square of 1, to which the norm adds its eps
    return (up - down) / (2 * probe.float()) * (1 + model.cfg.eps) ** 0.5, (up + down) / 2


def direct_unembedding(model: LensModel) -> Float[Tensor, "d_model d_vocab"]:
    """What a direction in the stream adds to the logits, up to the division by the last norm's scale.

    Includes the last norm's learned scale and LayerNorm's subtraction of the mean; excludes the norm's bias
    and a soft-cap. The same for processed and unprocessed weights, up to a constant over the vocabulary,
    which processing removes.

    Cost: one copy of `W_U`, in float32.
    """
    W = final_norm_scale(model)[:, None] * model.W_U.float()
    if (model.cfg.normalization_type or "").startswith("LN"):
        W -= W.mean(0)
    return W.detach()


def is_tied(model: LensModel) -> bool | None:
    """Whether the unprocessed unembedding equals the embedding; None if unknown (processed weights of a model
    that mechlens did not load)."""
    known = provenance_of(model)
    if known is not None:
        return known.tied
    if describe(model).processing is not False:
        return None
    return torch.equal(model.W_U, model.W_E.T)


def all_parameters(model: Any) -> Iterator[tuple[str, Any, str, Tensor]]:
    """(path of the module, module, name, parameter), each parameter once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, module, name, parameter


def weights_hash(model: LensModel) -> str:
    """A hash of all of a model's weights.

    Cost: about a second per gigabyte.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, _, name, parameter in all_parameters(model):
        values = parameter.detach().cpu().contiguous().flatten()
        digest.update(f"{path}.{name} {values.dtype} {tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# parts of the names of settings that do not affect what the model computes
_NO_MATTER = (
    *("path", "_name", "architectures", "version", "device", "dtype", "attn_implementation", "_token_id"),
    *("tokenizer", "prepend_bos", "padding_side", "init", "seed", "checkpoint", "n_params", "trust_remote"),
    *("use_hook", "use_attn_in", "use_attn_result", "use_split_qkv", "ungroup", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "drop", "label", "problem_type", "summary"),
    "chunk_size_feed_forward",
)


def settings_hash(model: LensModel) -> str:
    """A hash of the settings that affect what a model computes (activation function, rotary base, eps,
    window): the engine's and, on a bridge, those of the wrapped model."""
    wrapped = getattr(vars(model).get("original_model"), "config", None)
    given = [vars(model.cfg), *([] if wrapped is None else [wrapped.to_dict()])]
    return hashlib.blake2b(json.dumps(_plain(given), sort_keys=True).encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    """Settings as JSON values; None for other objects."""
    if isinstance(value, dict):
        named = ((str(name), _plain(each)) for name, each in value.items())
        return {name: each for name, each in named if not any(part in name for part in _NO_MATTER)}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float)) else None
