"""What chosen heads attend to on one sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import read_patterns
from mechlens.results import AttentionPatterns, head_label, parse_heads
from mechlens.results.heads import Heads
from mechlens.text.prompts import Prompt, prompt_tokens
from mechlens.text.tokens import token_strings


def attention_patterns(
    model: LensModel,
    prompt: Prompt,
    heads: Heads,
    *,
    cache: Any = None,
    prepend_bos: bool | None = None,
) -> AttentionPatterns:
    """The attention patterns of some heads on one sequence.

    Args:
        prompt: a text, or the ids of one sequence.
        heads: (layer, head) of each, or their names, as `detect_heads` gives them.
        cache: an `ActivationCache` of this one sequence; nothing is run then.
        prepend_bos: for a text: None prepends BOS where the tokenizer has one.

    Raises:
        ValueError: no heads, a head that the model does not have, more than one sequence, or a cache of
            another length.

    Cost: one forward pass up to the deepest head's pattern, or none with a cache.
    """
    info = describe(model)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    if len(tokens) != 1:
        raise ValueError(f"attention patterns are of one sequence, but the tokens are {tuple(tokens.shape)}")
    wanted = parse_heads(heads)
    if not wanted:
        raise ValueError("attention patterns need at least one head")
    for layer, head in wanted:
        if not (0 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_heads):
            raise ValueError(
                f"no head {head_label(layer, head)}: the model has {model.cfg.n_layers} layers "
                f"of {model.cfg.n_heads} heads"
            )
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
