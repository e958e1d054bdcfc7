"""Successor scores of one head, one token at a time."""

from __future__ import annotations


def successor_shares(model, layer, head, members, after):
    """Shares of the tokens of `after` whose own successor, and those of others, are the top member."""
    W_V, W_O, block = model.W_V[layer], model.W_O[layer], model.blocks[0]
    right = others_right = 0.0
    for token, successor in after.items():
        x = model.W_E[token]
        x = x + block.mlp(block.ln2(x[None, None]))[0, 0]
        logits = x @ W_V[head // (model.cfg.n_heads // len(W_V))] @ W_O[head] @ model.W_U
        top = max(members, key=lambda member: float(logits[member]))
        right += top == successor
        others = [each for each in after.values() if each != successor]
        others_right += sum(top == each for each in others) / len(others)
    return right / len(after), others_right / len(after)
