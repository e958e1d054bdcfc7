"""The `mechlens` command: parses, calls, prints.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mechlens import terminal
from mechlens.cli import circuits, options, patching
from mechlens.cli.features import features
from mechlens.cli.induction_circuits import induction_circuits
from mechlens.cli.lens import lens
from mechlens.cli.options import (
    BUNDLED,
    BatchOption,
    BosOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelOption,
    QuietOption,
    RevisionOption,
    SeedOption,
    SeedsOption,
)

app = typer.Typer(
    name="mechlens",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command(
    epilog="Example: mechlens reproduce --model mechlens-books --out out/reproduce",
    short_help="Reproduce the induction-head findings and draw them.",
)
def reproduce(
    model: ModelOption = BUNDLED,
    out: Annotated[Path, typer.Option(help="Folder for results, tables and report.html.")] = Path(
        "reproduce"
    ),
    seq_len: LengthOption = 50,
    batch: BatchOption = 30,
    seed: SeedOption = 0,
    n_seeds: SeedsOption = 5,
    bos: BosOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reproduce the induction-head findings on a model: how well it continues repeated random tokens, and
    which of its heads do that. Prints published beside measured figures and writes results (.safetensors),
    tables (.csv) and report.html."""
    options.check_folder(out)
    loaded = options.load(model, device, dtype, revision, quiet)
    from mechlens.report.reproduction import write_reproduction
    from mechlens.studies.reproduce import reproduce as study

    found = study(
        loaded,
        seq_len=seq_len,
        batch=batch,
        seeds=range(seed, seed + n_seeds),
        prepend_bos=bos,
        progress=options.progress(quiet),
    )
    command = options.command(
        "reproduce",
        {
            "--model": (model, BUNDLED),
            "--seq-len": (seq_len, 50),
            "--batch": (batch, 30),
            "--seed": (seed, 0),
            "--n-seeds": (n_seeds, 5),
            "--bos": (bos is True, False),
            "--no-bos": (bos is False, False),
            "--device": (device, None),
            "--dtype": (dtype, "float32"),
            "--revision": (revision, None),
            "--out": (out, None),
        },
    )
    written = write_reproduction(found, out, command=command)
    if as_json:
        from dataclasses import asdict

        terminal.print_json(
            {
                "model": asdict(found.heads.model),
                "estimates": found.performance.estimates,
                "comparisons": [asdict(comparison) for comparison in found.comparisons],
                "heads": terminal.best_heads(found.heads, 5),
                "written": [str(path) for path in written],
            }
        )
    elif not quiet:
        from mechlens.report.page import verdict_statement

        terminal.print_estimates(found.performance)
        terminal.print_heads(found.heads, 3)
        if found.comparisons:
            terminal.print_table(
                f"{found.heads.model.name} against published figures"
                if found.heads.model.name != BUNDLED
                else f"{BUNDLED} against its model card",
                (
                    "claim",
                    "published" if found.heads.model.name != BUNDLED else "on the card",
                    "measured",
                    "tolerance",
                    "verdict",
                ),
                [
                    (
                        c.claim,
                        terminal.number(c.published),
                        terminal.number(c.measured),
                        terminal.tolerance(c.low, c.high),
                        c.verdict,
                    )
                    for c in found.comparisons
                ],
            )
            typer.echo(verdict_statement(found.comparisons))
        else:
            typer.echo(f"No published figures of {found.heads.model.name} at these settings to compare with.")
        typer.echo(f"Results, tables and figures: {written[-1]}")


@app.command(
    epilog="Example: mechlens heads --model mechlens-books --kind induction_score --threshold 0.5",
    short_help="Score every attention head.",
)
def heads(
    model: ModelOption = BUNDLED,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", "-k", help="A score, such as induction_score; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Score on this text instead of random tokens.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="List the heads at or above this. [default: the highest ones]")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads of each kind to list.")] = 5,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Random tokens in one copy. [default: 50]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per seed. [default: 30]")] = None,
    jitter: Annotated[
        int | None, typer.Option(min=0, help="Up to this many random tokens between the copies. [default: 0]")
    ] = None,
    seed: SeedOption = 0,
    n_seeds: SeedsOption = 5,
    bos: BosOption = None,
    out: Annotated[Path | None, typer.Option(help="Save to this .safetensors or .csv file.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every attention head: induction, previous token, duplicate token and first token, on repeated
    random tokens or on a text; prefix matching and copying on random tokens."""
    if out is not None:
        options.check_file(out, (".safetensors", ".csv"))
    if text is not None:
        for name, value in (("--seq-len", seq_len), ("--batch", batch), ("--jitter", jitter)):
            if value is not None:
                raise ValueError(f"{name} is about random tokens, but --text gives the tokens: leave it out")
    from mechlens.analyses.heads import (
        KINDS,
        ON_PROMPT,
        PROMPT_KINDS,
        VARIANTS,
        check_kinds,
        detect_heads,
        score_heads,
        score_heads_on,
    )

    # before the model is loaded, which takes seconds
    if kind:
        check_kinds(kind, (*KINDS, *VARIANTS) if text is None else PROMPT_KINDS)
    loaded = options.load(model, device, dtype, revision, quiet)
    if text is None:
        found = score_heads(
            loaded,
            kind,
            seq_len=seq_len or 50,
            batch=batch or 30,
            seeds=range(seed, seed + n_seeds),
            prepend_bos=bos,
            jitter=jitter or 0,
            progress=options.progress(quiet),
        )
    else:
        found = score_heads_on(loaded, text, kind or ON_PROMPT, prepend_bos=bos)
    if out is not None:
        from mechlens.results import write_table

        if out.suffix == ".csv":
            write_table(found.to_dataframe(), out)
        else:
            found.save(out)
    listed = {
        name: len(detect_heads(found, name, threshold)) if threshold is not None else top
        for name in found.kinds
    }
    if as_json:
        from dataclasses import asdict

        terminal.print_json({"model": asdict(found.model), "heads": terminal.best_heads(found, listed)})
    elif not quiet:
        terminal.print_heads(found, listed)


app.command(
    epilog='Example: mechlens lens "The captain of the ship" --stat kl --out lens.html',
    short_help="Read every layer as if it were the last.",
)(lens)


app.command(
    epilog="Example: mechlens patch --site mlp_out --from first-half --out mlps.html",
    short_help="Patch one activation at a time.",
)(patching.patch)


app.add_typer(
    patching.ablate,
    name="ablate",
    epilog="Example: mechlens ablate heads --how mean",
    short_help="Take heads or MLPs away.",
)


app.command(
    epilog="Example: mechlens circuit 1.2 3.5 --out circuit.html",
    short_help="Multiply heads' weights into a circuit.",
)(circuits.circuit)


app.command(
    epilog="Example: mechlens composition --kind k --out composition.html",
    short_help="Score which heads compose with which.",
)(circuits.composition)


app.command(
    "induction-circuits",
    epilog="Example: mechlens induction-circuits --pair 1.2,3.5 --out circuits.html",
    short_help="Find pairs of heads that continue repeats.",
)(induction_circuits)


app.add_typer(
    features,
    name="features",
    epilog="Example: mechlens features complete --layer 0:4 --feature 0:8",
    short_help="Find what excites a model's features.",
)


@app.command(
    epilog="Example: mechlens models mechlens-books",
    short_help="List the models that load by name, or show one.",
)
def models(
    name: Annotated[str | None, typer.Argument(help="The one to show: a name, or a local directory.")] = None,
    like: Annotated[str, typer.Option(help="List only names with this in them.")] = "",
    revision: RevisionOption = None,
    device: Annotated[str | None, typer.Option(help="No effect: no model is run.")] = None,
    seed: Annotated[int, typer.Option(help="No effect: nothing is drawn.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the models that load by name. With a name or directory, show that model's sizes, its positions,
    and whether its unembedding is tied to its embedding in the raw weights."""
    from dataclasses import asdict

    from mechlens.models.catalogue import known_models, model_summary

    if name is not None:
        summary = asdict(model_summary(name, revision=revision))
        width = max(map(len, summary))
        lines = [f"{field:{width}}  {terminal.plain(value)}" for field, value in summary.items()]
        found: Any = summary
    else:
        known = [one for one in known_models() if like.lower() in one.name.lower()]
        if not known:
            raise ValueError(
                f"no known model has {like!r} in its name; other names on the hub may load all the same"
            )
        lines = [f"{one.name}  ({one.source})" for one in known]
        found = [asdict(one) for one in known]
    if as_json:
        terminal.print_json(found)
    elif not quiet:
        typer.echo("\n".join(lines))


def _version(wanted: bool) -> bool:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mechlens {version('mechlens-toolkit')}")
        raise typer.Exit
    return wanted


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mechanistic interpretability of GPT-style language models."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; wrong input ends in one line on standard error and exit code 2.

    Ctrl-C ends it with code 130, a reader that leaves a pipe early with code 1."""
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = app(args=list(arguments) or ["--help"], standalone_mode=False, prog_name="mechlens")
    except ValueError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except Exception as error:
        # typer's own errors (a missing option, an unknown command) bring their message along
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "mechlens"
        _fail(f"{error.format_message()} (see {where} --help)", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Our own warnings as one line; a user of the command line has no use for the others' places in code."""
    if issubclass(category, UserWarning):
        print(f"mechlens: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int) -> NoReturn:
    print(f"mechlens: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
