"""Patching with one full run per cell: the loop of "How one can Interpret GPT2-Small", for any site."""

from __future__ import annotations

import torch


def loss(logits, tokens, read):
    """Mean loss in nats over the positions `read`, in float64."""
    log_probs = logits.double().log_softmax(-1)
    return -sum(float(log_probs[pos, tokens[pos + 1]]) for pos in read) / len(read)


def run(model, tokens, name, patch):
    """The logits of one run with one hook; `patch` changes the activation of the only row in place."""

    def hook_fn(activation, hook):
        changed = activation.clone()
        patch(changed[0])
        return changed

    hooks = [(name, hook_fn)]
    if name.endswith("resid_mid"):
        # through the heads' output, because a bridge's hook there affects only the MLP's input
        before = {}

        def keep(activation, hook):
            before["pre"] = activation

        def add(activation, hook):
            mid = before["pre"] + activation
            return activation + (hook_fn(mid, hook) - mid)

        hooks = [(name.replace("mid", "pre"), keep), (name.replace("hook_resid_mid", "hook_attn_out"), add)]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[0]


def cache_of(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens)


def earlier(model, tokens, name, layers, positions, shift, read):
    """The article's loop: each (layer, position) gets the clean activation `shift` positions earlier."""
    _, cache = cache_of(model, tokens)
    grid = torch.zeros(len(layers), len(positions))
    for i, layer in enumerate(layers):
        own = cache[name.format(layer)][0]
        for j, pos in enumerate(positions):

            def patch(activation, own=own, pos=pos):
                activation[pos, :] = own[pos - shift]

            logits = run(model, tokens, name.format(layer), patch)
            grid[i, j] = loss(logits, tokens[0], read)
    return grid
