"""Load models in TransformerLens's own format: weights with a HookedTransformerConfig in JSON.

The format is for models that transformers has no class for, such as attention-only models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mechlens.errors import ModelLoadError
from mechlens.models.load import engines, hub, local
from mechlens.models.load.verification import Reference, check_converted
from mechlens.models.protocol import Provenance

BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


def is_own(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is a HookedTransformerConfig."""
    return "model_type" not in config and {"d_model", "n_ctx"} <= config.keys()


def load(
    directory: Path,
    config: dict[str, Any],
    name: str,
    engine: engines.Backend,
    processing: bool,
    dtype: torch.dtype,
) -> tuple[Any, Provenance, Reference]:
    """Load a directory in TransformerLens's own format, with or without a tokenizer.

    Raises:
        ModelLoadError: the weights are missing, damaged or do not fit the configuration, or the engine does
            not support the model.
    """
    tokenizer = None
    at = _tokenizer_directory(directory, config)
    if at is not None:
        tokenizer = local.read_tokenizer(at)
    specials = engines.special_tokens(tokenizer) if tokenizer else None
    settings = settings_of(config, name, dtype)
    weights = {key: value.to(dtype) for key, value in read_weights(directory, config).items()}
    _check_names(directory, weights.keys(), settings)
    build = _hooked if engine == "hooked" else _bridge

    def made(dtype: torch.dtype, processing: bool) -> Any:
        given = {key: value.to(dtype) for key, value in weights.items()}
        return build(settings | {"dtype": dtype}, given, tokenizer, processing).eval()

    what = f"{_ENGINES[engine]} does not support {directory}, or the weights do not fit its config.json"
    with engines.quiet(), local.load_errors(what):
        tokens = torch.arange(min(settings["n_ctx"], settings["d_vocab"], 16))[None]
        model = made(dtype, False)
        with torch.no_grad():
            wide = made(torch.promote_types(dtype, torch.float32), False)
            reference = Reference.of(tokens, wide(tokens), model(tokens))
        if processing:
            model = made(dtype, True)
            check_converted(model, reference, advice=": use processing=False")
    if specials:
        engines.keep_special_tokens(model, specials)
    architecture = "attention-only" if config.get("attn_only") else "TransformerLens"
    tied = torch.equal(weights["embed.W_E"], weights["unembed.W_U"].T)
    return model, Provenance(name, None, architecture, processing, tied), reference


_ENGINES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}


def _tokenizer_directory(directory: Path, config: dict[str, Any]) -> Path | None:
    if local.has_tokenizer(directory):
        return directory
    # only a model from the hub may trigger another download
    if config.get("tokenizer_name") and next(directory.glob(hub.LEGACY_WEIGHTS), None) is not None:
        return hub.fetch_tokenizer(config["tokenizer_name"])
    return None


def settings_of(config: dict[str, Any], name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A HookedTransformerConfig's settings, without those that must not come from a file."""
    # a seed would be set for the whole program, and a tokenizer's name looked up on the hub
    drop = ("seed", "tokenizer_name", "n_params", "device", "dtype")
    settings = {key: value for key, value in config.items() if key not in drop}
    if "normalization" in config or "shortformer_pos" in config:
        # an older naming, mixed with training settings
        sizes = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab")
        settings = {key: config[key] for key in (*sizes, "act_fn", "attn_only") if key in config}
        settings["normalization_type"] = config.get("normalization", config.get("normalization_type"))
        settings["final_rms"] = config.get("final_rms", False)
        if config.get("shortformer_pos"):
            settings["positional_embedding_type"] = "shortformer"
    if settings.get("attn_only"):
        # some files name an activation anyway, and the engine would look for its norm
        settings["act_fn"] = None
    return settings | {"model_name": name, "init_weights": False, "device": "cpu", "dtype": dtype}


def read_weights(directory: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a directory in TransformerLens's own format.

    Raises:
        ModelLoadError: there are none, or they are damaged.
    """
    from safetensors.torch import load_file

    file = directory / "model.safetensors"
    if file.is_file():
        local.check_safetensors(file)
        return load_file(file)
    pickled = next(directory.glob(hub.LEGACY_WEIGHTS), None)
    if pickled is None:
        raise ModelLoadError(
            f"{directory} has no model.safetensors: save the state dict there with safetensors' save_file"
        )
    if config.get("architecture", "neel") != "neel" or "_old" in pickled.name:
        raise ModelLoadError(
            f"{pickled.name} is in an old format of TransformerLens: load it with TransformerLens "
            "and pass the model to mechlens"
        )
    return local.read_pickle(pickled)


def _check_names(directory: Path, given: Collection[str], settings: dict[str, Any]) -> None:
    """Check that no tensor is missing or left over; HookedTransformer would fill gaps with zeros."""
    expected = _expected_names(settings)
    missing = sorted(expected - set(given))
    if missing:
        raise ModelLoadError(
            f"the weights in {directory} lack {len(missing)} tensors that config.json requires, such as "
            f"{missing[0]}"
        )
    left = {name for name in set(given) - expected if name.rsplit(".", 1)[-1] not in BUFFERS}
    left -= {"unembed.b_U"}
    if left:
        raise ModelLoadError(
            f"the weights in {directory} have {len(left)} tensors beyond those of config.json, such as "
            f"{min(left)}"
        )


def _expected_names(settings: dict[str, Any]) -> set[str]:
    norm = settings.get("normalization_type", "LN")
    of_norm = {"LN": ("w", "b"), "RMS": ("w",)}.get(norm, ())
    grouped = "_" if settings.get("n_key_value_heads") else ""
    parts = ["attn.W_Q", "attn.b_Q", "attn.W_O", "attn.b_O"]
    parts += [f"attn.{grouped}{kind}_{name}" for kind in "Wb" for name in "KV"]
    parts += [f"ln1.{name}" for name in of_norm]
    if not settings.get("attn_only"):
        parts += ["mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"]
        parts += ["mlp.W_gate"] if settings.get("gated_mlp") else []
        parts += [f"ln2.{name}" for name in of_norm]
        if str(settings.get("act_fn")).endswith("_ln"):
            parts += [f"mlp.ln.{name}" for name in of_norm]
    final = of_norm[:1] if settings.get("final_rms") else of_norm
    names = {"embed.W_E", "unembed.W_U", *(f"ln_final.{name}" for name in final)}
    if settings.get("positional_embedding_type", "standard") != "rotary":
        names.add("pos_embed.W_pos")
    return names | {f"blocks.{layer}.{part}" for layer in range(settings["n_layers"]) for part in parts}


def _hooked(
    settings: dict[str, Any], weights: dict[str, torch.Tensor], tokenizer: Any, processing: bool
) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    known = {field.name for field in dataclasses.fields(HookedTransformerConfig)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ModelLoadError(
            f"HookedTransformer does not know these settings in config.json: {', '.join(unknown)}"
        )
    cfg = HookedTransformerConfig.from_dict(settings)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    sound = engines.sound_processing(
        processing,
        architecture=None,
        soft_cap=cfg.output_logits_soft_cap,
        positions=cfg.positional_embedding_type,
    )
    engines.load_processed(model, weights, sound)
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
            "the bridge of this version cannot load TransformerLens's own format: use backend='hooked', or "
            "install transformer-lens 4"
        ) from None
    if settings.get("positional_embedding_type") == "shortformer":
        raise ModelLoadError(
            "TransformerBridge does not support shortformer positions: install transformer-lens 3.9"
        )
    cfg = TransformerBridgeConfig.from_dict(settings | {"architecture": "TransformerLensNative"})
    model = TransformerBridge.boot_native(cfg, tokenizer=tokenizer, device="cpu", dtype=settings["dtype"])
    trained = {key: value for key, value in weights.items() if key.rsplit(".", 1)[-1] not in BUFFERS}
    trained.setdefault("unembed.b_U", torch.zeros(cfg.d_vocab, dtype=settings["dtype"]))
    model.load_state_dict(convert_tl_checkpoint(trained, cfg), strict=True)
    sound = engines.sound_processing(
        processing, architecture=None, soft_cap=getattr(cfg, "output_logits_soft_cap", None)
    )
    model.enable_compatibility_mode(
        disable_warnings=True, no_processing=not processing, **dataclasses.asdict(sound)
    )
    return model
