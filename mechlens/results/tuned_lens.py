"""The tuned lens: one affine translator per row of the lens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.results.base import ModelInfo, Result, row_place

if TYPE_CHECKING:
    import pandas as pd

# What a lens of other weights would differ in; engines and dtypes may change.
_OF_THE_WEIGHTS = ("name", "revision", "architecture", "processing", "n_layers", "d_model", "d_vocab")

_WEIGHTS = {
    True: "processed weights (processing=True)",
    False: "unprocessed weights (processing=False)",
    None: "weights whose processing is unknown",
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """What turns each row of the lens into what the last layer would make of it, as an affine map.

    It belongs to the weights it was trained on, processed or not; ask `check_fits`.
    """

    rows: tuple[str, ...]
    """`embed`, then the layers by number, without the last, which needs no translator."""
    weight: Float[Tensor, "row d_model d_model"]
    """A vector x becomes `x + x @ weight + bias`."""
    bias: Float[Tensor, "row d_model"]
    kl_plain: Float[Tensor, " every"]
    """Of each row and the last layer, without a translator: KL(final || row) in nats, the mean over the
    tokens held out; nan where it was not measured."""
    kl_tuned: Float[Tensor, " every"]
    """The same with the translators."""
    source: str
    """`trained`, or the checkpoint that the lens was read from; of that nothing below is known."""
    steps: int | None
    batch_tokens: int | None
    """Tokens in each step's batch."""
    length: int | None
    """Tokens in a window of text, with its BOS."""
    train_tokens: int | None
    """Different tokens that were trained on."""
    held_out_tokens: int | None
    """Tokens, others than those, that the KLs are a mean over."""
    learning_rate: float | None
    """Of the first step; it falls linearly to zero."""
    seed: int | None
    prepend_bos: bool | None
    """Whether every window began with BOS."""

    def translate(
        self, row: str, vectors: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Residual vectors of a row as the last layer would have them.

        Args:
            row: one of `rows`, or the last layer, whose vectors come back as they are.
            vectors: `resid_post` of a layer, or block 0's `resid_pre` for `embed`.

        Returns:
            In the dtype of `vectors`; the arithmetic is done in float32 at least.

        Raises:
            ValueError: no such row.
        """
        if row == str(self.model.n_layers - 1):
            return vectors
        if row not in self.rows:
            there = ", ".join((*self.rows, str(self.model.n_layers - 1)))
            raise ValueError(f"this lens has no row {row!r}; there are: {there}")
        index = self.rows.index(row)
        wide = torch.promote_types(vectors.dtype, torch.float32)
        weight, bias = (each[index].to(vectors.device, wide) for each in (self.weight, self.bias))
        x = vectors.to(wide)
        return (x + x @ weight + bias).to(vectors.dtype)

    def check_fits(self, info: ModelInfo) -> None:
        """Make sure that this lens belongs to a model's weights.

        Raises:
            ValueError: it was trained on another model, revision or size, or on weights in another state of
                processing.
        """
        other = [
            f"{name} {getattr(self.model, name)!r}, not {getattr(info, name)!r}"
            for name in _OF_THE_WEIGHTS
            if getattr(self.model, name) != getattr(info, name)
        ]
        if not other:
            return
        advice = "train a lens on this model, or load the one it was trained on"
        said = f"it is of {', '.join(other)}"
        if other[0].startswith("processing") and len(other) == 1:
            trained, given = _WEIGHTS[self.model.processing], _WEIGHTS[info.processing]
            said = f"it was trained on {trained}, but this has {given}"
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
