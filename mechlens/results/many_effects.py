"""Effects of many cells, measured on few prompts: which of them stand, and how many prompts they need."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.measures.statistics import observations_needed, simultaneous_interval
from mechlens.text.display import count, number


class ManyEffects:
    """Mixed into results with a mean `effect` over prompts and its `standard_error`, both by cell."""

    if TYPE_CHECKING:  # fields of some results, properties of others

        @property
        def effect(self) -> Float[Tensor, "*cell"]: ...

        @property
        def standard_error(self) -> Float[Tensor, "*cell"]: ...

        @property
        def n_prompts(self) -> int: ...

    def corrected_interval(
        self, *, confidence: float = 0.95
    ) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
        """Intervals of all effects that hold together, corrected for the number of cells (Bonferroni).

        Args:
            confidence: chance that they all hold, between 0 and 1.

        Returns:
            Lower and upper bounds, in the effect's unit; nan for a single prompt.

        References: Dunn 1961, "Multiple comparisons among means".
        """
        return simultaneous_interval(self.effect, self.standard_error, self.n_prompts, confidence=confidence)

    @property
    def stands(self) -> Bool[Tensor, "*cell"]:
        """Whether the corrected 95% interval of an effect excludes 0."""
        low, high = self.corrected_interval()
        return (low > 0) | (high < 0)

    def prompts_needed(
        self, size: float, *, confidence: float = 0.95, power: float = 0.8
    ) -> Float[Tensor, "*cell"]:
        """How many prompts each cell would need for an effect of this size to stand.

        Args:
            size: in the effect's unit.
            confidence: of the corrected interval.
            power: the chance that an effect of this size then stands.

        References: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences".
        """
        spread = self.standard_error * math.sqrt(self.n_prompts)
        return observations_needed(size, spread, confidence=confidence, power=power)

    def said_of_effects(self) -> str:
        """How many effects stand, and how many prompts the next one needs; empty for a single prompt."""
        known = ~(self.effect.isnan() | self.standard_error.isnan())
        n = int(known.sum())
        if n < 2:
            return ""
        said = (
            f"Of {n:,} effects, {int(self.stands.sum()):,} stand: their 95% intervals, corrected for the "
            "number of effects, exclude 0."
        )
        sizes = self.effect.abs().masked_fill(self.stands | ~known, 0)
        size = float(sizes.max())
        if not size:
            return said
        needed = int(self.prompts_needed(size).flatten()[sizes.argmax()])
        return f"{said} The largest that does not, {number(size)}, would need {count(needed, 'prompt')}."
