"""What the commands of `mechlens features` share: their options, and the steps that each of them takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import options

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel

_ENDINGS = (".html", ".csv", ".safetensors")
SITES = ("resid_post", "attn_out", "mlp_out", "post")
AGGREGATES = ("last", "sum")
EXCITING = ("constant", "maximise", "maximin")
OBJECTIVES = (*EXCITING, "l1", "cosine", "continuation")
PENALTIES = ("norm", "nearest")
PRIORS = ("none", "softmax", *PENALTIES)
OPTIMISERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
FASTEST = 1e6
_MOST_PLACES = 64
"""Features that a page shows."""

LayersOption = Annotated[
    list[str] | None,
    typer.Option("--layer", "--layers", "-l", help="A layer, or a range such as 0:4; repeatable."),
]
FeaturesOption = Annotated[
    list[str] | None,
    typer.Option("--feature", "--features", "-f", help="A feature, or a range such as 0:4; repeatable."),
]
SiteOption = Annotated[str, typer.Option(help=f"Of what: {', '.join(SITES)}; post are the MLP's neurons.")]
PrefixOption = Annotated[
    str | None, typer.Option(help="A text that stands before the searched tokens. [default: none]")
]
BosOption = Annotated[bool, typer.Option("--bos", help="Begin with BOS, which these searches leave out.")]
OutOption = Annotated[
    Path | None, typer.Option(help="Save to this .html (a page), .csv or .safetensors file.")
]

_WORDS = {
    "top_k must": "--top must",
    "beam must": "--beam must",
    "use prepend_bos=False": "leave out --bos",
    "use isolated=False": "leave out --isolated",
}


def numbers(option: str, given: list[str] | None) -> list[int] | None:
    return options.numbers(option, given) if given else None


def check_common(given: dict[str, Any]) -> None:
    """Say so before the model is loaded, which takes seconds."""
    options.check_file(given["out"], _ENDINGS)
    options.check_resume(given.get("resume"), given["out"])
    options.check_known("--site", given["site"], SITES)


def check_page(out: Path | None, places: int, what: str) -> None:
    if out is not None and out.suffix == ".html" and places > _MOST_PLACES:
        raise ValueError(
            f"a page shows the {what} of at most {_MOST_PLACES} features, but {places} are asked for: give "
            "fewer, or save to .csv or .safetensors"
        )


def check_gradient(given: dict[str, Any]) -> None:
    for name, known in (("objective", OBJECTIVES), ("prior", PRIORS), ("optimiser", OPTIMISERS)):
        options.check_known(f"--{name}", given[name], known)
    objective, target = given["objective"], given["target"]
    if objective in EXCITING:
        if target is not None:
            raise ValueError(f"--target is for --objective l1, cosine or continuation, but it is {objective}")
    elif target is None:
        raise ValueError(f"--objective {objective} needs --target TEXT")
    if objective == "continuation":
        for name in ("layer", "feature", "position"):
            if given[name] not in (None, []):
                raise ValueError(f"--objective continuation reads no feature: leave out --{name}")
        if given["isolated"]:
            raise ValueError("a block alone predicts no continuation: leave out --isolated")
    if given["constant"] is not None:
        if objective != "constant":
            raise ValueError(f"--constant is for --objective constant, but it is {objective}")
        if not isfinite(given["constant"]):
            raise ValueError(f"--constant must be a finite number, but is {given['constant']}")
    if given["prior_weight"] is not None:
        if given["prior"] not in PENALTIES:
            raise ValueError(
                f"--prior-weight is for --prior {' and '.join(PENALTIES)}, but it is {given['prior']}"
            )
        if not (isfinite(given["prior_weight"]) and given["prior_weight"] >= 0):
            raise ValueError(
                f"--prior-weight must be a finite number from 0 on, but is {given['prior_weight']}"
            )
    if not 0 < given["learning_rate"] <= FASTEST:
        raise ValueError(
            f"--learning-rate must be above 0 and at most {FASTEST:g}, but is {given['learning_rate']}"
        )
    if given["position"] is not None:
        chosen("position", [given["position"]], given["tokens"])


def load(given: dict[str, Any]) -> LensModel:
    names = ("model", "device", "dtype", "revision", "quiet")
    return options.load(*(given[name] for name in names), processing=False, cache=given["cache"])


def n_features(model: LensModel, site: str) -> int:
    if site == "post" and getattr(model.cfg, "attn_only", False):
        raise ValueError("this model has no MLPs, so there is no post to search")
    return int(model.cfg.d_mlp if site == "post" else model.cfg.d_model)


def chosen(what: str, given: Sequence[int], count: int) -> list[int]:
    from mechlens import arguments

    return list(arguments.chosen(what, given, count))


def check_other(
    model: LensModel,
    other: LensModel,
    name: str | None,
    layers: Sequence[int] | None,
    wanted: Sequence[int] | None,
    site: str,
) -> None:
    """Say so before either is searched that the two do not compare, which takes long for a large one."""
    from mechlens.text.tokens import vocabulary_hash

    if vocabulary_hash(model.tokenizer) != vocabulary_hash(other.tokenizer):
        raise ValueError(
            f"--against {name} has another tokenizer, so that its ids are other tokens: compare models with "
            "the same one"
        )
    for what, given, count in (
        ("layer", layers, other.cfg.n_layers),
        ("feature", wanted, n_features(other, site)),
    ):
        if given is not None and max(given) >= count:
            raise ValueError(f"--against {name} has no {what} {max(given)}: it has {count}")


@contextlib.contextmanager
def as_typed() -> Iterator[None]:
    """Errors of the analyses with the names that arguments have on the command line."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, option in _WORDS.items():
            message = message.replace(name, option)
        raise ValueError(message) from error
