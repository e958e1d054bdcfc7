"""The result of a gradient search: optimized embeddings, and the tokens they decode to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.results.columns import Column
from mechlens.results.features import OfFeatures, listed, place_words
from mechlens.text.display import count

if TYPE_CHECKING:
    import pandas as pd

ACTIVATING = ("constant", "mean", "min")
"""The objectives that make activations large."""
DISTANCES = {
    "l1": "L1 distance to the target's activations",
    "cosine": "cosine distance to the target's activations",
}
DECODINGS = {"pinv": "pseudo-inverse", "nearest": "nearest embedding"}
_LONGEST_LIST = 4
"""Up to this many features are named one by one."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradientSearch(OfFeatures):
    """Embeddings that gradient descent found for an objective, and the tokens they decode to."""

    site: str
    """As in `ExhaustiveSearch`."""
    layer: int
    """For a continuation, the last layer."""
    directions: Float[Tensor, "direction d_model"] | None
    selected: Int[Tensor, "selected 2"]
    """(pos, feature) of every element in the objective, with `pos` counted from the first searched token.
    Empty for a continuation."""
    prefix: Int[Tensor, " prefix"]
    """As in `ExhaustiveSearch`."""
    prepend_bos: bool
    objective: str
    """What was minimized: `constant`, `mean`, `min`, `l1`, `cosine` or `continuation`."""
    target_ids: Int[Tensor, " target"] | None
    constant: float | None
    prior: str
    """`none`, `softmax`, `norm` or `nearest`."""
    prior_weight: float | None
    """Weight of the prior, where it is a penalty."""
    optimizer: str
    learning_rate: float
    isolated: bool
    """Whether the block was run without the blocks before it."""
    seed: int
    objectives: Float[Tensor, "restart step"]
    """The objective before each step and at the end, without the penalty."""
    activations: Float[Tensor, "restart step"]
    """Mean of the selected activations; nan for a continuation."""
    embeddings: Float[Tensor, "restart pos d_model"]
    """The embeddings with the lowest sum of objective and penalty."""
    nearest_cosine: Float[Tensor, "restart pos"]
    """Cosine of each of these with the nearest real embedding."""
    token_cosine: float
    """For comparison: the mean cosine of a real embedding with the nearest other one."""
    decoded_ids: dict[str, Int[Tensor, "restart pos"]]
    """For each decoding (`pinv`, `nearest`): the tokens that these embeddings decode to, good or bad."""
    ids: dict[str, Int[Tensor, "restart pos"]]
    """For each decoding: the best tokens found during the search."""
    true_objectives: dict[str, Float[Tensor, " restart"]]
    """The objective when these tokens are run."""
    true_activations: dict[str, Float[Tensor, " restart"]]
    """Mean of the selected activations when these tokens are run; nan for a continuation."""
    selected_activations: dict[str, Float[Tensor, "restart selected"]]
    """For each decoding: the selected activations when these tokens are run."""
    optimum: float | None
    """The largest activation over all tokens, if an exhaustive search was given."""
    strings: dict[str, str]

    columns: ClassVar = (
        Column(
            "decoding", "decoded by", help="Pseudo-inverse of the embedding matrix, or nearest embedding."
        ),
        Column("restart"),
        Column("tokens", help="Tokens are separated by spaces; spaces within tokens are dots."),
        Column("objective", help="What the search minimized, when the tokens are run."),
        Column("activation", help="Mean of the selected activations when the tokens are run."),
        Column("smallest_activation", help="The smallest of the selected activations."),
        Column("nearest_cosine", help="Cosine of the embedding with the nearest real one; 1 is a real one."),
        Column("found_by", "found by", help="Restarts that found these tokens."),
    )

    @property
    def title(self) -> str:
        place = "" if self.objective == "continuation" else f" of {place_words(self.site, self.layer)}"
        alone = " alone" if self.isolated else ""
        return f"Gradient search in {self.model.name} for {self.searched}{place}{alone}"

    @property
    def searched(self) -> str:
        """What was searched: `feature 7 at every position`, `the continuation ·a`."""
        if self.objective == "continuation":
            return f"the continuation {self.target}"
        n_tokens = self.embeddings.shape[1]
        positions, features = (sorted(set(column)) for column in self.selected.T.tolist())
        words = f"{self.noun} {features[0]}"
        if len(features) > _LONGEST_LIST:
            words = f"{len(features)} {self.noun}s"
        elif len(features) > 1:
            words = f"{self.noun}s {listed(features)}"
        if n_tokens == 1:
            return words
        if len(self.selected) != len(positions) * len(features):
            return f"{words} at selected positions"
        if len(positions) == n_tokens:
            return f"{words} at every position"
        return f"{words} at position{'s' if len(positions) > 1 else ''} {listed(positions)}"

    @property
    def target(self) -> str:
        """The target as tokens, or as ids if the result lacks their text; empty if there is none."""
        if self.target_ids is None:
            return ""
        ids = self.target_ids.tolist()
        known = all(str(token) in self.strings for token in ids)
        return self.text(ids) if known else f"of the ids {listed(ids)}"

    @property
    def judged_by(self) -> tuple[str, Tensor, dict[str, Tensor]]:
        """What the search is judged by: its name, and its values at each step and for the decoded tokens.

        This is the mean or smallest activation if that was maximized, the log-probability of a continuation,
        or the distance to a target.
        """
        if self.objective == "continuation":
            true = {way: -values for way, values in self.true_objectives.items()}
            return "log-probability (nats)", -self.objectives, true
        if self.objective in DISTANCES:
            return DISTANCES[self.objective], self.objectives, self.true_objectives
        if self.objective == "min":
            true = {way: -values for way, values in self.true_objectives.items()}
            return "smallest activation", -self.objectives, true
        several = " (mean)" if len(self.selected) > 1 else ""
        return f"activation{several}", self.activations, self.true_activations

    def _best(self, decoding: str | None) -> tuple[str, int]:
        ways = tuple(self.ids) if decoding is None else (decoding,)
        if not set(ways) <= set(self.ids):
            raise ArgumentError("decoding", f"one of {', '.join(self.ids)}", decoding)
        way = min(ways, key=lambda each: float(self.true_objectives[each].min()))
        return way, int(self.true_objectives[way].argmin())

    def best_ids(self, decoding: str | None = None) -> Int[Tensor, " pos"]:
        """The tokens with the lowest true objective, by one decoding or by both."""
        way, restart = self._best(decoding)
        return self.ids[way][restart]

    def best_objective(self, decoding: str | None = None) -> float:
        """The objective when the best tokens are run; minus the log-probability (nats) for a continuation."""
        way, restart = self._best(decoding)
        return float(self.true_objectives[way][restart])

    def best_activation(self, decoding: str | None = None) -> float:
        """Mean of the selected activations when the best tokens are run; nan for a continuation (see
        `best_objective`)."""
        way, restart = self._best(decoding)
        return float(self.true_activations[way][restart])

    def best_activations(self, decoding: str | None = None) -> Float[Tensor, " selected"]:
        """Each of the selected activations when the best tokens are run."""
        way, restart = self._best(decoding)
        return self.selected_activations[way][restart]

    @property
    def below_optimum(self) -> float | None:
        """How far the best tokens are below the optimum; None if that is not known.

        The same token in another batch differs by rounding, so this may be slightly negative.
        """
        return None if self.optimum is None else self.optimum - self.best_activation()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per decoding and restart, best first: decoding, restart, ids, tokens, objective,
        activation (both when the tokens are run), smallest_activation (of the selected ones), nearest_cosine
        (mean over positions)."""
        import pandas as pd

        rows = [
            (
                way,
                restart,
                tuple(tokens),
                "".join(self.strings[str(token)] for token in tokens),
                float(self.true_objectives[way][restart]),
                float(self.true_activations[way][restart]),
                min(self.selected_activations[way][restart].tolist(), default=float("nan")),
                float(self.nearest_cosine[restart].mean()),
            )
            for way in self.ids
            for restart, tokens in enumerate(self.ids[way].tolist())
        ]
        columns = ["decoding", "restart", "ids", "tokens", "objective", "activation"]
        columns += ["smallest_activation", "nearest_cosine"]
        table = pd.DataFrame(rows, columns=columns)
        return table.sort_values("objective", kind="stable", ignore_index=True)

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The best tokens of each decoding, with whitespace visible, and how many restarts found them."""
        import pandas as pd

        table, rows = self.to_dataframe(), []
        for way, ids in self.ids.items():
            best = table[table["decoding"] == way].iloc[0]
            equal = int((ids == self.best_ids(way)).all(-1).sum())
            row = best.drop("ids").to_dict() | {
                "decoding": DECODINGS.get(way, way),
                "tokens": self.text(best["ids"], " "),
                "found_by": f"{equal} of {count(len(ids), 'restart')}",
            }
            rows.append(row)
        return pd.DataFrame(rows, columns=[each.name for each in self.columns]).head(top)

    @property
    def verdict(self) -> str:
        """Whether the search found the optimum, in a sentence; empty if that is not known."""
        if self.optimum is None:
            return ""
        if self.site == "post" and self.optimum <= 0:
            return f"No token activates the {self.noun} by itself."
        missed = self.optimum - self.best_activation()
        # the same token in another batch differs by rounding, which is coarse in half precision
        close = 1e-4 if self.model.dtype in ("float32", "float64") else 0.1
        reached = missed <= close * abs(self.optimum)
        return f"The largest activation of all tokens is {self.optimum:.3f}: " + (
            "the search found it." if reached else f"the search missed it by {missed:.3f}."
        )
