"""Weights in the same form on both engines: access, folding, rotary embeddings, randomization."""
