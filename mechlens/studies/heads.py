"""The study `heads`: how well a model continues repeated random tokens, and which heads do it.

References: "How one can Interpret GPT2-Small"; Olsson et al. 2022, arXiv:2209.11895.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from mechlens.analyses.attention import attention_patterns
from mechlens.analyses.heads.kinds import KINDS, VARIANTS, kinds_that_fit
from mechlens.analyses.heads.scores import performance_and_scores
from mechlens.models.protocol import LensModel
from mechlens.results import (
    NOT_JUDGED,
    NOT_REPRODUCED,
    AttentionPatterns,
    HeadScores,
    RepeatedTokenPerformance,
    half_means,
    head_label,
)
from mechlens.results.claims import verdict_of
from mechlens.results.heads import CLEAR_SCORE, TIMES_NULL
from mechlens.show.section import Section, section
from mechlens.studies.claims import Claim, Measured, Study
from mechlens.studies.published import Published
from mechlens.text.prompts import RepeatedTokens

INDUCTION_THRESHOLD, PREVIOUS_THRESHOLD = 0.80, 0.90
"""Minimum scores of the two heads of a clear induction circuit."""
PUBLISHED_SEQ_LEN = 50
DRAWS = RepeatedTokens(seq_len=PUBLISHED_SEQ_LEN, batch=30, seeds=(0, 1, 2))


@dataclasses.dataclass(frozen=True)
class HeadsStudy(Study):
    """Repeated-token performance and the scores of all heads."""

    repeated_tokens: RepeatedTokenPerformance
    head_scores: HeadScores
    attention_patterns: AttentionPatterns
    """Of the strongest induction and previous-token heads, on the first sequence."""

    def sections(self) -> list[Section]:
        names = ", ".join(head_label(*head) for head in self.attention_patterns.heads)
        return [
            Section("What was found", self._findings()),
            section(self.repeated_tokens),
            section(self.head_scores, top=3),
            section(
                self.attention_patterns,
                top=6,
                title="Attention of the strongest heads",
                text="The two heads with the highest induction score and the two with the highest "
                f"previous-token score ({names}), on the first sequence. An induction head shows a second "
                f"diagonal over the later copy, {self.repeated_tokens.seq_len - 1} positions below the main "
                "one; a previous-token head shows one directly below the main diagonal.",
            ),
        ]

    def _findings(self) -> str:
        first, second = (
            self.repeated_tokens.estimates[f"{half}_half_accuracy"][0] for half in ("first", "second")
        )
        named = {}
        for kind in ("induction_score", "previous_token_score"):
            clear = self.head_scores.clear_heads(kind)
            named[kind] = ", ".join(f"{head_label(*head)} ({score:.2f})" for head, score in clear[:5])
        return (
            f"The model predicts {first:.1%} of random tokens when it first reads them, and {second:.1%} "
            f"when they are repeated.\n\nInduction heads: {named['induction_score'] or 'none'}. "
            f"Previous-token heads: {named['previous_token_score'] or 'none'}. Up to five heads of each "
            f"kind are listed; each scores at least {CLEAR_SCORE} and at least {TIMES_NULL:g} times its null "
            "baseline."
        )


def study_heads(
    model: LensModel,
    on: RepeatedTokens = DRAWS,
    *,
    figures: Sequence[Published] = (),
    progress: bool | None = None,
) -> HeadsStudy:
    """Measure repeated-token performance and all head scores, and compare them with published figures.

    Args:
        figures: the published figures; they apply only to 50 random tokens after BOS.

    Cost: about four forward passes per seed.
    """
    performance, heads = performance_and_scores(
        model,
        on,
        kinds_that_fit(model, (*KINDS, *VARIANTS), prepend_bos=on.prepend_bos, jitter=on.jitter),
        progress=progress,
    )
    strongest: list[tuple[int, int]] = []
    for kind in ("induction_score", "previous_token_score"):
        strongest += [head for head, _ in list(heads.ranked(kind))[:2] if head not in strongest]
    patterns = attention_patterns(model, heads.tokens["repeated"][0, 0], strongest)
    as_published = on.seq_len == PUBLISHED_SEQ_LEN and heads.prepend_bos and not on.jitter
    study = HeadsStudy((), performance, heads, patterns)
    return study.holding(claim_of(figure) for figure in figures if as_published)


# -- claims ----------------------------------------------------------------------------------------

_CIRCUIT = (
    f"an induction head that scores at least {INDUCTION_THRESHOLD:.2f} in a layer after a previous-token "
    f"head that scores at least {PREVIOUS_THRESHOLD:.2f}, each at least {TIMES_NULL:g} times its null "
    "baseline"
)


def claim_of(figure: Published) -> Claim[HeadsStudy]:
    """The claim that a published figure makes."""
    made: Callable[..., Claim[HeadsStudy]] = partial(
        Claim, published=figure.value, source=figure.source, draws=figure.sequences
    )
    kind, threshold, what = figure.kind or "", figure.threshold, figure.what
    if what == "highest_head":
        return made(f"head with the highest {_words(kind)}", measure=partial(_highest_head, kind=kind))
    if what == "heads_above":
        assert threshold is not None
        text = f"heads whose {_words(kind)} is at least {threshold:.2f}"
        return made(text, measure=partial(_heads_above, kind=kind, threshold=threshold))
    if what == "induction_circuit":
        return made(_CIRCUIT, measure=_induction_circuit)
    if what in ("at_least", "at_most"):
        return made(_words(kind), measure=partial(_estimate, name=kind), **{what: threshold})
    if what == "score":
        assert figure.head is not None
        measure = partial(_score, kind=kind, head=figure.head)
        return made(f"{_words(kind)} of {head_label(*figure.head)}", measure=measure)
    return made(_words(what), measure=partial(_mean, name=what))


def _words(name: str) -> str:
    """A kind of score, or an estimate of `RepeatedTokenPerformance`, in words."""
    half, _, measure = name.partition("_half_")
    if measure:
        words = {"log_prob": "log-probability of the right token", "accuracy": "top-1 accuracy"}[measure]
        return f"{words} on the {half} copy{', nats' if measure == 'log_prob' else ''}"
    return name.replace("_token", "-token").replace("_matching", "-matching").replace("_", " ")


def _missing(study: HeadsStudy, kind: str) -> Measured | None:
    """The measurement for a kind that was not scored; None for one that was."""
    if kind in study.head_scores.kinds:
        return None
    return Measured("does not fit the model's context", verdict=NOT_JUDGED)


def _highest_head(study: HeadsStudy, *, kind: str) -> Measured:
    return _missing(study, kind) or Measured(head_label(*next(study.head_scores.ranked(kind))[0]))


def _heads_above(study: HeadsStudy, *, kind: str, threshold: float) -> Measured:
    if missing := _missing(study, kind):
        return missing
    found = sorted(head for head, _ in study.head_scores.clear_heads(kind, threshold, times_null=0))
    return Measured(" ".join(head_label(*head) for head in found) or "none")


def _score(study: HeadsStudy, *, kind: str, head: tuple[int, int]) -> Measured:
    if missing := _missing(study, kind):
        return missing
    model, (layer, number) = study.head_scores.model, head
    if layer >= model.n_layers or number >= model.n_heads:
        return Measured("no such head", verdict=NOT_REPRODUCED)
    samples = study.head_scores.scores[kind][:, :, layer, number].flatten()
    return Measured(float(samples.mean()), samples=samples)


def _mean(study: HeadsStudy, *, name: str) -> Measured:
    """An estimate, with its values for single sequences."""
    half, measure = name.split("_half_")
    found = study.repeated_tokens
    values = found.log_prob if measure == "log_prob" else found.correct.float()
    samples = half_means(values, half, seq_len=found.seq_len, prepend_bos=found.prepend_bos).flatten()
    return Measured(float(samples.mean()), samples=samples)


def _estimate(study: HeadsStudy, *, name: str) -> Measured:
    return Measured(study.repeated_tokens.estimates[name][0])


def _induction_circuit(study: HeadsStudy) -> Measured:
    """A clear previous-token head, and a clear induction head in a later layer."""
    heads = study.head_scores
    previous = heads.clear_heads("previous_token_score", PREVIOUS_THRESHOLD)
    for head, score in heads.clear_heads("induction_score", INDUCTION_THRESHOLD):
        before = [(earlier, s) for earlier, s in previous if earlier[0] < head[0]]
        if before:
            (earlier, other), *_ = before
            found = f"{head_label(*head)} {score:.3f} after {head_label(*earlier)} {other:.3f}"
            return Measured(found, verdict=verdict_of(True))
    return Measured("none", verdict=verdict_of(False))
