"""Running models: only the activations that are asked for, handed out as they are made."""

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

MAX_POSITIONS = 16384
"""Positions (rows x length) in one forward pass; longer batches are run in parts."""


class Enough(Exception):
    """Raised by a hook to end a run whose rest nobody reads: later layers and, on a bridge, all logits."""


def run(model: LensModel, given: Tensor, **options: Any) -> None:
    """Run the model, for its hooks, until the end or until one of them has had `Enough`."""
    given = given.to(model.cfg.device)
    with contextlib.suppress(Enough):
        model(given, return_type=None, **(seen_whole(model, given) | options))


def seen_whole(model: LensModel, given: Tensor) -> dict[str, Tensor]:
    """What keeps an engine from hiding tokens: HookedTransformer takes leading ids that equal the padding
    token for padding where its tokenizer pads on the left, and what is padding, only the caller knows."""
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
    """Run the model once and hand each named activation to its reader the moment it is made.

    Nothing is kept: an activation is freed when its reader returns, unless the reader keeps it. The
    run ends when the last reader has been served, so later layers and the unembedding cost nothing.

    Args:
        readers: by hook name, such as `blocks.0.attn.hook_pattern`. Readers must not change what
            they are given.

    Raises:
        ValueError: a hook name that this model does not have, or at which it makes nothing, or token ids out
            of range.

    Cost: one forward pass, up to the deepest activation that is read. No hook is left behind, also
    when a reader raises.
    """
    check_tokens(model, tokens)
    serve(model, tokens, readers)


def watch_from(
    model: LensModel,
    layer: int,
    residual: Float[Tensor, "batch pos d_model"],
    readers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Run the blocks from `layer` on, on a residual that takes the place of `resid_pre`; see `watch`.

    Args:
        readers: by hook name; of blocks before `layer` nothing may be read.

    Raises:
        ValueError: a model that gives its blocks more than the stream, or with hooks of the user's, which
            would act on what they made; or a hook name that it does not have.

    Cost: the blocks from `layer` up to the deepest activation that is read; on a bridge the earlier ones
    run, too, and their work is thrown away.
    """
    if getattr(model.cfg, "positional_embedding_type", None) == "shortformer":
        raise ValueError(
            "this model gives each block its positions beside the stream (shortformer), so a run cannot "
            "begin in the middle"
        )
    hooks = user_hooks(model)
    if hooks:
        raise ValueError(
            f"blocks are run again on what others made, and your hook at {hooks[0]} would act on that, too: "
            "remove it with model.reset_hooks(including_permanent=True)"
        )
    try:
        serve(model, residual, readers, start_at_layer=layer)
    except NotImplementedError as error:
        raise ValueError(
            "this engine cannot run a model from the middle on: use transformer-lens 4, or backend='hooked'"
        ) from error


def serve(
    model: LensModel, given: Tensor, readers: Mapping[str, Callable[[Tensor], None]], **options: Any
) -> None:
    """`watch` of whatever the engine can be given, with the engine's own options."""
    waiting = set(readers)

    # the engine names the hook point by its own alias, so each hook carries the name asked for
    def hand_out(activation: Tensor, hook: Any, name: str) -> None:
        readers[name](activation)
        waiting.discard(name)
        if not waiting:
            raise Enough

    hooks = [(name, partial(hand_out, name=name)) for name in readers]
    with running(model, hooks):
        run(model, given, **options)
    if waiting:
        # HookedTransformer has `hook_mlp_out` in a model without MLPs, too
        raise ValueError(f"this model makes nothing at the hook point {min(waiting)!r}")


@contextlib.contextmanager
def running(
    model: LensModel, hooks: Sequence[tuple[str, Callable[..., Any]]], *, gradients: bool = False
) -> Iterator[None]:
    """Hooks that are gone when the block ends, no other thread's run in between, no dropout, and no gradients
    unless they are asked for. A run of the user's in another thread does not meet the hooks."""
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
    """`model.hooks`, which on TransformerLens 3.9's bridge collects all hook points again for each hook."""
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
    """Afterwards, no module keeps an activation with all that it was made of: a bridge's attention keeps its
    last pattern."""
    try:
        yield
    finally:
        for kept, name, value in kept_graphs(model):
            kept[name] = value.detach()


def kept_graphs(model: Any) -> list[tuple[dict[str, Any], str, Tensor]]:
    """(attributes of a module, name, activation) of what modules keep with the graph that it was made by."""
    return [
        (vars(module), name, value)
        for module in every_module(model)
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


@contextlib.contextmanager
def _evaluating(model: LensModel) -> Iterator[None]:
    """Without dropout, which would make every result a draw of its own; modes are restored at the end."""
    training = [module for module in every_module(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_tokens(model: LensModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Refuse tokens that the model cannot be run on.

    Raises:
        ValueError: no tokens, ids out of range, or more tokens than the context holds.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"tokens must be [batch, pos] with at least one token, but are {tuple(tokens.shape)}"
        )
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
    """Hand the attention patterns of all or some layers to `reader(layer, pattern)`; see `watch`.

    Args:
        cache: an `ActivationCache` of these tokens, or anything that gives activations by hook name;
            nothing is run then.

    Raises:
        ValueError: as `watch`, or the cache belongs to other tokens.
    """
    wanted = pattern_readers(model, reader, layers)
    if cache is None:
        watch(model, tokens, wanted)
        return
    for name, read in wanted.items():
        pattern = cache[name]
        if pattern.ndim == 3:  # of `remove_batch_dim=True`
            pattern = pattern[None]
        n_pos = tokens.shape[1]
        if pattern.shape != (len(tokens), model.cfg.n_heads, n_pos, n_pos):
            raise ValueError(
                f"the cache has patterns {tuple(pattern.shape)}, but the tokens are {tuple(tokens.shape)}: "
                "make both from the same token ids (a text gets a BOS unless prepend_bos=False)"
            )
        read(pattern)


def pattern_readers(
    model: LensModel,
    reader: Callable[[int, Float[Tensor, "batch head dest src"]], None],
    layers: Iterable[int] | None = None,
) -> dict[str, Callable[[Tensor], None]]:
    """For `watch`: hands the patterns of all or some layers to `reader(layer, pattern)`."""
    return {
        f"blocks.{layer}.attn.hook_pattern": partial(reader, layer)
        for layer in (range(model.cfg.n_layers) if layers is None else layers)
    }


def parts(tokens: Int[Tensor, "batch pos"]) -> tuple[Int[Tensor, "part pos"], ...]:
    """The rows of a batch in parts that one forward pass takes."""
    return tokens.split(max(1, MAX_POSITIONS // max(1, tokens.shape[1])))
