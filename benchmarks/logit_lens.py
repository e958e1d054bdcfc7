"""The logit lens's readout against the bare product with W_U, the usual loop and a dense implementation.

    python benchmarks/logit_lens.py [--pairs 3]

All figures come from one run on one machine; only their ratios mean anything on another.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

# The profiler tells of its start and stop, and of blocks that are older than it.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import Row, check_peak_bytes, peak_bytes, print_table, seconds

from mechlens.measures import vocabulary
from mechlens.measures.vocabulary import read_out

THREADS = 2
ROWS, POSITIONS, D_MODEL, D_VOCAB = 13, 101, 768, 50257
"""embed + 12 layers of GPT-2 small, 101 tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="interleaved runs of each")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    vectors = torch.randn(ROWS, POSITIONS, D_MODEL)
    W_U, b_U = torch.randn(D_MODEL, D_VOCAB) * 0.05, torch.zeros(D_VOCAB)
    targets = torch.randint(D_VOCAB, (POSITIONS, 2))
    width = max(1, vocabulary.CHUNK_BYTES // (4 * D_VOCAB * ROWS))

    def bare() -> None:
        for start in range(0, POSITIONS, width):
            torch.addmm(b_U, vectors[:, start : start + width].flatten(0, 1), W_U)

    def ours(rows: torch.Tensor = vectors) -> Any:
        return read_out(rows, W_U, b_U, targets=targets, references=(len(rows) - 1, 0))

    def loop() -> Any:
        """What tutorials do: softmax and its maximum, every layer's probabilities kept."""
        kept = [torch.softmax(row @ W_U + b_U, dim=-1) for row in vectors]
        return torch.stack(kept).max(dim=-1)

    def dense() -> Any:
        """The same statistics from whole distributions."""
        logits = vectors @ W_U + b_U
        log_probs = logits.log_softmax(-1)
        order = logits.argsort(-1, descending=True)
        places = order.argsort(-1)
        final = torch.distributions.Categorical(logits=logits[-1])
        first = torch.distributions.Categorical(logits=logits[0])
        every = torch.distributions.Categorical(logits=logits)
        wanted = torch.cat([logits[-1].argmax(-1, keepdim=True), targets], 1).expand(ROWS, -1, -1)
        return (
            log_probs.topk(5),
            every.entropy(),
            torch.distributions.kl_divergence(final, every),
            torch.distributions.kl_divergence(first, every),
            log_probs.gather(2, wanted),
            places.gather(2, wanted),
        )

    with torch.inference_mode():
        check_peak_bytes()
        works = {"bare": bare, "ours": ours, "loop": loop}
        for work in works.values():
            work()
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(options.pairs):
            for name, work in works.items():
                times[name].append(seconds(work))
        once = seconds(dense)
        medians = {name: statistics.median(values) for name, values in times.items()}
        product = 2 * ROWS * POSITIONS * D_MODEL * D_VOCAB
        rows = [
            Row("arithmetic of the product", product / 1e9, "GFLOP"),
            Row("bare chunked product", medians["bare"], "s"),
            Row("  its rate", product / 1e9 / medians["bare"], "GFLOP/s"),
            Row("all statistics", medians["ours"], "s"),
            Row("all statistics / bare product", medians["ours"] / medians["bare"], "", 1.6),
            Row("all statistics / the usual loop", medians["ours"] / medians["loop"], "", 1.3),
            Row("all statistics / dense (once)", medians["ours"] / once, "", 1 / 3),
        ]
        print_table(f"logit lens readout, {ROWS} rows x {POSITIONS} positions, {THREADS} threads", rows)
        peaks = {name: peak_bytes(work) for name, work in works.items()}
        deep = torch.randn(4 * ROWS, POSITIONS, D_MODEL)
        rows = [
            Row("all statistics, peak beyond the vectors", peaks["ours"] / 2**20, "MiB", 200),
            Row("  with four times the rows", peak_bytes(lambda: ours(deep)) / 2**20, "MiB", 200),
            Row("the usual loop, peak", peaks["loop"] / 2**20, "MiB"),
            Row("all statistics / the usual loop", peaks["ours"] / peaks["loop"], "", 0.1),
        ]
        print_table("peak memory, all blocks of PyTorch's allocator", rows)


if __name__ == "__main__":
    main()
