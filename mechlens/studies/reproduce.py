"""Run studies by name, and compare what they measure with what was published."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mechlens.arguments import check_model, check_type
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, describe
from mechlens.results import Comparison, ModelInfo, Result, write_table
from mechlens.results.claims import comparisons_table, verdict_statement
from mechlens.show.section import Section
from mechlens.studies import STUDIES
from mechlens.studies.circuits import study_composition, study_induction_circuits
from mechlens.studies.claims import Study
from mechlens.studies.facts import study_facts
from mechlens.studies.feature_claims import claims_of
from mechlens.studies.feature_search import study_feature_search
from mechlens.studies.features import study_features
from mechlens.studies.greater_than import study_greater_than
from mechlens.studies.heads import DRAWS, study_heads
from mechlens.studies.indirect_object import study_indirect_object
from mechlens.studies.ioi import study_ioi
from mechlens.studies.logit_lens import study_logit_lens
from mechlens.studies.mlp_patching import study_mlp_patching
from mechlens.studies.published import Published, figures_of
from mechlens.text.prompts import RepeatedTokens

if TYPE_CHECKING:
    import pandas as pd

ON_RAW_WEIGHTS = ("features", "feature-search")
"""The studies of the model's own basis, which processing would change."""


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """Studies of one model, with the comparisons of measured and published numbers.

    Example:
        >>> found = mechlens.reproduce(model, "heads", heads=mechlens.RepeatedTokens(20, 2, seeds=[0]))
        >>> list(found.results)
        ['repeated_tokens', 'head_scores', 'attention_patterns']
    """

    model: ModelInfo
    studies: dict[str, Study]
    """By name, in the order in which they ran."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The comparisons of all studies."""
        return tuple(each for study in self.studies.values() for each in study.comparisons)

    @property
    def results(self) -> dict[str, Result]:
        """The results of all studies, by the name of their files."""
        return {name: result for study in self.studies.values() for name, result in study.results.items()}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per comparison: claim, published, measured, low, high, verdict, source."""
        return comparisons_table(self.comparisons)

    def _repr_html_(self) -> str:
        """The comparisons, for Jupyter."""
        import pandas as pd

        rows = [
            dict(zip((each.words for each in Comparison.columns), one.row, strict=True))
            for one in self.comparisons
        ]
        table = pd.DataFrame(rows).to_html(index=False) if rows else ""
        return (
            f"<p><b>{escape(self.title)}</b></p>{table}<p>{escape(verdict_statement(self.comparisons))}</p>"
        )

    def sections(self) -> list[Section]:
        """What a report shows: text, tables and figures of each study."""
        return [section for study in self.studies.values() for section in study.sections()]

    def save(self, folder: str | os.PathLike[str], *, command: str = "") -> list[Path]:
        """Write every result (`.safetensors`) with its table (`.csv`), `comparison.csv`, and `report.html`.

        Args:
            folder: made if it is missing; files of an earlier run are replaced.
            command: the command line that makes the same report, shown in it.

        Returns:
            The paths written, the report last.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        from mechlens.show.page import write_report

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # first, so that a section that cannot be drawn leaves no partial output
        page = write_report(
            folder / "report.html",
            *self.sections(),
            title=self.title,
            model=self.model,
            comparisons=self.comparisons,
            command=command,
        )
        written = []
        for name, result in self.results.items():
            written.append(result.save(folder / f"{name}.safetensors"))
            written.append(write_table(result.to_dataframe(), folder / f"{name}.csv"))
        return [*written, write_table(self.to_dataframe(), folder / "comparison.csv"), page]

    @property
    def title(self) -> str:
        """The title of the report."""
        return "Induction heads" if list(self.studies) == ["heads"] else f"Findings on {self.model.name}"


def reproduce(
    model: LensModel,
    *names: str,
    heads: RepeatedTokens = DRAWS,
    raw: Callable[[], LensModel] | None = None,
    against: LensModel | None = None,
    progress: bool | None = None,
) -> Reproduction:
    """Run studies on a model, and compare what they measure with what was published or is on its model card.

    Args:
        model: any model; qualitative claims about GPT-2 are measured on every model.
        names: `heads`, `logit-lens`, `mlp-patching`, `composition`, `facts`, `induction-circuits`,
            `indirect-object`, `ioi`, `greater-than`, `features` and `feature-search`, in any order. Without
            names: `heads`, and the studies for which figures of this model are published.
        heads: the sequences of the study `heads`. Its published figures are for 50 tokens after BOS.
        raw: loads the same model with unprocessed weights, which `features` and `feature-search` need, such
            as `lambda: mechlens.load_model(name, processing=False)`. None takes `model` if its weights are
            unprocessed.
        against: for `feature-search`, a model of another size with the same tokenizer and unprocessed
            weights.
        progress: show bars; None shows them in a terminal and in Jupyter.

    Returns:
        The studies with their results and comparisons, ready to show and save.

    Raises:
        ValueError: an unknown study, a model that does not fit one of them, or no unprocessed weights.

    Example:
        >>> found = mechlens.reproduce(model, "logit-lens")
        >>> found.comparisons[0].claim
        'depth at which the final prediction enters the top 10, mean over prose, at most 0.75'
        >>> found.comparisons[0].verdict
        'reproduced'

    References: "How one can Interpret GPT2-Small"; Olsson et al. 2022, arXiv:2209.11895; nostalgebraist 2020,
    "interpreting GPT: the logit lens"; Wang et al. 2022, arXiv:2211.00593; Badger, "Language Model Features".
    Cost: seconds per study on a small model, minutes for `feature-search`; all studies on the model
    card of a model with 135 million parameters take about fifteen minutes on two cores.
    """
    check_model(model)
    check_type("heads", heads, RepeatedTokens)
    info = describe(model)
    figures = figures_of(info)
    chosen = planned(info, names)
    unprocessed = (lambda: model) if raw is None and info.processing is False else raw
    if unprocessed is None and (missing := [name for name in chosen if name in ON_RAW_WEIGHTS]):
        raise ArgumentError(
            "raw",
            f"a function that loads unprocessed weights, for {' and '.join(missing)}",
            None,
            hint="such as lambda: mechlens.load_model(name, processing=False)",
        )

    def study(name: str) -> Study:
        own: list[Published] = [each for each in figures if each.study == name]
        if name == "heads":
            return study_heads(model, heads, figures=own, progress=progress)
        if name == "logit-lens":
            return study_logit_lens(model)
        if name == "mlp-patching":
            return study_mlp_patching(model, progress=progress)
        if name == "composition":
            return study_composition(model, figures=own, progress=progress)
        if name == "induction-circuits":
            return study_induction_circuits(model, figures=own, progress=progress)
        if name == "facts":
            return study_facts(model).holding_card(own)
        if name == "indirect-object":
            return study_indirect_object(model, progress=progress).holding_card(own)
        if name == "ioi":
            return study_ioi(model, progress=progress).holding_card(own)
        if name == "greater-than":
            return study_greater_than(model, progress=progress).holding_card(own)
        assert unprocessed is not None
        if name == "features":
            return study_features(unprocessed(), progress=progress).holding_card(own)
        found = study_feature_search(unprocessed(), against=against, progress=progress)
        return found.holding(claims_of(found))

    return Reproduction(info, {name: study(name) for name in chosen})


def planned(model: ModelInfo, names: Sequence[str] = ()) -> list[str]:
    """The studies that `reproduce` runs, in order.

    Raises:
        ValueError: an unknown study.
    """
    if not names:
        known = {each.study for each in figures_of(model)}
        return [name for name in STUDIES if name == "heads" or name in known]
    for name in names:
        if name not in STUDIES:
            raise ArgumentError("names", f"among {', '.join(STUDIES)}", name)
    return [name for name in STUDIES if name in names]
