"""The logit lens compared with the bare product with W_U, the usual loop, and dense and peer implementations.

    python benchmarks/logit_lens.py [--pairs 5] [--no-xl]

All figures come from one run on one machine; on another, only the ratios are comparable. The peer is
TransformerLens's own lens, in version 4.3 and later. The last table runs 1024 tokens through a model with
GPT-2 XL's shape, which takes a few minutes and 10 GiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

# Silence the profiler's messages about starting, stopping and older allocations.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import Row, check_peak_bytes, peak_bytes, print_rows, random_gpt2, random_gpt2_small, seconds

from mechlens import logit_lens
from mechlens.measures.readout import read_out
from mechlens.measures.unembedding import Unembedding

THREADS = (1, 2)
POSITIONS, XL_POSITIONS = 101, 1024
XL = {"n_layers": 48, "n_heads": 25, "d_model": 1600}
TILES = tuple((rows, columns) for rows in (512, 1024, None) for columns in (512, 1024, 2048, 4096))
"""Tile shapes of the bare product; None is all rows."""
PEER = "transformer_lens.tools.analysis.logit_lens"


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    """The embedding and each layer."""
    d_model: int
    d_vocab: int

    @property
    def flop(self) -> int:
        return 2 * self.rows * POSITIONS * self.d_model * self.d_vocab


SMALL = Shape("GPT-2 small", 13, 768, 50257)
SHAPES = (SMALL, Shape("SmolLM2-135M", 31, 576, 49152), Shape("GPT-2 XL", 49, 1600, 50257))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="interleaved runs of each")
    parser.add_argument("--no-xl", action="store_true", help="skip the shape of GPT-2 XL")
    parser.add_argument("--only-xl", action="store_true", help="run only that, in this process")
    options = parser.parse_args()
    if options.only_xl:
        run_xl()
        return
    with torch.inference_mode():
        for shape in SHAPES[: 2 if options.no_xl else 3]:
            for threads in THREADS:
                torch.set_num_threads(threads)
                against_product(shape, options.pairs, threads)
        against_others(SMALL, options.pairs)
    if find_spec("transformer_lens.tools.analysis") is not None and find_spec(PEER) is not None:
        against_peer(options.pairs)
    if not options.no_xl:
        # in its own process, to measure that run's peak
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--only-xl"], check=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Random vectors of one shape, an unembedding and targets."""

    vectors: torch.Tensor
    unembedding: Unembedding
    targets: torch.Tensor

    @classmethod
    def of(cls, shape: Shape) -> Case:
        draw = torch.Generator().manual_seed(0)
        return cls(
            torch.randn(shape.rows, POSITIONS, shape.d_model, generator=draw),
            Unembedding(
                torch.randn(shape.d_model, shape.d_vocab, generator=draw) / shape.d_model**0.5,
                torch.randn(shape.d_vocab, generator=draw),
            ),
            torch.randint(shape.d_vocab, (POSITIONS, 2), generator=draw),
        )

    def ours(self, repeated: int = 1) -> Any:
        """All statistics of `logit_lens`, including the norm."""
        return read_out(
            self.vectors.repeat(repeated, 1, 1),
            self.unembedding,
            targets=self.targets,
            references=(len(self.vectors) - 1, 0),
            decode=lambda _, some: normed(some),
        )

    def product(self, rows: int | None, columns: int) -> None:
        """The bare product, one tile at a time."""
        flat, W_U = self.vectors.flatten(0, 1), self.unembedding.W_U
        rows = rows or len(flat)
        room = torch.empty(min(rows, len(flat)) * columns)
        for some in flat.split(rows):
            for part in W_U.split(columns, dim=1):
                shape = len(some), part.shape[1]
                torch.mm(some, part, out=room[: shape[0] * shape[1]].view(shape))

    def loop(self) -> Any:
        """As in tutorials: the maximum of the softmax, with every layer's probabilities kept."""
        W_U, b_U = self.unembedding.W_U, self.unembedding.b_U
        kept = [torch.softmax(normed(row) @ W_U + b_U, dim=-1) for row in self.vectors]
        return torch.stack(kept).max(dim=-1)

    def dense(self) -> Any:
        """The same statistics from full distributions."""
        logits = normed(self.vectors) @ self.unembedding.W_U + self.unembedding.b_U
        log_probs = logits.log_softmax(-1)
        places = logits.argsort(-1, descending=True).argsort(-1)
        every, final, first = (
            torch.distributions.Categorical(logits=some) for some in (logits, logits[-1], logits[0])
        )
        wanted = torch.cat([logits[-1].argmax(-1, keepdim=True), self.targets], 1).expand(len(logits), -1, -1)
        return (
            log_probs.topk(5),
            every.entropy(),
            torch.distributions.kl_divergence(final, every),
            torch.distributions.kl_divergence(first, every),
            log_probs.gather(2, wanted),
            places.gather(2, wanted),
        )


def normed(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(vectors, vectors.shape[-1:])


def medians(works: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, float]:
    """Seconds of each, interleaved, after a warmup."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(pairs):
        for name, work in works.items():
            times[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def against_product(shape: Shape, pairs: int, threads: int) -> None:
    case = Case.of(shape)
    case.product(*TILES[0])
    tried = {tile: seconds(partial(case.product, *tile)) for tile in TILES}
    best = min(tried, key=tried.__getitem__)
    taken = medians({"product": partial(case.product, *best), "ours": case.ours}, pairs)
    rows = [
        Row("arithmetic of the product", shape.flop / 1e9, "GFLOP"),
        Row(f"best-shaped product: {best[0] or 'all'} x {best[1]}", taken["product"], "s"),
        Row("  its rate", shape.flop / 1e9 / taken["product"], "GFLOP/s"),
        Row("  the worst shape / the best", max(tried.values()) / min(tried.values()), ""),
        Row("all statistics", taken["ours"], "s"),
        Row("all statistics / best-shaped product", taken["ours"] / taken["product"], "", 1.4),
    ]
    print_rows(f"{shape.name}'s shape: {shape.rows} rows x {POSITIONS} positions, {threads} thread(s)", rows)


def against_others(shape: Shape, pairs: int) -> None:
    case = Case.of(shape)
    taken = medians({"ours": case.ours, "loop": case.loop}, pairs)
    once = seconds(case.dense)
    rows = [
        Row("all statistics / the usual loop", taken["ours"] / taken["loop"], "", 1.3),
        Row("all statistics / dense (once)", taken["ours"] / once, "", 1 / 3),
    ]
    print_rows(f"{shape.name}'s shape, {THREADS[-1]} threads", rows)
    check_peak_bytes()
    ours, loop = peak_bytes(case.ours), peak_bytes(case.loop)
    vectors = case.vectors.numel() * 4
    rows = [
        Row("all statistics, peak beyond the vectors", (ours - vectors) / 2**20, "MiB", 200),
        Row(
            "  with four times the layers",
            (peak_bytes(lambda: case.ours(4)) - 4 * vectors) / 2**20,
            "MiB",
            200,
        ),
        Row("the usual loop, peak", loop / 2**20, "MiB"),
        Row("all statistics / the usual loop", (ours - vectors) / loop, "", 0.1),
    ]
    print_rows("peak memory, all blocks of PyTorch's allocator", rows)


def against_peer(pairs: int) -> None:
    """Both start from the model and tokens; the peer computes the five most likely tokens and the entropy."""
    from transformer_lens.tools.analysis.logit_lens import logit_lens as peers

    model = random_gpt2_small()
    tokens = torch.randint(50000, (1, POSITIONS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        taken = medians(
            {
                "ours": lambda: logit_lens(model, tokens),
                "ours, top five and entropy": lambda: logit_lens(model, tokens, statistics="entropy"),
                "theirs": lambda: peers(model, tokens, positions=None, top_k=5),
            },
            pairs,
        )
    theirs = taken.pop("theirs")
    rows = [Row("TransformerLens's logit_lens, top five and entropy", theirs, "s")]
    rows += [Row(f"{name} / theirs", value / theirs, "", 1.0) for name, value in taken.items()]
    print_rows(f"including the model, {POSITIONS} tokens, {THREADS[-1]} threads", rows)


def run_xl() -> None:
    torch.set_num_threads(THREADS[-1])
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
        Row("peak memory of the process, after creating the model", gib, "GiB"),
        Row("  at the end", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB", 24),
    ]
    print_rows(f"GPT-2 XL's shape, float32: {n_rows} rows x {XL_POSITIONS} positions", rows)


if __name__ == "__main__":
    main()
