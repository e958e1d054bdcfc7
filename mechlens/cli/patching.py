"""`mechlens patch` and `mechlens ablate`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption, ChatOption, HelpOption, ResumeOption
from mechlens.cli.run import Run, command

if TYPE_CHECKING:
    from mechlens.analyses.patching import Metric
    from mechlens.text.prompts import RepeatedTokens

SITES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("q", "k", "v", "z", "attn_scores", "pattern"),
)
PER_HEAD = SITES[5:]
SOURCES = ("first-half", "zero", "mean", "resample")
METRICS = ("loss", "log_prob", "kl", "logit_diff")
BY = {"position": ("layer", "pos"), "head": ("layer", "head"), "layer": ("layer",)}

LengthOption = Annotated[int | None, typer.Option(min=2, help="Random tokens per copy. [default: 50]")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Sequences of random tokens. [default: 4]")]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**31, help="Seed of the random tokens; mean and resample use the next.")
]
TopOption = Annotated[int, typer.Option(min=1, help="Number of the largest effects to list.")]

ablate = typer.Typer(rich_markup_mode=None, add_help_option=False)


@ablate.callback()
def ablate_help(wants_help: HelpOption = False) -> None:
    """Ablate heads, or replace MLP outputs in the second copy with the first copy's, and measure the loss."""


@command("patch")
def patch(
    run: Run,
    site: Annotated[str, typer.Option(help=f"{', '.join(SITES)}.")] = "mlp_out",
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Values to patch in. On random tokens: first-half (those at the same token of the first "
            "copy), mean or resample (other random tokens) or zero. On a text: zero, or with --corrupted the "
            "other run. For attn_scores, zero means minus infinity. [default: first-half; zero with --text; "
            "the other run with --corrupted]",
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="One run per position of each layer, head or layer.")] = "position",
    text: Annotated[str | None, typer.Option(help="Text to read instead of random tokens.")] = None,
    corrupted: Annotated[
        str | None, typer.Option(help="Corrupted text, with as many tokens as --text.")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="Run to patch: corrupted (denoising) or clean (noising). [default: corrupted with "
            "--corrupted, unless --from is given]"
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="loss, log_prob, kl (clean || patched) or logit_diff (--target minus --against). On random "
            "tokens: over the second copy. On a text: loss and kl over all of it, the others at its end."
        ),
    ] = "loss",
    target: Annotated[str | None, typer.Option(help="Token for log_prob and logit_diff on --text.")] = None,
    against: Annotated[str | None, typer.Option(help="Token for logit_diff on --text.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option("--layer", "-l", help="Layer to patch; repeatable. [default: all]")
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option("--head", help="Head to patch (L3H5); repeatable. [default: all]")
    ] = None,
    position: Annotated[
        list[int] | None, typer.Option("--position", help="Position to patch; repeatable. [default: all]")
    ] = None,
    resume: ResumeOption = None,
    top: TopOption = 10,
    seq_len: LengthOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    chat: ChatOption = False,
    bos: BosOption = None,
) -> None:
    """Patch one activation per forward pass and measure the change in the metric, on repeated random tokens
    or on a text and a corrupted one. Lists the largest changes."""
    _check(run.given)
    options.check_resume(resume, run.given["out"])
    of_run = _metric(metric, target, against)
    from mechlens.analyses.patching import Earlier, Patching
    from mechlens.analyses.patching.ablations import ablation_source, second_copy
    from mechlens.text.prompts import check_equally_long, prompt_tokens

    model = run.load()
    values: Any = source or (None if corrupted is not None else "zero")
    clean: Any
    other = None
    if text is not None:
        clean, other = (
            None if each is None else prompt_tokens(model, options.prompt(model, each, chat), prepend_bos=bos)
            for each in (text, corrupted)
        )
        if other is not None:
            check_equally_long(model, [clean, other])
    else:
        on = _random(seq_len, batch, seed, bos)
        clean, second = second_copy(model, on)
        of_run = dataclasses.replace(of_run, at=second[:-1])  # type: ignore[type-var]  # all are dataclasses
        if source in (None, "first-half"):
            values = Earlier(on.seq_len)
            position = position or (list(second) if by == "position" else None)
        elif source != "zero":
            values = ablation_source(model, source or "", on)
    experiment = Patching(model, clean, other, metric=of_run, progress=run.progress)
    with options.saving_progress(resume):
        found = experiment.grid(
            site,
            over=BY[by],
            into=into,
            values=values,
            layers=layer or None,
            heads=head or None,
            positions=position or None,
            resume=resume,
        )
    run.show(found, title="Patching", top=top)


@command("ablate heads")
def ablate_heads(
    run: Run,
    how: Annotated[
        str, typer.Option(help="What replaces a head's output: mean or resample (other tokens) or zero.")
    ] = "mean",
    top: TopOption = 10,
    seq_len: LengthOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    bos: BosOption = None,
) -> None:
    """Ablate each attention head on repeated random tokens and measure the loss on the second copy. The heads
    that predict the repetition have the largest effects."""
    options.check_known("--how", how, options.ABLATIONS)
    model = run.load()
    from mechlens.analyses.patching import ablate_heads as analysis

    found = analysis(model, how, on=_random(seq_len, batch, seed, bos), progress=run.progress)
    run.show(found, title="Ablated heads", top=top)


@command("ablate mlps")
def ablate_mlps(
    run: Run,
    top: TopOption = 10,
    seq_len: LengthOption = None,
    batch: BatchOption = None,
    seed: SeedOption = 0,
    bos: BosOption = None,
) -> None:
    """Replace each MLP's output at each position of the second copy with its output in the first copy, one at
    a time, and measure the loss on the second copy."""
    model = run.load()
    from mechlens.analyses.patching import ablate_mlps as analysis

    found = analysis(model, on=_random(seq_len, batch, seed, bos), progress=run.progress)
    run.show(found, title="MLP outputs from the first copy", top=top)


ablate.command(
    "heads",
    epilog="Example: mechlens ablate heads --how mean --out heads.html",
    short_help="Ablate each attention head.",
)(ablate_heads)
ablate.command(
    "mlps",
    epilog="Example: mechlens ablate mlps --seq-len 20 --out mlps.html",
    short_help="Replace MLP outputs in the second copy with the first copy's.",
)(ablate_mlps)


def _random(seq_len: int | None, batch: int | None, seed: int, bos: bool | None) -> RepeatedTokens:
    from mechlens.text.prompts import RepeatedTokens

    return RepeatedTokens(seq_len or 50, batch or 4, seeds=[seed], prepend_bos=bos)


def _metric(name: str, target: str | None, against: str | None) -> Metric:
    """The metric, made before the model is loaded, which takes seconds."""
    from mechlens.analyses.patching import KL, LogitDiff, LogProb, Loss

    given = {"--target": target, "--against": against}
    known = {"log_prob": ["--target"], "logit_diff": ["--target", "--against"]}.get(name, [])
    for option, value in given.items():
        if value is not None and option not in known:
            raise ValueError(f"--metric {name} has no {option}: leave it out")
    if name == "logit_diff":
        return LogitDiff(target or "", against or "")
    return LogProb(target) if name == "log_prob" else Loss() if name == "loss" else KL()


def _check(given: dict[str, Any]) -> None:
    """Check what only options can get wrong; the analyses check the rest."""
    source, on_text = given["source"], given["text"] is not None
    for option, value, known in (
        ("--from", source or "zero", SOURCES),
        ("--by", given["by"], tuple(BY)),
        ("--site", given["site"], SITES),
        ("--metric", given["metric"], METRICS),
    ):
        options.check_known(option, value, known)
    only = ("seq_len", "batch") if on_text else ("target", "against", "corrupted", "chat")
    for name in only:
        if given[name] not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is for random tokens, but --text gives the tokens: leave it out"
                if on_text
                else f"{option} is for a text: add --text"
            )
    if on_text and source not in (None, "zero"):
        raise ValueError(f"--from {source} is for random tokens: with --text use zero or --corrupted")
    if not on_text and given["metric"] == "logit_diff":
        raise ValueError("--metric logit_diff needs --text, --target and --against")
    if given["metric"] == "logit_diff" and None in (given["target"], given["against"]):
        raise ValueError("--metric logit_diff needs --target and --against")
    if given["by"] == "head" and given["site"] not in PER_HEAD:
        raise ValueError(f"--by head needs --site {', '.join(PER_HEAD)}, got {given['site']!r}")
    if on_text and given["metric"] == "log_prob" and given["target"] is None:
        raise ValueError("--metric log_prob needs --target, the token after --text")
    if given["into"] == "corrupted" and given["corrupted"] is None:
        raise ValueError("--into corrupted needs --corrupted TEXT")
