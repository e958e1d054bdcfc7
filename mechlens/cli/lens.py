"""`mechlens lens`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption, ChatOption
from mechlens.cli.run import Run, command

if TYPE_CHECKING:
    from mechlens.results import TunedLens

DECODERS = ("final_norm", "norm_only", "none")
_UNFOLDED = DECODERS[1:]
"""Decoders that need the weights as trained."""


_StatOption = Annotated[
    str,
    typer.Option(
        help="Statistic to color by: probability (of the top guess), entropy, kl_final, kl_input (tied "
        "models only), rank_final, rank_input, rank_next, or rank_ and probability_ with a --target."
    ),
]
_HighOption = Annotated[
    float | None, typer.Option(help="Value with the darkest color. [default: the largest]")
]
_ReadOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Activation to read: resid_pre, resid_mid, resid_post, attn_out, mlp_out, result (all heads), a "
        "head such as L3H5 (repeatable), or a sum such as resid_pre+attn_out. "
        "[default: resid_post]"
    ),
]
_DecoderOption = Annotated[
    str, typer.Option(help="Applied before the unembedding: final_norm, norm_only or none (see --raw).")
]
_LastBlocksOption = Annotated[
    int, typer.Option(min=0, help="Run vectors through this many of the last blocks first.")
]
_TunedLensOption = Annotated[
    str | None,
    typer.Option(
        help="Decode with a tuned lens: a .safetensors file of train-lens, or a published lens (folder "
        "or name)."
    ),
]
_LayerOption = Annotated[
    list[int] | None, typer.Option("--layer", "-l", help="A layer to read; repeatable. [default: all]")
]
_PositionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--position",
        "-p",
        help="A position to read, or a range such as 10:40 or -20: (the last 20); negative counts from "
        "the end; repeatable. [default: all are read, the last 64 drawn]",
    ),
]
_TargetOption = Annotated[
    list[str] | None,
    typer.Option("--target", "-t", help='Token to report the rank of, such as " Paris"; repeatable.'),
]
_TopKOption = Annotated[
    int, typer.Option(min=1, help="Number of top tokens to keep in the figure, --json and .safetensors.")
]


@command("lens", renamed={"count": "--last-blocks", "layers": "--layer", "targets": "--target"})
def lens(
    run: Run,
    text: Annotated[str, typer.Argument(help="Text to read; it may be longer than the context.")],
    stat: _StatOption = "kl_final",
    high: _HighOption = None,
    read: _ReadOption = None,
    decoder: _DecoderOption = "final_norm",
    last_blocks: _LastBlocksOption = 0,
    tuned_lens: _TunedLensOption = None,
    layer: _LayerOption = None,
    position: _PositionOption = None,
    target: _TargetOption = None,
    top_k: _TopKOption = 5,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Use the weights as trained, without folding LayerNorm or centering."),
    ] = False,
    chat: ChatOption = False,
    bos: BosOption = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Training step, for a model with published checkpoints.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the table as CSV.")] = False,
) -> None:
    """The logit lens: what each layer of a model would predict if it were the last. Prints each layer's top
    guess after every token, colored by a statistic, and saves a figure, a table or the whole result."""
    if tuned_lens is not None and (decoder != "final_norm" or last_blocks):
        raise ValueError("--tuned-lens is a decoder: leave out --decoder and --last-blocks")
    options.check_known("--decoder", decoder, DECODERS)
    positions = options.numbers("--position", position) if position else None
    from mechlens.results.lens_statistics import check_high, check_statistic, lens_statistic, statistic_needed

    check_statistic(stat, target or ())
    if high is not None:
        check_high(high)
    saved = _saved(tuned_lens)
    processing = decoder not in _UNFOLDED and tuned_lens is None if saved is None else saved.model.processing
    model = run.load(processing=bool(processing) and not raw, checkpoint=checkpoint)
    from mechlens.analyses.logit_lens import LastBlocks, logit_lens
    from mechlens.models.load.published_lens import load_tuned_lens
    from mechlens.text.batches import prompt_batch

    through: Any = LastBlocks(last_blocks, decoder) if last_blocks else decoder
    if tuned_lens is not None:
        through = saved or load_tuned_lens(tuned_lens, model=model)
    # a file and a table for other programs have everything; a terminal shows one statistic
    everything = run.given["out"] is not None or run.given["as_json"] or as_csv
    shown = {statistic_needed(stat), *(("rank", "log_prob") if target else ())} - {None}
    found = logit_lens(
        model,
        options.prompt(model, text, chat) if chat else prompt_batch(model, text, prepend_bos=bos),
        read[0] if read and len(read) == 1 else read or "resid_post",
        decoder=through,
        layers=layer or None,
        positions=positions,
        top_k=top_k,
        targets=target or (),
        statistics=None if everything else sorted(filter(None, shown)),
    )
    lens_statistic(found, stat).bound(found.entropy, high)  # refused before anything is written
    run.show(found, stats=stat, positions=None if positions is None else found.positions, high=high)


def _saved(source: str | None) -> TunedLens | None:
    """A lens that mechlens trained; None for a published one, which needs the model."""
    if source is None or not source.endswith(".safetensors"):
        return None
    from mechlens.results import TunedLens

    return TunedLens.load(source)
