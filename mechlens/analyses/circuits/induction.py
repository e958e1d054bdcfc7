"""Induction circuits: which previous-token heads feed which induction heads, by behaviour, weights and
cause."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Number

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
from mechlens.arguments import check_between, check_counts, generator_of
from mechlens.measures.attention import copies_mask, mask_score
from mechlens.measures.statistics import exact_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.properties import check_adds_up, key_value_head, key_value_heads
from mechlens.models.run.sites import SITES, last_hook
from mechlens.models.run.unembedding import check_streamed, token_log_probs
from mechlens.models.weights.rotary import is_rotary
from mechlens.progress import progress_bar
from mechlens.results import Circuit, CompositionScores, HeadScores, InductionCircuits, head_label
from mechlens.results.induction_circuits import COUNTED, LEAST_FALL, LEAST_Z, UPPER_SHARE
from mechlens.text.prompts import RandomTokens, RepeatedTokens, repeated_tokens
from mechlens.text.tokens import own_bos_token_id

INDUCTION, PREVIOUS = "induction_score", "previous_token_score"
N_TOKENS = 2048
"""Of the vocabulary, over which top-1 accuracies are counted: in 95 draws of 100 one is then at most 0.022
off."""
CONFIDENCE = 0.95
TIMES_NULL = 2.0
"""The multiple of its null from which a head is a candidate; the tests of its pairs are stricter."""

Pair = tuple[str | tuple[int, int], str | tuple[int, int]]
Heads = tuple[tuple[int, int], tuple[int, int]]
"""(previous-token head, induction head), checked."""


def find_induction_circuits(
    model: LensModel,
    *,
    pairs: Sequence[Pair] | None = None,
    threshold: float = 0.4,
    per_head: int = 3,
    seq_len: int = 50,
    batch: int = 8,
    seed: int = 0,
    how: str = "mean",
    n_tokens: int | None = N_TOKENS,
    prepend_bos: bool | None = None,
    progress: bool | None = None,
) -> InductionCircuits:
    """Find the previous-token heads that induction heads work with, and say what speaks for each pair.

    Induction heads are those whose induction score reaches the threshold and twice their null; for each of
    them the previous-token heads of earlier layers (by the same rule) that K-compose with it most strongly
    are tried. A pair is a `circuit` where behaviour, weights and cause all speak for it, `in part` where
    behaviour and one of the others do, and `no circuit` otherwise. Behaviour: both scores by that rule.
    Weights: a K-composition at least 3 standard deviations over chance that is in the upper quarter of those
    of all earlier heads (the highest, where these are fewer than 8). Cause: at least a tenth of the induction
    score is lost when the previous-token head is ablated as the induction head's keys see it.

    Args:
        pairs: (previous-token head, induction head) to be judged whatever they score; None looks for them.
        threshold: of both scores, in [0, 1].
        per_head: previous-token heads that are tried for each induction head.
        seq_len: random tokens in one copy; the model reads BOS, the copy and the same again.
        batch: sequences.
        seed: of the sequences, of the tokens that are counted and of the weights that give composition its
            baseline; the sequences that heads are ablated with have the next one.
        how: `mean`, `zero` or `resample`: what takes an ablated head's place, as for `ablate_heads`. With
            `zero` the figures depend on `load_model`'s `processing`, which moves `b_V` into `b_O`: a
            processed model keeps it when `z` is zero, and a raw one loses it.
        n_tokens: how many tokens top-1 accuracies are counted over, drawn from the vocabulary; what each of
            them is held against is the whole vocabulary. None counts all. No verdict depends on it.
        prepend_bos: None prepends BOS where the tokenizer has one.
        progress: show bars; None shows them in a terminal and in Jupyter.

    Returns:
        The evidence by pair, those of the strongest induction head first. Of a rotary model the K-composition
        is that of a key `seq_len - 1` positions before its query, where a perfect induction head finds it. No
        pair where nothing scores: `note` says what is missing. What is lost through the keys is lost by the
        induction head alone, also where it shares them with others (grouped-query attention).

    Raises:
        TypeError: a head that is no text and no pair of whole numbers.
        ValueError: pairs that are none, or come twice, or whose first head is not in an earlier layer; an
            option out of range, or sizes that do not fit the model.

    Source: Elhage et al. 2021; Olsson et al. 2022, arXiv:2209.11895; "How one can Interpret GPT2-Small". Path
    ablation: Wang et al. 2022, arXiv:2211.00593.
    Cost: head scores and all K-composition scores; a clean run and a reference run. For each induction head
    one product `[n_tokens, d_head] @ [d_head, d_vocab]`, for each pair two; for each previous-token head a
    run from its layer on, for each pair a block and a run from the induction head's layer on. Where a run
    cannot begin in the middle (a bridge, hooks of the user's) each of these is a whole run.
    """
    check_how(how)
    check_counts(per_head=per_head, n_tokens=n_tokens)
    check_between("threshold", threshold, 0, 1)
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, so that a token predicts the next; it is {seq_len}")
    info = describe(model)
    bos = own_bos_token_id(model.tokenizer) is not None if prepend_bos is None else prepend_bos
    given = None if pairs is None else _given(model, pairs)
    random = repeated_tokens(model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=bos)
    relative = seq_len - 1 if is_rotary(model) else None
    scores = score_heads(
        model,
        RepeatedTokens(seq_len, batch, [seed], prepend_bos=bos),
        [INDUCTION, PREVIOUS],
        progress=progress,
    )
    composition = composition_scores(model, "k", relative_position=relative, seed=seed, progress=progress)
    found, note = (given, "") if given is not None else _pairs(scores, composition, threshold, per_head)
    counted = _drawn(info.d_vocab, n_tokens, seed)
    copies = functools.cache(partial(_copies, model, tokens=counted))
    effects = _Effects.of(model, found, random, how) if found else None
    judged = [
        _attends(scores, pair)
        | _composes(model, composition, pair, relative, counted)
        | copies(pair[1])
        | effects.of_pair(pair)
        for pair in progress_bar(found, desc="induction circuits", unit="pair", progress=progress)
        if effects is not None
    ]
    n_counted = info.d_vocab if counted is None else len(counted)
    chance = 1 / info.d_vocab
    clean = math.nan if effects is None else float(effects.clean_loss.mean())
    verdicts = [
        # a score is nan for no other reason
        _verdict(
            each,
            clean,
            threshold,
            chance,
            _idle(model, pair, relative) if math.isnan(each["k_score"]) else "",
        )
        for pair, each in zip(found, judged, strict=True)
    ]
    return InductionCircuits(
        model=info,
        pairs=tuple((*one, *other) for one, other in found),
        evidence={
            name: torch.tensor([each[name] for each in judged], dtype=torch.float32) for name in _NAMES
        },
        verdicts=tuple(verdict for verdict, _ in verdicts),
        reasons=tuple(reasons for _, reasons in verdicts),
        clean_loss=clean,
        chance=chance,
        n_tokens=n_counted,
        intervals={
            name: _intervals([each[name] for each in judged], n_counted, info.d_vocab) for name in COUNTED
        },
        confidence=CONFIDENCE,
        tokens=random.tokens,
        seq_len=seq_len,
        seed=seed,
        how=how,
        prepend_bos=bos,
        relative_position=relative,
        note=note,
    )


# -- which pairs -----------------------------------------------------------------------------------


def _given(model: LensModel, pairs: Sequence[Pair]) -> list[Heads]:
    """The pairs that a user gave, checked."""
    asked = []
    for pair in pairs:
        if isinstance(pair, (str, Number)) or len(pair) != 2 or any(isinstance(one, Number) for one in pair):
            raise ValueError(
                "pairs is a list of pairs (previous-token head, induction head), such as [('4.11', '5.5')], "
                f"but there is {pair!r} in it"
            )
        asked.append(head_pair(model, *pair))
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(
            f"pairs must be one or several different ones, but are {list(pairs)!r}: None looks for them"
        )
    return asked


def _pairs(
    scores: HeadScores, composition: CompositionScores, threshold: float, per_head: int
) -> tuple[list[Heads], str]:
    """The pairs that are worth trying, or why there is none."""
    induction, previous = (
        [head for head, _ in scores.clear_heads(kind, threshold, TIMES_NULL)]
        for kind in (INDUCTION, PREVIOUS)
    )
    if not induction:
        most = _most(scores, INDUCTION, threshold)
        return [], f"no head has an induction score of {threshold:g} and of twice its null{most}"
    pairs = []
    for head in induction:
        earlier = [other for other in previous if other[0] < head[0]]
        earlier.sort(key=lambda other: -float(composition.scores[(*other, *head)]))
        pairs += [(other, head) for other in earlier[:per_head]]
    if not pairs:
        names = ", ".join(head_label(*head) for head in induction)
        most = _most(scores, PREVIOUS, threshold, before=max(layer for layer, _ in induction))
        return [], (
            f"no head before the induction heads {names} has a previous-token score of {threshold:g} and of "
            f"twice its null{most}"
        )
    return pairs, ""


def _most(scores: HeadScores, kind: str, threshold: float, before: int | None = None) -> str:
    """Which head has most of a score, and its null where that is what it fails by."""
    ranked = (each for each in scores.ranked(kind) if before is None or each[0][0] < before)
    best = next(ranked, None)
    if best is None:
        return ""
    head, score = best
    null = f", but its null is {float(scores.null(kind)[head]):.3f}" if score >= threshold else ""
    return f"; the highest is {head_label(*head)} with {score:.3f}{null}"


# -- what speaks for a pair ------------------------------------------------------------------------

_NAMES = (
    "induction_score",
    "induction_null",
    "previous_token_score",
    "previous_token_null",
    "k_score",
    "k_z",
    "k_rank",
    "n_earlier",
    "k_top1_keys",
    "k_top1_queries",
    "ov_top1",
    "ov_copying",
    "score_path",
    "score_removed",
    "loss_path",
    "loss_path_error",
    "loss_removed",
    "loss_removed_error",
)


def _attends(scores: HeadScores, pair: Heads) -> dict[str, float]:
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
    pair: Heads,
    relative: int | None,
    tokens: Int[Tensor, " token"] | None,
) -> dict[str, float]:
    """What the two heads' weights say together."""
    previous, induction = pair
    circuit = k_composition_circuit(model, previous, induction, relative_position=relative)
    earlier = composition.scores[:, :, induction[0], induction[1]]
    k_score = earlier[previous]
    return {
        "k_score": float(k_score),
        "k_z": float((k_score - composition.baseline_mean) / composition.baseline_std),
        # nan where either head's weights are zero
        "k_rank": math.nan if k_score.isnan() else float((earlier > k_score).sum() + 1),
        "n_earlier": float((~earlier.isnan()).sum()),
        "k_top1_keys": _top_1(circuit, "key", tokens),
        "k_top1_queries": _top_1(circuit, "query", tokens),
    }


def _copies(
    model: LensModel, head: tuple[int, int], *, tokens: Int[Tensor, " token"] | None
) -> dict[str, float]:
    """What the induction head's weights say of what it writes; the same for all its pairs."""
    writes = full_OV(model, head)
    return {
        "ov_top1": _top_1(writes, "destination", tokens),
        "ov_copying": writes.copying_score(),
    }


def _top_1(circuit: Circuit, over: str, tokens: Int[Tensor, " token"] | None) -> float:
    return circuit.top_k_accuracy(1, over, tokens=tokens, ties="against", progress=False)


def _drawn(d_vocab: int, n_tokens: int | None, seed: int) -> Int[Tensor, " token"] | None:
    """The tokens that accuracies are counted over; None is all of them."""
    if n_tokens is None or n_tokens >= d_vocab:
        return None
    return torch.randperm(d_vocab, generator=generator_of(seed))[:n_tokens].sort().values


def _intervals(shares: Sequence[float], n: int, d_vocab: int) -> Float[Tensor, "bound pair"]:
    """Where the shares of the whole vocabulary lie; a share of all tokens has no doubt in it."""
    bounds = [
        (share, share) if n == d_vocab else exact_interval(share, n, confidence=CONFIDENCE)
        for share in shares
    ]
    return torch.tensor(bounds, dtype=torch.float32).reshape(-1, 2).T.contiguous()


def _idle(model: LensModel, pair: Heads, relative: int | None) -> str:
    """Why a pair cannot compose, where a head's weights are zero; else empty."""
    previous, induction = pair
    if OV(model, previous).is_zero:
        return f"{head_label(*previous)} writes nothing, its weights are zero"
    if QK(model, induction, relative_position=relative).is_zero:
        return f"{head_label(*induction)} compares nothing, its weights are zero"
    return ""


@dataclasses.dataclass(frozen=True, eq=False)
class _Effects:
    """What is lost without the previous-token heads, in runs that share their clean part."""

    model: LensModel
    random: RandomTokens
    runs: PathRuns
    paths: Mapping[Heads, HeadPath]
    """To the keys of each pair's induction head."""
    clean_loss: Float[Tensor, " sequence"]
    removed: dict[tuple[int, int], dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """By previous-token head, activations of the runs without it, which are the same for all its pairs."""

    @classmethod
    def of(cls, model: LensModel, pairs: Sequence[Heads], random: RandomTokens, how: str) -> _Effects:
        check_streamed(model, random.tokens)
        check_adds_up(model, random.tokens)
        paths = {
            (sender, (layer, head)): HeadPath.of(
                model, sender, f"{head_label(layer, key_value_head(model, head))}.k"
            )
            for sender, (layer, head) in pairs
        }
        on = RepeatedTokens(
            random.seq_len, len(random.tokens), seeds=[random.seed], prepend_bos=random.prepend_bos
        )
        source = ablation_source(model, how, on)
        runs = PathRuns.of(model, random.tokens, source, list(paths.values()))
        found = cls(model, random, runs, paths, torch.empty(0, dtype=torch.float32))
        return dataclasses.replace(found, clean_loss=found._loss(found._read(runs.runs.clean.final)))

    def of_pair(self, pair: Heads) -> dict[str, float]:
        """The induction score and the loss without the previous-token head: through the induction head's keys
        alone, and altogether."""
        previous, (layer, head) = pair
        pattern, last = SITES["pattern"].format(layer), last_hook(self.model)
        # before the path is run, which goes on from this
        if previous not in self.removed:
            receivers = {to[0] for sender, to in self.paths if sender == previous}
            wanted = {SITES["pattern"].format(to): lambda activation: activation for to in receivers}
            self.removed[previous] = self.runs.altogether(previous, wanted | {last: self._read})
        removed = self.removed[previous]
        # its key may be that of a whole group of heads, which are to attend as they did
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
        """At the positions of the second copy that predict a token of it."""
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
    """Of their mean; nan of a single one."""
    return float(changes.std() / math.sqrt(len(changes))) if len(changes) > 1 else math.nan


def _verdict(
    evidence: Mapping[str, float], clean: float, threshold: float, chance: float, idle: str
) -> tuple[str, str]:
    """A pair's verdict, and the reasons for it.

    Args:
        clean: the loss without any ablation.
        idle: why the pair cannot compose, where it cannot; else empty.
    """
    said = evidence
    behaves = (
        min(said["induction_score"], said["previous_token_score"]) >= threshold
        and said["induction_score"] >= 2 * said["induction_null"]
        and said["previous_token_score"] >= 2 * said["previous_token_null"]
    )
    # of one that is nan, both are false
    composes = said["k_z"] >= LEAST_Z and said["k_rank"] <= max(1, UPPER_SHARE * said["n_earlier"])
    lost = 1 - said["score_path"] / said["induction_score"] if said["induction_score"] > 0 else 0.0
    causes = lost >= LEAST_FALL
    reasons = [
        f"{'attends' if behaves else 'does not attend'} as a circuit does (induction "
        f"{said['induction_score']:.2f}, null {said['induction_null']:.2f}; previous token "
        f"{said['previous_token_score']:.2f}, null {said['previous_token_null']:.2f})",
        idle
        or f"K-composition {said['k_z']:+.1f} standard deviations over chance, rank {said['k_rank']:.0f} of "
        f"{said['n_earlier']:.0f}; matches {said['k_top1_keys']:.3f} of the tokens with themselves (chance "
        f"{chance:.2g})",
        f"without the previous-token head in the keys the induction score is {said['score_path']:.2f} "
        f"instead of {said['induction_score']:.2f}, and the loss {clean + said['loss_path']:.2f} nats "
        f"instead of {clean:.2f}; without it at all they are {said['score_removed']:.2f} and "
        f"{clean + said['loss_removed']:.2f}",
    ]
    if behaves and composes and causes:
        verdict = "circuit"
    else:
        verdict = "in part" if behaves and (composes or causes) else "no circuit"
    return verdict, "; ".join(reasons)
