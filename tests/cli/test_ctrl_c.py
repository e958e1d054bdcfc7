"""Ctrl-C ends a command with one line, whatever it is doing. Tested with processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.shared import ENGINE_IS_TOLD

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

# sends the signal while a module is being imported
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

# Ctrl-C after the first patched run, and while a file is written. Each in a fork, because a new process would
# Ctrl-C after the first patched run, and while a file is written. Each runs in a fork, because a new process
AT_WORK = """
import os, signal, sys
import transformer_lens
from mechlens.analyses.patching import grid
from mechlens.cli import main

note = grid._Progress.note

def interrupt(*args):
    os.kill(os.getpid(), signal.SIGINT)

def note_and_interrupt(self, *args):
    note(self, *args)
    interrupt()

grid._Progress.note = note_and_interrupt
fsync = os.fsync
for arguments, os.fsync in zip({commands}, (fsync, fsync, interrupt), strict=True):
    child = os.fork()
    if not child:
        main(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
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


def test_ctrl_c_ends_the_command_even_if_an_import_swallows_exceptions():
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


def test_ctrl_c_during_work_ends_in_one_line_and_leaves_no_partial_file(tmp_path, tiny_directories):
    model = ["--model", str(tiny_directories / "gpt2")]
    file = tmp_path / "progress.safetensors"
    commands = [
        ["patch", *SMALL, *model],
        ["patch", *SMALL, *model, "--resume", str(file)],
        ["composition", "--draws", "2", *model, "--out", str(tmp_path / "x.csv")],
    ]
    code, out, err = ended(AT_WORK.format(commands=commands))
    assert (code, out) == (0, "")
    assert err.splitlines() == [
        "mechlens: interrupted",
        "130",
        f"mechlens: progress is saved in {file}: run the same command to resume",
        "130",
        "mechlens: interrupted",
        "130",
    ]
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_the_previous_signal_handler_is_restored():
    before = signal.getsignal(signal.SIGINT)
    from mechlens.cli import main

    with pytest.raises(SystemExit):
        main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
