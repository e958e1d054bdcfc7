"""Attention-head scores on repeated random tokens or on a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechlens.analyses.heads.kinds import (
    ON_PROMPT,
    POSITIONAL,
    PREFIX_COPIES,
    PREFIX_LENGTH,
    PROMPT_KINDS,
    SAMPLE_LENGTH,
    kinds_on_repeated,
    mask_of,
)
from mechlens.analyses.heads.kinds import ON_REPEATED as MASKED
from mechlens.analyses.heads.performance import performance_of
from mechlens.analyses.heads.runs import copying_scores, mask_scores, score_masks
from mechlens.arguments import check_between, check_type, names_of
from mechlens.measures import attention as measures
from mechlens.measures.attention import Mask, Sinks
from mechlens.measures.statistics import bootstrap_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import pattern_readers
from mechlens.models.run.unembedding import Readers, next_token_log_probs
from mechlens.progress import progress_bar
from mechlens.results import HeadScores, RepeatedTokenPerformance, head_label
from mechlens.results.heads import CLEAR_SCORE
from mechlens.text.prompts import (
    DEFAULT_REPEATED,
    Prompt,
    RandomTokens,
    RepeatedTokens,
    prompt_tokens,
    repeated_tokens,
)
from mechlens.text.tokens import all_bos

OnRepeated = Callable[[RandomTokens, Mapping[str, Mask | Sinks]], dict[str, Tensor]]
"""Runs the model on repeated tokens and returns each mask's scores, `[batch, layer, head]`."""


def score_heads(
    model: LensModel,
    on: RepeatedTokens | Prompt = DEFAULT_REPEATED,
    kinds: Sequence[str] | str | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    cache: Any = None,
    prepend_bos: bool | None = None,
    confidence: float = 0.95,
    progress: bool | None = None,
) -> HeadScores:
    """Score every attention head on repeated random tokens, or on your own prompt.

    Args:
        on: `RepeatedTokens(...)`, a text, or token ids, which are used as they are.
        kinds: names of scores; None is all that fit (on a prompt, the first three). On both:
            `induction_score` (attention to the token after an earlier occurrence of the current one),
            `previous_token_score`, `duplicate_token_score` (to an earlier occurrence of the same token),
            `first_token_score`, `attention_sink_score` (the largest mean attention that one position in the
            first half receives from all later ones, which is the first-token score where the sink is the
            first token). On repeated tokens only: `prefix_matching_score` (25 tokens, 4 times),
            `copying_score` (25 tokens), `induction_diagonal_score` (the variant in "How one can Interpret
            GPT2-Small").
        masks: for a prompt: further scores by name, each the mean attention on a mask `[dest, src]` or
            `[batch, dest, src]` of zeros and ones.
        cache: for a prompt: its `ActivationCache`, or any mapping from hook names to patterns. If given, the
            model is not run.
        prepend_bos: whether to prepend BOS to a text; None prepends it if the tokenizer has one.
        confidence: coverage of the bootstrap intervals over sequences, between 0 and 1.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        The score of each head on each sequence, in [0, 1] (`copying_score` in [-1, 1]), with intervals for
        the means; nan where a sequence has nothing to score. On repeated tokens each score has a null
        baseline. For scores that depend on content, it is the same mask on equally many unrelated random
        tokens, where a head that attends at a fixed distance scores just as high. For the previous-token and
        first-token scores, it is the expected score when each position's attention is shuffled over the
        positions it can see. For the attention-sink score, it is that of uniform attention, which falls
        mostly on the first position: the null of the first-token score. For the copying score, each source
        is treated as another token of the sample.

    Raises:
        ValueError: an unknown kind, a mask of the wrong size, a prompt that the model cannot read, or
            sequences that do not fit in its context.

    Example:
        >>> on = mechlens.RepeatedTokens(20, batch=4, seeds=[0])
        >>> heads = mechlens.score_heads(model, on, "induction_score")
        >>> heads.mean("induction_score").shape  # layer, head
        torch.Size([4, 6])
        >>> mechlens.detect_heads(heads, "induction_score", threshold=0.8)
        ['L3H5', 'L3H3', 'L3H4']

    References: Olsson et al. 2022, arXiv:2209.11895. TransformerLens's `detect_head` divides by the total
    attention, not by the number of mask entries: its score is ours times entries / positions. Gu et al. 2024,
    arXiv:2410.10781, attention sinks: they choose the position, and include its attention to itself.
    Cost: on a prompt, one forward pass up to the last layer's pattern. On repeated tokens, per seed, one pass
    for each kind of sequence and one for its null. Patterns are reduced layer by layer and discarded.
    """
    if isinstance(on, RepeatedTokens):
        for name, given in (("masks", masks), ("cache", cache), ("prepend_bos", prepend_bos)):
            if given is not None:
                raise ValueError(f"{name} is for a prompt, not for RepeatedTokens: leave it out")
        return _on_repeated(model, on, kinds, confidence, progress)
    info = describe(model)
    tokens = prompt_tokens(model, on, prepend_bos=prepend_bos)
    found = score_masks(model, tokens, _prompt_masks(tokens, kinds, masks or {}), cache=cache)
    scores = {kind: values[None] for kind, values in found.items()}
    return HeadScores(
        model=info,
        scores=scores,
        nulls={},
        intervals=_intervals(scores, confidence),
        tokens={"prompt": tokens[None].cpu()},
        seq_len=None,
        jitter=0,
        seeds=(),
        prepend_bos=all_bos(model.tokenizer, tokens[:, 0]),
        confidence=confidence,
    )


def _prompt_masks(
    tokens: Tensor, kinds: Sequence[str] | str | None, masks: Mapping[str, Tensor]
) -> dict[str, Mask | Sinks]:
    """The masks of the requested scores on a prompt."""
    n_pos = tokens.shape[1]
    known: dict[str, Callable[[], Mask | Sinks]] = {
        "induction_score": lambda: measures.induction_mask(tokens),
        "duplicate_token_score": lambda: measures.duplicate_token_mask(tokens),
        "previous_token_score": lambda: measures.previous_token_mask(n_pos),
        "first_token_score": lambda: measures.first_token_mask(n_pos),
        "attention_sink_score": lambda: Sinks(n_pos),
    }
    kinds = ON_PROMPT if kinds is None else kinds
    if len(kinds) or not masks:
        kinds = names_of("score", kinds, PROMPT_KINDS)
    wanted = {kind: known[kind]() for kind in kinds}
    for name, where in masks.items():
        if where.shape[-2:] != (n_pos, n_pos) or where.ndim not in (2, 3):
            raise ValueError(
                f"the mask {name!r} must be [{n_pos}, {n_pos}] for this prompt, got {tuple(where.shape)}"
            )
        if not ((where == 0) | (where == 1)).all():
            raise ValueError(f"the mask {name!r} must be zeros and ones, got other values")
        wanted[name] = Mask.of(where.bool().cpu())
    return wanted


def performance_and_scores(
    model: LensModel, on: RepeatedTokens, kinds: Sequence[str] | str | None, *, progress: bool | None
) -> tuple[RepeatedTokenPerformance, HeadScores]:
    """`repeated_token_performance` and `score_heads` from the same forward passes.

    Args:
        kinds: at least one of them is scored on the two copies.
    """
    drawn: list[RandomTokens] = []
    predicted: list[tuple[Tensor, Tensor]] = []

    def predictions(random: RandomTokens, masks: Mapping[str, Mask | Sinks]) -> dict[str, Tensor]:
        found, reduce = mask_scores(model, len(random.tokens), masks)

        def beside(rows: slice) -> Readers:
            return pattern_readers(model, reduce(rows))

        predicted.append(next_token_log_probs(model, random.tokens, beside))
        drawn.append(random)
        return found

    scores = _on_repeated(model, on, kinds, 0.95, progress, predictions)
    return performance_of(model, drawn, predicted, scores.confidence), scores


def _on_repeated(
    model: LensModel,
    on: RepeatedTokens,
    kinds: Sequence[str] | str | None,
    confidence: float,
    progress: bool | None,
    run_repeated: OnRepeated | None = None,
) -> HeadScores:
    """`score_heads` on repeated tokens. `run_repeated`, if given, runs the two copies."""
    info, seeds = describe(model), on.seeds
    kinds = kinds_on_repeated(model, kinds, prepend_bos=on.prepend_bos, jitter=on.jitter)
    # draw everything before running anything, so that sizes that do not fit fail at once
    used = [name for name in FAMILIES if FAMILIES[name] & {*kinds}]
    drawn = {name: [_draw(model, on, name, seed) for seed in seeds] for name in used}
    shape = (len(seeds), on.batch, model.cfg.n_layers, model.cfg.n_heads)
    scores = {kind: torch.full(shape, torch.nan, dtype=torch.float32) for kind in kinds}
    nulls = {kind: torch.full(shape, torch.nan, dtype=torch.float32) for kind in kinds}
    tokens: dict[str, list[Tensor]] = {}
    masked = {name: [kind for kind in kinds if kind in FAMILIES[name]] for name in used if name != "sample"}
    lengths = {drawn[name][0].tokens.shape[1] for name, each in masked.items() if {*each} - {*POSITIONAL}}
    n_runs = len(seeds) * (len(drawn) + len(lengths))
    with progress_bar(total=n_runs, desc="head scores", unit="run", progress=progress) as bar:
        for at, seed in enumerate(seeds):
            # families with sequences of the same length share a run on unrelated tokens
            unrelated: dict[int, dict[str, Mask | Sinks]] = {}
            names: dict[int, list[str]] = {}
            for name, each in masked.items():
                random = drawn[name][at]
                tokens.setdefault(name, []).append(random.tokens)
                masks = {kind: mask_of(kind, random) for kind in each}
                if name == "repeated" and run_repeated is not None:
                    found = run_repeated(random, masks)
                else:
                    found = score_masks(model, random.tokens, masks)
                bar.update()
                length = random.tokens.shape[1] - int(random.prepend_bos)
                for kind, mask in masks.items():
                    scores[kind][at] = found[kind]
                    if kind in POSITIONAL:
                        nulls[kind][at] = measures.uniform_attention(mask)
                    else:
                        unrelated.setdefault(length, {})[kind] = mask
                if length in unrelated:
                    names.setdefault(length, []).append(f"{name}_unrelated")
            for length, masks in unrelated.items():
                # another seed, or the sequences would start with the repeated tokens
                ids = repeated_tokens(
                    model,
                    seq_len=length,
                    batch=on.batch,
                    copies=1,
                    seed=seed + 2**32,
                    prepend_bos=on.prepend_bos,
                ).tokens
                for kind, values in score_masks(model, ids, masks).items():
                    nulls[kind][at] = values
                for family in names[length]:
                    tokens.setdefault(family, []).append(ids)
                bar.update()
            if "sample" in drawn:
                random = drawn["sample"][at]
                scores["copying_score"][at], nulls["copying_score"][at] = copying_scores(model, random)
                tokens.setdefault("sample", []).append(random.tokens)
                bar.update()
    return HeadScores(
        model=info,
        scores=scores,
        nulls=nulls,
        intervals=_intervals(scores, confidence),
        tokens={name: torch.stack(ids) for name, ids in tokens.items()},
        seq_len=on.seq_len,
        jitter=on.jitter,
        seeds=tuple(seeds),
        prepend_bos=next(iter(drawn.values()))[0].prepend_bos,
        confidence=confidence,
    )


FAMILIES = {
    "repeated": frozenset(MASKED),
    "prefix": frozenset({"prefix_matching_score"}),
    "sample": frozenset({"copying_score"}),
}
"""The scores of each kind of sequence."""


def _draw(model: LensModel, on: RepeatedTokens, family: str, seed: int) -> RandomTokens:
    """The sequences of one kind and seed."""
    if family == "repeated":
        return on.draw(model, seed)
    length, copies = (PREFIX_LENGTH, PREFIX_COPIES) if family == "prefix" else (SAMPLE_LENGTH, 1)
    return repeated_tokens(
        model, seq_len=length, batch=on.batch, copies=copies, seed=seed, prepend_bos=on.prepend_bos
    )


def _intervals(scores: Mapping[str, Tensor], confidence: float) -> dict[str, Tensor]:
    return {
        kind: torch.stack(bootstrap_interval(values.flatten(0, 1), confidence=confidence))
        for kind, values in scores.items()
    }


def detect_heads(
    result: HeadScores, kind: str = "induction_score", threshold: float = CLEAR_SCORE
) -> list[str]:
    """List the heads whose mean score reaches a threshold, highest first.

    Args:
        kind: one of the result's scores.
        threshold: between -1 and 1.

    Returns:
        Labels such as `L5H5`.

    Raises:
        TypeError: not a `HeadScores`.
        ValueError: the result has no such score, or no score can reach the threshold.

    Example:
        >>> heads = mechlens.score_heads(model, mechlens.RepeatedTokens(20, batch=4, seeds=[0]))
        >>> mechlens.detect_heads(heads, "previous_token_score", threshold=0.9)
        ['L1H2']
    """
    check_type("result", result, HeadScores)
    check_between("threshold", threshold, -1, 1)
    return [head_label(*head) for head, _ in result.clear_heads(kind, threshold, times_null=0)]
