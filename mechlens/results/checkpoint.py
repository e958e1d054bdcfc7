"""Checkpoints: long jobs save their progress to a file and resume from it after an interruption."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.files import replacing
from mechlens.progress import SampleEnded, planning, progress_bar
from mechlens.results.base import plain_number

SAVE_SECONDS = 30.0
"""Seconds between two saves."""

_HASHES = {"corpus": "another corpus", "weights": "other weights", "settings": "another configuration"}

Item = TypeVar("Item")
State = tuple[Mapping[str, Tensor], int]
"""The tensors that make up the progress, and the number of steps done."""


class Checkpoint:
    """The progress of a long job: loaded on entry, saved every `SAVE_SECONDS` and on exit.

    Exit saves even after an exception or Ctrl-C. If the path is None, nothing is loaded or saved, and only
    the progress bar remains::

        with Checkpoint(resume, "search", arguments, owner="a search", names=("best",)) as saved:
            best = saved.tensors.get("best", nothing)
            for batch in saved.loop(batches(saved.step), lambda: ({"best": best}, n), desc="search"):
                best, n = ...

    Attributes:
        path: the file, or None.
        tensors: the tensors in the file; empty if there was none.
        step: the number of steps done when it was saved; 0 if there was no file.
        bar: the progress bar of `loop`, which you can update yourself if items take unequal time.
    """

    bar: tqdm[Any]

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        kind: str,
        arguments: Callable[[], Mapping[str, Any]],
        *,
        owner: str,
        names: Collection[str],
    ) -> None:
        """Check the path; nothing is read before the `with` block begins.

        Args:
            path: a `.safetensors` file, which need not exist yet, or None.
            kind: the kind of job, such as `training`; it names the entry in the header.
            arguments: makes the arguments of the job, as JSON values or numpy scalars, with the facts about
                the model under `model`. Called only if there is a path, because it may hash all weights.
            owner: the job in words, for errors, such as `an exhaustive search`.
            names: the tensors in a checkpoint of this kind.

        Raises:
            TypeError, ValueError: see `checkpoint_path`.
        """
        self.path = checkpoint_path(path)
        self.kind, self.owner, self.names = kind, owner, names
        self.tensors: dict[str, Tensor] = {}
        self.step = 0
        self._make_arguments = arguments
        self._arguments: Mapping[str, Any] = {}
        self._state: Callable[[], State] | None = None

    def __enter__(self) -> Checkpoint:
        """Load the file if it exists.

        Raises:
            ValueError: the file is damaged, belongs to another kind of job, or was begun with other arguments
                (the error names them).
        """
        if self.path is not None:
            self._arguments = self._make_arguments()
            if self.path.exists():
                self.tensors, self.step = load_state(
                    self.path, self.kind, self.owner, self.names, self._arguments
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._state is not None:
            self.bar.close()
            self.save()

    def loop(
        self,
        work: Iterable[Item],
        state: Callable[[], State],
        *,
        desc: str,
        unit: str,
        total: int | None,
        progress: bool | None,
        size: Callable[[Item], int] = lambda _: 1,
    ) -> Iterator[Item]:
        """Iterate over the remaining work with a progress bar that begins at `step`, and save progress.

        Args:
            work: the items. The state must be consistent whenever an item is done or the job is interrupted.
            state: gives the tensors and the step to save; without tensors nothing is saved.
            size: how many units of the bar an item is worth.

        The other arguments are the bar's.
        """
        self.bar = progress_bar(total=total, initial=self.step, desc=desc, unit=unit, progress=progress)
        self._state, saved = state, time.monotonic()
        for item in work:
            yield item
            try:
                self.bar.update(size(item))
            except SampleEnded:
                return
            if self.path is not None and time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        """Write the current state, completely or not at all. Without a path, do nothing."""
        if self.path is not None and self._state is not None and not planning():
            tensors, step = self._state()
            if tensors:
                save_state(self.path, self.kind, tensors, self._arguments, step=step)


def save_state(
    file: Path, kind: str, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], *, step: int
) -> None:
    """Write a checkpoint, completely or not at all."""
    header = {f"mechlens_{kind}": json.dumps({"step": step, "arguments": arguments}, default=plain_number)}
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as part:
        save_file(whole, part, metadata=header)


def load_state(
    file: Path, kind: str, owner: str, names: Collection[str], arguments: Mapping[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """Read a checkpoint that was begun with the same arguments."""
    try:
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get(f"mechlens_{kind}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not a .safetensors file ({error}): delete it to start again"
        ) from error
    if header is None or set(tensors) != set(names):
        raise ValueError(f"{file} is not a checkpoint of {owner}: give another path")
    found = json.loads(header)
    if differ := _differences(found["arguments"], arguments):
        raise ValueError(
            f"the {kind} in {file} was begun with {', '.join(differ)}: use the same arguments to resume it, "
            "or another file"
        )
    return tensors, int(found["step"])


def checkpoint_path(path: str | os.PathLike[str] | None) -> Path | None:
    """The path of a checkpoint, checked.

    Raises:
        TypeError: it is not a path.
        ValueError: it does not end in `.safetensors`, is a folder, or is in a folder that does not exist.
    """
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"resume must be the path of a .safetensors file, got {path!r}")
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"resume must be a .safetensors file, got {file}")
    if file.is_dir():
        raise ValueError(f"resume must be a .safetensors file, but {file} is a folder")
    if not file.parent.is_dir():
        raise ValueError(f"cannot save progress to {file}: the folder {file.parent} does not exist")
    return file


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of arguments, in words.

    The hashes depend on the other arguments, so they are named only where nothing else differs.
    """
    theirs, ours = _flat(theirs), _flat(ours)
    differ = [
        f"{name} {theirs.get(name)!r}, not {ours[name]!r}"
        for name in ours
        if name not in _HASHES and theirs.get(name) != ours[name]
    ]
    return differ or [words for name, words in _HASHES.items() if theirs.get(name) != ours.get(name)]


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with the facts about the model among them."""
    model = {f"model's {name}": value for name, value in arguments["model"].items()}
    return model | {name: value for name, value in arguments.items() if name != "model"}
