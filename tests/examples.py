"""One result of every type, with known values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from mechlens.results import (
    AttentionPatterns,
    AttentionSpread,
    AttributionPatchResult,
    Circuit,
    CircuitCurve,
    CircuitSummary,
    ComponentSet,
    CompositionScores,
    CopyScores,
    EdgeEffects,
    ExhaustiveSearch,
    Facts,
    FeatureAlignment,
    FeatureExamples,
    GradientSearch,
    GreedySearch,
    HeadScores,
    IndirectObject,
    InductionCircuits,
    InputProbe,
    LogitAttribution,
    LogitLensResult,
    LogitVariance,
    ModelInfo,
    NeuronAttribution,
    PatchGridResult,
    Plan,
    PositionalAttention,
    RepeatedTokenPerformance,
    RoleGrid,
    SuccessorScores,
    TaskCircuit,
    TaskHeads,
    TaskPerformance,
    TunedLens,
    VectorLens,
)
from mechlens.results.induction_circuits import COUNTED, EVIDENCE
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
    """Two seeds of two sequences: (BOS and) 3 tokens, repeated. Sequence s has -(i + 1) - s / 10 at pos i.

    The top guess is right from the first token of the second copy on.
    """
    n_pos = 6 + int(prepend_bos)
    sequence = torch.arange(4).reshape(2, 2, 1) / 10
    log_prob = -(torch.arange(n_pos) + 1.0) - sequence
    log_prob[..., -1] = math.nan
    return RepeatedTokenPerformance(
        model=model(name),
        tokens=torch.tensor([0, 5, 6, 7, 5, 6, 7][-n_pos:]).expand(2, 2, n_pos).clone(),
        log_prob=log_prob,
        correct=(torch.arange(n_pos) >= n_pos - 3)
        .logical_and(torch.arange(n_pos) < n_pos - 1)
        .expand(2, 2, -1)
        .clone(),
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
    """Two layers with three heads, two equal sequences; the copying score has no null."""
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
    """Two heads: L0H2 attends uniformly, L1H0 only to the current position."""
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
    """Rows embed and 0, with 2 coordinates and 1 principal component of the embedding.

    Accuracy is 1 and 0.5 with a map per layer, 0 and 0.75 with a shared one; similarities fall from 1 by 0.5.
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
    """Rows embed and 0, tokens `<s>`, ` a`, `b`; the last row predicts ` a` (right), `<b>`, ` a`."""
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
    """A lens with many layers: row r has KL n_layers - r, the final guess ` a` is first in the last five
    layers, and the target ` a` has rank 2 ** (n_layers - r)."""
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
    """Rows embed, 0 and 1, tokens ` a` and `b`. Row r has KL r + `more` and rank 10 * (1 + KL).

    The guess is ` a` if `more` is 0, else `b`.
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
    """Two facts of one kind: one is predicted after the last layer, the other gets a wrong answer."""
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
    """Two prompts of five tokens; position 2 is the second subject, position 4 the last."""
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
    """Two layers. The clean loss is 1, so effects are 1, 0.5, 0 | -0.5, 0, 0.25; prompt p has p / 4 more.

    By `layer` only, they are the first column; by `layer`, `head` and `pos`, head h has h more.
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


CONTRIBUTIONS = {
    "embed": 0.25,
    "pos_embed": -0.125,
    "L0H0": 1.0,
    "L0H1": -2.0,
    "L0H2": 0.001,
    "L0 bias": 0.5,
    "L0 MLP": 4.0,
    "L1H0": 0.0,
    "L1H1": 3.0,
    "L1H2": -0.75,
    "L1 bias": 0.0,
    "L1 MLP": -1.5,
    "final bias": 0.0625,
}


def attribution(values=None) -> LogitAttribution:
    """Two sequences `<s>`, ` a`; the second is tenfold, and its last position has `<b>` against ` a`."""
    values = CONTRIBUTIONS if values is None else values
    column = torch.tensor(list(values.values()))
    contributions = torch.stack([column, 2 * column], -1)[:, None] * torch.tensor([1.0, 10.0])[:, None]
    return LogitAttribution(
        model=model(n_layers=2, n_heads=3),
        tokens=torch.tensor([[0, 1], [0, 1]]),
        positions=(0, 1),
        components=tuple(values),
        contributions=contributions,
        logit=contributions.sum(0),
        target_ids=torch.full((2, 2), 3),
        against_ids=torch.full((2, 2), 1),
        strings={"0": "<s>", "1": " a", "3": "<b>"},
        prepend_bos=True,
    )


def neuron_attribution() -> LogitAttribution:
    """The largest two of six neurons, `L0N2` and `L1N0`, in either order."""
    layers, indices = torch.tensor([[[0, 1], [1, 0]]] * 2), torch.tensor([[[2, 0], [0, 2]]] * 2)
    contributions = torch.tensor([[[3.0, -1.0], [-6.0, 2.0]]]) * torch.tensor([1.0, 10.0])[:, None, None]
    neurons = NeuronAttribution(
        layers=layers,
        indices=indices,
        contributions=contributions,
        activations=contributions / 2,
        biases=torch.tensor([0.5, 0.25])[:, None, None].expand(2, 2, 2).contiguous(),
        n_neurons=6,
        listed=torch.tensor([[0, 2], [1, 0]]),
        promoted=torch.tensor([[3, 1], [0, 3]]),
        suppressed=torch.tensor([[0, 1], [1, 0]]),
    )
    return dataclasses.replace(attribution(), neurons=neurons)


def variance() -> LogitVariance:
    """Rows embed, 0 and 1, bins 1 and 2-64, one sequence of two positions that differ by 2."""
    by_row = torch.tensor([[0.0, 1.0], [4.0, 2.0], [6.0, 3.0]])[:, :, None, None] + torch.tensor([0.0, 2.0])
    by_bin = torch.tensor([3.0, 6.0])[:, None, None] + torch.tensor([0.0, 2.0])
    return LogitVariance(
        model=model(),
        tokens=torch.tensor([[0, 1]]),
        positions=(0, 1),
        rows=("embed", "0", "1"),
        bins=((1, 1), (2, 64)),
        probability=torch.tensor([0.25, 0.75])[:, None, None].expand(-1, 1, 2),
        variance=by_bin,
        null_variance=torch.tensor([[4.0, 5.0], [6.0, 5.0]]),
        elsewhere_variance=by_bin * 2,
        mean_logit=by_row,
        spread=by_row + 1,
        excess=by_row + 2,
        seed=0,
        prepend_bos=True,
    )


def composition(n_layers: int = 3, n_heads: int = 2) -> CompositionScores:
    """From LiHj to LkHl the score is 0.01 i + 0.02 j + 0.1 k + 0.2 l; the baseline is 0.25, spread 0.1."""
    i, j, k, later = torch.meshgrid(*[torch.arange(n) for n in (n_layers, n_heads) * 2], indexing="ij")
    scores = (0.01 * i + 0.02 * j + 0.1 * k + 0.2 * later).masked_fill(i >= k, math.nan)
    return CompositionScores(
        model=model(n_layers=n_layers, n_heads=n_heads),
        kind="k",
        scores=scores,
        baseline_mean=0.25,
        baseline_std=0.1,
        baseline_draws=16,
        seed=0,
        rotary="none",
        relative_position=None,
    )


def circuit(**changes) -> Circuit:
    """Eigenvalues 2, -1 and zeros; 3 tokens."""
    plain = Circuit(
        model=model(),
        A=torch.tensor([[2.0, 0.0], [0.0, -1.0], [0.0, 0.0]]),
        B=torch.eye(2, 3),
        axes=("query", "key"),
        spaces=("tokens", "tokens"),
        name="K-composition of L0H1 with L1H2",
        heads=((0, 1), (1, 2)),
        embedding="W_E",
        rotary="none",
        relative_position=None,
        normalized_positions=False,
    )
    return dataclasses.replace(plain, **changes)


def circuit_summary(**changes) -> CircuitSummary:
    """The same circuit with its largest entry, and a part with two tokens."""
    return CircuitSummary(
        **vars(circuit(**changes)),
        ks=(1, 2),
        accuracy=torch.tensor([[0.25, 0.5], [0.75, 1.0]]),
        pairs=torch.tensor([[1, 2]]),
        values=torch.tensor([1.5]),
        shown=(1, 2),
        strings={"1": " <b>$x$", "2": "\n"},
    )


def positional() -> PositionalAttention:
    """Two positions."""
    return PositionalAttention(
        model=model(),
        head=(0, 1),
        pattern=torch.tensor([[1.0, 0.0], [0.25, 0.75]]),
        scale=0.5,
        normalized_positions=True,
    )


def attribution_patch() -> AttributionPatchResult:
    """One prompt, two heads of one layer, no exact grid."""
    return AttributionPatchResult(
        model=model(),
        tokens=torch.tensor([[0, 5, 6]]),
        site="z",
        source="zero",
        given={"target": torch.tensor([[6, 7]])},
        weight=1.0,
        into="clean",
        axes=("layer", "head"),
        layers=(0,),
        heads=((0, 0), (0, 1)),
        positions=(),
        metric="loss",
        unit="nats",
        about="",
        at=(0, 1),
        estimate=torch.tensor([[[0.5, -0.25]]]),
        clean=torch.tensor([1.0]),
        corrupted=torch.tensor([math.nan]),
        correlation=None,
        strings=("<s>", " a", "b"),
        seed=None,
        prepend_bos=True,
    )


def induction_circuits() -> InductionCircuits:
    """One pair with an undefined rank."""
    return InductionCircuits(
        model=model(),
        pairs=((0, 1, 2, 3),),
        **{each.name: torch.tensor([0.9]) for each in EVIDENCE}
        | {"k_rank": torch.tensor([math.nan]), "n_earlier": torch.tensor([4.0])},
        verdicts=("in part",),
        reasons=("attends as a circuit does",),
        clean_loss=0.5,
        chance=0.01,
        n_tokens=4,
        intervals={name: torch.tensor([[0.25], [0.75]]) for name in COUNTED},
        confidence=0.95,
        tokens=torch.tensor([[0, 5, 6, 5, 6]]),
        seq_len=2,
        seed=0,
        how="mean",
        prepend_bos=True,
        relative_position=None,
        note="",
    )


def vector_lens() -> VectorLens:
    return VectorLens(
        model=model(),
        vectors=torch.arange(8.0)[None],
        decoder="none",
        top_ids=torch.tensor([[5, 0]]),
        top_probabilities=torch.tensor([[0.5, 0.25]]),
        entropy=torch.tensor([1.0]),
        log_prob={" a": torch.tensor([-0.5])},
        rank={" a": torch.tensor([1.0])},
        strings={"0": "<s>", "5": " a"},
    )


def tuned_lens() -> TunedLens:
    """For a two-layer model; part of its training is unknown."""
    draw = torch.Generator().manual_seed(0)
    return TunedLens(
        model=dataclasses.replace(model(), processing=False),
        rows=("embed", "0"),
        weight=torch.randn(2, 8, 8, generator=draw),
        bias=torch.randn(2, 8, generator=draw),
        kl_plain=torch.tensor([2.0, 1.0, 0.0]),
        kl_tuned=torch.tensor([1.5, math.nan, 0.0]),
        source="a checkpoint",
        steps=3,
        batch_tokens=64,
        length=8,
        train_tokens=None,
        held_out_tokens=16,
        learning_rate=1e-3,
        seed=None,
        prepend_bos=True,
    )


def task_performance(**changes) -> TaskPerformance:
    """Two prompts, one right and one wrong; chance is a half."""
    plain = TaskPerformance(
        model=model(),
        task="agreement",
        counterfactual="number",
        clean=("The key", "The\nkeys"),
        corrupted=("The keys", "The\nkey"),
        answers=(" is", " are"),
        wrong=(" are", " is"),
        answer_log_prob=torch.tensor([-0.5, -2.0]),
        wrong_log_prob=torch.tensor([-1.5, -1.0]),
        corrupted_answer_log_prob=torch.tensor([-3.0, -2.0]),
        corrupted_wrong_log_prob=torch.tensor([-1.0, -0.5]),
        rank=torch.tensor([1.0, 3.0]),
        right=torch.tensor([True, False]),
        estimates={
            "accuracy": (0.5, 0.0, 1.0),
            "top1": (0.5, 0.0, 1.0),
            "logit_diff": (0.0, -1.0, 1.0),
            "probability_diff": (0.0, -0.25, 0.375),
            "corrupted_logit_diff": (-1.75, -2.0, -1.5),
        },
        chance=0.5,
        confidence=0.95,
        seed=0,
    )
    return dataclasses.replace(plain, **changes)


def role_grid(**changes) -> RoleGrid:
    """Two prompts, layers 0 and 2: mean effects 1, 3 | 0, -1 of a total of 4, and 2 more in one prompt."""
    effects = torch.tensor([[1.0, 3.0], [0.0, -1.0]])
    plain = RoleGrid(
        model=model(n_layers=3),
        task="ioi",
        counterfactual="swap-subject",
        prompts=("a", "b"),
        site="resid_pre",
        source="the clean run",
        into="corrupted",
        axes=("layer", "role"),
        layers=(0, 2),
        heads=(),
        roles=("S2", "<END>"),
        values=torch.stack([effects - 3, effects - 1]),
        clean=torch.tensor([2.0, 2.0]),
        corrupted=torch.tensor([-2.0, -2.0]),
        seed=0,
        note="",
    )
    return dataclasses.replace(plain, **changes)


def _of_task(n_prompts: int) -> dict[str, object]:
    return {
        "model": model(n_layers=1, n_heads=2),
        "task": "ioi",
        "counterfactual": "swap-subject",
        "prompts": tuple("abcd"[:n_prompts]),
        "by": "resample",
        "metric": "logit_diff",
        "full": torch.full((n_prompts,), 4.0),
        "empty": torch.full((n_prompts,), -4.0),
        "seed": 0,
        "note": "",
    }


def component_set(**changes) -> ComponentSet:
    """Half of the way from -4 to 4 is left."""
    plain = ComponentSet(**_of_task(2), components=("L0H1",), kept=True, values=torch.tensor([-1.0, 1.0]))
    return dataclasses.replace(plain, **changes)


def copy_scores(**changes) -> CopyScores:
    """One layer of two heads: the first copies both tokens, the second suppresses one of them."""
    plain = CopyScores(
        model=model(n_layers=1, n_heads=2),
        ids=torch.tensor([3, 5]),
        strings=(" a", " b"),
        top_k=5,
        copies=torch.tensor([[1.0, 0.0]]),
        suppresses=torch.tensor([[0.0, 0.5]]),
        attends_to_predicted=torch.tensor([[0.5, 1.0]]),
        null_copies=torch.tensor([[0.5, 0.0]]),
        null_suppresses=torch.tensor([[0.0, 0.0]]),
        null_attends_to_predicted=torch.tensor([[0.5, 0.0]]),
    )
    return dataclasses.replace(plain, **changes)


def successor_scores(**changes) -> SuccessorScores:
    """One layer of two heads: the second succeeds for all three days and one of two letters."""
    plain = SuccessorScores(
        model=model(n_layers=1, n_heads=2),
        classes=("days", "big letters"),
        sizes=(3, 2),
        ids=torch.tensor([3, 5, 7, 0, 1]),
        successor_ids=torch.tensor([5, 7, 3, 1, 2]),
        strings=(" Mon", " Tue", " Wed", " A", " B"),
        successor_strings=(" Tue", " Wed", " Mon", " B", " C"),
        by_class=torch.tensor([[[0.0, 1.0]], [[0.0, 0.5]]]),
        null_by_class=torch.tensor([[[0.5, 0.0]], [[0.0, 0.5]]]),
    )
    return dataclasses.replace(plain, **changes)


def task_heads(**changes) -> TaskHeads:
    """The first head copies and attends to IO; the second does nothing clearly, and attends to END."""
    plain = TaskHeads(
        model=model(n_layers=1, n_heads=2),
        task="ioi",
        counterfactual="swap-subject",
        prompts=("a", "b"),
        heads=((0, 1), (0, 0)),
        by="resample",
        metric="logit_diff",
        effect=torch.tensor([-2.0, 0.5]),
        roles=("IO", "END"),
        attention=torch.tensor([[0.75, 0.25], [0.0, 0.5]]),
        scores={
            "copies": torch.tensor([1.0, 0.0]),
            "suppresses": torch.tensor([0.0, 0.0]),
            # high, but no more than four times its null
            "induction_score": torch.tensor([0.0, 0.8]),
            "previous_token_score": torch.tensor([0.5, 0.0]),
            "duplicate_token_score": torch.tensor([0.0, 0.39]),
        },
        nulls={
            "copies": torch.tensor([0.125, 0.0]),
            "suppresses": torch.tensor([0.125, 0.0]),
            "induction_score": torch.tensor([0.0, 0.2]),
            "previous_token_score": torch.tensor([0.0625, 0.0]),
            "duplicate_token_score": torch.tensor([0.0, 0.0]),
        },
        note="",
    )
    return dataclasses.replace(plain, **changes)


def task_circuit(**changes) -> TaskCircuit:
    """Two heads of three components, 3/4 faithful; without L0H0 1/4, without L0H1 1/2."""
    plain = TaskCircuit(
        **_of_task(2),
        components=("L0H0", "L0H1"),
        n_possible=3,
        kept=torch.tensor([2.0, 2.0]),
        rest=torch.tensor([-4.0, -2.0]),
        without=torch.tensor([[-2.0, -2.0], [0.0, 0.0]]),
        random_kept=torch.tensor([[-4.0, -4.0], [0.0, 0.0]]),
        random_rest=torch.tensor([[4.0, 4.0], [0.0, 0.0]]),
    )
    return dataclasses.replace(plain, **changes)


def edge_effects(**changes) -> EdgeEffects:
    """One layer of two heads without an MLP; the embedding's edge to the key of L0H1 helps most."""
    nan = torch.nan
    plain = EdgeEffects(
        **_of_task(2),
        steps=1,
        senders=("embed", "L0H0", "L0H1"),
        receivers=("L0H0.q", "L0H1.q", "L0H0.k", "L0H1.k", "L0H0.v", "L0H1.v", "logits"),
        effect=torch.tensor(
            [
                [0.0, 0.1, -0.2, -5.0, 0.3, -0.4, 0.5],
                [nan, nan, nan, nan, nan, nan, 3.0],
                [nan, nan, nan, nan, nan, nan, -4.0],
            ]
        ),
        standard_error=torch.full((3, 7), 0.25),
        node_standard_error=torch.full((3,), 0.5),
        roles=("S2", "END", "elsewhere"),
        node_roles=torch.tensor([[-4.5, -0.3, 0.1], [1.0, 2.0, 0.0], [0.0, -4.0, 0.0]]),
        exact_edges=("embed->L0H1.k", "L0H0->logits", "L0H1->logits"),
        exact=torch.tensor([-6.0, 2.0, -1.0]),
    )
    return dataclasses.replace(plain, **changes)


def circuit_curve(**changes) -> CircuitCurve:
    """1, 2 and 4 of 4 edges: 0, 1/2 and all of the task; random sets 0, 0 and all."""
    plain = CircuitCurve(
        **_of_task(2),
        ranking="edge attribution patching",
        of_edges=True,
        sizes=(1, 2, 4),
        n_possible=4,
        values=torch.tensor([[-4.0, -4.0], [-2.0, 2.0], [4.0, 4.0]]),
        random=torch.tensor([[[-4.0, -4.0], [-4.0, -4.0], [4.0, 4.0]]]),
        exact=torch.tensor([[-2.0, -2.0], [4.0, 4.0], [4.0, 4.0]]),
    )
    return dataclasses.replace(plain, **changes)


# -- features --------------------------------------------------------------------------------------

MARKUP = "</script><b>&lt;$x$"
STRINGS = {"0": "<s>", "5": " a", "6": "\n", "7": MARKUP, "8": "b"}


def own(name: str = "tiny") -> ModelInfo:
    return dataclasses.replace(model(name, n_layers=4), processing=False)


def exhaustive(**changes) -> ExhaustiveSearch:
    """Layers 0, 2, 3, features 4, 1; feature 4 has ` a` first in two layers, feature 1 no token twice."""
    plain = ExhaustiveSearch(
        model=own(),
        site="resid_post",
        layers=(0, 2, 3),
        features=(4, 1),
        directions=None,
        prefix=torch.tensor([0]),
        prepend_bos=True,
        ids=torch.tensor([[[5, 6], [5, 8]], [[5, 8], [6, 5]], [[8, 5], [7, 5]]]),
        activations=torch.tensor(
            [[[2.0, 1.0], [3.0, 0.5]], [[4.0, 1.5], [5.0, 2.5]], [[6.0, 3.5], [-7.0, -8.0]]]
        ),
        lowest_ids=torch.tensor([[[8, 7], [8, 7]], [[8, 7], [8, 7]], [[8, 7], [6, 8]]]),
        lowest_activations=torch.full((3, 2, 2), -9.0),
        strings=STRINGS,
        vocabulary="0f1e2d3c4b5a",
    )
    return dataclasses.replace(plain, **changes)


def greedy(**changes) -> GreedySearch:
    """Two features of layer 2, two inputs of two tokens each."""
    plain = GreedySearch(
        model=own(),
        site="resid_post",
        layer=2,
        features=(4, 1),
        directions=None,
        prefix=torch.tensor([0]),
        prepend_bos=True,
        aggregate="sum",
        ids=torch.tensor([[[5, 6], [5, 8]], [[7, 8], [8, 8]]]),
        activations=torch.tensor([[[2.0, 3.0], [2.0, 1.5]], [[0.5, -0.25], [0.25, -0.5]]]),
        strings=STRINGS,
    )
    return dataclasses.replace(plain, **changes)


def gradient(**changes) -> GradientSearch:
    """Feature 3 at both of two tokens; three restarts, two steps; restart 1 with `nearest` is best."""
    pinv, nearest = torch.tensor([[5, 5], [6, 5], [8, 8]]), torch.tensor([[6, 8], [5, 7], [8, 5]])
    plain = GradientSearch(
        model=own(),
        site="resid_post",
        layer=2,
        directions=None,
        selected=torch.tensor([[0, 3], [1, 3]]),
        prefix=torch.tensor([0]),
        prepend_bos=True,
        objective="mean",
        target_ids=None,
        constant=None,
        prior="norm",
        prior_weight=0.5,
        optimizer="Adam",
        learning_rate=0.125,
        isolated=False,
        seed=1,
        objectives=torch.tensor([[1.0, -2.0, -3.0], [0.5, -4.0, -4.5], [0.25, 0.0, -0.5]]),
        activations=torch.tensor([[-1.0, 2.0, 3.0], [-0.5, 4.0, 4.5], [-0.25, 0.0, 0.5]]),
        embeddings=torch.ones(3, 2, 8),
        nearest_cosine=torch.tensor([[0.5, 0.25], [0.75, 0.5], [0.125, 0.125]]),
        token_cosine=0.25,
        decoded_ids={"pinv": pinv, "nearest": nearest},
        ids={"pinv": pinv, "nearest": nearest},
        true_objectives={
            "pinv": torch.tensor([-1.0, -0.5, -0.25]),
            "nearest": torch.tensor([-0.5, -1.5, 0.0]),
        },
        true_activations={"pinv": torch.tensor([1.0, 0.5, 0.25]), "nearest": torch.tensor([0.5, 1.5, 0.0])},
        selected_activations={
            "pinv": torch.tensor([[1.5, 0.5], [0.5, 0.5], [0.5, 0.0]]),
            "nearest": torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]]),
        },
        optimum=None,
        strings=STRINGS,
    )
    return dataclasses.replace(plain, **changes)


def continuation() -> GradientSearch:
    """The same, searching for inputs that `b` follows."""
    nan = {way: torch.full((3,), torch.nan) for way in ("pinv", "nearest")}
    return gradient(
        objective="continuation",
        selected=torch.zeros(0, 2, dtype=torch.long),
        target_ids=torch.tensor([8]),
        activations=torch.full((3, 3), torch.nan),
        true_activations=nan,
        selected_activations={way: torch.zeros(3, 0) for way in nan},
        true_objectives={"pinv": torch.tensor([3.0, 2.0, 1.0]), "nearest": torch.tensor([4.0, 0.5, 6.0])},
        objectives=torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 0.25], [7.0, 8.0, 9.0]]),
    )


def alignment(**changes) -> FeatureAlignment:
    """Layers 0 and 2 of one search, four features: 3 agree, where chance is 1 in 8."""
    same = torch.tensor([True, True, True, False])
    plain = FeatureAlignment(
        model=own(),
        other=own(),
        within=True,
        site="resid_post",
        other_site="resid_post",
        layers=(0, 2),
        other_layers=(0, 2),
        features=(0, 1, 3, 4),
        top_k=2,
        prefix=torch.tensor([0]),
        other_prefix=torch.tensor([0]),
        activated=torch.ones(2, 4, dtype=torch.bool),
        other_activated=torch.ones(2, 4, dtype=torch.bool),
        same=torch.stack([torch.stack([same | True, same]), torch.stack([same, same | True])]),
        overlap=torch.tensor([[[1.0] * 4, [0.5, 0.5, 1.0, 0.5]], [[0.5, 0.5, 1.0, 0.5], [1.0] * 4]]),
        chance_same=torch.tensor([[0.0625, 0.125], [0.125, 0.25]]),
        chance_overlap=torch.tensor([[0.0625, 0.375], [0.375, 0.25]]),
        is_index=torch.tensor([[True, False, False, False]] * 2),
        other_is_index=torch.zeros(2, 4, dtype=torch.bool),
    )
    return dataclasses.replace(plain, **changes)


def untrained(**changes) -> FeatureAlignment:
    """Layers 0, 1, 2 of the model with layer 2 of another; nothing agrees."""
    plain = alignment(
        other=own("<b>$other$"),
        within=False,
        layers=(0, 1, 2),
        other_layers=(2,),
        activated=torch.ones(3, 4, dtype=torch.bool),
        other_activated=torch.ones(1, 4, dtype=torch.bool),
        same=torch.zeros(3, 1, 4, dtype=torch.bool),
        overlap=torch.zeros(3, 1, 4),
        chance_same=torch.full((3, 1), 0.125),
        chance_overlap=torch.full((3, 1), 0.25),
        is_index=torch.zeros(3, 4, dtype=torch.bool),
        other_is_index=torch.ones(1, 4, dtype=torch.bool),
    )
    return dataclasses.replace(plain, **changes)


def feature_examples(**changes) -> FeatureExamples:
    """Feature 2 of layer 1 in windows 7 and 3 of a corpus, after BOS; there was no third."""
    nan = torch.nan
    plain = FeatureExamples(
        model=own(),
        site="mlp_out",
        layers=(0, 1),
        features=(6, 2),
        directions=None,
        prepend_bos=True,
        read=9,
        numbers=torch.tensor([3, 7]),
        tokens=torch.tensor([[0, 5, 6], [0, 7, 8]]),
        windows=torch.tensor([[[-1] * 3, [-1] * 3], [[0, 1, -1], [1, 0, -1]]]),
        positions=torch.tensor([[[-1] * 3, [-1] * 3], [[1, 2, -1], [2, 1, -1]]]),
        activations=torch.tensor(
            [
                [[[nan] * 3] * 3] * 2,
                [
                    [[nan, 9.0, 8.0], [nan, 6.0, 7.0], [nan] * 3],
                    [[nan, -1.0, 2.123456], [nan, 1.5, 0.25], [nan] * 3],
                ],
            ]
        ),
        strings=STRINGS,
    )
    return dataclasses.replace(plain, **changes)


def plan(**changes) -> Plan:
    plain = Plan(
        model=model(),
        analysis="Task.circuit",
        runs=488,
        tokens=2928,
        flop=1.04e10,
        bytes=6 * 2**20,
        seconds=75.0,
        loops={"runs (sets)": (20.0, 118.0)},
        note="",
    )
    return dataclasses.replace(plain, **changes)


def sites(**changes) -> FeatureAlignment:
    """Two layers of one model, at one site and at another."""
    return alignment(within=False, site="attn_out", other_site="mlp_out", **changes)


def of_layers(size: int) -> FeatureAlignment:
    return alignment(
        layers=tuple(range(size)),
        other_layers=tuple(range(size)),
        activated=torch.ones(size, 4, dtype=torch.bool),
        other_activated=torch.ones(size, 4, dtype=torch.bool),
        same=torch.ones(size, size, 4, dtype=torch.bool),
        overlap=torch.ones(size, size, 4),
        chance_same=torch.zeros(size, size),
        chance_overlap=torch.zeros(size, size),
        is_index=torch.zeros(size, 4, dtype=torch.bool),
        other_is_index=torch.zeros(size, 4, dtype=torch.bool),
    )


RESULTS = {
    name: globals()[name]
    for name in (
        *("attention", "attention_spread", "attribution", "attribution_patch", "circuit", "circuit_summary"),
        "neuron_attribution",
        *("composition", "facts", "head_scores", "indirect_object", "induction_circuits", "input_probe"),
        *("lens", "patch_grid", "performance", "positional", "role_grid", "task_performance", "tuned_lens"),
        *("circuit_curve", "component_set", "copy_scores", "edge_effects", "task_circuit", "task_heads"),
        *("plan", "successor_scores", "variance", "vector_lens"),
        *("alignment", "exhaustive", "feature_examples", "gradient", "greedy"),
    )
}
"""One result of every type."""
