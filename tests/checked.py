"""Type and shape checks of every mechlens signature, which conftest.py turns on."""

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

# Accept an int where a float is wanted, as static checkers do.
_CONF = BeartypeConf(is_pep484_tower=True, violation_type=TypeError)


def once_checked(defined: Any) -> Any:
    """A function, or a dataclass's constructor, that checks its arguments and return value.

    `jaxtyping.jaxtyped` does the same, but checks arguments twice to find the wrong one.
    """
    if isinstance(defined, type):
        if dataclasses.is_dataclass(defined) and "__init__" in vars(defined):
            defined.__init__ = once_checked(defined.__init__)
        return defined
    if inspect.isgeneratorfunction(defined):
        # its body runs in the shape context of its consumer
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
    """Resolve a quoted hint, or return Any if it uses a name that only type checkers know."""
    try:
        asked = typing.get_type_hints(
            type("Asked", (), {"__annotations__": {"hint": hint}}), names, include_extras=True
        )
    except Exception:  # any kind: a quoted hint may be any expression
        return Any
    return asked["hint"]


class OuterFunctions(_import_hook.JaxtypingTransformer):
    """Decorates classes, methods and functions, but not nested functions, which would be recompiled at every
    call of the outer one.

    The bytecode is cached next to the source, under the name given in conftest.py. When you change this
    class, change that name.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(self._decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        # outside the dataclass decorator
        node.decorator_list.insert(0, self._decorator(node))
        return self.generic_visit(node)

    def _decorator(self, node: ast.AST) -> ast.expr:
        made = self._typechecker.get_ast().keywords[0].value
        return ast.fix_missing_locations(ast.copy_location(made, node))


def ask_each_class_once() -> None:
    """Remember which of the engine's classes are models.

    Every call of a function that takes a model checks this, and Python reads each attribute of the protocol,
    including a property that collects all of the model's hooks. That took a tenth of the suite's time.
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
    """Run as users do, without the signature checks of conftest.py."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
