"""Models shared by several test files, each created once."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from tests.shared import STORIES
from tests.tiny_models import KINDS, write_tiny_model


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory):
    """A directory with a tiny random model of each architecture."""
    root = tmp_path_factory.mktemp("tiny")
    for kind in KINDS:
        write_tiny_model(root / kind, kind)
    return root


@pytest.fixture(scope="session")
def load_once():
    """`load_model` with a cache, for tests that do not change models.

    Parametrized fixtures should have function scope and use this cache. With session scope, pytest would
    group tests by parameter and repeatedly recreate module-scoped fixtures.
    """
    from mechlens.models.load.loading import load_model

    return functools.cache(load_model)


@pytest.fixture(params=["gpt2", "gpt_neox", "llama", "gemma2"])
def tiny_model(request, load_once, tiny_directories):
    """Learned positions; rotary, parallel blocks; grouped queries; soft-cap and unfolded norms."""
    return load_once(tiny_directories / request.param)


@pytest.fixture(scope="session")
def tiny_bos_model(load_once, tiny_directories):
    return load_once(tiny_directories / "gpt2")


@pytest.fixture(scope="session")
def directories_with_room(tmp_path_factory):
    """Tiny models with room for 4 x 25 tokens."""
    root = tmp_path_factory.mktemp("room")
    for kind, room in (("gpt2", "n_positions"), ("llama", "max_position_embeddings")):
        write_tiny_model(root / kind, kind, **{room: 128})
    return root


@pytest.fixture(params=["gpt2", "llama"])
def tiny_directory_with_room(request, directories_with_room):
    return directories_with_room / request.param


@pytest.fixture
def tiny_model_with_room(load_once, tiny_directory_with_room):
    return load_once(tiny_directory_with_room)


@pytest.fixture(scope="session")
def fixed_distance_model(tmp_path_factory):
    """A handwritten attention-only model whose head always attends S - 1 = 5 tokens back."""
    from safetensors.torch import save_file

    from mechlens.models.load.loading import load_model

    directory = tmp_path_factory.mktemp("fixed")
    n, seq_len, d_vocab = 16, 6, 64
    config = {
        "n_layers": 1,
        "d_model": n,
        "n_ctx": n,
        "d_head": n,
        "n_heads": 1,
        "d_vocab": d_vocab,
        "attn_only": True,
        "act_fn": None,
        "normalization_type": None,
    }
    back = torch.zeros(n, n)
    for dest in range(seq_len - 1, n):
        back[dest, dest - (seq_len - 1)] = 100.0 * n**0.5  # 100 after the division by sqrt(d_head)
    weights = {
        "embed.W_E": torch.zeros(d_vocab, n),
        "pos_embed.W_pos": torch.eye(n),
        "unembed.W_U": torch.zeros(n, d_vocab),
        "unembed.b_U": torch.zeros(d_vocab),
        "blocks.0.attn.W_Q": back[None],
        "blocks.0.attn.W_K": torch.eye(n)[None].clone(),
        "blocks.0.attn.W_V": torch.zeros(1, n, n),
        "blocks.0.attn.W_O": torch.zeros(1, n, n),
        "blocks.0.attn.b_O": torch.zeros(n),
        **{f"blocks.0.attn.b_{name}": torch.zeros(1, n) for name in "QKV"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors")
    return load_model(directory), seq_len


@pytest.fixture(scope="session")
def bundled(load_once):
    return load_once()


@pytest.fixture(scope="session")
def stories260k(load_once):
    return load_once(STORIES)
