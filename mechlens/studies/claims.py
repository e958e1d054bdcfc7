"""Claims, and how they are compared with what a study measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mechlens.measures.statistics import bootstrap_interval
from mechlens.results import NOT_JUDGED, Comparison, Result
from mechlens.results.claims import verdict_of
from mechlens.show.section import Section
from mechlens.studies.published import Published

S = TypeVar("S", bound="Study")

MIN_DRAWS = 20
"""With fewer draws the spread of their mean is unknown, so nothing is judged."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A measured number or name."""

    value: float | str
    text: str = ""
    """What it is, with its unit, for quantities that a model card lists."""
    tolerance: float = 0.0
    """How far rounding on another processor or engine may move a number without `samples`. Whole numbers,
    such as the number of a layer, have whole tolerances."""
    samples: Tensor | None = None
    """Independent draws whose mean is the number."""
    among: Tensor | None = None
    """Values whose mean is the number, if they were chosen, not drawn."""
    verdict: str = ""
    """The verdict, if the measurement decides it; empty leaves it to the claim."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% bootstrap interval of the mean; None without several values."""
        some = self.among if self.samples is None else self.samples
        if some is None or len(some) < 2:
            return None
        low, high = bootstrap_interval(some)
        return float(low), float(high)


@dataclasses.dataclass(frozen=True, eq=False)
class Claim(Generic[S]):
    """One claim about a model: what was published, how to measure it, and when it counts as reproduced.

    With `at_least` or `at_most` the measured number must reach that threshold. Otherwise the published value
    is compared with the measured one:

    - names and whole numbers must be equal, or differ by no more than `Measured.tolerance`;
    - a mean over n draws may differ from our mean over m draws by no more than 99% of such differences do:
      it must lie in the interval that contains 99% of the means over 1 / (1/n + 1/m) draws, resampled from
      ours. With fewer than `MIN_DRAWS` draws, nothing is judged.
    """

    text: str
    """What is measured, with its unit, as a fragment of a sentence."""
    published: float | str
    source: str
    measure: Callable[[S], Measured | float | str]
    at_least: float | None = None
    at_most: float | None = None
    draws: int = 1
    """Number of sequences or other draws whose mean is the published value."""

    @property
    def statement(self) -> str:
        """The text with the threshold: `top-1 accuracy on the second copy, at least 0.90`."""
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(
            [self.text, *(f"{which} {bound:.2f}" for which, bound in bounds if bound is not None)]
        )

    def compare(self, study: S) -> Comparison:
        """Compare the claim with what a study measured."""
        found = self.measure(study)
        measured = found if isinstance(found, Measured) else Measured(found)
        value, shown = measured.value, measured.value
        low, high, verdict = self.at_least, self.at_most, measured.verdict
        if low is None and high is None and not verdict:
            low, high, verdict = self._agreement(measured)
        elif not isinstance(value, str):
            above, below = low is None or value >= low, high is None or value <= high
            verdict = verdict or verdict_of(above and below if value == value else None)
            if (interval := measured.interval) is not None:
                shown = f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
        return Comparison(self.statement, self.published, shown, low, high, verdict, self.source)

    def _agreement(self, measured: Measured) -> tuple[float | None, float | None, str]:
        """What counts as agreement with the published value, and the verdict."""
        published, value = self.published, measured.value
        exact = isinstance(value, int) and not measured.tolerance
        if exact or isinstance(published, str) or isinstance(value, str):
            return None, None, verdict_of(published == value)
        if measured.samples is None:
            low, high = published - measured.tolerance, published + measured.tolerance
            return low, high, verdict_of(low <= value <= high)
        if len(measured.samples) < MIN_DRAWS:
            return None, None, NOT_JUDGED
        low, high = _means(measured.samples, max(1, round(1 / (1 / self.draws + 1 / len(measured.samples)))))
        return low, high, verdict_of(low <= published <= high)


def _means(samples: Tensor, size: int) -> tuple[float, float]:
    """The interval that contains 99% of the means over `size` of the samples."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(samples), (20000, size), generator=generator)
    means = samples.double()[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.005, 0.995], dtype=torch.double)).tolist()
    return low, high


@dataclasses.dataclass(frozen=True)
class Study:
    """Base of all studies. Subclasses add fields with what was measured."""

    comparisons: tuple[Comparison, ...]

    @property
    def results(self) -> dict[str, Result]:
        """Every result by file name: the field's name and, in a mapping, the key."""
        found: dict[str, Result] = {}
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            if isinstance(value, Result):
                found[field.name] = value
            elif isinstance(value, Mapping):
                found |= {
                    f"{field.name}_{key}": each for key, each in value.items() if isinstance(each, Result)
                }
        return found

    def quantities(self) -> dict[str, Measured]:
        """What a model card may list, by name."""
        return {}

    def sections(self) -> list[Section]:
        """What a report shows of the study."""
        raise NotImplementedError

    def holding(self: S, claims: Iterable[Claim[S]]) -> S:
        """The same study with comparisons for some claims."""
        return dataclasses.replace(self, comparisons=tuple(each.compare(self) for each in claims))

    def holding_card(self: S, figures: Iterable[Published]) -> S:
        """The same study with comparisons for the quantities that a model card lists."""
        measured = self.quantities()
        absent = Measured("not measured")

        def claim(figure: Published) -> Claim[S]:
            found = measured.get(figure.what, absent)
            text = found.text or figure.what
            return Claim(text, figure.value, figure.source, lambda _: found, draws=figure.sequences)

        return self.holding(map(claim, figures))
