"""Direct logit attribution from full vectors, one component, neuron and position at a time, in float64."""

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


@torch.no_grad()
def neurons(model, tokens, batch, pos, token):
    """{(layer, neuron): (contribution, activation)}, and the contribution of each layer's bias."""
    kinds = ("mlp.hook_post", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(kinds))
    final = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][batch, pos].double()
    weight, _ = affine(model, None if model.cfg.normalization_type is None else model.ln_final)
    scale, column = scale_of(model, final), model.W_U[:, token].double()
    found, biases = {}, []
    for layer, block in enumerate(model.blocks):
        activations = cache[f"blocks.{layer}.mlp.hook_post"][batch, pos].double()
        written = [a * row for a, row in zip(activations, block.mlp.W_out.double(), strict=True)]
        b_out = getattr(block.mlp, "b_out", None)
        bias = torch.zeros_like(final) if b_out is None else b_out.double()
        post = getattr(block, "ln2_post", None)
        if post is not None:
            behind = scale_of(model, sum(written) + bias)
            learned, shift = affine(model, post)
            written = [centered(model, vector) / behind * learned for vector in written]
            bias = centered(model, bias) / behind * learned + shift
        for neuron, vector in enumerate(written):
            added = float(centered(model, vector) / scale * weight @ column)
            found[layer, neuron] = (added, float(activations[neuron]))
        biases.append(float(centered(model, bias) / scale * weight @ column))
    return found, biases


@torch.no_grad()
def promotion(model, layer, neuron):
    """How much a neuron's output weights raise each token's logit, up to one factor."""
    vector, post = (
        model.blocks[layer].mlp.W_out[neuron].double(),
        getattr(model.blocks[layer], "ln2_post", None),
    )
    if post is not None:
        vector = centered(model, vector) * affine(model, post)[0]
    weight, _ = affine(model, None if model.cfg.normalization_type is None else model.ln_final)
    return centered(model, vector) * weight @ model.W_U.double()
