"""`mechlens patch` and `mechlens ablate`: patched runs on the command line."""

from __future__ import annotations

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
    HelpOption,
    JsonOption,
    ModelOption,
    QuietOption,
    ResumeOption,
    RevisionOption,
)
from mechlens.cli.output import deliver, file_of

if TYPE_CHECKING:
    from mechlens.results import PatchGridResult
    from mechlens.show.section import Section

_ENDINGS = (".html", ".csv", ".safetensors")
SITES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("q", "k", "v", "z", "attn_scores", "pattern"),
)
PER_HEAD = ("q", "k", "v", "z", "pattern", "attn_scores")
_SOURCES = ("first-half", "zero", "mean", "resample", "corrupted")
_METRICS = ("loss", "log_prob", "kl", "logit_diff")
_BY = ("position", "head", "layer")
SEQ_LEN, BATCH, REFERENCE = 50, 4, 32
"""Random tokens in one copy, sequences, and sequences whose mean is put there."""

LengthOption = Annotated[int | None, typer.Option(min=2, help="Random tokens in one copy. [default: 50]")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Sequences of random tokens. [default: 4]")]
SeedOption = Annotated[
    int,
    typer.Option(min=0, max=2**31, help="Of the random tokens; those that are put there have the next one."),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Save to this .html (pictures), .csv or .safetensors file.")
]
TopOption = Annotated[int, typer.Option(min=1, help="How many of the largest effects to list.")]

ablate = typer.Typer(rich_markup_mode=None, add_help_option=False)


@ablate.callback()
def ablate_help(wants_help: HelpOption = False) -> None:
    """Take heads away, or MLPs what they know of the second copy, and see what the prediction loses."""


def patch(
    site: Annotated[str, typer.Option(help=f"{', '.join(SITES)}.")] = "mlp_out",
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="What is put there: on random tokens first-half (the same token's, one copy before), mean "
            "or resample (other random tokens) or zero; on a text zero, or corrupted (the run on "
            "--corrupted). zero is minus infinity for attn_scores. [default: first-half; with --text zero; "
            "with --corrupted corrupted]",
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help="One run for each layer and position, each head, or each layer.")
    ] = ("position"),
    model: ModelOption = BUNDLED,
    text: Annotated[str | None, typer.Option(help="What the model reads instead of random tokens.")] = None,
    corrupted: Annotated[
        str | None, typer.Option(help="A text of as many tokens as --text, for --from corrupted.")
    ] = None,
    denoise: Annotated[
        bool, typer.Option("--denoise", help="Patch the run on --corrupted with that on --text.")
    ] = False,
    metric: Annotated[
        str,
        typer.Option(
            help="loss, log_prob, kl (clean || patched) or logit_diff (of --target less --against): on "
            "random tokens over the second copy, on a text loss and kl over all of it, the others at "
            "its end."
        ),
    ] = "loss",
    target: Annotated[
        str | None, typer.Option(help="A token, for log_prob and logit_diff on --text.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A token, for logit_diff on --text.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="A layer to patch; repeatable. [default: all]")
    ] = None,
    head: Annotated[
        list[int] | None, typer.Option("--head", help="A head, for --by head; repeatable. [default: all]")
    ] = None,
    position: Annotated[
        list[int] | None,
        typer.Option("--position", help="A position, for --by position; repeatable. [default: all]"),
    ] = None,
    resume: ResumeOption = None,
    top: TopOption = 10,
    seq_len: LengthOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    chat: ChatOption = False,
    bos: BosOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Patch one activation at a time and measure what becomes of the prediction: on random tokens that come
    twice, or on a text and a corrupted one. Prints the largest changes and saves pictures, a table or the
    whole result."""
    given = dict(locals())
    if source is None:
        source = "first-half" if text is None else "zero" if corrupted is None else "corrupted"
    options.check_file(out, _ENDINGS)
    options.check_resume(resume, out)
    options.check_chat(chat, bos)
    _check(given | {"source": source})
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens.analyses.patching import Corrupted, Earlier, Mean, Resampled, patch_grid
    from mechlens.text.prompts import check_equally_long, prompt_tokens, repeated_tokens

    n_tokens = seq_len or SEQ_LEN
    prompt: Any
    put: Any = "zero"
    positions: Any = (position or "each") if by == "position" else None
    read: Any = None
    if text is not None:
        prompt = prompt_tokens(loaded, options.prompt(loaded, text, chat), prepend_bos=bos)
        if corrupted is not None:
            there = prompt_tokens(loaded, options.prompt(loaded, corrupted, chat), prepend_bos=bos)
            check_equally_long(loaded, [prompt, there])
            put = Corrupted(there)
    else:
        drawn = repeated_tokens(loaded, seq_len=n_tokens, batch=batch or BATCH, seed=seed, prepend_bos=bos)
        prompt = drawn.tokens
        second = range(int(drawn.starts[0, 1]), prompt.shape[1])
        read = second[:-1]
        if source == "first-half":
            put = Earlier(n_tokens)
            positions = (position or second) if by == "position" else positions
        elif source in ("mean", "resample"):
            count = REFERENCE if source == "mean" else len(prompt)
            other = repeated_tokens(loaded, seq_len=n_tokens, batch=count, seed=seed + 1, prepend_bos=bos)
            put = Mean(other.tokens) if source == "mean" else Resampled(other.tokens, seed=seed)
    with options.saving_progress(resume):
        found = patch_grid(
            loaded,
            prompt,
            site=site,
            source=put,
            layers=layer or None,
            heads=(head or "each") if by == "head" else None,
            positions=positions,
            metric=metric,
            read=read,
            targets=target,
            against=against,
            direction="denoising" if denoise else "noising",
            state=resume,
            progress=options.progress(quiet),
        )
    _deliver(found, "Patching", options.command("patch", patch, given), given)


@ablate.command(
    "heads",
    epilog="Example: mechlens ablate heads --how mean --out heads.html",
    short_help="Take each attention head away.",
)
def ablate_heads(
    how: Annotated[
        str, typer.Option(help="What is in a head's place: mean or resample (other random tokens) or zero.")
    ] = "mean",
    model: ModelOption = BUNDLED,
    top: TopOption = 10,
    seq_len: LengthOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    bos: BosOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take each attention head away on random tokens that come twice, and measure the loss on the second
    copy: the heads that continue it cost most."""
    given = dict(locals())
    options.check_file(out, _ENDINGS)
    options.check_known("--how", how, options.ABLATIONS)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens.analyses.patching import ablate_heads as analysis

    found = analysis(
        loaded,
        how=how,
        seq_len=seq_len or SEQ_LEN,
        batch=batch or BATCH,
        seed=seed,
        prepend_bos=bos,
        progress=options.progress(quiet),
    )
    command = options.command("ablate heads", ablate_heads, given)
    _deliver(found, "Heads taken away", command, given)


@ablate.command(
    "mlps",
    epilog="Example: mechlens ablate mlps --seq-len 20 --out mlps.html",
    short_help="Put the first copy's MLP outputs into the second.",
)
def ablate_mlps(
    model: ModelOption = BUNDLED,
    top: TopOption = 10,
    seq_len: LengthOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    bos: BosOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Replace each MLP's output at each position of the second copy by that of the first, one at a time, and
    measure the loss on the second copy."""
    given = dict(locals())
    options.check_file(out, _ENDINGS)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens.analyses.patching import ablate_mlps_from_first_half

    found = ablate_mlps_from_first_half(
        loaded,
        seq_len=seq_len or SEQ_LEN,
        batch=batch or BATCH,
        seed=seed,
        prepend_bos=bos,
        progress=options.progress(quiet),
    )
    command = options.command("ablate mlps", ablate_mlps, given)
    _deliver(found, "MLPs from the first copy", command, given)


# -- steps -----------------------------------------------------------------------------------------


def _check(given: dict[str, Any]) -> None:
    """Say so before the model is loaded, which takes seconds."""
    source, text = given["source"], given["text"]
    options.check_known("--from", source, _SOURCES)
    for name, known in (("by", _BY), ("site", SITES), ("metric", _METRICS)):
        options.check_known(f"--{name}", given[name], known)
    if text is None:
        for name in ("target", "against", "corrupted", "chat"):
            if given[name] not in (None, False):
                raise ValueError(f"--{name} is about a text: add --text")
        if source == "corrupted":
            raise ValueError("--from corrupted needs --text and --corrupted")
        if given["metric"] == "logit_diff":
            raise ValueError("--metric logit_diff needs --text, --target and --against")
    else:
        if source not in ("zero", "corrupted"):
            raise ValueError(f"--from {source} is about random tokens; with --text take zero or corrupted")
        for name in ("seq_len", "batch"):
            if given[name] is not None:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} is about random tokens, but --text gives the tokens: leave it out"
                )
        if given["metric"] != "logit_diff" and given["against"] is not None:
            raise ValueError(f"--against is for --metric logit_diff, but the metric is {given['metric']}")
        if given["metric"] == "log_prob" and given["target"] is None:
            raise ValueError("--metric log_prob needs --target, the token after --text")
    for name in ("head", "position"):
        if given[name] and given["by"] != name:
            raise ValueError(f"--{name} is for --by {name}, but it is {given['by']}")
    if given["metric"] not in ("log_prob", "logit_diff") and given["target"] is not None:
        raise ValueError(f"--target is for log_prob and logit_diff, but the metric is {given['metric']}")
    if given["by"] == "head" and given["site"] not in PER_HEAD:
        raise ValueError(f"--by head is for --site {', '.join(PER_HEAD)}, but it is {given['site']}")
    if given["metric"] == "logit_diff" and None in (given["target"], given["against"]):
        raise ValueError("--metric logit_diff is of --target less --against: give both")
    if (source == "corrupted") != (given["corrupted"] is not None):
        raise ValueError("--from corrupted and --corrupted TEXT belong together: give both or neither")
    if given["denoise"] and source != "corrupted":
        raise ValueError("--denoise patches a corrupted run: add --from corrupted and --corrupted")


def _deliver(found: PatchGridResult, title: str, command: str, given: dict[str, Any]) -> None:
    from mechlens import terminal

    def sections() -> list[Section]:
        from mechlens.show.patching import patching_section

        return [patching_section(found, top=given["top"])]

    deliver(
        given,
        save=file_of([found], title=title, sections=sections, command=command),
        tables=lambda: terminal.print_effects(found, given["top"]),
        as_object=lambda: terminal.effects_json(found),
    )
