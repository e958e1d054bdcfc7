"""From a Hugging Face model to one of TransformerLens's two engines.

No step looks anything up by the model's name: TransformerLens's own loaders do, over the network and by
guessing the architecture from words in a path.
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

from mechlens.errors import ModelLoadError
from mechlens.models.load.local import HuggingFaceModel
from mechlens.models.load.processing import processing_by_blocks

Backend = Literal["hooked", "bridge"]


def choose_backends(backend: str) -> tuple[Backend, ...]:
    """The engines to try with the installed TransformerLens, the preferred one first.

    Raises:
        ModelLoadError: no such engine, or the installed version lacks it.
    """
    from importlib.metadata import version

    installed = version("transformer-lens")
    has_hooked = int(installed.split(".")[0]) < 4
    if backend == "auto":
        return ("hooked", "bridge") if has_hooked else ("bridge",)
    if backend == "hooked" and not has_hooked:
        raise ModelLoadError(
            f"backend='hooked' needs HookedTransformer, which TransformerLens {installed} no longer has: "
            "use backend='bridge', or install transformer-lens 3.9"
        )
    if backend not in ("hooked", "bridge"):
        raise ModelLoadError(f"backend must be 'auto', 'hooked' or 'bridge', but is {backend!r}")
    return (backend,)  # type: ignore[return-value]  # mypy does not narrow by `in`


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the engine's prints and its log lines away from the user, and one warning that we answer for."""

    def not_the_engine(record: logging.LogRecord) -> bool:
        return "transformer_lens" not in record.pathname

    root = logging.getLogger()
    # Without any handler `logging.warning` would install one for the whole program.
    handler = logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(not_the_engine)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # Known: we support the versions that have it, and the bridge for those that do not.
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            # What is not folded is read off the norms; see `weights.norm_affine`.
            warnings.filterwarnings("ignore", ".* does not support (fold_ln|center_writing)", UserWarning)
            yield
    finally:
        root.removeFilter(not_the_engine)
        root.removeHandler(handler)


@dataclasses.dataclass(frozen=True)
class Processing:
    """Which of TransformerLens's changes to the weights are sound for a model."""

    fold_ln: bool
    center_writing_weights: bool
    center_unembed: bool
    fold_value_biases: bool


def sound_processing(
    processing: bool, *, architecture: str | None, soft_cap: float | None, positions: str | None = None
) -> Processing:
    """What processing may do without changing the model's predictions.

    Args:
        processing: whether any is wanted.
        architecture: the Hugging Face name, where there is one.
        soft_cap: of the logits; None or a value <= 0 is none.
        positions: TransformerLens's name for the kind of position embedding.
    """
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    # A norm after the block takes the mean and the scale of its output out by itself, and the shortformer
    # adds positions behind the norm: both see what folding and centring change.
    movable = processing and architecture not in POST_NORM_ARCHITECTURES and positions != "shortformer"
    # tanh of a shifted logit is no shifted tanh.
    capped = soft_cap is not None and soft_cap > 0
    return Processing(
        fold_ln=movable,
        center_writing_weights=movable,
        center_unembed=processing and not capped and positions != "shortformer",
        fold_value_biases=processing,
    )


def hooked_from_hf(hf: HuggingFaceModel, *, processing: bool, dtype: torch.dtype, name: str) -> Any:
    """A HookedTransformer with a Hugging Face model's weights, on the CPU. The Hugging Face model is let go
    of, tensor by tensor.

    Raises:
        ModelLoadError: HookedTransformer does not have this architecture or a feature of it.
    """
    with quiet():
        from transformer_lens import HookedTransformer
        from transformer_lens import loading_from_pretrained as loading
        from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

        with tempfile.TemporaryDirectory(prefix="mechlens-") as neutral:
            if any(word in neutral.lower() for word in ("llama", "gemma")):
                raise ModelLoadError(
                    f"TransformerLens would guess the architecture from the temporary folder {neutral}: "
                    "set TMPDIR to one without the name of a model in its path"
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
            hf.let_go()
        sound = sound_processing(
            processing, architecture=cfg.original_architecture, soft_cap=cfg.output_logits_soft_cap
        )
        model = HookedTransformer(cfg, hf.tokenizer, move_to_device=False)
        load_processed(model, state, sound)
    return model


@torch.no_grad()
def load_processed(model: Any, state: dict[str, torch.Tensor], sound: Processing) -> None:
    """Process weights and give them to a HookedTransformer, which has had none so far.

    Args:
        state: taken apart.
    """
    given: dict[str, torch.Tensor] = {}
    # the engine would call it once for each tensor, over all modules
    model.load_state_dict = lambda some, strict: given.update(some)
    try:
        with processing_by_blocks():
            model.load_and_process_state_dict(state, **dataclasses.asdict(sound))
    finally:
        del model.load_state_dict
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, tensor in given.items():
        # one at a time, so that each view is let go of; some converters leave norms in float32
        tensor = tensor.detach().to(dtypes.get(name, tensor.dtype))
        given[name] = _as_read(name, tensor, gated=getattr(model.cfg, "gated_mlp", False))
    model.load_state_dict(given, strict=False, assign=True)


def _as_read(name: str, tensor: torch.Tensor, *, gated: bool) -> torch.Tensor:
    """A weight in the order in memory that HookedTransformer's forward pass wants: one in another order is
    copied anew in every run."""
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

    The engine's own translation reads some settings from the model's name or not at all; they are taken
    from the configuration here.
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
                f"HookedTransformer has no {architecture}: use backend='bridge', which has more architectures"
            ) from None
    settings.setdefault("default_prepend_bos", True)
    # some architectures have the same context whatever the model's is
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
    # Seen here, because 16 tokens would not show what begins beyond a limit; some layers may have their own.
    has = {"default"} | {_SCALINGS[name] for name in _SCALINGS if settings.get(name)}
    for each in rope_parameters(hf_config):
        if (kind := each.get("rope_type", "default")) not in has:
            raise ModelLoadError(
                f"HookedTransformer's {architecture} has no {kind!r} scaling of rotary positions: "
                "use backend='bridge'"
            )
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or ()) and not settings.get(
        "use_local_attn"
    ):
        raise ModelLoadError(
            f"HookedTransformer's {architecture} has no sliding attention window: use backend='bridge'"
        )
    return dict(settings)


_SCALINGS = {"use_NTK_by_parts_rope": "llama3", "use_yarn_rope": "yarn"}
"""HookedTransformer's settings, and Hugging Face's names for what they stand for."""


def rope_parameters(hf_config: Any) -> list[dict[str, Any]]:
    """How a model rotates positions: once for all layers, or for each type of layer; empty if it does not."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]


def _gemma2_settings(hf_config: Any) -> dict[str, Any]:
    """The engine has Gemma-2's parts and converts its weights, but knows its sizes by name only."""
    return {
        "d_model": hf_config.hidden_size,
        "d_head": hf_config.head_dim,
        "n_heads": hf_config.num_attention_heads,
        "n_key_value_heads": hf_config.num_key_value_heads,
        "d_mlp": hf_config.intermediate_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_ctx": hf_config.max_position_embeddings,
        "eps": hf_config.rms_norm_eps,
        "d_vocab": hf_config.vocab_size,
        "act_fn": hf_config.hidden_activation,
        "initializer_range": hf_config.initializer_range,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": hf_config.head_dim,
        "use_attn_scale": True,
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
    """The engine asks for a setting by a name that transformers 5 no longer has."""
    d_head = hf_config.hidden_size // hf_config.num_attention_heads
    return {
        "d_model": hf_config.hidden_size,
        "d_head": d_head,
        "n_heads": hf_config.num_attention_heads,
        "d_mlp": hf_config.intermediate_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_ctx": hf_config.max_position_embeddings,
        "eps": hf_config.layer_norm_eps,
        "d_vocab": hf_config.vocab_size,
        "act_fn": hf_config.hidden_act,
        "initializer_range": hf_config.initializer_range,
        "normalization_type": "LN",
        "positional_embedding_type": "rotary",
        "rotary_dim": int(hf_config.rope_parameters.get("partial_rotary_factor", 1.0) * d_head),
        "use_attn_scale": True,
        "parallel_attn_mlp": True,
        "default_prepend_bos": False,
        "original_architecture": "PhiForCausalLM",
    }


_OWN_SETTINGS = {"Gemma2ForCausalLM": _gemma2_settings, "PhiForCausalLM": _phi_settings}


def bridge_from_hf(hf: HuggingFaceModel, *, processing: bool, dtype: torch.dtype, directory: Path) -> Any:
    """A bridge in compatibility mode around a Hugging Face model, which it takes over, on the CPU.

    Raises:
        ModelLoadError: the bridge does not have this architecture.
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
            raise ModelLoadError(f"TransformerBridge has no {architecture}: {error}") from error
        sound = sound_processing(
            processing,
            architecture=architecture,
            soft_cap=getattr(model.cfg, "output_logits_soft_cap", None),
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
    """Until the block ends, a bridge that looks through all that its modules have for hook points looks not
    into hook points themselves: three in four modules are some, and each would be asked for all its names."""
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

    there: Any = sys.modules[TransformerBridge.__module__]
    there.dir = lambda module: () if isinstance(module, HookPoint) else dir(module)
    try:
        yield
    finally:
        del there.dir


def special_tokens(tokenizer: Any) -> dict[str, str | None]:
    """A tokenizer's own BOS, EOS and padding, before an engine fills the gaps."""
    return {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}


def keep_special_tokens(model: Any, own: dict[str, str | None]) -> None:
    """Take back the BOS and EOS that an engine invented.

    Padding with a real EOS stays, because the engines cannot tokenize several texts without.
    """
    if own["eos_token"] is None:
        model.tokenizer.eos_token = None
        model.tokenizer.pad_token = own["pad_token"]
    if own["bos_token"] is None:
        model.tokenizer.bos_token = None
        model.cfg.default_prepend_bos = False
