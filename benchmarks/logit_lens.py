"""The logit lens against the bare product with W_U, the usual loop and a dense implementation.

    python benchmarks/logit_lens.py [--pairs 5] [--no-xl]

All figures come from one run on one machine; only their ratios mean anything on another. The last table
runs 1024 tokens through a model of GPT-2 XL's shape, which takes some minutes and 10 GiB.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from typing import Any

# The profiler tells of its start and stop, and of blocks that are older than it.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import (
    Row,
    check_peak_bytes,
    peak_bytes,
    print_table,
    random_gpt2,
    random_gpt2_small,
    seconds,
)
from mechlens.measures.vocabulary import read_out

from mechlens import logit_lens
from mechlens.measures import vocabulary
from mechlens.models.runs import final_norm, watch

THREADS = 2
POSITIONS, XL_POSITIONS = 101, 1024
XL = {"n_layers": 48, "n_heads": 25, "d_model": 1600}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="interleaved runs of each")
    parser.add_argument("--no-xl", action="store_true", help="leave out the model of GPT-2 XL's shape")
    parser.add_argument("--only-xl", action="store_true", help="nothing else, in this process")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.only_xl:
        run_xl()
        return
    measure(options.pairs)
    if not options.no_xl:
        # in a process of its own, whose peak is that run's
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--only-xl"], check=True)


def measure(pairs: int) -> None:
    model = random_gpt2_small()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(50000, (1, POSITIONS), generator=draw)
    vectors = residuals(model, tokens)
    n_rows, _, d_model = vectors.shape
    targets = torch.stack([tokens[0], tokens[0].roll(-1)], dim=-1)
    with torch.inference_mode():
        W_U, b_U = model.W_U.clone(), model.b_U.clone()
        normed = final_norm(model, vectors)
        d_vocab = W_U.shape[1]
        width = max(1, vocabulary.CHUNK_BYTES // (4 * d_vocab * n_rows))

        def bare() -> None:
            for start in range(0, POSITIONS, width):
                torch.addmm(b_U, normed[:, start : start + width].flatten(0, 1), W_U)

        def ours(rows: torch.Tensor = vectors) -> Any:
            """All statistics of what `logit_lens` reads, its norm included."""
            return read_out(
                rows,
                W_U,
                b_U,
                targets=targets,
                references=(len(rows) - 1, 0),
                decode=lambda _, some: final_norm(model, some),
            )

        def loop() -> Any:
            """What tutorials do: softmax and its maximum, every layer's probabilities kept."""
            kept = [torch.softmax(final_norm(model, row[None])[0] @ W_U + b_U, dim=-1) for row in vectors]
            return torch.stack(kept).max(dim=-1)

        def dense() -> Any:
            """The same statistics from whole distributions."""
            logits = final_norm(model, vectors) @ W_U + b_U
            log_probs = logits.log_softmax(-1)
            order = logits.argsort(-1, descending=True)
            places = order.argsort(-1)
            final = torch.distributions.Categorical(logits=logits[-1])
            first = torch.distributions.Categorical(logits=logits[0])
            every = torch.distributions.Categorical(logits=logits)
            wanted = torch.cat([logits[-1].argmax(-1, keepdim=True), targets], 1).expand(n_rows, -1, -1)
            return (
                log_probs.topk(5),
                every.entropy(),
                torch.distributions.kl_divergence(final, every),
                torch.distributions.kl_divergence(first, every),
                log_probs.gather(2, wanted),
                places.gather(2, wanted),
            )

        check_peak_bytes()
        works = {"bare": bare, "ours": ours, "loop": loop}
        for work in works.values():
            work()
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(pairs):
            for name, work in works.items():
                times[name].append(seconds(work))
        once = seconds(dense)
        whole = seconds(lambda: logit_lens(model, tokens))
        medians = {name: statistics.median(values) for name, values in times.items()}
        product = 2 * n_rows * POSITIONS * d_model * d_vocab
        rows = [
            Row("arithmetic of the product", product / 1e9, "GFLOP"),
            Row("bare chunked product", medians["bare"], "s"),
            Row("  its rate", product / 1e9 / medians["bare"], "GFLOP/s"),
            Row("all statistics", medians["ours"], "s"),
            Row("all statistics / bare product", medians["ours"] / medians["bare"], "", 1.6),
            Row("all statistics / the usual loop", medians["ours"] / medians["loop"], "", 1.3),
            Row("all statistics / dense (once)", medians["ours"] / once, "", 1 / 3),
            Row("logit_lens() with the model's run, texts and checks", whole, "s"),
        ]
        print_table(f"logit lens, {n_rows} rows x {POSITIONS} positions, {THREADS} threads", rows)
        peaks = {name: peak_bytes(work) for name, work in works.items()}
        deep = torch.randn(4 * n_rows, POSITIONS, d_model)
        rows = [
            Row("all statistics, peak beyond the vectors", peaks["ours"] / 2**20, "MiB", 200),
            Row("  with four times the layers", peak_bytes(lambda: ours(deep)) / 2**20, "MiB", 200),
            Row("the usual loop, peak", peaks["loop"] / 2**20, "MiB"),
            Row("all statistics / the usual loop", peaks["ours"] / peaks["loop"], "", 0.1),
        ]
        print_table("peak memory, all blocks of PyTorch's allocator", rows)


def residuals(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`[row, pos, d_model]`: block 0's `resid_pre`, then `resid_post` of every layer."""
    kept: list[torch.Tensor] = []
    names = [
        "blocks.0.hook_resid_pre",
        *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)),
    ]
    watch(model, tokens, {name: lambda activation: kept.append(activation[0].clone()) for name in names})
    return torch.stack(kept)


def run_xl() -> None:
    model = random_gpt2(**XL)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    tokens = torch.randint(50000, (1, XL_POSITIONS), generator=torch.Generator().manual_seed(0))
    found: list[Any] = []
    taken = seconds(lambda: found.append(logit_lens(model, tokens)))
    n_rows = len(found[0].rows)
    assert found[0].entropy.isfinite().all()
    rows = [
        Row("product with W_U", 2 * n_rows * XL_POSITIONS * XL["d_model"] * 50257 / 1e12, "TFLOP"),
        Row("logit_lens()", taken, "s"),
        Row("peak memory of the process, the model made", gib, "GiB"),
        Row("  at the end", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB", 24),
    ]
    print_table(f"GPT-2 XL's shape, float32: {n_rows} rows x {XL_POSITIONS} positions", rows)


if __name__ == "__main__":
    main()
