"""Training a tuned lens: an affine map for each row, after which it predicts what the model does."""

from __future__ import annotations

from mechlens.analyses.tuned_lens.training import Training, train_tuned_lens

__all__ = ["Training", "train_tuned_lens"]
