"""Whether a model needs its MLPs to continue repeated tokens, and which heads it does need: by effect.

The article replaces MLP outputs "in the second half" by those of the first, and finds no large difference
except at the first token. Its loop starts one position early: position `seq_len`, counted with BOS, is the
last token of the first copy, and what is put there is BOS's own output. So the experiment is run twice: as it
is written, and with the copies aligned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from mechlens.analyses.heads import score_heads
from mechlens.analyses.patching import Earlier, ablate_heads, ablate_mlps_from_first_half, patch_grid
from mechlens.arguments import check_model
from mechlens.measures.statistics import rank_correlation
from mechlens.models.protocol import LensModel
from mechlens.published import MLP_PATCHING, Published
from mechlens.results import NOT_JUDGED, Comparison, HeadScores, PatchGridResult, Result
from mechlens.studies.study import Study
from mechlens.text.prompts import repeated_tokens
from mechlens.text.tokens import own_bos_token_id

INDUCTION, PREVIOUS = "induction_score", "previous_token_score"


@dataclasses.dataclass(frozen=True)
class MlpStudy(Study):
    """The article's MLP experiment on one model, and the heads' ablation beside their scores."""

    aligned: PatchGridResult
    """MLP outputs of the second copy from the same token of the first."""
    as_written: PatchGridResult
    """The article's loop, which starts at the last token of the first copy."""
    heads: PatchGridResult
    """Each head taken away."""
    scores: HeadScores
    """The same heads by their patterns, on the same sequences."""

    @property
    def results(self) -> Mapping[str, Result]:
        names = ("aligned", "as_written", "heads", "scores")
        return {name: getattr(self, name) for name in names}

    def rank_correlation(self, kind: str) -> float:
        """Spearman's, over heads, of a score with what the head's absence costs; nan below 3 heads."""
        score, effect = self.scores.mean(kind).flatten(), self.heads.effect.flatten()
        known = ~score.isnan() & ~effect.isnan()
        if int(known.sum()) < 3:
            return math.nan
        return float(rank_correlation(score[known], effect[known]))


def reproduce_mlp_patching(
    model: LensModel,
    *,
    seq_len: int = 50,
    batch: int = 4,
    seed: int = 0,
    how: str = "mean",
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> MlpStudy:
    """Patch MLP outputs and take heads away on repeated tokens, and hold the article's claim against that.

    Args:
        seq_len: random tokens in one copy.
        batch: sequences; effects are means over them.
        seed: of the sequences.
        how: what is put in a head's place, as for `ablate_heads`.
        prepend_bos: None prepends BOS where the tokenizer has one.
        progress: show bars; None shows them in a terminal and in Jupyter.

    Raises:
        ValueError: a model without MLPs, or sizes that do not fit the model.

    Source: the article "How one can Interpret GPT2-Small", "How do MLP layers attribute?".
    Cost: two grids of n_layers x `seq_len` and one of n_layers x n_heads runs for each sequence, as
    `patch_grid`.
    """
    check_model(model)
    bos = own_bos_token_id(model.tokenizer) is not None if prepend_bos is None else prepend_bos
    random = repeated_tokens(model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=bos)
    written = range(seq_len, 2 * seq_len)
    found = MlpStudy(
        comparisons=(),
        aligned=ablate_mlps_from_first_half(
            model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=bos, progress=progress
        ),
        as_written=patch_grid(
            model,
            random.tokens,
            site="mlp_out",
            source=Earlier(seq_len),
            positions=written,
            # without BOS the last of them predicts nothing
            read=[position for position in written if position + 1 < random.tokens.shape[1]],
            progress=progress,
        ),
        heads=ablate_heads(
            model, how=how, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=bos, progress=progress
        ),
        scores=score_heads(
            model,
            [INDUCTION, PREVIOUS],
            seq_len=seq_len,
            batch=batch,
            seeds=[seed],
            prepend_bos=bos,
            progress=progress,
        ),
    )
    return dataclasses.replace(found, comparisons=tuple(compare(claim, found) for claim in MLP_PATCHING))


def compare(claim: Published, study: MlpStudy) -> Comparison:
    """One claim of the article beside its number."""
    text, at_least, measure = CLAIMS[claim.what]
    value, threshold = measure(study), claim.threshold or 0.0
    holds = value >= threshold if at_least else value <= threshold
    return Comparison(
        claim=text,
        published=claim.value,
        measured=value if value != value else f"{value:.3f}",
        low=threshold if at_least else None,
        high=None if at_least else threshold,
        verdict=NOT_JUDGED if value != value else "reproduced" if holds else "not reproduced",
        source=claim.source,
    )


# -- claims ----------------------------------------------------------------------------------------


def first_and_others(grid: PatchGridResult) -> tuple[float, float]:
    """The largest |effect| of any layer at the first of the positions, and at any other one."""
    size = grid.effect.abs()
    others = size[:, 1:]
    return float(size[:, 0].max()), float(others.max()) if others.numel() else math.nan


def _others_in_loss(grid: PatchGridResult) -> float:
    """As a share of the clean loss on the second copy; nan for a model without any."""
    clean = float(grid.clean.mean())
    return first_and_others(grid)[1] / clean if clean > 0 else math.nan


def _first_in_others(grid: PatchGridResult) -> float:
    first, others = first_and_others(grid)
    return first / others if others > 0 else math.nan


CLAIMS: dict[str, tuple[str, bool, Callable[[MlpStudy], float]]] = {
    "mlps_small_elsewhere": (
        "largest |change of loss| at any position but the first, as a share of the clean loss",
        False,
        lambda study: _others_in_loss(study.aligned),
    ),
    "mlps_first_stands_out": (
        "|change of loss| at the first position as a multiple of the largest elsewhere, as the loop is "
        "written",
        True,
        lambda study: _first_in_others(study.as_written),
    ),
    "mlps_first_of_copy_stands_out": (
        "the same at the first token of the second copy, with the copies aligned",
        True,
        lambda study: _first_in_others(study.aligned),
    ),
}
"""By what is claimed: what is measured, whether it must be at least (or at most) the threshold, and how."""
