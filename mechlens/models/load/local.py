"""Reading a Hugging Face directory: no network, nothing unpickled, and every gap told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mechlens.errors import ModelLoadError

_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_MAPPED_AT_ONCE = 2**24
"""Bytes of a file that are read before it is opened anew, which takes a millisecond."""


@dataclasses.dataclass
class HuggingFaceModel:
    """A model as Hugging Face reads it, on the CPU, with its own tokenizer."""

    model: Any
    """None once an engine has taken its weights."""
    tokenizer: Any
    architecture: str

    def let_go(self) -> None:
        """Keep no weight; whoever else has one may free it. Modules refer to each other, so that dropping the
        model would free nothing before the garbage is collected."""
        for module in self.model.modules():
            module._parameters.clear()
        self.model = None


def read_config(directory: Path) -> dict[str, Any]:
    """A directory's `config.json`.

    Raises:
        ModelLoadError: no directory, no such file, or it is no JSON object.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise ModelLoadError(f"{directory} {what}: give a directory with config.json, weights and tokenizer")
    path = directory / "config.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{directory} has no config.json, so it is no model's directory: save one there with "
            "model.save_pretrained(directory)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is no JSON ({error}): copy it again") from None
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path} holds no JSON object: copy it again")
    return config


def has_tokenizer(directory: Path) -> bool:
    return any(all((directory / name).is_file() for name in names) for names in _TOKENIZER_FILES)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a directory's weights, each seen to be whole if it is safetensors.

    Raises:
        ModelLoadError: there are none, one is missing, or one is damaged.
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
                    f"{directory} lacks {len(missing)} of {len(files)} files of its weights: "
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
    """See that a safetensors file is whole: its header is readable and its length is right.

    Raises:
        ModelLoadError: it is not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is truncated or corrupt ({error}): copy or download it again") from None


def architecture_of(config: dict[str, Any], directory: Path) -> str:
    """The class of causal language model that a configuration is for.

    Raises:
        ModelLoadError: it is for another kind of model, or for none that Hugging Face has.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = config.get("model_type")
    declared = config.get("architectures") or []
    needed = "mechlens reads decoder-only language models such as GPT-2, Pythia or Llama"
    called = f"{directory} holds a {declared[0] if declared else kind}"
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
            f"{directory}/config.json says {what}, which is no architecture we know: {needed}"
        )
    if declared and not hasattr(transformers, declared[0]):
        raise ModelLoadError(f"{called}, which needs code from outside: it is not run; {needed}")
    return next((name for name in declared if name in options), options[0])


def read_hf(
    directory: Path, config: dict[str, Any], *, dtype: torch.dtype, tokenizer_at: Path
) -> HuggingFaceModel:
    """Read a Hugging Face directory without looking anywhere else.

    Args:
        directory: with `config.json` and weights.
        config: what `read_config` gave.
        dtype: to hold the weights in.
        tokenizer_at: the directory of the tokenizer, mostly the same.

    Raises:
        ModelLoadError: something is missing, damaged, or no causal language model.
    """
    architecture = architecture_of(config, directory)
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized
        raise ModelLoadError(
            f"the weights in {directory} are quantized ({method}, says quantization_config in config.json): "
            "they are not read, because analyses compute with the weights themselves; give a copy in "
            "float32, bfloat16 or float16"
        )
    if not has_tokenizer(tokenizer_at):
        raise ModelLoadError(
            f"{tokenizer_at} has no tokenizer: copy the model's tokenizer.json and tokenizer_config.json "
            "there, or tokenizer.save_pretrained(directory)"
        )
    # Read here, so that it is not up to another library's settings whether a pickle may run, and so that no
    # tensor is kept for the others that its file has.
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        state |= read_safetensors(file, dtype) if file.suffix == ".safetensors" else read_pickle(file)
    configuration = hf_config(directory, architecture)
    with quiet_transformers():
        import transformers

        try:
            model, report = getattr(transformers, architecture).from_pretrained(
                None,
                config=configuration,
                state_dict=state,
                dtype=dtype,
                # The engines compute attention step by step, so the comparison must, too.
                attn_implementation="eager",
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as error:  # of any kind: every architecture and quantization has checks of its own
            raise ModelLoadError(
                f"{directory} cannot be read as {architecture}: {first_line(error)}"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise ModelLoadError(
                f"the weights in {directory} lack {len(missing)} tensors that {architecture} has, such as "
                f"{missing[0]}: they are of another architecture, or incomplete"
            )
        tokenizer = read_tokenizer(tokenizer_at)
    return HuggingFaceModel(model.eval(), tokenizer, architecture)


def hf_config(directory: Path, architecture: str) -> Any:
    """A directory's configuration, with Hugging Face's defaults where it says nothing.

    Raises:
        ModelLoadError: Hugging Face refuses it.
    """
    with quiet_transformers():
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of any kind: every architecture validates in its own way
            raise ModelLoadError(f"{directory}/config.json is refused: {first_line(error)}") from error
    config.architectures = [architecture]
    return config


def read_tokenizer(directory: Path) -> Any:
    """A directory's tokenizer.

    Raises:
        ModelLoadError: its files are damaged.
    """
    with quiet_transformers():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of any kind: the parsers of tokenizer files raise bare Exceptions
            raise ModelLoadError(
                f"the tokenizer in {directory} cannot be read: {first_line(error)}"
            ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars over a millisecond's work, no advice on things that we check ourselves."""
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
    """The tensors of a safetensors file, those of floating-point numbers in a dtype.

    The file is opened anew now and then: its pages are memory of this process for as long as it is open, or
    as a tensor is left that is a view of them.
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
    """The tensors in a pickle, running none of it.

    Raises:
        ModelLoadError: it is damaged, or holds more than tensors.
    """
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise ModelLoadError(
            f"{file} is a damaged pickle, or one with more in it than tensors, which is not read because it "
            "could run code: if you trust it, read it elsewhere and save it as model.safetensors"
        ) from None


def first_line(error: Exception) -> str:
    """What went wrong, without the advice and traces that libraries append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Some only announce the reason there.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
