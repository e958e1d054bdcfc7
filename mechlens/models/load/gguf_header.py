"""Read the header of a GGUF file and check it against the file's size, before any weight is read."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from mechlens.errors import ModelLoadError

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_STRINGS = 2**22
"""In a list; 16 times the largest known vocabulary."""
_MAX_AXES = 4


@dataclasses.dataclass(frozen=True)
class Header:
    """The content of a file's header."""

    settings: dict[str, Any]
    """Numbers and strings by key; for a list, its length."""
    tensors: dict[str, tuple[int, ...]]
    """Shapes, fastest-varying axis first."""
    types: dict[str, int]
    """Number of tensors of each GGML type, the most frequent type first."""

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture", ""))

    @property
    def quantization(self) -> str:
        """The types as results show them: `Q4_1 (210 tensors), F32 (61)`."""
        (first, n), *rest = self.types.items()
        return ", ".join([f"{first} ({n} tensors)", *(f"{name} ({n})" for name, n in rest)])


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Raises:
        ModelLoadError: the file is damaged or cut off, of an unknown version, or one part of several.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if reader.take(4) != b"GGUF":
            raise reader.damaged("does not start like a GGUF file")
        (number,) = reader.unpack("I")
        if number not in _VERSIONS:
            if int.from_bytes(number.to_bytes(4, "little"), "big") in _VERSIONS:
                raise ModelLoadError(f"{path} is a big-endian GGUF file: convert it to a little-endian one")
            known = " and ".join(map(str, _VERSIONS))
            raise ModelLoadError(
                f"{path} has GGUF version {number}, but mechlens reads versions {known}: convert the model "
                "again with a version of llama.cpp that writes one of these, or install a newer mechlens"
            )
        n_tensors, n_settings = reader.unpack("QQ")
        settings = _settings(reader, n_settings)
        parts = settings.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise ModelLoadError(
                f"{path} is one of {parts} parts of a model: join them with "
                "`llama-gguf-split --merge FIRST_PART whole.gguf`, and load the result"
            )
        tensors, types = _tensors(reader, n_tensors, settings)
    header = Header(settings, tensors, types)
    # checked before a model with so many blocks is allocated
    said = settings.get(f"{header.architecture}.block_count")
    there = len({found[1] for name in tensors if (found := re.match(r"blk\.(\d+)\.", name))})
    if said != there:
        raise reader.damaged(f"declares {said} blocks, but has tensors for {there}")
    return header


def _settings(reader: _Reader, count: int) -> dict[str, Any]:
    # at least the key's length, the value's type, and one byte
    reader.check_room(count, 8 + 4 + 1, "settings")
    settings: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string()
        if key in settings:
            raise reader.damaged(f"has the setting {key!r} twice")
        settings[key] = reader.value(reader.unpack("I")[0])
    return settings


def _tensors(
    reader: _Reader, count: int, settings: dict[str, Any]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The shapes of the tensors, and the number of tensors of each type."""
    # at least the name's length, the number of axes, one axis, the type and the offset
    reader.check_room(count, 8 + 4 + 8 + 4 + 8, "tensors")
    tensors: dict[str, tuple[int, ...]] = {}
    types: Counter[str] = Counter()
    places = []
    for _ in range(count):
        name = reader.string()
        if name in tensors:
            raise reader.damaged(f"has the tensor {name!r} twice")
        (n_axes,) = reader.unpack("I")
        if not 1 <= n_axes <= _MAX_AXES:
            raise reader.damaged(f"declares {n_axes} axes for the tensor {name!r}")
        shape = reader.unpack(f"{n_axes}Q")
        kind, offset = reader.unpack("IQ")
        kind_name, size = _size(shape, kind, name, reader)
        tensors[name] = shape
        types[kind_name] += 1
        places.append((offset, size, name))
    if not tensors:
        raise reader.damaged("has no tensors")
    _check_places(reader, settings, places)
    return tensors, dict(types.most_common())


def _size(shape: tuple[int, ...], kind: int, name: str, reader: _Reader) -> tuple[str, int]:
    """The name of a tensor's GGML type, and its size in bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
        block, n_bytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise ModelLoadError(
            f"{reader.path} has the tensor {name!r} in the unknown type {kind}: quantize the model "
            "differently, or install a newer gguf"
        ) from None
    if shape[0] % block:
        raise reader.damaged(
            f"declares rows of {shape[0]} in blocks of {block} ({known.name}) for the tensor {name!r}"
        )
    return known.name, math.prod(shape) // block * n_bytes


def _check_places(reader: _Reader, settings: dict[str, Any], places: list[tuple[int, int, str]]) -> None:
    """Check that the tensors follow the header without overlap, and end within the file."""
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise reader.damaged(f"has an alignment of {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    end = 0
    for offset, size, name in sorted(places):
        if offset < end or offset % alignment:
            raise reader.damaged(f"has the tensor {name!r} at an offset that is taken or not aligned")
        end = offset + size
    if start + end > reader.size:
        raise ModelLoadError(
            f"{reader.path} is cut off: its tensors end at byte {start + end}, but the file has "
            f"{reader.size}; copy or download it again"
        )


class _Reader:
    """Reads a header, never past the end of the file, whatever lengths the header declares."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size, self.at = file, path, os.fstat(file.fileno()).st_size, 0

    def damaged(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path} is damaged: it {what}; copy or download it again")

    def check_room(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.at:
            raise self.damaged(f"declares {count} {what}, more than fit into its {self.size} bytes")

    def take(self, count: int) -> bytes:
        self.check_room(count, 1, "bytes")
        self.at += count
        return self.file.read(count)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        if length > 2**16:
            # only a chat template is this long, and it is not needed
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
            raise self.damaged(f"has a setting of the unknown type {kind}")
        kind, length = self.unpack("IQ")
        if kind in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            self.check_room(length, width, "numbers")
            self.skip(length * width)
        elif kind == _STRING and length <= _MAX_STRINGS:
            self.check_room(length, 8, "strings")
            for _ in range(length):
                self.skip(self.unpack("Q")[0])
        else:
            raise self.damaged(f"has a list of {length} elements of type {kind}")
        return length
