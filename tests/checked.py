"""The checks of every signature of mechlens, types and shapes, that conftest.py turns on."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import typing
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import _import_hook

# An int where a float is wanted is right, as every static checker has it.
_CONF = BeartypeConf(is_pep484_tower=True, violation_type=TypeError)


def once_checked(defined: Any) -> Any:
    """A function, or a dataclass's constructor, that checks what it is given and returns.

    As `jaxtyping.jaxtyped` does, which checks the arguments twice, to tell which one was wrong.
    """
    if isinstance(defined, type):
        if dataclasses.is_dataclass(defined) and "__init__" in vars(defined):
            defined.__init__ = once_checked(defined.__init__)
        return defined
    if inspect.isgeneratorfunction(defined):
        # whose body runs among the shapes of whoever asks for the next
        return jaxtyping.jaxtyped(defined, typechecker=functools.partial(beartype, conf=_CONF))
    names = defined.__globals__
    defined.__annotations__ = {name: _resolved(hint, names) for name, hint in defined.__annotations__.items()}
    checking = beartype(defined, conf=_CONF)

    @functools.wraps(defined)
    def within_its_shapes(*given: Any, **named: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return defined(*given, **named)
        with jaxtyping.jaxtyped("context"):
            return checking(*given, **named)

    return within_its_shapes


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """What a hint in quotes means; anything where it has a name that only type checkers know."""
    try:
        asked = typing.get_type_hints(
            type("Asked", (), {"__annotations__": {"hint": hint}}), names, include_extras=True
        )
    except Exception:  # of any kind: what is in quotes may be any expression
        return Any
    return asked["hint"]


class OuterFunctions(_import_hook.JaxtypingTransformer):
    """Decorates classes, methods and functions, but no function within a function, which would be compiled
    anew at every call of the outer one.

    What it made is kept beside the source, under the name that conftest.py gives: whoever changes it there
    changes that name.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(self._decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        # outside of the decorator that makes it a dataclass
        node.decorator_list.insert(0, self._decorator(node))
        return self.generic_visit(node)

    def _decorator(self, node: ast.AST) -> ast.expr:
        made = self._typechecker.get_ast().keywords[0].value
        return ast.fix_missing_locations(ast.copy_location(made, node))


def ask_each_class_once() -> None:
    """Remember which of the engine's classes are models.

    Every call of a function that takes a model asks whether it is one, for which Python reads each attribute
    of the protocol: a property among them collects all of the model's hooks. A tenth of the suite's time.
    """
    protocol = type(typing.SupportsInt)
    ask, models = protocol.__instancecheck__, set()

    def remembered(wanted: Any, instance: Any) -> bool:
        kind = type(instance)
        if wanted.__name__ != "LensModel" or not kind.__module__.startswith("transformer_lens."):
            return ask(wanted, instance)
        if kind not in models and ask(wanted, instance):
            models.add(kind)
        return kind in models

    protocol.__instancecheck__ = remembered


_import_hook.JaxtypingTransformer = OuterFunctions
ask_each_class_once()


@contextlib.contextmanager
def unchecked():
    """What users run: without the checks of every signature that conftest.py puts in."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
