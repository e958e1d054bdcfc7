"""Direct logit attribution from full vectors, one component and position at a time, in float64."""

from __future__ import annotations

import torch


def affine(model, norm):
    """A norm's learned scale and bias, under each engine's names."""
    ones, zeros = torch.ones(model.cfg.d_model).double(), torch.zeros(model.cfg.d_model).double()
    if norm is None or model.cfg.normalization_type is None:
        return ones, zeros
    weight, bias = getattr(norm, "w", None), getattr(norm, "b", None)
    if type(getattr(norm, "_original_component", None)).__name__.startswith("Gemma"):
        weight = weight + 1  # Hugging Face's Gemma stores the scale minus 1
    return ones if weight is None else weight.double(), zeros if bias is None else bias.double()


def centered(model, vector):
    is_layer_norm = (model.cfg.normalization_type or "").startswith("LN")
    return vector - vector.mean() if is_layer_norm else vector


def scale_of(model, vector):
    if model.cfg.normalization_type is None:
        return torch.tensor(1.0).double()
    return (centered(model, vector).pow(2).mean() + model.cfg.eps).sqrt()


@torch.no_grad()
def contributions(model, tokens, batch, pos, token):
    """Each component's contribution to the logit of `token`, by name, and the logit itself."""
    kinds = ("hook_resid_pre", "hook_resid_post", "hook_z", "hook_mlp_out")
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(kinds))

    def at(name):
        return cache[name][batch, pos].double()

    start, vectors = at("blocks.0.hook_resid_pre"), {}
    if model.cfg.positional_embedding_type == "standard":
        vectors["embed"] = model.W_E[tokens[batch, pos]].double()
        vectors["pos_embed"] = model.W_pos[pos].double()
    else:
        vectors["embed"] = start
    for layer, block in enumerate(model.blocks):
        z, W_O = at(f"blocks.{layer}.attn.hook_z"), model.W_O[layer].double()
        heads = [z[head] @ W_O[head] for head in range(model.cfg.n_heads)]
        b_O = getattr(block.attn, "b_O", None)
        bias = torch.zeros_like(start) if b_O is None else b_O.double()
        post = getattr(block, "ln1_post", None)
        if post is not None:
            scale = scale_of(model, sum(heads) + bias)
            weight, shift = affine(model, post)
            heads = [centered(model, head) / scale * weight for head in heads]
            bias = centered(model, bias) / scale * weight + shift
        vectors |= {f"L{layer}H{head}": vector for head, vector in enumerate(heads)}
        vectors[f"L{layer} bias"] = bias
        if not getattr(model.cfg, "attn_only", False):
            vectors[f"L{layer} MLP"] = at(f"blocks.{layer}.hook_mlp_out")
    final = at(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    weight, shift = affine(model, None if model.cfg.normalization_type is None else model.ln_final)
    column = model.W_U[:, token].double()
    scale = scale_of(model, final)
    added = {
        name: float(centered(model, vector) / scale * weight @ column) for name, vector in vectors.items()
    }
    added["final bias"] = float(shift @ column + model.b_U[token].double())
    whole = (centered(model, final) / scale * weight + shift) @ column + model.b_U[token].double()
    return added, float(whole)
