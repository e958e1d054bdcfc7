"""The kinds of head scores: the mask of each, and which of them fit a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from mechlens.arguments import names_of
from mechlens.measures import attention as measures
from mechlens.measures.attention import Mask, Sinks
from mechlens.models.protocol import LensModel
from mechlens.text.prompts import RandomTokens
from mechlens.text.tokens import own_bos_token_id

PREFIX_LENGTH, PREFIX_COPIES = 25, 4
"""Olsson et al.'s protocol for prefix matching: 25 random tokens, repeated four times."""
SAMPLE_LENGTH = 25
"""Random tokens in a sample for the copying score."""

ON_REPEATED: dict[str, Callable[[RandomTokens], Mask | Sinks]] = {
    "induction_score": lambda r: measures.copies_mask(r.starts, r.seq_len, 1),
    "previous_token_score": lambda r: measures.previous_token_mask(r.tokens.shape[1]),
    "duplicate_token_score": lambda r: measures.copies_mask(r.starts, r.seq_len, 0),
    "first_token_score": lambda r: measures.first_token_mask(r.tokens.shape[1]),
    "attention_sink_score": lambda r: Sinks(r.tokens.shape[1]),
    "induction_diagonal_score": lambda r: measures.diagonal_mask(r.tokens.shape[1], 1 - r.seq_len),
}
POSITIONAL = ("previous_token_score", "first_token_score", "attention_sink_score")
VARIANTS = ("induction_diagonal_score",)
FIXED_PERIOD = ("induction_diagonal_score", "prefix_matching_score")
KINDS = (*(kind for kind in ON_REPEATED if kind not in VARIANTS), "prefix_matching_score", "copying_score")
"""The default scores on repeated tokens."""
ON_PROMPT = ("induction_score", "previous_token_score", "duplicate_token_score")
"""The default scores on a prompt."""
PROMPT_KINDS = (*ON_PROMPT, "first_token_score", "attention_sink_score")
"""All scores available on a prompt."""


def kinds_on_repeated(
    model: LensModel, kinds: Sequence[str] | str | None, *, prepend_bos: bool | None, jitter: int
) -> tuple[str, ...]:
    """Check the scores to compute on repeated tokens.

    Args:
        kinds: some of `KINDS` and `VARIANTS`; None is all of `KINDS` that fit.

    Raises:
        ValueError: an unknown kind, or one that needs a fixed period although there is jitter.
    """
    if kinds is None:
        return kinds_that_fit(model, KINDS, prepend_bos=prepend_bos, jitter=jitter)
    found = names_of("score", kinds, (*KINDS, *VARIANTS))
    for kind in found:
        if jitter and kind in FIXED_PERIOD:
            raise ValueError(f"{kind} needs a fixed period: use jitter=0, or leave out this score")
    return found


def kinds_that_fit(
    model: LensModel, kinds: Sequence[str], *, prepend_bos: bool | None = None, jitter: int = 0
) -> tuple[str, ...]:
    """The kinds that fit the model's context and this jitter; warns about any that is too long."""
    fitting = [kind for kind in kinds if not (jitter and kind in FIXED_PERIOD)]
    bos = prepend_bos is not False and own_bos_token_id(model.tokenizer) is not None
    needed = int(bos) + PREFIX_COPIES * PREFIX_LENGTH
    if "prefix_matching_score" in fitting and needed > model.cfg.n_ctx:
        warnings.warn(
            f"prefix_matching_score is left out: it needs {needed} positions, and the model's context is "
            f"{model.cfg.n_ctx}",
            stacklevel=3,
        )
        fitting.remove("prefix_matching_score")
    return tuple(fitting)


def mask_of(kind: str, random: RandomTokens) -> Mask | Sinks:
    """The mask of a score on repeated tokens, or what stands in its place."""
    make = ON_REPEATED["induction_score" if kind == "prefix_matching_score" else kind]
    return make(random)
