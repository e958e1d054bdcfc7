"""Results about what each component of a model adds to the logit of a token."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Result):
    """What each component adds to the logit of a target or to a difference of logits, norm scales held."""

    tokens: Int[Tensor, "batch pos"]
    """What the model read."""
    positions: tuple[int, ...]
    """The positions that were read out, in the order of the axis `read`."""
    components: tuple[str, ...]
    """`embed`, `pos_embed` where the model adds positions to its stream, then of each layer its heads
    (`L0H0`, ...), the bias of its attention (`L0 bias`) and its MLP (`L0 MLP`, where it has one), last
    `final bias`: the last norm's bias seen through `W_U`, and `b_U`."""
    contributions: Float[Tensor, "component batch read"]
    """In logits; their sum over components is `logit`, up to rounding."""
    logit: Float[Tensor, "batch read"]
    """The model's own logit of the target before a soft-cap, less that of `against_ids` where there are."""
    target_ids: Int[Tensor, "batch read"]
    """The tokens whose logits are explained; position i speaks of the token after it."""
    against_ids: Int[Tensor, "batch read"] | None
    """The tokens whose logits are subtracted; None where a logit alone is explained."""
    strings: dict[str, str]
    """The text of every token above, by its id as text."""
    prepend_bos: bool

    def of(self, component: str) -> Float[Tensor, "batch read"]:
        """What one component adds.

        Raises:
            ValueError: there is no such component.
        """
        if component not in self.components:
            raise ValueError(
                f"there is no component {component!r}: there are {', '.join(self.components[:3])}, ..., "
                f"{self.components[-1]}"
            )
        return self.contributions[self.components.index(component)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component, sequence and position: component, layer and head (absent where it has none),
        sequence, pos, token, target, against (where there is one), contribution in logits."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.components, range(len(self.tokens)), self.positions], names=["component", "sequence", "pos"]
        )
        table = index.to_frame(index=False)
        places = {component: component_place(component) for component in self.components}
        for column, which in (("layer", 0), ("head", 1)):
            values = [places[component][which] for component in table["component"]]
            table.insert(1 + which, column, pd.Series(values, dtype="Int64"))
        columns: dict[str, Any] = {"token": self.tokens[:, list(self.positions)], "target": self.target_ids}
        if self.against_ids is not None:
            columns["against"] = self.against_ids
        for column, ids in columns.items():
            texts = [self.strings[str(i)] for i in ids.flatten().tolist()]
            table[column] = texts * len(self.components)
        table["contribution"] = self.contributions.flatten().numpy()
        return table


def component_place(component: str) -> tuple[int | None, int | None]:
    """(layer, head) of a component of a `LogitAttribution`; None for what it does not belong to."""
    found = re.fullmatch(r"L(\d+)(?:H(\d+)| bias| MLP)", component)
    if found is None:
        return None, None
    return int(found[1]), None if found[2] is None else int(found[2])
