"""The type checker of the import hook in conftest.py."""

from __future__ import annotations

import ast
import typing
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping._import_hook import JaxtypingTransformer

# An int where a float is wanted is right, as every static checker has it.
outer_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def leave_inner_functions() -> None:
    """Check no function within a function: each would be compiled anew at every call of the outer one.

    A third of the suite's time. The hook keeps what it compiled under the checker's name, so whoever changes
    what is checked gives the checker another name.
    """
    visit, within = JaxtypingTransformer.visit_FunctionDef, []

    def outer_alone(self: JaxtypingTransformer, node: ast.FunctionDef) -> ast.AST:
        if within:
            return node
        within.append(node)
        try:
            return visit(self, node)
        finally:
            within.pop()

    JaxtypingTransformer.visit_FunctionDef = outer_alone


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


leave_inner_functions()
ask_each_class_once()
