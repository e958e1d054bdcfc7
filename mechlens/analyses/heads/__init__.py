"""Repeated random tokens: how well a model predicts the second copy, and which heads are responsible."""
