"""How long a user waits for each analysis of smollm2-135m, a real language model with 30 layers.

    python benchmarks/real_model.py [--only heads lens ...]

Every figure is a single run on all cores, after loading. The table also shows the arithmetic and its rate, as
a share of the rate of one large product at the same time. Seconds depend on the machine and its load, the
share much less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Row, print_rows, seconds

import mechlens

NAME = "smollm2-135m"
BLOCK = 2 * 3.54e6
"""Floating-point operations of one block on one token: twice its 3.54 million weights."""
LOGITS = 2 * 576 * 49152
SENTENCE = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
FACT = "The Eiffel Tower is in the city of"


def rate() -> float:
    """Operations per second of a product with this model's shapes."""
    tokens, weights = torch.randn(3072, 576), torch.randn(576, 1536)
    tokens @ weights
    best = min(seconds(lambda: tokens @ weights) for _ in range(10))
    return 2 * 3072 * 576 * 1536 / best


def heads(model: Any) -> tuple[float, float, float]:
    """90 sequences: two copies, prefix matching and unrelated tokens with 101 positions, a sample of 26."""
    positions = 90 * (3 * 101 + 26)
    return (
        seconds(lambda: mechlens.reproduce(model, "heads", progress=False)),
        90,
        positions * 30 * BLOCK + 90 * 101 * LOGITS,
    )


def lens(model: Any) -> tuple[float, float, float]:
    tokens = len(mechlens.text_tokens(model, FACT)[0])
    return seconds(lambda: mechlens.logit_lens(model, FACT)), 2, tokens * (30 * BLOCK + 31 * LOGITS)


def circuits(model: Any) -> tuple[float, float, float]:
    """Scores of 8 sequences, and 24 pairs, each with a run from its heads' layers on."""
    work = partial(mechlens.find_induction_circuits, model, progress=False)
    return seconds(work), 120, 8 * 101 * (4 * 30 + 24 * 12) * BLOCK


def patch(model: Any, site: str, *over: str) -> float:
    metric = mechlens.LogitDiff(" Mary", " John")
    experiment = mechlens.Patching(model, SENTENCE, OTHER, metric=metric, progress=False)
    return seconds(lambda: experiment.grid(site, over=over))


def patch_heads(model: Any) -> tuple[float, float, float]:
    """A run for each of 270 heads, from its layer on: half of all blocks on average."""
    return patch(model, "z", "layer", "head"), 10, 270 * 15 * 15 * BLOCK


def patch_positions(model: Any) -> tuple[float, float, float]:
    """A run for each of 30 layers and 15 positions, from its layer and its position on."""
    return patch(model, "resid_pre", "layer", "pos"), 10, 450 * 15.5 * 8 * BLOCK


def composition(model: Any) -> tuple[float, float, float]:
    """Norms of products of thin matrices: 64 x 64 for each of 35,235 pairs, and the baselines."""
    work = partial(mechlens.composition_scores, model, "k", relative_position=49)
    return seconds(work), 10, 35235 * 2 * 576 * 64 * 64 * 2


def features(model: Any) -> tuple[float, float, float]:
    """Every token of the vocabulary through all blocks but the last, without queries and keys."""
    raw = mechlens.load_model(NAME, processing=False)
    work = partial(
        mechlens.search_exhaustive,
        raw,
        mechlens.Features(range(0, 29, 4), range(32)),
        top_k=5,
        progress=False,
    )
    return seconds(work), 300, 49152 * 29 * BLOCK * 0.84


TASKS: dict[str, tuple[str, Callable[[Any], tuple[float, float, float]]]] = {
    "lens": ("lens of a sentence", lens),
    "patch-heads": ("patch each head, 15 tokens", patch_heads),
    "patch-positions": ("patch layer x position, 15 tokens", patch_positions),
    "composition": ("K-composition of all heads", composition),
    "circuits": ("induction circuits", circuits),
    "heads": ("reproduce heads, 90 sequences", heads),
    "features": ("features exhaustive, 8 layers x 32", features),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS))
    options = parser.parse_args()
    print(f"{NAME}, {torch.get_num_threads()} threads")
    rows = []
    try:
        load = seconds(lambda: mechlens.load_model(NAME))
        rows.append(Row("load, cached or not", load, "s"))
        model = mechlens.load_model(NAME)
    except mechlens.errors.ModelLoadError as error:
        print(error)
        return
    mechlens.logit_lens(model, FACT)
    for name in options.only:
        what, work = TASKS[name]
        taken, most, operations = work(model)
        rows.append(Row(what, taken, "s", most))
        rows.append(Row("  arithmetic", operations / 1e12, "TFLOP"))
        rows.append(Row("  share of the rate of one large product", operations / taken / rate(), ""))
    print_rows("single runs after loading", rows)


if __name__ == "__main__":
    main()
