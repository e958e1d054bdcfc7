"""Tiny random Hugging Face models with tokenizers, written to a directory on the spot.

Random weights are drawn wide enough that every part of the model moves the output: with the
libraries' own narrow initialisation a wrong rotation or a lost bias would hide in the rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 64
N_CTX = 32


def write_tokenizer(directory: Path, *, bos: bool = True, bos_is_eos: bool = True) -> None:
    """A byte-level tokenizer of `VOCAB - 4` tokens, one per character: models pad their vocabularies."""
    import string

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    eos = "<|end|>"
    names = {"eos_token": eos}
    if bos:
        names["bos_token"] = eos if bos_is_eos else "<s>"
    special = list(dict.fromkeys(names.values()))
    # The byte-level alphabet writes a space as `Ġ` (a letter of its own).
    letters = ["Ġ", *string.ascii_letters, *string.digits]
    words = (special + letters)[: VOCAB - 4]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)


def _config(kind: str, **changes: Any) -> Any:
    import transformers as hf

    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    shared = common | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": N_CTX,
    }
    grouped = shared | {"num_key_value_heads": 2, "tie_word_embeddings": False}
    if kind == "gpt2":
        settings = common | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": N_CTX}
        return hf.GPT2Config(**(settings | changes))
    if kind == "gpt_neo":
        # The window is shorter than the test's sequences, so that local attention shows.
        settings = common | {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        }
        return hf.GPTNeoConfig(**(settings | changes))
    if kind == "gpt_neox":
        # Two frequencies, since the base does not show in one alone; a base that is nobody's default.
        rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
        return hf.GPTNeoXConfig(**(shared | {"rope_parameters": rope} | changes))
    if kind == "llama":
        rope = {"rope_type": "default", "rope_theta": 500.0}
        return hf.LlamaConfig(**(grouped | {"rope_parameters": rope} | changes))
    if kind == "qwen2":
        rope = {"rope_type": "default", "rope_theta": 500.0}
        return hf.Qwen2Config(**(grouped | {"rope_parameters": rope} | changes))
    if kind == "gemma2":
        # Caps low enough to bend the random logits, a scale that is not sqrt(head_dim).
        settings = grouped | {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        }
        return hf.Gemma2Config(**(settings | changes))
    raise ValueError(f"no tiny {kind}")


KINDS = ("gpt2", "gpt_neo", "gpt_neox", "llama", "qwen2", "gemma2")


def tiny_hf_model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of one architecture in float32, in evaluation mode.

    Args:
        kind: one of `KINDS`.
        seed: of the weights; the caller's random state is left alone.
        changes: to the model's Hugging Face configuration.
    """
    from transformers import AutoModelForCausalLM

    config = _config(kind, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                wide = torch.randn_like(parameter) * 0.2
                parameter.copy_(1 + wide if parameter.ndim == 1 and kind != "gemma2" else wide)
    return model.float().eval()


def write_tiny_model(
    directory: Path, kind: str, *, seed: int = 0, tokenizer: bool = True, **changes: Any
) -> Any:
    """Write a tiny model as a Hugging Face directory; returns the model."""
    model = tiny_hf_model(kind, seed=seed, **changes)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    if tokenizer:
        # Qwen2 and Llama as they come: one without BOS, one whose BOS is not its EOS.
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
