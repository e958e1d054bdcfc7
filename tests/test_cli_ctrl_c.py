"""Ctrl-C ends the command in one line, whatever it is doing: with real processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.shared import ENGINE_IS_TOLD

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

# as a key press would, in the middle of the import of a module
AT_IMPORT = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["mechlens", "lens", "a b"]
{start}
"""
SMALL = ["--seq-len", "5", "--batch", "1"]
SCRIPT = "from mechlens.cli import main; main()"
MODULE = "import runpy; runpy.run_module('mechlens', run_name='__main__')"

# Ctrl-C in the middle of the work: when the first of the patched runs is done
AT_WORK = """
import os, signal
from mechlens.analyses.patching import grid
from mechlens.cli import main

note = grid._Done.note

def interrupted(self, *args):
    note(self, *args)
    os.kill(os.getpid(), signal.SIGINT)

grid._Done.note = interrupted
main({arguments})
"""


def ended(code):
    environment = os.environ | {"PYTHONWARNINGS": ENGINE_IS_TOLD}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("module", "start"),
    [
        *((module, SCRIPT) for module in ("typer", "mechlens.cli.lens", "torch", "torch._C", "numpy")),
        *((module, SCRIPT) for module in ("transformers", "rich")),
        *((module, MODULE) for module in ("typer", "torch")),
    ],
)
def test_ctrl_c_during_an_import_ends_in_one_line(module, start):
    assert ended(AT_IMPORT.format(module=module, start=start)) == (130, "", "mechlens: interrupted\n")


def test_an_import_that_swallows_ctrl_c_does_not_keep_the_command_from_ending():
    swallowing = "import builtins; real = builtins.__import__\n" + AT_IMPORT.replace(
        "sys.argv =",
        """
def swallow(*args, **options):
    try:
        return real(*args, **options)
    except KeyboardInterrupt:
        raise ImportError("as if it were not installed") from None

builtins.__import__ = swallow
sys.argv =""",
    )
    code, out, err = ended(swallowing.format(module="torch._C", start=SCRIPT))
    assert (code, out, err) == (130, "", "mechlens: interrupted\n")


def test_ctrl_c_during_work_without_a_state_ends_in_one_line(tiny_directories):
    arguments = ["patch", *SMALL, "--model", str(tiny_directories / "gpt2")]
    assert ended(AT_WORK.format(arguments=arguments)) == (130, "", "mechlens: interrupted\n")


def test_ctrl_c_during_work_with_a_state_saves_it_and_says_so(tmp_path, tiny_directories):
    state = tmp_path / "state.safetensors"
    arguments = ["patch", *SMALL, "--model", str(tiny_directories / "gpt2"), "--state", str(state)]
    code, out, err = ended(AT_WORK.format(arguments=arguments))
    assert (code, out) == (130, "")
    assert err == f"mechlens: progress is saved in {state}: the same command goes on from there\n"
    assert [each.name for each in tmp_path.iterdir()] == [state.name]


def test_ctrl_c_while_a_file_is_written_leaves_no_half_of_it(tmp_path, tiny_directories):
    code = f"""
import os, signal
from mechlens.cli import main

def interrupted(handle):
    os.kill(os.getpid(), signal.SIGINT)

os.fsync = interrupted
main(["composition", "--model", {str(tiny_directories / "gpt2")!r}, "--out", {str(tmp_path / "x.csv")!r}])
"""
    assert ended(code) == (130, "", "mechlens: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_the_handler_of_before_is_back_afterwards():
    before = signal.getsignal(signal.SIGINT)
    from mechlens.cli import main

    with pytest.raises(SystemExit):
        main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
