"""`mechlens attention`."""

from __future__ import annotations

from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption, ChatOption, TextArgument
from mechlens.cli.run import Run, command


@command("attention", renamed={"heads": "--head"}, without=("dry_run",))
def attention(
    run: Run,
    text: TextArgument,
    head: Annotated[list[str], typer.Option("--head", help="Head, such as L3H5; repeatable.")],
    chat: ChatOption = False,
    bos: BosOption = None,
) -> None:
    """Show what heads attend to: for each head and token, the most attended token. An .html page shows the
    full patterns."""
    from mechlens.results import parse_heads

    parse_heads(head)  # before the model is loaded, which takes seconds
    model = run.load()
    from mechlens.analyses.attention import attention_patterns

    run.show(attention_patterns(model, options.prompt(model, text, chat), head, prepend_bos=bos))
