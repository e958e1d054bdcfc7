"""`mechlens features`: what excites a model's features, on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import feature_options as shared
from mechlens.cli import options
from mechlens.cli.feature_options import (
    BosOption,
    FeaturesOption,
    LayersOption,
    OutOption,
    PrefixOption,
    SiteOption,
)
from mechlens.cli.options import (
    BUNDLED,
    CacheOption,
    DeviceOption,
    DtypeOption,
    HelpOption,
    JsonOption,
    ModelOption,
    NoSeedOption,
    QuietOption,
    ResumeOption,
    RevisionOption,
)
from mechlens.cli.output import deliver, file_of

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel
    from mechlens.results import CompleteSearch, FeatureAlignment
    from mechlens.show.section import Section

features = typer.Typer(rich_markup_mode=None, add_help_option=False)


@features.callback()
def features_help(wants_help: HelpOption = False) -> None:
    """Find what excites a feature, one element of a block's output: single tokens, whole inputs, and real
    contexts. Models are loaded with their weights as they were trained, since features live in these."""


@features.command(
    epilog="Example: mechlens features complete --layer 0:4 --feature 0:8 --out tokens.html",
    short_help="Find the tokens that excite each feature most.",
)
def complete(
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    site: SiteOption = "resid_post",
    prefix: PrefixOption = None,
    bos: BosOption = False,
    top: Annotated[int, typer.Option(min=1, help="How many tokens of each feature to keep.")] = 1,
    model: ModelOption = BUNDLED,
    resume: ResumeOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    seed: NoSeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the tokens of the whole vocabulary that excite each feature most, in one pass for all of them.
    Without --layer of every layer, without --feature of features 0 to 7. The least exciting ones are in
    --json and --out."""
    given = dict(locals())
    layers, wanted = shared.numbers("--layer", layer), shared.numbers("--feature", feature)
    shared.check_common(given)
    shared.check_page(out, len(wanted or []), "tokens")
    loaded = shared.load(given)
    from mechlens import terminal
    from mechlens.analyses.features import search_complete

    with shared.as_typed(), options.saving_progress(resume):
        found = search_complete(
            loaded,
            layers=layers,
            features=wanted or range(min(8, shared.n_features(loaded, site))),
            site=site,
            prefix=prefix,
            prepend_bos=bos,
            top_k=top,
            resume=resume,
            progress=options.progress(quiet),
        )

    def sections() -> list[Section]:
        from mechlens.show.features import complete_search_section

        # without it the section chooses some
        return [complete_search_section(found, features=found.features)]

    deliver(
        given,
        save=file_of(
            [found],
            title="Tokens that excite features",
            sections=sections,
            command=options.command("features complete", complete, given),
        ),
        tables=lambda: terminal.print_complete_search(found),
        as_object=lambda: terminal.complete_search_json(found),
    )


@features.command(
    epilog="Example: mechlens features greedy --layer 3 --feature 0:4 --tokens 4",
    short_help="Build inputs that excite a feature, token by token.",
)
def greedy(
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to find.")] = 4,
    aggregate: Annotated[
        str,
        typer.Option(
            help="What ranks the inputs of a beam: the activation at the last token, or the sum over all."
        ),
    ] = "last",
    beam: Annotated[int, typer.Option(min=1, help="Inputs to go on with at each step.")] = 1,
    site: SiteOption = "resid_post",
    prefix: PrefixOption = None,
    bos: BosOption = False,
    model: ModelOption = BUNDLED,
    resume: ResumeOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    seed: NoSeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build inputs from left to right, each token the one of the whole vocabulary that excites a feature most
    behind those before it. Without --layer of the last layer, without --feature of features 0 to 3."""
    given = dict(locals())
    layers, wanted = shared.numbers("--layer", layer) or [-1], shared.numbers("--feature", feature)
    shared.check_common(given)
    if len(layers) > 1:
        if resume is not None:
            raise ValueError(f"--resume is for the search of one layer, but {len(layers)} are given")
        if out is not None and out.suffix == ".safetensors":
            raise ValueError(
                f"a .safetensors file holds one search, but {len(layers)} layers are asked for: give one, or "
                "save to .html or .csv"
            )
    options.check_known("--aggregate", aggregate, shared.AGGREGATES)
    loaded = shared.load(given)
    from mechlens import terminal
    from mechlens.analyses.features import search_greedy

    found = []
    with shared.as_typed(), options.saving_progress(resume):
        for each in shared.chosen("layer", layers, loaded.cfg.n_layers):
            found.append(
                search_greedy(
                    loaded,
                    layer=each,
                    features=wanted or range(min(4, shared.n_features(loaded, site))),
                    n_tokens=tokens,
                    aggregate=aggregate,
                    site=site,
                    prefix=prefix,
                    prepend_bos=bos,
                    beam=beam,
                    resume=resume,
                    progress=options.progress(quiet),
                )
            )

    def sections() -> list[Section]:
        from mechlens.show.features import greedy_search_section

        return [greedy_search_section(found)]

    deliver(
        given,
        save=file_of(
            found,
            title="Inputs that excite features",
            sections=sections,
            command=options.command("features greedy", greedy, given),
        ),
        tables=lambda: terminal.print_greedy_search(found),
        as_object=lambda: terminal.greedy_search_json(found),
    )


@features.command(
    epilog="Example: mechlens features gradient --layer 3 --feature 7 --out gradient.html",
    short_help="Search embeddings by gradients, and read them as tokens.",
)
def gradient(
    layer: Annotated[
        int | None, typer.Option("--layer", "-l", help="Whose features. [default: the last layer's]")
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            "--feature",
            "--features",
            "-f",
            help="A feature, or a range such as 0:4; several are searched together. [default: 0, for a "
            "target all]",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens are searched together.")] = 1,
    position: Annotated[
        int | None,
        typer.Option(help="The searched token at which the feature counts, from 0. [default: every one]"),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="constant (the distance to a large one is made small, as in the source), maximise, maximin "
            "(the smallest of several is made large), l1 or cosine (the distance to the activations of "
            "--target), or continuation (--target follows)."
        ),
    ] = "constant",
    target: Annotated[
        str | None, typer.Option(help="A text: of as many tokens as --tokens, or the continuation.")
    ] = None,
    constant: Annotated[
        float | None,
        typer.Option(
            help="Of the objective constant; what is larger is made smaller. [default: 1000, or ten times "
            "what the starts reach]"
        ),
    ] = None,
    prior: Annotated[str, typer.Option(help=f"{', '.join(shared.PRIORS)}.")] = "none",
    prior_weight: Annotated[
        float | None, typer.Option(help="Of the prior norm or nearest. [default: 1]")
    ] = None,
    optimiser: Annotated[str, typer.Option(help=f"{', '.join(shared.OPTIMISERS)}.")] = "Adam",
    learning_rate: Annotated[
        float, typer.Option(help="In units of an embedding element's root mean square.")
    ] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="At most; it stops when nothing gets better.")] = 40,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop when no restart has got better for so many steps.")
    ] = 10,
    restarts: Annotated[int, typer.Option(min=1, help="Independent starts, run together.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the starts.")] = 0,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="The layer's block alone, without the blocks before it.")
    ] = False,
    site: SiteOption = "resid_post",
    prefix: PrefixOption = None,
    bos: BosOption = False,
    model: ModelOption = BUNDLED,
    resume: ResumeOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Change embeddings by gradients until they excite a feature, and read them as tokens in two ways. Of one
    token and one feature the best of all tokens is searched, too, and stands beside."""
    given = dict(locals())
    wanted = shared.numbers("--feature", feature)
    shared.check_common(given)
    shared.check_gradient(given)
    loaded = shared.load(given)
    from mechlens import terminal
    from mechlens.analyses.features import search_complete, search_gradient

    progress = options.progress(quiet)
    picked = None
    if objective != "continuation" and (wanted or target is None):
        picked = shared.chosen("feature", wanted or [0], shared.n_features(loaded, site))
    selection: Any = None
    if objective != "continuation":
        each = slice(None)
        selection = (each if position is None else position, each if picked is None else picked)
    same: dict[str, Any] = {"site": site, "prefix": prefix, "prepend_bos": bos, "progress": progress}
    known = None
    with shared.as_typed(), options.saving_progress(resume):
        (deepest,) = shared.chosen("layer", [-1 if layer is None else layer], loaded.cfg.n_layers)
        place = None if objective == "continuation" else deepest
        one = picked is not None and len(picked) == tokens == 1 and not isolated
        # a constant of one's own may be less than what there is, and then asks for something else
        largest = objective == "maximise" or (objective == "constant" and constant is None)
        if place is not None and one and largest:
            known = search_complete(loaded, layers=[place], features=picked, **same)
        found = search_gradient(
            loaded,
            layer=place,
            selection=selection,
            n_tokens=tokens,
            objective=objective,
            target=target,
            constant=constant,
            prior=prior,
            prior_weight=1.0 if prior_weight is None else prior_weight,
            optimiser=optimiser,
            learning_rate=learning_rate,
            steps=steps,
            patience=patience,
            restarts=restarts,
            seed=seed,
            isolated=isolated,
            complete=known,
            resume=resume,
            **same,
        )

    def sections() -> list[Section]:
        from mechlens.show.features import gradient_search_section

        return [gradient_search_section([found])]

    deliver(
        given,
        save=file_of(
            [found],
            title="Embeddings that excite features",
            sections=sections,
            command=options.command("features gradient", gradient, given),
        ),
        tables=lambda: terminal.print_gradient_search(found, known),
        as_object=lambda: terminal.gradient_search_json(found),
    )


@features.command(
    epilog="Example: mechlens features align --layer 0:4 --top 5 --out alignment.html",
    short_help="Compare features' best tokens across layers and models.",
)
def align(
    name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As --model, which it stands for.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model with the same tokenizer: its layer n with layer n.")
    ] = None,
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    site: SiteOption = "resid_post",
    prefix: PrefixOption = None,
    bos: BosOption = False,
    top: Annotated[int, typer.Option(min=1, help="How many of the best tokens the overlap is of.")] = 5,
    random: Annotated[
        bool,
        typer.Option(
            "--random/--no-random", help="Compare with random weights, once all, once all but embeddings."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the random weights.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help=f"Bundled name, Hugging Face name or local directory. [default: {BUNDLED}]"
        ),
    ] = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print how often features of the same number have the same best token: in two layers of a model, in the
    model and in random weights, in two models; each beside chance. Without --layer of all layers, without
    --feature of all features."""
    given = dict(locals())
    layers, wanted = shared.numbers("--layer", layer), shared.numbers("--feature", feature)
    if name is not None and model is not None:
        raise ValueError(f"the model is given twice, as {name} and as --model {model}: leave one out")
    shared.check_common(given)
    alone = not random and against is None
    if out is not None and out.suffix == ".safetensors" and not alone:
        raise ValueError(
            "a .safetensors file holds one comparison: leave out --against and add --no-random, or save to "
            ".html or .csv"
        )
    if alone and layers is not None and len(layers) == 1:
        raise ValueError("one layer has no other to be compared with: give several, --random or --against")
    loaded = shared.load(given | {"model": name or model or BUNDLED})
    other = None if against is None else shared.load(given | {"model": against, "revision": None})
    from mechlens import terminal
    from mechlens.analyses.features import feature_alignment, search_complete

    if layers is not None:
        layers = shared.chosen("layer", layers, loaded.cfg.n_layers)
    if wanted is not None:
        wanted = shared.chosen("feature", wanted, shared.n_features(loaded, site))
    if other is not None:
        shared.check_other(loaded, other, against, layers, wanted, site)
    several = len(layers or range(loaded.cfg.n_layers)) > 1
    if alone and not several:
        raise ValueError("this model has one layer, which has no other to be compared with: add --against")

    def search(one: LensModel) -> CompleteSearch:
        return search_complete(
            one,
            layers=layers,
            features=wanted,
            site=site,
            prefix=prefix,
            prepend_bos=bos,
            top_k=top,
            progress=options.progress(quiet),
        )

    found: dict[str, FeatureAlignment] = {}
    with shared.as_typed():
        trained = search(loaded)
        # of layers and models that nothing is contrasted with, nobody asks whether they are trained
        own = "trained" if random else trained.model.name
        if several:
            found["layers, trained" if random else "layers"] = feature_alignment(trained)
        untrained = {}
        if random:
            from mechlens.models.weights.randomize import random_like

            untrained["random weights"] = search(random_like(loaded, seed))
            untrained["random blocks"] = search(random_like(loaded, seed, keep_embeddings=True))
        if several:
            for kind, each in untrained.items():
                found[f"layers, {kind}"] = feature_alignment(each)
        for kind, each in untrained.items():
            found[f"trained vs. {kind}"] = feature_alignment(trained, each)
        if other is not None:
            compared = feature_alignment(trained, search(other))
            found[f"{own} vs. {compared.other.name}"] = compared

    def sections() -> list[Section]:
        from mechlens.show.feature_alignment import feature_alignment_section

        return [feature_alignment_section(list(found.values()), names=list(found))]

    deliver(
        given,
        save=file_of(
            list(found.values()),
            title="Alignment of features",
            sections=sections,
            command=options.command("features align", align, given),
            names=list(found),
        ),
        tables=lambda: terminal.print_feature_alignment(found),
        as_object=lambda: terminal.feature_alignment_json(found),
    )


@features.command(
    epilog="Example: mechlens features examples texts.jsonl --layer 3 --feature 7 --limit 1000",
    short_help="Find the contexts of real text that excite each feature most.",
)
def examples(
    files: options.CorpusArgument = None,
    layer: LayersOption = None,
    feature: FeaturesOption = None,
    top: Annotated[int, typer.Option(min=1, help="How many contexts of each feature to keep.")] = 5,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a context. [default: 128, or what the model holds]")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Contexts to read at most. [default: all]"),
    ] = None,
    bos: options.BosOption = None,
    site: SiteOption = "resid_post",
    model: ModelOption = BUNDLED,
    resume: ResumeOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of what the model writes itself.")] = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the contexts of real text that excite each feature most, and mark the token that does. Without
    FILES in what the model writes itself, without --layer of the last layer, without --feature of features 0
    to 3."""
    given = dict(locals())
    layers, wanted = shared.numbers("--layer", layer) or [-1], shared.numbers("--feature", feature)
    shared.check_common(given)
    options.check_corpus(files)
    # each in each layer
    shared.check_page(out, len(layers) * len(wanted or range(4)), "contexts")
    loaded = shared.load(given)
    from mechlens import terminal
    from mechlens.analyses.features import feature_examples

    with shared.as_typed(), options.saving_progress(resume):
        found = feature_examples(
            loaded,
            options.corpus(files, loaded, length=length, windows=limit, bos=bos, seed=seed, quiet=quiet),
            layers=layers,
            features=wanted or range(min(4, shared.n_features(loaded, site))),
            site=site,
            top_k=top,
            length=length,
            prepend_bos=bos,
            limit=limit,
            resume=resume,
            progress=options.progress(quiet),
        )

    def sections() -> list[Section]:
        from mechlens.show.features import feature_examples_section

        places = [(one, other) for one in found.layers for other in found.features]
        return [feature_examples_section(found, places)]

    deliver(
        given,
        save=file_of(
            [found],
            title="Contexts that excite features",
            sections=sections,
            command=options.command("features examples", examples, given),
        ),
        tables=lambda: terminal.print_feature_examples(found),
        as_object=lambda: terminal.feature_examples_json(found),
    )
