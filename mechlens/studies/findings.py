"""All that a model's card claims, measured again: heads, facts, circuits, the indirect object, features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mechlens.analyses.features import feature_alignment, search_complete
from mechlens.models.protocol import LensModel, describe
from mechlens.models.weights.randomize import random_like
from mechlens.published import STUDIES, Published
from mechlens.results import CompleteSearch, FeatureAlignment, ModelInfo, Result, parse_head
from mechlens.studies.facts import measure_facts
from mechlens.studies.heads import known_figures, reproduce
from mechlens.studies.indirect_object import of_indirect_object, study_indirect_object
from mechlens.studies.induction_circuits import CircuitStudy, reproduce_composition_circuit
from mechlens.studies.logit_lens import reproduce_logit_lens
from mechlens.studies.study import Measured, Study, hold

N_PATCHED = 20
"""Prompts that are patched head by head; fewer tell nothing of how far their mean strays."""
DRAWN = 0.1
"""How far induction scores of two draws of 8 sequences may lie apart: those of smollm2-135m do by 0.04."""
N_LAYERS, N_FEATURES = 8, 576
"""Of the features whose most exciting tokens are compared, at most."""


@dataclasses.dataclass(frozen=True)
class FeaturesStudy(Study):
    """Which tokens excite features most, and whether layers agree on them more than with random weights."""

    search: CompleteSearch
    trained: FeatureAlignment
    random: FeatureAlignment

    @property
    def results(self) -> Mapping[str, Result]:
        return {"features": self.search, "features_trained": self.trained, "features_random": self.random}


@dataclasses.dataclass(frozen=True)
class Findings(Study):
    """Several studies of one model, and their comparisons one after the other."""

    studies: dict[str, Study]

    @property
    def results(self) -> Mapping[str, Result]:
        return {name: result for study in self.studies.values() for name, result in study.results.items()}


Raw = Callable[[], LensModel]
"""Gives the model with its weights as they were trained."""


def reproduce_findings(
    model: LensModel,
    names: Sequence[str] | None = None,
    *,
    raw: Raw | None = None,
    heads: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Findings:
    """Run studies on a model, and hold what comes out against what was published or stands on its card.

    Args:
        names: of `STUDIES`, in any order; None takes those of `planned`.
        raw: gives the same model with the weights as they were trained, such as
            `lambda: load_model(name, processing=False)`; the study `features` needs it.
        heads: arguments of `reproduce`, which is the study `heads`.
        progress: show bars; None shows them in a terminal and in Jupyter.

    Raises:
        ValueError: an unknown study, a model that one of them cannot be made on, or `features` without `raw`.

    Cost: that of each study; on two cores about ten minutes for a model of 135 million parameters.
    """
    known = known_figures(describe(model))
    names = planned(describe(model), names)
    if "features" in names and raw is None:
        raise ValueError(
            "the study 'features' needs raw weights: give raw=lambda: load_model(name, processing=False), or "
            "name other studies"
        )
    studies: dict[str, Study] = {}
    for name in names:
        if name == "heads":
            studies[name] = reproduce(model, **(heads or {}), progress=progress)
        elif name == "logit-lens":
            studies[name] = reproduce_logit_lens(model)
        else:
            own = [each for each in known if each.study == name]
            study, measured = _MEASURES[name](model, raw, own, progress)
            compared = [
                hold(each, measured.get(each.what, Measured(each.what, "not measured"))) for each in own
            ]
            studies[name] = dataclasses.replace(study, comparisons=tuple(compared)) if own else study
    return Findings(tuple(each for study in studies.values() for each in study.comparisons), studies)


def planned(model: ModelInfo, names: Sequence[str] | None = None) -> list[str]:
    """The studies that are made, in their order.

    Args:
        names: None takes `heads` and all that there are figures of.

    Raises:
        ValueError: an unknown study.
    """
    if names is None:
        known = {each.study for each in known_figures(model)}
        return [name for name in STUDIES if name == "heads" or name in known]
    for name in names:
        if name not in STUDIES:
            raise ValueError(f"there is no study {name!r}: it is one of {', '.join(STUDIES)}")
    return [name for name in STUDIES if name in names]


# -- studies ---------------------------------------------------------------------------------------


def _facts(
    model: LensModel, raw: Raw | None, figures: Sequence[Published], progress: bool | None
) -> tuple[Study, dict[str, Measured]]:
    return measure_facts(model)


def _induction_circuits(
    model: LensModel, raw: Raw | None, figures: Sequence[Published], progress: bool | None
) -> tuple[Study, dict[str, Measured]]:
    pairs = dict.fromkeys(
        tuple(each.what.split()[1:3]) for each in figures if each.what.startswith("verdict ")
    )
    return measure_circuits(
        model, [(parse_head(a), parse_head(b)) for a, b in pairs] or None, progress=progress
    )


def measure_circuits(
    model: LensModel,
    pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]] | None = None,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[CircuitStudy, dict[str, Measured]]:
    """Judge pairs of heads, or those that are found, and put the evidence into numbers."""
    study = reproduce_composition_circuit(model, pairs=pairs, seed=seed, progress=progress)
    circuits = study.circuits
    measured: dict[str, Measured] = {}
    for at, (previous, induction) in enumerate(circuits.labels):
        evidence = {name: float(values[at]) for name, values in circuits.evidence.items()}
        names = f"{previous} {induction}"
        measured |= {
            f"verdict {names}": Measured(f"{previous} and {induction} are", circuits.verdicts[at]),
            f"K rank {names}": Measured(
                f"rank of {previous} among the earlier heads in K-composition with {induction}",
                int(rank) if (rank := evidence["k_rank"]) == rank else "none",
            ),
            f"score {induction}": Measured(
                f"induction score of {induction}", evidence["induction_score"], DRAWN
            ),
            f"ablated {names}": Measured(
                f"induction score of {induction} without {previous} in its keys",
                evidence["score_path"],
                DRAWN,
            ),
        }
    return study, measured


def _indirect_object(
    model: LensModel, raw: Raw | None, figures: Sequence[Published], progress: bool | None
) -> tuple[Study, dict[str, Measured]]:
    heads = [each.head for each in figures if each.head is not None]
    study = study_indirect_object(model, n_patched=N_PATCHED, progress=progress)
    return study, of_indirect_object(study, heads)


def _features(
    model: LensModel, raw: Raw | None, figures: Sequence[Published], progress: bool | None
) -> tuple[Study, dict[str, Measured]]:
    assert raw is not None
    return measure_features(raw(), progress=progress)


def measure_features(
    trained: LensModel, *, progress: bool | None = None
) -> tuple[FeaturesStudy, dict[str, Measured]]:
    """Search some features of layers from first to last, in a model with raw weights and with random ones."""
    n_layers = trained.cfg.n_layers
    spread = torch.linspace(0, n_layers - 1, min(N_LAYERS, n_layers), dtype=torch.float64)
    layers = sorted({round(x) for x in spread.tolist()})
    features = range(min(N_FEATURES, trained.cfg.d_model))

    def search(of: LensModel) -> CompleteSearch:
        return search_complete(of, layers=layers, features=features, top_k=5, progress=progress)

    found = search(trained)
    study = FeaturesStudy(
        (), found, feature_alignment(found), feature_alignment(search(random_like(trained, seed=0)))
    )
    shares = {name: getattr(study, name).share() for name in ("trained", "random")}
    words = "share of features whose most exciting token is the same in two layers"
    # rounding decides between tokens that excite a feature alike, and each engine draws weights of its own
    measured = {
        "trained": Measured(f"{words}, mean over pairs of layers", shares["trained"].value, 0.02),
        "random": Measured(f"{words}, with random weights", shares["random"].value, 0.05),
        "chance": Measured(f"{words}, by chance", shares["trained"].chance, 0.005),
        "more than random": Measured(
            "layers agree more than with random weights",
            "yes" if shares["trained"].low > shares["random"].high else "no",
        ),
    }
    return study, measured


_MEASURES: dict[
    str,
    Callable[[LensModel, Raw | None, Sequence[Published], bool | None], tuple[Study, dict[str, Measured]]],
] = {
    "facts": _facts,
    "induction-circuits": _induction_circuits,
    "indirect-object": _indirect_object,
    "features": _features,
}
