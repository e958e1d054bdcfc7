"""Forward passes that reduce attention patterns to head scores, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures import attention as measures
from mechlens.measures.attention import Mask, Sinks, mask_score, sink_score
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import parts, read_patterns, watch
from mechlens.models.weights.access import (
    attention_out_affine,
    direct_unembedding,
    output_weights,
    per_query_head,
    reading_bias,
)
from mechlens.text.prompts import RandomTokens


def mask_scores(
    model: LensModel, n_rows: int, masks: Mapping[str, Mask | Sinks]
) -> tuple[dict[str, Float[Tensor, "batch layer head"]], Callable[[slice], Callable[[int, Tensor], None]]]:
    """Empty scores for every mask and layer, and a function that returns a pattern reader for some rows. The
    reader fills in their scores."""
    shape = (n_rows, model.cfg.n_layers, model.cfg.n_heads)
    found = {kind: torch.full(shape, torch.nan, dtype=torch.float32) for kind in masks}

    def of_rows(rows: slice) -> Callable[[int, Tensor], None]:
        def read(layer: int, pattern: Tensor) -> None:
            for kind, mask in masks.items():
                if isinstance(mask, Sinks):
                    score = sink_score(pattern)
                else:
                    score = mask_score(pattern, mask.of_rows(rows).to(pattern.device))
                found[kind][rows, layer] = score.cpu()

        return read

    return found, of_rows


def score_masks(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    masks: Mapping[str, Mask | Sinks],
    *,
    cache: Any = None,
) -> dict[str, Float[Tensor, "batch layer head"]]:
    """Every mask's score for every head, from one forward pass or from a cache."""
    found, reduce = mask_scores(model, len(tokens), masks)
    start = 0
    # a cache holds all rows at once
    for part in parts(tokens) if cache is None else (tokens,):
        read_patterns(model, part, reduce(slice(start, start + len(part))), cache=cache)
        start += len(part)
    return found


def copying_scores(
    model: LensModel, random: RandomTokens
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, "batch layer head"]]:
    """Every head's copying score on one batch of samples, and its null."""
    batch, n_heads = random.tokens.shape[0], model.cfg.n_heads
    scores, nulls = (
        torch.full((batch, model.cfg.n_layers, n_heads), torch.nan, dtype=torch.float32) for _ in range(2)
    )
    first, n = int(random.prepend_bos), random.seq_len
    sample = slice(first, first + n)
    unembedding = direct_unembedding(model)
    mean_column = unembedding.mean(1)
    own = torch.arange(n)
    generator = torch.Generator().manual_seed(random.seed)
    other = (own + torch.randint(1, n, (1,), generator=generator)) % n
    columns, rows = unembedding.new_empty(0), slice(0)
    values: dict[int, Tensor] = {}

    def keep_values(layer: int, v: Tensor) -> None:
        values[layer] = v[:, sample]

    def reduce(layer: int, pattern: Tensor) -> None:
        v = per_query_head(values.pop(layer), n_heads).float() - reading_bias(model, layer, "V")
        W_O = output_weights(model, layer)
        norm = attention_out_affine(model, layer)
        if norm is not None:
            # dividing by the scale of the norm after attention changes no score, but its weights do
            W_O = W_O * norm[0]
        to_sample = einsum(
            v, W_O, columns, "batch source head d, head d m, batch token m -> batch head source token"
        )
        to_all = einsum(v, W_O @ mean_column, "batch source head d, head d -> batch head source")
        received = pattern[:, :, sample, sample].float().sum(-2)
        for into, which in ((scores, own), (nulls, other)):
            score = measures.copying_score(to_sample, to_all, received, which.to(v.device))
            into[rows, layer] = score.cpu()

    readers: dict[str, Callable[[Tensor], None]] = {}
    for layer in range(model.cfg.n_layers):
        readers[f"blocks.{layer}.attn.hook_v"] = partial(keep_values, layer)
        readers[f"blocks.{layer}.attn.hook_pattern"] = partial(reduce, layer)
    for part in parts(random.tokens):
        rows = slice(rows.stop, rows.stop + len(part))
        # the logits of the sample's tokens; `mean_column` gives the mean over all tokens
        columns = unembedding.T[part[:, sample].to(unembedding.device)]  # [batch, token, d_model]
        watch(model, part, readers)
    return scores, nulls
