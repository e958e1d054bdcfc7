"""Weights in one form on both engines: access, folding, rotary embeddings, randomization."""
