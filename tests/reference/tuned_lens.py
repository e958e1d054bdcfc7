"""The tuned lens, slow and literal: full logits, autograd, PyTorch's own optimizer."""

from __future__ import annotations

import torch
from torch import nn


def residuals(model, tokens):
    """The input of block 0 and the output of each block, from the model's own cache."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    return [cache[name] for name in names]


def logits(model, resid):
    """Full logits of a residual, through the model's own modules."""
    out = model.ln_final(resid) @ model.W_U + model.b_U
    cap = model.cfg.output_logits_soft_cap
    return out if cap <= 0 else cap * torch.tanh(out / cap)


def kl(p_logits, q_logits):
    p = torch.distributions.Categorical(logits=p_logits)
    q = torch.distributions.Categorical(logits=q_logits)
    return torch.distributions.kl_divergence(p, q)


def train(model, batches, rate):
    """Train one linear layer per row, which adds its output to its input; returns them by row."""
    layers = []
    for row in range(model.cfg.n_layers):
        layer = nn.Linear(model.cfg.d_model, model.cfg.d_model, dtype=model.W_U.dtype)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
        for tokens in batches:
            stream = residuals(model, tokens)
            x = stream[row].clone()
            with torch.no_grad():
                final = model(tokens)
            optimizer.zero_grad()
            kl(final, logits(model, x + layer(x))).mean().backward()
            optimizer.step()
            schedule.step()
        layers.append(layer)
    model.zero_grad()
    return layers


class PublishedLens(nn.Module):
    """As published: translator i reads the residual before block i and adds its output to its input."""

    def __init__(self, n_layers, d_model, bias=True):
        super().__init__()
        self.translators = nn.ModuleList(nn.Linear(d_model, d_model, bias=bias) for _ in range(n_layers))

    def forward(self, h, i):
        return h + self.translators[i](h)
