"""FLOP of a model's blocks and FLOP per second of this machine, for estimates of run time."""

from __future__ import annotations

import statistics
import time

from mechlens.models.protocol import LensModel
from mechlens.models.run.properties import key_value_heads

POSITIONS = 1024
"""Rows of the matrix product used to measure the machine."""


def block_flop(model: LensModel, length: int) -> int:
    """FLOP of one block for one token that attends to `length` tokens.

    Additions and multiplications count one FLOP each. Matrix products (2 FLOP per weight) and attention are
    included; exponentials and norms are not.
    """
    cfg = model.cfg
    d_mlp = 0 if getattr(cfg, "attn_only", False) else cfg.d_mlp
    heads = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + key_value_heads(model))
    mlp = (3 if getattr(cfg, "gated_mlp", False) else 2) * cfg.d_model * d_mlp
    scores = 2 * length * cfg.n_heads * cfg.d_head
    return 2 * (heads + mlp + scores)


def block_rate(model: LensModel) -> float:
    """FLOP per second of a matrix product of the model's width, on its device."""
    d_model = model.cfg.d_model
    vectors, weights = (model.W_E.new_ones(rows, d_model) for rows in (POSITIONS, d_model))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        float((vectors @ weights)[0, 0])  # reading a value waits for a GPU
        seconds.append(time.perf_counter() - start)
    # the first run also allocates memory
    return 2 * POSITIONS * d_model**2 / statistics.median(seconds[1:])
