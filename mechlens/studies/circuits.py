"""The studies `composition` and `induction-circuits`: pairs of heads that continue a repetition together.

References: "How one can Interpret GPT2-Small"; Elhage et al. 2021; Olsson et al. 2022, arXiv:2209.11895.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mechlens.analyses.circuits.composition import composition_scores
from mechlens.analyses.circuits.induction import N_TOKENS, Pair, find_induction_circuits
from mechlens.models.protocol import LensModel
from mechlens.results import CompositionScores, InductionCircuits, parse_head
from mechlens.show.circuits import composition_section
from mechlens.show.induction_circuits import induction_circuits_section
from mechlens.show.section import Section
from mechlens.studies.claims import Measured, Study
from mechlens.studies.published import Published
from mechlens.text.prompts import RepeatedTokens

DRAWN = 0.1
"""How far the induction scores of two draws of 8 sequences may differ: they differ by 0.04 on
smollm2-135m."""
FOLDING = 0.005
"""How far a top-1 accuracy over the vocabulary may differ, by rounding and by how weights are folded."""
GPT2_PAIR = ("4.11", "5.5")
"""The heads of GPT-2 small whose circuit "How one can Interpret GPT2-Small" builds."""


@dataclasses.dataclass(frozen=True)
class CompositionStudy(Study):
    """The K-composition circuit of one pair of heads, and the K-composition scores of all heads."""

    composition_circuits: InductionCircuits
    composition: CompositionScores

    def quantities(self) -> dict[str, Measured]:
        circuits = self.composition_circuits
        at = circuits.strongest
        if at is None:
            return {}
        names = " and ".join(circuits.labels[at])
        return {
            what: Measured(
                circuits.evidence(at)[what], f"top-1 accuracy of the circuit of {names} over {over}", FOLDING
            )
            for what, over in (
                ("k_top1_keys", "keys, for each query"),
                ("k_top1_queries", "queries, for each key"),
            )
        }

    def sections(self) -> list[Section]:
        return _sections(self.composition_circuits, self.composition)


@dataclasses.dataclass(frozen=True)
class InductionCircuitsStudy(Study):
    """The evidence for each pair of heads, and the K-composition scores of all heads."""

    circuits: InductionCircuits
    composition: CompositionScores

    def quantities(self) -> dict[str, Measured]:
        measured: dict[str, Measured] = {}
        for at, (previous, induction) in enumerate(self.circuits.labels):
            evidence = self.circuits.evidence(at)
            names, rank = f"{previous} {induction}", evidence["k_rank"]
            measured |= {
                f"verdict {names}": Measured(
                    self.circuits.verdicts[at], f"verdict on {previous} and {induction}"
                ),
                f"K rank {names}": Measured(
                    int(rank) if rank == rank else "none",
                    f"rank of {previous} in K-composition with {induction} among all earlier heads",
                ),
                f"score {induction}": Measured(
                    evidence["induction_score"], f"induction score of {induction}", DRAWN
                ),
                f"ablated {names}": Measured(
                    evidence["score_path"],
                    f"induction score of {induction} with {previous} ablated in its keys",
                    DRAWN,
                ),
            }
        return measured

    def sections(self) -> list[Section]:
        return _sections(self.circuits, self.composition)


def study_composition(
    model: LensModel, *, figures: Sequence[Published] = (), seed: int = 0, progress: bool | None = None
) -> CompositionStudy:
    """Build the K-composition circuit of "How one can Interpret GPT2-Small", 4.11 and 5.5.

    Args:
        figures: the published ones, if the model is GPT-2 small. In other models pairs are searched for, and
            their accuracies are measured on a sample of the vocabulary.

    Cost: as `find_induction_circuits`.
    """
    pairs = [GPT2_PAIR] if figures else None
    study = CompositionStudy((), *_circuits(model, pairs, None if pairs else N_TOKENS, seed, progress))
    return study.holding_card(figures)


def study_induction_circuits(
    model: LensModel,
    *,
    pairs: Sequence[Pair] | None = None,
    figures: Sequence[Published] = (),
    seed: int = 0,
    progress: bool | None = None,
) -> InductionCircuitsStudy:
    """Collect the evidence for pairs of heads.

    Args:
        pairs: (previous-token head, induction head); None takes those named in `figures`, or searches.

    Cost: as `find_induction_circuits`.
    """
    named = dict.fromkeys(
        tuple(each.what.split()[1:]) for each in figures if each.what.startswith("verdict ")
    )
    pairs = pairs or [(parse_head(one), parse_head(other)) for one, other in named] or None
    n_tokens = None if pairs is not None and len(pairs) == 1 else N_TOKENS
    return InductionCircuitsStudy((), *_circuits(model, pairs, n_tokens, seed, progress)).holding_card(
        figures
    )


def _circuits(
    model: LensModel, pairs: Sequence[Pair] | None, n_tokens: int | None, seed: int, progress: bool | None
) -> tuple[InductionCircuits, CompositionScores]:
    on = RepeatedTokens(batch=8, seeds=[seed])
    circuits = find_induction_circuits(model, on, pairs=pairs, n_tokens=n_tokens, progress=progress)
    distance = circuits.relative_position
    return circuits, composition_scores(model, "k", relative_position=distance, seed=seed, progress=progress)


def _sections(circuits: InductionCircuits, composition: CompositionScores) -> list[Section]:
    return [
        induction_circuits_section(circuits),
        composition_section(composition, title="K-composition of all heads"),
    ]
