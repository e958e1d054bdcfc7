"""`mechlens features`: what activates a model's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import feature_options as shared
from mechlens.cli import options
from mechlens.cli.feature_options import (
    OBJECTIVES,
    OPTIMIZERS,
    PRIORS,
    RENAMED,
    SITES,
    BeginOption,
    FeaturesOption,
    LayersOption,
    PrefixOption,
    SiteOption,
    StartSeed,
)
from mechlens.cli.options import BosOption, CorpusArgument, HelpOption, ResumeOption
from mechlens.cli.run import Run, command

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel
    from mechlens.show.section import Section

features = typer.Typer(rich_markup_mode=None, add_help_option=False)


@features.callback()
def features_help(wants_help: HelpOption = False) -> None:
    """Find what activates a feature: a basis dimension of an activation, such as a neuron. Searches tokens,
    whole inputs and real text. Models are loaded with unprocessed weights, because processing changes the
    basis."""


@features.command(
    "exhaustive",
    epilog="Example: mechlens features exhaustive --layer 0:4 --feature 0:8 --out tokens.html",
    short_help="Find the maximally activating tokens of each feature.",
)
@command("features exhaustive", renamed=RENAMED)
def exhaustive(
    run: Run,
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    site: SiteOption = "resid_post",
    prefix: PrefixOption = None,
    bos: BeginOption = False,
    top: Annotated[int, typer.Option(min=1, help="Tokens to keep for each feature.")] = 1,
    resume: ResumeOption = None,
) -> None:
    """Run every token of the vocabulary, and find the maximally and minimally activating tokens of each
    feature (a basis dimension of an activation) in one pass. Default: every layer, features 0 to 7."""
    wanted = shared.features_of(layer, feature, site)
    shared.check_page(run, len(shared.numbers("--feature", feature) or []))
    model = run.load(processing=False)
    from mechlens.analyses.features import search_exhaustive

    with run.saving():
        found = search_exhaustive(
            model,
            shared.first_of(model, wanted, 8),
            prefix=shared.prefix_of(prefix, bos),
            top_k=top,
            resume=resume,
            progress=run.progress,
        )
    run.show(found, features=found.features[: shared.MOST_PLACES])


@features.command(
    "greedy",
    epilog="Example: mechlens features greedy --layer 3 --feature 0:4 --tokens 4",
    short_help="Build inputs that activate a feature, token by token.",
)
@command("features greedy", renamed=RENAMED)
def greedy(
    run: Run,
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to find.")] = 4,
    aggregate: Annotated[
        str, typer.Option(help="Rank inputs by the activation at the last token (last) or over all (sum).")
    ] = "last",
    beam: Annotated[int, typer.Option(min=1, help="Inputs to keep at each step.")] = 1,
    site: SiteOption = "resid_post",
    prefix: PrefixOption = None,
    bos: BeginOption = False,
    resume: ResumeOption = None,
) -> None:
    """Build inputs from left to right. Each token is the one that activates the feature (a basis dimension of
    an activation) most after the tokens before it. Default: the last layer, features 0 to 3."""
    options.check_known("--aggregate", aggregate, ("last", "sum"))
    layers = shared.numbers("--layer", layer) or [-1]
    wanted = shared.features_of(None, feature, site)
    if len(layers) > 1:
        run.check_single("give one --layer")
    model = run.load(processing=False)
    import dataclasses

    from mechlens.analyses.features import search_greedy
    from mechlens.arguments import chosen

    with run.saving():
        found = [
            search_greedy(
                model,
                dataclasses.replace(shared.first_of(model, wanted, 4), layers=each),
                n_tokens=tokens,
                aggregate=aggregate,
                beam=beam,
                prefix=shared.prefix_of(prefix, bos),
                resume=resume,
                progress=run.progress,
            )
            for each in chosen("layer", layers, model.cfg.n_layers)
        ]

    def sections() -> list[Section]:
        from mechlens.show.features import greedy_search_section

        return [greedy_search_section(found)]

    run.show(*found, sections=sections)


@features.command(
    "gradient",
    epilog="Example: mechlens features gradient --layer 3 --feature 7 --out gradient.html",
    short_help="Optimize embeddings by gradient descent, and decode them to tokens.",
)
@command("features gradient", renamed=RENAMED)
def gradient(
    run: Run,
    layer: Annotated[
        int | None, typer.Option("--layer", "-l", help="Layer to read. [default: the last]")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            "--feature",
            "--features",
            "-f",
            help="A feature, or a range such as 0:4; several are searched together. [default: 0; all "
            "with --target]",
        ),
    ] = None,
    site: SiteOption = "resid_post",
    position: Annotated[
        int | None, typer.Option(help="The searched token to read, from 0. [default: all]")
    ] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Run the layer's block alone, without those before it.")
    ] = False,
    objective: Annotated[
        str,
        typer.Option(
            help="constant (approach a large activation), mean or min (maximize the mean or the smallest "
            "activation), l1 or cosine (approach the activations of --target), or continuation (predict "
            "--target)."
        ),
    ] = "constant",
    constant: Annotated[
        float | None,
        typer.Option(
            help="The activation to approach with --objective constant. [default: 1000, or ten times the "
            "largest initial activation]"
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Target text: as many tokens as --tokens, or the continuation.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to search together.")] = 1,
    prefix: PrefixOption = None,
    bos: BeginOption = False,
    prior: Annotated[
        str | None, typer.Option(help=f"Keep embeddings close to real ones: {', '.join(PRIORS)}.")
    ] = None,
    prior_weight: Annotated[
        float | None, typer.Option(help="Weight of the prior norm or nearest. [default: 1]")
    ] = None,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = "Adam",
    learning_rate: Annotated[
        float, typer.Option(help="Relative to the root mean square of an embedding's elements.")
    ] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Maximum number of steps.")] = 40,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop when no restart has improved for this many steps.")
    ] = 10,
    restarts: Annotated[int, typer.Option(min=1, help="Independent starts, run together.")] = 64,
    seed: StartSeed = 0,
    resume: ResumeOption = None,
) -> None:
    """Optimize embeddings by gradient descent until they activate a feature (a basis dimension of an
    activation), and decode them to tokens in two ways. For one token and one feature, an exhaustive search
    finds the optimum for comparison."""
    # before torch is imported, which takes seconds
    for option, given, known in (
        ("--objective", objective, OBJECTIVES),
        ("--optimizer", optimizer, OPTIMIZERS),
        ("--prior", prior or PRIORS[0], PRIORS),
        ("--site", site, SITES),
    ):
        options.check_known(option, given, known)
    from mechlens.analyses.features import (
        Continue,
        Features,
        Match,
        Maximize,
        Optimizer,
        Prior,
        search_exhaustive,
        search_gradient,
    )

    how = Optimizer(optimizer, learning_rate, steps, patience, restarts)
    held = None if prior is None else Prior(prior, prior_weight)
    wanted = shared.numbers("--feature", feature)
    unused: dict[str, Any] = {"prior_weight": prior_weight} if prior is None else {}
    made: Any
    if objective == "continuation":
        unused |= {"layer": layer, "feature": wanted, "position": position, "isolated": isolated or None}
    if objective in ("l1", "cosine", "continuation"):
        unused |= {"constant": constant}
        if target is None:
            raise ValueError(f"--objective {objective} needs --target")
    else:
        unused |= {"target": target}
        wanted = wanted or [0]
    for name, value in unused.items():
        if value is not None:
            why = "without --prior" if name == "prior_weight" else f"with --objective {objective}"
            raise ValueError(f"{run.option(name)} has no effect {why}: leave it out")
    read = Features(-1 if layer is None else layer, wanted, site)
    if objective == "continuation":
        made = Continue(target or "")
    elif target is not None:
        made = Match(read, target, objective, position, isolated)
    else:
        made = Maximize(read, position, objective, constant, isolated)
    model = run.load(processing=False)
    begin = shared.prefix_of(prefix, bos)
    with run.saving():
        # a constant given by the user may be below the optimum
        largest = objective == "mean" or (objective == "constant" and constant is None)
        if largest and len(wanted or []) == tokens == 1 and not isolated:
            best = search_exhaustive(model, read, prefix=begin, progress=run.progress)
            made = Maximize(read, position, objective, constant, isolated, best)
        found = search_gradient(
            model,
            made,
            n_tokens=tokens,
            prefix=begin,
            optimizer=how,
            prior=held,
            seed=seed,
            resume=resume,
            progress=run.progress,
        )
    run.show(found)


@features.command(
    "alignment",
    epilog="Example: mechlens features alignment --layer 0:4 --top 5 --out alignment.html",
    short_help="Compare features' best tokens across layers and models.",
)
@command("features alignment", renamed=RENAMED)
def alignment(
    run: Run,
    against: Annotated[
        str | None, typer.Option(help="Another model with the same tokenizer, compared layer by layer.")
    ] = None,
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    site: SiteOption = "resid_post",
    prefix: PrefixOption = None,
    bos: BeginOption = False,
    top: Annotated[int, typer.Option(min=1, help="Number of best tokens that the overlap compares.")] = 5,
    random: Annotated[
        bool,
        typer.Option(
            "--random/--no-random", help="Compare with random weights: all, and all but the embeddings."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the random weights.")] = 0,
) -> None:
    """Measure how often features (basis dimensions of an activation) with the same number have the same best
    token: in two layers, in the model and in random weights, or in two models. Each share is compared with
    chance. Default: all layers and features."""
    alone = not random and against is None
    layers = shared.numbers("--layer", layer)
    if not alone:
        run.check_single("add --no-random and leave out --against")
    elif layers is not None and len(layers) == 1:
        raise ValueError("one layer cannot be compared with itself: give several, --random or --against")
    wanted = shared.features_of(layer, feature, site)
    own = run.load(processing=False)
    others = {} if against is None else {against: run.load(other=against, processing=False)}
    from mechlens.analyses.features import feature_alignment, search_exhaustive
    from mechlens.arguments import chosen
    from mechlens.models.weights.randomize import random_like

    several = len(chosen("layer", wanted.layers, own.cfg.n_layers)) > 1
    if alone and not several:
        raise ValueError("this model has one layer, which cannot be compared with itself: add --against")
    for each in others.values():
        shared.check_other(own, each, wanted)

    def search(one: LensModel) -> Any:
        return search_exhaustive(
            one, wanted, prefix=shared.prefix_of(prefix, bos), top_k=top, progress=run.progress
        )

    trained = search(own)
    drawn = {}
    if random:
        drawn["random weights"] = search(random_like(own, seed))
        drawn["random blocks"] = search(random_like(own, seed, keep_embeddings=True))
    found = {}
    if several:
        found["layers, trained" if random else "layers"] = feature_alignment(trained)
        found |= {f"layers, {kind}": feature_alignment(each) for kind, each in drawn.items()}
    found |= {f"trained vs. {kind}": feature_alignment(trained, each) for kind, each in drawn.items()}
    for each in others.values():
        compared = feature_alignment(trained, search(each))
        found[f"{'trained' if random else trained.model.name} vs. {compared.other.name}"] = compared

    def sections() -> list[Section]:
        from mechlens.show.feature_alignment import feature_alignment_section

        return [feature_alignment_section(list(found.values()), names=list(found))]

    names = list(found) if len(found) > 1 else []
    run.show(*found.values(), names=names, sections=sections)


@features.command(
    "examples",
    epilog="Example: mechlens features examples texts.jsonl --layer 3 --feature 7 --limit 1000",
    short_help="Find the maximally activating examples of each feature in text.",
)
@command("features examples", renamed=RENAMED)
def examples(
    run: Run,
    files: CorpusArgument = None,
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    site: SiteOption = "resid_post",
    top: Annotated[int, typer.Option(min=1, help="Windows to keep for each feature.")] = 5,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per window. [default: 128, or the model's context]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of windows to read. [default: all]")
    ] = None,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the text sampled from the model.")] = 0,
    resume: ResumeOption = None,
) -> None:
    """Find the windows of text where each feature (a basis dimension of an activation) is largest, and mark
    the token. Default: text sampled from the model, the last layer, features 0 to 3."""
    wanted = shared.features_of(layer or ["-1:"], feature, site)
    options.check_corpus(files)
    n_layers = len(shared.numbers("--layer", layer) or [-1])
    shared.check_page(run, n_layers * len(shared.numbers("--feature", feature) or range(4)))
    model = run.load(processing=False)
    from mechlens.analyses.features import feature_examples

    with run.saving():
        found = feature_examples(
            model,
            shared.first_of(model, wanted, 4),
            options.corpus(
                files, model, length=length, windows=limit, bos=bos, seed=seed, quiet=run.given["quiet"]
            ),
            top_k=top,
            length=length,
            prepend_bos=bos,
            limit=limit,
            resume=resume,
            progress=run.progress,
        )
    places = [(one, each) for one in found.layers for each in found.features]
    run.show(found, places=places[: shared.MOST_PLACES])


# -- steps --
