"""`mechlens models`: what loads by name, on the command line."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from mechlens.cli.options import JsonOption, QuietOption, RevisionOption


def models(
    name: Annotated[str | None, typer.Argument(help="The one to show: a name, or a path.")] = None,
    like: Annotated[str, typer.Option(help="List only names with this in them.")] = "",
    revision: RevisionOption = None,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Delete the weights that were kept from GGUF files.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="No effect: no model is run.")] = None,
    seed: Annotated[int, typer.Option(help="No effect: nothing is drawn.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the models that load by name. With a name or path, show that model's sizes, its positions,
    and whether its unembedding is tied to its embedding in the raw weights."""
    from mechlens import terminal
    from mechlens.models import gguf
    from mechlens.models.catalogue import known_models, model_summary

    if clear_cache:
        found: Any = {"folder": str(gguf.cache_folder()), "bytes": gguf.cached_size()}
        gguf.clear_cache()
        lines = [f"deleted {_megabytes(found['bytes'])} of {found['folder']}"]
    elif name is not None:
        summary = asdict(model_summary(name, revision=revision))
        width = max(map(len, summary))
        lines = [f"{field:{width}}  {terminal.plain(value)}" for field, value in summary.items()]
        found = summary
    else:
        known = [one for one in known_models() if like.lower() in one.name.lower()]
        if not known:
            raise ValueError(
                f"no known model has {like!r} in its name; other names on the hub may load all the same"
            )
        lines = [f"{one.name}  ({one.source}{', ' * bool(one.about)}{one.about})" for one in known]
        if kept := gguf.cached_size():
            lines.append(
                f"\n{gguf.cache_folder()} holds {_megabytes(kept)} of weights read from GGUF files; "
                "--clear-cache deletes them"
            )
        found = [asdict(one) for one in known]
    if as_json:
        terminal.print_json(found)
    elif not quiet:
        print("\n".join(lines))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
