"""The attention patterns of chosen heads on one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import read_patterns
from mechlens.results import AttentionPatterns, parse_heads
from mechlens.results.heads import Heads, check_in_range
from mechlens.text.prompts import Prompt, prompt_tokens
from mechlens.text.tokens import token_strings


def attention_patterns(
    model: LensModel, prompt: Prompt, heads: Heads, *, cache: Any = None, prepend_bos: bool | None = None
) -> AttentionPatterns:
    """Read the attention patterns of chosen heads on one sequence.

    Args:
        prompt: a text, or the token ids of one sequence.
        heads: one head or several, each as `"L5H5"`, `"5.5"` or `(5, 5)`.
        cache: an `ActivationCache` of this sequence. If given, the model is not run.
        prepend_bos: whether to prepend BOS to a text; None prepends it if the tokenizer has one.

    Returns:
        Attention after softmax, `[head, dest, src]`, in [0, 1]; each row sums to 1.

    Raises:
        ValueError: no heads, a head that the model does not have, more than one sequence, or a cache of the
            wrong length.

    Example:
        >>> found = mechlens.attention_patterns(model, "Mr. Pickwick met Mr. Winkle.", ["L0H3", (1, 2)])
        >>> found.labels, found.patterns.shape
        (('L0H3', 'L1H2'), torch.Size([2, 14, 14]))

    Cost: one forward pass up to the deepest head's pattern, or none with a cache.
    """
    info = describe(model)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    if len(tokens) != 1:
        raise ValueError(f"attention patterns need one sequence, got tokens of shape {tuple(tokens.shape)}")
    wanted = parse_heads(heads)
    if not wanted:
        raise ValueError("attention patterns need at least one head")
    for layer, head in wanted:
        check_in_range(layer, head, model.cfg.n_layers, model.cfg.n_heads)
    found: dict[tuple[int, int], Tensor] = {}

    def keep(layer: int, pattern: Tensor) -> None:
        found.update({(n, h): pattern[0, h].float().cpu() for n, h in wanted if n == layer})

    read_patterns(model, tokens, keep, layers=sorted({layer for layer, _ in wanted}), cache=cache)
    return AttentionPatterns(
        model=info,
        tokens=tokens[0],
        token_strings=token_strings(model, tokens[0]),
        heads=tuple(wanted),
        patterns=torch.stack([found[head] for head in wanted]),
    )
