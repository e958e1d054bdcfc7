"""The figures of "interpreting GPT: the logit lens", for the study `logit-lens`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mechlens
from mechlens.results import LogitLensResult
from mechlens.show.section import Figure, Section, drawn

if TYPE_CHECKING:
    from mechlens.studies.logit_lens import LensStudy

STRETCH = 12
"""Tokens that a figure shows."""
RANK_BOUND, INPUT_RANK_BOUND, INPUT_KL_BOUND = 100, 1000, 30
"""Where the color scales end, as in nostalgebraist's figures: ranks of the prediction and of the input, and
KL(input || layer)."""
_TOP = "The top-1 prediction of each layer at each position of an abstract"


def lens_sections(study: LensStudy) -> list[Section]:
    """Nostalgebraist's figures, and how much logits vary over layers."""
    variance = Figure(
        drawn("plot_logit_variance", study.variance),
        "How much logits vary over layers, by the final probability of the tokens.",
        keeps_width=True,
    )
    both = mechlens.interleaved(study.attention, study.mlp)
    some = _stretch(int(study.prose.mask[0].sum()) // 2)
    return [
        _predictions(study.prose, some),
        _input(study.prose, some),
        _copying(study.copying),
        Section(
            "Repetition",
            "A sentence that is repeated several times. Which layers notice?",
            [
                _lens(
                    study.repetition,
                    "rank_next",
                    "Rank of the next token in the last rounds.",
                    positions=_stretch(int(study.repetition.mask[0].sum()) - 2),
                    high=RANK_BOUND,
                )
            ],
        ),
        Section(
            "Attention and MLPs",
            "What each sublayer's output predicts on its own.",
            [
                _lens(
                    both,
                    "probability",
                    "Top-1 predictions of each layer's attention and MLP.",
                    positions=some,
                )
            ],
        ),
        Section(
            "A fact", "", [_lens(study.eiffel, "probability", "The top-1 prediction by layer and position.")]
        ),
        Section(
            "Logit variance",
            "A question from the comments on nostalgebraist's post: do the directions of unlikely tokens "
            "serve other purposes?",
            [variance],
        ),
    ]


def _predictions(prose: LogitLensResult, some: list[int]) -> Section:
    return Section(
        "Predictions, ranks and distances",
        "A stretch from the middle of an abstract. Each position has read everything before it.",
        [
            _lens(prose, "probability", f"{_TOP}; darker is more likely.", positions=some),
            _lens(
                prose,
                "rank_final",
                f"{_TOP}; color: rank of the final prediction, cut at {RANK_BOUND}.",
                positions=some,
                high=RANK_BOUND,
            ),
            _lens(prose, "kl_final", f"{_TOP}; color: KL(final || layer) in nats.", positions=some),
            _lines(
                prose,
                ("rank_final", "kl_final"),
                some[-6:],
                "Rank of the final prediction and KL(final || layer) by layer, at six positions.",
            ),
        ],
    )


def _input(prose: LogitLensResult, some: list[int]) -> Section:
    said = "How close each layer still is to the token that was read."
    figures = [
        _lens(
            prose,
            "rank_input",
            f"Rank of the input token at its own position, cut at {INPUT_RANK_BOUND}.",
            positions=some,
            high=INPUT_RANK_BOUND,
        )
    ]
    if prose.kl_input.isnan().all():
        said += " KL(input || layer) is undefined: the unembedding is not tied to the embedding."
    else:
        caption = f"KL(input || layer) in nats, cut at {INPUT_KL_BOUND}."
        figures.insert(0, _lens(prose, "kl_input", caption, positions=some, high=INPUT_KL_BOUND))
    return Section("What is left of the input", said, figures)


def _copying(copying: LogitLensResult) -> Section:
    ids = copying.tokens[0][copying.mask[0]]
    first, last = int((ids == ids[-1]).nonzero()[0]), len(ids) - 2
    return Section(
        "Copying a rare token",
        "The same rare token twice in the same words. Which layer predicts the second one?",
        [
            _lens(
                copying,
                "rank_next",
                "Rank of the next token; at the last position the next token is the rare one.",
                positions=_stretch(last),
                high=RANK_BOUND,
            ),
            _lens(
                copying,
                "rank_input",
                "Rank of the input token around the first occurrence of the rare token.",
                positions=_stretch(first + 4),
                high=INPUT_RANK_BOUND,
            ),
            _lines(
                copying,
                ("rank_next", "kl_final"),
                [last],
                "Rank of the rare token and KL(final || layer) at the position before the second copy.",
            ),
        ],
    )


def _lens(result: LogitLensResult, stat: str, caption: str, **options: Any) -> Figure:
    return Figure(drawn("plot_logit_lens", result, stat, **options), caption, keeps_width=True)


def _lines(result: LogitLensResult, stats: Sequence[str], positions: list[int], caption: str) -> Figure:
    return Figure(drawn("plot_lens_lines", result, stats, positions=positions), caption, keeps_width=True)


def _stretch(last: int) -> list[int]:
    """Consecutive positions, ending with `last`."""
    return list(range(max(0, last + 1 - STRETCH), last + 1))
