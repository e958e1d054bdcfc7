"""The commands by their names, and how one of them is run.

Only the command that is called is imported and built: all of them take longer than Python's own start.
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
    """Where a command is, and what the list of all says of it."""

    place: str
    """Module and name of a function, or of a `typer.Typer` that has commands of its own."""
    short_help: str
    example: str
    """What stands after `mechlens`."""


COMMANDS = {
    "reproduce": Command(
        "reproduce:reproduce",
        "Measure published findings again and draw them.",
        "reproduce --model mechlens-books --out out/reproduce",
    ),
    "heads": Command(
        "heads:heads",
        "Score every attention head.",
        "heads --model mechlens-books --kind induction_score --threshold 0.5",
    ),
    "lens": Command(
        "lens:lens",
        "Read every layer as if it were the last.",
        'lens "The captain of the ship" --stat kl --out lens.html',
    ),
    "train-lens": Command(
        "train_lens:train_lens",
        "Train a tuned lens on text.",
        "train-lens --out lens.safetensors --steps 40",
    ),
    "attribution": Command(
        "attribution:attribution",
        "Split a logit into what each component adds.",
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
    "ablate": Command("patching:ablate", "Take heads or MLPs away.", "ablate heads --how mean"),
    "circuit": Command(
        "circuits:circuit",
        "Multiply heads' weights into a circuit.",
        "circuit 1.2 3.5 --out circuit.html",
    ),
    "composition": Command(
        "circuits:composition",
        "Score which heads compose with which.",
        "composition --kind k --out composition.html",
    ),
    "induction-circuits": Command(
        "induction_circuits:induction_circuits",
        "Find pairs of heads that continue repeats.",
        "induction-circuits --pair 1.2,3.5 --out circuits.html",
    ),
    "features": Command(
        "features:features",
        "Find what excites a model's features.",
        "features complete --layer 0:4 --feature 0:8",
    ),
    "models": Command(
        "models:models", "List the models that load by name, show one, or verify.", "models mechlens-books"
    ),
}


def build(called: str | None) -> Any:
    """The command line; of its commands only the one that is called can be run."""
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
    """The words after `mechlens` of every command and group of commands, and none for the whole."""
    yield ()
    for name in COMMANDS:
        yield (name,)
        for each in getattr(build(name).commands[name], "commands", ()):
            yield name, each


def run(arguments: list[str]) -> int:
    """Run a command line, and return its exit code; see `main`."""
    # what is printed may hold any character, and half ones, whatever the terminal or file takes
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
            # what is still in the buffers goes nowhere, not even when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # who reads no further needs no message
            if error.errno != errno.EPIPE:
                say(f"cannot write to standard output: {error.strerror}")
            return 1
        say(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        return 2
    except Exception as error:
        # typer's own errors (a missing option, an unknown command) bring their message along
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
    # help and the version end so
    with contextlib.suppress(typer.Exit), build(called).make_context("mechlens", arguments) as context:
        context.command.invoke(context)


def _another() -> None:
    """Stands for a command that is not called."""


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
    """Shows our own warnings as one line each, once; their places in code are of no use to a user."""

    def __init__(self) -> None:
        self.shown: set[str] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in self.shown:
            self.shown.add(str(message))
            say(str(message))
