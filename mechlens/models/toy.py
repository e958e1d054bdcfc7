"""Models in TransformerLens's own format: a HookedTransformerConfig in JSON beside its weights.

Attention-only models and others that Hugging Face has no class for come this way.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mechlens.models import engines, local
from mechlens.models.errors import ModelLoadError
from mechlens.models.protocol import Source, own_bos_token_id

_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


def is_toy(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is a HookedTransformerConfig."""
    return "model_type" not in config and {"d_model", "n_ctx"} <= config.keys()


def load_toy(
    directory: Path,
    config: dict[str, Any],
    name: str,
    engine: engines.Backend,
    processing: bool,
    dtype: torch.dtype,
) -> tuple[Any, Source]:
    """Load a directory in TransformerLens's own format; a tokenizer beside the weights is optional.

    Raises:
        ModelLoadError: the weights are missing, damaged or of other sizes, or the engine cannot run it.
    """
    tokenizer = None
    if local.has_tokenizer(directory):
        tokenizer = local.read_tokenizer(directory)
    bos = own_bos_token_id(tokenizer)
    specials = engines.special_tokens(tokenizer) if tokenizer else None
    if tokenizer:
        tokenizer = local.with_bos(tokenizer, directory)
    settings = _settings(config, name, dtype)
    weights = {key: value.to(dtype) for key, value in _read(directory, config).items()}
    build = _hooked if engine == "hooked" else _bridge
    with engines.quiet():
        try:
            model = build(settings, weights, tokenizer, processing)
        except ModelLoadError:
            raise
        except (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ModelLoadError(
                f"{directory}: the weights do not fit config.json, or {_ENGINES[engine]} has no such model "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
    if specials:
        engines.keep_special_tokens(model, specials)
    architecture = "attention-only" if config.get("attn_only") else "TransformerLens"
    return model, Source(name, None, architecture, processing, bos)


_ENGINES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}


def _settings(config: dict[str, Any], name: str, dtype: torch.dtype) -> dict[str, Any]:
    # A seed would be set for the whole program; a tokenizer's name would be looked up on the hub.
    drop = ("seed", "tokenizer_name", "n_params", "device", "dtype")
    settings = {key: value for key, value in config.items() if key not in drop}
    return settings | {"model_name": name, "init_weights": False, "device": "cpu", "dtype": dtype}


def _read(directory: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    file = directory / "model.safetensors"
    if not file.is_file():
        raise ModelLoadError(
            f"{directory} has no model.safetensors: save the state dict there with safetensors.torch.save_file"
        )
    local.check_safetensors(file)
    return load_file(file)


def _hooked(
    settings: dict[str, Any], weights: dict[str, torch.Tensor], tokenizer: Any, processing: bool
) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    known = {field.name for field in dataclasses.fields(HookedTransformerConfig)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ModelLoadError(f"config.json has settings that HookedTransformer does not know: {unknown}")
    cfg = HookedTransformerConfig.from_dict(settings)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    # The engine would fill gaps with zeros.
    expected = {key for key in model.state_dict() if key.rsplit(".", 1)[-1] not in _BUFFERS}
    missing = sorted(expected - weights.keys() - {"unembed.b_U"})
    if missing:
        raise ModelLoadError(f"the weights lack {len(missing)} tensors, such as {missing[0]}")
    sound = engines.sound_processing(
        processing,
        architecture=None,
        soft_cap=cfg.output_logits_soft_cap,
        positions=cfg.positional_embedding_type,
    )
    model.load_and_process_state_dict(weights, **dataclasses.asdict(sound))
    return model


def _bridge(
    settings: dict[str, Any], weights: dict[str, torch.Tensor], tokenizer: Any, processing: bool
) -> Any:
    try:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
    except ImportError:
        raise ModelLoadError(
            "this TransformerLens's bridge cannot read models in TransformerLens's own format: "
            "use backend='hooked', or install transformer-lens 4"
        ) from None
    if settings.get("positional_embedding_type") == "shortformer":
        raise ModelLoadError(
            "TransformerBridge has no shortformer positions: this model needs transformer-lens 3.9"
        )
    cfg = TransformerBridgeConfig.from_dict(settings | {"architecture": "TransformerLensNative"})
    model = TransformerBridge.boot_native(cfg, tokenizer=tokenizer, device="cpu", dtype=settings["dtype"])
    trained = {key: value for key, value in weights.items() if key.rsplit(".", 1)[-1] not in _BUFFERS}
    trained.setdefault("unembed.b_U", torch.zeros(cfg.d_vocab, dtype=settings["dtype"]))
    model.load_state_dict(convert_tl_checkpoint(trained, cfg), strict=True)
    sound = engines.sound_processing(
        processing, architecture=None, soft_cap=getattr(cfg, "output_logits_soft_cap", None)
    )
    model.enable_compatibility_mode(
        disable_warnings=True, no_processing=not processing, **dataclasses.asdict(sound)
    )
    return model
