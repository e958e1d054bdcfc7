"""What long work is saved in, so that it goes on where it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechlens.files import replacing
from mechlens.results.base import plain_number

_HASHES = {"corpus": "another corpus", "weights": "other weights", "settings": "another configuration"}


def state_file(state: str | os.PathLike[str] | None) -> Path | None:
    """The file of a state.

    Raises:
        TypeError: no path.
        ValueError: another ending than `.safetensors`, or no such folder.
    """
    if state is None:
        return None
    if not isinstance(state, (str, os.PathLike)):
        raise TypeError(f"the state is the path of a .safetensors file, but is {state!r}")
    file = Path(state)
    if file.suffix != ".safetensors":
        raise ValueError(f"the state is saved as a .safetensors file, but the path is {file}")
    if file.is_dir():
        raise ValueError(f"the state is saved as a file, but {file} is a folder")
    if not file.parent.is_dir():
        raise ValueError(f"cannot save the state to {file}: there is no folder {file.parent}")
    return file


def save_state(
    file: Path, kind: str, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], *, step: int
) -> None:
    """Write a state, whole or not at all.

    Args:
        kind: what is interrupted, such as `training`.
        arguments: what the work was begun with, as JSON knows it, or numpy's numbers; `model` holds the
            model's own facts.
        step: how far it is.
    """
    header = {f"mechlens_{kind}": json.dumps({"step": step, "arguments": arguments}, default=plain_number)}
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as part:
        save_file(whole, part, metadata=header)


def load_state(
    file: Path, kind: str, owner: str, names: Collection[str], arguments: Mapping[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """Read a state that was begun with the same arguments.

    Args:
        owner: whose work it is, in words.
        names: of its tensors.
        arguments: as in `save_state`. What `corpus`, `weights` and `settings` are hashes of depends on
            the others, so they are named only where nothing else differs.

    Returns:
        The tensors, and how far the work is.

    Raises:
        ValueError: the file is damaged, no such state, or one with other arguments (what differs is named).
    """
    try:
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get(f"mechlens_{kind}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no whole .safetensors file ({error}): delete it to begin again"
        ) from error
    if header is None or set(tensors) != set(names):
        raise ValueError(f"{file} is not the state of {owner}: give another path")
    found = json.loads(header)
    theirs, ours = _flat(found["arguments"]), _flat(arguments)
    differ = [
        f"{name} {theirs.get(name)!r}, not {ours[name]!r}"
        for name in ours
        if name not in _HASHES and theirs.get(name) != ours[name]
    ]
    if not differ:
        differ = [words for name, words in _HASHES.items() if theirs.get(name) != ours.get(name)]
    if differ:
        raise ValueError(
            f"the {kind} in {file} was begun with {', '.join(differ)}: use the same arguments to go on "
            "with it, or another state"
        )
    return tensors, int(found["step"])


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """With the model's own facts beside the others."""
    model = {f"model's {name}": value for name, value in arguments["model"].items()}
    return model | {name: value for name, value in arguments.items() if name != "model"}
