"""Options that the commands of `mechlens features` share, and the arguments made from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mechlens.cli import options
from mechlens.cli.run import PAGE, Run

if TYPE_CHECKING:
    from mechlens.analyses.features import Features, Prefix
    from mechlens.models.protocol import LensModel

SITES = ("resid_post", "attn_out", "mlp_out", "post")
OBJECTIVES = ("constant", "mean", "min", "l1", "cosine", "continuation")
PRIORS = ("softmax", "norm", "nearest")
OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
MOST_PLACES = 64
"""Maximum number of features shown; a page with more is refused."""
RENAMED = {
    "top_k": "--top",
    "n_tokens": "--tokens",
    "how": "--objective",
    "distance": "--objective",
    "name": "--prior",
    "weight": "--prior-weight",
    "layers": "--layer",
    "at": "--position",
    "prepend_bos": "--bos",
}

LayersOption = Annotated[
    list[str] | None,
    typer.Option("--layer", "--layers", "-l", help="A layer, or a range such as 0:4; repeatable."),
]
FeaturesOption = Annotated[
    list[str] | None,
    typer.Option("--feature", "--features", "-f", help="A feature, or a range such as 0:4; repeatable."),
]
SiteOption = Annotated[
    str, typer.Option(help=f"Activation to read: {', '.join(SITES)} (post: the MLP's neurons).")
]
PrefixOption = Annotated[str | None, typer.Option(help="Text before the searched tokens. [default: none]")]
BeginOption = Annotated[bool, typer.Option("--bos", help="Begin with BOS.")]
StartSeed = Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Random seed of the starts.")]


def numbers(option: str, given: list[str] | None) -> list[int] | None:
    return options.numbers(option, given) if given else None


def features_of(layer: list[str] | None, feature: list[str] | None, site: str) -> Features:
    options.check_known("--site", site, SITES)
    layers, indices = numbers("--layer", layer), numbers("--feature", feature)
    from mechlens.analyses.features import Features

    return Features(layers, indices, site)


def first_of(model: LensModel, wanted: Features, n: int) -> Features:
    """The features asked for, or the first `n`."""
    import dataclasses

    if wanted.indices is not None:
        return wanted
    return dataclasses.replace(wanted, indices=range(min(n, wanted.width(model))))


def prefix_of(text: str | None, bos: bool) -> Prefix:
    from mechlens.analyses.features import Prefix

    return Prefix(text, prepend_bos=bos)


def check_page(run: Run, places: int) -> None:
    out = run.given["out"]
    if out is not None and out.suffix == PAGE and places > MOST_PLACES:
        raise ValueError(
            f"a page shows at most {MOST_PLACES} features, got {places}: give fewer, or save to .csv or "
            ".safetensors"
        )


def check_other(model: LensModel, other: LensModel, wanted: Features) -> None:
    """Refuse a model that cannot be compared, before the searches, which are slow for large models."""
    from mechlens.arguments import chosen
    from mechlens.text.tokens import vocabulary_hash

    if vocabulary_hash(model.tokenizer) != vocabulary_hash(other.tokenizer):
        raise ValueError(
            "--against has another tokenizer, so its ids mean other tokens: compare models with the same one"
        )
    chosen("layer of --against", wanted.layers, other.cfg.n_layers)
    chosen("feature of --against", wanted.indices, wanted.width(other))
