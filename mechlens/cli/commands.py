"""The commands, and how one of them is run.

Only the command that is called is imported and built: building all of them takes longer than starting Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from mechlens.cli.options import HelpOption
from mechlens.cli.output import NotSavedError, say


@dataclasses.dataclass(frozen=True)
class Command:
    """Where a command is implemented, and its entry in the list of commands."""

    place: str
    """Module and name of a function, or of a `typer.Typer` with subcommands."""
    short_help: str
    example: str
    """What follows `mechlens`."""


COMMANDS = {
    "reproduce": Command(
        "reproduce:reproduce",
        "Reproduce published findings.",
        "reproduce --model mechlens-books --out out/reproduce",
    ),
    "heads": Command(
        "heads:heads",
        "Score every attention head.",
        "heads --model mechlens-books --kind induction_score --threshold 0.5",
    ),
    "lens": Command(
        "lens:lens",
        "Decode every layer into a prediction.",
        'lens "The captain of the ship" --stat entropy --out lens.html',
    ),
    "train-lens": Command(
        "train_lens:train_lens", "Train a tuned lens on text.", "train-lens --out lens.safetensors --steps 40"
    ),
    "attribution": Command(
        "attribution:attribution",
        "Split a logit into the contributions of components.",
        'attribution "The captain of the" --target " ship" --out attribution.html',
    ),
    "attention": Command(
        "attention:attention",
        "Show what heads attend to.",
        'attention "Mr. Pickwick met Mr. Pickwick" --head L3H5 --out attention.html',
    ),
    "attention-spread": Command(
        "attention_spread:attention_spread",
        "Measure how widely heads spread their attention.",
        'attention-spread "Mr. Pickwick met Mr. Winkle." --out spread.html',
    ),
    "patch": Command(
        "patching:patch",
        "Patch one activation at a time.",
        "patch --site mlp_out --from first-half --out mlps.html",
    ),
    "ablate": Command("patching:ablate", "Ablate heads or MLPs.", "ablate heads --how mean"),
    "circuit": Command(
        "circuits:circuit",
        "Multiply the weights of heads into a circuit.",
        "circuit 1.2 3.5 --out circuit.html",
    ),
    "composition": Command(
        "circuits:composition",
        "Score how strongly heads compose.",
        "composition --kind k --out composition.html",
    ),
    "induction-circuits": Command(
        "induction_circuits:induction_circuits",
        "Find pairs of heads that form induction circuits.",
        "induction-circuits --pair 1.2,3.5 --out circuits.html",
    ),
    "features": Command(
        "features:features", "Find what activates a feature.", "features exhaustive --layer 0:4 --feature 0:8"
    ),
    "task": Command("task:task", "Measure how well the model does a task.", "task ioi --model smollm2-135m"),
    "task-circuit": Command(
        "task:task_circuit",
        "Find the edges that carry a task.",
        "task-circuit ioi --model smollm2-135m --out ioi.html",
    ),
    "models": Command(
        "models:models", "List known models, describe one, or verify models.", "models mechlens-books"
    ),
}


def build(called: str | None) -> Any:
    """The command line; only the called command can be run."""
    app = typer.Typer(name="mechlens", add_completion=False, rich_markup_mode=None, add_help_option=False)
    app.callback()(_common)
    for name, command in COMMANDS.items():
        about: dict[str, Any] = {
            "short_help": command.short_help,
            "epilog": f"Example: mechlens {command.example}",
        }
        found: Any = _another
        if name == called:
            module, attribute = command.place.split(":")
            found = getattr(importlib.import_module(f"mechlens.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name, **about)
        else:
            app.command(name, **about)(found)
    return typer.main.get_command(app)


def every() -> Iterator[tuple[str, ...]]:
    """The words after `mechlens` of each command and group of commands; () for `mechlens` itself."""
    yield ()
    for name in COMMANDS:
        yield (name,)
        for each in getattr(build(name).commands[name], "commands", ()):
            yield name, each


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code; see `main`."""
    # output may contain any character, even lone surrogates, which not every encoding has
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _OneLineEach()
            _invoke(arguments or ["--help"])
        print(end="", flush=True)
    except NotSavedError as error:
        say(str(error))
        return 1
    except ValueError as error:
        say(str(error))
        return 2
    except OSError as error:
        if error.filename is None and error.errno in _OF_OUTPUT:
            # discard what is left in the buffers, or Python would try to write it at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # a reader that closed the pipe needs no message
            if error.errno != errno.EPIPE:
                say(f"cannot write to standard output: {error.strerror}")
            return 1
        say(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        return 2
    except Exception as error:
        # typer's own errors, such as a missing option, have a message
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "mechlens"
        say(f"{error.format_message()} (see {where} --help)")
        return 2
    return 0


_OF_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


def _invoke(arguments: list[str]) -> None:
    called = next((each for each in arguments if not each.startswith("-")), None)
    # --help and --version raise Exit
    with contextlib.suppress(typer.Exit), build(called).make_context("mechlens", arguments) as context:
        context.command.invoke(context)


def _another() -> None:
    """Placeholder for a command that is not called."""


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        print(f"mechlens {version('mechlens-toolkit')}")
        raise typer.Exit
    return wanted


def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    wants_help: HelpOption = False,
) -> None:
    """Mechanistic interpretability of GPT-style language models."""


class _OneLineEach:
    """Prints each of our warnings once, as one line without its place in the code."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in self.shown:
            self.shown.add(str(message))
            say(str(message))
