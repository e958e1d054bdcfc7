"""Repeated random tokens: how well a model continues them, and which attention heads do it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import check_between, check_type, names_of, seeds_of
from mechlens.measures import attention as measures
from mechlens.measures.attention import Mask, mask_score
from mechlens.measures.statistics import bootstrap_interval, central_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, pattern_readers, read_patterns, watch
from mechlens.models.run.unembedding import Readers, next_token_log_probs
from mechlens.models.weights.access import (
    attention_out_affine,
    direct_unembedding,
    output_weights,
    per_query_head,
    value_bias,
)
from mechlens.progress import progress_bar
from mechlens.results import HeadScores, RepeatedTokenPerformance, half_means, head_label
from mechlens.results.heads import CLEAR_SCORE
from mechlens.text.prompts import Prompt, RandomTokens, prompt_tokens, repeated_tokens
from mechlens.text.tokens import all_bos, own_bos_token_id

SEEDS = (0, 1, 2, 3, 4)
PREFIX_LENGTH, PREFIX_COPIES = 25, 4
"""Olsson et al.'s protocol for prefix matching: 25 random tokens, four times."""
SAMPLE_LENGTH = 25
"""Random tokens of one sample of the copying score."""

_ON_REPEATED: dict[str, Callable[[RandomTokens], Mask]] = {
    "induction_score": lambda r: measures.copies_mask(r.starts, r.seq_len, 1),
    "previous_token_score": lambda r: measures.previous_token_mask(r.tokens.shape[1]),
    "duplicate_token_score": lambda r: measures.copies_mask(r.starts, r.seq_len, 0),
    "first_token_score": lambda r: measures.first_token_mask(r.tokens.shape[1]),
    "induction_diagonal_score": lambda r: measures.diagonal_mask(r.tokens.shape[1], 1 - r.seq_len),
}
_POSITIONAL = ("previous_token_score", "first_token_score")
VARIANTS = ("induction_diagonal_score",)
_FIXED_PERIOD = ("induction_diagonal_score", "prefix_matching_score")
KINDS = (*(kind for kind in _ON_REPEATED if kind not in VARIANTS), "prefix_matching_score", "copying_score")
"""The scores of `score_heads` unless it is asked for others."""
ON_PROMPT = ("induction_score", "previous_token_score", "duplicate_token_score")
"""The scores of `score_heads_on` unless it is asked for others."""
PROMPT_KINDS = (*ON_PROMPT, "first_token_score")
"""The scores that any prompt can have."""


def repeated_token_performance(
    model: LensModel,
    *,
    seq_len: int = 50,
    batch: int = 30,
    seeds: Iterable[int] = SEEDS,
    prepend_bos: bool | None = None,
    confidence: float = 0.95,
    progress: bool | None = None,
) -> RepeatedTokenPerformance:
    """How well the model predicts random tokens when they come first and when they come again.

    Args:
        seq_len: S, random tokens in one copy; the model reads `[BOS, S tokens, the same S]`.
        batch: sequences per seed.
        seeds: each draws its own sequences.
        prepend_bos: None prepends BOS where the tokenizer has one. Without it the first token is not
            predicted, and the first half has S - 1 predictions.
        confidence: coverage of the bootstrap intervals over all sequences.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        Log-probabilities in nats and top-1 hits per position, and the means of both halves with
        intervals. The first token of the second copy counts to the second half, as in the article,
        although nothing foretells it: the best accuracy is about (S - 1) / S.

    Raises:
        ValueError: as `repeated_tokens`, or no seeds.

    Source: "How one can Interpret GPT2-Small"; Olsson et al. 2022, arXiv:2209.11895.
    Cost: one forward pass per seed, no logits kept.
    """
    seeds = seeds_of(seeds)
    drawn, predicted = [], []
    for seed in progress_bar(seeds, desc="repeated tokens", progress=progress):
        random = repeated_tokens(model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=prepend_bos)
        drawn.append(random)
        predicted.append(next_token_log_probs(model, random.tokens))
    return _performance(model, drawn, predicted, confidence)


def _performance(
    model: LensModel,
    drawn: Sequence[RandomTokens],
    predicted: Sequence[tuple[Tensor, Tensor]],
    confidence: float,
) -> RepeatedTokenPerformance:
    """From each seed's log-probabilities and top-1 hits."""
    seq_len, prepend_bos = drawn[0].seq_len, drawn[0].prepend_bos
    log_prob, correct = (torch.stack(each) for each in zip(*predicted, strict=True))
    estimates, single_draws = {}, {}
    for half in ("first", "second"):
        for name, values in (("log_prob", log_prob), ("accuracy", correct.float())):
            means = half_means(values, half, seq_len=seq_len, prepend_bos=prepend_bos).flatten()
            low, high = bootstrap_interval(means, confidence=confidence)
            estimates[f"{half}_half_{name}"] = (float(means.mean()), float(low), float(high))
            single_draws[f"{half}_half_{name}"] = central_interval(means)
    return RepeatedTokenPerformance(
        model=describe(model),
        tokens=torch.stack([random.tokens for random in drawn]),
        log_prob=log_prob,
        correct=correct,
        estimates=estimates,
        single_draws=single_draws,
        seq_len=seq_len,
        seeds=tuple(random.seed for random in drawn),
        prepend_bos=prepend_bos,
        confidence=confidence,
    )


def score_heads(
    model: LensModel,
    kinds: Sequence[str] | str | None = None,
    *,
    seq_len: int = 50,
    batch: int = 30,
    seeds: Iterable[int] = SEEDS,
    prepend_bos: bool | None = None,
    jitter: int = 0,
    confidence: float = 0.95,
    progress: bool | None = None,
) -> HeadScores:
    """Score every attention head on repeated random tokens.

    Args:
        kinds: any of `KINDS` and `VARIANTS`; None takes `KINDS`, less what the model's context or the
            jitter leaves out (`kinds_that_fit`):
            `induction_score`, `duplicate_token_score`, `previous_token_score`, `first_token_score`
            on two copies of `seq_len` tokens; `prefix_matching_score` on 25 tokens x 4;
            `copying_score` on 25 tokens; `induction_diagonal_score`, the article's own variant.
        seq_len: S, random tokens in one copy.
        batch: sequences per seed and kind of sequence.
        seeds: each draws its own sequences.
        prepend_bos: None prepends BOS where the tokenizer has one.
        jitter: 0 to this many other random tokens between the copies, a number drawn for each
            sequence, so that a head that attends at a fixed distance gains nothing.
        confidence: coverage of the bootstrap intervals over all sequences.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        The scores of each sequence and their nulls. The null of a score that depends on content is
        the same mask on as many *unrelated* random tokens, where a head that merely attends at a
        fixed distance scores as high. Unrelated tokens leave the scores of positions alone
        (previous, first token), so their null is the expected score when each position's attention
        is shuffled over what it can see. The null of copying gives each source the identity of
        another token of the sample.

    Raises:
        ValueError: an unknown kind, or sizes that `repeated_tokens` refuses.

    Cost: per seed one forward pass per kind of sequence and one for its null, up to the last
    layer's pattern; patterns are reduced layer by layer and dropped.
    """
    return _scored(
        model,
        kinds,
        seq_len=seq_len,
        batch=batch,
        seeds=seeds,
        prepend_bos=prepend_bos,
        jitter=jitter,
        confidence=confidence,
        progress=progress,
    )


def performance_and_scores(
    model: LensModel,
    kinds: Sequence[str],
    *,
    seq_len: int,
    batch: int,
    seeds: Iterable[int],
    prepend_bos: bool | None,
    progress: bool | None,
) -> tuple[RepeatedTokenPerformance, HeadScores]:
    """`repeated_token_performance` and `score_heads` on the same sequences, in the same forward passes.

    Args:
        kinds: at least one of a score on two copies.
    """
    drawn: list[RandomTokens] = []
    predicted: list[tuple[Tensor, Tensor]] = []

    def predictions(random: RandomTokens, masks: Mapping[str, Mask]) -> dict[str, Tensor]:
        found, reduce = _mask_scores(model, len(random.tokens), masks)

        def beside(rows: slice) -> Readers:
            return pattern_readers(model, reduce(rows))

        predicted.append(next_token_log_probs(model, random.tokens, beside))
        drawn.append(random)
        return found

    scores = _scored(
        model,
        kinds,
        seq_len=seq_len,
        batch=batch,
        seeds=seeds,
        prepend_bos=prepend_bos,
        progress=progress,
        on_repeated_tokens=predictions,
    )
    return _performance(model, drawn, predicted, scores.confidence), scores


def _scored(
    model: LensModel,
    kinds: Sequence[str] | str | None,
    *,
    seq_len: int,
    batch: int,
    seeds: Iterable[int],
    prepend_bos: bool | None,
    jitter: int = 0,
    confidence: float = 0.95,
    progress: bool | None,
    on_repeated_tokens: Callable[[RandomTokens, Mapping[str, Mask]], dict[str, Tensor]] | None = None,
) -> HeadScores:
    """`score_heads`; `on_repeated_tokens` may run the two copies in its place and return their scores."""
    info, seeds = describe(model), seeds_of(seeds)
    if kinds is None:
        kinds = kinds_that_fit(model, KINDS, prepend_bos=prepend_bos, jitter=jitter)
    kinds = names_of("score", kinds, (*KINDS, *VARIANTS))
    _check_jitter(kinds, jitter)
    draw = partial(repeated_tokens, model, batch=batch, prepend_bos=prepend_bos)
    # before anything is run, so that sizes that do not fit cost nothing
    families: dict[str, Callable[[int], RandomTokens]] = {}
    if on_repeated := [kind for kind in kinds if kind in _ON_REPEATED]:
        families["repeated"] = lambda seed: draw(seq_len=seq_len, jitter=jitter, seed=seed)
    if "prefix_matching_score" in kinds:
        families["prefix"] = lambda seed: draw(seq_len=PREFIX_LENGTH, copies=PREFIX_COPIES, seed=seed)
    if "copying_score" in kinds:
        families["sample"] = lambda seed: draw(seq_len=SAMPLE_LENGTH, copies=1, seed=seed)
    drawn = {name: [family(seed) for seed in seeds] for name, family in families.items()}
    of_family = {"repeated": on_repeated, "prefix": ["prefix_matching_score"]}
    lengths = {
        drawn[name][0].tokens.shape[1]
        for name, kinds_here in of_family.items()
        if name in families and set(kinds_here) - set(_POSITIONAL)
    }

    shape = (len(seeds), batch, model.cfg.n_layers, model.cfg.n_heads)
    scores = {kind: torch.full(shape, torch.nan, dtype=torch.float32) for kind in kinds}
    nulls = {kind: torch.full(shape, torch.nan, dtype=torch.float32) for kind in kinds}
    tokens: dict[str, list[Tensor]] = {}
    with progress_bar(
        total=len(seeds) * (len(families) + len(lengths)), desc="head scores", unit="run", progress=progress
    ) as bar:
        for at, seed in enumerate(seeds):
            # masks of families whose sequences are of one length share a run on unrelated tokens
            unrelated: dict[int, dict[str, Mask]] = {}
            names: dict[int, list[str]] = {}
            for name in [name for name in of_family if name in families]:
                random = drawn[name][at]
                tokens.setdefault(name, []).append(random.tokens)
                masks = {kind: _mask(kind, random) for kind in of_family[name]}
                run_here = on_repeated_tokens if name == "repeated" else None
                found = (
                    _score_masks(model, random.tokens, masks) if run_here is None else run_here(random, masks)
                )
                bar.update()
                length = random.tokens.shape[1] - int(random.prepend_bos)
                for kind, mask in masks.items():
                    scores[kind][at] = found[kind]
                    if kind in _POSITIONAL:
                        nulls[kind][at] = measures.uniform_attention(mask)
                    else:
                        unrelated.setdefault(length, {})[kind] = mask
                if length in unrelated:
                    names.setdefault(length, []).append(f"{name}_unrelated")
            for length, masks in unrelated.items():
                # another seed, or the first tokens would be those of the repeated sequence
                ids = draw(seq_len=length, copies=1, seed=seed + 2**32).tokens
                for kind, values in _score_masks(model, ids, masks).items():
                    nulls[kind][at] = values
                for name in names[length]:
                    tokens.setdefault(name, []).append(ids)
                bar.update()
            if "sample" in families:
                random = drawn["sample"][at]
                scores["copying_score"][at], nulls["copying_score"][at] = _copying(model, random)
                tokens.setdefault("sample", []).append(random.tokens)
                bar.update()
    return HeadScores(
        model=info,
        scores=scores,
        nulls=nulls,
        intervals=_intervals(scores, confidence),
        tokens={name: torch.stack(ids) for name, ids in tokens.items()},
        seq_len=seq_len,
        jitter=jitter,
        seeds=seeds,
        prepend_bos=next(iter(drawn.values()))[0].prepend_bos,
        confidence=confidence,
    )


def score_heads_on(
    model: LensModel,
    prompt: Prompt,
    kinds: Sequence[str] | str = ON_PROMPT,
    *,
    masks: Mapping[str, Tensor] | None = None,
    cache: Any = None,
    prepend_bos: bool | None = None,
    confidence: float = 0.95,
) -> HeadScores:
    """Score every attention head on a text or on your own tokens, on the field's masks or your own.

    Args:
        prompt: a text, or token ids (used as they are: BOS is yours to put).
        kinds: `induction_score` (all tokens after earlier occurrences of the same token),
            `duplicate_token_score` (all earlier occurrences), `previous_token_score`,
            `first_token_score`.
        masks: further scores by name, each the mean attention on a mask `[dest, src]` or
            `[batch, dest, src]` of zeros and ones.
        cache: an `ActivationCache` of this prompt, or anything that gives patterns by hook name;
            nothing is run then.
        prepend_bos: for a text: None prepends BOS where the tokenizer has one.
        confidence: coverage of the bootstrap intervals over rows.

    Returns:
        Scores with a seed axis of length 1 and no nulls; nan where a row has no such entry.

    Raises:
        ValueError: an unknown kind, a mask of the wrong size or above the diagonal, or a prompt that
            the model cannot read.

    Source: TransformerLens's `detect_head`, which divides by all attention instead of by the number
    of entries: ours times entries / positions is theirs.
    Cost: one forward pass up to the last layer's pattern, or none with a cache.
    """
    info = describe(model)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    n_pos = tokens.shape[1]
    known: dict[str, Callable[[], Mask]] = {
        "induction_score": lambda: measures.induction_mask(tokens),
        "duplicate_token_score": lambda: measures.duplicate_token_mask(tokens),
        "previous_token_score": lambda: measures.previous_token_mask(n_pos),
        "first_token_score": lambda: measures.first_token_mask(n_pos),
    }
    wanted: dict[str, Mask] = {}
    if len(kinds) or not masks:
        kinds = names_of("score", kinds, PROMPT_KINDS)
    for kind in kinds:
        wanted[kind] = known[kind]()
    for name, where in (masks or {}).items():
        if where.shape[-2:] != (n_pos, n_pos) or where.ndim not in (2, 3):
            raise ValueError(
                f"the mask {name!r} is {tuple(where.shape)}, but the prompt needs [{n_pos}, {n_pos}]"
            )
        if not ((where == 0) | (where == 1)).all():
            raise ValueError(f"the mask {name!r} must be zeros and ones, but has other values")
        wanted[name] = Mask.of(where.bool().cpu())
    found = _score_masks(model, tokens, wanted, cache=cache)
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


def detect_heads(
    result: HeadScores, kind: str = "induction_score", threshold: float = CLEAR_SCORE
) -> list[str]:
    """The heads that score at least `threshold`, as `L5H5`, the highest first.

    Raises:
        ValueError: the result has no such kind, or a threshold that no score can reach.
    """
    check_type("result", result, HeadScores)
    check_between("threshold", threshold, -1, 1)
    return [head_label(*head) for head, _ in result.clear_heads(kind, threshold, times_null=0)]


# -- steps -----------------------------------------------------------------------------------------


def kinds_that_fit(
    model: LensModel, kinds: Sequence[str], *, prepend_bos: bool | None = None, jitter: int = 0
) -> tuple[str, ...]:
    """The kinds of score that the model's context has room for and that a jitter leaves defined.

    Warns of kinds that do not fit the context.
    """
    fitting = [kind for kind in kinds if not (jitter and kind in _FIXED_PERIOD)]
    bos = prepend_bos is not False and own_bos_token_id(model.tokenizer) is not None
    needed = int(bos) + PREFIX_COPIES * PREFIX_LENGTH
    if "prefix_matching_score" in fitting and needed > model.cfg.n_ctx:
        warnings.warn(
            f"prefix_matching_score is left out: it needs {needed} positions, and the model's context is "
            f"{model.cfg.n_ctx}",
            stacklevel=3,
        )
        fitting.remove("prefix_matching_score")
    return tuple(fitting)


def _check_jitter(kinds: Sequence[str], jitter: int) -> None:
    for kind in kinds:
        if jitter and kind in _FIXED_PERIOD:
            raise ValueError(f"{kind} has a fixed period: leave jitter at 0, or this score out")


def _mask(kind: str, random: RandomTokens) -> Mask:
    make = _ON_REPEATED["induction_score" if kind == "prefix_matching_score" else kind]
    return make(random)


def _reduce(
    into: Mapping[str, Tensor], masks: Mapping[str, Mask], layer: int, pattern: Tensor, rows: slice
) -> None:
    for kind, mask in masks.items():
        into[kind][rows, layer] = mask_score(pattern, mask.of_rows(rows).to(pattern.device)).cpu()


def _mask_scores(
    model: LensModel, n_rows: int, masks: Mapping[str, Mask]
) -> tuple[dict[str, Float[Tensor, "batch layer head"]], Callable[[slice], Callable[[int, Tensor], None]]]:
    """Room for every mask's score in every layer, and what makes the reader of patterns of some rows that
    fills it."""
    shape = (n_rows, model.cfg.n_layers, model.cfg.n_heads)
    found = {kind: torch.full(shape, torch.nan, dtype=torch.float32) for kind in masks}

    def of_rows(rows: slice) -> Callable[[int, Tensor], None]:
        return lambda layer, pattern: _reduce(found, masks, layer, pattern, rows)

    return found, of_rows


def _score_masks(
    model: LensModel, tokens: Int[Tensor, "batch pos"], masks: Mapping[str, Mask], *, cache: Any = None
) -> dict[str, Float[Tensor, "batch layer head"]]:
    """Every mask's score in every layer, from one run or from a cache."""
    found, reduce = _mask_scores(model, len(tokens), masks)
    start = 0
    # a cache holds all rows at once
    for part in parts(tokens) if cache is None else (tokens,):
        read_patterns(model, part, reduce(slice(start, start + len(part))), cache=cache)
        start += len(part)
    return found


def _copying(
    model: LensModel, random: RandomTokens
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, "batch layer head"]]:
    """The copying score of every head on one set of samples, and its null."""
    batch, n_heads = random.tokens.shape[0], model.cfg.n_heads
    scores, nulls = (
        torch.full((batch, model.cfg.n_layers, n_heads), torch.nan, dtype=torch.float32) for _ in range(2)
    )
    first, n = int(random.prepend_bos), random.seq_len
    sample = slice(first, first + n)
    unembedding = direct_unembedding(model)
    mean_column = unembedding.mean(1)
    own = torch.arange(n)
    generator = torch.Generator().manual_seed(random.seed)
    other = (own + torch.randint(1, n, (1,), generator=generator)) % n
    columns, rows = unembedding.new_empty(0), slice(0)
    values: dict[int, Tensor] = {}

    def keep_values(layer: int, v: Tensor) -> None:
        values[layer] = v[:, sample]

    def reduce(layer: int, pattern: Tensor) -> None:
        v = per_query_head(values.pop(layer), n_heads).float() - value_bias(model, layer)
        W_O = output_weights(model, layer)
        norm = attention_out_affine(model, layer)
        if norm is not None:
            # its division by a scale changes no score, its weights do
            W_O = W_O * norm[0]
        to_sample = einsum(
            v, W_O, columns, "batch source head d, head d m, batch token m -> batch head source token"
        )
        to_all = einsum(v, W_O @ mean_column, "batch source head d, head d -> batch head source")
        received = pattern[:, :, sample, sample].float().sum(-2)
        for into, which in ((scores, own), (nulls, other)):
            score = measures.copying_score(to_sample, to_all, received, which.to(v.device))
            into[rows, layer] = score.cpu()

    readers: dict[str, Callable[[Tensor], None]] = {}
    for layer in range(model.cfg.n_layers):
        readers[f"blocks.{layer}.attn.hook_v"] = partial(keep_values, layer)
        readers[f"blocks.{layer}.attn.hook_pattern"] = partial(reduce, layer)
    for part in parts(random.tokens):
        rows = slice(rows.stop, rows.stop + len(part))
        # what a source adds to the logits of the sample's tokens, and (above) on average to all
        columns = unembedding.T[part[:, sample].to(unembedding.device)]  # [batch, token, d_model]
        watch(model, part, readers)
    return scores, nulls


def _intervals(scores: Mapping[str, Tensor], confidence: float) -> dict[str, Tensor]:
    return {
        kind: torch.stack(bootstrap_interval(values.flatten(0, 1), confidence=confidence))
        for kind, values in scores.items()
    }
