"""`mechlens lens`: the logit lens on the command line."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)
from mechlens.cli.output import deliver, file_of

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel
    from mechlens.results import TunedLens
    from mechlens.show.section import Section

_ENDINGS = (".html", ".csv", ".safetensors")
STATS = {
    "probability": "of the top guess",
    "rank": "of the model's final guess",
    "kl": "final || layer",
    "kl_input": "input || layer; tied models only",
    "input_rank": "of the input token",
    "next_rank": "of the token that follows",
    "entropy": "",
}
OF_TARGET = ("rank", "probability")
COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "result")
_UNFOLDED = ("norm_only", "none")
DECODERS = ("final_norm", *_UNFOLDED)
_RAW_NEEDED = "needs the weights as they were trained: add --raw"


def lens(
    text: Annotated[str, typer.Argument(help="What the model reads; longer than its context is fine.")],
    model: ModelOption = BUNDLED,
    stat: Annotated[
        str,
        typer.Option(
            help="Colour: "
            + ", ".join(f"{name} ({what})" if what else name for name, what in STATS.items())
            + "."
        ),
    ] = "kl",
    of: Annotated[
        str | None,
        typer.Option(help="Whose rank or probability is the colour: final, input, next or a --target."),
    ] = None,
    high: Annotated[
        float | None, typer.Option(help="Value with the darkest colour. [default: the largest]")
    ] = None,
    component: Annotated[
        str,
        typer.Option(help=f"What is read: {', '.join(COMPONENTS)}; result is each head."),
    ] = "resid_post",
    onto_stream: Annotated[
        bool, typer.Option("--onto-stream", help="Read attn_out, mlp_out or result added to the stream.")
    ] = False,
    decoder: Annotated[
        str | None,
        typer.Option(
            help=f"Before the unembedding: {', '.join(DECODERS)}; the last two need --raw. "
            "[default: final_norm]"
        ),
    ] = None,
    last_blocks: Annotated[
        int, typer.Option(min=0, help="Put vectors through this many of the last blocks first.")
    ] = 0,
    tuned_lens: Annotated[
        str | None,
        typer.Option(
            help="Read through a tuned lens: a .safetensors file of mechlens, or a published lens (folder or "
            "name)."
        ),
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="A layer to read; repeatable. [default: all]")
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head to read for --component result, such as L3H5; repeatable. [default: all]"),
    ] = None,
    position: Annotated[
        list[str] | None,
        typer.Option(
            "--position",
            "-p",
            help="A position to read, or a range such as 10:40 or -20: (the last 20); negative counts from "
            "the end; repeatable. [default: all are read, the last 64 drawn]",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help='A token whose rank is wanted, such as " Paris"; repeatable.'),
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=1, help="Likely tokens in the picture, in --json and in .safetensors.")
    ] = 5,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave the weights as they were trained: fold and centre nothing.")
    ] = False,
    chat: ChatOption = False,
    bos: BosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Save to this .html (picture), .csv or .safetensors file.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    checkpoint: Annotated[
        int | None, typer.Option(help="A training step of the model, where it has published ones.")
    ] = None,
    seed: NoSeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV.")] = False,
) -> None:
    """The logit lens: what each layer of a model would predict, if it were the last. Prints each layer's top
    guess after every token, coloured by a statistic, and saves a picture, a table or the whole result."""
    given = dict(locals())
    options.check_file(out, _ENDINGS)
    options.check_chat(chat, bos)
    if as_json and as_csv:
        raise ValueError("--json and --csv exclude each other: both print to standard output")
    options.check_known("--component", component, COMPONENTS)
    if tuned_lens is not None and decoder is not None:
        raise ValueError("--tuned-lens is a decoder of its own: leave out --decoder")
    if decoder is not None:
        options.check_known("--decoder", decoder, DECODERS)
    if decoder in _UNFOLDED and not raw:
        raise ValueError(f"--decoder {decoder} {_RAW_NEEDED}")
    if head and component != "result":
        raise ValueError(f"--head is for --component result, but --component is {component}")
    if head and layer:
        raise ValueError("--head says which layers are read: leave out --layer")
    positions = options.numbers("--position", position) if position else None
    _check_colour(stat, of, target or [], high)
    saved = _saved_tuned_lens(tuned_lens, raw)
    loaded = options.load(
        model, device, dtype, revision, quiet, checkpoint=checkpoint, processing=not raw, cache=cache
    )
    through: Any = decoder or "final_norm"
    if tuned_lens is not None:
        through = saved or _published_tuned_lens(tuned_lens, loaded)
    from mechlens.analyses.logit_lens import logit_lens
    from mechlens.plots.logit_lens import lens_stat, statistic_of

    # a file and a table for other programs have everything; what is printed is one statistic
    printed = {statistic_of(stat, of), *(("rank", "log_prob") if target else ())} - {None}
    everything = out is not None or as_json or as_csv
    try:
        found = logit_lens(
            loaded,
            options.prompt(loaded, text, chat),
            component=component,
            onto_stream=onto_stream,
            heads=head or None,
            decoder=through,
            last_blocks=last_blocks,
            layers=layer or None,
            positions=positions,
            top_k=top_k,
            targets=target or (),
            statistics=None if everything else sorted(printed),
            prepend_bos=bos,
            progress=options.progress(quiet),
        )
    except ValueError as error:
        raise ValueError(_as_typed(str(error))) from error
    # what cannot be coloured is refused before anything is written
    lens_stat(found, stat, of).bound(found.entropy, high)
    from mechlens import terminal

    def sections() -> list[Section]:
        from mechlens.show.lens import lens_section

        # what was chosen is drawn, however much it is
        drawn = found.positions if positions is not None else None
        title = "Layers and positions"
        return [lens_section(found, stat, positions=drawn, target=of, high=high, title=title)]

    deliver(
        given,
        save=file_of(
            [found], title="Logit lens", sections=sections, command=options.command("lens", lens, given)
        ),
        tables=lambda: terminal.print_lens(found, stat, target=of, high=high),
        as_object=lambda: terminal.lens_json(found),
        frame=found.to_dataframe,
    )


def _check_colour(stat: str, of: str | None, targets: list[str], high: float | None) -> None:
    """Say so before the model is loaded, which takes seconds."""
    options.check_known("--stat", stat, tuple(STATS))
    if of is not None and stat not in OF_TARGET:
        raise ValueError(f"--of is for --stat {' and '.join(OF_TARGET)}, but --stat is {stat}")
    known = ("final", "input", "next", *targets)
    if of is not None and of not in known:
        raise ValueError(f"--of must be one of {', '.join(map(repr, known))} (add --target), but is {of!r}")
    if high is not None and not (isfinite(high) and high > 0):
        raise ValueError(f"--high must be a finite number above 0, but is {high}")


def _as_typed(message: str) -> str:
    """An error of the analysis with the names that its arguments have on the command line."""
    names = r"\b(?:onto_stream|last_blocks|top_k)\b|\b(?:component|decoder)(?= (?:must|is)\b)"
    return re.sub(names, lambda found: "--" + found[0].replace("_", "-"), message)


def _saved_tuned_lens(source: str | None, raw: bool) -> TunedLens | None:
    """A lens that mechlens trained; None for a published one, which needs the model."""
    if source is None:
        return None
    if not source.endswith(".safetensors"):
        if not raw:
            raise ValueError(f"a published tuned lens {_RAW_NEEDED}")
        return None
    from mechlens.results import TunedLens

    saved = TunedLens.load(source)
    if saved.model.processing is False and not raw:
        raise ValueError(f"this tuned lens {_RAW_NEEDED}")
    if saved.model.processing and raw:
        raise ValueError("this tuned lens was trained on processed weights: leave out --raw")
    return saved


def _published_tuned_lens(source: str, model: LensModel) -> TunedLens:
    from mechlens.models.load.published_lens import load_tuned_lens

    return load_tuned_lens(source, model=model)
