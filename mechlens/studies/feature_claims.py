"""The claims of "Language Model Features", as numbers of a `FeatureSearchStudy`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from mechlens.measures.statistics import exact_interval
from mechlens.results.claims import verdict_of
from mechlens.studies.claims import Claim, Measured
from mechlens.studies.feature_search import FOUR, OTHERS, REPEATED, FeatureSearchStudy, decoded, tables_of
from mechlens.studies.published import FEATURES_POST, PublishedTokens

NEAR = 0.95
"""Share of the exhaustive optimum that a gradient search should reach."""
HALF = 0.5
"""Share of the features that counts as most of them."""


def tokens_claim(table: PublishedTokens) -> Claim[FeatureSearchStudy]:
    """One line of Badger's tables."""
    return Claim(
        f"tokens of the {table.search} search in block {table.block}, features 0 to 3",
        " | ".join(table.inputs),
        FEATURES_POST,
        partial(_tokens, table=table),
    )


def _tokens(study: FeatureSearchStudy, *, table: PublishedTokens) -> Measured:
    layer, found, judged = table.block - 1, list[str](), table.search in ("complete", "greedy", "softmax")
    trained = study.complete["trained"]
    if table.search == "complete" and layer in trained.layers:
        row = trained.ids[trained.layers.index(layer), : len(FOUR), 0].tolist()
        found = [trained.strings[str(token)] for token in row]
    elif table.search == "greedy":
        searches = [each for each in study.greedy if each.layer == layer]
        found = [
            " ".join(each.strings[str(token)].strip() for token in ids)
            for each in searches
            for ids in each.ids[:, 0].tolist()
        ]
    elif table.search == "softmax":
        found = [each.strings[str(int(each.best_ids()[0]))] for each in study.softmax.get(layer, ())]
    elif table.search == "l1":
        found = [each.strings[str(decoded(each)[0])] for each in study.descents["trained"][: len(FOUR)]]
    reason = {"l1": " (from another start)", "cosine": "not run: Badger does not name the target"}
    said = " | ".join(each.strip() for each in found) + reason.get(table.search, "") or "not measured"
    if not judged or len(found) < len(table.inputs):
        return Measured(said, verdict=verdict_of(None))
    return Measured(said, verdict=verdict_of(all(map(_alike, found, table.inputs))))


def _alike(one: str, other: str) -> bool:
    return "".join(one.split()) == "".join(other.split())


def _counted(hits: Sequence[bool], words: str = "") -> tuple[float, str]:
    """A share, and the count in words with its interval."""
    value = sum(hits) / len(hits)
    low, high = exact_interval(value, len(hits))
    return value, f"{sum(hits)} of {len(hits)}{words} ({low:.2f} to {high:.2f})"


def _aligned(study: FeatureSearchStudy, *, name: str) -> Measured:
    """Whether most features agree."""
    if name not in study.alignments:
        return Measured("no other model was given", verdict=verdict_of(None))
    share = study.alignments[name].share()
    return Measured(
        str(share), verdict=verdict_of(share.value >= HALF if share.value == share.value else None)
    )


def _beyond_chance(study: FeatureSearchStudy, *, name: str, wanted: bool) -> Measured:
    share = study.alignments[name].share()
    return Measured(
        str(share), verdict=verdict_of((share.verdict == "aligned") == wanted if share.verdict else None)
    )


def _learned(study: FeatureSearchStudy) -> Measured:
    """Whether the layers of the trained model agree more than those with random weights, with disjoint
    intervals."""
    trained, random = (study.alignments[name].share() for name in ("trained", "random"))
    if not (trained.verdict and random.verdict):
        return Measured("a single layer has nothing to agree with", verdict=verdict_of(None))
    return Measured(
        f"trained {trained.value:.3f} ({trained.low:.3f} to {trained.high:.3f}), random weights "
        f"{random.value:.3f} ({random.low:.3f} to {random.high:.3f})",
        verdict=verdict_of(trained.low > random.high),
    )


def _decoded_alike(study: FeatureSearchStudy, *, name: str, judged: bool) -> Measured:
    """Whether most features decode to the same token in the trained model and another, as in Badger; and
    how often both have the same maximally activating token in a layer."""
    pairs = zip(study.descents["trained"], study.descents[name], strict=True)
    value, words = _counted([decoded(one) == decoded(other) for one, other in pairs], " decoded")
    share = study.alignments[f"trained_{name}"].share()
    holds = value >= HALF if judged else None
    return Measured(f"{words}; exhaustive search {share}", verdict=verdict_of(holds))


def _is_number(study: FeatureSearchStudy) -> Measured:
    """Whether decoded ids are the numbers of their features more often than by chance; and the same for the
    controls and for exhaustive search."""
    share = study.alignments["trained"].index_share()
    hits = {
        name: [decoded(each)[0] == int(each.selected[0, 1]) for each in searches]
        for name, searches in study.descents.items()
    }
    value, words = _counted(hits["trained"], " decoded")
    low, _ = exact_interval(value, len(hits["trained"]))
    return Measured(
        f"{words}; random weights {sum(hits['random'])}, random blocks {sum(hits['embeddings'])}; exhaustive "
        f"search {share.value:.4f}; chance {share.chance:.4f}",
        verdict=verdict_of(low > share.chance),
    )


def _gradient_differs(study: FeatureSearchStudy) -> Measured:
    """Whether both searches differ: from one start, as in Badger; and with the default settings."""
    table = study.to_features()
    value, words = _counted((table.descent_token != table.best_token).tolist())
    shares = table.share_of_optimum.tolist()
    near, known = sum(share >= NEAR for share in shares), sum(share == share for share in shares)
    return Measured(
        f"{words} from one start; by default {near} of {known} reach {NEAR:.0%} of the optimum",
        verdict=verdict_of(value >= HALF),
    )


def _resemble(study: FeatureSearchStudy) -> Measured:
    """Whether the embeddings found are closer to a real one than real ones are to each other."""
    descents = study.descents["trained"]
    found = statistics.mean(float(each.nearest_cosine[0].mean()) for each in descents)
    real = descents[0].token_cosine
    return Measured(
        f"cosine to the nearest real one {found:.3f}; between neighbors {real:.3f}",
        verdict=verdict_of(found > real),
    )


def _last_is_sum(study: FeatureSearchStudy) -> Measured:
    value, words = _counted(study.summed, f", each compared with up to {OTHERS} others")
    return Measured(words, verdict=verdict_of(value >= 1))


def _later_agree_less(study: FeatureSearchStudy) -> Measured:
    """How often two layers agree on the first token of a greedy input, and on later ones. Judged if the
    intervals, with one observation per feature, are disjoint."""
    inputs = torch.stack([each.ids[:, 0] for each in study.greedy])
    pairs = [(i, j) for i in range(len(inputs)) for j in range(i)]
    if not pairs or inputs.shape[-1] < 2:
        return Measured("a single layer or a single token", verdict=verdict_of(None))
    same = torch.stack([inputs[i] == inputs[j] for i, j in pairs]).double().mean((0, 1))
    first, later = float(same[0]), float(same[1:].mean())
    n = inputs.shape[1]
    (low, _), (_, high) = exact_interval(first, n), exact_interval(later, n)
    holds = True if high < low else False if later >= first else None
    return Measured(
        f"first token {first:.3f}, later ones {later:.3f}, of {n} features", verdict=verdict_of(holds)
    )


def _one_word(study: FeatureSearchStudy) -> Measured:
    value, words = _counted([len(set(decoded(each))) == 1 for each in study.repeated], " decoded")
    return Measured(words, verdict=verdict_of(value >= HALF))


def _alone(study: FeatureSearchStudy) -> Measured:
    """Whether the last block by itself has the same best tokens as the first."""
    if len(study.complete["trained"].layers) < 2:
        return Measured("the last layer is the first", verdict=verdict_of(None))
    same = [
        torch.equal(one.best_ids(), other.best_ids())
        for one, other in zip(study.alone, study.gradient, strict=True)
    ]
    value, words = _counted(same)
    return Measured(words, verdict=verdict_of(value >= HALF))


_made = partial(Claim, source=FEATURES_POST)
LAYERS_AGREE = _made(
    "most features have the same maximally activating token in two layers",
    "4 of 4 in blocks 2, 4 and 8 of GPT-2",
    measure=partial(_aligned, name="trained"),
)
AGREE_BEYOND_CHANCE = _made(
    "layers agree more often than by chance",
    "yes",
    measure=partial(_beyond_chance, name="trained", wanted=True),
)
RANDOM_LAYERS_DO_NOT = _made(
    "with random weights, layers agree no more often than by chance",
    "0 of 4 in GPT-2",
    measure=partial(_beyond_chance, name="random", wanted=False),
)
AGREEMENT_IS_LEARNED = _made(
    "layers agree more often than with random weights", "yes, in GPT-2", measure=_learned
)
RANDOM_IS_LIKE_TRAINED = _made(
    "most features decode to the same token with random weights",
    "identical in Llama 7b",
    measure=partial(_decoded_alike, name="random", judged=True),
)
EMBEDDINGS_MAKE_IT_SO = _made(
    "most features decode to the same token with random blocks on the trained embeddings",
    "not said",
    measure=partial(_decoded_alike, name="embeddings", judged=False),
)
SIZES_AGREE = _made(
    "most features have the same maximally activating token in a model of another size",
    "identical in Llama 7b, 13b and 30b",
    measure=partial(_aligned, name="trained_other"),
)
ID_IS_NUMBER = _made(
    "the id of a decoded token is the number of its feature",
    "tokens 0, 1, 2 of features 0, 1, 2 in Llama 7b",
    measure=_is_number,
)
GRADIENT_DIFFERS = _made(
    "gradient search and exhaustive search find different tokens",
    "4 of 4 differ in GPT-2",
    measure=_gradient_differs,
)
FOUND_RESEMBLE_REAL = _made(
    "embeddings found by gradients resemble real ones",
    "more than related words, in Llama 7b",
    measure=_resemble,
)
LAST_IS_SUM = _made(
    "greedy search by the last position and by the sum over positions agree",
    "the same inputs in GPT-2",
    measure=_last_is_sum,
)
LATER_AGREE_LESS = _made(
    "in greedy search, layers agree less on later tokens than on the first",
    "yes, in Llama 7b",
    measure=_later_agree_less,
)
ONE_WORD_REPEATED = _made(
    f"maximizing {REPEATED} positions of the first layer gives one token {REPEATED} times",
    "5 times the same in Llama's block 1",
    measure=_one_word,
)
ALONE_AS_THE_FIRST = _made(
    "the last layer's block alone has the best tokens of the first layer",
    "identical in Llama 13b's block 32",
    measure=_alone,
)
CLAIMS: tuple[Claim[FeatureSearchStudy], ...] = (
    LAYERS_AGREE,
    AGREE_BEYOND_CHANCE,
    RANDOM_LAYERS_DO_NOT,
    AGREEMENT_IS_LEARNED,
    RANDOM_IS_LIKE_TRAINED,
    EMBEDDINGS_MAKE_IT_SO,
    SIZES_AGREE,
    ID_IS_NUMBER,
    GRADIENT_DIFFERS,
    FOUND_RESEMBLE_REAL,
    LAST_IS_SUM,
    LATER_AGREE_LESS,
    ONE_WORD_REPEATED,
    ALONE_AS_THE_FIRST,
)


def claims_of(study: FeatureSearchStudy) -> list[Claim[FeatureSearchStudy]]:
    """The claims, and the lines of Badger's tables on this model."""
    return [*CLAIMS, *map(tokens_claim, tables_of(study.complete["trained"]))]
