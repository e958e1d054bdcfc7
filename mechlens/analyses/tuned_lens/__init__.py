"""Training a tuned lens: an affine map for each row, so that the row predicts what the model does."""

from __future__ import annotations

from mechlens.analyses.tuned_lens.training import Training, train_tuned_lens

__all__ = ["Training", "train_tuned_lens"]
