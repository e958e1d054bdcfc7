"""Read GGUF files: llama.cpp's format for (mostly quantized) weights and their tokenizer.

The file's header is checked first. Then transformers reads the file with the `gguf` package, and the model is
stored in the user's cache as a directory in Hugging Face's format.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mechlens.errors import ModelLoadError
from mechlens.models.load import local
from mechlens.models.load.gguf_header import Header, read_header

_NOTE = "mechlens.json"
_FORMAT = 1
"""Version of the cache entries; a new number invalidates all of them."""


def find(path: Path) -> Path | None:
    """The GGUF file at a path: the path itself, or the only one in a directory without a `config.json`.

    Raises:
        ModelLoadError: the directory has several GGUF files, or the file cannot be opened.
    """
    if path.is_file():
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from None
        return path if path.suffix.lower() == ".gguf" or magic == b"GGUF" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(each.name for each in files)
        raise ModelLoadError(f"{path} has {len(files)} GGUF files: give the path of one ({names})")
    return files[0] if files else None


_SAME_AS = {
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
"""Settings that transformers' reader may ignore, each with the configuration setting that it must equal."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "logit_scale": (1.0,),
}
"""Values of further settings that have no effect."""
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Number of blocks in the one size of Gemma whose attention scale is not 1 / sqrt(head_dim)."""
_IGNORED = ("tensor_data_layout", "rope.scaling.original_context_length")


def check_understood(header: Header, config: Any, path: Path) -> None:
    """Check that transformers' reader does not ignore a setting that changes the model.

    Raises:
        ModelLoadError: it does.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    prefix = f"{header.architecture}."
    read = GGUF_CONFIG_MAPPING.get(config.model_type) or GGUF_CONFIG_MAPPING.get(header.architecture) or {}
    lost = [name for name in header.tensors if name.startswith("rope_f")]
    for key, value in header.settings.items():
        name = key.removeprefix(prefix)
        if name == key or read.get(name) or name in _IGNORED or value in _NEUTRAL.get(name, ()):
            continue
        own = _own_value(config, _SAME_AS[name]) if name in _SAME_AS else None
        if own is None or isinstance(value, str) or not math.isclose(own, value, rel_tol=1e-6):
            lost.append(f"{key} = {value}")
    if header.architecture in _LARGEST_GEMMA:
        # not stored in the file: llama.cpp infers it from the model's size, transformers always takes 256
        largest = config.num_hidden_layers == _LARGEST_GEMMA[header.architecture]
        width = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != width:
            lost.append(f"an attention scale of 1 / sqrt({width})")
    if lost:
        raise ModelLoadError(
            f"{path} has settings that transformers' GGUF reader ignores ({', '.join(lost)}), so the model's "
            "predictions would be wrong: load the model in Hugging Face's format instead"
        )


def _own_value(config: Any, name: str) -> float | None:
    value = getattr(config, name, (getattr(config, "rope_parameters", None) or {}).get(name))
    if value is None and name == "head_dim":
        value = config.hidden_size // config.num_attention_heads
    return value


def convert(path: Path, into: Path) -> None:
    """Write a GGUF file's model as a directory in Hugging Face's format, with weights in float32.

    Raises:
        ModelLoadError: transformers cannot read the file, or ignores a setting that changes the model.
    """
    header = read_header(path)
    if not header.settings.get("tokenizer.ggml.tokens"):
        raise ModelLoadError(
            f"{path} has no tokenizer: use a GGUF file with one, as llama.cpp's converter writes it"
        )
    # transformers' reader has a progress bar of its own
    with local.quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), cached_gguf_lookups():
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        given = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
        read = GGUF_SUPPORTED_ARCHITECTURES
        known = f": it reads {', '.join(sorted(read))}" if header.architecture not in read else ""
        with local.load_errors(f"transformers cannot read {path} ({header.architecture})", known):
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, **given
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
        local.check_complete(report["missing_keys"], f"the weights in {path}", type(model).__name__)
        check_understood(header, model.config, path)
        # a tied unembedding is in the state dict, but is not a separate parameter
        own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        state = {name: each for name, each in model.state_dict().items() if name in own}
        save_file(state, into / "model.safetensors", metadata={"format": "pt"})
        # transformers refuses to save a model that it calls quantized
        del model.config.quantization_config
        model.config.save_pretrained(into)
        tokenizer.save_pretrained(into)
    note = {"quantization": header.quantization, "file": path.name}
    (into / _NOTE).write_text(json.dumps(note), encoding="utf-8")


@contextlib.contextmanager
def cached_gguf_lookups() -> Iterator[None]:
    """Cache the `gguf` package's lookups until the block ends. Otherwise half of the loading time goes into
    reading the header three times and building the table of tensor names for every module."""
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, each in own.items():
        setattr(gguf, name, functools.cache(each))
    try:
        yield
    finally:
        for name, each in own.items():
            setattr(gguf, name, each)


def quantization_of(directory: Path) -> str | None:
    """How a directory's weights were quantized; None if they do not come from a GGUF file."""
    note = directory / _NOTE
    return json.loads(note.read_text(encoding="utf-8"))["quantization"] if note.is_file() else None


def cache_folder() -> Path:
    """Where converted weights are: `$MECHLENS_CACHE`, or `mechlens` in the user's cache folder."""
    own = os.environ.get("MECHLENS_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(caches) / "mechlens").expanduser() / "gguf"


def cached_size() -> int:
    """Size of the cache, in bytes."""
    return sum(each.stat().st_size for each in cache_folder().rglob("*") if each.is_file())


def clear_cache() -> None:
    """Delete all converted weights."""
    if cache_folder().is_dir():
        shutil.rmtree(cache_folder())


@contextlib.contextmanager
def converted(path: Path, *, cache: bool) -> Iterator[Path]:
    """A directory in Hugging Face's format with a GGUF file's model.

    Args:
        cache: store the directory in the user's cache; otherwise delete it when the `with` block ends.

    Raises:
        ModelLoadError: the file cannot be read.

    Cost: reads the file. A conversion needs twice the memory of the float32 weights, and their size on disk.
    """
    if not cache:
        with tempfile.TemporaryDirectory(prefix="mechlens-gguf-") as made:
            convert(path, Path(made))
            yield Path(made)
        return
    kept = cache_folder() / _cache_key(path)
    if not kept.is_dir():
        _fill_cache(path, kept)
    yield kept


def _cache_key(path: Path) -> str:
    """A hash of the file's content and of the versions that read it."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    readers = [version("transformers"), version("gguf"), str(_FORMAT)]
    digest.update(" ".join(readers).encode())
    return digest.hexdigest()


def _fill_cache(path: Path, kept: Path) -> None:
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if kept.is_dir():
                return  # another process was faster
            making = kept.with_suffix(".part")
            # left by a process that was killed
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            try:
                convert(path, making)
                making.rename(kept)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(
            f"the weights of {path.name} cannot be saved in {kept.parent} ({error}): free some space there, "
            "set MECHLENS_CACHE to another folder, or use cache=False (--no-cache)"
        ) from error
