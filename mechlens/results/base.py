"""Results of analyses: frozen dataclasses that can be tabulated, saved and loaded.

A result is saved as one `.safetensors` file, with everything but its tensors as JSON in the header. A file
is written under a temporary name and moved into place, so an interrupted save leaves the old file intact.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechlens.files import replacing
from mechlens.results.columns import Column

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
LONGEST_SHOWN = 100
"""Characters of a field in a result's one-line form."""
R = TypeVar("R", bound="Result")


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Which model a result was measured on, and in what state."""

    name: str
    """Bundled name, hub name or the last part of the directory."""
    revision: str | None
    """Hub revision or checkpoint, if one was requested."""
    architecture: str
    """The Hugging Face architecture, such as `GPTNeoXForCausalLM`; `attention-only` for toy models."""
    engine: str
    """`HookedTransformer` or `TransformerBridge`."""
    engine_version: str
    """TransformerLens's version."""
    processing: bool | None
    """Whether LayerNorm was folded and weights were centered; None if unknown."""
    dtype: str
    """Of the weights, such as `float32`."""
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    n_ctx: int
    quantization: str | None = None
    """GGML types of the weights in their GGUF file, such as `Q4_1 (210 tensors), F32 (61)`. Results are
    those of the rounded weights. None if there is no such file or the types are unknown."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Record:
    """Fields that may be tensors. Two are equal if all their fields are; nan equals nan."""

    def __repr__(self) -> str:
        """The fields on one line: tensors by their shape, long values by their length."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                shown = f"<{'x'.join(map(str, value.shape))}>"
            elif _is_tensor_dict(value):
                shown = (
                    "{" + ", ".join(f"{k}: <{'x'.join(map(str, v.shape))}>" for k, v in value.items()) + "}"
                )
            else:
                shown = repr(value.name if isinstance(value, ModelInfo) else value)
                if len(shown) > LONGEST_SHOWN and isinstance(value, (str, tuple, list, Mapping)):
                    shown = f"<{len(value)} {'characters' if isinstance(value, str) else 'entries'}>"
            parts.append(f"{field.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _equal(getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        )

    __hash__ = None  # type: ignore[assignment]  # tensors have no hash by value


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result(Record):
    """Base class of all results."""

    model: ModelInfo

    types: ClassVar[dict[str, type[Result]]] = {}
    columns: ClassVar[tuple[Column, ...]] = ()
    """The columns of `to_dataframe()` that have a title, a unit or a description."""

    def __init_subclass__(cls) -> None:
        Result.types[cls.__name__] = cls

    def to_dataframe(self) -> pd.DataFrame:
        """A tidy table with one observation per row.

        In all tables, `layer` is an integer (-1 for the row `embed` of a lens), `pos` a position, `token` the
        text of the token there, and `id` its id. Column names have no spaces.
        """
        raise NotImplementedError

    @property
    def title(self) -> str:
        """A short title for figures and tables."""
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(self).__name__).removesuffix(" Result")
        return f"{words.capitalize()} of {self.model.name}"

    def column(self, name: str) -> Column:
        """The title, unit and description of one column of `to_dataframe()`."""
        return next((each for each in self.columns if each.name == name), Column(name))

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The `top` rows of the table that are worth reading first."""
        return self.to_dataframe().head(top)

    def to_json(self) -> dict[str, Any]:
        """All names, numbers and arguments, and the rows of the table, for use by other programs."""
        plain = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "model"
            and not isinstance(value := getattr(self, field.name), Tensor)
            # token texts mean nothing without their ids, which are tensors
            and not (field.name == "strings" and isinstance(value, Mapping))
            and not (isinstance(value, Mapping) and value and _is_tensor_dict(value))
        }
        rows = self.to_dataframe().to_dict("records")
        return {"model": dataclasses.asdict(self.model), **plain, "rows": rows}

    def _repr_html_(self) -> str:
        """The title and the first rows of the table, for Jupyter."""
        table, shown = self.to_dataframe(), self.summary()
        head = "".join(f"<th>{escape(self.column(str(name)).heading)}</th>" for name in shown.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(self.column(str(n)).text(v))}</td>' for n, v in row.items())}</tr>"
            for row in shown.to_dict("records")
        )
        more = f"{len(shown)} of {len(table):,} rows; <code>to_dataframe()</code> has all"
        return (
            f"<p><b>{escape(self.title)}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f"</table>{f'<p><small>{more}</small></p>' if len(shown) < len(table) else ''}"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the result as one `.safetensors` file.

        Args:
            path: the file to write, ending in `.safetensors`, in an existing folder.

        Returns:
            The path written.

        Raises:
            ValueError: the path does not end in `.safetensors`, or its folder does not exist.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            raise ValueError(f"results are saved as .safetensors files, but the path is {target}")
        if not target.parent.is_dir():
            raise ValueError(f"cannot save to {target}: there is no folder {target.parent}")
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value
            elif _is_tensor_dict(value):
                plain[field.name] = {"tensors": list(value)}
                tensors |= {f"{field.name}/{key}": tensor for key, tensor in value.items()}
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                inner = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
                own = {key: each for key, each in inner.items() if isinstance(each, Tensor)}
                tensors |= {f"{field.name}/{key}": tensor for key, tensor in own.items()}
                plain[field.name] = {key: each for key, each in inner.items() if key not in own}
            else:
                plain[field.name] = value
        header = {"type": type(self).__name__, "format": FORMAT, "fields": plain}
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with replacing(target) as part:
            save_file(whole, part, metadata={"mechlens": json.dumps(header, default=plain_number)})
        return target

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a result of this type.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, is not a mechlens result, or is a result of another type.
        """
        result = load(path)
        if not isinstance(result, cls):
            raise ValueError(f"{path} contains {type(result).__name__}, not {cls.__name__}")
        return result


def load(path: str | os.PathLike[str]) -> Result:
    """Load a saved result.

    Args:
        path: a `.safetensors` file written by `save`.

    Returns:
        A result equal to the one that was saved, of the same type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not a mechlens result.

    Example:
        >>> found = mechlens.attention_patterns(model, "Mr. Pickwick met Mr. Winkle.", "L1H2")
        >>> mechlens.load(found.save("patterns.safetensors")) == found
        True
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such result file: {path}")
    try:
        with safe_open(path, "pt") as file:
            header_text = (file.metadata() or {}).get("mechlens")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete .safetensors file ({error}): save it again") from error
    if header_text is None:
        raise ValueError(f"{path} is a .safetensors file, but not a result that mechlens saved")
    try:
        header = json.loads(header_text)
        kind, version, fields = header["type"], header["format"], header["fields"]
        cls = Result.types.get(kind)
        if cls is not None and version <= FORMAT:
            return cls(**_values(cls, fields, tensors))
    except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged: its header does not describe a result ({error!r}); save it again"
        ) from error
    raise ValueError(f"{path} contains {kind}, which this version of mechlens does not know")


def _values(cls: type[Result], fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a result, from the header and the tensors of its file."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = field.name
        if name in tensors:
            values[name] = tensors[name]
            continue
        stored = fields[name]
        keys = stored["tensors"] if isinstance(stored, dict) and set(stored) == {"tensors"} else None
        if keys is not None and all(f"{name}/{key}" in tensors for key in keys):
            values[name] = {key: tensors[f"{name}/{key}"] for key in keys}
        elif stored is not None and (kind := _dataclass_in(hints[name])) is not None:
            start = f"{name}/"
            own = {key.removeprefix(start): each for key, each in tensors.items() if key.startswith(start)}
            values[name] = kind(**stored, **own)
        else:
            values[name] = _tuples(stored)
    return values


def _dataclass_in(hint: Any) -> Any:
    """The dataclass that a type hint names, alone or beside None."""
    kinds = (each for each in (hint, *get_args(hint)) if isinstance(each, type))
    return next((each for each in kinds if dataclasses.is_dataclass(each)), None)


def row_place(row: str) -> tuple[int, int | None]:
    """(layer, head) of a row of a lens: `embed` is layer -1, and only rows such as `L0H3` have a head.

    Rows of interleaved lenses look like `0 attn` and `0 MLP`.
    """
    if row == "embed":
        return -1, None
    found = re.fullmatch(r"L?(\d+)(?:H(\d+)| attn| MLP)?", row)
    assert found is not None, row
    return int(found[1]), None if found[2] is None else int(found[2])


def column_name(text: str) -> str:
    """A text as part of a column name: unique, and without spaces.

    A space becomes `·`, as in figures. A literal `·`, a backslash, and characters that do not print become
    their Python escapes.
    """
    return "".join(
        "·" if c == " " else c if c.isprintable() and c not in "·\\" else c.encode("unicode_escape").decode()
        for c in text
    )


def write_table(table: pd.DataFrame, path: Path) -> Path:
    """Write a table as `.csv`, completely or not at all."""
    with replacing(path) as part:
        table.to_csv(part, index=False)
    return path


def plain_number(value: Any) -> Any:
    """A numpy number as a Python number, for JSON.

    Raises:
        TypeError: the value is anything else.
    """
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"only tensors, numbers and texts can be saved, got a {type(value).__name__}")


def _is_tensor_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values())


def _tuples(value: Any) -> Any:
    """The lists of JSON as the tuples that were saved."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.cpu(), b.cpu()
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        same = a == b
        if a.is_floating_point():
            same |= a.isnan() & b.isnan()
        return bool(same.all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b or (a != a and b != b))
