"""Tiny random models of many architectures, and the lengths at which windows and scalings take effect.

Weights are drawn large enough for every part of a model to affect its output: with the libraries' own small
initialization, a wrong rotation or a lost bias would hide in the rounding. Windows and original contexts are
longer than what `load_model` compares and shorter than the context, as in real models.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechlens.models.load import local
from mechlens.models.load.engines import rope_parameters

VOCAB = 64
CONTEXT = 64
LIMIT = 24
"""Length of a sliding window, or of the original context before positions were scaled."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture, with the settings of a tiny model."""

    name: str
    config_class: str
    """In transformers."""
    settings: Mapping[str, Any]

    def config(self, **changes: Any) -> Any:
        """The Hugging Face configuration of the tiny model."""
        import transformers

        # the configuration may change nested settings in place
        settings = copy.deepcopy(dict(self.settings)) | changes
        return getattr(transformers, self.config_class)(**settings)


def _rope(kind: str = "default", **others: Any) -> dict[str, Any]:
    # a base that no model has by default
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0} | others}


_COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
_GPT2 = _COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_HEADS = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": None,
}
_GROUPED = _HEADS | {"num_key_value_heads": 2, "tie_word_embeddings": False}
_ORIGINAL = {"original_max_position_embeddings": LIMIT}
_FACTOR = CONTEXT / LIMIT
_LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
_WINDOW = {"sliding_window": LIMIT}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
# soft-caps low enough to bend scores and logits; a scale that is not sqrt(head_dim)
_GEMMA = _GROUPED | {"tie_word_embeddings": True, "head_dim": 16, "query_pre_attn_scalar": 12}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}

ARCHITECTURES = (
    Architecture("GPT-2", "GPT2Config", _GPT2),
    Architecture(
        "GPT-Neo",
        "GPTNeoConfig",
        _COMMON
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT}
        | {"attention_types": [[["global", "local"], 1]], "window_size": LIMIT},
    ),
    Architecture("GPT-J", "GPTJConfig", _GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}),
    # two frequencies, since with only one the base has no effect
    Architecture("GPT-NeoX", "GPTNeoXConfig", _HEADS | _rope(partial_rotary_factor=0.5)),
    Architecture(
        "GPT-NeoX (linear)",
        "GPTNeoXConfig",
        _HEADS | _rope("linear", partial_rotary_factor=0.5, factor=_FACTOR),
    ),
    Architecture(
        "OPT",
        "OPTConfig",
        _COMMON
        | {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "max_position_embeddings": CONTEXT, "pad_token_id": 1},
    ),
    Architecture("Llama", "LlamaConfig", _GROUPED | _rope()),
    Architecture("Llama (linear)", "LlamaConfig", _GROUPED | _rope("linear", factor=_FACTOR)),
    # scales only beyond its context, which is the original one
    Architecture(
        "Llama (dynamic)",
        "LlamaConfig",
        _GROUPED | _rope("dynamic", factor=2.0) | {"max_position_embeddings": LIMIT},
    ),
    Architecture("Llama (yarn)", "LlamaConfig", _GROUPED | _rope("yarn", factor=_FACTOR, **_ORIGINAL)),
    Architecture(
        "Llama (longrope)", "LlamaConfig", _GROUPED | _rope("longrope", factor=_FACTOR, **_LONG, **_ORIGINAL)
    ),
    Architecture(
        "Llama (llama3)",
        "LlamaConfig",
        _GROUPED | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_ORIGINAL),
    ),
    Architecture("Mistral", "MistralConfig", _GROUPED | _rope() | _WINDOW),
    Architecture("Qwen2", "Qwen2Config", _GROUPED | _rope()),
    Architecture("Qwen2 (yarn)", "Qwen2Config", _GROUPED | _rope("yarn", factor=_FACTOR, **_ORIGINAL)),
    Architecture(
        "Qwen2 (window)",
        "Qwen2Config",
        _GROUPED | _rope() | _WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    ),
    Architecture("Qwen3", "Qwen3Config", _GROUPED | _rope() | {"head_dim": 8}),
    Architecture("Gemma", "GemmaConfig", _GROUPED | _rope() | {"tie_word_embeddings": True, "head_dim": 16}),
    Architecture("Gemma 2", "Gemma2Config", _GEMMA | _CAPS | _WINDOW | _rope()),
    Architecture(
        "Gemma 3",
        "Gemma3TextConfig",
        _GEMMA
        | _WINDOW
        | _BOTH
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
            }
        },
    ),
    Architecture("Phi", "PhiConfig", _HEADS | _rope(partial_rotary_factor=0.5)),
    Architecture("Phi-3", "Phi3Config", _GROUPED | _rope() | _WINDOW),
    Architecture(
        "Phi-3 (longrope)", "Phi3Config", _GROUPED | _rope("longrope", **_LONG, **_ORIGINAL) | _ORIGINAL
    ),
    Architecture("OLMo 2", "Olmo2Config", _GROUPED | _rope()),
    Architecture(
        "OLMo 3 (yarn)",
        "Olmo3Config",
        _GROUPED
        | _WINDOW
        | _BOTH
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": _FACTOR, **_ORIGINAL},
            }
        },
    ),
    Architecture(
        "Granite",
        "GraniteConfig",
        _GROUPED
        | _rope()
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.5}
        | {"residual_multiplier": 0.4, "logits_scaling": 2.0},
    ),
    Architecture(
        "Cohere", "CohereConfig", _GROUPED | _rope() | {"tie_word_embeddings": True, "logit_scale": 0.25}
    ),
)


def architecture(name: str) -> Architecture:
    """One of `ARCHITECTURES` by its name."""
    (found,) = (each for each in ARCHITECTURES if each.name == name)
    return found


def limits(hf_config: Any) -> dict[str, int]:
    """How many tokens a model reads before a sliding window (`window`) or a scaling of its rotary positions
    (by type) takes effect. Empty if none does within the context."""
    n_ctx, found = getattr(hf_config, "max_position_embeddings", None) or 2**62, {}
    window, layers = getattr(hf_config, "sliding_window", None), getattr(hf_config, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        window = None
    if "local" in (getattr(hf_config, "attention_layers", None) or ()):
        window = hf_config.window_size
    if window is not None and window < n_ctx:
        found["window"] = window
    for rope in rope_parameters(hf_config):
        kind = rope.get("rope_type", "default")
        if kind != "default":
            # if not given, the original context follows from the factor
            original = rope.get("original_max_position_embeddings") or getattr(
                hf_config, "original_max_position_embeddings", None
            )
            found[kind] = original or int(n_ctx / (1 if kind == "dynamic" else rope.get("factor", 1)))
    return found


def random_model(config: Any, *, seed: int = 0) -> Any:
    """A Hugging Face model with random weights in float32, in evaluation mode.

    Args:
        seed: seed of the weights; the caller's random state is left alone.
    """
    from transformers import AutoModelForCausalLM

    # Gemma's norms multiply by 1 + weight
    around_one = not config.model_type.startswith("gemma")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                wide = torch.randn_like(parameter) * 0.2
                parameter.copy_(1 + wide if parameter.ndim == 1 and around_one else wide)
    return model.float().eval()


def write_model(directory: Path, model: Any) -> None:
    """Write a model as a Hugging Face directory, without a progress bar."""
    directory.mkdir(parents=True, exist_ok=True)
    with local.quiet_transformers():
        model.save_pretrained(directory)


def write_tokenizer(directory: Path, *, bos: bool = True, bos_is_eos: bool = True) -> None:
    """Write a byte-level tokenizer with one token per character, `VOCAB - 4` in all: models pad theirs."""
    import string

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    eos = "<|end|>"
    names = {"eos_token": eos}
    if bos:
        names["bos_token"] = eos if bos_is_eos else "<s>"
    special = list(dict.fromkeys(names.values()))
    # byte-level BPE writes a space as `Ġ`
    letters = ["Ġ", *string.ascii_letters, *string.digits]
    words = (special + letters)[: VOCAB - 4]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
