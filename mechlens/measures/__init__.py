"""Tensors in, tensors out: every measure, with no model in sight."""
