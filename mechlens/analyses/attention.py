"""What chosen heads attend to on one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.models.protocol import LensModel, describe
from mechlens.models.runs import read_patterns
from mechlens.prompts import token_strings
from mechlens.results import AttentionPatterns, head_label


def attention_patterns(
    model: LensModel, tokens: Int[Tensor, " pos"], heads: Sequence[tuple[int, int]], *, cache: Any = None
) -> AttentionPatterns:
    """The attention patterns of some heads on one sequence.

    Args:
        heads: (layer, head) of each.
        cache: an `ActivationCache` of this one sequence; nothing is run then.

    Raises:
        ValueError: no heads, a head that the model does not have, or a cache of another length.

    Cost: one forward pass up to the deepest head's pattern, or none with a cache.
    """
    info = describe(model)
    if not heads:
        raise ValueError("attention patterns need at least one (layer, head)")
    for layer, head in heads:
        if not (0 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_heads):
            raise ValueError(
                f"no head {head_label(layer, head)}: the model has {model.cfg.n_layers} layers "
                f"of {model.cfg.n_heads} heads"
            )
    found: dict[tuple[int, int], Tensor] = {}

    def keep(layer: int, pattern: Tensor) -> None:
        found.update({(n, h): pattern[0, h].float().cpu() for n, h in heads if n == layer})

    layers = sorted({layer for layer, _ in heads})
    read_patterns(model, tokens[None], keep, layers=layers, cache=cache)
    return AttentionPatterns(
        model=info,
        tokens=tokens.cpu(),
        token_strings=token_strings(model, tokens),
        heads=tuple((layer, head) for layer, head in heads),
        patterns=torch.stack([found[head] for head in heads]),
    )
