"""Reproduce the induction-head findings on a model and hold them against what was published."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mechlens.analyses.attention import attention_patterns
from mechlens.analyses.heads import (
    KINDS,
    VARIANTS,
    detect_heads,
    kinds_that_fit,
    performance_and_scores,
)
from mechlens.arguments import check_model
from mechlens.models.load.loading import BUNDLED, BUNDLED_DIRECTORY
from mechlens.models.protocol import LensModel
from mechlens.published import GPT2_SMALL, REPEATED_TOKENS_GPT2, Published, read_card
from mechlens.results import (
    NOT_JUDGED,
    AttentionPatterns,
    Comparison,
    HeadScores,
    ModelInfo,
    RepeatedTokenPerformance,
    Result,
    half_means,
    head_label,
)
from mechlens.results.heads import TIMES_NULL
from mechlens.studies.study import Measured, Study, hold

CARDS = Path(__file__).parent / "cards"
_FIGURES: tuple[tuple[tuple[str, ...], tuple[Any, ...], tuple[Published, ...] | Path], ...] = (
    (GPT2_SMALL, (12, 12, 768, 50257, None), REPEATED_TOKENS_GPT2),
    ((BUNDLED,), (4, 6, 192, 2048, None), BUNDLED_DIRECTORY / "card.json"),
    (("smollm2-135m",), (30, 9, 576, 49152, None), CARDS / "smollm2-135m.json"),
)
"""Names, sizes (layers, heads, d_model, d_vocab, and no revision) and figures of models, or their card."""
INDUCTION_THRESHOLD, PREVIOUS_THRESHOLD = 0.80, 0.90
PUBLISHED_SEQ_LEN = 50


@dataclasses.dataclass(frozen=True)
class Reproduction(Study):
    """The findings on one model, beside the published ones."""

    performance: RepeatedTokenPerformance
    heads: HeadScores
    patterns: AttentionPatterns
    """Of the strongest induction and previous-token heads, on the first sequence."""

    @property
    def results(self) -> Mapping[str, Result]:
        return {
            "repeated_tokens": self.performance,
            "head_scores": self.heads,
            "attention_patterns": self.patterns,
        }


def reproduce(
    model: LensModel,
    *,
    seq_len: int = 50,
    batch: int = 30,
    seeds: Sequence[int] = (0, 1, 2),
    prepend_bos: bool | None = None,
    figures: Sequence[Published] | None = None,
    progress: bool | None = None,
) -> Reproduction:
    """Measure repeated-token performance and all head scores, and compare them with published figures.

    Args:
        seq_len: random tokens in one copy.
        batch: sequences per seed.
        seeds: each draws its own sequences.
        prepend_bos: None prepends BOS where the tokenizer has one.
        figures: what to compare with; None takes the article's for GPT-2 small, the card's for the
            bundled model and none for others, nor for other than 50 tokens after BOS.
        progress: show bars; None shows them in a terminal and in Jupyter.

    Raises:
        ValueError: sizes that do not fit the model.

    Source: "How one can Interpret GPT2-Small"; Olsson et al. 2022, arXiv:2209.11895.
    Cost: about four forward passes per seed.
    """
    check_model(model)
    performance, heads = performance_and_scores(
        model,
        kinds_that_fit(model, (*KINDS, *VARIANTS), prepend_bos=prepend_bos),
        seq_len=seq_len,
        batch=batch,
        seeds=seeds,
        prepend_bos=prepend_bos,
        progress=progress,
    )
    strongest: list[tuple[int, int]] = []
    for kind in ("induction_score", "previous_token_score"):
        strongest += [head for head, _ in list(heads.ranked(kind))[:2] if head not in strongest]
    patterns = attention_patterns(model, heads.tokens["repeated"][0, 0], strongest)
    if figures is None:
        as_published = seq_len == PUBLISHED_SEQ_LEN and heads.prepend_bos
        figures = [each for each in known_figures(heads.model) if as_published and each.study == "heads"]
    comparisons = [compare(figure, performance, heads) for figure in figures]
    return Reproduction(tuple(comparisons), performance, heads, patterns)


def known_figures(model: ModelInfo) -> tuple[Published, ...]:
    """The figures to hold a model against; none for a model nobody published about.

    A name alone is no proof: another model in a folder called `gpt2` has other sizes.
    """
    given = (model.n_layers, model.n_heads, model.d_model, model.d_vocab, model.revision)
    for names, sizes, figures in _FIGURES:
        if model.name in names and given == sizes:
            return read_card(figures) if isinstance(figures, Path) else figures
    return ()


def has_card(model: ModelInfo) -> bool:
    """Whether the figures are those that we measured ourselves, on other draws."""
    return any(model.name in names and isinstance(figures, Path) for names, _, figures in _FIGURES)


def compare(figure: Published, performance: RepeatedTokenPerformance, heads: HeadScores) -> Comparison:
    """One published figure beside the measured one.

    A mean over sequences is held as `hold` says.
    """
    if figure.kind in (*KINDS, *VARIANTS) and figure.kind not in heads.kinds:
        claim = f"{figure.kind}, which does not fit the model's context"
        return Comparison(claim, figure.value, "", None, None, NOT_JUDGED, figure.source)
    if figure.what in _QUALITATIVE:
        claim, measured, holds = _QUALITATIVE[figure.what](figure, performance, heads)
        return _comparison(figure, claim, measured, None, None, holds)
    if figure.what == "score":
        assert figure.kind is not None
        assert figure.head is not None
        layer, head = figure.head
        claim = f"{figure.kind} of {head_label(layer, head)}"
        if layer >= heads.model.n_layers or head >= heads.model.n_heads:
            return _comparison(figure, claim, "no such head", None, None, False)
        per_sequence = heads.scores[figure.kind][:, :, layer, head].flatten()
    else:
        claim = figure.what
        per_sequence = _per_sequence(performance, figure.what)
    return hold(figure, Measured(claim, float(per_sequence.mean()), samples=per_sequence))


def _comparison(
    figure: Published, claim: str, measured: float | str, low: float | None, high: float | None, holds: bool
) -> Comparison:
    verdict = "reproduced" if holds else "not reproduced"
    return Comparison(claim, figure.value, measured, low, high, verdict, figure.source)


def _per_sequence(performance: RepeatedTokenPerformance, estimate: str) -> Tensor:
    """The estimate of every single sequence."""
    half, measure = estimate.split("_half_")
    values = performance.log_prob if measure == "log_prob" else performance.correct.float()
    means = half_means(values, half, seq_len=performance.seq_len, prepend_bos=performance.prepend_bos)
    return means.flatten()


# -- claims that are no single number --------------------------------------------------------------

_Claim = Callable[[Published, RepeatedTokenPerformance, HeadScores], tuple[str, float | str, bool]]


def _highest_head(
    figure: Published, performance: RepeatedTokenPerformance, heads: HeadScores
) -> tuple[str, float | str, bool]:
    assert figure.kind is not None
    head, _ = next(heads.ranked(figure.kind))
    return f"head with the highest {figure.kind}", head_label(*head), head_label(*head) == figure.value


def _heads_above(
    figure: Published, performance: RepeatedTokenPerformance, heads: HeadScores
) -> tuple[str, float | str, bool]:
    assert figure.kind is not None
    assert figure.threshold is not None
    found = set(detect_heads(heads, figure.kind, figure.threshold))
    claim = f"heads with {figure.kind} >= {figure.threshold}"
    by_layer = sorted(found, key=lambda label: tuple(map(int, label[1:].split("H"))))
    return claim, " ".join(by_layer) or "none", found == set(str(figure.value).split())


def _induction_circuit(
    figure: Published, performance: RepeatedTokenPerformance, heads: HeadScores
) -> tuple[str, float | str, bool]:
    """A previous-token head, and an induction head in a layer after it, both far above their nulls."""

    claim = (
        f"an induction head >= {INDUCTION_THRESHOLD} in a layer after a previous-token head "
        f">= {PREVIOUS_THRESHOLD}, each at least {TIMES_NULL:g} times its null"
    )
    previous = heads.clear_heads("previous_token_score", PREVIOUS_THRESHOLD)
    for head, score in heads.clear_heads("induction_score", INDUCTION_THRESHOLD):
        before = [(h, s) for h, s in previous if h[0] < head[0]]
        if before:
            measured = f"{head_label(*head)} {score:.3f} after {head_label(*before[0][0])} {before[0][1]:.3f}"
            return claim, measured, True
    return claim, "none", False


def _threshold(
    figure: Published, performance: RepeatedTokenPerformance, heads: HeadScores
) -> tuple[str, float | str, bool]:
    assert figure.kind is not None
    assert figure.threshold is not None
    measured = performance.estimates[figure.kind][0]
    if figure.what == "at_least":
        return f"{figure.kind} >= {figure.threshold}", measured, measured >= figure.threshold
    return f"{figure.kind} <= {figure.threshold}", measured, measured <= figure.threshold


_QUALITATIVE: dict[str, _Claim] = {
    "highest_head": _highest_head,
    "heads_above": _heads_above,
    "induction_circuit": _induction_circuit,
    "at_least": _threshold,
    "at_most": _threshold,
}
