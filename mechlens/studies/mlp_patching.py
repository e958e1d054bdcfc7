"""The study `mlp-patching`: whether a model needs its MLPs, and which heads it needs, to continue a
repetition.

"How one can Interpret GPT2-Small" replaces MLP outputs "in the second half" with those of the first, and
finds no large change in the loss except at the first token. Its loop starts one position early: position
`seq_len`, counted with BOS, is the last token of the first copy, and it receives the MLP output at BOS. The
study runs both variants: the loop as written, and with the copies aligned.

References: "How one can Interpret GPT2-Small", section "How do MLP layers attribute?".
"""

from __future__ import annotations

import dataclasses
import math

from mechlens.analyses.heads.scores import score_heads
from mechlens.analyses.patching import Earlier, Loss, Patching, ablate_heads, ablate_mlps
from mechlens.measures.statistics import rank_correlation
from mechlens.models.protocol import LensModel
from mechlens.results import HeadScores, PatchGridResult
from mechlens.show.section import Section, section
from mechlens.studies.claims import Claim, Study
from mechlens.studies.published import ARTICLE
from mechlens.text.prompts import RepeatedTokens
from mechlens.text.tokens import own_bos_token_id

INDUCTION, PREVIOUS = "induction_score", "previous_token_score"


@dataclasses.dataclass(frozen=True)
class MlpStudy(Study):
    """The MLP experiment, and the effect of ablating each head beside the head's scores."""

    mlps_aligned: PatchGridResult
    """MLP outputs of the second copy, replaced with those at the same token of the first."""
    mlps_as_written: PatchGridResult
    """The published loop, which starts at the last token of the first copy."""
    ablated_heads: PatchGridResult
    ablated_head_scores: HeadScores
    """Of the same heads, on the same sequences."""

    def rank_correlation(self, kind: str) -> float:
        """Spearman's rank correlation, over heads, of a score and the effect of ablating the head; nan for
        fewer than 3 heads."""
        score, effect = self.ablated_head_scores.mean(kind).flatten(), self.ablated_heads.effect.flatten()
        known = ~score.isnan() & ~effect.isnan()
        if int(known.sum()) < 3:
            return math.nan
        return float(rank_correlation(score[known], effect[known]))

    def sections(self) -> list[Section]:
        correlations = " and ".join(
            f"{self.rank_correlation(kind):.2f} with the {words} score"
            for kind, words in ((INDUCTION, "induction"), (PREVIOUS, "previous-token"))
        )
        return [
            section(
                self.mlps_as_written,
                title="MLP outputs from the first copy, with the published loop",
                text="The loop starts at position seq_len. Counted with BOS, that is the last token of the "
                "first copy, and it receives the MLP output at BOS.",
            ),
            section(
                self.mlps_aligned,
                title="MLP outputs from the first copy, aligned",
                text="Each position of the second copy receives the MLP output at the same token of the "
                "first.",
            ),
            section(
                self.ablated_heads,
                title="Ablated heads",
                text=f"Rank correlation of the effect of ablating a head: {correlations}.",
            ),
            section(self.ablated_head_scores, top=3),
        ]


def study_mlp_patching(
    model: LensModel,
    *,
    seq_len: int = 50,
    batch: int = 4,
    seed: int = 0,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> MlpStudy:
    """Patch MLP outputs and ablate heads on repeated random tokens.

    Args:
        seq_len: random tokens in one copy.
        batch: sequences; effects are means over them.
        seed: of the sequences.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Raises:
        ValueError: a model without MLPs, or sizes that do not fit the model.

    Cost: for each sequence two grids of n_layers x `seq_len` runs and one of n_layers x n_heads.
    """
    bos = own_bos_token_id(model.tokenizer) is not None if prepend_bos is None else prepend_bos
    on = RepeatedTokens(seq_len, batch=batch, seeds=[seed], prepend_bos=bos)
    tokens = on.draw(model, seed).tokens
    written = range(seq_len, 2 * seq_len)
    # without BOS the last of them predicts nothing
    loss = Loss(at=[position for position in written if position + 1 < tokens.shape[1]])
    study = MlpStudy(
        comparisons=(),
        mlps_aligned=ablate_mlps(model, on=on, progress=progress),
        mlps_as_written=Patching(model, tokens, metric=loss, progress=progress).grid(
            "mlp_out", values=Earlier(seq_len), positions=written
        ),
        ablated_heads=ablate_heads(model, on=on, progress=progress),
        ablated_head_scores=score_heads(model, on, [INDUCTION, PREVIOUS], progress=progress),
    )
    return study.holding(CLAIMS)


# -- claims ----------------------------------------------------------------------------------------


def first_and_others(grid: PatchGridResult) -> tuple[float, float]:
    """The largest |effect| of any layer at the first of the positions, and at the others."""
    size = grid.effect.abs()
    others = size[:, 1:]
    return float(size[:, 0].max()), float(others.max()) if others.numel() else math.nan


def _others_in_loss(study: MlpStudy) -> float:
    """nan if the clean loss on the second copy is 0."""
    clean = float(study.mlps_aligned.clean.mean())
    return first_and_others(study.mlps_aligned)[1] / clean if clean > 0 else math.nan


def _first_in_others(grid: PatchGridResult) -> float:
    first, others = first_and_others(grid)
    return first / others if others > 0 else math.nan


CLAIMS: tuple[Claim[MlpStudy], ...] = (
    Claim(
        "largest |change of loss| at any position after the first, as a share of the clean loss",
        "no large loss difference",
        ARTICLE,
        _others_in_loss,
        at_most=0.1,
    ),
    Claim(
        "|change of loss| at the first position as a multiple of the largest elsewhere, with the loop as "
        "written",
        "except at the first token",
        ARTICLE,
        lambda study: _first_in_others(study.mlps_as_written),
        at_least=2.0,
    ),
    Claim(
        "the same multiple at the first token of the second copy, with the copies aligned",
        "except at the first token",
        ARTICLE,
        lambda study: _first_in_others(study.mlps_aligned),
        at_least=2.0,
    ),
)
"""What "How one can Interpret GPT2-Small" saw. We call a change large above a tenth of the clean loss, and
say that a position stands out if its change is at least twice the largest elsewhere."""
