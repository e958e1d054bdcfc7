"""Edges, sets of components and exact patches of every node, against forward and backward passes.

    python benchmarks/tasks.py [--repeats 3]

A model of GPT-2 small's shape with random weights: 32 prompts of 15 tokens, 156 heads and MLPs, 32,491 edges.
The scores of all edges are products of what components write with gradients by inputs: 2 x 32,491 x 15 x 768
= 0.75 GFLOP per prompt, beside 2.5 GFLOP for a forward pass without logits. A head's or an MLP's patch runs
the later half of the blocks on average, and only the positions from the first token that differs: the 10th in
prompts like those of `ioi`, where the subject's second mention is swapped. All figures come from one run on
one machine; only their ratios mean anything on another.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

# The profiler tells of its start and stop, and of blocks that are older than it.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import Row, peak_bytes, print_rows, random_gpt2_small, seconds
from torch import Tensor

from mechlens import LogitDiff, Patching
from mechlens.models.run import edge_runs
from mechlens.models.run.edge_gradients import edge_effects
from mechlens.models.run.edge_runs import EdgeRuns, Written
from mechlens.models.run.graph import Graph
from mechlens.models.run.unembedding import final_norm, unembedding

THREADS = 2
PROMPTS, LENGTH = 32, 15
RIGHT, WRONG = 5, 9
DIFFERS = 9
SETS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = random_gpt2_small()
    draw = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(50000, (2, PROMPTS, LENGTH), generator=draw)
    swapped = torch.cat([clean[:, :DIFFERS], corrupted[:, DIFFERS:]], 1)
    # no gradients by weights, which nothing here needs
    for weight in model.parameters():
        weight.requires_grad_(False)
    graph = Graph.of(model)

    def median(work: Callable[[], Any]) -> float:
        return statistics.median(seconds(work) for _ in range(options.repeats))

    def metric(final: Tensor, prompts: Any) -> Tensor:
        read, vectors = unembedding(model), final_norm(model, final)
        right, wrong = (read.of(vectors, torch.full((len(final),), token)) for token in (RIGHT, WRONG))
        return right - wrong

    def forward() -> None:
        with torch.inference_mode():
            model(clean)

    def backward() -> None:
        def start(stream: Tensor, hook: Any) -> Tensor:
            return stream.requires_grad_()

        logits = model.run_with_hooks(clean, fwd_hooks=[("blocks.0.hook_resid_pre", start)])[:, -1]
        (logits[:, RIGHT] - logits[:, WRONG]).sum().backward()

    there = Written.of(model, corrupted)
    forward()
    backward()
    one, both = median(forward), median(backward)
    edges = median(lambda: edge_effects(model, clean, Written.of(model, corrupted), metric))
    memory = peak_bytes(lambda: edge_effects(model, clean, there, metric))

    runs = EdgeRuns.of(model, clean, there)
    sets = []
    for _ in range(SETS):
        out = torch.rand(len(graph.senders), generator=draw) < 0.8
        out[0] = False
        sets.append(graph.possible & out[:, None])
    faithfulness = median(lambda: [metric(runs.final(each[None])[0], slice(None)) for each in sets])
    few = []
    for _ in range(SETS):
        kept = torch.rand(graph.possible.shape, generator=draw) < 0.02
        few.append(graph.possible & ~kept)
    of_edges = median(lambda: [metric(runs.final(each[None])[0], slice(None)) for each in few])

    def nodes(other: Tensor) -> None:
        found = Patching(model, clean, other, metric=LogitDiff(RIGHT, WRONG), progress=False)
        found.grid("z", over=("layer", "head"), into="clean")
        found.grid("mlp_out", over=("layer",), into="clean")

    n_nodes = len(graph.senders) - 1
    exact, everywhere = (seconds(partial(nodes, other)) for other in (swapped, corrupted))
    print_rows(
        f"{PROMPTS} prompts of {LENGTH} tokens; forward pass {one:.2f} s, with backward pass {both:.2f} s",
        [
            Row("effects of all edges / (2 forward, 1 backward)", edges / (one + both), "times", 4.0),
            Row("its memory at most", memory / 2**20, "MiB", 4 * edge_runs.BYTES / 2**20),
            Row(
                f"{SETS} sets of components / {SETS} forward passes",
                faithfulness / (SETS * one),
                "times",
                1.1,
            ),
            Row(f"{SETS} circuits of 2% of edges / {SETS} forward passes", of_edges / (SETS * one), "times"),
            Row("all heads and MLPs / one pass for each", exact / (n_nodes * one), "times", 1 / 3),
            Row("the same, all tokens different", everywhere / (n_nodes * one), "times"),
        ],
    )


if __name__ == "__main__":
    main()
