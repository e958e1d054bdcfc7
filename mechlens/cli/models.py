"""`mechlens models`: what loads by name, and what is right, on the command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mechlens.cli import options
from mechlens.cli.options import CacheOption, JsonOption, QuietOption, RevisionOption
from mechlens.cli.output import deliver


def models(
    name: Annotated[str | None, typer.Argument(help="The one to show: a name, or a path.")] = None,
    like: Annotated[str, typer.Option(help="Only names with this in them.")] = "",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare with Hugging Face's predictions and say which analyses there are: of NAME, "
            "or of tiny random models of all architectures and the real ones at hand.",
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Save what --verify finds to this .md file.")] = None,
    revision: RevisionOption = None,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Delete the weights that were kept from GGUF files.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where --verify runs: cpu, cuda, cuda:1, mps. [default: cuda if there is one, else cpu]"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Of the random weights and tokens of --verify.")
    ] = 0,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the models that load by name. With a name or path, show that model's sizes, its positions,
    and whether its unembedding is tied to its embedding in the raw weights. With --verify, run models beside
    Hugging Face's and show how far their log-probabilities are apart, in nats, before and beyond a sliding
    window or an original context, and which analyses they have."""
    given = dict(locals())
    _check(name, like, verify, out, revision, clear_cache)
    if verify:
        _verify(given)
        return
    from mechlens import terminal
    from mechlens.models.load import gguf
    from mechlens.models.load.registry import known_models, model_summary

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


def _check(
    name: str | None,
    like: str,
    verify: bool,
    out: Path | None,
    revision: str | None,
    clear_cache: bool,
) -> None:
    """Refuse what asks for two things at once, or for what would have no effect."""
    asked = {
        "a name": name is not None,
        "--like": bool(like),
        "--verify": verify,
        "--clear-cache": clear_cache,
    }
    for one, other in (
        ("a name", "--like"),
        ("a name", "--clear-cache"),
        ("--like", "--clear-cache"),
        ("--verify", "--clear-cache"),
    ):
        if asked[one] and asked[other]:
            raise ValueError(f"{one} and {other} exclude each other: give one of them")
    if out is not None and not verify:
        raise ValueError("--out is for what --verify finds: add --verify, or leave --out out")
    if revision is not None and name is None:
        raise ValueError("--revision is of one model: name it")
    options.check_file(out, (".md",))


def _verify(given: dict[str, Any]) -> None:
    from mechlens import terminal
    from mechlens.files import replacing
    from mechlens.studies.architectures import verify_architectures, verify_model

    shared = {name: given[name] for name in ("device", "cache", "seed")}
    if given["name"] is None:
        bar = options.progress(given["quiet"])
        found = verify_architectures(like=given["like"], progress=bar, **shared)
    else:
        found = [verify_model(given["name"], revision=given["revision"], **shared)]

    def save(file: Path) -> list[Path]:
        with replacing(file) as part:
            part.write_text(terminal.architectures_markdown(found), encoding="utf-8")
        return [file]

    deliver(
        given,
        save=save,
        tables=lambda: terminal.print_architectures(found),
        as_object=lambda: terminal.architectures_json(found),
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
