"""Exhaustive and greedy search for the tokens that most activate a basis dimension of `resid_post`.

    python benchmarks/features.py [--tokens 4 8] [--batches 2]

The model has GPT-2 small's shape and random weights, because speed does not depend on their values. The
searches are compared with the loop of Badger, "Language Model Features", which appends every token of the
vocabulary to the tokens found so far and runs the whole input, for one feature of one layer. Engine, batch
size, threads and inference mode are the same for both. For one token both run in full; for more, the loop is
extrapolated from some batches of each step. All figures come from one run on one machine; on another, only
the ratios are comparable. If there is a GPU, a one-token search also runs there and is compared with the
published time.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

# Silence the profiler's messages about starting, stopping and older allocations.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import Row, check_peak_bytes, peak_bytes, print_rows, random_gpt2_small, seconds
from torch import Tensor

import mechlens
from mechlens.models.protocol import Provenance, set_provenance
from mechlens.models.run.forward import watch
from mechlens.results import ExhaustiveSearch, GreedySearch

THREADS = 2
BATCH = 1000
"""That of the published loop."""
LAST, FEATURE = 11, 0
ONE = mechlens.Features(LAST, FEATURE)
EXHAUSTIVE_GOAL = 0.9
GREEDY_GOALS = {4: 0.45, 8: 0.3}
T4 = 2.0
"""Published time of the loop for one feature on a T4, about two seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[4, 8], help="lengths of greedy searches")
    parser.add_argument("--batches", type=int, default=2, help="batches to time in each step of the loop")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    check_peak_bytes()
    model = random_gpt2_small()
    # this cannot be inferred from random weights
    set_provenance(model, Provenance("random", None, "GPT2LMHeadModel", processing=False, tied=False))
    with torch.inference_mode():
        one_token(model)
        for n_tokens in options.tokens:
            greedy(model, n_tokens, options.batches)
        if torch.cuda.is_available():
            one_token_on_gpu(model)


def one_token(model: Any) -> None:
    d_vocab = model.cfg.d_vocab
    theirs: list[int] = []
    ours: list[ExhaustiveSearch] = []
    # warm up on the first batch
    batch_activations(model, [], 0)
    loop = seconds(lambda: theirs.append(loop_step(model, [])))
    whole = seconds(lambda: ours.append(mechlens.search_exhaustive(model, batch_size=BATCH)))
    one = seconds(lambda: mechlens.search_exhaustive(model, ONE, batch_size=BATCH))
    peaks = {
        "all": peak_bytes(lambda: mechlens.search_exhaustive(model, batch_size=BATCH)),
        "one": peak_bytes(lambda: mechlens.search_exhaustive(model, ONE, batch_size=BATCH)),
        "loop": peak_bytes(lambda: batch_activations(model, [], 0)),
    }
    layers, features = ours[0].ids.shape[:2]
    same = theirs[0] == int(ours[0].ids[LAST, FEATURE, 0])
    counted, needed = block_flop(model), block_flop(model, queries_and_keys=False)
    rows = [
        Row("arithmetic of the loop", d_vocab * counted / 1e12, "TFLOP"),
        Row("arithmetic without queries and keys", d_vocab * needed / 1e12, "TFLOP"),
        Row("  their ratio", needed / counted, ""),
        Row("the loop, one feature of the last layer", loop, "s"),
        Row("  its rate", d_vocab * counted / 1e9 / loop, "GFLOP/s"),
        Row(f"exhaustive search, {layers} x {features} features", whole, "s"),
        Row("  its rate", d_vocab * needed / 1e9 / whole, "GFLOP/s"),
        Row("exhaustive search / the loop", whole / loop, "", EXHAUSTIVE_GOAL),
        Row("exhaustive search of one feature / the loop", one / loop, ""),
        Row("another token found than by the loop", float(not same), "", 0),
        Row("peak memory, all features", peaks["all"] / 2**20, "MiB"),
        Row("peak memory, one feature", peaks["one"] / 2**20, "MiB"),
        Row("  their ratio", peaks["all"] / peaks["one"], "", 1.1),
        Row("peak memory of the loop's batch", peaks["loop"] / 2**20, "MiB"),
    ]
    print_rows(f"one token of {d_vocab}, {BATCH} in a batch, {THREADS} threads", rows)


def greedy(model: Any, n_tokens: int, batches: int) -> None:
    d_vocab = model.cfg.d_vocab
    found: list[GreedySearch] = []
    ours = seconds(
        lambda: found.append(mechlens.search_greedy(model, ONE, n_tokens=n_tokens, batch_size=BATCH))
    )
    ids = found[0].ids[0, 0].tolist()
    steps, worst = [], 0.0
    for step in range(n_tokens):
        some = [d_vocab * number // batches // BATCH * BATCH for number in range(batches)]
        before = ids[:step]
        taken = sum(seconds(partial(batch_activations, model, before, begin)) for begin in some)
        steps.append(taken * math.ceil(d_vocab / BATCH) / batches)
        # the search's activation must match the loop's for the same token
        begin = ids[step] // BATCH * BATCH
        row = batch_activations(model, ids[:step], begin)
        worst = max(worst, abs(float(row[ids[step] - begin] - found[0].activations[0, 0, step])))
    loop = sum(steps)
    counted = d_vocab * block_flop(model) * n_tokens * (n_tokens + 1) / 2
    needed = d_vocab * (block_flop(model, queries_and_keys=False) + block_flop(model) * (n_tokens - 1))
    rows = [
        Row("arithmetic of the loop", counted / 1e12, "TFLOP"),
        Row("arithmetic of one position per candidate", needed / 1e12, "TFLOP"),
        Row("  their ratio", needed / counted, ""),
        Row(f"the loop, from {batches} of {math.ceil(d_vocab / BATCH)} batches per step", loop, "s"),
        Row("  its rate", counted / 1e9 / loop, "GFLOP/s"),
        Row("greedy search", ours, "s"),
        Row("  its rate", needed / 1e9 / ours, "GFLOP/s"),
        Row("greedy search / the loop", ours / loop, "", GREEDY_GOALS.get(n_tokens)),
        Row("largest difference in an activation", worst, "", 1e-3),
    ]
    print_rows(f"{n_tokens} tokens of {d_vocab}, {BATCH} in a batch, {THREADS} threads", rows)


def one_token_on_gpu(model: Any) -> None:
    """Runs last, because it leaves the model on the GPU."""
    model.to("cuda")

    def timed(work: Callable[[], Any]) -> float:
        def done() -> None:
            work()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return seconds(done)

    def search(features: mechlens.Features | None = None) -> ExhaustiveSearch:
        return mechlens.search_exhaustive(model, features, batch_size=BATCH)

    # warm up
    search(mechlens.Features(0, FEATURE))
    theirs: list[int] = []
    ours: list[ExhaustiveSearch] = []
    batch_activations(model, [], 0)
    loop = timed(lambda: theirs.append(loop_step(model, [])))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = timed(lambda: ours.append(search()))
    peak = torch.cuda.max_memory_allocated() - before
    layers, features = ours[0].ids.shape[:2]
    rows = [
        Row("the loop, one feature of the last layer", loop, "s"),
        Row(f"exhaustive search, {layers} x {features} features", whole, "s"),
        Row("exhaustive search / the loop", whole / loop, ""),
        Row("exhaustive search / the published loop on a T4", whole / T4, ""),
        Row(
            "another token found than by the loop", float(theirs[0] != int(ours[0].ids[LAST, FEATURE, 0])), ""
        ),
        Row("peak memory, all features", peak / 2**20, "MiB"),
    ]
    print_rows(f"one token of {model.cfg.d_vocab}, {BATCH} in a batch, {torch.cuda.get_device_name()}", rows)


def block_flop(model: Any, *, queries_and_keys: bool = True) -> float:
    """Operations of the weight products for one position through all blocks."""
    cfg = model.cfg
    attention = cfg.d_model**2 * (4 if queries_and_keys else 1)
    return 2.0 * cfg.n_layers * (attention + 2 * cfg.d_model * cfg.d_mlp)


def batch_activations(model: Any, before: list[int], begin: int) -> Tensor:
    """One batch of the loop: activations `[row]` at the last token, from full forward passes."""
    batch = torch.arange(begin, min(begin + BATCH, model.cfg.d_vocab))[:, None]
    tokens = torch.cat([torch.tensor(before, dtype=torch.long).repeat(len(batch), 1), batch], dim=1)
    kept: list[Tensor] = []
    reader: Callable[[Tensor], None] = lambda output: kept.append(output[:, -1, FEATURE].clone())  # noqa: E731
    watch(model, tokens, {f"blocks.{LAST}.hook_resid_post": reader})
    return kept.pop()


def loop_step(model: Any, before: list[int]) -> int:
    """One step of the loop: the token with the largest activation."""
    activations: list[Tensor] = []
    for begin in range(0, model.cfg.d_vocab, BATCH):
        activations.append(batch_activations(model, before, begin))
    return int(torch.cat(activations).argmax())


if __name__ == "__main__":
    main()
