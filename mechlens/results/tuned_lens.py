"""The tuned lens: an affine translator for each row of the logit lens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.results.base import ModelInfo, Result, row_place
from mechlens.results.columns import Column

if TYPE_CHECKING:
    import pandas as pd

# Fields in which lenses of the same weights agree; engine and dtype may differ.
_OF_THE_WEIGHTS = ("name", "revision", "architecture", "processing", "n_layers", "d_model", "d_vocab")

_WEIGHTS = {
    True: "processed weights (processing=True)",
    False: "unprocessed weights (processing=False)",
    None: "weights whose processing is unknown",
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """Affine maps that make each row of the lens predict what the model does.

    A lens belongs to the weights it was trained on, processed or not.
    """

    rows: tuple[str, ...]
    """`embed`, then the layers by number, without the last, which needs no translator."""
    weight: Float[Tensor, "row d_model d_model"]
    """A vector x becomes `x + x @ weight + bias`."""
    bias: Float[Tensor, "row d_model"]
    kl_plain: Float[Tensor, " every"]
    """KL(final || row) of each row and the last layer without a translator, in nats: the mean over held-out
    tokens; nan if it was not measured."""
    kl_tuned: Float[Tensor, " every"]
    """The same with the translators."""
    source: str
    """`trained`, or the published checkpoint it was read from, in which case nothing below is known."""
    steps: int | None
    batch_tokens: int | None
    """Tokens in each step's batch."""
    length: int | None
    """Tokens in a window of text, with its BOS."""
    train_tokens: int | None
    """Distinct tokens that were trained on."""
    held_out_tokens: int | None
    """Other tokens, over which the KLs are averaged."""
    learning_rate: float | None
    """Learning rate of the first step; it falls linearly to zero."""
    seed: int | None
    prepend_bos: bool | None
    """Whether every window began with BOS."""

    columns: ClassVar = (
        Column("row"),
        Column("kl_plain", "KL without translator", "nats"),
        Column("kl_tuned", "KL with translator", "nats"),
    )

    @property
    def title(self) -> str:
        return f"Tuned lens of {self.model.name}"

    @property
    def is_measured(self) -> bool:
        """Whether its KL is known; a published lens has none."""
        return not bool(self.kl_tuned.isnan().all())

    def translate(
        self, row: str, vectors: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Translate the residual vectors of a row.

        Args:
            row: one of `rows`, or the last layer, whose vectors are returned unchanged.
            vectors: `resid_post` of a layer, or block 0's `resid_pre` for `embed`.

        Returns:
            Vectors in the dtype of `vectors`; the arithmetic is done in at least float32.

        Raises:
            ValueError: there is no such row.

        Example:
            >>> text = mechlens.sample_tokens(model, batch=4, seq_len=16)
            >>> training = mechlens.Training(steps=1, batch_tokens=16)
            >>> tuned = mechlens.train_tuned_lens(model, text, training=training, held_out=1)
            >>> tuned.translate("2", torch.zeros(5, model.cfg.d_model)).shape
            torch.Size([5, 192])
        """
        if row == str(self.model.n_layers - 1):
            return vectors
        if row not in self.rows:
            there = ", ".join((*self.rows, str(self.model.n_layers - 1)))
            raise ValueError(f"this lens has no row {row!r}: it has {there}")
        index = self.rows.index(row)
        wide = torch.promote_types(vectors.dtype, torch.float32)
        weight, bias = (each[index].to(vectors.device, wide) for each in (self.weight, self.bias))
        x = vectors.to(wide)
        return (x + x @ weight + bias).to(vectors.dtype)

    def check_fits(self, info: ModelInfo) -> None:
        """Check that this lens belongs to a model's weights.

        Raises:
            ValueError: it was trained on another model, revision or size, or with other processing.
        """
        other = [
            f"{name} {getattr(self.model, name)!r}, not {getattr(info, name)!r}"
            for name in _OF_THE_WEIGHTS
            if getattr(self.model, name) != getattr(info, name)
        ]
        if not other:
            return
        advice = "train a lens on this model, or load the one it was trained on"
        said = f"it belongs to {', '.join(other)}"
        if other[0].startswith("processing") and len(other) == 1:
            trained, given = _WEIGHTS[self.model.processing], _WEIGHTS[info.processing]
            said = f"it was trained on {trained}, but this model has {given}"
            if self.model.processing is not None:
                advice = f"load the model with processing={self.model.processing}"
        raise ValueError(f"this tuned lens does not fit the model: {said}; {advice}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per row of the lens and the last layer: row, layer (-1 for `embed`), kl_plain, kl_tuned."""
        import pandas as pd

        rows = [*self.rows, str(self.model.n_layers - 1)]
        return pd.DataFrame(
            {
                "row": rows,
                "layer": [row_place(row)[0] for row in rows],
                "kl_plain": self.kl_plain.tolist(),
                "kl_tuned": self.kl_tuned.tolist(),
            }
        )

    def summary(self, top: int | None = None) -> pd.DataFrame:
        """All rows, last layer first."""
        return self.to_dataframe()[["row", "kl_plain", "kl_tuned"]][::-1].head(top or len(self.rows) + 1)
