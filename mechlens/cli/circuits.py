"""`mechlens circuit` and `mechlens composition`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import options
from mechlens.cli.run import Run, command

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel
    from mechlens.results import Circuit

COMPOSED = ("k", "q", "v")
KINDS = ("ov", "qk", *COMPOSED)
EMBEDDINGS = ("W_E", "effective")

RelativeOption = Annotated[
    int | None, typer.Option(min=0, help="For a rotary model: number of tokens from the key to the query.")
]


@command("circuit")
def circuit(
    run: Run,
    heads: Annotated[
        list[str],
        typer.Argument(help="Heads, such as 5.5 or L5H5: one, an earlier and a later one, or several (ov)."),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            help="ov (of several heads: their sum) or qk of one head; k, q or v of two heads: the later "
            "head's key, query or value, as written by the earlier head. [default: k for two heads, else ov]"
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Text whose tokens are shown. [default: the tokens of the largest entries]"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of largest entries to list.")] = 10,
    embedding: Annotated[
        str, typer.Option(help="Embedding of the tokens: W_E, or effective (W_E plus the first MLP).")
    ] = "W_E",
    relative_position: RelativeOption = None,
    rotary: Annotated[
        str | None,
        typer.Option(
            help="For a rotary model: unrotated keeps only the dimensions that are not rotated. [default: "
            "unrotated, if --relative-position is not given]"
        ),
    ] = None,
) -> None:
    """Multiply the weights of heads into a circuit over the whole vocabulary. Prints how often a token
    matches or copies itself, the pairs of tokens with the largest entries, and part of the circuit. A .csv
    file has the largest entries, a .safetensors file the whole circuit."""
    kind = kind or ("k" if len(heads) == 2 else "ov")
    _check(heads, kind, embedding, relative_position, rotary)
    model = run.load()
    from mechlens.analyses.circuits.tokens import summarize_circuit

    about: dict[str, Any] = {"embedding": embedding}
    if kind not in ("ov", "v"):
        about |= {"relative_position": relative_position, "rotary": _rotary(model, relative_position, rotary)}
    found = _circuit(model, heads, kind, about)
    run.show(summarize_circuit(model, found, text=tokens, top=top, progress=run.progress))


@command("composition")
def composition(
    run: Run,
    kind: Annotated[str, typer.Option(help="Input of the later head: k (key), q (query), v (value).")] = "k",
    top: Annotated[int, typer.Option(min=1, help="Number of pairs of heads to list and to draw.")] = 20,
    relative_position: RelativeOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the baseline's random weights.")] = 0,
    draws: Annotated[int, typer.Option(min=2, help="Pairs of random heads in the baseline.")] = 100,
) -> None:
    """Score how much of each head's input could come from each earlier head, judging by weights alone. Lists
    the pairs furthest above random weights. For a rotary model, queries and keys are not rotated unless
    --relative-position is given."""
    options.check_known("--kind", kind, COMPOSED)
    if kind == "v":
        _check_queries_and_keys(kind, relative_position, None)
    model = run.load()
    from mechlens.analyses.circuits.composition import composition_scores

    found = composition_scores(
        model, kind, relative_position=relative_position, seed=seed, draws=draws, progress=run.progress
    )
    run.show(found, top=top)


def _check(
    heads: list[str], kind: str, embedding: str, relative_position: int | None, rotary: str | None
) -> None:
    """Check the options together, before the model is loaded."""
    options.check_known("--kind", kind, KINDS)
    options.check_known("--embedding", embedding, EMBEDDINGS)
    if rotary is not None:
        options.check_known("--rotary", rotary, ("unrotated",))
    from mechlens.results import head_label, parse_head

    places = [parse_head(head) for head in heads]
    if kind in COMPOSED and len(places) != 2:
        raise ValueError(f"--kind {kind} takes an earlier and a later head, got {len(places)}")
    if kind == "qk" and len(places) != 1:
        raise ValueError(f"--kind qk takes one head, got {len(places)}")
    if kind in COMPOSED and places[0][0] >= places[1][0]:
        names = " and ".join(head_label(*place) for place in places)
        raise ValueError(f"the first head must be in an earlier layer than the second, got {names}")
    if relative_position is not None and rotary is not None:
        raise ValueError("give --relative-position or --rotary, not both")
    if kind in ("ov", "v"):
        _check_queries_and_keys(kind, relative_position, rotary)


def _check_queries_and_keys(kind: str, relative_position: int | None, rotary: str | None) -> None:
    for option, value in (("--relative-position", relative_position), ("--rotary", rotary)):
        if value is not None:
            raise ValueError(f"{option} is for queries and keys, and --kind is {kind}: leave it out")


def _rotary(model: LensModel, relative_position: int | None, rotary: str | None) -> str | None:
    """The given value; by default, the dimensions that a rotary model does not rotate."""
    from mechlens.models.weights.rotary import is_rotary

    return rotary or ("unrotated" if relative_position is None and is_rotary(model) else None)


def _circuit(model: LensModel, heads: list[str], kind: str, about: dict[str, Any]) -> Circuit:
    from mechlens.analyses.circuits import composition, ov, qk

    if kind == "ov":
        return ov.full_OV(model, heads, **about)
    if kind == "qk":
        return qk.full_QK(model, heads[0], **about)
    make: Any = getattr(composition, f"{kind}_composition_circuit")
    made: Circuit = make(model, *heads, **about)
    return made
