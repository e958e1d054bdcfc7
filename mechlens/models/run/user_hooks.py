"""The user's own hooks on a model, and a lock that keeps threads from seeing each other's hooks."""

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

    Hooks belong to the model, so one thread would see another's. The lock is reentrant.
    """
    with _GUARD:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


def probe(model: Any, tokens: Any) -> Any:
    """The part of a prompt on which to test a model's properties: the first 8 positions of the first row, or
    the whole row if the user has hooks, which may act at later positions."""
    return tokens[:1] if user_hooks(model) else tokens[:1, :8]


def user_hooks(model: Any) -> tuple[str, ...]:
    """The names of the modules with the user's own forward hooks.

    With such hooks no shortcut is taken: a hook may act only at the last position or on one row of the batch,
    or might act twice in a resumed run.
    """
    return tuple(dict.fromkeys(name or "the model" for name, *_ in _found(model)))


def hooks_on_logits(model: Any) -> tuple[str, ...]:
    """The names of the modules after the last block with the user's own hooks."""
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
    """Remove the user's hooks until the block ends, for runs that measure only the model's weights."""
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
                # in their original order, followed by hooks added meanwhile
                added = {key: hook for key, hook in table.items() if key not in before}
                table.clear()
                table.update(before | added)


def every_module(model: Any) -> list[nn.Module]:
    """The modules of the model and of the one it wraps, each once. Every run calls this; `modules()` would be
    slower, with one generator per level."""
    waiting, found = _roots(model), {}
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += (each for each in vars(module)["_modules"].values() if each is not None)
    return list(found.values())


def _roots(model: Any) -> list[nn.Module]:
    # the model that a bridge wraps is not among its modules
    wrapped = vars(model).get("original_model")
    return [model] if wrapped is None else [model, wrapped]


def _found(model: Any) -> Iterator[tuple[str, nn.Module, dict[int, Any], int]]:
    """(name, module, its dict of hooks, key) of each of the user's hooks."""
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
    """Whether a hook is the bridge's own: it forwards values to the hook point of a module that the wrapped
    model does not have, such as OPT's MLP."""
    return any(
        handle.hook.id == key and getattr(handle.user_hook, "__module__", "").startswith(_WIRING)
        for handle in point.fwd_hooks
        if hasattr(handle, "user_hook")
    )


def _is_engines(hook: Any) -> bool:
    # a functools.partial has no module; its function does
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).split(".")[0] in _ENGINES
