"""Results with values known by hand, for what draws them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from mechlens.results import (
    AttentionPatterns,
    AttentionSpread,
    Facts,
    HeadScores,
    IndirectObject,
    InputProbe,
    LogitLensResult,
    ModelInfo,
    PatchGridResult,
    RepeatedTokenPerformance,
)
from mechlens.results.lens import STATISTICS


def model(name: str = "tiny", *, n_layers: int = 2, n_heads: int = 3) -> ModelInfo:
    return ModelInfo(
        name=name,
        revision=None,
        architecture="GPT2LMHeadModel",
        engine="HookedTransformer",
        engine_version="3.9.0",
        processing=True,
        dtype="float32",
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=8,
        d_vocab=64,
        n_ctx=32,
    )


def performance(name: str = "tiny", *, prepend_bos: bool = True) -> RepeatedTokenPerformance:
    """Two seeds of two sequences of (BOS and) 3 tokens twice; at pos i sequence s has -(i + 1) - s / 10."""
    n_pos = 6 + int(prepend_bos)
    sequence = torch.arange(4).reshape(2, 2, 1) / 10
    log_prob = -(torch.arange(n_pos) + 1.0) - sequence
    log_prob[..., -1] = math.nan
    return RepeatedTokenPerformance(
        model=model(name),
        tokens=torch.zeros(2, 2, n_pos, dtype=torch.long),
        log_prob=log_prob,
        correct=torch.zeros(2, 2, n_pos, dtype=torch.bool),
        estimates={
            "first_half_log_prob": (-9.5, -10.0, -9.0),
            "second_half_log_prob": (-0.25, -0.5, -0.125),
            "first_half_accuracy": (0.0, 0.0, 0.0),
            "second_half_accuracy": (0.75, 0.5, 1.0),
        },
        single_draws={
            "first_half_log_prob": (-12.0, -8.0),
            "second_half_log_prob": (-1.0, -0.0625),
            "first_half_accuracy": (0.0, 0.0),
            "second_half_accuracy": (0.5, 1.0),
        },
        seq_len=3,
        seeds=(0, 1),
        prepend_bos=prepend_bos,
        confidence=0.95,
    )


INDUCTION = torch.tensor([[0.125, 0.25, 0.5], [0.0, math.nan, 0.875]])
COPYING = torch.tensor([[-0.5, 0.0, 0.25], [1.0, -1.0, 0.75]])


def head_scores(name: str = "tiny") -> HeadScores:
    """Two layers of three heads, two equal sequences; the copying score has no null."""
    means = {"induction_score": INDUCTION, "copying_score": COPYING}
    return HeadScores(
        model=model(name),
        scores={kind: mean.expand(1, 2, 2, 3).clone() for kind, mean in means.items()},
        nulls={"induction_score": torch.full((1, 2, 2, 3), 0.0625)},
        intervals={kind: torch.stack([mean - 0.125, mean + 0.0625]) for kind, mean in means.items()},
        tokens={"repeated": torch.zeros(1, 2, 7, dtype=torch.long)},
        seq_len=3,
        jitter=0,
        seeds=(0,),
        prepend_bos=True,
        confidence=0.95,
    )


def attention(name: str = "tiny", *, tokens: tuple[str, ...] = ("<bos>", " a", "\n")) -> AttentionPatterns:
    """Two heads: L0H2 attends evenly to all that it sees, L1H0 only to itself."""
    n_pos = len(tokens)
    even = torch.ones(n_pos, n_pos).tril()
    return AttentionPatterns(
        model=model(name),
        tokens=torch.arange(n_pos),
        token_strings=tokens,
        heads=((0, 2), (1, 0)),
        patterns=torch.stack([even / even.sum(-1, keepdim=True), torch.eye(n_pos)]),
    )


def input_probe(name: str = "tiny") -> InputProbe:
    """Rows embed and 0, in the embedding's 2 coordinates and 1 principal component.

    Accuracy is 1 and 0.5 by maps per layer, 0 and 0.75 by the shared one; similarities fall by 0.5 from 1.
    """
    accuracy = torch.tensor([[1.0, 0.5], [0.0, 0.75]])
    similarity = torch.tensor([1.0, 0.5, 0.0])
    null = torch.tensor([0.0, -0.25, 0.125]).expand(3, 3)
    element = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]])

    def both(values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": values, "pca": values / 2}

    return InputProbe(
        model=model(name),
        rows=("embed", "0"),
        maps=("per_layer", "shared"),
        accuracy=both(accuracy),
        accuracy_interval=both(torch.stack([accuracy - 0.125, accuracy + 0.125], -1)),
        chance=0.0625,
        r2=both(accuracy - 0.25),
        element_r2={"embedding": accuracy[..., None] - element[:2], "pca": accuracy[..., None]},
        fits=("embed", "0", "shared"),
        weights={"embedding": torch.ones(3, 2, 2), "pca": torch.ones(3, 2, 1)},
        biases={"embedding": torch.zeros(3, 2), "pca": torch.zeros(3, 1)},
        similarity=both(similarity),
        similarity_null=both(null),
        unembedding_similarity=both(-similarity),
        unembedding_similarity_null=both(null),
        directions={"embedding": torch.eye(2), "pca": torch.tensor([[0.6, 0.8]])},
        importance={"embedding": torch.tensor([0.625, 0.375]), "pca": torch.tensor([0.875])},
        explained={"embedding": 1.0, "pca": 0.875},
        weight={"embedding": element, "pca": torch.ones(3, 1)},
        weight_correlation={"embedding": similarity - 0.5, "pca": torch.full((3,), math.nan)},
        weight_correlation_null={"embedding": null, "pca": torch.full((3, 3), math.nan)},
        nmf_converged=None,
        train_tokens=100,
        held_out_tokens=8,
        length=4,
        ridge=1e-6,
        null_draws=3,
        seed=7,
        prepend_bos=False,
    )


def lens(name: str = "tiny") -> LogitLensResult:
    """Rows embed and 0, tokens `<s>`, ` a`, `b`; the last row guesses ` a` (right), `<b>`, ` a`."""
    values = torch.tensor([[[8.0, 4.0, 2.0]], [[0.0, 0.5, 0.25]]])
    nothing_follows = torch.tensor([0.0, 0.0, math.nan])
    ranks = {
        "final": torch.tensor([[[100.0, 10.0, 1.0]], [[1.0, 1.0, 1.0]]]),
        "input": values + 1,
        "next": torch.tensor([[[20.0]], [[2.0]]]) + nothing_follows,
        " a": torch.tensor([[[7.0]], [[2.0]]]).expand(2, 1, 3),
    }
    return LogitLensResult(
        model=model(name),
        tokens=torch.tensor([[0, 1, 2]]),
        mask=torch.ones(1, 3, dtype=torch.bool),
        positions=(0, 1, 2),
        context_length=torch.tensor([[1, 2, 3]]),
        rows=("embed", "0"),
        read="resid_post",
        decoder="final_norm",
        statistics=STATISTICS,
        top_ids=torch.tensor([[[[2, 1], [2, 1], [2, 1]]], [[[1, 2], [3, 1], [1, 2]]]]),
        top_probabilities=torch.tensor([[[[0.5, 0.25]] * 3], [[[0.75, 0.125]] * 3]]),
        entropy=values,
        kl_final=values,
        kl_input=torch.full_like(values, math.nan),
        final_ids=torch.tensor([[1, 3, 1]]),
        # a quarter in the row embed, certainty in the other
        log_prob={key: (torch.tensor([[[0.25]], [[1.0]]]).log() + 0 * rank) for key, rank in ranks.items()},
        rank=ranks,
        target_ids={" a": torch.ones(1, 3, dtype=torch.long)},
        strings={"0": "<s>", "1": " a", "2": "b", "3": "<b>x</b> yes"},
        prepend_bos=True,
    )


def deep_lens(n_layers: int = 30, *, tokens: Sequence[str] = ("<s>", " a", "b")) -> LogitLensResult:
    """A lens of many layers: the KL of row r is n_layers - r, the final guess ` a` is first in the last five
    layers, and target ` a` has rank 2 ** (n_layers - r)."""
    n_rows, n_pos = n_layers + 1, len(tokens)
    left = (n_layers - torch.arange(float(n_rows)))[:, None, None].expand(n_rows, 1, n_pos)
    strings = {"0": " a", "1": "guess", **{str(2 + at): token for at, token in enumerate(tokens)}}
    top = torch.stack([(left >= 5).long(), (left < 5).long()], -1)
    ranks = dict.fromkeys(("final", "input", "next", " a"), 2**left)
    return dataclasses.replace(
        lens(),
        model=model(n_layers=n_layers, n_heads=9),
        tokens=torch.arange(2, 2 + n_pos)[None],
        mask=torch.ones(1, n_pos, dtype=torch.bool),
        positions=tuple(range(n_pos)),
        context_length=torch.arange(1, 1 + n_pos)[None],
        rows=("embed", *map(str, range(n_layers))),
        top_ids=top,
        top_probabilities=torch.tensor([0.5, 0.25]).expand(n_rows, 1, n_pos, 2).clone(),
        entropy=left,
        kl_final=left,
        kl_input=torch.full_like(left, math.nan),
        final_ids=torch.zeros(1, n_pos, dtype=torch.long),
        log_prob={name: -rank.log() for name, rank in ranks.items()},
        rank=ranks,
        target_ids={" a": torch.zeros(1, n_pos, dtype=torch.long)},
        strings=strings,
    )


def sublayer_lens(read: str, more: float) -> LogitLensResult:
    """Rows embed, 0 and 1, tokens ` a` and `b`; the KL of row r is r + `more`, the rank 10 times 1 + that.

    The guess is ` a` where `more` is 0, `b` elsewhere.
    """
    values = (torch.arange(3.0) + more)[:, None, None].expand(3, 1, 2)
    top = torch.full((3, 1, 2, 1), 1 if more == 0 else 2)
    ranks = dict.fromkeys(("final", "input", "next"), 10 * (1 + values))
    return LogitLensResult(
        model=model(),
        tokens=torch.tensor([[1, 2]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        positions=(0, 1),
        context_length=torch.tensor([[1, 2]]),
        rows=("embed", "0", "1"),
        read=read,
        decoder="final_norm",
        statistics=STATISTICS,
        top_ids=top,
        top_probabilities=torch.full((3, 1, 2, 1), 0.5),
        entropy=values,
        kl_final=values,
        kl_input=values,
        final_ids=torch.tensor([[2, 2]]),
        log_prob={name: -rank for name, rank in ranks.items()},
        rank=ranks,
        target_ids={},
        strings={"1": " a", "2": "b"},
        prepend_bos=False,
    )


PATCHED = torch.tensor([[2.0, 1.5, 1.0], [0.5, 1.0, 1.25]])


def facts(n_layers: int = 2) -> Facts:
    """Two facts of one kind: one is known after the last layer, of the other a wrong answer is the guess."""
    rank = torch.full((2, n_layers + 1), 50.0)
    rank[0, -1], rank[1, -2:] = 1.0, 7.0
    return Facts(
        model=model(n_layers=n_layers),
        relations=("capital",) * 2,
        prompts=("The capital of A is", "The capital of B is"),
        answers=(" Alpha", " Beta"),
        others=(" Beta", " Alpha"),
        guesses=(" Alpha", " Alpha"),
        rank=rank,
        log_prob=-rank.log() - 0.5,
        other_rank=rank.flip(0),
        other_log_prob=-rank.flip(0).log() - 0.5,
        prepend_bos=True,
    )


def indirect_object(of: ModelInfo | None = None) -> IndirectObject:
    """Two prompts of five tokens; position 2 holds the second subject, 4 is the last."""
    return IndirectObject(
        model=of or model(),
        templates=("{a}{b}{s}",),
        template=torch.zeros(2, dtype=torch.long),
        tokens=torch.tensor([[1, 5, 2, 5, 3]]).repeat(2, 1),
        corrupted=torch.tensor([[1, 5, 2, 1, 3]]).repeat(2, 1),
        subjects=("a", "b"),
        objects=("b", "a"),
        roles={"IO": torch.tensor([1, 1]), "S2": torch.tensor([2, 2]), "END": torch.tensor([4, 4])},
        logit_diff=torch.tensor([2.0, -1.0]),
        null=torch.tensor([0.5, -0.5]),
        rank=torch.tensor([1.0, 3.0]),
        seed=0,
    )


def patch_grid(
    name: str = "tiny", *, axes: tuple[str, ...] = ("layer", "pos"), n_prompts: int = 1
) -> PatchGridResult:
    """Two layers; clean loss 1, so that effects are 1, 0.5, 0 | -0.5, 0, 0.25; prompt p has p / 4 more.

    By `layer` alone they are the first column, by `layer`, `head`, `pos` head h has h more.
    """
    grid = {
        ("layer",): PATCHED[:, 0],
        ("layer", "head", "pos"): PATCHED[:, None] + torch.arange(2.0)[:, None],
    }.get(axes, PATCHED)
    more = torch.arange(n_prompts) / 4
    n_heads = 0 if "head" not in axes else 3 if axes == ("layer", "head") else 2
    return PatchGridResult(
        model=model(name),
        tokens=torch.arange(4).expand(n_prompts, 4).clone(),
        site="mlp_out" if "head" not in axes else "z",
        source="2 positions earlier",
        given={},
        weight=1.0,
        into="clean",
        axes=axes,
        layers=(0, 1),
        heads=tuple((layer, head) for layer in (0, 1) for head in range(n_heads)),
        positions=(1, 2, 3) if "pos" in axes else (),
        metric="loss",
        about="",
        unit="nats",
        at=(1, 2),
        values=grid + more.view(-1, *[1] * grid.ndim),
        clean=torch.ones(n_prompts),
        corrupted=torch.full((n_prompts,), math.nan),
        strings=("<s>", " a", "\n", "<b>$x$"),
        seed=None,
        prepend_bos=True,
        note="",
    )


def attention_spread(n_layers: int = 2, n_heads: int = 3) -> AttentionSpread:
    values = torch.arange(3.0 * n_layers * n_heads).view(n_layers, n_heads, 3) / (3 * n_layers * n_heads)
    return AttentionSpread(
        model(n_layers=n_layers, n_heads=n_heads),
        tokens=torch.tensor([[0, 3, 1]]),
        values=values,
        prepend_bos=True,
    )
