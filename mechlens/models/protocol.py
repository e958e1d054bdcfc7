"""What an analysis may use of a model, whichever engine runs it."""

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
"""(name of the hook, function) pairs."""
Engine = Literal["HookedTransformer", "TransformerBridge"]
_RECORD = "_mechlens_source"


@runtime_checkable
class LensModel(Protocol):
    """The surface of HookedTransformer and TransformerBridge that behaves alike on both.

    A bridge must be in compatibility mode, as `load_model` leaves it: without that its hooks have
    other names. `W_K` and `W_V` of models with grouped heads have all heads on HookedTransformer and the
    key/value heads only on a bridge. Not here, because the engines differ: biases (a bridge of a model
    without has none), `start_at_layer`, `stop_at_layer`, `past_kv_cache`.
    `mechlens.models.run.forward` offers what analyses need of these.
    """

    cfg: Any
    """Sizes: `n_layers n_heads d_model d_head d_mlp d_vocab n_ctx`; also `device`, `dtype`."""
    tokenizer: Any
    """The Hugging Face tokenizer, or None. Its `bos_token_id` may be the engine's invention in a model
    that mechlens did not load: ask `mechlens.text.tokens.own_bos_token_id(model.tokenizer)`."""
    if TYPE_CHECKING:
        # Not at run time: a module's child is no attribute of the kind that Python 3.12 looks for when
        # it checks a protocol, which beartype does in the tests.
        blocks: Any
        """One module per layer."""

        # Nor these: to ask whether a model has them stacks the weights of all layers.
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
            """`[layer, head, d_model, d_head]`, see above for grouped heads."""

        @property
        def W_K(self) -> torch.Tensor:
            """`[layer, head, d_model, d_head]`, see above for grouped heads."""

        @property
        def W_O(self) -> torch.Tensor:
            """`[layer, head, d_head, d_model]`."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Every hook by its name, such as `blocks.0.attn.hook_pattern`."""

    def __call__(self, tokens: torch.Tensor, *, return_type: str | None = "logits", **options: Any) -> Any:
        """Logits `[batch, pos, d_vocab]`."""

    def to_tokens(self, text: str | list[str], *, prepend_bos: bool) -> torch.Tensor:
        """Text as `[batch, pos]` token ids."""

    def run_with_hooks(self, tokens: torch.Tensor, *, fwd_hooks: Hooks, **options: Any) -> Any:
        """One forward pass; a hook `(value, hook) -> value | None` sees or replaces an activation."""

    def run_with_cache(
        self, tokens: torch.Tensor, *, names_filter: Callable[[str], bool], **options: Any
    ) -> Any:
        """One forward pass: `(logits, cache)` with the activations whose names pass the filter."""

    def hooks(self, *, fwd_hooks: Hooks, **options: Any) -> AbstractContextManager[Any]:
        """Hooks that are gone when the `with` block ends, after an exception too."""

    def modules(self) -> Iterable[Any]:
        """All parts, itself included."""

    def parameters(self, recurse: bool = True) -> Iterable[torch.Tensor]:
        """All weights."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What only the loader knows of a model; kept on the model for `describe`."""

    name: str
    revision: str | None
    architecture: str
    processing: bool
    tied: bool
    """Whether the raw unembedding is the embedding, number for number."""
    quantization: str | None = None
    """As `ModelInfo` has it."""


def remember(model: Any, source: Source) -> None:
    """Note on a model where it came from."""
    setattr(model, _RECORD, source)


def recall(model: Any) -> Source | None:
    # Not getattr: a bridge passes unknown names on to the model it wraps.
    return vars(model).get(_RECORD)


def engine_of(model: object) -> Engine:
    """Which of TransformerLens's two engines runs a model.

    Raises:
        TypeError: it is neither a HookedTransformer nor a TransformerBridge.
    """
    for cls in type(model).__mro__:
        if cls.__module__.split(".")[0] == "transformer_lens":
            if cls.__name__ == "HookedTransformer":
                return "HookedTransformer"
            if cls.__name__ == "TransformerBridge":
                return "TransformerBridge"
    raise not_a_model(model)


def describe(model: Any) -> ModelInfo:
    """Say which model this is and in what state, for a result to carry.

    Works for models of `load_model` and for a HookedTransformer or bridge that the user made.

    Raises:
        TypeError: no such model.
    """
    from importlib.metadata import version

    engine = engine_of(model)
    cfg, source = model.cfg, recall(model)
    return ModelInfo(
        # A bridge booted from a directory has the whole path for a name.
        name=source.name if source else str(cfg.model_name).rstrip("/").rsplit("/", 1)[-1],
        revision=source.revision if source else None,
        architecture=source.architecture if source else _architecture(cfg),
        engine=engine,
        engine_version=version("transformer-lens"),
        processing=source.processing if source else _is_processed(model),
        dtype=str(model.W_E.dtype).removeprefix("torch."),
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        quantization=source.quantization if source else None,
    )


def _architecture(cfg: Any) -> str:
    if getattr(cfg, "attn_only", False):
        return "attention-only"
    return str(getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None) or "custom")


def _is_processed(model: Any) -> bool | None:
    """Whether norms are folded and the unembedding is centred; None when the signs disagree."""
    import torch

    W_U = model.W_U.detach().float()
    centred = bool(W_U.mean(-1).abs().max() < 1e-3 * W_U.abs().mean())
    if (getattr(model.cfg, "output_logits_soft_cap", None) or -1.0) > 0:
        return None  # such a model is never centred, so there is no second sign
    norm = getattr(model, "ln_final", None)
    # HookedTransformer drops the weights of a folded norm; a bridge keeps them at 1, as untrained ones are.
    weight = getattr(norm, "w", getattr(norm, "weight", None))
    if engine_of(model) == "HookedTransformer":
        folded = weight is None
    else:
        folded = weight is None or bool(torch.all(weight == 1))
    return folded if folded == centred else None
