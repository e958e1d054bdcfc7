"""The engines' rotations and attention scales compared with formulas and Hugging Face's tables."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import CohereConfig, Ernie4_5Config, GlmConfig, GPTJConfig, LlamaConfig

from mechlens.models.load.engines import choose_backends
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import engine_of
from mechlens.models.weights.rotary import attention_scale, is_rotary, rotation, unrotated
from tests.tiny_models import write_model_of

COMMON = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
SIZES = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def adjacent(distance, rotary_dim, theta=10000.0):
    """Rotates a query (a row) to match a key `distance` earlier; 2i and 2i + 1 rotate together."""
    R = torch.eye(8).double()
    for i in range(rotary_dim // 2):
        angle = distance * theta ** (-2 * i / rotary_dim)
        x, y = 2 * i, 2 * i + 1
        R[x, x] = R[y, y] = math.cos(angle)
        R[x, y], R[y, x] = math.sin(angle), -math.sin(angle)
    return R


def close(R, expected):
    # float32 sines of angles up to the distance
    return torch.allclose(R.double(), expected, atol=2e-6)


def test_adjacent_dimensions_of_a_part(tmp_path):
    write_model_of(
        tmp_path / "gptj", GPTJConfig(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4)
    )
    model = load_model(tmp_path / "gptj")
    assert is_rotary(model)
    if engine_of(model) == "TransformerBridge":
        # it delegates attention to the wrapped model, and exposes no tables
        with pytest.raises(ValueError, match=r"cannot determine how this model rotates .*hook_cos"):
            rotation(model, 1, 3)
        return
    for distance in (0, 1, 5, 31):
        assert close(rotation(model, 1, distance), adjacent(distance, 4))
    assert unrotated(model, 0) == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("config", "rotary_dim"),
    [
        # tables that have each frequency twice in a row
        (CohereConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}), 8),
        # tables in two halves, for adjacent dimensions
        (
            GlmConfig(
                **SIZES,
                head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            ),
            4,
        ),
    ],
    ids=["cohere", "glm"],
)
def test_the_pairing_is_inferred_from_the_models_own_attention(tmp_path, config, rotary_dim):
    if choose_backends("auto")[0] == "hooked":
        pytest.skip("HookedTransformer has no such model")
    write_model_of(tmp_path / "model", config)
    model = load_model(tmp_path / "model", processing=False)
    for distance in (0, 1, 5):
        assert close(rotation(model, 1, distance), adjacent(distance, rotary_dim, 500.0))


WIDE = SIZES | {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**WIDE),
        GlmConfig(**WIDE, head_dim=128),
        Ernie4_5Config(**WIDE, head_dim=128),
        LlamaConfig(**WIDE),
        # rotates by at most a sixteenth of a radian per position
        CohereConfig(**WIDE, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 16.0}),
        LlamaConfig(**WIDE, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 16.0}),
    ],
    ids=["cohere", "glm", "ernie", "llama", "slow cohere", "slow llama"],
)
def test_the_pairing_is_found_in_bfloat16(tmp_path, config, dtype):
    if choose_backends("auto")[0] == "hooked":
        pytest.skip("HookedTransformer has no such models, or its own rotation")
    write_model_of(tmp_path / "model", config)
    wide = load_model(tmp_path / "model", processing=False)
    model = load_model(tmp_path / "model", processing=False, dtype=dtype)
    for distance in (0, 1, 5, 40):
        found, expected = rotation(model, 1, distance), rotation(wide, 1, distance)
        # sines and cosines rounded to 8 bits, twice if both rotate
        assert torch.allclose(found, expected, atol=0.01)
        assert distance == 0 or not torch.allclose(expected, torch.eye(128), atol=0.01)


def test_a_rotation_that_no_pairing_gives_is_refused(tmp_path):
    """It rotates the other way in the short test runs, but not in the run for the tables."""
    if choose_backends("auto")[0] == "hooked":
        pytest.skip("HookedTransformer has its own rotation")
    write_model_of(tmp_path / "model", LlamaConfig(**WIDE))
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(tmp_path / "model", processing=False, dtype=dtype)
        # not by a hook, because user hooks are removed
        point = model.hook_dict["blocks.1.attn.hook_sin"]
        point.forward = lambda sin: -sin if sin.shape[1] < 10 else sin
        with pytest.raises(ValueError, match="no rotation of pairs of dimensions gives its scores"):
            rotation(model, 1, 9)
        del point.forward
        assert len(rotation(model, 1, 9)) == 128


def test_a_scaled_rotation(tmp_path):
    """Llama 3 slows only some frequencies, as in Hugging Face's own tables."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    hf_model = write_model_of(tmp_path / "llama3", LlamaConfig(**SIZES, rope_parameters=rope))
    cos, sin = hf_model.model.rotary_emb(torch.zeros(1), torch.arange(32)[None])
    model = load_model(tmp_path / "llama3")
    for distance in (1, 9):
        R = torch.zeros(8, 8).double()
        for i in range(4):
            R[i, i] = R[i + 4, i + 4] = cos[0, distance, i]
            R[i, i + 4], R[i + 4, i] = sin[0, distance, i], -sin[0, distance, i]
        assert close(rotation(model, 0, distance), R)
    assert unrotated(model, 0) == ()
    # otherwise the test would have no scaling
    assert abs(math.cos(9 * 500.0 ** (-6 / 8)) - cos[0, 9, 3]) > 1e-3


def test_rotations_add_up(tiny_directories):
    for kind in ("gpt_neox", "llama", "gemma2"):
        model = load_model(tiny_directories / kind)
        R = [rotation(model, 1, distance) for distance in range(4)]
        # float32
        assert torch.allclose(R[1] @ R[2], R[3], atol=1e-6)
        assert torch.allclose(R[3] @ R[3].T, torch.eye(len(R[3])), atol=1e-6)
        assert torch.allclose(R[0], torch.eye(len(R[0])), atol=1e-6)


@pytest.mark.parametrize("distance", [-1, 32])
def test_distances_beyond_the_context_are_refused(tiny_directories, distance):
    model = load_model(tiny_directories / "llama")
    with pytest.raises(ValueError, match=f"between 0 and 31, .* got {distance}"):
        rotation(model, 0, distance)


def test_attention_scales(tiny_directories):
    for kind, scale in (("gpt2", 8**-0.5), ("gpt_neo", 1.0)):
        model = load_model(tiny_directories / kind)
        assert not is_rotary(model)
        # a difference between float32 logarithms
        assert attention_scale(model, 1) == pytest.approx(scale, abs=2e-6)
    with pytest.raises(ValueError, match="attention in layer 1 depends on more than queries and keys"):
        attention_scale(load_model(tiny_directories / "llama"), 1)
