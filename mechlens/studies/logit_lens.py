"""The study `logit-lens`: what "interpreting GPT: the logit lens" saw in GPT-2, measured on any model.

The texts are our own. A layer's *depth* is (layer + 1) / n_layers, the share of layers that have run: 1 for
the last layer.

References: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.logit_lens import logit_lens
from mechlens.analyses.logit_variance import logit_variance
from mechlens.arguments import check_counts, generator_of
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.results import NOT_JUDGED, LogitLensResult, LogitVariance
from mechlens.results.claims import verdict_of
from mechlens.show.section import Section
from mechlens.studies.claims import Claim, Measured, Study
from mechlens.studies.logit_lens_sections import lens_sections
from mechlens.studies.published import LENS_POST
from mechlens.text.batches import prompt_batch
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
"""Ordinary prose: an abstract of an invented paper, and a piece of a story."""
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
"""A token *enters* at the first layer where it is among the ten most likely ones."""
SETTLED_ROUNDS = 2
"""Rounds of a repetition before the model can have noticed it."""
RARE_SHARE = 0.8
"""Tokenizers number tokens roughly by how common they are. Ids above this share of the vocabulary are
rare."""


@dataclasses.dataclass(frozen=True)
class LensStudy(Study):
    """The kinds of text of "interpreting GPT: the logit lens", read with the logit lens."""

    prose: LogitLensResult
    attention: LogitLensResult
    """`attn_out` alone, on the first piece of prose."""
    mlp: LogitLensResult
    """`mlp_out` alone, on the same."""
    eiffel: LogitLensResult
    copying: LogitLensResult
    """A rare token that occurs twice in the same words; one sequence per token."""
    repetition: LogitLensResult
    """Sentences that are repeated several times."""
    variance: LogitVariance
    """How much logits vary over layers, on the first piece of prose: a question from the comments."""

    def sections(self) -> list[Section]:
        return lens_sections(self)


def study_logit_lens(
    model: LensModel, *, n_rare: int = 24, seed: int = 0, prepend_bos: bool | None = None
) -> LensStudy:
    """Read the kinds of text of "interpreting GPT: the logit lens" with the logit lens.

    Args:
        n_rare: number of rare tokens to copy, drawn among plain words with high ids. The first is ` plasma`,
            nostalgebraist's example, if it is one token.
        seed: of the draw.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Raises:
        ValueError: no tokenizer, or too few rare tokens.

    Cost: six runs of `logit_lens` and one of `logit_variance`, about 2,000 positions in all.
    """
    if model.tokenizer is None:
        raise ValueError("the study logit-lens needs a model with a tokenizer")
    words = rare_words(model, n_rare, seed=seed)

    def read(texts: str | Sequence[str], what: str = "resid_post") -> LogitLensResult:
        return logit_lens(model, prompt_batch(model, texts, prepend_bos=prepend_bos), what)

    prose = read(PROSE)
    study = LensStudy(
        comparisons=(),
        prose=prose,
        attention=read(PROSE[0], "attn_out"),
        mlp=read(PROSE[0], "mlp_out"),
        eiffel=read(EIFFEL),
        copying=read([COPY.format(word, word) for word in words]),
        repetition=read([(sentence * ROUNDS).strip() for sentence in LOOPS]),
        variance=logit_variance(model, prose.tokens[0][prose.mask[0]]),
    )
    return study.holding(CLAIMS)


def rare_words(model: LensModel, count: int, *, seed: int) -> list[str]:
    """Plain words of one token with high ids, each with its leading space.

    Raises:
        ValueError: fewer than `count` such words.
    """

    def single(word: str) -> bool:
        return len(model.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1

    check_counts(n_rare=count)
    first = [" plasma"] if single(" plasma") else []
    ids = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    words = [
        text
        for text in token_strings(model, ids[int(RARE_SHARE * len(ids)) :])
        if text.startswith(" ")
        and text[1:].isalpha()
        and text[1:].islower()
        and len(text) > 4
        and single(text)
    ]
    wanted = count - len(first)
    if len(words) < wanted:
        raise ArgumentError(
            "n_rare", f"at most {len(words)}, the number of rare one-token words of this model", count
        )
    order = torch.randperm(len(words), generator=generator_of(seed)).tolist()
    return [*first, *(words[i] for i in order[:wanted])]


# -- claims ----------------------------------------------------------------------------------------

_NOTHING = Measured(torch.nan)


def depth_of_entry(rank: Float[Tensor, "row *where"], *, top: int = TOP) -> Float[Tensor, "*where"]:
    """The depth of the first layer at which a token is among the `top` most likely; nan where it never is.

    Args:
        rank: by row of the lens, `embed` first.
    """
    inside = rank[1:] <= top
    depth = (inside.int().argmax(0) + 1) / len(inside)
    return depth.masked_fill(~inside.any(0), torch.nan)


def _mean(samples: Tensor) -> Measured:
    """The mean of the samples that are not nan; nan for fewer than two."""
    known = samples[~samples.isnan()]
    return _NOTHING if len(known) < 2 else Measured(float(known.mean()), among=known)


def _read(result: LogitLensResult) -> Tensor:
    """`[batch, read]`: whether a position is neither padding nor BOS."""
    real = result.mask[:, list(result.positions)].clone()
    if result.prepend_bos:
        real[:, [at for at, position in enumerate(result.positions) if position == 0]] = False
    return real


def _final_guess_enters(study: LensStudy) -> Measured:
    return _mean(depth_of_entry(study.prose.rank["final"][:, _read(study.prose)]))


def _mean_kl(study: LensStudy) -> list[float]:
    return study.prose.kl_final[:, _read(study.prose)].mean(1).tolist()


def _kl_falls(study: LensStudy) -> Measured:
    _, *layers = _mean_kl(study)
    falls = [after < before for before, after in pairwise(layers)]
    return Measured(sum(falls) / len(falls)) if falls else _NOTHING


def _largest_fall(study: LensStudy) -> Measured:
    _, *layers = _mean_kl(study)
    falls = [before - after for before, after in pairwise(layers)]
    if len(falls) < 2 or layers[0] <= layers[-1]:
        return _NOTHING
    return Measured(max(falls) / (layers[0] - layers[-1]))


def _input_is_apart(study: LensStudy) -> float:
    embed, *layers = _mean_kl(study)
    return embed / max(layers)


def _rare_copy_enters(study: LensStudy) -> Measured:
    copying = study.copying
    # the copied token is the last one, so it is predicted one position before
    before = copying.mask.sum(1) - 2
    depth = depth_of_entry(copying.rank["next"][:, torch.arange(len(before)), before])
    copied = float((~depth.isnan()).float().mean())
    # a model that does not copy shows nothing about where copies enter
    return dataclasses.replace(_mean(depth), verdict=NOT_JUDGED if copied < 0.5 else "")


def _repetition_noticed(study: LensStudy) -> Measured:
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
    found = _mean(torch.tensor(depths, dtype=torch.float32))
    few = len(depths) < len(LOOPS) / 2
    assert isinstance(found.value, float)
    return dataclasses.replace(found, verdict=verdict_of(None if few else found.value > 0.5))


def _rare_inputs_kept(study: LensStudy) -> Measured:
    prose = study.prose
    read = _read(prose)
    ids = prose.tokens[:, list(prose.positions)][read]
    rank = prose.rank["input"][1:, read].log10().mean(0)
    common, uncommon = rank[ids <= ids.median()], rank[ids > ids.median()]
    if len(common) < 2 or len(uncommon) < 2:
        return _NOTHING
    # the differences of pairs, so that both means are resampled together
    size = min(len(common), len(uncommon))
    order = torch.randperm(len(common), generator=torch.Generator().manual_seed(0))[:size]
    found = _mean(common[order] - uncommon[:size])
    return dataclasses.replace(
        found, verdict=verdict_of(found.interval is not None and found.interval[0] > 0)
    )


CLAIMS: tuple[Claim[LensStudy], ...] = (
    Claim(
        f"depth at which the final prediction enters the top {TOP}, mean over prose",
        "well before the last layer",
        LENS_POST,
        _final_guess_enters,
        at_most=0.75,
    ),
    Claim(
        "share of layers after which the mean KL(final || layer) is lower",
        "smoothly",
        LENS_POST,
        _kl_falls,
        at_least=0.9,
    ),
    Claim(
        "largest share of the decrease of KL(final || layer) in one layer",
        "no jump between layers",
        LENS_POST,
        _largest_fall,
        at_most=0.5,
    ),
    Claim(
        "KL(final || embed) as a multiple of the largest KL(final || layer)",
        "far apart",
        LENS_POST,
        _input_is_apart,
        at_least=1.5,
    ),
    Claim(
        f"depth at which a rare token that is copied enters the top {TOP}",
        "only in the last layers",
        LENS_POST,
        _rare_copy_enters,
        at_least=0.75,
    ),
    Claim(
        "depth at which the next token of a repetition reaches half of its final probability, more than 0.50",
        "in the upper half",
        LENS_POST,
        _repetition_noticed,
    ),
    Claim(
        "powers of ten by which rare input tokens rank better than common ones, mean over layers, with an "
        "interval above 0",
        "better than common ones",
        LENS_POST,
        _rare_inputs_kept,
    ),
)
"""What nostalgebraist saw in GPT-2, as quoted, with thresholds that we chose."""
