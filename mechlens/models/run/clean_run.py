"""Clean runs, with the activations that patches, values and metrics need."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.forward import serve, watch
from mechlens.models.run.sites import SITES, by_position, last_hook


@dataclasses.dataclass(frozen=True, eq=False)
class CleanRun:
    """One forward pass of some prompts, and the activations kept from it."""

    model: LensModel
    tokens: Int[Tensor, "prompt pos"]
    kept: Mapping[str, Float[Tensor, "prompt *rest"]]
    """By hook name."""
    past: Sequence[tuple[Tensor, Tensor]] = ()
    """By layer, the keys and values as the engine caches them; empty if they were not kept."""

    @classmethod
    def of(
        cls,
        model: LensModel,
        tokens: Int[Tensor, "prompt pos"],
        keep: Collection[str] = (),
        *,
        parts: Sequence[slice] = (slice(None),),
        with_past: bool = False,
    ) -> CleanRun:
        """Run the prompts.

        Args:
            keep: names of the hooks whose activations are kept, besides the final residual stream.
            parts: which prompts run together.
            with_past: also keep the keys and values.

        Cost: one forward pass.
        """
        kept: dict[str, list[Tensor]] = {name: [] for name in dict.fromkeys((*keep, last_hook(model)))}
        readers = {name: each.append for name, each in kept.items()}
        past: list[tuple[Tensor, Tensor]] = []
        if with_past:
            past = _serve_with_past(model, tokens, readers)
        else:
            for rows in parts:
                watch(model, tokens[rows], readers)
        whole = {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in kept.items()}
        return cls(model, tokens, whole, past)

    @property
    def final(self) -> Float[Tensor, "prompt pos d_model"]:
        """The final residual stream."""
        return self.kept[last_hook(self.model)]

    def at(self, site: str, layer: int) -> Float[Tensor, "prompt pos *rest"]:
        """The activation at a site; scores and patterns as `[prompt, dest, head, src]`."""
        return by_position(self.kept[SITES[site].format(layer)], site)

    def prompt(self, index: int) -> CleanRun:
        """The clean run of one of the prompts."""
        one = slice(index, index + 1)
        kept = {name: each[one] for name, each in self.kept.items()}
        return dataclasses.replace(self, tokens=self.tokens[one], kept=kept, past=())


def _serve_with_past(
    model: LensModel, tokens: Int[Tensor, "prompt pos"], readers: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    if engine_of(model) == "HookedTransformer":
        entries = _empty_cache(model, len(tokens))
        # with a mask, because HookedTransformer would make one with the tokenizer, and there may be none
        serve(model, tokens, readers, past_kv_cache=entries, attention_mask=torch.ones_like(tokens))
        return [(entry.past_keys, entry.past_values) for entry in entries.entries]
    cache = bridge_cache()
    serve(model, tokens, readers, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def bridge_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _empty_cache(model: LensModel, n_prompts: int) -> Any:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, n_prompts)


def cache_entry(keys: Tensor, values: Tensor) -> Any:
    """Keys and values of a prefix, for a HookedTransformer block."""
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

    return TransformerLensKeyValueCacheEntry(keys, values, frozen=True)
