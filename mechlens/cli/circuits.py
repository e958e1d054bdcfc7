"""`mechlens circuit` and `mechlens composition`: weights on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import options
from mechlens.cli.options import (
    BUNDLED,
    CacheOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    RevisionOption,
)
from mechlens.cli.output import deliver, file_of

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel
    from mechlens.results import Circuit
    from mechlens.show.section import Section

_ENDINGS = (".html", ".csv", ".safetensors")
_COMPOSED = ("k", "q", "v")
_KINDS = ("ov", "qk", *_COMPOSED)
EMBEDDINGS = ("W_E", "effective")
_ACCURACIES = (1, 5)
_CORNER = 8
"""Tokens along each side of the part that is shown where none are given."""

RelativeOption = Annotated[
    int | None,
    typer.Option(min=0, help="Of a rotary model: how many tokens the key comes before the query."),
]


def circuit(
    heads: Annotated[
        list[str],
        typer.Argument(
            help="One head, such as 5.5 or L5H5, or an earlier and a later one. The OV of three or more are "
            "summed."
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            help="Of one head ov (of several: their sum) or qk; of two k, q or v, the later one's key, query "
            "or value as the earlier one writes it. [default: k of two heads, else ov]"
        ),
    ] = None,
    model: ModelOption = BUNDLED,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="A text: its tokens are those of the part that is shown. [default: those of the largest "
            "entries]"
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest entries to list.")] = 10,
    embedding: Annotated[
        str, typer.Option(help="How tokens come in: W_E, or effective (W_E and the first MLP of it).")
    ] = "W_E",
    relative_position: RelativeOption = None,
    rotary: Annotated[
        str | None,
        typer.Option(
            help="unrotated: of a rotary model only the dimensions that are never rotated. [default: this "
            "for a rotary model that has them, if --relative-position is not given]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Save to this .html (pictures), .csv (the largest entries) or .safetensors (the whole "
            "circuit) file."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    seed: Annotated[int, typer.Option(help="No effect: nothing is drawn.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Multiply heads' weights into a circuit over the whole vocabulary: how often a token finds or copies
    itself, the pairs of tokens with the largest entries, and a part of it."""
    given = dict(locals())
    options.check_file(out, _ENDINGS)
    if kind is None:
        kind = "k" if len(heads) == 2 else "ov"
    _check(heads, kind, embedding, relative_position, rotary)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens import terminal
    from mechlens.analyses.circuits.tokens import circuit_corner, largest_pairs
    from mechlens.measures.weights import eigenvalue_copying_score
    from mechlens.text.prompts import text_ids

    found, note = _circuit(loaded, heads, kind, embedding, relative_position, rotary)
    shown: list[int] = []
    if tokens is not None:
        # before the work is done, because a text may have no tokens
        shown = text_ids(loaded, tokens, prepend_bos=False).tolist()
    progress = options.progress(quiet)
    pairs = largest_pairs(loaded, found, top, progress=progress)
    if tokens is None:
        shown = pairs[[f"{axis}_id" for axis in found.axes]].to_numpy().flatten().tolist()
    unique = list(dict.fromkeys(shown))
    corner = circuit_corner(loaded, found, unique if tokens is not None else unique[:_CORNER])
    accuracy = _accuracy(found, progress)
    shown_of_it = (found, accuracy, eigenvalue_copying_score(found), pairs, corner, note)

    def sections() -> list[Section]:
        from mechlens.show.circuits import circuit_section

        return [circuit_section(found, accuracy=accuracy, pairs=pairs, corner=corner, text=note)]

    command = options.command("circuit", circuit, given)
    deliver(
        given,
        save=file_of([found], title="A circuit", sections=sections, command=command, table=pairs),
        tables=lambda: terminal.print_circuit(*shown_of_it),
        as_object=lambda: terminal.circuit_json(*shown_of_it),
    )


def composition(
    kind: Annotated[
        str, typer.Option(help="k, q or v: through which of the later head's inputs, key, query or value.")
    ] = "k",
    model: ModelOption = BUNDLED,
    top: Annotated[int, typer.Option(min=1, help="How many pairs of heads to list and to draw.")] = 20,
    relative_position: RelativeOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the baseline's random weights.")] = 0,
    draws: Annotated[int, typer.Option(min=2, help="Pairs of random heads in the baseline.")] = 100,
    out: Annotated[
        Path | None,
        typer.Option(help="Save to this .html (heatmap and graph), .csv or .safetensors file."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score how much of what each head reads could come from each earlier head, by their weights alone, and
    list the pairs that stand furthest above random weights. A rotary model's queries and keys are taken
    without their rotation unless --relative-position is given."""
    given = dict(locals())
    options.check_file(out, _ENDINGS)
    options.check_known("--kind", kind, _COMPOSED)
    if kind == "v" and relative_position is not None:
        raise ValueError("--relative-position is about queries and keys, but --kind is v: leave it out")
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens.analyses.circuits.composition import composition_scores

    found = composition_scores(
        loaded,
        kind,
        relative_position=relative_position,
        seed=seed,
        draws=draws,
        progress=options.progress(quiet),
    )
    from mechlens import terminal

    def sections() -> list[Section]:
        from mechlens.show.circuits import composition_section

        return [composition_section(found, top=top)]

    command = options.command("composition", composition, given)
    deliver(
        given,
        save=file_of([found], title="Composition of heads", sections=sections, command=command),
        tables=lambda: terminal.print_composition(found, top),
        as_object=lambda: terminal.composition_json(found),
    )


# -- steps -----------------------------------------------------------------------------------------


def _check(
    heads: list[str], kind: str, embedding: str, relative_position: int | None, rotary: str | None
) -> None:
    """Say so before the model is loaded, which takes seconds."""
    options.check_known("--kind", kind, _KINDS)
    options.check_known("--embedding", embedding, EMBEDDINGS)
    if rotary is not None:
        options.check_known("--rotary", rotary, ("unrotated",))
    from mechlens.results import head_label, parse_head

    places = [parse_head(head) for head in heads]
    if kind in _COMPOSED:
        if len(places) != 2:
            raise ValueError(f"--kind {kind} is of an earlier and a later head, but {len(places)} are given")
        if places[0][0] >= places[1][0]:
            raise ValueError(
                f"the first head must be in an earlier layer than the second, but they are "
                f"{' and '.join(head_label(*place) for place in places)}"
            )
    elif kind == "qk" and len(places) != 1:
        raise ValueError(f"--kind qk is of one head, but {len(places)} are given")
    if relative_position is not None and rotary is not None:
        raise ValueError("--relative-position and --rotary exclude each other")
    if kind in ("ov", "v"):
        for name, value in (("relative-position", relative_position), ("rotary", rotary)):
            if value is not None:
                raise ValueError(f"--{name} is about queries and keys, but --kind is {kind}: leave it out")


def _circuit(
    model: LensModel,
    heads: list[str],
    kind: str,
    embedding: str,
    relative_position: int | None,
    rotary: str | None,
) -> tuple[Circuit, str]:
    """The circuit, and what has to be said of it."""
    from mechlens.analyses.circuits import composition, ov, qk
    from mechlens.models.weights.rotary import is_rotary

    if kind == "ov":
        return ov.full_OV(model, heads, embedding=embedding), ""
    if kind == "v":
        return composition.v_composition_circuit(model, *heads, embedding=embedding), ""
    chosen = relative_position is not None or rotary is not None
    if not chosen and is_rotary(model):
        # a model without such dimensions is refused with what can be given instead
        rotary = "unrotated"
    make: Any = {
        "qk": qk.full_QK,
        "k": composition.k_composition_circuit,
        "q": composition.q_composition_circuit,
    }[kind]
    found = make(model, *heads, embedding=embedding, relative_position=relative_position, rotary=rotary)
    if chosen or rotary is None:
        return found, ""
    return found, (
        "This model rotates queries and keys by their positions. Taken were only the "
        f"{found.A.shape[1]} of {model.cfg.d_head} dimensions that it does not rotate, which match alike at "
        "every distance; --relative-position N takes all of them, N tokens apart."
    )


def _accuracy(circuit: Circuit, progress: bool) -> dict[str, dict[int, float]]:
    """For each axis that is searched, the top-k accuracies, from one pass over the entries."""
    from mechlens.measures.weights import diagonal_ranks

    shares = {}
    for axis in reversed(circuit.axes):
        ranks = diagonal_ranks(circuit, axis, progress=progress)
        shares[axis] = {k: float((ranks <= k).double().mean()) for k in _ACCURACIES}
    return shares
