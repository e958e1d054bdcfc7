"""Loops over the vocabulary, one feature at a time, as published."""

from __future__ import annotations

import torch


def hf_block_output(hf_model, layer):
    """`tokens -> [batch, pos, d_model]`: the output of a Hugging Face model's block."""
    body = hf_model.base_model
    block = (body.h if hasattr(body, "h") else body.layers)[layer]

    @torch.no_grad()
    def output(tokens):
        kept = []

        def keep(module, given, made):
            kept.append(made[0] if isinstance(made, tuple) else made)

        handle = block.register_forward_hook(keep)
        try:
            hf_model(tokens)
        finally:
            handle.remove()
        return kept.pop()

    return output


@torch.no_grad()
def by_hand(model, names, prefix=()):
    """Activations of each token by hook name, `[d_vocab, width]`, from one full run each."""
    rows = {name: [] for name in names}
    for i in range(model.cfg.d_vocab):
        _, cache = model.run_with_cache(torch.tensor([[*prefix, i]]), names_filter=lambda name: name in rows)
        for name in names:
            rows[name].append(cache[name][0, -1])
    return {name: torch.stack(some) for name, some in rows.items()}


@torch.no_grad()
def search_maximal(a_model, vocab_size, n_tokens, feature, batch_size=1000, summed=False):
    """The published function, where `a_model` and `vocab_size` are globals, and which decodes the tokens."""
    maximal_tokens = []
    for t in range(n_tokens):
        activations = []
        for i in range(0, vocab_size, batch_size):
            token_batch = torch.tensor([j for j in range(i, min(i + batch_size, vocab_size))])  # noqa: C416
            token_batch = token_batch.reshape((min(batch_size, vocab_size - i), 1))
            maximal_tensor = torch.tensor(maximal_tokens).repeat(min(batch_size, vocab_size - i), 1)
            if t > 0:  # noqa: SIM108
                greedy_tokens = torch.cat((maximal_tensor, token_batch), dim=1).int()
            else:
                greedy_tokens = token_batch
            output = a_model(greedy_tokens)
            if summed:
                activations += torch.sum(output[:, :, feature], dim=-1)
            else:
                activations += output[:, -1, feature].flatten()

        activations = torch.tensor(activations)
        token_int = torch.argmax(activations)
        maximal_tokens.append(token_int)
    return [int(token) for token in maximal_tokens]


@torch.no_grad()
def beam_search(a_model, vocab_size, n_tokens, feature, beam, summed=False, prefix=()):
    """`[(score, tokens)]`, best first, from full runs of every continuation of every input."""
    inputs = [(0.0, [])]
    for _ in range(n_tokens):
        longer = []
        for _, tokens in inputs:
            rows = torch.tensor([[*prefix, *tokens, i] for i in range(vocab_size)])
            values = a_model(rows)[:, len(prefix) :, feature]
            scores = values.sum(-1) if summed else values[:, -1]
            longer += [(float(scores[i]), [*tokens, i]) for i in range(vocab_size)]
        inputs = sorted(longer, key=lambda pair: -pair[0])[:beam]
    return inputs


def only_block(hf_model, layer):
    """The Hugging Face model with only one block, changed in place."""
    body = hf_model.base_model
    name = "h" if hasattr(body, "h") else "layers"
    setattr(body, name, torch.nn.ModuleList([getattr(body, name)[layer]]))
    return hf_model


def embedded_output(hf_model, layer, embedded, prefix=()):
    """`[row, pos, d_model]` on the graph of `embedded`: a block's output after a prefix."""
    body = hf_model.base_model
    block = (body.h if hasattr(body, "h") else body.layers)[layer]
    kept = []
    handle = block.register_forward_hook(
        lambda module, given, made: kept.append(made[0] if isinstance(made, tuple) else made)
    )
    before = hf_model.get_input_embeddings()(torch.tensor(prefix, dtype=torch.long)).detach()
    try:
        hf_model(inputs_embeds=torch.cat([before.expand(len(embedded), -1, -1), embedded], dim=1))
    finally:
        handle.remove()
    return kept.pop()[:, len(prefix) :]


def descend(loss_of, start, learning_rate, steps, after=lambda value: value):
    """The published gradient descent: the losses before each step, and the final embeddings."""
    value, losses = start.clone(), []
    for _ in range(steps):
        value = value.detach().requires_grad_()
        loss = loss_of(value)
        losses.append(loss.detach())
        (gradient,) = torch.autograd.grad(loss.sum(), [value])
        value = after((value - learning_rate * gradient).detach())
    return torch.stack(losses, dim=1), value


def alignment(mine, theirs, top_k):
    """`[feature, other feature]`: whether the best tokens agree, and the share of top tokens that do.

    nan where a feature has no token.
    """
    same = torch.zeros(len(mine), len(theirs))
    overlap = torch.zeros(len(mine), len(theirs))
    for m, own in enumerate(mine):
        for n, other in enumerate(theirs):
            if not own or not other:
                same[m, n] = overlap[m, n] = torch.nan
                continue
            same[m, n] = float(own[0] == other[0])
            overlap[m, n] = len(set(own[:top_k]) & set(other[:top_k])) / top_k
    return same, overlap


@torch.no_grad()
def real_contexts(model, windows, name, features, special=()):
    """`{feature: [(activation, window, position)]}`, largest first, from one full run per window."""
    found = {feature: [] for feature in features}
    for number, window in enumerate(windows):
        _, cache = model.run_with_cache(window[None], names_filter=lambda each: each == name)
        for feature in features:
            values = [
                (float(cache[name][0, pos, feature]), pos)
                for pos in range(len(window))
                if int(window[pos]) not in special
            ]
            if values:
                value, pos = max(values, key=lambda pair: pair[0])
                found[feature].append((value, number, pos))
    return {feature: sorted(each, key=lambda triple: -triple[0]) for feature, each in found.items()}
