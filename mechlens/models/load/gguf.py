"""GGUF files, llama.cpp's format of (mostly quantized) weights with their tokenizer.

A file is looked through before anything is read from it: counts, lengths and offsets are the file's own word,
so each is held against the bytes that are there. Then transformers reads it, with the `gguf` package, and
what comes of it is kept in the user's cache as any other directory of a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from mechlens.errors import ModelLoadError
from mechlens.models.load import local

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_STRINGS = 2**22
"""In a list; the largest vocabulary there is has a sixteenth of that."""
_MOST_AXES = 4
_NOTE = "mechlens.json"
_FORMAT = 1
"""Of the cache's entries; a new one makes them all anew."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of itself, held against its size."""

    settings: dict[str, Any]
    """Numbers and strings by key; of a list its length."""
    tensors: dict[str, tuple[int, ...]]
    """Shapes, the fastest axis first."""
    types: dict[str, int]
    """How many tensors are held in which of GGML's types, the most frequent first."""

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture", ""))

    @property
    def quantization(self) -> str:
        """As results tell it: `Q4_1 (210 tensors), F32 (61)`."""
        (first, n), *rest = self.types.items()
        return ", ".join([f"{first} ({n} tensors)", *(f"{name} ({n})" for name, n in rest)])


def find(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one in a directory that has no `config.json`.

    Raises:
        ModelLoadError: the directory has several, or the file may not be read.
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
        raise ModelLoadError(f"{path} has {len(files)} GGUF files: give one of them ({names})")
    return files[0] if files else None


def read_header(path: Path) -> Header:
    """Look a file through, reading no weight.

    Raises:
        ModelLoadError: it is damaged, cut off, of an unknown version, or one part of several.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if reader.take(4) != b"GGUF":
            raise reader.wrong("does not begin as a GGUF file does")
        (number,) = reader.unpack("I")
        if number not in _VERSIONS:
            if int.from_bytes(number.to_bytes(4, "little"), "big") in _VERSIONS:
                raise ModelLoadError(f"{path} is a big-endian GGUF file: convert it to a little-endian one")
            known = " and ".join(map(str, _VERSIONS))
            raise ModelLoadError(
                f"{path} is of version {number} of GGUF, but {known} are known here: convert the model again "
                "with a llama.cpp that writes one of these, or install a newer mechlens"
            )
        n_tensors, n_settings = reader.unpack("QQ")
        # a key's length, the value's type and a byte; a name's length, axes, one of them, type and offset
        reader.check_room(n_settings, 8 + 4 + 1, "settings")
        settings: dict[str, Any] = {}
        for _ in range(n_settings):
            key = reader.string()
            if key in settings:
                raise reader.wrong(f"has the setting {key!r} twice")
            settings[key] = reader.value(reader.unpack("I")[0])
        parts = settings.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise ModelLoadError(
                f"{path} is one of {parts} parts of a model: put them together with "
                "`llama-gguf-split --merge FIRST_PART whole.gguf`, and give the whole"
            )
        reader.check_room(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        tensors: dict[str, tuple[int, ...]] = {}
        types: Counter[str] = Counter()
        places = []
        for _ in range(n_tensors):
            name = reader.string()
            if name in tensors:
                raise reader.wrong(f"has the tensor {name!r} twice")
            (n_axes,) = reader.unpack("I")
            if not 1 <= n_axes <= _MOST_AXES:
                raise reader.wrong(f"says that the tensor {name!r} has {n_axes} axes")
            shape = reader.unpack(f"{n_axes}Q")
            kind, offset = reader.unpack("IQ")
            kind_name, size = _size(shape, kind, name, reader)
            tensors[name] = shape
            types[kind_name] += 1
            places.append((offset, size, name))
        if not tensors:
            raise reader.wrong("has no tensors")
        _check_places(reader, settings, places)
    header = Header(settings, tensors, dict(types.most_common()))
    said, there = settings.get(f"{header.architecture}.block_count"), _n_blocks(tensors)
    if said != there:
        raise reader.wrong(f"says that the model has {said} blocks, but has tensors of {there}")
    return header


def _n_blocks(tensors: Iterable[str]) -> int:
    """Before a model of this many is made."""
    return len({found[1] for name in tensors if (found := re.match(r"blk\.(\d+)\.", name))})


def _size(shape: tuple[int, ...], kind: int, name: str, reader: _Reader) -> tuple[str, int]:
    """The name of a type, and how many bytes a tensor of it takes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
        block, n_bytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise ModelLoadError(
            f"{reader.path} has the tensor {name!r} in a type that is not known here (number {kind}): "
            "quantize the model in another way, or install a newer gguf"
        ) from None
    if shape[0] % block:
        raise reader.wrong(
            f"says that the tensor {name!r} has rows of {shape[0]} in blocks of {block}, as {known.name} has"
        )
    return known.name, math.prod(shape) // block * n_bytes


def _check_places(reader: _Reader, settings: dict[str, Any], places: list[tuple[int, int, str]]) -> None:
    """See that the tensors lie behind the header, one behind the other, and all in the file."""
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise reader.wrong(f"has an alignment of {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    end = 0
    for offset, size, name in sorted(places):
        if offset < end or offset % alignment:
            raise reader.wrong(f"has the tensor {name!r} where another one is, or between two places")
        end = offset + size
    if start + end > reader.size:
        raise ModelLoadError(
            f"{reader.path} is cut off: its tensors end at byte {start + end}, but it has {reader.size}; "
            "copy or download it again"
        )


class _Reader:
    """The header of a file, of which no more is read than is there."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size, self.at = file, path, os.fstat(file.fileno()).st_size, 0

    def wrong(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path} is no sound GGUF file, it {what}: copy or download it again")

    def check_room(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.at:
            raise self.wrong(f"says that {count} {what} follow, which do not fit into its {self.size} bytes")

    def take(self, count: int) -> bytes:
        self.check_room(count, 1, "bytes")
        self.at += count
        return self.file.read(count)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if length > 2**16:
            # a chat template may be long; nothing else is, and no template is kept
            self.skip(length)
            return ""
        return self.take(length).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        self.check_room(count, 1, "bytes")
        self.at += count
        self.file.seek(self.at)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise self.wrong(f"has a setting of the unknown type {kind}")
        kind, length = self.unpack("IQ")
        if kind in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            self.check_room(length, width, "numbers")
            self.skip(length * width)
        elif kind == _STRING and length <= _MOST_STRINGS:
            self.check_room(length, 8, "strings")
            for _ in range(length):
                self.skip(self.unpack("Q")[0])
        else:
            raise self.wrong(f"has a list of {length} elements of type {kind}")
        return length


# -- what transformers makes of a file -------------------------------------------------------------

_SAID_TWICE = {
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
"""Settings that transformers' reader may pass over, and what they must be in the configuration it makes."""
_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "logit_scale": (1.0,),
}
"""Values of others that are as if they were not said."""
_OF_THE_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Blocks of the one Gemma of its kind whose attention scale is not that of its heads' width."""
_NO_MATTER = ("tensor_data_layout", "rope.scaling.original_context_length")


def check_understood(header: Header, config: Any, path: Path) -> None:
    """See that nothing which the model computes with is passed over by transformers' reader.

    Raises:
        ModelLoadError: something is.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    prefix = f"{header.architecture}."
    read = GGUF_CONFIG_MAPPING.get(config.model_type) or GGUF_CONFIG_MAPPING.get(header.architecture) or {}
    lost = [name for name in header.tensors if name.startswith("rope_f")]
    for key, value in header.settings.items():
        name = key.removeprefix(prefix)
        if name == key or read.get(name) or name in _NO_MATTER or value in _CHANGES_NOTHING.get(name, ()):
            continue
        own = _own_value(config, _SAID_TWICE[name]) if name in _SAID_TWICE else None
        if own is None or isinstance(value, str) or not math.isclose(own, value, rel_tol=1e-6):
            lost.append(f"{key} = {value}")
    if header.architecture in _OF_THE_LARGEST:
        # no file says it; llama.cpp goes by the size, transformers' reader takes 256 for all
        largest = config.num_hidden_layers == _OF_THE_LARGEST[header.architecture]
        width = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != width:
            lost.append(f"an attention scale of 1 / sqrt({width})")
    if lost:
        raise ModelLoadError(
            f"{path} has what transformers' reader of GGUF passes over ({', '.join(lost)}), so the model "
            "would predict something else: give the model in Hugging Face's format instead"
        )


def _own_value(config: Any, name: str) -> float | None:
    value = getattr(config, name, (getattr(config, "rope_parameters", None) or {}).get(name))
    if value is None and name == "head_dim":
        value = config.hidden_size // config.num_attention_heads
    return value


def convert(path: Path, into: Path) -> None:
    """Write what a GGUF file holds as a directory in Hugging Face's format, its weights in float32.

    Raises:
        ModelLoadError: transformers cannot read it, or reads it as something else.
    """
    header = read_header(path)
    if not header.settings.get("tokenizer.ggml.tokens"):
        raise ModelLoadError(
            f"{path} has no tokenizer: give a GGUF file with one, as llama.cpp's converter writes"
        )
    # its reader draws a bar of its own
    with local.quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), looked_up_once():
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        given = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, **given
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
        except Exception as error:  # of any kind: the readers check little and fail where they stand
            known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
            if header.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
                raise ModelLoadError(
                    f"{path} holds a model of the architecture {header.architecture!r}, which transformers "
                    f"does not read from GGUF; it reads {known}"
                ) from None
            raise ModelLoadError(f"{path} cannot be read: {local.first_line(error)}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelLoadError(
                f"{path} lacks {len(missing)} tensors of a {type(model).__name__}, such as {missing[0]}"
            )
        check_understood(header, model.config, path)
        # a tied unembedding is among the state, but no parameter of its own
        own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        state = {name: each for name, each in model.state_dict().items() if name in own}
        save_file(state, into / "model.safetensors", metadata={"format": "pt"})
        # a model that transformers calls quantized is one that it does not save
        del model.config.quantization_config
        model.config.save_pretrained(into)
        tokenizer.save_pretrained(into)
    note = {"quantization": header.quantization, "file": path.name}
    (into / _NOTE).write_text(json.dumps(note), encoding="utf-8")


@contextlib.contextmanager
def looked_up_once() -> Iterator[None]:
    """Until the block ends, transformers, which reads a file's header three times and makes the table of
    names again for each module, is given what it was given before. That takes half of the time."""
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
    """How the weights were quantized that a directory's were made of; None if it was not made of a GGUF
    file."""
    note = directory / _NOTE
    return json.loads(note.read_text(encoding="utf-8"))["quantization"] if note.is_file() else None


# -- the cache -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted weights are kept: `$MECHLENS_CACHE`, or `mechlens` where caches are."""
    own = os.environ.get("MECHLENS_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(caches) / "mechlens").expanduser() / "gguf"


def cached_size() -> int:
    """Bytes of all that is kept."""
    return sum(each.stat().st_size for each in cache_folder().rglob("*") if each.is_file())


def clear_cache() -> None:
    """Delete all that is kept."""
    if cache_folder().is_dir():
        shutil.rmtree(cache_folder())


@contextlib.contextmanager
def converted(path: Path, *, cache: bool) -> Iterator[Path]:
    """A directory with a GGUF file's weights, from the cache or made now; without a cache it is gone at the
    end.

    Raises:
        ModelLoadError: the file cannot be read.

    Cost: reads the file; made now, twice the memory of the float32 weights, and their size on the disk.
    """
    if not cache:
        with tempfile.TemporaryDirectory(prefix="mechlens-gguf-") as made:
            convert(path, Path(made))
            yield Path(made)
        return
    kept = cache_folder() / _key(path)
    if not kept.is_dir():
        _keep(path, kept)
    yield kept


def _key(path: Path) -> str:
    """What tells an entry from any other: the file's content, and what read it."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    readers = [version("transformers"), version("gguf"), str(_FORMAT)]
    digest.update(" ".join(readers).encode())
    return digest.hexdigest()


def _keep(path: Path, kept: Path) -> None:
    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if kept.is_dir():
                return  # another process was first
            making = kept.with_suffix(".part")
            # of a process that was killed
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            try:
                convert(path, making)
                making.rename(kept)
            finally:
                shutil.rmtree(making, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(
            f"the weights of {path.name} cannot be kept in {kept.parent} ({error}): make room there, name "
            "another folder in MECHLENS_CACHE, or keep none with cache=False (--no-cache)"
        ) from error
