"""`mechlens attention-spread`."""

from __future__ import annotations

from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption, ChatOption, TextArgument
from mechlens.cli.run import Run, command


@command("attention-spread", without=("dry_run",))
def attention_spread(
    run: Run,
    text: TextArgument,
    top: Annotated[int, typer.Option(min=1, help="Number of heads to list.")] = 10,
    chat: ChatOption = False,
    bos: BosOption = None,
) -> None:
    """Measure how widely each head spreads its attention: entropy, distance, share on the first token."""
    model = run.load()
    from mechlens.analyses.attention_spread import attention_spread as analysis

    run.show(analysis(model, options.prompt(model, text, chat), prepend_bos=bos), top=top)
