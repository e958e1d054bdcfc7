"""The result of direct logit attribution."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.neurons import NeuronAttribution, neuron_label
from mechlens.text.display import number, turns, visible_token

if TYPE_CHECKING:
    import pandas as pd


_LONGEST, _SHOWN = 24, 6
"""Characters of a token, and tokens of the text, that a title shows."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogitAttribution(Result):
    """What each component adds to a logit or a logit difference, with the final norm's scale frozen."""

    tokens: Int[Tensor, "batch pos"]
    """What the model read."""
    positions: tuple[int, ...]
    """The positions that were read out, in order along the axis `read`."""
    components: tuple[str, ...]
    """`embed`; `pos_embed` if the model adds position embeddings to its residual stream; then each layer's
    heads (`L0H0`, ...), attention bias (`L0 bias`) and MLP (`L0 MLP`, if it has one); last `final bias`, the
    final norm's bias through `W_U` plus `b_U`."""
    contributions: Float[Tensor, "component batch read"]
    """In logits; their sum over components is `logit`, up to rounding."""
    logit: Float[Tensor, "batch read"]
    """The model's own logit of the target, before any soft-cap, minus the logit of `against_ids` if given."""
    target_ids: Int[Tensor, "batch read"]
    """The tokens whose logits are explained; position i predicts the token after it."""
    against_ids: Int[Tensor, "batch read"] | None
    """The tokens whose logits are subtracted; None if a single logit is explained."""
    strings: dict[str, str]
    """The text of every token above, keyed by its id as a string."""
    prepend_bos: bool
    neurons: NeuronAttribution | None = None
    """The neurons with the largest contributions; None if none were to be listed."""

    columns: ClassVar = (
        Column("component"),
        Column("contribution", "added to the logit", signed=True, help="All of them sum to the logit."),
    )
    neuron_columns: ClassVar = (
        Column("component"),
        Column("contribution", "added to the logit", signed=True, help="All of them sum to the MLPs'."),
        Column("activation", signed=True, help="After the nonlinearity; a product in a gated MLP."),
        Column(
            "promoted", "promotes", help="The tokens whose logits the neuron's output weights raise most."
        ),
        Column("suppressed", "suppresses", help="The tokens whose logits they lower most."),
    )
    """The columns of `neuron_summary()`."""

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

    def parts(self, *, row: int = 0, position: int = -1) -> dict[str, float]:
        """What every component adds for one sequence and position, in logits.

        Args:
            row: which sequence of the batch; negative counts from the end.
            position: which of the positions that were read; negative counts from the end.

        Raises:
            ArgumentError: there is no such sequence or position.
        """
        for name, index, n in (("row", row, len(self.tokens)), ("position", position, len(self.positions))):
            if not -n <= index < n:
                raise ArgumentError(name, f"between {-n} and {n - 1}", index)
        added = self.contributions[:, row, position].double().tolist()
        return dict(zip(self.components, added, strict=True))

    def largest(self, top: int = 12, *, row: int = 0, position: int = -1) -> dict[str, float]:
        """The `top` layer components with the largest contributions, of either sign, and the embeddings and
        the final bias, however small. The last entry is the sum of the rest, so all sum to the logit."""
        values = self.parts(row=row, position=position)
        of_layers = [name for name in values if component_place(name)[0] is not None]
        ranked = sorted(of_layers, key=lambda name: -abs(values[name]))
        shown = ranked[:top] + [name for name in values if name not in of_layers]
        rest = ranked[top:]
        found = {name: values[name] for name in sorted(shown, key=lambda name: -abs(values[name]))}
        return found | ({f"{len(rest)} others": sum(values[name] for name in rest)} if rest else {})

    def summary(self, top: int = 12) -> pd.DataFrame:
        """The largest components at the last position, the sum of the others, and the logit."""
        import pandas as pd

        rows = [*self.largest(top).items(), ("sum", float(self.logit[0, -1]))]
        return pd.DataFrame(rows, columns=[each.name for each in self.columns])

    def neuron_summary(self, tokens: int = 3) -> pd.DataFrame:
        """The listed neurons at the last position, the sum of the others, the MLPs' biases, and their sum.

        Args:
            tokens: how many promoted and suppressed tokens to name.

        Raises:
            ValueError: no neurons were listed.
        """
        import pandas as pd

        neurons = self._neurons()
        table = self.neurons_to_dataframe()
        last = table[(table["sequence"] == 0) & (table["pos"] == self.positions[-1])]
        rows: list[tuple[Any, ...]] = [
            (
                *(row[name] for name in ("label", "contribution", "activation")),
                *(
                    " ".join(visible_token(token, longest=_LONGEST) for token in row[end][:tokens])
                    for end in ("promoted", "suppressed")
                ),
            )
            for row in last.to_dict("records")
        ]
        whole = sum(self.parts(row=0)[name] for name in self.components if name.endswith(" MLP"))
        biases = float(neurons.biases[:, 0, -1].double().sum())
        others = whole - biases - sum(row[1] for row in rows)
        rest = neurons.n_neurons - len(rows)
        rows += [(f"{rest:,} others", others, None, None, None)] if rest else []
        rows += [("MLP biases", biases, None, None, None), ("sum of MLPs", whole, None, None, None)]
        return pd.DataFrame(rows, columns=[each.name for each in self.neuron_columns])

    def describe(self, *, row: int = 0, position: int = -1) -> tuple[str, str]:
        """What is explained, in two lines: the logit, and the text before it."""

        def shown(token: int) -> str:
            return f"“{visible_token(self.strings[str(token)], longest=_LONGEST)}”"

        at = self.positions[position]
        of = f"logit of {shown(int(self.target_ids[row, position]))}"
        if self.against_ids is not None:
            of += f" minus that of {shown(int(self.against_ids[row, position]))}"
        texts = [self.strings[str(token)] for token in self.tokens[row, : at + 1].tolist()]
        read = "".join(visible_token(text, longest=_LONGEST) for text in texts[-_SHOWN:])
        turn = "".join(f", turn of the {role}" for role in list(turns(texts).values())[-1:])
        return (
            f"Direct attribution of the {of}: {number(float(self.logit[row, position]), 2)}",
            f"{self.model.name}, after {'…' if at >= _SHOWN else ''}{read} (position {at}{turn})",
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component, sequence and position: component, layer and head (missing if it has none),
        sequence, pos, token, target, against (if there is one), contribution in logits.

        Neurons have a table of their own, `neurons_to_dataframe()`.
        """
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.components, range(len(self.tokens)), self.positions], names=["component", "sequence", "pos"]
        )
        table = index.to_frame(index=False)
        places = {component: component_place(component) for component in self.components}
        for column, which in (("layer", 0), ("head", 1)):
            values = [places[component][which] for component in table["component"]]
            table.insert(1 + which, column, pd.Series(values, dtype="Int64"))
        for column, texts in self._texts().items():
            table[column] = texts * len(self.components)
        table["contribution"] = self.contributions.flatten().numpy()
        return table

    def neurons_to_dataframe(self) -> pd.DataFrame:
        """One row per sequence, position and listed neuron: sequence, pos, token, target, against (if there
        is one), rank (1 is the largest contribution), layer, neuron, label, contribution in logits,
        activation, promoted and suppressed (the texts of the tokens, the first most of all).

        Raises:
            ValueError: no neurons were listed.
        """
        import pandas as pd

        neurons = self._neurons()
        n_ranks = neurons.layers.shape[-1]
        ranks = range(1, n_ranks + 1)
        index = pd.MultiIndex.from_product(
            [range(len(self.tokens)), self.positions, ranks], names=["sequence", "pos", "rank"]
        )
        table = index.to_frame(index=False)
        for column, texts in self._texts().items():
            table.insert(len(table.columns) - 1, column, [text for text in texts for _ in ranks])
        table["layer"] = neurons.layers.flatten().numpy()
        table["neuron"] = neurons.indices.flatten().numpy()
        places = list(zip(table["layer"].tolist(), table["neuron"].tolist(), strict=True))
        table["label"] = [neuron_label(*place) for place in places]
        table["contribution"] = neurons.contributions.flatten().numpy()
        table["activation"] = neurons.activations.flatten().numpy()
        row_of = neurons.places()
        for column in ("promoted", "suppressed"):
            texts_of = [tuple(self.strings[str(i)] for i in ids) for ids in getattr(neurons, column).tolist()]
            table[column] = [texts_of[row_of[place]] for place in places]
        return table

    def to_json(self) -> dict[str, Any]:
        """As for every result; `neurons` has the rows of `neurons_to_dataframe()`, or is None."""
        rows = None if self.neurons is None else self.neurons_to_dataframe().to_dict("records")
        return super().to_json() | {"neurons": rows}

    def _neurons(self) -> NeuronAttribution:
        if self.neurons is None:
            raise ValueError(
                "no neurons were listed: call direct_logit_attribution with neurons=10, for example"
            )
        return self.neurons

    def _texts(self) -> dict[str, list[str]]:
        """By column, the tokens of every sequence and position read."""
        columns = {"token": self.tokens[:, list(self.positions)], "target": self.target_ids}
        if self.against_ids is not None:
            columns["against"] = self.against_ids
        return {
            column: [self.strings[str(i)] for i in ids.flatten().tolist()] for column, ids in columns.items()
        }


def component_place(component: str) -> tuple[int | None, int | None]:
    """(layer, head) of a `LogitAttribution` component, with None for either that it does not have."""
    found = re.fullmatch(r"L(\d+)(?:H(\d+)| bias| MLP)", component)
    if found is None:
        return None, None
    return int(found[1]), None if found[2] is None else int(found[2])
