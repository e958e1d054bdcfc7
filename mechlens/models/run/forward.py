"""Forward passes that pass on single activations as they are computed and keep nothing else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.user_hooks import alone, every_module, user_hooks
from mechlens.progress import note_run

MAX_POSITIONS = 16384
"""Positions (rows x length) in one forward pass; larger batches are run in parts."""


class StopForward(Exception):
    """Raised by a hook to stop the forward pass once all activations have been read.

    This skips the later layers and, on a bridge, all logits.
    """


def run(model: LensModel, given: Tensor, **options: Any) -> None:
    """Run the model for its hooks, until the end or until one of them raises `StopForward`."""
    given = given.to(model.cfg.device)
    note_run(model, *given.shape[:2])
    with contextlib.suppress(StopForward):
        model(given, return_type=None, **(seen_whole(model, given) | options))


def seen_whole(model: LensModel, given: Tensor) -> dict[str, Tensor]:
    """The options that keep an engine from masking tokens.

    With a tokenizer that pads on the left, HookedTransformer would treat leading padding ids as padding, but
    only the caller knows what is padding.
    """
    if (
        given.is_floating_point()
        or getattr(model.tokenizer, "padding_side", None) != "left"
        or engine_of(model) != "HookedTransformer"
    ):
        return {}
    return {"attention_mask": torch.ones_like(given)}


def watch(
    model: LensModel, tokens: Int[Tensor, "batch pos"], readers: Mapping[str, Callable[[Tensor], None]]
) -> None:
    """Run the model once and pass each named activation to its reader as soon as it is computed.

    An activation is freed when its reader returns, unless the reader keeps it. The forward pass stops after
    the last reader, so later layers and the unembedding cost nothing. All hooks are removed, even if a reader
    raises.

    Args:
        readers: by hook name, such as `blocks.0.attn.hook_pattern`. Readers must not modify activations.

    Raises:
        ValueError: a hook that this model does not have or never calls, or token ids out of range.

    Cost: one forward pass, up to the deepest activation that is read.
    """
    check_tokens(model, tokens)
    serve(model, tokens, readers)


def runs_blocks_alone(model: LensModel) -> bool:
    """Whether `watch_from` runs only the blocks from a layer on; a bridge also runs the earlier ones."""
    return engine_of(model) == "HookedTransformer"


def watch_from(
    model: LensModel,
    layer: int,
    residual: Float[Tensor, "batch pos d_model"],
    readers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Run the blocks from `layer` on, with a given residual stream as their `resid_pre`; see `watch`.

    Args:
        readers: by hook name; none in the blocks before `layer`.

    Raises:
        ValueError: a model whose blocks read more than the residual stream, a model with user hooks (which
            would act twice), or a hook that the model does not have.

    Cost: the blocks from `layer` up to the deepest activation that is read. A bridge also runs the earlier
    blocks and discards their results.
    """
    if getattr(model.cfg, "positional_embedding_type", None) == "shortformer":
        raise ValueError(
            "this model adds positions in each block (shortformer), so a run cannot start at a middle layer"
        )
    hooks = user_hooks(model)
    if hooks:
        raise ValueError(
            f"your hook at {hooks[0]} would act a second time when blocks are run again: remove it with "
            "model.reset_hooks(including_permanent=True)"
        )
    try:
        serve(model, residual, readers, start_at_layer=layer)
    except NotImplementedError as error:
        raise ValueError(
            "this engine cannot start a run at a middle layer: use transformer-lens 4, or backend='hooked'"
        ) from error


def serve(
    model: LensModel, given: Tensor, readers: Mapping[str, Callable[[Tensor], None]], **options: Any
) -> None:
    """`watch`, for any input and options that the engine accepts."""
    waiting = set(readers)

    # the engine may use an alias for the hook point, so each hook keeps the requested name
    def hand_out(activation: Tensor, hook: Any, name: str) -> None:
        readers[name](activation)
        waiting.discard(name)
        if not waiting:
            raise StopForward

    hooks = [(name, partial(hand_out, name=name)) for name in readers]
    with running(model, hooks):
        run(model, given, **options)
    if waiting:
        # HookedTransformer has `hook_mlp_out` even in a model without MLPs
        raise ValueError(f"this model never calls the hook point {min(waiting)!r}")


@contextlib.contextmanager
def running(
    model: LensModel, hooks: Sequence[tuple[str, Callable[..., Any]]], *, gradients: bool = False
) -> Iterator[None]:
    """Add hooks until the block ends, without dropout and, by default, without gradients.

    Meanwhile no other thread can run the model through this package, and the user's own runs in other threads
    do not call the hooks.
    """
    owner = threading.get_ident()

    def ours(function: Callable[..., Any]) -> Callable[..., Any]:
        def in_this_thread(activation: Tensor, hook: Any) -> Any:
            return function(activation, hook=hook) if threading.get_ident() == owner else None

        return in_this_thread

    with (
        alone(model),
        torch.inference_mode(not gradients),
        torch.set_grad_enabled(gradients),
        _evaluating(model),
        _without_graphs(model) if gradients else contextlib.nullcontext(),
        _hooked(model, [(name, ours(function)) for name, function in hooks]),
    ):
        yield


@contextlib.contextmanager
def _hooked(model: LensModel, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """`model.hooks`, but that collects all hook points for each hook on TransformerLens 3.9's bridge."""
    points = model.hook_dict if hooks else {}
    unknown = sorted({name for name, _ in hooks} - set(points))
    if unknown:
        raise ValueError(f"this model has no hook point {unknown[0]!r}: see model.hook_dict")
    added = []
    try:
        for name, function in hooks:
            points[name].add_hook(function)
            added.append((points[name], points[name].fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks = [each for each in point.fwd_hooks if each is not handle]


@contextlib.contextmanager
def _without_graphs(model: LensModel) -> Iterator[None]:
    """Afterwards, detach what modules keep; a bridge's attention keeps its last pattern with its graph."""
    try:
        yield
    finally:
        for kept, name, value in kept_graphs(model):
            kept[name] = value.detach()


def kept_graphs(model: Any) -> list[tuple[dict[str, Any], str, Tensor]]:
    """(attributes of a module, name, activation) for every activation that a module keeps with its graph."""
    return [
        (vars(module), name, value)
        for module in every_module(model)
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


@contextlib.contextmanager
def _evaluating(model: LensModel) -> Iterator[None]:
    """Switch off dropout, which would make results random, and restore the modes afterwards."""
    training = [module for module in every_module(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_tokens(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Check that the model can be run on tokens.

    Raises:
        ValueError: no tokens, ids out of range, or more tokens than fit into the context.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [batch, pos] with at least one token, got {tuple(tokens.shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is not in the model's vocabulary of {model.cfg.d_vocab}")
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(
            f"{tokens.shape[1]} tokens do not fit into the model's context of {model.cfg.n_ctx}: pass fewer"
        )


def read_patterns(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    reader: Callable[[int, Float[Tensor, "batch head dest src"]], None],
    *,
    layers: Iterable[int] | None = None,
    cache: Any = None,
) -> None:
    """Pass the attention patterns of all or some layers to `reader(layer, pattern)`; see `watch`.

    Args:
        cache: an `ActivationCache` of these tokens, or any mapping from hook names to activations. The model
            is then not run.

    Raises:
        ValueError: token ids out of range, or a cache from other tokens.
    """
    wanted = pattern_readers(model, reader, layers)
    if cache is None:
        watch(model, tokens, wanted)
        return
    for name, read in wanted.items():
        pattern = cache[name]
        if pattern.ndim == 3:  # from `remove_batch_dim=True`
            pattern = pattern[None]
        n_pos = tokens.shape[1]
        if pattern.shape != (len(tokens), model.cfg.n_heads, n_pos, n_pos):
            raise ValueError(
                f"the cache has patterns {tuple(pattern.shape)}, but the tokens are {tuple(tokens.shape)}: "
                "make both from the same token ids (text gets a BOS unless prepend_bos=False)"
            )
        read(pattern)


def pattern_readers(
    model: LensModel,
    reader: Callable[[int, Float[Tensor, "batch head dest src"]], None],
    layers: Iterable[int] | None = None,
) -> dict[str, Callable[[Tensor], None]]:
    """Readers for `watch` that pass the patterns of all or some layers to `reader(layer, pattern)`."""
    return {
        f"blocks.{layer}.attn.hook_pattern": partial(reader, layer)
        for layer in (range(model.cfg.n_layers) if layers is None else layers)
    }


def parts(tokens: Int[Tensor, "batch pos"]) -> tuple[Int[Tensor, "part pos"], ...]:
    """Split a batch into parts that fit into one forward pass each."""
    return tokens.split(max(1, MAX_POSITIONS // max(1, tokens.shape[1])))
