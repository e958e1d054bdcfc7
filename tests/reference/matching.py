"""Which of some keys a query matches best, read from the engine's own queries and keys."""

from __future__ import annotations

import torch


def read_alone(model, layer, name, vector):
    """`[head, d_head]` of the engine's `hook_q` or `hook_k` where one position has this stream."""
    kept = []

    def put(stream, hook):
        return vector[None, None].to(stream.dtype)

    def keep(value, hook):
        kept.append(value.detach()[0, 0])

    hooks = [(f"blocks.{layer}.hook_resid_pre", put), (f"blocks.{layer}.attn.hook_{name}", keep)]
    model.run_with_hooks(torch.zeros(1, 1, dtype=torch.long), fwd_hooks=hooks, return_type=None)
    norm = getattr(model.blocks[layer].attn, f"{name}_norm", None)
    each = kept[0].reshape(-1, model.cfg.d_head)
    return each if norm is None else torch.stack([norm(row[None])[0] for row in each])


def best_key(model, layer, head, query, keys):
    """The place of the key with the highest score, without rotation, for one vector of the stream."""
    q = read_alone(model, layer, "q", query)[head]
    scores = []
    for key in keys:
        k = read_alone(model, layer, "k", key)
        scores.append(float(q @ k[head // (model.cfg.n_heads // len(k))]))
    return max(range(len(scores)), key=lambda at: scores[at])
