"""The layers of the package: what each file may import. docs/design.md explains them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mechlens

PACKAGE = Path(mechlens.__file__).parent

LAYERS = {
    "results": 0,
    "measures": 0,
    "arguments": 0,
    "errors": 0,
    "progress": 0,
    "text": 0,
    "files": 0,
    "models": 1,
    "analyses": 2,
    "plots": 2,
    "show": 3,
    "studies": 4,
    "cli": 5,
    "__main__": 5,
}
TOP = max(LAYERS.values())
# Each file in these packages answers a single question; files that several plots share are named here.
NEVER_SIDEWAYS = {"analyses": set[str](), "plots": {"style", "circuitsvis"}}
# Files that combine others, because their question is about the others' answers.
COMBINES = {
    ("analyses", "circuits", "induction"): {"heads", "patching"},
    ("analyses", "tasks", "patching"): {"patching"},
}
# In one layer, but independent: a plot cannot run a model, and an analysis draws nothing.
STRANGERS = {"plots": {"models", "analyses"}, "analyses": {"plots"}}
ENGINE = "transformer_lens"
# The only use of the engine that runs no model: circuits are returned as FactoredMatrix.
ALLOWED_OF_ENGINE = {("results", "circuits"): f"{ENGINE}.FactoredMatrix"}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
# torch.load raises it, so code that refuses a pickle has to name it.
HARMLESS = {"UnpicklingError"}
IMPORTERS = {"import_module", "importlib.import_module", "__import__"}


def imports(tree: ast.AST, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import anywhere in the file; a name may be that of an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module[: len(module) - node.level + is_package] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in IMPORTERS:
            yield from (
                (node.lineno, str(each.value)) for each in node.args if isinstance(each, ast.Constant)
            )


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def violations(path: str, source: str) -> list[str]:
    """Imports of a file that its layer forbids.

    Args:
        path: within mechlens/, such as `plots/heads.py`.
        source: its text.

    Returns:
        One sentence for each violation, with its line.
    """
    tree = ast.parse(source)
    parts = tuple(path.removesuffix(".py").split("/"))
    is_package = parts[-1] == "__init__"
    parts = parts[:-1] if is_package else parts
    found = list(_dangers(tree))
    if parts:
        found += _climbs(parts, imports(tree, ("mechlens", *parts), is_package))
    return [f"mechlens/{path}:{line} {what}" for line, what in sorted(set(found))]


def _climbs(parts: tuple[str, ...], names: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    place = parts[0]
    if place not in LAYERS:
        yield 1, f"is in no layer: add {place!r} to LAYERS, and to docs/design.md"
        return
    for line, name in names:
        root, *rest = name.split(".")
        if root == ENGINE and place != "models" and ALLOWED_OF_ENGINE.get(parts) != name:
            yield line, f"imports {ENGINE}, which only models/ knows"
        if root != "mechlens":
            continue
        # The package itself, or one of its public names, may come from any layer.
        target = rest[0] if rest and rest[0] in LAYERS else "mechlens"
        if target == "mechlens" and place in ("show", "studies") and not rest:
            continue  # plot functions by their public names, which load plotly only when called
        if LAYERS.get(target, TOP) > LAYERS[place]:
            yield line, f"imports {name}, which is in a higher layer"
        elif target in STRANGERS.get(place, ()):
            yield line, f"imports {name}, but {place}/ must not know {target}/"
        elif target == place in NEVER_SIDEWAYS:
            shared = NEVER_SIDEWAYS[place] | COMBINES.get(parts, set())
            other = rest[1] if len(rest) > 1 else "__init__"
            own = parts[1] if len(parts) > 1 else "__init__"
            if other != own and other not in shared:
                yield line, f"imports {name}, which is sideways within {place}/"


def _dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in UNPICKLERS and node.attr in HARMLESS:
                named.add(id(node.value))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in UNPICKLERS and (alias.asname or alias.name != "pickle"):
                    yield node.lineno, f"imports {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            for alias in node.names:
                if alias.name not in HARMLESS:
                    yield node.lineno, f"imports {node.module}.{alias.name}"
        elif isinstance(node, ast.Call):
            called = _called(node)
            options = {word.arg: word.value for word in node.keywords}
            if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
                yield node.lineno, f"calls {called}"
            if called == "torch.load" and not _is(options.get("weights_only"), True):
                yield node.lineno, "calls torch.load without weights_only=True"
            if "allow_pickle" in options and not _is(options["allow_pickle"], False):
                yield node.lineno, f"calls {called} with allow_pickle"
            if called in ("pd.read_pickle", "pandas.read_pickle"):
                yield node.lineno, f"calls {called}"
        if isinstance(node, ast.ImportFrom) and "load" in _names(node, "torch"):
            yield node.lineno, "imports torch.load by name, where its weights_only cannot be checked"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in UNPICKLERS and id(node) not in named:
            yield node.lineno, f"uses {node.id}"


def _names(node: ast.ImportFrom, module: str) -> list[str]:
    return [alias.name for alias in node.names] if node.module == module else []


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_a_file_keeps_to_its_layer(path: str) -> None:
    assert violations(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        # a lower layer imports a higher one, in all ways to write it
        ("results.py", "from mechlens.models.load.loading import load_model", "higher layer"),
        ("results.py", "from mechlens.models import load", "higher layer"),
        ("results.py", "from mechlens import models", "higher layer"),
        ("results.py", "import mechlens.models.load.loading as m", "higher layer"),
        ("results.py", "from .models.load import load_model", "higher layer"),
        ("results.py", "from . import models", "higher layer"),
        ("measures/attention.py", "from ..models import runs", "higher layer"),
        ("measures/__init__.py", "from ..models import runs", "higher layer"),
        ("text/prompts.py", "def f():\n    import mechlens.models.load.loading", "higher layer"),
        (
            "text/prompts.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mechlens.models import load",
            "higher layer",
        ),
        ("text/prompts.py", "import importlib\nimportlib.import_module('mechlens.models')", "higher layer"),
        ("text/corpus.py", "from mechlens.models.load.loading import load_model", "higher layer"),
        ("models/run/forward.py", "from mechlens.analyses.heads.scores import score_heads", "higher layer"),
        ("analyses/heads.py", "from mechlens.studies.heads import reproduce", "higher layer"),
        ("plots/heads.py", "from mechlens.show import page", "higher layer"),
        ("show/page.py", "from mechlens.studies.claims import Claim", "higher layer"),
        ("show/page.py", "from mechlens.cli import main", "higher layer"),
        ("show/page.py", "from mechlens import cli", "higher layer"),
        # the package's own names come from every layer
        ("studies/reproduce.py", "from mechlens import load_model", "higher layer"),
        ("measures/attention.py", "import mechlens", "higher layer"),
        # sideways
        ("analyses/heads.py", "from mechlens.analyses.patching import f", "sideways"),
        ("analyses/heads.py", "from mechlens.analyses import patching", "sideways"),
        ("analyses/heads.py", "from . import patching", "sideways"),
        ("analyses/__init__.py", "from mechlens.analyses.heads.scores import score_heads", "sideways"),
        ("plots/heads.py", "from mechlens.plots.patching import f", "sideways"),
        ("plots/style.py", "from mechlens.plots.heads import plot_head_scores", "sideways"),
        # forbidden within one layer
        ("plots/heads.py", "from mechlens.models.load.loading import load_model", "must not know models/"),
        ("plots/heads.py", "from mechlens.analyses import heads", "must not know analyses/"),
        ("analyses/heads.py", "from mechlens.plots.style import BLUE", "must not know plots/"),
        # the engine
        ("measures/attention.py", "import transformer_lens", "only models/ knows"),
        ("analyses/heads.py", "from transformer_lens.hook_points import HookPoint", "only models/ knows"),
        ("cli.py", "def f():\n    from transformer_lens import evals", "only models/ knows"),
        ("results/circuits.py", "from transformer_lens import HookedTransformer", "only models/ knows"),
        ("results/heads.py", "from transformer_lens import FactoredMatrix", "only models/ knows"),
        # a file without a layer
        ("utils.py", "", "in no layer"),
        # modules that execute code
        ("models/load/loading.py", "import pickle\npickle.load(open('x', 'rb'))", "uses pickle"),
        ("models/load/loading.py", "import pickle\nread = pickle", "uses pickle"),
        ("models/load/loading.py", "import pickle as p", "imports pickle"),
        ("models/load/loading.py", "from pickle import load", "imports pickle.load"),
        ("models/load/loading.py", "def f():\n    import dill", "imports dill"),
        ("cli.py", "eval('1')", "calls eval"),
        ("cli.py", "import builtins\nbuiltins.exec('1')", "calls builtins.exec"),
        ("models/load/loading.py", "import torch\ntorch.load('x')", "without weights_only"),
        (
            "models/load/loading.py",
            "import torch\ntorch.load('x', weights_only=False)",
            "without weights_only",
        ),
        ("models/load/loading.py", "from torch import load", "torch.load by name"),
        ("text/corpus.py", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("text/corpus.py", "import pandas as pd\npd.read_pickle('x')", "read_pickle"),
        ("__init__.py", "import pickle\npickle.loads(b'')", "uses pickle"),
    ],
)
def test_a_violation_is_caught(path: str, source: str, complaint: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("measures/attention.py", "import torch\nfrom mechlens.measures.statistics import f"),
        ("measures/attention.py", "from . import statistics"),
        ("models/load/loading.py", "from mechlens.models import engines\nimport transformer_lens"),
        ("results/circuits.py", "def f():\n    from transformer_lens import FactoredMatrix"),
        ("models/load/loading.py", "import pickle\ntry: ...\nexcept pickle.UnpicklingError: ..."),
        ("models/load/loading.py", "from pickle import UnpicklingError"),
        ("models/load/loading.py", "import torch\ntorch.load('x', weights_only=True)"),
        ("analyses/heads.py", "from mechlens.measures import attention\nfrom ..models import runs"),
        ("plots/heads.py", "from mechlens.plots.style import BLUE\nfrom mechlens.plots import circuitsvis"),
        ("plots/circuitsvis.py", "from mechlens.plots.style import BLUE"),
        ("studies/reproduce.py", "import mechlens.analyses.heads\nimport mechlens.plots.heads"),
        ("show/page.py", "from mechlens.show.page_style import CSS"),
        ("show/heads.py", "import mechlens"),
        ("cli.py", "import mechlens\nfrom mechlens import load_model"),
        # Types for checkers, behind lazy names: the package itself has no layer.
        ("__init__.py", "if TYPE_CHECKING:\n    from mechlens.cli import main"),
    ],
)
def test_an_allowed_import_is_accepted(path: str, source: str) -> None:
    assert violations(path, source) == []
