"""Head scores compared with one bare forward pass and with TransformerLens's `detect_head`.

    python benchmarks/heads.py [--pairs 5] [--no-detect-head]

All figures come from one run on one machine; on another, only the ratios are comparable.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

# Silence the profiler's messages about starting, stopping and older allocations.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
from common import Row, check_peak_bytes, peak_bytes, print_rows, random_gpt2_small, seconds
from torch import Tensor

from mechlens import repeated_tokens, score_heads

# The part of score_heads that runs per seed, without nulls and other kinds of sequence.
from mechlens.analyses.heads.runs import score_masks
from mechlens.measures import attention
from mechlens.models.load.engines import quiet
from mechlens.models.protocol import engine_of
from mechlens.models.run.forward import watch

THREADS = 2
BATCH, SEQ_LEN = 30, 50
MAX_TIME_RATIO = 1.15
MAX_LAYERS_OF_PATTERNS = 2
ENDOFTEXT = 50256
DETECTED = {
    "induction_score": "induction_head",
    "previous_token_score": "previous_token_head",
    "duplicate_token_score": "duplicate_token_head",
}


def forward_flops(cfg: Any, batch: int, pos: int) -> float:
    """Additions and multiplications in the matrix products of a forward pass without the unembedding."""
    weights = 4 * cfg.d_model * cfg.n_heads * cfg.d_head + 2 * cfg.d_model * cfg.d_mlp
    scores_and_values = 2 * pos * cfg.n_heads * cfg.d_head
    return 2.0 * batch * pos * cfg.n_layers * (weights + scores_and_values)


def sequences(model: Any) -> tuple[Tensor, dict[str, attention.Mask]]:
    """BOS, 50 random tokens and the same 50 again, with the mask of every score."""
    random = repeated_tokens(model, seq_len=SEQ_LEN, batch=BATCH, prepend_bos=False)
    # The model has no tokenizer to define BOS.
    bos = torch.full((BATCH, 1), ENDOFTEXT)
    tokens, starts = torch.cat([bos, random.tokens], 1), random.starts + 1
    n_pos = tokens.shape[1]
    return tokens, {
        "induction_score": attention.copies_mask(starts, SEQ_LEN, 1),
        "duplicate_token_score": attention.copies_mask(starts, SEQ_LEN, 0),
        "previous_token_score": attention.previous_token_mask(n_pos),
        "first_token_score": attention.first_token_mask(n_pos),
    }


def bare_forward(model: Any, tokens: Tensor) -> Callable[[], None]:
    """All layers without the unembedding."""
    if engine_of(model) == "HookedTransformer":

        def run() -> None:
            with torch.inference_mode():
                model(tokens, return_type=None)

        return run
    # The bridge always computes logits, so its run is stopped at the last layer's output.
    return lambda: watch(
        model, tokens, {f"blocks.{model.cfg.n_layers - 1}.hook_resid_post": lambda residual: None}
    )


def against_forward(model: Any, tokens: Tensor, masks: dict[str, attention.Mask], pairs: int) -> None:
    bare = bare_forward(model, tokens)
    found: list[dict[str, Tensor]] = []

    def score() -> None:
        found[:] = [score_masks(model, tokens, masks)]

    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    for warm_up in (bare, score, lambda: a @ b):
        warm_up()
    bares, scores, products = [], [], []
    for _ in range(pairs):
        bares.append(seconds(bare))
        scores.append(seconds(score))
        products.append(min(seconds(lambda: a @ b) for _ in range(3)))
    ratios = [score / bare for score, bare in zip(scores, bares, strict=True)]
    flops = forward_flops(model.cfg, *tokens.shape)
    print_rows(
        f"time of {len(masks)} pattern scores of all heads, {pairs} pairs after a warm-up",
        [
            Row("arithmetic of a forward pass", flops / 1e9, "GFLOP"),
            Row("bare forward pass, median", statistics.median(bares), "s"),
            Row("  its rate", flops / statistics.median(bares) / 1e9, "GFLOP/s"),
            Row(f"  rate of a {size}^3 product", 2 * size**3 / statistics.median(products) / 1e9, "GFLOP/s"),
            Row("scores, median", statistics.median(scores), "s"),
            Row("scores / bare, lowest pair", min(ratios), ""),
            Row("scores / bare, highest pair", max(ratios), ""),
            Row("scores / bare, median of pairs", statistics.median(ratios), "", MAX_TIME_RATIO),
        ],
    )
    batch, n_pos = tokens.shape
    layer = 4 * batch * model.cfg.n_heads * n_pos**2
    check_peak_bytes()
    bare_peak, score_peak = peak_bytes(bare), peak_bytes(score)
    everything = model.cfg.n_layers * layer
    pattern = torch.rand(batch, model.cfg.n_heads, n_pos, n_pos)
    read = peak_bytes(lambda: [attention.mask_score(pattern, mask) for mask in masks.values()])
    print_rows(
        "peak memory, all blocks of PyTorch's allocator",
        [
            Row("patterns of one layer", layer / 2**20, "MiB"),
            Row("  of all layers", everything / 2**20, "MiB"),
            Row("bare forward pass, peak", bare_peak / 2**20, "MiB"),
            Row("scores, peak", score_peak / 2**20, "MiB"),
            Row("scores - bare", (score_peak - bare_peak) / 2**20, "MiB"),
            Row("  in layers' patterns", (score_peak - bare_peak) / layer, "", MAX_LAYERS_OF_PATTERNS),
            Row("reading one pattern, in layers' patterns", read / layer, "", MAX_LAYERS_OF_PATTERNS),
        ],
    )


def against_detect_head(model: Any, tokens: Tensor) -> None:
    """Time, and the largest difference of scores after rescaling.

    `detect_head` divides the attention on a mask by the total attention (1 per position), mechlens by the
    number of entries. `detect_head` takes only texts, so `to_tokens` is replaced.
    """
    from transformer_lens.head_detector import detect_head

    texts = [str(row) for row in range(len(tokens))]
    model.to_tokens = lambda text: tokens[[int(text)]] if isinstance(text, str) else tokens
    theirs: dict[str, Tensor] = {}

    def detect() -> None:
        for kind, name in DETECTED.items():
            theirs[kind] = detect_head(model, texts, name)

    with quiet(), torch.inference_mode():
        their_seconds = seconds(detect)
    del model.to_tokens
    result = score_heads(model, tokens, tuple(DETECTED))
    our_seconds = seconds(lambda: score_heads(model, tokens, tuple(DETECTED)))
    masks = {
        "induction_score": attention.induction_mask(tokens),
        "duplicate_token_score": attention.duplicate_token_mask(tokens),
        "previous_token_score": attention.previous_token_mask(tokens.shape[1]),
    }
    rows = [
        Row("detect_head, 3 kinds", their_seconds, "s"),
        Row("mechlens, 3 kinds", our_seconds, "s"),
        Row("detect_head / mechlens", their_seconds / our_seconds, "x"),
    ]
    for kind, mask in masks.items():
        entries = mask.dest.shape[1] if mask.real is None else mask.real.sum(1)[:, None, None]
        ours = (result.scores[kind][0] * entries / tokens.shape[1]).mean(0)
        worst = float((ours - theirs[kind].cpu()).abs().max())
        rows.append(Row(f"largest difference of {kind}", worst, ""))
    print_rows("against TransformerLens's detect_head on the same tokens", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs to compare")
    parser.add_argument("--no-detect-head", action="store_true", help="skip the slow comparison")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = random_gpt2_small()
    tokens, masks = sequences(model)
    print(
        f"head scores: a random model with GPT-2 small's shape on {engine_of(model)}, "
        f"{tokens.shape[0]} x {tokens.shape[1]} tokens, {THREADS} threads"
    )
    against_forward(model, tokens, masks, max(1, options.pairs))
    if not options.no_detect_head:
        against_detect_head(model, tokens)


if __name__ == "__main__":
    main()
