"""Read a model from a directory in Hugging Face's format, without network access or running pickled code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from mechlens.errors import ModelLoadError

_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_MAPPED_AT_ONCE = 2**24
"""Bytes read before a file is reopened, which takes a millisecond."""


@dataclasses.dataclass
class HuggingFaceModel:
    """A model and its tokenizer, as transformers reads them, on the CPU."""

    model: Any
    """None once an engine has taken the weights."""
    tokenizer: Any
    architecture: str

    def release(self) -> None:
        """Free all weights now. Modules refer to each other, so dropping the model would free nothing until
        the next garbage collection."""
        for module in self.model.modules():
            module._parameters.clear()
        self.model = None


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a directory's `config.json`.

    Raises:
        ModelLoadError: the directory or the file does not exist, or the file is not a JSON object.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ModelLoadError(f"{directory} {what}: give a directory with config.json, weights and tokenizer")
    path = directory / "config.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{directory} has no config.json: save a model there with model.save_pretrained(directory)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}): copy it again") from None
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} is not a JSON object: copy it again")
    return config


def has_tokenizer(directory: Path) -> bool:
    return any(all((directory / name).is_file() for name in names) for names in _TOKENIZER_FILES)


def weight_files(directory: Path) -> list[Path]:
    """The files with a directory's weights. Safetensors files are checked for damage.

    Raises:
        ModelLoadError: there are no weights, or a file is missing or damaged.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (directory / single).is_file():
            files = [directory / single]
        elif (directory / index).is_file():
            try:
                shards = json.loads((directory / index).read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, AttributeError):
                raise ModelLoadError(f"{directory / index} is damaged: copy it again") from None
            files = [directory / shard for shard in sorted(set(shards))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ModelLoadError(
                    f"{directory} lacks {len(missing)} of its {len(files)} weight files: "
                    f"copy {', '.join(missing)} there"
                )
        else:
            continue
        for file in files:
            if file.suffix == ".safetensors":
                check_safetensors(file)
        return files
    raise ModelLoadError(
        f"{directory} has a config.json but no weights: copy model.safetensors there (or its shards with "
        "model.safetensors.index.json)"
    )


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file has a readable header and the right length.

    Raises:
        ModelLoadError: the file is truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is truncated or corrupt ({error}): copy or download it again") from None


def architecture_of(config: dict[str, Any], directory: Path) -> str:
    """The name of transformers' causal language model class for a configuration.

    Raises:
        ModelLoadError: the configuration is of another kind of model, or one that transformers does not have.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = config.get("model_type")
    declared = config.get("architectures") or []
    needed = "mechlens reads decoder-only language models such as GPT-2, Pythia or Llama"
    called = f"{directory} is a {declared[0] if declared else kind}"
    if config.get("is_encoder_decoder"):
        raise ModelLoadError(f"{called}, an encoder-decoder model: {needed}")
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    options = (causal,) if isinstance(causal, str) else tuple(causal or ())
    says_causal = any(name in options for name in declared)
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (says_causal and config.get("is_decoder")):
        raise ModelLoadError(f"{called}, an encoder-only model: {needed}")
    if not options:
        what = f"model_type {kind!r}" if kind else "no model_type"
        raise ModelLoadError(
            f"{directory}/config.json has {what}, which transformers does not know: {needed}"
        )
    if declared and not hasattr(transformers, declared[0]):
        raise ModelLoadError(f"{called}, which needs code that is not in transformers: {needed}")
    return next((name for name in declared if name in options), options[0])


def read_hf(
    directory: Path, config: dict[str, Any], *, dtype: torch.dtype, tokenizer_at: Path
) -> HuggingFaceModel:
    """Read a model and its tokenizer from local files only.

    Args:
        directory: contains `config.json` and the weights.
        config: the content of `config.json`.
        dtype: dtype of the weights in memory.
        tokenizer_at: the tokenizer's directory, usually the same.

    Raises:
        ModelLoadError: a file is missing or damaged, or the model is not a causal language model.
    """
    architecture = architecture_of(config, directory)
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        raise ModelLoadError(
            f"the weights in {directory} are quantized ({method}), but analyses need unquantized weights: "
            "load a copy in float32, bfloat16 or float16"
        )
    if not has_tokenizer(tokenizer_at):
        raise ModelLoadError(
            f"{tokenizer_at} has no tokenizer: copy the model's tokenizer.json and tokenizer_config.json "
            "there, or use tokenizer.save_pretrained(directory)"
        )
    # read here, so that no other library decides whether a pickle may run code, and no tensor keeps its whole
    # file in memory
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        state |= read_safetensors(file, dtype) if file.suffix == ".safetensors" else read_pickle(file)
    configuration = hf_config(directory, architecture)
    with quiet_transformers(), load_errors(f"{directory} cannot be read as {architecture}"):
        import transformers

        model, report = getattr(transformers, architecture).from_pretrained(
            None,
            config=configuration,
            state_dict=state,
            dtype=dtype,
            # the engines compute attention step by step, so the reference must, too
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
        )
    check_complete(report["missing_keys"], f"the weights in {directory}", architecture)
    return HuggingFaceModel(model.eval(), read_tokenizer(tokenizer_at), architecture)


def check_complete(missing: Collection[str], what: str, architecture: str) -> None:
    """Check that no tensor of a model is missing; transformers would initialize it at random.

    Raises:
        ModelLoadError: one is missing.
    """
    if missing:
        raise ModelLoadError(
            f"{what} lack {len(missing)} tensors of {architecture}, such as {min(missing)}: they are "
            "incomplete, or belong to another architecture"
        )


def hf_config(directory: Path, architecture: str) -> Any:
    """A directory's configuration, completed with transformers' defaults.

    Raises:
        ModelLoadError: transformers does not accept it.
    """
    with quiet_transformers(), load_errors(f"transformers does not accept {directory}/config.json"):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    config.architectures = [architecture]
    return config


def read_tokenizer(directory: Path) -> Any:
    """A directory's tokenizer.

    Raises:
        ModelLoadError: the tokenizer's files are damaged.
    """
    with quiet_transformers(), load_errors(f"the tokenizer in {directory} cannot be read"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def load_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn any exception in the block into a ModelLoadError that says `what` failed, why, and what to do.

    Libraries check few of a model's settings, so they raise exceptions of many kinds.
    """
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{what}: {first_line(error)}{advice}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers: no progress bars, and no warnings about what mechlens checks itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_safetensors(file: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, floating-point ones converted to `dtype`.

    The file is reopened now and then, because its pages count as this process's memory while it is open or a
    tensor is a view of them.
    """
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(safe_open(file, "pt"))
        mapped = 0
        for name in list(opened.keys()):
            if mapped > _MAPPED_AT_ONCE:
                stack.close()
                opened, mapped = stack.enter_context(safe_open(file, "pt")), 0
            tensor = opened.get_tensor(name)
            mapped += tensor.nbytes
            found[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            del tensor
    return found


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a pickle; its code is not run.

    Raises:
        ModelLoadError: the pickle is damaged, or contains more than tensors.
    """
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise ModelLoadError(
            f"{file} is damaged, or contains more than tensors and could run code, so it is not read: if you "
            "trust it, load it with torch.load and save its tensors as model.safetensors"
        ) from None


def first_line(error: Exception) -> str:
    """An error's message without the advice and traces that libraries append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # some errors give the reason on the second line
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
