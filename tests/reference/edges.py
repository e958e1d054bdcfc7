"""Runs with replaced edges, literally: every input is summed from what each component wrote.

On HookedTransformer, with an input of its own for each head (`use_split_qkv_input`, `use_hook_mlp_in`).
"""

from __future__ import annotations

import contextlib

import torch


@contextlib.contextmanager
def split_inputs(model):
    before = {name: getattr(model.cfg, name) for name in ("use_split_qkv_input", "use_hook_mlp_in")}
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    try:
        yield
    finally:
        model.set_use_split_qkv_input(before["use_split_qkv_input"])
        model.set_use_hook_mlp_in(before["use_hook_mlp_in"])


def written(model, tokens):
    """By component, what it adds to the stream."""
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    found = {"embed": cache["blocks.0.hook_resid_pre"]}
    for layer in range(model.cfg.n_layers):
        z = cache[f"blocks.{layer}.attn.hook_z"]
        for head in range(model.cfg.n_heads):
            found[f"L{layer}H{head}"] = z[:, :, head] @ model.W_O[layer, head]
        if not model.cfg.attn_only:
            found[f"L{layer}.mlp"] = cache[f"blocks.{layer}.hook_mlp_out"]
    return found


def logits_with_replaced_edges(model, tokens, there, removed):
    """Logits of a run in which each edge of `removed`, as (sender, receiver), carries `there[sender]`."""
    now = {}

    def less(stream, receiver):
        for sender, to in removed:
            if to == receiver:
                stream = stream + there[sender] - now[sender]
        return stream

    state = {}

    def begin(stream, hook, layer):
        if layer == 0:
            now["embed"] = stream
        state["stream"] = stream

    def heads(inputs, hook, layer, read):
        inputs = inputs.clone()
        for head in range(inputs.shape[2]):
            inputs[:, :, head] = less(inputs[:, :, head], f"L{layer}H{head}.{read}")
        return inputs

    def z(values, hook, layer):
        for head in range(model.cfg.n_heads):
            now[f"L{layer}H{head}"] = values[:, :, head] @ model.W_O[layer, head]

    def mlp_in(stream, hook, layer):
        return less(stream, f"L{layer}.mlp")

    def mlp_out(values, hook, layer):
        now[f"L{layer}.mlp"] = values

    def end(stream, hook):
        return less(stream, "logits")

    hooks = []
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}."
        hooks.append((f"{at}hook_resid_pre", lambda a, hook, n=layer: begin(a, hook, n)))
        for read in "qkv":
            hooks.append((f"{at}hook_{read}_input", lambda a, hook, n=layer, r=read: heads(a, hook, n, r)))
        hooks.append((f"{at}attn.hook_z", lambda a, hook, n=layer: z(a, hook, n)))
        if not model.cfg.attn_only:
            hooks.append((f"{at}hook_mlp_in", lambda a, hook, n=layer: mlp_in(a, hook, n)))
            hooks.append((f"{at}hook_mlp_out", lambda a, hook, n=layer: mlp_out(a, hook, n)))
    hooks.append((f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", end))
    with split_inputs(model), torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


def edge_gradients(model, tokens, metric):
    """By receiver, the gradient of a metric of the logits by its input; on HookedTransformer."""
    inputs = {}

    def keep(activation, hook, name):
        activation = activation.clone()
        if not activation.requires_grad:
            activation.requires_grad_()
        activation.retain_grad()
        inputs[name] = activation
        return activation

    hooks = []
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}."
        for read in "qkv":
            hooks.append((f"{at}hook_{read}_input", lambda a, hook, n=f"L{layer}.{read}": keep(a, hook, n)))
        if not model.cfg.attn_only:
            hooks.append((f"{at}hook_mlp_in", lambda a, hook, n=f"L{layer}.mlp": keep(a, hook, n)))
    hooks.append(
        (f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", lambda a, hook: keep(a, hook, "logits"))
    )
    with split_inputs(model), torch.enable_grad():
        metric(model.run_with_hooks(tokens, fwd_hooks=hooks)).sum().backward()
    model.zero_grad(set_to_none=True)
    found = {}
    for name, activation in inputs.items():
        layer, _, read = name.partition(".")
        if read in ("q", "k", "v"):
            for head in range(activation.shape[2]):
                found[f"{layer}H{head}.{read}"] = activation.grad[:, :, head]
        else:
            found[name] = activation.grad
    return found
