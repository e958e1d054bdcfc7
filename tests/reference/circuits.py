"""Circuits as full float64 matrices, from a Hugging Face model's own weights; no engine, no folding.

Vectors are rows. A norm is a matrix here: it subtracts the mean (LayerNorm) and multiplies by its scale.
"""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass
class Layer:
    W_Q: torch.Tensor
    """[head, d_model, d_head]"""
    W_K: torch.Tensor
    W_V: torch.Tensor
    W_O: torch.Tensor
    """[head, d_head, d_model]"""
    norm: torch.Tensor
    """[d_model, d_model]"""
    behind: torch.Tensor
    """[d_model, d_model]: the norm between attention and the stream, or the identity."""


@dataclasses.dataclass
class Weights:
    W_E: torch.Tensor
    effective: torch.Tensor | None
    """[d_vocab, d_model]: the input of the first block, and of its MLP."""
    W_pos: torch.Tensor | None
    W_U: torch.Tensor
    final: torch.Tensor
    """[d_model, d_model]"""
    centre: torch.Tensor
    """[d_model, d_model]: subtracts the mean of outputs; the identity for RMSNorm."""
    capped: bool
    layers: list[Layer]
    rotary_dim: int
    theta: float


def centering(n):
    return torch.eye(n).double() - 1 / n


def of_hf(model, kind):
    """The weights of a tiny test model."""
    model = model.double().requires_grad_(False)
    return {"gpt2": gpt2, "gpt_neox": gpt_neox, "llama": llama, "gemma2": gemma2}[kind](model)


def by_head(weight, d_head):
    """Reshape [head * d_head, d_model], as in torch's Linear, to [head, d_model, d_head]."""
    return torch.stack([part.T for part in weight.split(d_head)])


def gpt2(model):
    body, d = model.transformer, model.config.n_embd
    d_head = d // model.config.n_head
    layers = []
    for block in body.h:
        Q, K, V = (by_head(part.T, d_head) for part in block.attn.c_attn.weight.split(d, dim=1))
        W_O = torch.stack(block.attn.c_proj.weight.split(d_head))
        norm = centering(d) @ block.ln_1.weight.diag()
        layers.append(Layer(Q, K, V, W_O, norm, torch.eye(d).double()))
    W_E, first = body.wte.weight, body.h[0]
    return Weights(
        W_E=W_E,
        effective=W_E + first.mlp(first.ln_2(W_E)),
        W_pos=body.wpe.weight,
        W_U=model.lm_head.weight.T,
        final=centering(d) @ body.ln_f.weight.diag(),
        centre=centering(d),
        capped=False,
        layers=layers,
        rotary_dim=0,
        theta=0,
    )


def gpt_neox(model):
    body, config = model.gpt_neox, model.config
    d, n_heads = config.hidden_size, config.num_attention_heads
    d_head = d // n_heads
    layers = []
    for block in body.layers:
        joint = block.attention.query_key_value.weight
        Q, K, V = [], [], []
        for head in range(n_heads):
            of_head = joint[head * 3 * d_head : (head + 1) * 3 * d_head]
            for kind, part in zip((Q, K, V), of_head.split(d_head), strict=True):
                kind.append(part.T)
        W_O = torch.stack([part.T for part in block.attention.dense.weight.split(d_head, dim=1)])
        norm = centering(d) @ block.input_layernorm.weight.diag()
        layers.append(Layer(torch.stack(Q), torch.stack(K), torch.stack(V), W_O, norm, torch.eye(d).double()))
    W_E, first = body.embed_in.weight, body.layers[0]
    return Weights(
        W_E=W_E,
        effective=W_E + first.mlp(first.post_attention_layernorm(W_E)),
        W_pos=None,
        W_U=model.get_output_embeddings().weight.T,
        final=centering(d) @ body.final_layer_norm.weight.diag(),
        centre=centering(d),
        capped=False,
        layers=layers,
        rotary_dim=d_head // 2,
        theta=500.0,
    )


def llama(model):
    return _like_llama(
        model,
        scale_of=lambda norm: norm.weight,
        W_E=model.model.embed_tokens.weight,
        mlp=lambda block, x: block.mlp(block.post_attention_layernorm(x)),
        behind=None,
        capped=False,
        theta=500.0,
    )


def gemma2(model):
    return _like_llama(
        model,
        scale_of=lambda norm: 1 + norm.weight,
        W_E=model.model.embed_tokens.weight * math.sqrt(model.config.hidden_size),
        mlp=lambda block, x: block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x))),
        behind="post_attention_layernorm",
        capped=True,
        theta=500.0,
    )


def _like_llama(model, *, scale_of, W_E, mlp, behind, capped, theta):
    body, config = model.model, model.config
    d = config.hidden_size
    d_head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    layers = []
    for block in body.layers:
        attention = block.self_attn
        keys, values = (by_head(each.weight, d_head) for each in (attention.k_proj, attention.v_proj))
        layers.append(
            Layer(
                by_head(attention.q_proj.weight, d_head),
                # head h uses the keys and values of group h // shared
                torch.stack([keys[head // shared] for head in range(config.num_attention_heads)]),
                torch.stack([values[head // shared] for head in range(config.num_attention_heads)]),
                torch.stack([part.T for part in attention.o_proj.weight.split(d_head, dim=1)]),
                scale_of(block.input_layernorm).diag(),
                scale_of(getattr(block, behind)).diag() if behind else torch.eye(d).double(),
            )
        )
    return Weights(
        W_E=W_E,
        effective=W_E + mlp(body.layers[0], W_E),
        W_pos=None,
        W_U=model.lm_head.weight.T,
        final=scale_of(body.norm).diag(),
        centre=torch.eye(d).double(),
        capped=capped,
        layers=layers,
        rotary_dim=d_head,
        theta=theta,
    )


def of_toy(weights, n_layers):
    """The weights of an attention-only model in TransformerLens's format, with LayerNorm."""
    weights = {name: value.double() for name, value in weights.items()}
    d = weights["embed.W_E"].shape[1]
    layers = []
    for layer in range(n_layers):
        W = [weights[f"blocks.{layer}.attn.W_{name}"] for name in "QKVO"]
        norm = centering(d) @ weights[f"blocks.{layer}.ln1.w"].diag()
        layers.append(Layer(*W, norm, torch.eye(d).double()))
    return Weights(
        W_E=weights["embed.W_E"],
        effective=None,
        W_pos=weights["pos_embed.W_pos"],
        W_U=weights["unembed.W_U"],
        final=centering(d) @ weights["ln_final.w"].diag(),
        centre=centering(d),
        capped=False,
        layers=layers,
        rotary_dim=0,
        theta=0,
    )


def rotated(vectors, position, rotary_dim, theta):
    """Rotate rows [any, d_head] to a position; dimensions i and i + rotary_dim / 2 rotate together."""
    out = vectors.clone()
    half = rotary_dim // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / rotary_dim)
        x, y = vectors[:, i], vectors[:, i + half]
        out[:, i] = x * math.cos(angle) - y * math.sin(angle)
        out[:, i + half] = x * math.sin(angle) + y * math.cos(angle)
    return out


def read(w, layer, head, name):
    """A layer's norm followed by a weight that reads the stream."""
    return torch.einsum("mn,nh->mh", w.layers[layer].norm, getattr(w.layers[layer], f"W_{name}")[head])


def ov(w, layer, head):
    at = w.layers[layer]
    return torch.einsum("mh,hn,no,op->mp", read(w, layer, head, "V"), at.W_O[head], at.behind, w.centre)


def qk(w, layer, head, relative_position=None, unrotated=False):
    queries, keys = read(w, layer, head, "Q"), read(w, layer, head, "K")
    if relative_position is not None:
        # the key is not at position 0, which must not matter
        queries = rotated(queries, relative_position + 2, w.rotary_dim, w.theta)
        keys = rotated(keys, 2, w.rotary_dim, w.theta)
    if unrotated:
        queries, keys = queries[:, w.rotary_dim :], keys[:, w.rotary_dim :]
    return torch.einsum("mh,nh->mn", queries, keys)


def unembed(w):
    W = torch.einsum("mn,nv->mv", w.final, w.W_U)
    return W if w.capped else W - W.mean(1, keepdim=True)


def full_ov(w, heads, embedding):
    total = sum(ov(w, *head) for head in heads)
    return torch.einsum("tm,mn,nv->tv", embedding, total, unembed(w))


def full_qk(w, head, embedding, **positions):
    return torch.einsum("am,mn,bn->ab", embedding, qk(w, *head, **positions), embedding)


def k_composition(w, earlier, later, embedding, **positions):
    brought = torch.einsum("bm,mn->bn", embedding, ov(w, *earlier))
    return torch.einsum("am,mn,bn->ab", embedding, qk(w, *later, **positions), brought)


def q_composition(w, earlier, later, embedding, **positions):
    brought = torch.einsum("am,mn->an", embedding, ov(w, *earlier))
    return torch.einsum("am,mn,bn->ab", brought, qk(w, *later, **positions), embedding)


def v_composition(w, earlier, later, embedding):
    return torch.einsum("tm,mn,no,ov->tv", embedding, ov(w, *earlier), ov(w, *later), unembed(w))


def composition(w, kind, earlier, later, **positions):
    """The composition score of two heads."""
    first = ov(w, *earlier)
    second = {"q": lambda: qk(w, *later, **positions), "k": lambda: qk(w, *later, **positions).T}.get(
        kind, lambda: ov(w, *later)
    )()
    return float((first @ second).norm() / (first.norm() * second.norm()))
