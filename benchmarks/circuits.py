"""Circuits with GPT-2 small's shape: accuracy over the whole vocabulary and composition of all heads; and the
search for induction circuits in a model with SmolLM2-135M's shape.

    python benchmarks/circuits.py [--runs 5] [--pairs 40]

Weights are random, because speed does not depend on their values. Exact top-1 accuracy is compared with the
bare product in the same tiles. Composition is compared with a loop over pairs of heads, extrapolated from
some of them. The search on a sample of the vocabulary is compared with the search on all of it, extrapolated
from one pair, and with a bare forward pass. All figures come from one run on one machine; on another, only
the ratios are comparable.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

# Silence the profiler's messages about starting, stopping and older allocations.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import Row, check_peak_bytes, peak_bytes, print_rows, random_smollm2, seconds
from torch import Tensor
from transformer_lens import FactoredMatrix

from mechlens import find_induction_circuits
from mechlens.measures import weights
from mechlens.measures.composition import composition_scores, random_composition
from mechlens.measures.weights import largest_entries, top_k_accuracy
from mechlens.models.protocol import engine_of
from mechlens.models.run.properties import last_residual

THREADS = 2
D_VOCAB, D_MODEL, D_HEAD = 50257, 768, 64
N_LAYERS, N_HEADS = 12, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, interleaved; the fastest counts")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of heads to time in the loop")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    check_peak_bytes()
    with torch.inference_mode():
        accuracy(options.runs)
        composition(options.runs, options.pairs)
    induction_circuits()


def accuracy(runs: int) -> None:
    draw = torch.Generator().manual_seed(0)
    # as in real circuits, the key side is transposed
    keys = torch.randn(D_VOCAB, D_HEAD, generator=draw)
    circuit = FactoredMatrix(torch.randn(D_VOCAB, D_HEAD, generator=draw), keys.T)

    def bare() -> None:
        """The product alone, in the tiles of `measures/weights.py`."""
        room = torch.empty(weights.TILE_ROWS * weights.TILE_COLUMNS)
        for rows in circuit.A.split(weights.TILE_ROWS):
            for columns in circuit.B.split(weights.TILE_COLUMNS, 1):
                size = len(rows), columns.shape[1]
                torch.mm(rows, columns, out=room[: size[0] * size[1]].view(size))

    works = {
        "bare": bare,
        "key": lambda: top_k_accuracy(circuit, 1, "key"),
        "query": lambda: top_k_accuracy(circuit, 1, "query"),
        "largest": lambda: largest_entries(circuit, 100),
    }
    best = fastest(works, runs)
    product = 2 * D_VOCAB**2 * D_HEAD
    peaks = {name: peak_bytes(work) / 2**20 for name, work in works.items()}
    rows = [
        Row("arithmetic of the product", product / 1e12, "TFLOP"),
        Row("bare product in tiles", best["bare"], "s"),
        Row("  its rate", product / 1e9 / best["bare"], "GFLOP/s"),
        Row("exact top-1 over keys", best["key"], "s"),
        Row("  its rate", product / 1e9 / best["key"], "GFLOP/s"),
        Row("top-1 over keys / bare product", best["key"] / best["bare"], "", 1.6),
        Row("top-1 over queries / bare product", best["query"] / best["bare"], "", 1.6),
        Row("the 100 largest entries / bare product", best["largest"] / best["bare"], ""),
        Row("peak memory of top-1, over keys", peaks["key"], "MiB", 1024),
        Row("  over queries", peaks["query"], "MiB", 1024),
        Row("  of the 100 largest entries", peaks["largest"], "MiB"),
    ]
    print_rows(f"{D_VOCAB} x {D_VOCAB} entries, inner dimension {D_HEAD}, {THREADS} threads", rows)


def composition(runs: int, n_pairs: int) -> None:
    draw = torch.Generator().manual_seed(1)
    count = N_LAYERS * N_HEADS
    W_Q, W_K, W_V = torch.randn(3, count, D_MODEL, D_HEAD, generator=draw) / D_MODEL**0.5
    W_O = torch.randn(count, D_HEAD, D_MODEL, generator=draw) / D_HEAD**0.5
    layers = torch.arange(N_LAYERS).repeat_interleave(N_HEADS)

    def all_pairs() -> Tensor:
        return composition_scores(W_V, W_O, W_K, W_Q.mT, source_layers=layers, destination_layers=layers)

    pairs = (layers[:, None] < layers).nonzero().tolist()
    some = pairs[:: max(1, len(pairs) // n_pairs)][:n_pairs]
    scores = all_pairs()
    worst, whole, alone = 0.0, [], []
    for source, destination in some:
        OV = FactoredMatrix(W_V[source], W_O[source])
        QK = FactoredMatrix(W_Q[destination], W_K[destination].mT)
        found: list[Any] = []
        # FactoredMatrix caches its decomposition, so the second timing reuses the norms of single heads
        whole.append(seconds(lambda: found.append(one_pair(OV, QK))))  # noqa: B023  # called at once
        alone.append(seconds(lambda: one_pair(OV, QK)))  # noqa: B023
        worst = max(worst, abs(float(found[0]) - float(scores[source, destination])))
    loop, kept = (len(pairs) * statistics.median(times) for times in (whole, alone))
    ours = fastest({"ours": all_pairs}, runs)["ours"]
    product = len(pairs) * 2 * D_HEAD * D_MODEL * D_HEAD
    baseline = seconds(lambda: random_composition(D_MODEL, D_HEAD))
    rows = [
        Row("arithmetic of the products", product / 1e12, "TFLOP"),
        Row(f"the loop, from {len(some)} of {len(pairs)} equal pairs", loop, "s"),
        Row("  with the norm of each head cached", kept, "s"),
        Row("all pairs at once", ours, "s"),
        Row("  its rate", product / 1e9 / ours, "GFLOP/s"),
        Row("all at once / the loop", ours / loop, "", 1 / 20),
        Row("  times faster", loop / ours, ""),
        Row("all at once / the loop with cached norms", ours / kept, "", 1 / 20),
        Row("  times faster", kept / ours, ""),
        Row("largest difference", worst, "", 1e-5),
        Row("peak memory", peak_bytes(all_pairs) / 2**20, "MiB"),
        Row("the random baseline, 100 pairs", baseline, "s"),
    ]
    print_rows(f"K-composition of {count} heads, d_model {D_MODEL}, {THREADS} threads", rows)


def induction_circuits() -> None:
    """24 pairs of heads in the same layers as in the trained model."""
    model = random_smollm2()
    receivers = [(layer, head) for layer in (17, 18, 23) for head in range(3)][:8]
    pairs = [(sender, receiver) for receiver in receivers for sender in ((2, 1), (11, 1), (16, 0))]
    sampled = find_induction_circuits(model, pairs=pairs[:1], progress=False)
    forward = fastest({"forward": lambda: last_residual(model, sampled.tokens)}, 3)["forward"]
    search = partial(find_induction_circuits, model, progress=False)
    times = {
        "all pairs": seconds(partial(search, pairs=pairs)),
        "one pair": seconds(partial(search, pairs=pairs[:1])),
        "one pair, all tokens": seconds(partial(search, pairs=pairs[:1], n_tokens=None)),
    }
    # a pair has three accuracies: two of its own, and one of its induction head
    more = (times["one pair, all tokens"] - times["one pair"]) * (2 * len(pairs) + len(receivers)) / 3
    product = 2 * model.cfg.d_vocab**2 * model.cfg.d_head
    at_once = engine_of(model) == "HookedTransformer"
    rows = [
        Row("a forward pass of the sequences", forward, "s"),
        Row("one pair", times["one pair"], "s"),
        Row(f"{len(pairs)} pairs", times["all pairs"], "s", 120 if at_once else None),
        Row("  in forward passes", times["all pairs"] / forward, ""),
        Row("one pair, all tokens counted", times["one pair, all tokens"], "s"),
        Row("  arithmetic of their products", 3 * product / 1e12, "TFLOP"),
        Row(f"{len(pairs)} pairs, all tokens counted, extrapolated", times["all pairs"] + more, "s"),
    ]
    title = f"Induction circuits, {model.cfg.n_layers} layers, {model.cfg.d_vocab} tokens, {THREADS} threads"
    print_rows(title, rows)


def one_pair(OV: FactoredMatrix, QK: FactoredMatrix) -> Tensor:
    return (OV @ QK.T).norm() / (OV.norm() * QK.norm())


def fastest(works: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """The best of several runs of each, interleaved so that other load on the machine slows them equally."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: min(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
