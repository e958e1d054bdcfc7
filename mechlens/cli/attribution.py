"""`mechlens attribution`: what each component adds to a logit, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import (
    BUNDLED,
    BosOption,
    CacheOption,
    ChatOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    NoSeedOption,
    QuietOption,
    RevisionOption,
    TextArgument,
)
from mechlens.cli.output import deliver, file_of

if TYPE_CHECKING:
    from mechlens.show import Section


def attribution(
    text: TextArgument,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help='The token to explain, such as " Paris". [default: the model\'s own guess]'
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", "-a", help="A token whose logit is subtracted.")
    ] = None,
    position: Annotated[
        int, typer.Option("--position", "-p", help="Which prediction; negative counts from the end.")
    ] = -1,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest components to list.")] = 12,
    model: ModelOption = BUNDLED,
    chat: ChatOption = False,
    bos: BosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Save to this .html (picture), .csv or .safetensors file.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    seed: NoSeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Direct logit attribution: what embeddings, each head and each MLP add to the logit of a token, or to
    its difference from another token's. Prints the largest parts, which with the rest sum to the logit."""
    given = dict(locals())
    options.check_file(out, (".html", ".csv", ".safetensors"))
    options.check_chat(chat, bos)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    prompt = options.prompt(loaded, text, chat)
    from mechlens import terminal
    from mechlens.analyses.attribution import direct_logit_attribution

    found = direct_logit_attribution(
        loaded, prompt, target, against=against, positions=[position], prepend_bos=bos
    )

    def sections() -> list[Section]:
        from mechlens.show import attribution_section

        return [attribution_section(found, largest=top)]

    deliver(
        given,
        save=file_of(
            [found],
            title="Direct logit attribution",
            sections=sections,
            command=options.command("attribution", attribution, given),
        ),
        tables=lambda: terminal.print_attribution(found, top),
        as_object=lambda: terminal.attribution_json(found),
    )
