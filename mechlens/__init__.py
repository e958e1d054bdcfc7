"""Mechanistic interpretability of GPT-style language models, built on TransformerLens.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so `import mechlens` is
fast.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from pathlib import Path
from typing import Any

_STUB = Path(__file__).with_suffix(".pyi")
_HOME_OF = {
    name: home
    for home, name in re.findall(r"^from (\S+) import (\w+) as \2$", _STUB.read_text(encoding="utf-8"), re.M)
}

__all__ = [  # read from __init__.pyi, which is the one list
    *sorted(_HOME_OF)
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mechlens-toolkit")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mechlens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _warn_of_the_other_project() -> None:
    """Say so if the package index's `mechlens`, with the same import name, was installed into our folder.

    It may have replaced some of our files. Where it has replaced this one, nothing of ours runs.
    """
    installed = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    others = [name for name in os.listdir(installed) if re.fullmatch(r"mechlens-\d.*\.dist-info", name)]
    if others:
        warnings.warn(
            "another project called mechlens is installed in the same folder as this one (mechlens-toolkit): "
            "uninstall both, then install mechlens-toolkit again",
            stacklevel=3,
        )


_warn_of_the_other_project()
