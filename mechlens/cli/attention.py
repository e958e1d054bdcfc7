"""`mechlens attention`: what heads attend to, on the command line."""

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
    from mechlens.show.section import Section


def attention(
    text: TextArgument,
    head: Annotated[list[str], typer.Option(help="A head, such as L3H5; repeatable.")],
    model: ModelOption = BUNDLED,
    chat: ChatOption = False,
    bos: BosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Save to this .html (pictures), .csv or .safetensors file.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    seed: NoSeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """The attention patterns of chosen heads on a text. Prints which token each token attends to most, and
    saves pictures, a table or the whole result."""
    given = dict(locals())
    options.check_file(out, (".html", ".csv", ".safetensors"))
    options.check_chat(chat, bos)
    from mechlens.results.heads import parse_heads

    # before the model is loaded, which takes seconds
    heads = parse_heads(head)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    prompt = options.prompt(loaded, text, chat)
    from mechlens import terminal
    from mechlens.analyses.attention import attention_patterns

    found = attention_patterns(loaded, prompt, heads, prepend_bos=bos)

    def sections() -> list[Section]:
        from mechlens.show.heads import attention_section

        return [attention_section(found)]

    deliver(
        given,
        save=file_of(
            [found],
            title="Attention patterns",
            sections=sections,
            command=options.command("attention", attention, given),
        ),
        tables=lambda: terminal.print_attention(found),
        as_object=lambda: terminal.attention_json(found),
    )
