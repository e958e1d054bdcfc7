"""Running models: only the activations that are asked for, handed out as they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.measures.vocabulary import target_log_prob
from mechlens.models.protocol import LensModel

MAX_POSITIONS = 16384
"""Positions (rows x length) in one forward pass; longer batches are run in parts."""


class Enough(Exception):
    """Raised by a hook to end a run whose rest nobody reads: later layers and, on a bridge, all logits."""


def run(model: LensModel, given: Tensor, **options: Any) -> None:
    """Run the model, for its hooks, until the end or until one of them has had `Enough`."""
    with contextlib.suppress(Enough):
        model(given.to(model.cfg.device), return_type=None, **options)


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
        ValueError: a model that gives its blocks more than the stream, or a hook name that it does not have.

    Cost: the blocks from `layer` up to the deepest activation that is read; on a bridge the earlier ones
    run, too, and their work is thrown away.
    """
    if getattr(model.cfg, "positional_embedding_type", None) == "shortformer":
        raise ValueError(
            "this model gives each block its positions beside the stream (shortformer), so a run cannot "
            "begin in the middle"
        )
    serve(model, residual, readers, start_at_layer=layer)


def serve(
    model: LensModel, given: Tensor, readers: Mapping[str, Callable[[Tensor], None]], **options: Any
) -> None:
    """`watch` of whatever the engine can be given, with the engine's own options."""
    unknown = sorted(set(readers) - set(model.hook_dict))
    if unknown:
        raise ValueError(f"this model has no hook point {unknown[0]!r}: see model.hook_dict")
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
    """Hooks that are gone when the block ends, no dropout, and no gradients unless they are asked for."""
    with (
        torch.inference_mode(not gradients),
        torch.set_grad_enabled(gradients),
        _evaluating(model),
        _without_graphs(model) if gradients else contextlib.nullcontext(),
        model.hooks(fwd_hooks=hooks),
    ):
        yield


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
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


@contextlib.contextmanager
def _evaluating(model: LensModel) -> Iterator[None]:
    """Without dropout, which would make every result a draw of its own; modes are restored at the end."""
    # a bridge does not name the model that it wraps among its own modules
    wrapped = vars(model).get("original_model")
    modules = [*model.modules(), *(wrapped.modules() if wrapped is not None else ())]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def plain_token(model: LensModel) -> int:
    """A token that an engine reads as any other, for runs whose tokens do not matter: HookedTransformer hides
    the padding token where its tokenizer pads on the left."""
    return 1 if getattr(model.tokenizer, "pad_token_id", None) == 0 else 0


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
    wanted = {
        f"blocks.{layer}.attn.hook_pattern": partial(reader, layer)
        for layer in (range(model.cfg.n_layers) if layers is None else layers)
    }
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


def parts(tokens: Int[Tensor, "batch pos"]) -> tuple[Int[Tensor, "part pos"], ...]:
    """The rows of a batch in parts that one forward pass takes."""
    return tokens.split(max(1, MAX_POSITIONS // max(1, tokens.shape[1])))


def next_token_log_probs(
    model: LensModel, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """How well each position predicts the token after it.

    Returns:
        Log-probability in nats of the next token, nan in the last position; and whether no other
        token was more likely, False in the last position. Both on the CPU.

    Cost: one forward pass, and one of at most 8 tokens that tells whether the model's logits are what
    its last norm and `W_U` say; logits exist for a few positions at a time only. Where they are not,
    each row's logits are taken from the model itself.
    """
    read = _streamed if reads_as_streamed(model, tokens[:1, :8]) else _whole
    log_probs, corrects = [], []
    for rows in parts(tokens):
        log_prob, correct = read(model, rows)
        log_probs.append(torch.nn.functional.pad(log_prob.cpu(), (0, 1), value=torch.nan))
        corrects.append(torch.nn.functional.pad(correct.cpu(), (0, 1), value=False))
    return torch.cat(log_probs), torch.cat(corrects)


def _streamed(model: LensModel, rows: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
    """`[batch, pos - 1]` log-probability of each next token, and whether it is the most likely one."""
    kept: list[Tensor] = []
    watch(model, rows, {f"blocks.{model.cfg.n_layers - 1}.hook_resid_post": kept.append})
    with torch.inference_mode():
        last = final_norm(model, kept.pop()[:, :-1])
        targets = rows[:, 1:].to(last.device)
        log_prob, correct = target_log_prob(
            last.flatten(0, 1), model.W_U, model.b_U, targets.flatten(), soft_cap=soft_cap(model)
        )
    shape = (rows.shape[0], rows.shape[1] - 1)
    return log_prob.view(shape), correct.view(shape)


def _whole(model: LensModel, rows: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
    """The same from the model's own logits, a row at a time."""
    log_probs, corrects = [], []
    for row in rows.to(model.cfg.device).split(1):
        with torch.inference_mode(), _evaluating(model):
            logits = model(row, return_type="logits")[:, :-1].float()
        own = logits.gather(2, row[:, 1:, None])[..., 0]
        log_probs.append(own - logits.logsumexp(2))
        corrects.append(own == logits.amax(2))
    return torch.cat(log_probs), torch.cat(corrects)


def reads_as_streamed(model: LensModel, probe: Int[Tensor, "one pos"]) -> bool:
    """Whether the model's logits are its last norm through `W_U`, `b_U` and a soft-cap, and nothing else.

    Granite divides them by a constant, for one, and a user's model may do anything.
    """
    if probe.shape[1] < 2:
        if model.cfg.n_ctx < 2:
            return True
        # one token predicts none that could be compared: let it stand twice
        probe = probe.repeat(1, 2)
    streamed, whole = _streamed(model, probe)[0], _whole(model, probe)[0]
    # a narrow dtype rounds the model's own logits, which we keep in float32
    tolerance = 1e-3 if model.W_U.dtype in (torch.float32, torch.float64) else 0.5
    # broken weights make both no number, which is no reason to doubt how they are read
    same = ((streamed - whole).abs() <= tolerance) | (streamed.isnan() & whole.isnan())
    return bool(same.all())


def final_norm(
    model: LensModel, residual: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """The model's last norm with its learned scale and bias; the residual itself where there is none."""
    norm = getattr(model, "ln_final", None)
    return residual if norm is None or model.cfg.normalization_type is None else norm(residual)


def bare_norm(model: LensModel, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The model's last norm without its learned scale and bias; the residual itself where there is none."""
    kind = model.cfg.normalization_type
    if kind is None:
        return residual
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    if kind.startswith("LN"):
        wide = wide - wide.mean(-1, keepdim=True)
    return wide / (wide.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()


def soft_cap(model: LensModel) -> float | None:
    """The bound c of `c * tanh(logit / c)`, where the model has one."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap if cap is not None and cap > 0 else None
