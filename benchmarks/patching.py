"""Patching grids compared with a loop that makes one full forward pass for each layer and position.

    python benchmarks/patching.py [--passes 40]

The loop is that of "How one can Interpret GPT2-Small". The model has GPT-2 small's shape and random weights.
The input is BOS, 50 random tokens and the same 50 again: 12 layers x 50 positions. Every pass of the loop
costs the same, so its time is extrapolated from some of its 600 passes. All figures come from one run on one
machine; on another, only the ratios are comparable.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

# Silence the profiler's messages about starting, stopping and older allocations.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import Row, peak_bytes, print_rows, random_gpt2_small, seconds
from torch import Tensor

from mechlens import Earlier, Loss, Patching
from mechlens.models.protocol import engine_of
from mechlens.models.run import patched_runs

THREADS = 2
SEQ_LEN = 50
BOS = 50256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--passes", type=int, default=40, help="passes of the loop to time")
    parser.add_argument("--runs", type=int, default=3, help="runs of the sweep")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = random_gpt2_small()
    hooked = engine_of(model) == "HookedTransformer"
    draw = torch.Generator().manual_seed(0)
    once = torch.randint(50000, (1, SEQ_LEN), generator=draw)
    tokens = torch.cat([torch.tensor([[BOS]]), once, once], 1)
    n_pos = tokens.shape[1]
    positions = range(SEQ_LEN + 1, n_pos)
    n_layers = model.cfg.n_layers

    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_mlp_out"))
        cells = [(layer, pos) for pos in positions for layer in range(n_layers)]
        some = cells[:: max(1, len(cells) // options.passes)][: options.passes]
        experiment = Patching(model, tokens, metric=Loss(at=positions[:-1]))

        def grid() -> Any:
            return experiment.grid("mlp_out", values=Earlier(SEQ_LEN), positions=positions)

        found = grid()

        def one(layer: int, pos: int) -> Tensor:
            """One cell of the loop."""

            def patch(activation: Tensor, hook: Any) -> Tensor:
                activation[0, pos, :] = cache[hook.name][0, pos - SEQ_LEN]
                return activation

            name = f"blocks.{layer}.hook_mlp_out"
            logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(name, patch)])
            log_probs = logits[0, SEQ_LEN + 1 : -1].float().log_softmax(-1)
            return -log_probs.gather(1, tokens[0, SEQ_LEN + 2 :, None]).mean()

        one(*some[0])
        worst, passes = 0.0, []
        for layer, pos in some:
            result: list[Tensor] = []
            passes.append(seconds(lambda: result.append(one(layer, pos))))  # noqa: B023  # called at once
            ours = float(found.mean[layer, pos - positions[0]])
            worst = max(worst, abs(float(result[0]) - ours))
        loop = statistics.median(passes) * len(cells)

        estimate = seconds(
            lambda: experiment.attribution("mlp_out", values=Earlier(SEQ_LEN), positions=positions)
        )
        sweep = statistics.median(seconds(grid) for _ in range(options.runs))
        large = torch.randn(1024, 3072), torch.randn(3072, 3072)
        product = min(seconds(lambda: large[0] @ large[1]) for _ in range(5))
        rate = 2 * 1024 * 3072 * 3072 / product / 1e9
        theirs = len(cells) * run_flops(model.cfg, n_pos, n_pos, n_layers, n_pos) / 1e12
        ours_flops = sweep_flops(model, tokens, positions, hooked) / 1e12
        peak = peak_bytes(grid)
        budget = 4 * patched_runs.TOKEN_BUDGET * patched_runs.position_floats(model)
        rows = [
            Row("the loop, counted", theirs, "TFLOP"),
            Row("the sweep, counted", ours_flops, "TFLOP"),
            Row("the loop / the sweep, counted", theirs / ours_flops, ""),
            Row(f"the loop, from {len(some)} of {len(cells)} equal passes", loop, "s"),
            Row("the sweep", sweep, "s"),
            Row("the sweep / the loop", sweep / loop, "", 1 / 6 if hooked else 1 / 3),
            Row("  times faster", loop / sweep, ""),
            Row("attribution patching, an estimate", estimate, "s"),
            Row("attribution patching / the loop", estimate / loop, "", 1 / 100),
            Row("a large product's rate", rate, "GFLOP/s"),
            Row("the large product's rate / the sweep's", rate * sweep / ours_flops / 1e3, "", 1 / 0.75),
            Row("largest difference in loss", worst, "nats", 1e-4),
            Row("peak memory of the sweep", peak / 2**20, "MiB"),
            Row("peak memory / the budget", peak / budget, "", 1.0),
        ]
    print_rows(f"MLP patching, {n_layers} x {SEQ_LEN} cells, {THREADS} threads, {engine_of(model)}", rows)
    growth(model)


def run_flops(cfg: Any, rows: float, context: int, layers: int, read: float) -> float:
    """Additions and multiplications in the matrix products of `rows` positions through some layers."""
    weights = 4 * cfg.d_model * cfg.n_heads * cfg.d_head + 2 * cfg.d_model * cfg.d_mlp
    attention = 2 * context * cfg.n_heads * cfg.d_head
    return 2.0 * (rows * layers * (weights + attention) + read * cfg.d_model * cfg.d_vocab)


def sweep_flops(model: Any, tokens: Tensor, positions: range, hooked: bool) -> float:
    """Operations of the sweep, group by group, and of the clean runs."""
    cfg, end = model.cfg, tokens.shape[1] - 1
    cells = [(layer, pos) for layer in range(cfg.n_layers) for pos in positions]
    patches = patched_runs.Patches(
        "mlp_out",
        torch.tensor([layer for layer, _ in cells]),
        torch.tensor([pos for _, pos in cells]),
        lambda activation, which, start, layer: activation,
    )
    # one full run, and half a run to test whether runs can be resumed from it
    total = 1.5 * run_flops(cfg, end, end, cfg.n_layers, 0) + run_flops(cfg, 0, 0, 0, len(positions))
    for start, which in patched_runs._groups(model, patches, end, patched_runs.TOKEN_BUDGET, whole=False):
        for layer in patches.layer[which].tolist():
            layers = cfg.n_layers - 1 - layer if hooked else cfg.n_layers
            total += run_flops(cfg, end - start, end, layers, end - start)
    return total


def growth(model: Any) -> None:
    """How time grows with layers, positions and length."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length, n_cells, layers in ((51, 10, 12), (101, 10, 12), (201, 10, 12), (101, 20, 12), (101, 10, 6)):
        start = time.perf_counter()
        tokens = torch.randint(50000, (1, length), generator=draw)
        Patching(model, tokens, metric=Loss(at=range(length // 2, length - 1))).grid(
            "mlp_out",
            values="zero",
            layers=range(layers),
            positions=range(length // 2, length // 2 + n_cells),
        )
        what = f"{length} tokens, {n_cells} positions from the middle on, {layers} layers"
        rows.append(Row(what, time.perf_counter() - start, "s"))
    print_rows("growth with length, positions and layers", rows)


if __name__ == "__main__":
    main()
