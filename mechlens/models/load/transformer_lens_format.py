"""Models in TransformerLens's own format: a HookedTransformerConfig in JSON beside its weights.

Attention-only models and others that Hugging Face has no class for come this way.
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
from mechlens.models.protocol import Source

BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


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
) -> tuple[Any, Source, Reference]:
    """Load a directory in TransformerLens's own format; a tokenizer beside the weights is optional.

    Raises:
        ModelLoadError: the weights are missing, damaged or of other sizes, or the engine cannot run it.
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

    with engines.quiet():
        try:
            tokens = torch.arange(min(settings["n_ctx"], settings["d_vocab"], 16))[None]
            model = made(dtype, False)
            with torch.no_grad():
                wide = made(torch.promote_types(dtype, torch.float32), False)
                reference = Reference.of(tokens, wide(tokens), model(tokens))
            if processing:
                model = made(dtype, True)
                check_converted(model, reference, advice=": use processing=False")
        except ModelLoadError:
            raise
        except Exception as error:  # of any kind: the engines check little and fail where they stand
            raise ModelLoadError(
                f"{directory}: the weights do not fit config.json, or {_ENGINES[engine]} has no such model "
                f"({local.first_line(error)})"
            ) from error
    if specials:
        engines.keep_special_tokens(model, specials)
    architecture = "attention-only" if config.get("attn_only") else "TransformerLens"
    tied = torch.equal(weights["embed.W_E"], weights["unembed.W_U"].T)
    return model, Source(name, None, architecture, processing, tied), reference


_ENGINES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}


def _tokenizer_directory(directory: Path, config: dict[str, Any]) -> Path | None:
    if local.has_tokenizer(directory):
        return directory
    # Only what came from the hub may ask the hub.
    if config.get("tokenizer_name") and next(directory.glob(hub.LEGACY_WEIGHTS), None) is not None:
        return hub.fetch_tokenizer(config["tokenizer_name"])
    return None


def settings_of(config: dict[str, Any], name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A HookedTransformerConfig's settings, less what must not come from a file."""
    # A seed would be set for the whole program; a tokenizer's name would be looked up on the hub.
    drop = ("seed", "tokenizer_name", "n_params", "device", "dtype")
    settings = {key: value for key, value in config.items() if key not in drop}
    if "normalization" in config or "shortformer_pos" in config:
        # The older spelling, among settings of the training.
        shared = (
            "d_model",
            "n_layers",
            "d_mlp",
            "d_head",
            "n_heads",
            "n_ctx",
            "d_vocab",
            "act_fn",
            "attn_only",
        )
        settings = {key: config[key] for key in shared if key in config}
        settings["normalization_type"] = config.get("normalization", config.get("normalization_type"))
        settings["final_rms"] = config.get("final_rms", False)
        if config.get("shortformer_pos"):
            settings["positional_embedding_type"] = "shortformer"
    if settings.get("attn_only"):
        # Some name an activation all the same, and the engine looks for the norm that belongs to it.
        settings["act_fn"] = None
    return settings | {"model_name": name, "init_weights": False, "device": "cpu", "dtype": dtype}


def read_weights(directory: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights beside a HookedTransformerConfig.

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
            f"{pickled.name} is in one of TransformerLens's abandoned formats: load it with TransformerLens "
            "itself and give the model to mechlens"
        )
    return local.read_pickle(pickled)


def _check_names(directory: Path, given: Collection[str], settings: dict[str, Any]) -> None:
    """See that every tensor has its place: HookedTransformer would fill gaps with zeros."""
    expected = _expected_names(settings)
    missing = sorted(expected - set(given))
    if missing:
        raise ModelLoadError(
            f"{directory}: the weights lack {len(missing)} tensors that config.json has a place for, "
            f"such as {missing[0]}"
        )
    left = {name for name in set(given) - expected if name.rsplit(".", 1)[-1] not in BUFFERS}
    left -= {"unembed.b_U"}
    if left:
        raise ModelLoadError(
            f"{directory}: config.json has no place for {len(left)} tensors of the weights, "
            f"such as {min(left)}"
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
        raise ModelLoadError(f"config.json has settings that HookedTransformer does not know: {unknown}")
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
            "this TransformerLens's bridge cannot read models in TransformerLens's own format: "
            "use backend='hooked', or install transformer-lens 4"
        ) from None
    if settings.get("positional_embedding_type") == "shortformer":
        raise ModelLoadError(
            "TransformerBridge has no shortformer positions: this model needs transformer-lens 3.9"
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
