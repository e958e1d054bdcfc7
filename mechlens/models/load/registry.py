"""List the known models, and describe one from its files without loading it."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from mechlens.models.load import gguf, hub, local, transformer_lens_format
from mechlens.models.load.hub import BUNDLED
from mechlens.models.load.loading import ModelFiles, converted, locate


@dataclasses.dataclass(frozen=True)
class KnownModel:
    """A model that `load_model` accepts by name."""

    name: str
    source: str
    """`bundled`, `package` (a Python package), `cache` (on this machine) or `hub`."""
    aliases: tuple[str, ...]
    """Other names."""
    about: str = ""
    """For a package: size, license, and how to install it if it is missing."""


@dataclasses.dataclass(frozen=True)
class ModelSummary:
    """A model's architecture and sizes, in TransformerLens's terms; None where it has no such thing."""

    name: str
    architecture: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    n_ctx: int
    n_params: int
    """Number of parameters; tied embeddings count once."""
    dtype: str
    """Dtype of the weights on disk, such as `float16`."""
    positions: str
    """`standard` (learned, added to the embedding), `rotary`, `alibi`, `shortformer` or `none`."""
    rotary_dim: int | None
    """Number of dimensions of each head that are rotated."""
    tied: bool
    """Whether the unprocessed unembedding equals the embedding."""
    quantization: str | None = None
    """GGML types of a GGUF file, such as `Q4_1 (210 tensors), F32 (61)`."""


def known_models() -> list[KnownModel]:
    """Models that load by name: bundled, in packages, in the local Hugging Face cache, and those that
    TransformerLens lists."""
    known = hub.known_hub_names()
    cached = hub.cached_names()
    return [
        KnownModel(BUNDLED, "bundled", ()),
        *(KnownModel(name, "package", (), each.about) for name, each in hub.PACKAGED.items()),
        *(KnownModel(name, "cache", known.get(name, ())) for name in cached),
        *(KnownModel(name, "hub", known[name]) for name in known if name not in cached),
    ]


def model_summary(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> ModelSummary:
    """Describe a model from its files. A model that is only on the hub is downloaded, and a GGUF file is
    converted into `load_model`'s cache.

    Raises:
        ModelLoadError: there is no such model, or its files are damaged.
    """
    with converted(locate(name_or_path, revision=revision)) as files:
        return _summary(files)


def _summary(files: ModelFiles) -> ModelSummary:
    config = local.read_config(files.directory)
    if transformer_lens_format.is_own(config):
        return _transformer_lens_summary(files.name, files.directory, config)
    architecture = local.architecture_of(config, files.directory)
    hf_config = local.hf_config(files.directory, architecture)
    shapes = _tensors(files.directory)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    d_head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    rotary = "rope_theta" in rope or getattr(hf_config, "rotary_dim", None) is not None
    positions = "rotary" if rotary else "none"
    if any(name.rsplit(".", 2)[-2] in ("wpe", "embed_positions") for name in shapes if "." in name):
        positions = "standard"
    elif architecture == "BloomForCausalLM" or getattr(hf_config, "alibi", False):
        positions = "alibi"
    rotary_dim = None
    if positions == "rotary":
        part = round(rope.get("partial_rotary_factor", 1.0) * d_head)
        rotary_dim = getattr(hf_config, "rotary_dim", None) or part
    embed, unembed = _first(shapes, _EMBED), _first(shapes, _UNEMBED)
    tied = bool(hf_config.tie_word_embeddings) if unembed is None else _same(shapes, embed, unembed)
    counted = [name for name in shapes if not (tied and name == unembed) and not _is_buffer(name)]
    return ModelSummary(
        name=files.name,
        architecture=architecture,
        n_layers=hf_config.num_hidden_layers,
        n_heads=hf_config.num_attention_heads,
        n_key_value_heads=getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads,
        d_model=hf_config.hidden_size,
        d_head=d_head,
        d_mlp=_d_mlp(hf_config),
        d_vocab=hf_config.vocab_size,
        n_ctx=hf_config.max_position_embeddings,
        n_params=sum(shapes[name].size for name in counted),
        dtype=shapes[embed].dtype if embed else "unknown",
        positions=positions,
        rotary_dim=rotary_dim,
        tied=tied,
        quantization=gguf.quantization_of(files.directory),
    )


_EMBED = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "word_embeddings.weight")
_UNEMBED = ("lm_head.weight", "embed_out.weight")


def _first(names: Any, endings: tuple[str, ...]) -> str | None:
    return next((name for name in names if name.endswith(endings)), None)


def _is_buffer(name: str) -> bool:
    """Whether a tensor is a causal mask or rotation table, which older files contain beside the weights."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"))


def _d_mlp(hf_config: Any) -> int:
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if getattr(hf_config, name, None):
            return int(getattr(hf_config, name))
    return int(4 * hf_config.hidden_size)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    file: Path
    size: int
    dtype: str


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _tensors(directory: Path) -> dict[str, _Tensor]:
    """All tensors in a directory's weight files; safetensors files are read only up to their header."""
    from safetensors import safe_open

    found = {}
    for file in local.weight_files(directory):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    part = opened.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
                    found[name] = _Tensor(file, math.prod(part.get_shape()), dtype)
        else:
            for name, value in local.read_pickle(file).items():
                found[name] = _Tensor(file, value.numel(), str(value.dtype).removeprefix("torch."))
    return found


def _same(tensors: dict[str, _Tensor], one: str | None, other: str | None) -> bool:
    import torch
    from safetensors import safe_open

    if one is None or other is None or tensors[one].size != tensors[other].size:
        return False
    values = []
    for name in (one, other):
        file = tensors[name].file
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                values.append(opened.get_tensor(name))
        else:
            values.append(local.read_pickle(file)[name])
    return torch.equal(*values)


def _transformer_lens_summary(name: str, directory: Path, config: dict[str, Any]) -> ModelSummary:
    import torch

    weights = transformer_lens_format.read_weights(directory, config)
    settings = transformer_lens_format.settings_of(config, name, torch.float32)
    W_E, W_U = weights["embed.W_E"], weights["unembed.W_U"]
    positions = settings.get("positional_embedding_type", "standard")
    d_head = settings["d_head"]
    n_heads = settings.get("n_heads") or settings["d_model"] // d_head
    only_attention = bool(settings.get("attn_only"))
    return ModelSummary(
        name=name,
        architecture="attention-only" if only_attention else "TransformerLens",
        n_layers=settings["n_layers"],
        n_heads=n_heads,
        n_key_value_heads=settings.get("n_key_value_heads") or n_heads,
        d_model=settings["d_model"],
        d_head=d_head,
        d_mlp=None if only_attention else settings.get("d_mlp") or 4 * settings["d_model"],
        d_vocab=W_E.shape[0],
        n_ctx=settings["n_ctx"],
        n_params=sum(
            value.numel()
            for key, value in weights.items()
            if key.rsplit(".", 1)[-1] not in transformer_lens_format.BUFFERS
        ),
        dtype=str(W_E.dtype).removeprefix("torch."),
        positions=positions,
        rotary_dim=(settings.get("rotary_dim") or d_head) if positions == "rotary" else None,
        tied=torch.equal(W_E, W_U.T),
    )
