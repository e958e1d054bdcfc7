"""`mechlens models`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mechlens.cli.output import deliver
from mechlens.cli.run import PROSE, Run, command


@command("models", endings=(PROSE,), without=("model", "dtype", "dry_run"))
def models(
    run: Run,
    name: Annotated[str | None, typer.Argument(help="The model to show: a name, or a path.")] = None,
    like: Annotated[str, typer.Option(help="List only names that contain this.")] = "",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare predictions with Hugging Face's, and show which analyses support the model. "
            "Without NAME: tiny random models of all architectures, and the installed real models.",
        ),
    ] = False,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Delete the cached weights of GGUF files.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Seed of the random weights and tokens of --verify.")
    ] = 0,
) -> None:
    """List the models that load by name. With a name or path, show the model's sizes, its kind of
    position embedding, and whether its unembedding is tied to its embedding in the raw weights. With
    --verify, compare models with Hugging Face's: the largest difference in log-probability, in nats, within
    and beyond a sliding window or original context, and which analyses support them. --out and --device apply
    to --verify."""
    given = run.given
    _check(given)
    if verify:
        _verify(run)
        return
    from mechlens.models.load import gguf
    from mechlens.models.load.registry import known_models, model_summary
    from mechlens.show.terminal import plain, print_json

    if clear_cache:
        found: Any = {"folder": str(gguf.cache_folder()), "bytes": gguf.cached_size()}
        gguf.clear_cache()
        lines = [f"deleted {_megabytes(found['bytes'])} from {found['folder']}"]
    elif name is not None:
        summary = asdict(model_summary(name, revision=given["revision"]))
        width = max(map(len, summary))
        lines = [f"{field:{width}}  {plain(value)}" for field, value in summary.items()]
        found = summary
    else:
        known = [one for one in known_models() if like.lower() in one.name.lower()]
        if not known:
            raise ValueError(f"no known model has {like!r} in its name; other names on the hub may load, too")
        lines = [f"{one.name}  ({one.source}{', ' * bool(one.about)}{one.about})" for one in known]
        if kept := gguf.cached_size():
            lines.append(
                f"\n{gguf.cache_folder()} holds {_megabytes(kept)} of weights read from GGUF files; "
                "--clear-cache deletes them"
            )
        found = [asdict(one) for one in known]
    if given["as_json"]:
        print_json(found)
    elif not given["quiet"]:
        print("\n".join(lines))


def _check(given: Mapping[str, Any]) -> None:
    """Refuse two tasks at once, and options without an effect."""
    asked = {
        "a name": given["name"] is not None,
        "--like": bool(given["like"]),
        "--verify": given["verify"],
        "--clear-cache": given["clear_cache"],
    }
    for one, other in (
        ("a name", "--like"),
        ("a name", "--clear-cache"),
        ("--like", "--clear-cache"),
        ("--verify", "--clear-cache"),
    ):
        if asked[one] and asked[other]:
            raise ValueError(f"{one} and {other} exclude each other: give one of them")
    if given["out"] is not None and not given["verify"]:
        raise ValueError("--out is for --verify: add --verify, or leave --out out")
    if given["revision"] is not None and given["name"] is None:
        raise ValueError("--revision needs the name of a model")


def _verify(run: Run) -> None:
    from mechlens.files import replacing
    from mechlens.show.markdown import section_markdown
    from mechlens.show.terminal import print_section
    from mechlens.studies import architectures

    given = run.given
    shared = {name: given[name] for name in ("device", "cache", "seed")}
    if given["name"] is None:
        found = architectures.verify_architectures(like=given["like"], progress=run.progress, **shared)
    else:
        found = [architectures.verify_model(given["name"], revision=given["revision"], **shared)]

    def save(file: Path) -> list[Path]:
        with replacing(file) as part:
            section = architectures.architectures_section(found)
            part.write_text(section_markdown(section), encoding="utf-8")
        return [file]

    deliver(
        given,
        save=save,
        tables=lambda: print_section(architectures.architectures_section(found)),
        as_object=lambda: architectures.architectures_json(found),
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
