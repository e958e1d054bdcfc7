"""Convert a Hugging Face model to one of TransformerLens's two engines.

Nothing here depends on the model's name. TransformerLens's own loaders look the name up on the network, and
guess the architecture from words in a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from mechlens.errors import ArgumentError, ModelLoadError
from mechlens.models.load.local import HuggingFaceModel
from mechlens.models.load.processing import processing_by_blocks

Backend = Literal["hooked", "bridge"]


def choose_backends(backend: str) -> tuple[Backend, ...]:
    """The engines to try, the preferred one first.

    Raises:
        ArgumentError: there is no such engine.
        ModelLoadError: the installed TransformerLens does not have it.
    """
    from importlib.metadata import version

    installed = version("transformer-lens")
    has_hooked = int(installed.split(".")[0]) < 4
    if backend == "auto":
        return ("hooked", "bridge") if has_hooked else ("bridge",)
    if backend == "hooked" and not has_hooked:
        raise ModelLoadError(
            f"backend='hooked' needs HookedTransformer, which TransformerLens {installed} does not have: "
            "use backend='bridge', or install transformer-lens 3.9"
        )
    if backend not in ("hooked", "bridge"):
        raise ArgumentError("backend", "'auto', 'hooked' or 'bridge'", backend)
    return (backend,)  # type: ignore[return-value]  # mypy does not narrow by `in`


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what TransformerLens prints and logs, and warnings that do not concern the user."""

    def not_the_engine(record: logging.LogRecord) -> bool:
        return "transformer_lens" not in record.pathname

    root = logging.getLogger()
    # without any handler, `logging.warning` would install one for the whole program
    handler = logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(not_the_engine)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # both kinds of version are supported
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            # norms that are not folded are measured; see `access.norm_affine`
            warnings.filterwarnings("ignore", ".* does not support (fold_ln|center_writing)", UserWarning)
            yield
    finally:
        root.removeFilter(not_the_engine)
        root.removeHandler(handler)


@dataclasses.dataclass(frozen=True)
class Processing:
    """Which of TransformerLens's processing steps leave a model's predictions unchanged."""

    fold_ln: bool
    center_writing_weights: bool
    center_unembed: bool
    fold_value_biases: bool


def sound_processing(
    processing: bool, *, architecture: str | None, soft_cap: float | None, positions: str | None = None
) -> Processing:
    """Select the processing steps that leave a model's predictions unchanged.

    Args:
        processing: False selects none.
        architecture: Hugging Face's name, if it has one.
        soft_cap: the logits' soft-cap; None or a value up to 0 means there is none.
        positions: TransformerLens's name for the kind of position embedding.
    """
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    # Norms after a block depend on the mean and scale that centering and folding change. So do shortformer
    # positions, which are added after a norm.
    movable = processing and architecture not in POST_NORM_ARCHITECTURES and positions != "shortformer"
    # tanh(x - c) is not tanh(x) - c
    capped = soft_cap is not None and soft_cap > 0
    return Processing(
        fold_ln=movable,
        center_writing_weights=movable,
        center_unembed=processing and not capped and positions != "shortformer",
        fold_value_biases=processing,
    )


def hooked_from_hf(hf: HuggingFaceModel, *, processing: bool, dtype: torch.dtype, name: str) -> Any:
    """A HookedTransformer with a Hugging Face model's weights, on the CPU.

    The Hugging Face model loses its weights.

    Raises:
        ModelLoadError: HookedTransformer does not support this architecture, or one of its settings.
    """
    with quiet():
        from transformer_lens import HookedTransformer
        from transformer_lens import loading_from_pretrained as loading
        from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

        with tempfile.TemporaryDirectory(prefix="mechlens-") as neutral:
            if any(word in neutral.lower() for word in ("llama", "gemma")):
                raise ModelLoadError(
                    f"TransformerLens would guess the architecture from the path {neutral}: set TMPDIR to a "
                    "folder without a model's name in its path"
                )
            settings = _hooked_settings(hf.model.config, Path(neutral), loading)
            settings |= {
                "model_name": name,
                "tokenizer_name": None,
                "init_weights": False,
                "device": "cpu",
                "dtype": dtype,
            }
            cfg = HookedTransformerConfig.from_dict(settings)
            with torch.no_grad():
                state = loading.get_pretrained_state_dict(neutral, cfg, hf.model, dtype=dtype)
            hf.release()
        sound = sound_processing(
            processing, architecture=cfg.original_architecture, soft_cap=cfg.output_logits_soft_cap
        )
        model = HookedTransformer(cfg, hf.tokenizer, move_to_device=False)
        load_processed(model, state, sound)
    return model


@torch.no_grad()
def load_processed(model: Any, state: dict[str, torch.Tensor], sound: Processing) -> None:
    """Process weights and assign them to a HookedTransformer that has none yet.

    Args:
        state: the weights; emptied in the process.
    """
    given: dict[str, torch.Tensor] = {}
    # the engine would call it once per tensor, each time walking over all modules
    model.load_state_dict = lambda some, strict: given.update(some)
    try:
        with processing_by_blocks():
            model.load_and_process_state_dict(state, **dataclasses.asdict(sound))
    finally:
        del model.load_state_dict
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, tensor in given.items():
        # one at a time, so that views are released; some converters leave norms in float32
        tensor = tensor.detach().to(dtypes.get(name, tensor.dtype))
        given[name] = _in_forward_order(name, tensor, gated=getattr(model.cfg, "gated_mlp", False))
    model.load_state_dict(given, strict=False, assign=True)


def _in_forward_order(name: str, tensor: torch.Tensor, *, gated: bool) -> torch.Tensor:
    """A weight in the memory layout that HookedTransformer's forward pass needs; in any other, every forward
    pass would copy it."""
    kind = name.rsplit(".", 1)[-1]
    axes: tuple[int, ...] = tuple(range(tensor.ndim))
    if kind.lstrip("_") in ("W_Q", "W_K", "W_V") and tensor.ndim == 3:
        axes = (0, 2, 1)
    elif kind == "W_O" and tensor.ndim == 3:
        axes = (2, 0, 1)
    elif kind in ("W_in", "W_gate", "W_out") and tensor.ndim == 2 and gated:
        axes = (1, 0)
    back = [axes.index(axis) for axis in range(tensor.ndim)]
    return tensor.permute(axes).contiguous().permute(back)


def _hooked_settings(hf_config: Any, neutral: Path, loading: Any) -> dict[str, Any]:
    """HookedTransformer's settings for a Hugging Face configuration.

    TransformerLens takes some settings from the model's name and ignores others. Here all are read from the
    configuration.
    """
    architecture = hf_config.architectures[0]
    if architecture in _OWN_SETTINGS:
        settings = _OWN_SETTINGS[architecture](hf_config)
    else:
        if architecture == "GPT2LMHeadModel" and not hasattr(hf_config, "n_ctx"):
            hf_config.n_ctx = hf_config.n_positions
        hf_config.save_pretrained(neutral)
        try:
            settings = loading.convert_hf_model_config(str(neutral))
        except NotImplementedError:
            raise ModelLoadError(
                f"HookedTransformer does not support {architecture}: use backend='bridge', which supports "
                "more architectures"
            ) from None
    settings.setdefault("default_prepend_bos", True)
    # TransformerLens hard-codes the context length of some architectures
    settings["n_ctx"] = min(
        settings["n_ctx"], getattr(hf_config, "max_position_embeddings", None) or settings["n_ctx"]
    )
    if architecture == "GPT2LMHeadModel":
        settings["d_mlp"] = hf_config.n_inner or 4 * hf_config.n_embd
    if architecture == "GPTNeoForCausalLM":
        settings["d_mlp"] = hf_config.intermediate_size or 4 * hf_config.hidden_size
    head_dim = getattr(hf_config, "head_dim", None)
    if architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM") and head_dim:
        settings |= {"d_head": head_dim, "rotary_dim": head_dim}
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        settings["rotary_base"] = rope["rope_theta"]
    # checked here, because it may have no effect within the 16 tokens that predictions are compared on
    has = {"default"} | {_SCALINGS[name] for name in _SCALINGS if settings.get(name)}
    for each in rope_parameters(hf_config):
        if (kind := each.get("rope_type", "default")) not in has:
            raise ModelLoadError(
                f"HookedTransformer's {architecture} does not support {kind!r} scaling of rotary positions: "
                "use backend='bridge'"
            )
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or ()) and not settings.get(
        "use_local_attn"
    ):
        raise ModelLoadError(
            f"HookedTransformer's {architecture} does not support sliding-window attention: "
            "use backend='bridge'"
        )
    return dict(settings)


_SCALINGS = {"use_NTK_by_parts_rope": "llama3", "use_yarn_rope": "yarn"}
"""HookedTransformer's settings, with Hugging Face's names for them."""


def rope_parameters(hf_config: Any) -> list[dict[str, Any]]:
    """The settings of rotary positions: one for all layers, or one per layer type; empty without them."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]


def _gemma2_settings(hf_config: Any) -> dict[str, Any]:
    """TransformerLens supports Gemma-2, but takes its sizes from the model's name."""
    return _rotary_settings(hf_config, hf_config.head_dim, hf_config.head_dim) | {
        "n_key_value_heads": hf_config.num_key_value_heads,
        "eps": hf_config.rms_norm_eps,
        "act_fn": hf_config.hidden_activation,
        "normalization_type": "RMS",
        "attn_scale": hf_config.query_pre_attn_scalar**0.5,
        "window_size": hf_config.sliding_window,
        "use_local_attn": True,
        "attn_types": [
            "local" if kind == "sliding_attention" else "global" for kind in hf_config.layer_types
        ],
        "attn_scores_soft_cap": hf_config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": hf_config.final_logit_softcapping or -1.0,
        "gated_mlp": True,
        "final_rms": True,
        "use_normalization_before_and_after": True,
        "original_architecture": "Gemma2ForCausalLM",
    }


def _phi_settings(hf_config: Any) -> dict[str, Any]:
    """TransformerLens reads a setting by a name that transformers 5 has dropped."""
    d_head = hf_config.hidden_size // hf_config.num_attention_heads
    rotary_dim = int(hf_config.rope_parameters.get("partial_rotary_factor", 1.0) * d_head)
    return _rotary_settings(hf_config, d_head, rotary_dim) | {
        "eps": hf_config.layer_norm_eps,
        "act_fn": hf_config.hidden_act,
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "default_prepend_bos": False,
        "original_architecture": "PhiForCausalLM",
    }


def _rotary_settings(hf_config: Any, d_head: int, rotary_dim: int) -> dict[str, Any]:
    return {
        "d_model": hf_config.hidden_size,
        "d_head": d_head,
        "n_heads": hf_config.num_attention_heads,
        "d_mlp": hf_config.intermediate_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_ctx": hf_config.max_position_embeddings,
        "d_vocab": hf_config.vocab_size,
        "initializer_range": hf_config.initializer_range,
        "positional_embedding_type": "rotary",
        "rotary_dim": rotary_dim,
        "use_attn_scale": True,
    }


_OWN_SETTINGS = {"Gemma2ForCausalLM": _gemma2_settings, "PhiForCausalLM": _phi_settings}


def bridge_from_hf(hf: HuggingFaceModel, *, processing: bool, dtype: torch.dtype, directory: Path) -> Any:
    """A TransformerBridge in compatibility mode around a Hugging Face model, on the CPU.

    Raises:
        ModelLoadError: the bridge does not support this architecture.
    """
    architecture = hf.model.config.architectures[0]
    with quiet(), _hook_points_are_leaves():
        from transformer_lens.model_bridge import TransformerBridge

        try:
            model = TransformerBridge.boot_transformers(
                str(directory), hf_model=hf.model, tokenizer=hf.tokenizer, device="cpu", dtype=dtype
            )
        except ValueError as error:
            if "architecture" not in str(error).lower():
                raise
            raise ModelLoadError(f"TransformerBridge does not support {architecture}: {error}") from error
        sound = sound_processing(
            processing, architecture=architecture, soft_cap=getattr(model.cfg, "output_logits_soft_cap", None)
        )
        with processing_by_blocks():
            model.enable_compatibility_mode(
                disable_warnings=True, no_processing=not processing, **dataclasses.asdict(sound)
            )
    if "blocks.0.attn.hook_pattern" not in model.hook_dict:
        raise ModelLoadError(f"{architecture} is not supported: it has no attention patterns")
    return model


@contextlib.contextmanager
def _hook_points_are_leaves() -> Iterator[None]:
    """Keep a new bridge from searching inside hook points for more of them. Three quarters of all modules are
    hook points, and the search reads every attribute of each."""
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

    there: Any = sys.modules[TransformerBridge.__module__]
    there.dir = lambda module: () if isinstance(module, HookPoint) else dir(module)
    try:
        yield
    finally:
        del there.dir


def special_tokens(tokenizer: Any) -> dict[str, str | None]:
    """A tokenizer's BOS, EOS and padding tokens, before an engine fills in missing ones."""
    return {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}


def keep_special_tokens(model: Any, own: dict[str, str | None]) -> None:
    """Remove BOS and EOS tokens that an engine made up.

    A real EOS stays as padding, because the engines need it to tokenize several texts.
    """
    if own["eos_token"] is None:
        model.tokenizer.eos_token = None
        model.tokenizer.pad_token = own["pad_token"]
    if own["bos_token"] is None:
        model.tokenizer.bos_token = None
        model.cfg.default_prepend_bos = False
