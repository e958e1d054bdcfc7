"""The command runner: shared options, errors that name the option, and output of results."""

from __future__ import annotations

import json
from typing import Annotated

import pandas as pd
import pytest
import typer

import mechlens
from mechlens.cli import options
from mechlens.cli.commands import build
from mechlens.cli.run import Run, command
from mechlens.errors import ArgumentError
from tests import examples


def called(function, *arguments):
    """Run a command made for the test."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    made = typer.main.get_command(app)
    with made.make_context("mechlens", list(arguments)) as context:
        return made.invoke(context)


@command("spread", renamed={"top_k": "--top"})
def spread(
    run: Run,
    text: Annotated[str, typer.Argument()],
    top: Annotated[int, typer.Option(help="How many.")] = 2,
    layer_index: Annotated[int, typer.Option()] = 0,
) -> None:
    """A command that shows an existing result."""
    if top < 1:
        raise ArgumentError("top_k", "at least 1", top)
    if layer_index > 3:
        raise ArgumentError("layer_index", "at most 3", layer_index)
    run.show(examples.attention_spread(4, 3), top=top)


def test_every_command_has_the_shared_options():
    shared = {"model", "out", "device", "dtype", "revision", "cache", "quiet", "as_json"}
    for name in ("attribution", "attention-spread"):
        found = {each.name for each in build(name).commands[name].params}
        assert shared <= found, name


def test_an_error_about_an_argument_names_the_option():
    with pytest.raises(ValueError, match=r"^--top must be at least 1, got 0$"):
        called(spread, "a", "--top", "0")
    with pytest.raises(ValueError, match=r"^--layer-index must be at most 3, got 9$"):
        called(spread, "a", "--layer-index", "9")


def test_a_terminal_gets_tables_and_programs_get_json(capsys):
    called(spread, "a")
    assert "The most focused heads" in capsys.readouterr().out
    called(spread, "a", "--json")
    made = json.loads(capsys.readouterr().out)
    assert len(made["rows"]) == 12
    assert made["model"]["name"] == "tiny"


@pytest.mark.parametrize("ending", [".csv", ".safetensors", ".html"])
def test_a_file_has_the_result_and_a_page_its_command(tmp_path, ending, capsys):
    out = tmp_path / f"found{ending}"
    called(spread, "it's", "--top", "1", "--out", str(out), "--quiet")
    assert capsys.readouterr().out == ""
    if ending == ".csv":
        assert len(pd.read_csv(out)) == 12
    elif ending == ".safetensors":
        assert mechlens.load(out) == examples.attention_spread(4, 3)
    else:
        assert "mechlens spread --top 1" in out.read_text(encoding="utf-8")


def test_another_file_extension_is_refused_before_the_work():
    with pytest.raises(ValueError, match=r"--out must be a \.html, \.csv or \.safetensors file"):
        called(spread, "a", "--out", "found.txt")


def test_the_names_of_options_match_typers():
    assert options.option_name(spread, "text") == "TEXT"
    assert options.option_name(spread, "as_json") == "--json"
    assert options.option_name(spread, "not_an_option") == "not_an_option"
