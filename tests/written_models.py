"""Models written by hand that do one task, "ac" to a and "bc" to b, by a circuit that is known."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from mechlens.models.load.loading import load_model
from mechlens.models.load.tiny_architectures import VOCAB, write_tokenizer

IS_A, IS_B, MOVED_A, MOVED_B, OUT_A, OUT_B, ONE, AT_0, NOISE = 0, 1, 2, 3, 4, 5, 6, 8, 12
"""Dimensions of the stream: token, its copy at the last position, answer, constant, position, unread ones."""
D, HEAD, N_HEADS, N_LAYERS, D_MLP, N_CTX = 16, 4, 2, 2, 8, 4
ROWS = [
    {"clean": "ac", "corrupted": "bc", "answer": "a", "wrong": "b"},
    {"clean": "ad", "corrupted": "bd", "answer": "a", "wrong": "b"},
]


def load_written(directory, kind, **options):
    """A model of one kind.

    `mlp`: L0H0 moves the token and L0.mlp turns it into the answer. `negative`: L0H0 writes the answer twice
    and L0H1 takes half of it back. `backup`: L0H0 writes the answer, and L1H0 does if L0H0 did not.
    """
    draw = torch.Generator().manual_seed(0)
    write_tokenizer(directory, bos=False)
    ids = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    weights = {
        "embed.W_E": torch.zeros(VOCAB, D),
        "pos_embed.W_pos": torch.zeros(N_CTX, D),
        "unembed.W_U": torch.zeros(D, VOCAB),
        "unembed.b_U": torch.zeros(VOCAB),
    }
    weights["embed.W_E"][ids["a"], IS_A] = weights["embed.W_E"][ids["b"], IS_B] = 1
    weights["pos_embed.W_pos"][:, AT_0 : AT_0 + N_CTX] = torch.eye(N_CTX)
    weights["pos_embed.W_pos"][:, ONE] = 1
    weights["unembed.W_U"][OUT_A, ids["a"]] = weights["unembed.W_U"][OUT_B, ids["b"]] = 1
    for layer in range(N_LAYERS):
        attn, mlp = f"blocks.{layer}.attn.", f"blocks.{layer}.mlp."
        for read in "QKV":
            weights[f"{attn}W_{read}"] = torch.zeros(N_HEADS, D, HEAD)
            weights[f"{attn}b_{read}"] = torch.zeros(N_HEADS, HEAD)
        weights |= {f"{attn}W_O": torch.zeros(N_HEADS, HEAD, D), f"{attn}b_O": torch.zeros(D)}
        weights |= {f"{mlp}W_in": torch.zeros(D, D_MLP), f"{mlp}b_in": torch.zeros(D_MLP)}
        weights |= {f"{mlp}W_out": torch.zeros(D_MLP, D), f"{mlp}b_out": torch.zeros(D)}
        # whatever they read, heads and MLPs write to where nothing reads
        weights[f"{attn}W_V"][:, :, 2:] = torch.randn(N_HEADS, D, 2, generator=draw)
        weights[f"{attn}W_O"][:, 2:, NOISE:] = torch.randn(N_HEADS, 2, D - NOISE, generator=draw)
        weights[f"{mlp}W_in"][:, 2:] = torch.randn(D, D_MLP - 2, generator=draw)
        weights[f"{mlp}W_out"][2:, NOISE:] = torch.randn(D_MLP - 2, D - NOISE, generator=draw)

    def head(layer, index, to, gain):
        """Attends to position 0 and copies which token is there."""
        attn = f"blocks.{layer}.attn."
        weights[f"{attn}W_Q"][index, ONE, 0] = weights[f"{attn}W_K"][index, AT_0, 0] = 10
        for at, (source, target) in enumerate(zip((IS_A, IS_B), to, strict=True)):
            weights[f"{attn}W_V"][index, source, at] = 1
            weights[f"{attn}W_O"][index, at, target] = gain

    if kind == "mlp":
        head(0, 0, (MOVED_A, MOVED_B), 1.0)
        mlp = "blocks.0.mlp."
        for at, (source, target) in enumerate([(MOVED_A, OUT_A), (MOVED_B, OUT_B)]):
            weights[f"{mlp}W_in"][source, at] = weights[f"{mlp}W_out"][at, target] = 2
            weights[f"{mlp}b_in"][at] = -0.5
    else:
        head(0, 0, (OUT_A, OUT_B), 1.0)
        if kind == "negative":
            head(0, 1, (OUT_A, OUT_B), -0.5)
        else:
            head(1, 0, (OUT_A, OUT_B), 1.0)
            weights["blocks.1.attn.W_Q"][0, [OUT_A, OUT_B], 0] = -20
    config = {
        "n_layers": N_LAYERS,
        "d_model": D,
        "n_ctx": N_CTX,
        "d_head": HEAD,
        "n_heads": N_HEADS,
        "d_mlp": D_MLP,
        "d_vocab": VOCAB,
        "act_fn": "relu",
        "normalization_type": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors")
    return load_model(directory, **options)
