"""Hooks on a model: the user's own, and the lock that keeps threads out of each other's."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

_ENGINES = ("transformer_lens", "transformers", "accelerate", "torch")
"""Packages whose hooks are part of the model."""
_WIRING = "transformer_lens.model_bridge"
_BEFORE_THE_BLOCKS = ("embed", "pos_embed", "rotary_emb")
_TABLES = ("_forward_hooks", "_forward_pre_hooks")
_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()


@contextlib.contextmanager
def alone(model: Any) -> Iterator[None]:
    """Keep other threads from running the model until the block ends.

    Hooks belong to the model, so that a thread would see those of another one. The same thread may come in
    again.
    """
    with _GUARD:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


def probe(model: Any, tokens: Any) -> Any:
    """The row of a prompt that a property is tried on: its beginning, or all of it where a hook of the user's
    may act further on."""
    return tokens[:1] if user_hooks(model) else tokens[:1, :8]


def user_hooks(model: Any) -> tuple[str, ...]:
    """Where the user's own forward hooks sit, by the names of modules; empty for a model without.

    A hook may do anything: act at the last position of what is run, at one row of the batch, twice where a
    run is resumed behind it. No shortcut is taken past one.
    """
    return tuple(dict.fromkeys(name or "the model" for name, *_ in _found(model)))


def hooks_on_logits(model: Any) -> tuple[str, ...]:
    """Those of the user's hooks that act between the last block and the logits."""
    before = {
        id(module)
        for part in (*model.blocks, *(getattr(model, name, None) for name in _BEFORE_THE_BLOCKS))
        if part is not None
        for module in part.modules()
    }
    names = (
        name or "the model"
        for name, module, *_ in _found(model)
        if id(module) not in before and not name.startswith("hook_")
    )
    return tuple(dict.fromkeys(names))


@contextlib.contextmanager
def without_user_hooks(model: Any) -> Iterator[None]:
    """Take the user's hooks away until the block ends, for runs that only read weights off the model."""
    with alone(model):
        taken = [
            (table, dict(table)) for table in {id(table): table for _, _, table, _ in _found(model)}.values()
        ]
        for *_, table, key in list(_found(model)):
            del table[key]
        try:
            yield
        finally:
            for table, before in taken:
                # in their order, and behind them what was added meanwhile
                added = {key: hook for key, hook in table.items() if key not in before}
                table.clear()
                table.update(before | added)


def every_module(model: Any) -> list[nn.Module]:
    """The model's modules and those of the one that it wraps, each once. `modules()` yields each of them
    through a generator per level, and every run asks."""
    waiting, found = _roots(model), {}
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += (each for each in vars(module)["_modules"].values() if each is not None)
    return list(found.values())


def _roots(model: Any) -> list[nn.Module]:
    # a bridge does not name the model that it wraps among its own modules
    wrapped = vars(model).get("original_model")
    return [model] if wrapped is None else [model, wrapped]


def _found(model: Any) -> Iterator[tuple[str, nn.Module, dict[int, Any], int]]:
    """(name, module, its table of hooks, key) of each hook that is the user's."""
    theirs = {id(module): hooks for module in every_module(model) if (hooks := _of_user(module))}
    for root in _roots(model) if theirs else ():
        for name, module in root.named_modules():
            for table, key in theirs.pop(id(module), ()):
                yield name, module, table, key


def _of_user(module: nn.Module) -> list[tuple[dict[int, Any], int]]:
    return [
        (table, key)
        for table in (vars(module)[name] for name in _TABLES)
        for key, hook in table.items()
        if not (_is_wiring(module, key) if _is_hook_point(module) else _is_engines(hook))
    ]


def _is_hook_point(module: nn.Module) -> bool:
    return type(module).__name__ == "HookPoint"


def _is_wiring(point: Any, key: int) -> bool:
    """Whether a hook at a hook point is the bridge's own, which hands on what is made there to the hook point
    of a part that the wrapped model does not have (an MLP, of OPT)."""
    return any(
        handle.hook.id == key and getattr(handle.user_hook, "__module__", "").startswith(_WIRING)
        for handle in point.fwd_hooks
        if hasattr(handle, "user_hook")
    )


def _is_engines(hook: Any) -> bool:
    # a functools.partial has no module, but its function has
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).split(".")[0] in _ENGINES
