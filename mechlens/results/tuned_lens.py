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

# What lenses of the same weights agree in; engines and dtypes may change.
_OF_THE_WEIGHTS = ("name", "revision", "architecture", "processing", "n_layers", "d_model", "d_vocab")

_WEIGHTS = {
    True: "processed weights (processing=True)",
    False: "unprocessed weights (processing=False)",
    None: "weights whose processing is unknown",
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TunedLens(Result):
    """Affine maps after which each row of the lens predicts what the model does.

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
    """`trained`, or the published checkpoint that it was read from, of which nothing below is known."""
    steps: int | None
    batch_tokens: int | None
    """Tokens in each step's batch."""
    length: int | None
    """Tokens in a window of text, with its BOS."""
    train_tokens: int | None
    """Distinct tokens that were trained on."""
    held_out_tokens: int | None
    """Other tokens, which the KLs are a mean over."""
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
        """What this is, in a few words."""
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
            row: one of `rows`, or the last layer, whose vectors come back as they are.
            vectors: `resid_post` of a layer, or block 0's `resid_pre` for `embed`.

        Returns:
            In the dtype of `vectors`; the arithmetic is done in float32 at least.

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
            ValueError: it was trained on another model, revision or size, or on weights with other
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
        said = f"it belongs to {', '.join(other)}"
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

    def summary(self, top: int | None = None) -> pd.DataFrame:
        """The rows, the last layer first; each matters."""
        return self.to_dataframe()[["row", "kl_plain", "kl_tuned"]][::-1].head(top or len(self.rows) + 1)
