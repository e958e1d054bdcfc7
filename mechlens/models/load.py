"""Loading a model: the bundled one, one from the hub, or a directory."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch

from mechlens.models import engines, hub, local, toy
from mechlens.models.errors import ModelLoadError
from mechlens.models.hub import BUNDLED
from mechlens.models.protocol import LensModel, Source, remember

__all__ = ["BUNDLED", "ModelLoadError", "load_model", "locate"]

BUNDLED_DIRECTORY = Path(__file__).parent / "bundled"


def load_model(
    name_or_path: str | os.PathLike[str] = BUNDLED,
    *,
    backend: str = "auto",
    processing: bool = True,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    checkpoint: int | None = None,
) -> LensModel:
    """Load a model that every analysis takes.

    Its predictions are compared with the Hugging Face model's on 16 tokens before it is handed out.

    Args:
        name_or_path: `mechlens-books`, the bundled model; a name of TransformerLens or the hub, such as
            `gpt2` or `EleutherAI/pythia-70m`; or a directory in Hugging Face's format, or with a
            HookedTransformerConfig as `config.json` beside `model.safetensors`. Only a hub's name that is
            not in the local cache is looked up on the network.
        backend: `hooked` (HookedTransformer, TransformerLens 3.9), `bridge` (TransformerBridge in
            compatibility mode), or `auto`: the first that is installed.
        processing: fold LayerNorm and value biases and centre weights, where that leaves the predictions
            as they are: a logit soft-cap forbids centring the unembedding, norms after the blocks forbid
            folding and centring.
        device: where to put the model; None is the CPU.
        dtype: of the weights, a torch.dtype or its name; None is float32.
        revision: of a model on the hub: a branch, tag or commit.
        checkpoint: a training step, of Pythia and of Stanford's GPT-2s, or of a directory with
            `checkpoints/step-...` in it.

    Returns:
        A HookedTransformer or a TransformerBridge, in evaluation mode.

    Raises:
        ModelLoadError: the model cannot be had as asked; the message says what to do.
    """
    engine = engines.choose_backend(backend)
    to_device, to_dtype = parse_device(device), parse_dtype(dtype)
    place = locate(name_or_path, revision=revision, checkpoint=checkpoint)
    config = local.read_config(place.directory)
    # The engines draw weights at random before they fill them in.
    with torch.random.fork_rng(devices=[]):
        if toy.is_toy(config):
            model, source = toy.load_toy(place.directory, config, place.name, engine, processing, to_dtype)
        else:
            model, source = _load_hf(place, config, engine, processing, to_dtype)
    model.eval()
    with engines.quiet():
        model.to(to_device)
    remember(model, dataclasses.replace(source, revision=place.revision))
    return model


_ADVICE = {"hooked": "backend='bridge'", "bridge": "processing=False"}


def _load_hf(
    place: Place, config: dict[str, Any], engine: engines.Backend, processing: bool, dtype: torch.dtype
) -> tuple[Any, Source]:
    hf = local.read_hf(place.directory, config, dtype=dtype, tokenizer_at=place.tokenizer)
    embedding, unembedding = hf.model.get_input_embeddings(), hf.model.get_output_embeddings()
    tied = torch.equal(embedding.weight, unembedding.weight)
    source = Source(place.name, None, hf.architecture, processing, tied)
    tokens = engines.check_tokens(hf.model)
    with torch.no_grad():
        # Before the engine gets the model: a bridge changes it.
        reference = hf.model(tokens).logits
    specials = engines.special_tokens(hf.tokenizer)
    try:
        if engine == "hooked":
            model = engines.hooked_from_hf(
                hf.model, hf.tokenizer, processing=processing, dtype=dtype, name=place.name
            )
        else:
            model = engines.bridge_from_hf(
                hf.model, hf.tokenizer, processing=processing, dtype=dtype, directory=place.directory
            )
    except ModelLoadError:
        raise
    except Exception as error:  # of any kind: the engines check little and fail where they stand
        raise ModelLoadError(
            f"TransformerLens cannot make this {hf.architecture} ({local.first_line(error)}): "
            f"try {_ADVICE[engine]}"
        ) from error
    engines.keep_special_tokens(model, specials)
    engines.verify(model, tokens, reference, dtype, advice=_ADVICE[engine])
    return model, source


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model's files are."""

    name: str
    """Bundled name, hub name or the directory's last part."""
    directory: Path
    tokenizer: Path
    """The directory of the tokenizer: that of the model, or the one above its checkpoints."""
    revision: str | None


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
    if name == BUNDLED and not path.is_dir():
        _no_revision(name, revision, checkpoint)
        if not (BUNDLED_DIRECTORY / "model.safetensors").is_file():
            raise ModelLoadError(
                f"the weights of the bundled model {BUNDLED!r} are not in this installation: install "
                "mechlens-toolkit again, or give another model"
            )
        return Place(BUNDLED, BUNDLED_DIRECTORY, BUNDLED_DIRECTORY, None)
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
    """A device that this machine has; None is the CPU.

    Raises:
        ModelLoadError: no such device.
    """
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError:
        raise ModelLoadError(f"device must be such as 'cpu', 'cuda' or 'cuda:1', but is {device!r}") from None
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(found.type, 0)
    if (found.index or 0) >= count:
        have = f"{count} of that kind" if count else "none of that kind"
        raise ModelLoadError(f"device {str(found)!r} is not available, this machine has {have}: use 'cpu'")
    return found
