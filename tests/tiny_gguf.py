"""Tiny random models as GGUF files, written with the `gguf` package as by llama.cpp's converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.tiny_models import tiny_hf_model

# Rows of complete blocks: every quantized type here has blocks of 32 numbers.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 288}
PLAIN = {"F32": np.float32, "F16": np.float16}


# Settings that a file cannot store are as in real models: Gemma's scale for heads of 256, its caps 50 and 30.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "gemma2": SHAPE
    | {"head_dim": 256, "query_pre_attn_scalar": 256}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}


def write_gguf(
    path: Path, kind: str = "F32", *, family: str = "llama", tokenizer: bool = True, **changes: Any
) -> Any:
    """Write a tiny model; returns the original Hugging Face model.

    Args:
        kind: GGML's type of the matrices; vectors are float32, as in real files.
        family: one of `FAMILIES`.
        changes: settings of the file, by key; None omits one.
    """
    model = tiny_hf_model(family, **FAMILIES[family])
    config = model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": 500.0,
        "llama.rope.dimension_count": d_head,
        "llama.vocab_size": config.vocab_size,
    }
    settings = {key.replace("llama", family): value for key, value in settings.items()}
    if family == "gemma2":
        settings |= {
            "gemma2.attention.key_length": d_head,
            "gemma2.attention.value_length": d_head,
            "gemma2.attention.sliding_window": config.sliding_window,
            "gemma2.attn_logit_softcapping": config.attn_logit_softcapping,
            "gemma2.final_logit_softcapping": config.final_logit_softcapping,
        }
    architecture = changes.pop("architecture", family)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (settings | changes).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    if tokenizer:
        _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if family != "llama":
        heads = {}
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        stem, _, suffix = name.rpartition(".")
        values = weight.numpy()
        n_heads = heads.get(stem.rpartition(".")[2])
        if n_heads:
            # llama.cpp rotates adjacent dimensions, Hugging Face the two halves
            halves = values.reshape(n_heads, 2, -1, values.shape[-1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if family == "gemma2" and stem.endswith("norm"):
            # llama.cpp multiplies by the weight, Hugging Face by 1 + weight
            values = 1 + values
        own = f"{names.get_name(stem)}.{suffix}"
        if values.ndim == 1 or kind in PLAIN:
            writer.add_tensor(
                own, values.astype(PLAIN.get(kind, np.float32) if values.ndim > 1 else np.float32)
            )
        else:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(own, gguf.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, n_tokens: int) -> None:
    """Bytes, two special tokens, two words, and vocabulary padding."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<s>", "</s>", *bytes_to_unicode().values(), "th", "the"]
    unused = [f"<unused{number}>" for number in range(n_tokens - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + unused)
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def largest_loss(kind: str, weight: torch.Tensor) -> torch.Tensor:
    """The largest quantization error of each number, by the format's definition."""
    if kind == "F32":
        return torch.zeros_like(weight)
    if kind == "F16":
        return weight.abs() * 2**-11 + 2**-24
    blocks = weight.reshape(-1, 32)
    high, low = blocks.max(1, keepdim=True).values, blocks.min(1, keepdim=True).values
    most = blocks.abs().max(1, keepdim=True).values
    step = {"Q8_0": most / 127, "Q4_0": most / 8, "Q4_1": (high - low) / 15}[kind]
    # rounded to the nearest; Q4_0 has one step fewer on the side opposite to its largest number
    off = step if kind == "Q4_0" else step / 2
    # steps and Q4_1's lowest number are stored in float16
    return (off + most * 2**-9).expand_as(blocks).reshape(weight.shape)
