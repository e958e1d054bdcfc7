"""Every measure, from tensors to tensors; no model is needed."""
