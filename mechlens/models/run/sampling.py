"""Sampling text from a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import check_counts, check_model, check_reals, generator_of
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.clean_run import bridge_cache
from mechlens.models.run.forward import StopForward, parts, run, running
from mechlens.models.run.properties import alike, key_value_heads, last_residual, reads_alike_in
from mechlens.models.run.sites import last_hook
from mechlens.models.run.unembedding import check_streamed, final_norm, unembedding
from mechlens.models.run.user_hooks import user_hooks
from mechlens.progress import progress_bar
from mechlens.text.prompts import bos_to_prepend
from mechlens.text.tokens import drawable_tokens

CACHE_BYTES = 2 * 2**30
"""Memory for the keys and values of all sequences; if they need more, prefixes are recomputed."""

Read = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch d_model"]]
"""The last `resid_post` at the last token, given all tokens so far."""


def sample_tokens(
    model: LensModel,
    *,
    batch: int,
    seq_len: int,
    seed: int = 0,
    temperature: float = 1.0,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> Int[Tensor, "batch pos"]:
    """Sample sequences from a model, each token from the model's own prediction.

    Args:
        batch: number of sequences.
        seq_len: tokens in each sequence, including the first.
        seed: seed of the `torch.Generator`; the same seed gives the same tokens.
        temperature: 1 samples from the model's distribution; lower temperatures favor likely tokens.
        prepend_bos: begin with BOS; None does so if the tokenizer has one. Without BOS, the first token is
            drawn uniformly.
        progress: show a progress bar; None shows one in a terminal and in Jupyter.

    Returns:
        Token ids on the CPU. Special tokens other than BOS are never drawn, so sequences do not end early.

    Raises:
        ValueError: a size below 1, more tokens than fit into the context, a temperature that is not above 0,
            `prepend_bos=True` with a tokenizer that has no BOS, or a model whose logits are not its last
            norm's output through `W_U`, `b_U` and a soft-cap.

    Example:
        >>> mechlens.sample_tokens(model, batch=2, seq_len=5, progress=False).shape
        torch.Size([2, 5])

    Cost: for each token, one forward pass with cached keys and values, and one product with `W_U`. If the
    model has user hooks, or its positions depend on the sequence length, all earlier tokens are rerun.
    """
    check_model(model)
    check_counts(batch=batch, seq_len=seq_len)
    check_reals(temperature=temperature)
    if seq_len > model.cfg.n_ctx:
        raise ValueError(f"{seq_len} tokens do not fit into the model's context of {model.cfg.n_ctx}")
    if not temperature > 0:
        raise ArgumentError("temperature", "above 0", temperature)
    bos = bos_to_prepend(model, prepend_bos)
    generator = generator_of(seed)
    drawable = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    tokens = torch.empty(batch, seq_len, dtype=torch.long)
    tokens[:, 0] = (
        drawable[torch.randint(len(drawable), (batch,), generator=generator)] if bos is None else bos
    )
    check_streamed(model, drawable[None, : min(8, model.cfg.n_ctx)])
    reader, read = unembedding(model), _reader(model, tokens)
    for pos in progress_bar(range(1, seq_len), desc="sampling", unit="token", progress=progress):
        residual = read(tokens[:, :pos])
        with torch.inference_mode():
            logits = reader.logits(final_norm(model, residual[:, None])[:, 0]).cpu()
        chances = (logits[:, drawable] / temperature).softmax(-1)
        tokens[:, pos] = drawable[torch.multinomial(chances, 1, generator=generator)[:, 0]]
    return tokens


def _reader(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Read:
    """A reader with cached keys and values, if it agrees with whole runs on a few tokens; else whole runs."""
    whole = partial(_whole, model)
    cfg, (batch, length) = model.cfg, tokens.shape
    size = 2 * cfg.n_layers * key_value_heads(model) * cfg.d_head * batch * length * model.W_E.dtype.itemsize
    tried = tokens[:1, :1].repeat(1, min(3, length))
    if length < 3 or size > CACHE_BYTES or user_hooks(model) or not reads_alike_in(model, tried[0], length):
        return whole
    try:
        cached = _Cached(model, 1)
        found = torch.stack([cached(tried[:, : pos + 1]) for pos in range(3)], dim=1)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return whole
    return _Cached(model, batch) if alike(found, last_residual(model, tried)) else whole


def _whole(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_model"]:
    # a copy, so that the other positions can be freed
    return torch.cat([last_residual(model, rows)[:, -1].clone() for rows in parts(tokens)])


class _Cached:
    """Runs only the new tokens in each call."""

    def __init__(self, model: LensModel, batch: int) -> None:
        self.model, self.read = model, 0
        if engine_of(model) == "HookedTransformer":
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            self.name = "past_kv_cache"
            self.cache: Any = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, batch)
        else:
            self.name, self.cache = "past_key_values", bridge_cache()

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_model"]:
        new = tokens[:, self.read :]
        kept: list[Tensor] = []

        def keep(activation: Tensor, hook: Any) -> None:
            kept.append(activation[:, -1])
            raise StopForward

        options: dict[str, Any] = {self.name: self.cache}
        if self.name == "past_kv_cache":
            # no token is padding, whatever its id
            options["attention_mask"] = torch.ones_like(new)
        with running(self.model, [(last_hook(self.model), keep)]):
            run(self.model, new, **options)
        self.read = tokens.shape[1]
        return kept[0]
