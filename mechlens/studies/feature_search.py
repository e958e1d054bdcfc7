"""What excites features: the post's searches and claims on one model, each with a number and a verdict.

The post looks at four features by eye. Here a share over many stands beside what chance gives, the model
beside the same one with random weights, and these beside one that keeps the trained embeddings, so that it
can be told what training, the residual stream and the embedding each have to do with it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechlens.analyses.features import (
    feature_alignment,
    feature_examples,
    search_complete,
    search_gradient,
    search_greedy,
)
from mechlens.arguments import check_counts, check_model, generator_of
from mechlens.measures.statistics import exact_interval
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch
from mechlens.models.weights.randomize import random_like
from mechlens.progress import progress_bar
from mechlens.published import FEATURE_TOKENS, FEATURES, FEATURES_POST, Published, PublishedTokens
from mechlens.results import (
    NOT_JUDGED,
    Comparison,
    CompleteSearch,
    FeatureAlignment,
    FeatureExamples,
    GradientSearch,
    GreedySearch,
    Result,
)
from mechlens.studies.study import Study
from mechlens.text.corpus import Source
from mechlens.text.tokens import vocabulary_hash

if TYPE_CHECKING:
    import pandas as pd

FOUR = (0, 1, 2, 3)
"""The features that the post shows."""
REPEATED = 5
"""Tokens of the inputs in which every position is excited, as in the post."""
OTHERS = 256
"""Random tokens that a greedy input's last one is held against."""
NEAR = 0.95
"""Share of the exhaustive optimum that gradient search should reach."""


@dataclasses.dataclass(frozen=True)
class FeatureStudy(Study):
    """The searches on one model, on random weights, and how they agree."""

    complete: Mapping[str, CompleteSearch]
    """Of the `trained` model, with `random` weights, and with random weights but trained `embeddings`."""
    alignments: Mapping[str, FeatureAlignment]
    """`trained`, `random` and `embeddings`: layers with layers; `trained_random`, `trained_embeddings` and
    `trained_other`, where another model was given: the trained model with the others, layer by layer."""
    greedy: tuple[GreedySearch, ...]
    """Of some layers, features 0 to 3."""
    summed: tuple[bool, ...]
    """Of each of these inputs, whether its last token is, in whole runs of it and of other tokens there, the
    best by its own activation as well as by the sum over all tokens."""
    gradient: tuple[GradientSearch, ...]
    """One token for each of some features of the first layer, with the default settings."""
    descents: Mapping[str, tuple[GradientSearch, ...]]
    """The same from a single random start, as the post does it, on each of the three models; those with
    random weights begin elsewhere, or they could agree by the start."""
    repeated: tuple[GradientSearch, ...]
    """Several tokens from a single random start, the feature summed over all positions."""
    alone: tuple[GradientSearch, ...]
    """One token for each of some features of the last layer's block, without the blocks before it."""
    softmax: Mapping[int, tuple[GradientSearch, ...]]
    """With the post's prior, by layer, where it is published for the model."""
    examples: FeatureExamples | None
    """Real contexts, where a corpus was given."""

    @property
    def results(self) -> Mapping[str, Result]:
        found: dict[str, Result] = {f"complete_{name}": each for name, each in self.complete.items()}
        found |= {f"alignment_{name}": each for name, each in self.alignments.items()}
        found |= {f"greedy_layer_{each.layer}": each for each in self.greedy}
        # of many alike, the first; all are in `to_features`
        found["gradient"] = self.gradient[0]
        return found if self.examples is None else found | {"examples": self.examples}

    def to_features(self) -> pd.DataFrame:
        """One row per feature of the first layer that was searched by gradients: feature, best_token,
        optimum (of all tokens), gradient_token, gradient_activation, share_of_optimum, descent_token (from
        one start, decoded at its end), cosine (of that embedding to the nearest real one)."""
        import pandas as pd

        whole, rows = self.complete["trained"], []
        for search, descent in zip(self.gradient, self.descents["trained"], strict=True):
            feature = int(search.selected[0, 1])
            at = whole.layers.index(search.layer), whole.features.index(feature)
            best, optimum = int(whole.ids[at][0]), float(whole.activations[at][0])
            activation = search.best_activation()
            rows.append(
                (
                    feature,
                    whole.strings[str(best)],
                    optimum,
                    search.strings[str(int(search.best_ids()[0]))],
                    activation,
                    share_of(activation, optimum),
                    descent.strings[str(decoded(descent)[0])],
                    float(descent.nearest_cosine[0].mean()),
                )
            )
        columns = ["feature", "best_token", "optimum", "gradient_token", "gradient_activation"]
        columns += ["share_of_optimum", "descent_token", "cosine"]
        return pd.DataFrame(rows, columns=columns)


def reproduce_feature_search(
    model: LensModel,
    *,
    n_features: int = 32,
    n_tokens: int = 4,
    top_k: int = 5,
    corpus: Source | None = None,
    limit: int | None = 500,
    against: LensModel | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> FeatureStudy:
    """Search for what excites a model's features as the post does, and hold its claims against that.

    Args:
        model: with unprocessed weights.
        n_features: how many are searched by gradients, from feature 0 on.
        n_tokens: of greedy searches.
        top_k: best tokens to keep, for the overlap.
        corpus: text to find real contexts in, as for `feature_examples`; None finds none.
        limit: windows of it.
        against: a model of another size with the same tokenizer; the layers and features that both have are
            compared.
        seed: of random weights and of starts.
        progress: show bars; None shows them in a terminal and in Jupyter.

    Raises:
        ValueError: as the searches and `feature_alignment`; a size below 1.

    Source: Badger, "Language Model Features". Tokens are compared with its tables on GPT-2 small and medium,
    without spaces, for those are lost in print.
    Cost: three complete searches; greedy searches of four features in at most four layers; about two gradient
    searches and four from a single start for each feature.
    """
    check_model(model)
    check_counts(n_features=n_features)
    if n_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"greedy searches of {n_tokens} tokens do not fit into the model's context of {model.cfg.n_ctx}"
        )
    if against is not None and vocabulary_hash(model.tokenizer) != vocabulary_hash(against.tokenizer):
        raise ValueError("the other model has another tokenizer, so that its ids are other tokens: give none")
    width, last = model.cfg.d_model, model.cfg.n_layers - 1
    four = [feature for feature in FOUR if feature < width]
    # first, since a corpus may be none
    examples = None
    if corpus is not None:
        examples = feature_examples(
            model, corpus, layers=sorted({0, last}), features=four, limit=limit, progress=progress
        )
    search = functools.partial(search_complete, top_k=top_k, progress=progress)
    complete = {"trained": search(model)}
    trained = complete["trained"]
    alignments: dict[str, FeatureAlignment] = {}
    if against is not None:
        alignments["trained_other"] = feature_alignment(trained, search(against))
    features = trained.features[:n_features]
    few = features[: len(FOUR)]
    layers = some_layers(trained)
    own = {
        each
        for each in FEATURE_TOKENS
        if trained.model.name in each.models and trained.model.n_layers == each.n_layers
    }
    softmax = sorted({each.block - 1 for each in own if each.search == "softmax"} & set(trained.layers))
    steps = progress_bar(
        total=len(layers) + 6 * len(features) + len(softmax) * len(few),
        desc="features",
        unit="search",
        progress=progress,
    )

    def for_each(work: Callable[..., Any], values: Sequence[int], **options: Any) -> tuple[Any, ...]:
        found = []
        for value in values:
            found.append(work(value, **options))
            steps.update()
        return tuple(found)

    def gradient(
        feature: int,
        *,
        layer: int,
        of: LensModel = model,
        n_tokens: int = 1,
        seed: int = seed,
        **options: Any,
    ) -> GradientSearch:
        at = (slice(None), feature)
        return search_gradient(of, layer=layer, selection=at, n_tokens=n_tokens, seed=seed, **options)

    descend = functools.partial(for_each, gradient, features, layer=0, restarts=1)
    descents = {"trained": descend(complete=trained)}
    for name in ("random", "embeddings"):
        # one after the other, since each is a whole model
        other = random_like(model, seed, keep_embeddings=name == "embeddings")
        complete[name] = search(other)
        descents[name] = descend(of=other, seed=seed + 1)
        alignments[f"trained_{name}"] = feature_alignment(trained, complete[name])
        del other
    alignments |= {name: feature_alignment(each) for name, each in complete.items()}
    greedy = for_each(
        lambda layer: search_greedy(model, layer=layer, features=four, n_tokens=n_tokens, progress=progress),
        layers,
    )
    study = FeatureStudy(
        comparisons=(),
        complete=complete,
        alignments=alignments,
        greedy=greedy,
        summed=tuple(same for each in greedy for same in _sums_agree(model, each, seed)),
        gradient=for_each(gradient, features, layer=0, complete=trained),
        descents=descents,
        repeated=for_each(gradient, features, layer=0, n_tokens=REPEATED, restarts=1),
        alone=for_each(gradient, features, layer=last, isolated=True),
        softmax={layer: for_each(gradient, few, layer=layer, prior="softmax") for layer in softmax},
        examples=examples,
    )
    steps.close()
    comparisons = [compare(claim, study) for claim in FEATURES]
    comparisons += [compare_tokens(claim, study) for claim in FEATURE_TOKENS if claim in own]
    return dataclasses.replace(study, comparisons=tuple(comparisons))


def _sums_agree(model: LensModel, search: GreedySearch, seed: int) -> list[bool]:
    """Of each feature's input, whether its last token is the best there by both aggregations, in whole runs
    of it and of other tokens, as the post's two loops make them."""
    draw = generator_of(seed)
    others = torch.randperm(model.cfg.d_vocab, generator=draw)[:OTHERS]
    agree = []
    for feature, ids in zip(search.features, search.ids[:, 0], strict=True):
        last = torch.cat([ids[-1:], others[others != ids[-1]]])
        inputs = torch.cat([ids[:-1].expand(len(last), -1), last[:, None]], dim=1)
        kept: list[Tensor] = []
        name = f"blocks.{search.layer}.hook_resid_post"
        watch(model, inputs, {name: kept.append})
        own = kept[0][..., feature].float()
        # the first is the one that was found
        agree.append(int(own[:, -1].argmax()) == int(own.sum(1).argmax()) == 0)
    return agree


def some_layers(search: CompleteSearch) -> list[int]:
    """All layers of a shallow model; of a deeper one the first, a third and two thirds of the way, and the
    last, as in the post."""
    n = len(search.layers)
    if n <= 4:
        return list(search.layers)
    return [search.layers[max(0, round(n * share) - 1)] for share in (0, 1 / 3, 2 / 3, 1)]


def decoded(search: GradientSearch) -> list[int]:
    """The tokens that the first restart's embeddings stand for by the pseudo-inverse, as in the post."""
    return list(search.decoded_ids["pinv"][0].tolist())


def share_of(activation: float, optimum: float) -> float:
    """How much of an optimum was reached; nan where that is not above 0, since a share would say nothing."""
    return activation / optimum if optimum > 0 else float("nan")


# -- claims ----------------------------------------------------------------------------------------


def compare(claim: Published, study: FeatureStudy) -> Comparison:
    """One claim of the post beside its number."""
    text, measure = CLAIMS[claim.what]
    measured, holds = measure(study, claim.threshold or 0.0)
    return Comparison(
        claim=text,
        published=claim.value,
        measured=measured,
        low=claim.threshold,
        high=None,
        verdict=NOT_JUDGED if holds is None else "reproduced" if holds else "not reproduced",
        source=claim.source,
    )


def compare_tokens(claim: PublishedTokens, study: FeatureStudy) -> Comparison:
    """One line of the post's tables beside what was found."""
    layer, found, judged = claim.block - 1, list[str](), claim.search in ("complete", "greedy", "softmax")
    trained = study.complete["trained"]
    if claim.search == "complete" and layer in trained.layers:
        row = trained.ids[trained.layers.index(layer), : len(FOUR), 0].tolist()
        found = [trained.strings[str(token)] for token in row]
    elif claim.search == "greedy":
        searches = [each for each in study.greedy if each.layer == layer]
        found = [
            " ".join(each.strings[str(token)].strip() for token in ids)
            for each in searches
            for ids in each.ids[:, 0].tolist()
        ]
    elif claim.search == "softmax":
        found = [each.strings[str(int(each.best_ids()[0]))] for each in study.softmax.get(layer, ())]
    elif claim.search == "l1":
        found = [each.strings[str(decoded(each)[0])] for each in study.descents["trained"][: len(FOUR)]]
    same = sum(map(_alike, found, claim.inputs))
    reason = {"l1": ": from another start", "cosine": "the post does not say with which target"}
    tokens = " | ".join(each.strip() for each in found)
    return Comparison(
        claim=f"{claim.search} search, block {claim.block}, features 0 to 3",
        published=" | ".join(claim.inputs),
        measured=f"{tokens}{reason.get(claim.search, '')}" if found else reason.get(claim.search, "nothing"),
        low=None,
        high=None,
        verdict=NOT_JUDGED
        if not judged or len(found) < len(claim.inputs)
        else "reproduced"
        if same == len(claim.inputs)
        else "not reproduced",
        source=FEATURES_POST,
    )


def _alike(one: str, other: str) -> bool:
    return "".join(one.split()) == "".join(other.split())


def _counted(hits: Sequence[bool], words: str = "") -> tuple[float, str]:
    """A share of so many, in words with its interval."""
    value = sum(hits) / len(hits)
    low, high = exact_interval(value, len(hits))
    return value, f"{sum(hits)} of {len(hits)}{words} ({low:.2f} to {high:.2f})"


Measured = tuple[str, bool | None]


def _aligned(name: str, study: FeatureStudy, threshold: float) -> Measured:
    """Whether most features agree; without a threshold nothing is claimed."""
    share = study.alignments[name].share()
    return str(share), share.value >= threshold if threshold and share.value == share.value else None


def _sizes(study: FeatureStudy, threshold: float) -> Measured:
    if "trained_other" not in study.alignments:
        return "no other model was given", None
    return _aligned("trained_other", study, threshold)


def _beyond_chance(name: str, wanted: bool, study: FeatureStudy, threshold: float) -> Measured:
    share = study.alignments[name].share()
    return str(share), (share.verdict == "aligned") == wanted if share.verdict else None


def _learned(study: FeatureStudy, threshold: float) -> Measured:
    """Whether the trained layers agree more than those of random weights, their intervals apart."""
    trained, random = (study.alignments[name].share() for name in ("trained", "random"))
    if not (trained.verdict and random.verdict):
        return "one layer alone agrees with none", None
    return (
        f"trained {trained.value:.3f} ({trained.low:.3f} to {trained.high:.3f}), random weights "
        f"{random.value:.3f} ({random.low:.3f} to {random.high:.3f})",
        trained.low > random.high,
    )


def _decoded_alike(name: str, study: FeatureStudy, threshold: float) -> Measured:
    """Whether most features decode to the same token in the trained model and another, as in the post; beside
    it, how often they have the same best token in any layer."""
    pairs = zip(study.descents["trained"], study.descents[name], strict=True)
    value, words = _counted([decoded(one) == decoded(other) for one, other in pairs], " decoded")
    share = study.alignments[f"trained_{name}"].share()
    return f"{words}; complete search {share}", value >= threshold if threshold else None


def _is_number(study: FeatureStudy, threshold: float) -> Measured:
    """Whether decoded ids are features' numbers more often than by chance; beside it, those with random
    weights and those of complete search."""
    share = study.alignments["trained"].index_share()
    hits = {
        name: [decoded(each)[0] == int(each.selected[0, 1]) for each in searches]
        for name, searches in study.descents.items()
    }
    value, words = _counted(hits["trained"], " decoded")
    low, _ = exact_interval(value, len(hits["trained"]))
    return (
        f"{words}; random weights {sum(hits['random'])}, random blocks {sum(hits['embeddings'])}; complete "
        f"search {share.value:.4f}; chance {share.chance:.4f}",
        low > share.chance,
    )


def _gradient_differs(study: FeatureStudy, threshold: float) -> Measured:
    """From one start, decoded at the end, as in the post; and with the default settings, run as tokens."""
    table = study.to_features()
    value, words = _counted((table.descent_token != table.best_token).tolist())
    shares = table.share_of_optimum.tolist()
    near, known = sum(share >= NEAR for share in shares), sum(share == share for share in shares)
    return f"{words} from one start; by default {near} of {known} reach {NEAR:.0%} of the optimum", (
        value >= threshold
    )


def _resemble(study: FeatureStudy, threshold: float) -> Measured:
    """Whether found embeddings are nearer to a real one than real ones are to each other."""
    descents = study.descents["trained"]
    found = statistics.mean(float(each.nearest_cosine[0].mean()) for each in descents)
    real = descents[0].token_cosine
    return f"cosine to the nearest real one {found:.3f}; between neighbours {real:.3f}", found > real


def _last_is_sum(study: FeatureStudy, threshold: float) -> Measured:
    value, words = _counted(study.summed, f", held against up to {OTHERS} others each")
    return words, value >= threshold


def _later_agree_less(study: FeatureStudy, threshold: float) -> Measured:
    """Of greedy inputs, in how many of the pairs of layers the first token agrees, and the later ones; judged
    where the intervals, of one observation for each feature, are apart."""
    inputs = torch.stack([each.ids[:, 0] for each in study.greedy])
    pairs = [(i, j) for i in range(len(inputs)) for j in range(i)]
    if not pairs or inputs.shape[-1] < 2:
        return "one layer or one token alone", None
    same = torch.stack([inputs[i] == inputs[j] for i, j in pairs]).double().mean((0, 1))
    first, later = float(same[0]), float(same[1:].mean())
    n = inputs.shape[1]
    (low, _), (_, high) = exact_interval(first, n), exact_interval(later, n)
    holds = True if high < low else False if later >= first else None
    return f"first token {first:.3f}, later ones {later:.3f}, of {n} features", holds


def _one_word(study: FeatureStudy, threshold: float) -> Measured:
    value, words = _counted([len(set(decoded(each))) == 1 for each in study.repeated], " decoded")
    return words, value >= threshold


def _alone(study: FeatureStudy, threshold: float) -> Measured:
    """Whether the last block by itself has the same best tokens as the first."""
    if len(study.complete["trained"].layers) < 2:
        return "the last layer is the first", None
    same = [
        torch.equal(one.best_ids(), other.best_ids())
        for one, other in zip(study.alone, study.gradient, strict=True)
    ]
    value, words = _counted(same)
    return words, value >= threshold


CLAIMS: Mapping[str, tuple[str, Callable[[FeatureStudy, float], Measured]]] = {
    "layers_agree": (
        "most features have the same best token in two layers",
        functools.partial(_aligned, "trained"),
    ),
    "layers_agree_beyond_chance": (
        "layers agree more often than by chance",
        functools.partial(_beyond_chance, "trained", True),
    ),
    "untrained_layers_do_not": (
        "with random weights, layers agree by chance only",
        functools.partial(_beyond_chance, "random", False),
    ),
    "agreement_is_learned": ("layers agree more than with random weights", _learned),
    "untrained_is_like_trained": (
        "most features decode to the same token with random weights",
        functools.partial(_decoded_alike, "random"),
    ),
    "embeddings_make_it_so": (
        "most do with random blocks on the trained embeddings",
        functools.partial(_decoded_alike, "embeddings"),
    ),
    "sizes_agree": ("most features have the same best token in a model of another size", _sizes),
    "id_is_number": ("a decoded token's id is the feature's number", _is_number),
    "gradient_differs": ("gradient search finds other tokens than complete search", _gradient_differs),
    "found_resemble_real": ("embeddings that gradients find resemble real ones", _resemble),
    "last_is_sum": ("greedy search by the last token or by the sum is the same", _last_is_sum),
    "later_tokens_agree_less": (
        "greedy search: layers agree less on later tokens than on the first",
        _later_agree_less,
    ),
    "one_word_repeated": (
        f"exciting {REPEATED} positions of the first layer gives one token {REPEATED} times",
        _one_word,
    ),
    "alone_as_the_first": (
        "the last layer's block alone has the first layer's best tokens",
        _alone,
    ),
}
