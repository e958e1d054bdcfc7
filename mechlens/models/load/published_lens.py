"""Published tuned lenses, in the format of AlignmentResearch/tuned-lens."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechlens.errors import ModelLoadError
from mechlens.models.load import hub, local
from mechlens.models.protocol import LensModel, describe
from mechlens.results import ModelInfo, TunedLens

PUBLISHED = "AlignmentResearch/tuned-lens"
"""The space on the hub that has the lenses, each in a folder `lens/<model name>`."""
FILES = ("config.json", "params.pt")
# What old checkpoints contain besides the translators: the model's own last norm and unembedding.
_OF_THE_MODEL = re.compile(r"(unembed(ding)?|layer_norm|final_norm)\..*")
_TRANSLATOR = re.compile(r"(?:layer_translators\.)?(\d+)\.(weight|bias)")


def load_tuned_lens(source: str | os.PathLike[str], *, model: LensModel) -> TunedLens:
    """Read a tuned lens that was trained with AlignmentResearch/tuned-lens.

    Translator i is applied to the residual stream before block i. So translator 0 becomes the row `embed`,
    and translator l + 1 the row of layer l. Older checkpoints, with an `input_translator` and unused copies
    of the model's last norm and unembedding, can be read, too.

    Args:
        source: a folder with `config.json` and `params.pt`, or the name of a lens in the space
            `AlignmentResearch/tuned-lens`, such as `gpt2`, from the local cache or else from the hub.
        model: the model the lens was trained for, with unprocessed weights. A different size is an error, a
            different name a warning.

    Returns:
        The lens in float32. What the checkpoint does not record (held-out KL, training) is nan or None.

    Raises:
        ModelLoadError: the model has processed weights or different sizes; there is no such lens; or its
            files are damaged, contain more than tensors (the pickle is read with `weights_only`), or are not
            those of a linear tuned lens.

    Example:
        >>> raw = mechlens.load_model(processing=False)
        >>> mechlens.load_tuned_lens("./no-such-folder", model=raw)
        Traceback (most recent call last):
        mechlens.errors.ModelLoadError: no-such-folder must be a folder with config.json and params.pt:
        config.json is missing

    References: Belrose et al. 2023, arXiv:2303.08112; https://github.com/AlignmentResearch/tuned-lens.
    """
    info = describe(model)
    if info.processing is not False:
        raise ModelLoadError(
            "published tuned lenses are for unprocessed weights, but this model's are "
            f"{'processed' if info.processing else 'in an unknown state'}: load it with "
            "load_model(..., processing=False)"
        )
    folder = _folder(source)
    config = _config(folder / FILES[0], info)
    translators = _translators(folder / FILES[1], info, has_bias=config.get("bias", True))
    rows = tuple(translators)
    unknown = torch.full((len(rows) + 1,), torch.nan, dtype=torch.float32)
    return TunedLens(
        model=info,
        rows=rows,
        weight=torch.stack([weight for weight, _ in translators.values()]),
        bias=torch.stack([bias for _, bias in translators.values()]),
        kl_plain=unknown,
        kl_tuned=unknown.clone(),
        source=folder.name if folder == Path(source) else f"{PUBLISHED} {source}",
        **dict.fromkeys(
            ("steps", "batch_tokens", "length", "train_tokens", "held_out_tokens", "learning_rate", "seed")
        ),
        prepend_bos=None,
    )


def _folder(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_file():
        raise ModelLoadError(
            f"{path} is a file, but a published lens is a folder with {' and '.join(FILES)}; what mechlens "
            "saved is read with TunedLens.load"
        )
    if path.is_dir() or not isinstance(source, str) or source.startswith((".", "~", "/")):
        absent = [name for name in FILES if not (path / name).is_file()]
        if absent:
            raise ModelLoadError(
                f"{path} must be a folder with {' and '.join(FILES)}: {absent[0]} is missing"
            )
        return path
    return _fetch(source)


def _fetch(name: str) -> Path:
    """The folder of a lens in the space, from the local cache or else from the hub."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
        raise ModelLoadError(f"{name!r} is neither a folder nor the name of a published lens, such as 'gpt2'")
    where: dict[str, Any] = {"repo_id": PUBLISHED, "repo_type": "space", "subfolder": f"lens/{name}"}
    try:
        return _both(hf_hub_download, local_files_only=True, **where)
    except LocalEntryNotFoundError:
        pass
    lost = (
        f"the tuned lens {name!r} is neither a folder nor in the local Hugging Face cache, and the hub "
        "cannot be"
    )
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ModelLoadError(f"{lost} asked (HF_HUB_OFFLINE is set): give a folder, or train_tuned_lens")
    try:
        # one request with a short timeout first, because downloads retry for a long time
        HfApi().space_info(PUBLISHED, timeout=hub.PROBE_SECONDS)
        return _both(hf_hub_download, **where)
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelLoadError(
                f"{PUBLISHED} has no lens {name!r}: see https://huggingface.co/spaces/{PUBLISHED}/tree/main/lens"
            ) from error
        # without a connection, the hub's package raises errors of various client libraries
        why = local.first_line(error)
        raise ModelLoadError(f"{lost} reached ({why}): give a folder, or train_tuned_lens") from error


def _both(download: Callable[..., str], **where: Any) -> Path:
    """The folder of both files."""
    paths = [Path(download(filename=file, **where)) for file in FILES]
    return paths[0].parent


def _config(file: Path, info: ModelInfo) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{file} must be the configuration of a lens; got a {type(config).__name__}")
    kind = config.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens":
        raise ModelLoadError(f"{file} describes a {kind}, but only a linear_tuned_lens can be read")
    if config.get("extra_layers"):
        raise ModelLoadError(f"the lens in {file} has {config['extra_layers']} extra layers: not supported")
    if config.get("reuse_unembedding") is False:
        raise ModelLoadError(f"the lens in {file} has a separate unembedding for each layer: not supported")
    n_layers = config.get("num_hidden_layers", config.get("num_layers", info.n_layers))
    sizes = {
        "d_model": (config.get("d_model", info.d_model), info.d_model),
        "layers": (n_layers, info.n_layers),
    }
    for what, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise ModelLoadError(f"the lens in {file} has {what} {theirs}, but the model has {ours}")
    name = str(config.get("base_model_name_or_path") or info.name)
    if name.rstrip("/").rsplit("/", 1)[-1].lower() != info.name.rsplit("/", 1)[-1].lower():
        warnings.warn(
            f"the lens in {file} was trained for {name}, but the model is {info.name}: their sizes agree, "
            "their weights may not",
            stacklevel=3,
        )
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        return local.read_pickle(file)
    except TypeError as error:
        raise ModelLoadError(f"{file} does not contain named tensors") from error


def _translators(file: Path, info: ModelInfo, *, has_bias: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """(weight, bias) by row of the lens, which computes `x + x @ weight + bias`."""
    found: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    entry: dict[str, Tensor] = {}
    for old_key, tensor in _read(file).items():
        key = str(old_key).replace("probe", "translator").replace("adapter", "translator")
        if _OF_THE_MODEL.fullmatch(key):
            continue
        match = _TRANSLATOR.fullmatch(key)
        if not isinstance(tensor, Tensor):
            match = None
        elif key in ("input_translator.weight", "input_translator.bias"):
            entry[key.rsplit(".", 1)[-1]] = tensor
            continue
        if match:
            found[match[2]][int(match[1])] = tensor
        else:
            raise ModelLoadError(f"{file} contains {old_key!r}, which is not part of a linear tuned lens")
    count = len(found["weight"])
    if sorted(found["weight"]) != list(range(count)):
        raise ModelLoadError(f"{file} has only the translators {sorted(found['weight'])}: some are missing")
    # in older checkpoints the input's translator is not in the list, which begins with layer 0's output
    shift = 1 if entry or count == info.n_layers - 1 else 0
    if count + shift != info.n_layers or not (count or entry):
        raise ModelLoadError(
            f"{file} has {count + bool(entry)} translators, but a model with {info.n_layers} layers needs "
            f"{info.n_layers}, one before each block"
        )
    for name in found:
        found[name] = {index + shift: tensor for index, tensor in found[name].items()}
        if name in entry:
            found[name][0] = entry[name]
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for index in sorted(found["weight"]):
        weight = found["weight"][index]
        bias = found["bias"].get(index)
        if bias is None:
            if has_bias:
                raise ModelLoadError(f"{file} has no bias for translator {index}")
            bias = torch.zeros(info.d_model, dtype=torch.float32)
        if weight.shape != (info.d_model, info.d_model) or bias.shape != (info.d_model,):
            raise ModelLoadError(
                f"translator {index} in {file} has shape {tuple(weight.shape)} and a bias of shape "
                f"{tuple(bias.shape)}, but the model's d_model is {info.d_model}"
            )
        # torch.nn.Linear stores the transposed matrix
        rows["embed" if index == 0 else str(index - 1)] = (weight.float().T.contiguous(), bias.float())
    return rows
