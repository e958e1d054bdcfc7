"""`mechlens attribution`."""

from __future__ import annotations

from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption, ChatOption, TextArgument
from mechlens.cli.run import Run, command


@command("attribution", without=("dry_run",))
def attribution(
    run: Run,
    text: TextArgument,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help='Token to explain, such as " Paris". [default: the top guess]'),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", "-a", help="Token whose logit is subtracted.")
    ] = None,
    position: Annotated[
        int, typer.Option("--position", "-p", help="Position to explain; negative counts from the end.")
    ] = -1,
    top: Annotated[int, typer.Option(min=1, help="Number of components to list.")] = 12,
    neurons: Annotated[
        int, typer.Option(min=0, help="Number of MLP neurons to list, with the tokens that they promote.")
    ] = 0,
    chat: ChatOption = False,
    bos: BosOption = None,
) -> None:
    """Direct logit attribution: what the embeddings, each head and each MLP add to the logit of a token, or
    to the logit difference of two tokens. Lists the largest contributions; all of them sum to the logit."""
    model = run.load()
    from mechlens.analyses.attribution import direct_logit_attribution

    prompt = options.prompt(model, text, chat)
    found = direct_logit_attribution(
        model, prompt, target, against=against, positions=[position], neurons=neurons, prepend_bos=bos
    )
    run.show(found, top=top)
