"""Induction circuits: which previous-token heads feed which induction heads, and the evidence."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Number
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.circuits.composition import composition_scores, k_composition_circuit
from mechlens.analyses.circuits.factors import head_pair
from mechlens.analyses.circuits.ov import OV, full_OV
from mechlens.analyses.circuits.qk import QK
from mechlens.analyses.heads.scores import score_heads
from mechlens.analyses.patching.ablations import ablation_source, check_how
from mechlens.analyses.patching.path import HeadPath, PathRuns
from mechlens.arguments import check_between, check_counts, check_model, check_type, generator_of
from mechlens.errors import ArgumentError
from mechlens.measures.attention import copies_mask, mask_score
from mechlens.measures.statistics import exact_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.properties import check_adds_up, key_value_head, key_value_heads
from mechlens.models.run.sites import SITES, last_hook
from mechlens.models.run.unembedding import check_streamed, token_log_probs
from mechlens.models.weights.rotary import is_rotary
from mechlens.progress import progress_bar
from mechlens.results import Circuit, CompositionScores, HeadScores, InductionCircuits, head_label
from mechlens.results.heads import Head
from mechlens.results.induction_circuits import COUNTED, EVIDENCE, LEAST_LOSS, LEAST_Z, UPPER_SHARE
from mechlens.text.prompts import RandomTokens, RepeatedTokens
from mechlens.text.tokens import own_bos_token_id

INDUCTION, PREVIOUS = "induction_score", "previous_token_score"
N_TOKENS = 2048
"""Tokens to sample: with 95% confidence, a top-1 accuracy is within 0.022 of that over the vocabulary."""
CONFIDENCE = 0.95
TIMES_NULL = 2.0
"""A head is a candidate if its score is at least this many times its null; its pairs are tested further."""

Pair = tuple[Head, Head]
HeadPair = tuple[tuple[int, int], tuple[int, int]]
"""(previous-token head, induction head), checked."""


def find_induction_circuits(
    model: LensModel,
    on: RepeatedTokens | None = None,
    *,
    pairs: Sequence[Pair] | None = None,
    threshold: float = 0.4,
    per_head: int = 3,
    how: str = "mean",
    n_tokens: int | None = N_TOKENS,
    progress: bool | None = None,
) -> InductionCircuits:
    """Find the previous-token heads that feed induction heads, with the evidence for each pair.

    An induction head is a head whose induction score reaches the threshold and twice its null; previous-token
    heads are defined likewise. Each induction head is paired with the previous-token heads in earlier layers
    that have the highest K-composition with it. A pair is a `circuit` if it passes three tests, `in part` if
    it passes behavior and one other, otherwise `no circuit`. Behavior: both scores pass. Weights: the
    K-composition is at least 3 standard deviations above chance and in the top quarter of all earlier heads.
    Cause: ablating the previous-token head in the induction head's keys reduces the induction score by at
    least a tenth.

    Args:
        on: the sequences, with one seed and no jitter; None is 8 sequences of 50 random tokens, repeated. The
            seed is also used to sample the vocabulary and the random weights of the baseline; ablations take
            values from sequences with the next seed.
        pairs: pairs to judge whatever their scores, such as `[("L1H2", "L3H5")]`; None searches.
        threshold: minimum score of both heads, in [0, 1].
        per_head: previous-token heads to try for each induction head.
        how: what replaces an ablated head's output: `mean`, `zero` or `resample`. `zero` depends on
            `load_model`'s `processing`, which moves `b_V` into `b_O`.
        n_tokens: how many tokens to sample for top-1 accuracies; each is compared with the whole vocabulary.
            None takes all. No verdict depends on it.
        progress: show progress bars; None shows them in a terminal and in Jupyter.

    Returns:
        The evidence by pair, strongest induction head first; if no pair is found, `note` explains why. In a
        rotary model, K-composition is computed for a key `seq_len - 1` positions before its query, where a
        perfect induction head finds it. With grouped-query attention, only the pair's own induction head sees
        the ablated keys.

    Raises:
        TypeError: not a head.
        ValueError: pairs that are empty, repeated, or not from an earlier to a later layer; an option out of
            range; sequences that do not fit in the model's context.

    Example:
        >>> on = mechlens.RepeatedTokens(20, batch=2, seeds=[0])
        >>> mechlens.find_induction_circuits(model, on, pairs=[("L1H2", "L3H5")]).verdicts
        ('circuit',)

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
    arXiv:2209.11895; "How one can Interpret GPT2-Small". Path ablation: Wang et al. 2022, arXiv:2211.00593.
    Cost: head scores, K-composition scores, a clean run and a reference run. Products
    `[n_tokens, d_head] @ [d_head, d_vocab]`: one for each induction head, two for each pair. Further runs:
    one from each previous-token head's layer on, and one for each pair from the induction head's layer on
    (full runs on a TransformerBridge).
    """
    on = _sequences(model, on)
    seed = on.seeds[0]
    check_how(how)
    check_counts(per_head=per_head, n_tokens=n_tokens)
    check_between("threshold", threshold, 0, 1)
    chosen = None if pairs is None else _checked(model, pairs)
    random = on.draw(model, seed)
    relative = on.seq_len - 1 if is_rotary(model) else None
    scores = score_heads(model, on, [INDUCTION, PREVIOUS], progress=progress)
    composition = composition_scores(model, "k", relative_position=relative, seed=seed, progress=progress)
    found, note = (chosen, "") if chosen is not None else _pairs(scores, composition, threshold, per_head)
    d_vocab = model.cfg.d_vocab
    counted = _drawn(d_vocab, n_tokens, seed)
    copies = functools.cache(partial(_copies, model, tokens=counted))
    effects = _Effects.of(model, found, on, how) if found else None
    judged = [
        _attends(scores, pair)
        | _composes(model, composition, pair, relative, counted)
        | copies(pair[1])
        | effects.of_pair(pair)
        for pair in progress_bar(found, desc="induction circuits", unit="pair", progress=progress)
        if effects is not None
    ]
    clean = math.nan if effects is None else float(effects.clean_loss.mean())
    verdicts = [
        _verdict(each, clean, threshold, 1 / d_vocab, _zero_weights(model, pair, each, relative))
        for pair, each in zip(found, judged, strict=True)
    ]
    return InductionCircuits(
        model=describe(model),
        pairs=tuple((*one, *other) for one, other in found),
        **_numbers(judged, d_vocab if counted is None else len(counted), d_vocab),
        verdicts=tuple(each[0] for each in verdicts),
        reasons=tuple(each[1] for each in verdicts),
        clean_loss=clean,
        chance=1 / d_vocab,
        confidence=CONFIDENCE,
        tokens=random.tokens,
        seq_len=on.seq_len,
        seed=seed,
        how=how,
        prepend_bos=random.prepend_bos,
        relative_position=relative,
        note=note,
    )


def _sequences(model: LensModel, on: RepeatedTokens | None) -> RepeatedTokens:
    """The sequences, with BOS resolved. Checks for one seed, no jitter and at least two tokens."""
    check_model(model)
    on = RepeatedTokens(batch=8, seeds=[0]) if on is None else on
    check_type("on", on, RepeatedTokens)
    if len(on.seeds) != 1:
        raise ArgumentError("seeds", "a single seed", on.seeds)
    if on.jitter:
        raise ArgumentError("jitter", "0, so that K-composition has one distance", on.jitter)
    if on.seq_len < 2:
        raise ArgumentError("seq_len", "at least 2, so that a token predicts the next", on.seq_len)
    bos = own_bos_token_id(model.tokenizer) is not None if on.prepend_bos is None else on.prepend_bos
    return dataclasses.replace(on, prepend_bos=bos)


# -- which pairs -----------------------------------------------------------------------------------


def _checked(model: LensModel, pairs: Sequence[Pair]) -> list[HeadPair]:
    """The user's pairs, each as two (layer, head)."""
    given = []
    for pair in pairs:
        if isinstance(pair, (str, Number)) or len(pair) != 2 or any(isinstance(one, Number) for one in pair):
            raise ValueError(
                "pairs must be a list of (previous-token head, induction head), such as [('4.11', '5.5')], "
                f"got {pair!r} in it"
            )
        given.append(head_pair(model, *pair))
    if not given or len(set(given)) < len(given):
        raise ArgumentError("pairs", "one or several different pairs, or None to search", list(pairs))
    return given


def _pairs(
    scores: HeadScores, composition: CompositionScores, threshold: float, per_head: int
) -> tuple[list[HeadPair], str]:
    """The pairs to try, or why there are none."""
    induction, previous = (
        [head for head, _ in scores.clear_heads(kind, threshold, TIMES_NULL)]
        for kind in (INDUCTION, PREVIOUS)
    )
    if not induction:
        most = _most(scores, INDUCTION, threshold)
        return [], f"no head has an induction score of at least {threshold:g} and twice its null{most}"
    pairs = []
    for head in induction:
        earlier = [other for other in previous if other[0] < head[0]]
        earlier.sort(key=lambda other: -float(composition.scores[(*other, *head)]))
        pairs += [(other, head) for other in earlier[:per_head]]
    if not pairs:
        names = ", ".join(head_label(*head) for head in induction)
        most = _most(scores, PREVIOUS, threshold, before=max(layer for layer, _ in induction))
        return [], (
            f"no head before the induction heads {names} has a previous-token score of at least "
            f"{threshold:g} and twice its null{most}"
        )
    return pairs, ""


def _most(scores: HeadScores, kind: str, threshold: float, before: int | None = None) -> str:
    """The head with the highest score, with its null if the score alone would pass."""
    ranked = (each for each in scores.ranked(kind) if before is None or each[0][0] < before)
    best = next(ranked, None)
    if best is None:
        return ""
    head, score = best
    null = f", but its null is {float(scores.null(kind)[head]):.3f}" if score >= threshold else ""
    return f"; the highest is {head_label(*head)} with {score:.3f}{null}"


# -- evidence for a pair ---------------------------------------------------------------------------


def _numbers(judged: Sequence[Mapping[str, float]], n_tokens: int, d_vocab: int) -> dict[str, Any]:
    """The result's numeric fields, one number per pair."""
    fields: dict[str, Any] = {
        each.name: torch.tensor([pair[each.name] for pair in judged], dtype=torch.float32)
        for each in EVIDENCE
    }
    intervals = {name: _intervals([each[name] for each in judged], n_tokens, d_vocab) for name in COUNTED}
    return fields | {"n_tokens": n_tokens, "intervals": intervals}


def _attends(scores: HeadScores, pair: HeadPair) -> dict[str, float]:
    previous, induction = pair
    return {
        "induction_score": float(scores.mean(INDUCTION)[induction]),
        "induction_null": float(scores.null(INDUCTION)[induction]),
        "previous_token_score": float(scores.mean(PREVIOUS)[previous]),
        "previous_token_null": float(scores.null(PREVIOUS)[previous]),
    }


def _composes(
    model: LensModel,
    composition: CompositionScores,
    pair: HeadPair,
    relative: int | None,
    tokens: Int[Tensor, " token"] | None,
) -> dict[str, float]:
    """Evidence from the weights of both heads."""
    previous, induction = pair
    circuit = k_composition_circuit(model, previous, induction, relative_position=relative)
    earlier = composition.scores[:, :, induction[0], induction[1]]
    k_score = earlier[previous]
    return {
        "k_score": float(k_score),
        "k_z": float((k_score - composition.baseline_mean) / composition.baseline_std),
        # nan if either head's weights are zero
        "k_rank": math.nan if k_score.isnan() else float((earlier > k_score).sum() + 1),
        "n_earlier": float((~earlier.isnan()).sum()),
        "k_top1_keys": _top_1(circuit, "key", tokens),
        "k_top1_queries": _top_1(circuit, "query", tokens),
    }


def _copies(
    model: LensModel, head: tuple[int, int], *, tokens: Int[Tensor, " token"] | None
) -> dict[str, float]:
    """Evidence from the induction head's OV circuit, the same for all its pairs."""
    writes = full_OV(model, head)
    return {"ov_top1": _top_1(writes, "destination", tokens), "ov_copying": writes.copying_score()}


def _top_1(circuit: Circuit, over: str, tokens: Int[Tensor, " token"] | None) -> float:
    return circuit.top_k_accuracy(1, over, tokens=tokens, ties="against", progress=False)


def _drawn(d_vocab: int, n_tokens: int | None, seed: int) -> Int[Tensor, " token"] | None:
    """The tokens sampled for accuracies; None is all."""
    if n_tokens is None or n_tokens >= d_vocab:
        return None
    return torch.randperm(d_vocab, generator=generator_of(seed))[:n_tokens].sort().values


def _intervals(shares: Sequence[float], n: int, d_vocab: int) -> Float[Tensor, "bound pair"]:
    """Intervals for the shares of the whole vocabulary; exact if all tokens were counted."""
    bounds = [
        (share, share) if n == d_vocab else exact_interval(share, n, confidence=CONFIDENCE)
        for share in shares
    ]
    return torch.tensor(bounds, dtype=torch.float32).reshape(-1, 2).T.contiguous()


def _zero_weights(
    model: LensModel, pair: HeadPair, evidence: Mapping[str, float], relative: int | None
) -> str:
    """Why a pair cannot compose, if a head's weights are zero; otherwise empty."""
    previous, induction = pair
    # a score is nan for no other reason
    if not math.isnan(evidence["k_score"]):
        return ""
    if OV(model, previous).is_zero:
        return f"{head_label(*previous)} writes nothing, because its weights are zero"
    if QK(model, induction, relative_position=relative).is_zero:
        return f"{head_label(*induction)} compares nothing, because its weights are zero"
    return ""


@dataclasses.dataclass(frozen=True, eq=False)
class _Effects:
    """Effects of ablating previous-token heads; all runs share the clean run."""

    model: LensModel
    random: RandomTokens
    runs: PathRuns
    paths: Mapping[HeadPair, HeadPath]
    """The path from each pair's previous-token head to its induction head's keys."""
    clean_loss: Float[Tensor, " sequence"]
    removed: dict[tuple[int, int], dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """Activations of the runs with a previous-token head ablated, shared by all its pairs."""

    @classmethod
    def of(cls, model: LensModel, pairs: Sequence[HeadPair], on: RepeatedTokens, how: str) -> _Effects:
        random = on.draw(model, on.seeds[0])
        check_streamed(model, random.tokens)
        check_adds_up(model, random.tokens)
        paths = {
            (sender, (layer, head)): HeadPath.of(
                model, sender, f"{head_label(layer, key_value_head(model, head))}.k"
            )
            for sender, (layer, head) in pairs
        }
        source = ablation_source(model, how, on)
        runs = PathRuns.of(model, random.tokens, source, list(paths.values()))
        found = cls(model, random, runs, paths, torch.empty(0, dtype=torch.float32))
        return dataclasses.replace(found, clean_loss=found._loss(found._read(runs.runs.clean.final)))

    def of_pair(self, pair: HeadPair) -> dict[str, float]:
        """Induction score and change in loss, with the previous-token head ablated only in the induction
        head's keys, and everywhere."""
        previous, (layer, head) = pair
        pattern, last = SITES["pattern"].format(layer), last_hook(self.model)
        # first, because the path run builds on it
        if previous not in self.removed:
            receivers = {to[0] for sender, to in self.paths if sender == previous}
            wanted = {SITES["pattern"].format(to): lambda activation: activation for to in receivers}
            self.removed[previous] = self.runs.altogether(previous, wanted | {last: self._read})
        removed = self.removed[previous]
        # a key may be shared by a group of heads; the others must attend as before
        shared = key_value_heads(self.model) < self.model.cfg.n_heads
        path = self.runs.through(
            self.paths[pair],
            {pattern: lambda activation: activation[:, head], last: self._read},
            alone=head if shared else None,
        )
        loss_path, loss_removed = (self._loss(each[last]) - self.clean_loss for each in (path, removed))
        return {
            "score_path": self._score(path[pattern]),
            "score_removed": self._score(removed[pattern][:, head]),
            "loss_path": float(loss_path.mean()),
            "loss_path_error": _standard_error(loss_path),
            "loss_removed": float(loss_removed.mean()),
            "loss_removed_error": _standard_error(loss_removed),
        }

    def _read(self, last: Float[Tensor, "sequence pos d_model"]) -> Float[Tensor, "sequence read d_model"]:
        """The positions of the second copy that predict one of its tokens."""
        return last[:, int(self.random.starts[0, 1]) : -1]

    def _loss(self, read: Float[Tensor, "sequence read d_model"]) -> Float[Tensor, " sequence"]:
        following = self.random.tokens[:, -read.shape[1] :]
        with torch.inference_mode():
            log_prob, _ = token_log_probs(self.model, read, following)
        return -log_prob.mean(1).float().cpu()

    def _score(self, pattern: Float[Tensor, "sequence dest src"]) -> float:
        mask = copies_mask(self.random.starts, self.random.seq_len, 1)
        return float(mask_score(pattern.float().cpu()[:, None], mask).mean())


def _standard_error(changes: Float[Tensor, " sequence"]) -> float:
    """Standard error of the mean; nan for a single value."""
    return float(changes.std() / math.sqrt(len(changes))) if len(changes) > 1 else math.nan


def _verdict(
    evidence: Mapping[str, float], clean: float, threshold: float, chance: float, zero_weights: str
) -> tuple[str, str]:
    """A pair's verdict by `VERDICT_RULE`, and the reasons for it.

    Args:
        clean: the loss without ablation.
        zero_weights: why the pair cannot compose; empty if it can.
    """
    said = evidence
    behaves = (
        min(said["induction_score"], said["previous_token_score"]) >= threshold
        and said["induction_score"] >= 2 * said["induction_null"]
        and said["previous_token_score"] >= 2 * said["previous_token_null"]
    )
    # both comparisons are false for nan
    composes = said["k_z"] >= LEAST_Z and said["k_rank"] <= max(1, UPPER_SHARE * said["n_earlier"])
    lost = 1 - said["score_path"] / said["induction_score"] if said["induction_score"] > 0 else 0.0
    causes = lost >= LEAST_LOSS
    reasons = [
        f"behavior: {_yes(behaves)} (induction score {said['induction_score']:.2f}, null "
        f"{said['induction_null']:.2f}; previous-token score {said['previous_token_score']:.2f}, null "
        f"{said['previous_token_null']:.2f})",
        f"weights: {_yes(composes)} ("
        + (
            zero_weights
            or f"K-composition {said['k_z']:+.1f} standard deviations above chance, rank "
            f"{said['k_rank']:.0f} of {said['n_earlier']:.0f}; {said['k_top1_keys']:.3f} of tokens match "
            f"themselves, chance {chance:.2g}"
        )
        + ")",
        f"cause: {_yes(causes)} (with the previous-token head ablated in the keys, the induction score is "
        f"{said['score_path']:.2f} instead of {said['induction_score']:.2f}, and the loss "
        f"{clean + said['loss_path']:.2f} nats instead of {clean:.2f}; ablated everywhere, "
        f"{said['score_removed']:.2f} and {clean + said['loss_removed']:.2f})",
    ]
    if behaves and composes and causes:
        verdict = "circuit"
    else:
        verdict = "in part" if behaves and (composes or causes) else "no circuit"
    return verdict, "; ".join(reasons)


def _yes(test: bool) -> str:
    return "yes" if test else "no"
