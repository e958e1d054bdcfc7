"""Tiny random Hugging Face models with tokenizers, written to a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mechlens.models.load.tiny_architectures import (
    VOCAB,
    architecture,
    random_model,
    write_model,
    write_tokenizer,
)

N_CTX = 32
# The windows are shorter than the tests' sequences.
_TINIES = {
    "gpt2": ("GPT-2", {"n_positions": N_CTX}),
    "gpt_neo": ("GPT-Neo", {"max_position_embeddings": N_CTX, "window_size": 8}),
    "gpt_neox": ("GPT-NeoX", {"max_position_embeddings": N_CTX}),
    "llama": ("Llama", {"max_position_embeddings": N_CTX}),
    "qwen2": ("Qwen2", {"max_position_embeddings": N_CTX}),
    "gemma2": ("Gemma 2", {"max_position_embeddings": N_CTX, "sliding_window": 8}),
}
KINDS = tuple(_TINIES)


def tiny_hf_model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of one architecture in float32, in evaluation mode.

    Args:
        kind: one of `KINDS`.
        seed: of the weights; the caller's random state is unchanged.
        changes: to the model's Hugging Face configuration.
    """
    name, shorter = _TINIES[kind]
    return random_model(architecture(name).config(**(shorter | changes)), seed=seed)


def write_tiny_model(
    directory: Path, kind: str, *, seed: int = 0, tokenizer: bool = True, **changes: Any
) -> Any:
    """Write a tiny model as a Hugging Face directory; returns the model."""
    model = tiny_hf_model(kind, seed=seed, **changes)
    write_model(directory, model)
    if tokenizer:
        # Qwen2 and Llama by default: one without BOS, one whose BOS is not its EOS.
        write_tokenizer(directory, bos=kind != "qwen2", bos_is_eos=kind != "llama")
    return model


def write_model_of(directory: Path, config: Any) -> Any:
    """Write a random model of any Hugging Face configuration, with the tests' tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


TOY_CONFIG = {
    "n_layers": 2,
    "d_model": 32,
    "n_ctx": N_CTX,
    "d_head": 8,
    "n_heads": 4,
    "d_vocab": VOCAB,
    "attn_only": True,
    "act_fn": None,
    "normalization_type": "LN",
    "seed": 5,
}


def write_toy(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a model in TransformerLens's own format, attention-only by default; returns its weights."""
    from safetensors.torch import save_file

    config = TOY_CONFIG | changes
    draw = torch.Generator().manual_seed(0)

    def wide(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    d_model, d_head, n_heads = config["d_model"], config["d_head"], config["n_heads"]
    weights = {
        "embed.W_E": wide(config["d_vocab"], d_model),
        "pos_embed.W_pos": wide(config["n_ctx"], d_model),
        "unembed.W_U": wide(d_model, config["d_vocab"]),
        "unembed.b_U": wide(config["d_vocab"]),
    }
    norms = {f"blocks.{layer}.ln1": d_model for layer in range(config["n_layers"])} | {"ln_final": d_model}
    for layer in range(config["n_layers"]):
        attention = f"blocks.{layer}.attn."
        for name in "QKV":
            weights[f"{attention}W_{name}"] = wide(n_heads, d_model, d_head)
            weights[f"{attention}b_{name}"] = wide(n_heads, d_head)
        weights[f"{attention}W_O"] = wide(n_heads, d_head, d_model)
        weights[f"{attention}b_O"] = wide(d_model)
        if not config["attn_only"]:
            mlp, d_mlp = f"blocks.{layer}.mlp.", config["d_mlp"]
            weights |= {f"{mlp}W_in": wide(d_model, d_mlp), f"{mlp}b_in": wide(d_mlp)}
            weights |= {f"{mlp}W_out": wide(d_mlp, d_model), f"{mlp}b_out": wide(d_model)}
            norms[f"blocks.{layer}.ln2"] = d_model
            if config.get("gated_mlp"):
                weights[f"{mlp}W_gate"] = wide(d_model, d_mlp)
            if config["act_fn"].endswith("_ln"):
                norms[f"{mlp}ln"] = d_mlp
    if config["normalization_type"] == "LN":
        weights |= {f"{norm}.w": 1 + wide(size) for norm, size in norms.items()}
        weights |= {f"{norm}.b": wide(size) for norm, size in norms.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors")
    return weights
