"""What the logit-lens post saw in GPT-2, measured on any model: numbers in the place of pictures.

A layer's *depth* is the share of the model that has run after it: (layer + 1) / n_layers, 1 for the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.logit_lens import logit_lens
from mechlens.arguments import check_counts, check_model, generator_of
from mechlens.measures.statistics import bootstrap_interval
from mechlens.models.protocol import LensModel
from mechlens.published import LOGIT_LENS, Published
from mechlens.results import NOT_JUDGED, Comparison, LogitLensResult, Result
from mechlens.studies.study import Study
from mechlens.text.tokens import drawable_tokens, token_strings

PROSE = (
    "We ask how a language model settles on the next word while it reads. Earlier work looked at single "
    "neurons or at attention, and said little about the order in which a guess takes shape. Here we read "
    "the stream of vectors between the layers with the model's own output matrix. On most words the final "
    "guess is among the first ten long before the last layer has run, and what remains is a matter of "
    "degree. We find exceptions where a rare name must be copied from far back, and we discuss what they "
    "mean for those who would like to stop a model early in order to save time.",
    "It was late in the evening when the two brothers came down to the river. The elder had a lantern in "
    "his hand, and he held it over the water and looked for the boat. There was no boat. They stood for "
    "some time without a word; then the younger sat down on a stone and began to laugh, for he had seen "
    "that the rope was still tied to the old tree, and that nobody but himself could have cut it.",
)
"""Prose as it comes: an abstract of a paper that nobody wrote, and a piece of a story."""
EIFFEL = "The Eiffel Tower is in the city of"
COPY = "The clerk wrote the word{} in his book. Then the clerk wrote the word{}"
LOOPS = (
    "The bell rang and the door opened. ",
    "She counted the coins on the table again. ",
    "Nobody in the village had seen the ship. ",
    "He put the letter back into the drawer. ",
)
ROUNDS = 6
TOP = 10
"""A token has *entered* where it is among the ten most likely ones."""
SETTLED_ROUNDS = 2
"""Rounds of a loop before it counts as one."""
RARE_SHARE = 0.8
"""Tokenizers number tokens by how early they were found, commonest first; ids above this share are rare."""


@dataclasses.dataclass(frozen=True)
class LensStudy(Study):
    """The post's examples on one model, and its claims as numbers."""

    prose: LogitLensResult
    attention: LogitLensResult
    """`attn_out` alone on the first piece of prose."""
    mlp: LogitLensResult
    """`mlp_out` alone on the same."""
    eiffel: LogitLensResult
    copying: LogitLensResult
    """A rare token that is written twice in the same words, a sequence for each token."""
    repetition: LogitLensResult
    """Sentences over and over."""

    @property
    def results(self) -> Mapping[str, Result]:
        names = ("prose", "attention", "mlp", "eiffel", "copying", "repetition")
        return {name: getattr(self, name) for name in names}


def reproduce_logit_lens(
    model: LensModel,
    *,
    rare: str | None = None,
    n_rare: int = 24,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> LensStudy:
    """Read the post's kinds of text through the lens and hold its claims against what is measured.

    Args:
        rare: a token for the first of the copied ones; None takes the post's, ` plasma`, where it is one
            token, and else draws it like the others.
        n_rare: how many rare tokens are copied; they are drawn among plain words with high ids.
        seed: of the generator that draws them.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Raises:
        ValueError: no tokenizer, `rare` is no single token, or `n_rare` is below 1.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens". The texts are our own; what is claimed
    there in words is measured as `CLAIMS` says.
    Cost: six runs of `logit_lens`, about 2,000 positions in all.
    """
    check_model(model)
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it reads no text")
    words = rare_words(model, n_rare, seed=seed, first=rare)
    bos = prepend_bos
    prose = logit_lens(model, PROSE, prepend_bos=bos)
    found = LensStudy(
        comparisons=(),
        prose=prose,
        attention=logit_lens(model, PROSE[0], component="attn_out", prepend_bos=bos),
        mlp=logit_lens(model, PROSE[0], component="mlp_out", prepend_bos=bos),
        eiffel=logit_lens(model, EIFFEL, prepend_bos=bos),
        copying=logit_lens(model, [COPY.format(word, word) for word in words], prepend_bos=bos),
        repetition=logit_lens(model, [(sentence * ROUNDS).strip() for sentence in LOOPS], prepend_bos=bos),
    )
    return dataclasses.replace(found, comparisons=tuple(compare(claim, found) for claim in LOGIT_LENS))


def rare_words(model: LensModel, count: int, *, seed: int, first: str | None = None) -> list[str]:
    """Plain words of one token that the tokenizer has late in its vocabulary, each with its space before it.

    Raises:
        ValueError: fewer than `count` such words, or `first` is no single token.
    """

    def single(word: str) -> bool:
        return len(model.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1

    check_counts(n_rare=count)
    if first is not None and not single(first):
        raise ValueError(f"rare={first!r} is not one token of this model")
    if first is None and single(" plasma"):
        first = " plasma"
    ids = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    late = ids[int(RARE_SHARE * len(ids)) :]
    words = [
        text
        for text in token_strings(model, late)
        if text.startswith(" ")
        and text[1:].isalpha()
        and text[1:].islower()
        and len(text) > 4
        and single(text)
    ]
    wanted = count - (first is not None)
    if len(words) < wanted:
        raise ValueError(f"this tokenizer has {len(words)} rare words of one token, but n_rare is {count}")
    order = torch.randperm(len(words), generator=generator_of(seed)).tolist()
    return [*([first] if first is not None else []), *(words[i] for i in order[:wanted])]


def compare(claim: Published, study: LensStudy) -> Comparison:
    """One claim of the post beside its number."""
    text, at_least, measure = CLAIMS[claim.what]
    mean, low, high, holds = measure(study, claim.threshold or 0.0)
    measured = f"{mean:.3f}" + ("" if low != low else f" ({low:.3f} to {high:.3f})")
    return Comparison(
        claim=text,
        published=claim.value,
        measured=mean if mean != mean else measured,
        low=claim.threshold if at_least else None,
        high=None if at_least else claim.threshold,
        verdict=NOT_JUDGED if holds is None else "reproduced" if holds else "not reproduced",
        source=claim.source,
    )


# -- claims ----------------------------------------------------------------------------------------

_Number = tuple[float, float, float, bool | None]
"""Mean, the 95% interval of it (nan where it is no mean), and whether the claim holds (None: not judged)."""


def depth_of_entry(rank: Float[Tensor, "row *where"], *, top: int = TOP) -> Float[Tensor, "*where"]:
    """Depth of the first layer after which a token is among the `top` most likely; nan where it never is.

    Args:
        rank: by row of the lens, `embed` first.
    """
    inside = rank[1:] <= top
    depth = (inside.int().argmax(0) + 1) / len(inside)
    return depth.masked_fill(~inside.any(0), torch.nan)


def _mean(samples: Tensor) -> tuple[float, float, float]:
    known = samples[~samples.isnan()]
    if len(known) < 2:
        return torch.nan, torch.nan, torch.nan
    low, high = bootstrap_interval(known)
    return float(known.mean()), float(low), float(high)


def _read(result: LogitLensResult) -> Tensor:
    """`[batch, read]`: neither padding nor BOS, which is there to be attended to."""
    real = result.mask[:, list(result.positions)].clone()
    if result.prepend_bos:
        real[:, [at for at, position in enumerate(result.positions) if position == 0]] = False
    return real


def _final_guess_enters(study: LensStudy, threshold: float) -> _Number:
    prose = study.prose
    mean, low, high = _mean(depth_of_entry(prose.rank["final"][:, _read(prose)]))
    return mean, low, high, mean <= threshold


def _mean_kl(study: LensStudy) -> list[float]:
    prose = study.prose
    return prose.kl_final[:, _read(prose)].mean(1).tolist()


def _kl_falls(study: LensStudy, threshold: float) -> _Number:
    _, *layers = _mean_kl(study)
    falls = [after < before for before, after in pairwise(layers)]
    if not falls:
        return torch.nan, torch.nan, torch.nan, None
    share = sum(falls) / len(falls)
    return share, torch.nan, torch.nan, share >= threshold


def _largest_fall(study: LensStudy, threshold: float) -> _Number:
    _, *layers = _mean_kl(study)
    falls = [before - after for before, after in pairwise(layers)]
    if len(falls) < 2 or layers[0] <= layers[-1]:
        return torch.nan, torch.nan, torch.nan, None
    share = max(falls) / (layers[0] - layers[-1])
    return share, torch.nan, torch.nan, share <= threshold


def _input_is_apart(study: LensStudy, threshold: float) -> _Number:
    embed, *layers = _mean_kl(study)
    ratio = embed / max(layers)
    return ratio, torch.nan, torch.nan, ratio >= threshold


def _rare_copy_enters(study: LensStudy, threshold: float) -> _Number:
    copying = study.copying
    # the copied token is the last one, so that its prediction stands one before it
    before = copying.mask.sum(1) - 2
    rank = copying.rank["next"][:, torch.arange(len(before)), before]
    depth = depth_of_entry(rank)
    mean, low, high = _mean(depth)
    # of a model that does not copy nothing can be said
    copied = float((~depth.isnan()).float().mean())
    return mean, low, high, None if copied < 0.5 else mean >= threshold


def _repetition_noticed(study: LensStudy, threshold: float) -> _Number:
    repetition = study.repetition
    probability = repetition.probability("next")
    depths = []
    for row, real in enumerate(_read(repetition)):
        places = real.nonzero()[:, 0]
        settled = places[len(places) * SETTLED_ROUNDS // ROUNDS : -1]
        by_layer = probability[1:, row, settled].mean(1)
        fresh = probability[-1, row, places[: len(places) // ROUNDS]].mean()
        if by_layer[-1] > fresh:
            seen = by_layer >= by_layer[-1] / 2
            depths.append((int(seen.int().argmax()) + 1) / len(seen))
    mean, low, high = _mean(torch.tensor(depths, dtype=torch.float32))
    return mean, low, high, None if len(depths) < len(LOOPS) / 2 else mean > threshold


def _rare_inputs_kept(study: LensStudy, threshold: float) -> _Number:
    prose = study.prose
    read = _read(prose)
    ids = prose.tokens[:, list(prose.positions)][read]
    rank = prose.rank["input"][1:, read].log10().mean(0)
    common, uncommon = rank[ids <= ids.median()], rank[ids > ids.median()]
    if len(common) < 2 or len(uncommon) < 2:
        return torch.nan, torch.nan, torch.nan, None
    # both means drawn again together
    size = min(len(common), len(uncommon))
    order = torch.randperm(len(common), generator=torch.Generator().manual_seed(0))[:size]
    mean, low, high = _mean(common[order] - uncommon[:size])
    return mean, low, high, low > threshold


CLAIMS: dict[str, tuple[str, bool, Callable[[LensStudy, float], _Number]]] = {
    "final_guess_enters": (
        f"depth at which the final guess enters the top {TOP}, mean over prose",
        False,
        _final_guess_enters,
    ),
    "kl_falls": ("share of layers after which the mean KL(final || layer) is lower", True, _kl_falls),
    "largest_fall": ("largest share of the fall of KL(final || layer) in one layer", False, _largest_fall),
    "input_is_apart": (
        "KL(final || embed) as a multiple of the largest KL(final || layer)",
        True,
        _input_is_apart,
    ),
    "rare_copy_enters": (
        f"depth at which a rare token that is to be copied enters the top {TOP}",
        True,
        _rare_copy_enters,
    ),
    "repetition_noticed": (
        "depth at which a loop's next token has half of its final probability",
        True,
        _repetition_noticed,
    ),
    "rare_inputs_kept": (
        "powers of ten by which rare input tokens rank better than common ones, mean over layers",
        True,
        _rare_inputs_kept,
    ),
}
"""By what is claimed: what is measured, whether it must be at least (or at most) the threshold, and how. A
depth in the upper half is more than 0.5, and rare inputs are kept where the whole interval lies above 0."""
