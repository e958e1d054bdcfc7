"""The model interface that analyses use, the same on both of TransformerLens's engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from mechlens.arguments import not_a_model
from mechlens.results import ModelInfo

if TYPE_CHECKING:
    import torch

Hooks = Sequence[tuple[str, Callable[..., Any]]]
"""(hook name, function) pairs."""
Engine = Literal["HookedTransformer", "TransformerBridge"]
_RECORD = "_mechlens_provenance"


@runtime_checkable
class LensModel(Protocol):
    """The members that HookedTransformer and TransformerBridge share and that behave the same on both.

    A bridge must be in compatibility mode, as `load_model` returns it; otherwise its hooks have different
    names.
    With grouped-query attention, `W_K` and `W_V` have one entry per query head on HookedTransformer and one
    per key/value head on a bridge. Biases, `start_at_layer`, `stop_at_layer` and `past_kv_cache` are left out
    because the engines differ; `mechlens.models.run.forward` provides what analyses need of them.
    """

    cfg: Any
    """Sizes: `n_layers n_heads d_model d_head d_mlp d_vocab n_ctx`; also `device`, `dtype`."""
    tokenizer: Any
    """The Hugging Face tokenizer, or None. If mechlens did not load the model, `bos_token_id` may have been
    made up by the engine: use `mechlens.text.tokens.own_bos_token_id(model.tokenizer)`."""
    if TYPE_CHECKING:
        # Not at run time: Python 3.12's protocol check, which beartype runs in the tests, does not see a
        # module's children.
        blocks: Any
        """One module per layer."""

        # Nor these: checking that a model has them would stack the weights of all layers.
        @property
        def W_E(self) -> torch.Tensor:
            """`[d_vocab, d_model]`."""

        @property
        def W_U(self) -> torch.Tensor:
            """`[d_model, d_vocab]`."""

        @property
        def b_U(self) -> torch.Tensor:
            """`[d_vocab]`."""

        @property
        def W_Q(self) -> torch.Tensor:
            """`[layer, head, d_model, d_head]`."""

        @property
        def W_V(self) -> torch.Tensor:
            """`[layer, head, d_model, d_head]`; see above for grouped-query attention."""

        @property
        def W_K(self) -> torch.Tensor:
            """`[layer, head, d_model, d_head]`; see above for grouped-query attention."""

        @property
        def W_O(self) -> torch.Tensor:
            """`[layer, head, d_head, d_model]`."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """All hook points by name, such as `blocks.0.attn.hook_pattern`."""

    def __call__(self, tokens: torch.Tensor, *, return_type: str | None = "logits", **options: Any) -> Any:
        """Logits `[batch, pos, d_vocab]`."""

    def to_tokens(self, text: str | list[str], *, prepend_bos: bool) -> torch.Tensor:
        """Token ids `[batch, pos]`."""

    def run_with_hooks(self, tokens: torch.Tensor, *, fwd_hooks: Hooks, **options: Any) -> Any:
        """One forward pass. A hook `(value, hook) -> value | None` reads or replaces an activation."""

    def run_with_cache(
        self, tokens: torch.Tensor, *, names_filter: Callable[[str], bool], **options: Any
    ) -> Any:
        """One forward pass: `(logits, cache)` with the activations whose names pass the filter."""

    def hooks(self, *, fwd_hooks: Hooks, **options: Any) -> AbstractContextManager[Any]:
        """Add hooks until the `with` block ends, even if it raises."""

    def modules(self) -> Iterable[Any]:
        """All modules, the model itself included."""

    def parameters(self, recurse: bool = True) -> Iterable[torch.Tensor]:
        """All weights."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What only the loader knows about a model, stored on the model for `describe`."""

    name: str
    revision: str | None
    architecture: str
    processing: bool
    tied: bool
    """Whether the unprocessed unembedding equals the embedding."""
    quantization: str | None = None
    """As in `ModelInfo`."""


def set_provenance(model: Any, provenance: Provenance) -> None:
    setattr(model, _RECORD, provenance)


def provenance_of(model: Any) -> Provenance | None:
    # not getattr: a bridge looks up unknown names in the model it wraps
    return vars(model).get(_RECORD)


def engine_of(model: object) -> Engine:
    """The TransformerLens engine that a model runs on.

    Raises:
        TypeError: the model is neither a HookedTransformer nor a TransformerBridge.
    """
    for cls in type(model).__mro__:
        if cls.__module__.split(".")[0] == "transformer_lens":
            if cls.__name__ == "HookedTransformer":
                return "HookedTransformer"
            if cls.__name__ == "TransformerBridge":
                return "TransformerBridge"
    raise not_a_model(model)


def describe(model: Any) -> ModelInfo:
    """The facts about a model that every result records.

    Works for models from `load_model` and for any other HookedTransformer or TransformerBridge.

    Raises:
        TypeError: the model is neither of these.
    """
    from importlib.metadata import version

    engine = engine_of(model)
    cfg, known = model.cfg, provenance_of(model)
    return ModelInfo(
        # a bridge made from a directory has the whole path as its name
        name=known.name if known else str(cfg.model_name).rstrip("/").rsplit("/", 1)[-1],
        revision=known.revision if known else None,
        architecture=known.architecture if known else _architecture(cfg),
        engine=engine,
        engine_version=version("transformer-lens"),
        processing=known.processing if known else _is_processed(model),
        dtype=str(model.W_E.dtype).removeprefix("torch."),
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        quantization=known.quantization if known else None,
    )


def _architecture(cfg: Any) -> str:
    if getattr(cfg, "attn_only", False):
        return "attention-only"
    return str(getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None) or "custom")


def _is_processed(model: Any) -> bool | None:
    """Whether norms are folded and the unembedding is centered; None if only one is true."""
    import torch

    W_U = model.W_U.detach().float()
    centered = bool(W_U.mean(-1).abs().max() < 1e-3 * W_U.abs().mean())
    if (getattr(model.cfg, "output_logits_soft_cap", None) or -1.0) > 0:
        return None  # the unembedding of such a model is never centered
    norm = getattr(model, "ln_final", None)
    # HookedTransformer drops the weights of a folded norm; a bridge sets them to 1, as before training
    weight = getattr(norm, "w", getattr(norm, "weight", None))
    if engine_of(model) == "HookedTransformer":
        folded = weight is None
    else:
        folded = weight is None or bool(torch.all(weight == 1))
    return folded if folded == centered else None
