"""How widely each head spreads its attention."""

from __future__ import annotations

import torch
from torch import Tensor

from mechlens.measures.attention_spread import attention_spread as spread
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, read_patterns
from mechlens.results import AttentionSpread
from mechlens.text.prompts import Prompt, prompt_tokens
from mechlens.text.tokens import all_bos


def attention_spread(model: LensModel, prompt: Prompt, *, prepend_bos: bool | None = None) -> AttentionSpread:
    """Measure how widely each head spreads its attention.

    Args:
        prompt: text, or token ids of one or several sequences of the same length.
        prepend_bos: whether to prepend BOS to a text; None prepends it if the tokenizer has one.

    Returns:
        Mean entropy (nats), distance (tokens) and first-token attention of every head.

    Raises:
        TypeError: not a model.
        ValueError: fewer than two tokens, or more than fit in the context.

    Example:
        >>> found = mechlens.attention_spread(model, "Mr. Pickwick met Mr. Winkle.")
        >>> found.values.shape  # layer, head, measure
        torch.Size([4, 6, 3])

    References: Clark et al. 2019, "What Does BERT Look At?", arXiv:1906.04341 (entropy of attention heads).
    Cost: one forward pass up to the last layer's attention pattern.
    """
    info = describe(model)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    total = torch.zeros(info.n_layers, info.n_heads, len(AttentionSpread.measures), dtype=torch.double)

    def add(layer: int, pattern: Tensor) -> None:
        total[layer] += spread(pattern).sum(0).double().cpu()

    for part in parts(tokens):
        read_patterns(model, part, add)
    return AttentionSpread(
        model=info,
        tokens=tokens,
        values=(total / len(tokens)).float(),
        prepend_bos=all_bos(model.tokenizer, tokens[:, 0]),
    )
