"""The command line starts fast: nothing heavy is imported before a command has work to do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mechlens.analyses.circuits import factors
from mechlens.analyses.features import Continue, objectives, optimization, spec
from mechlens.analyses.logit_lens import decoders
from mechlens.analyses.tasks import answers, replaced
from mechlens.cli import circuits as cli_circuits
from mechlens.cli import commands, options
from mechlens.cli import feature_options as cli_features
from mechlens.cli import lens as cli_lens
from mechlens.cli import patching as cli_patching
from mechlens.cli import task as cli_task
from mechlens.models.load import loading
from mechlens.models.run import sites
from mechlens.text import task_library

HEAVY = {
    *("torch", "transformers", "transformer_lens", "tokenizers", "safetensors", "huggingface_hub"),
    *("numpy", "pandas", "scipy", "sklearn", "plotly", "circuitsvis", "jaxtyping", "tqdm", "rich"),
}
# typer imports it to convert values, which takes 0.1 to 0.3 s
FOR_VALUES = {"pydantic"}
AFTER = """
import atexit, json, sys
sys.argv = ["mechlens", *{arguments}]
modules = lambda: sorted({{name.partition(".")[0] for name in sys.modules}})
atexit.register(lambda: print(json.dumps(modules()), file=sys.stderr))
{work}
"""
COMMAND = "from mechlens.cli import main; main()"
WORDS = list(commands.every())


def after(*arguments, work=COMMAND):
    """Exit code, output, standard error by line, and imported packages of a new process."""
    code = AFTER.format(arguments=list(arguments), work=work)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *said, modules = done.stderr.splitlines()
    return done.returncode, done.stdout, said, set(json.loads(modules))


def test_importing_the_package_imports_nothing_heavy():
    code, _, _, modules = after(work="import mechlens; import mechlens.cli")
    assert code == 0
    assert not modules & (HEAVY | FOR_VALUES | {"typer"})


def test_all_commands_are_found():
    assert {("lens",), ("ablate", "mlps"), ("features", "gradient"), ("models",)} < set(WORDS)
    assert len(WORDS) == 1 + len(commands.COMMANDS) + 2 + 5


@pytest.mark.parametrize("words", WORDS)
def test_help_imports_nothing_heavy(words):
    code, out, said, modules = after(*words, "--help")
    assert (code, said) == (0, [])
    assert f"Usage: {' '.join(['mechlens', *words])} " in out
    assert not modules & (HEAVY | FOR_VALUES)


@pytest.mark.parametrize("words", WORDS)
def test_a_wrong_option_imports_nothing_heavy(words):
    code, _, said, modules = after(*words, "--bogus")
    assert (code, len(said)) == (2, 1)
    assert "No such option: --bogus" in said[0]
    assert not modules & (HEAVY | FOR_VALUES)


@pytest.mark.parametrize("words", [(), ("features",), ("ablate",)])
def test_an_unknown_command_imports_nothing_heavy(words):
    code, _, said, modules = after(*words, "bogus")
    assert (code, len(said)) == (2, 1)
    assert "No such command 'bogus'" in said[0]
    assert not modules & (HEAVY | FOR_VALUES)


@pytest.mark.parametrize(
    "arguments",
    [
        ["lens", "a b", "--dtype", "int8"],
        ["heads", "--threshold", "2"],
        ["heads", "--batch", "many"],
        ["patch", "--site", "mlp"],
        ["patch", "--by", "head", "--site", "mlp_out"],
        ["ablate", "heads", "--how", "half"],
        ["circuit", "1.2", "--embedding", "W_U"],
        ["composition", "--kind", "ov"],
        ["induction-circuits", "--how", "half"],
        ["lens", "a b", "--decoder", "half"],
        ["task", "half"],
        ["task", "mine.csv", "--n", "3"],
        ["features", "exhaustive", "--site", "half"],
        ["features", "greedy", "--aggregate", "half"],
        ["features", "gradient", "--objective", "half"],
        ["features", "gradient", "--optimizer", "half"],
        ["features", "gradient", "--prior", "half"],
    ],
)
def test_a_wrong_value_imports_no_torch(arguments):
    code, _, said, modules = after(*arguments)
    assert (code, len(said)) == (2, 1)
    assert any(each in said[0] for each in arguments[-2:])
    assert not modules & HEAVY


@pytest.mark.parametrize("ending", ["csv", "safetensors"])
def test_a_target_that_cannot_be_written_imports_no_torch(ending):
    code, _, said, modules = after("heads", "--out", f"no/such/folder/x.{ending}")
    assert (code, len(said)) == (2, 1)
    assert not modules & (HEAVY - {"safetensors"})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (options.BUNDLED, loading.BUNDLED),
        (cli_patching.SITES, tuple(sites.SITES)),
        (cli_circuits.EMBEDDINGS, factors.EMBEDDINGS),
        (cli_features.SITES, tuple(spec.SITES)),
        (cli_features.OBJECTIVES, (*objectives.HOW, *objectives.DISTANCES, Continue.name)),
        (cli_features.PRIORS, optimization.PRIORS),
        (cli_features.OPTIMIZERS, optimization.OPTIMIZERS),
        (cli_lens.DECODERS, tuple(decoders.DECODERS)),
        (cli_task.TASKS, tuple(task_library.BUILT_IN)),
        (cli_task.BY, replaced.BY),
        (cli_task.METRICS, answers.METRICS),
    ],
)
def test_choices_in_the_command_line_equal_those_of_the_analyses(ours, theirs):
    assert ours == theirs


@pytest.mark.parametrize("dtype", options.DTYPES)
def test_the_loader_knows_every_dtype_in_the_help(dtype):
    assert str(loading.parse_dtype(dtype)) == f"torch.{dtype}"
