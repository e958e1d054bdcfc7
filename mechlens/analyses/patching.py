"""Patching and ablation: what a run's prediction owes to one of its activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.measures.metrics import Unembedding
from mechlens.models.protocol import LensModel, describe
from mechlens.models.runs import check_tokens, final_norm, reads_as_streamed, soft_cap, watch
from mechlens.models.sweeps import SITES, Patches, is_safe, sweep
from mechlens.prompts import (
    chosen,
    own_bos_token_id,
    prompt_tokens,
    repeated_tokens,
    target_id,
    token_strings,
)
from mechlens.results import PatchGridResult

METRICS = ("loss", "log_prob", "logit_diff", "kl")
PER_HEAD = ("q", "k", "v", "z", "pattern", "attn_scores")
_ATTENTION = ("pattern", "attn_scores")
_KEY_VALUE = ("k", "v")
_PLAIN = "every patch was a whole run: this model cannot be resumed in the middle of a prompt"

Metric = str | Callable[[Float[Tensor, "read d_vocab"]], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Earlier:
    """Patch with what stands `shift` positions earlier in the same run."""

    shift: int


@dataclasses.dataclass(frozen=True, eq=False)
class Corrupted:
    """Patch with a run on other tokens."""

    tokens: Int[Tensor, "*prompt pos"] | str


@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
    """Patch with the mean over a reference set of sequences, position by position."""

    tokens: Int[Tensor, "reference pos"]


@dataclasses.dataclass(frozen=True, eq=False)
class Resampled:
    """Patch each prompt with a sequence drawn from a reference set."""

    tokens: Int[Tensor, "reference pos"]
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class NextEmbedding:
    """Patch with the embedding of the token that really follows: what do later layers do when told?"""


Source = str | Earlier | Corrupted | Mean | Resampled | NextEmbedding | Callable[[Tensor, int], Tensor]
_Values = Callable[[int], Float[Tensor, "pos *rest"]]
"""By layer: what is put at each position of the site (of scores and patterns: `[dest, head, src]`)."""


def patch_grid(
    model: LensModel,
    prompt: str | Int[Tensor, "*prompt pos"],
    *,
    site: str,
    source: Source,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | str | None = None,
    positions: Sequence[int] | str | None = "each",
    weight: float = 1.0,
    metric: Metric = "loss",
    read: Sequence[int] | None = None,
    targets: str | int | Int[Tensor, "*prompt pos"] | None = None,
    against: str | int | Int[Tensor, "*prompt pos"] | None = None,
    direction: str = "noising",
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    progress: bool = False,
) -> PatchGridResult:
    """Patch one activation at a time, in a run of its own each, and measure what becomes of the prediction.

    Args:
        prompt: a text, or token ids, one sequence or several of one length.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or by head `q`, `k`, `v` (the
            key/value heads, where there are fewer), `z`, `pattern` or `attn_scores` (by position `dest`).
        source: what is put there: `"zero"` (for `attn_scores`: minus infinity, which knocks edges out),
            `Earlier(shift)`, `Corrupted(tokens)`, `Mean(tokens)`, `Resampled(tokens, seed)`,
            `NextEmbedding()` (residual streams only), or a function `(activation [pos, ...], layer) ->` the
            same shape, of each prompt's own activation.
        layers: None patches each layer.
        heads: `"each"` or some of them patches head by head; None patches all heads together.
        positions: `"each"` or some of them patches position by position; None patches all together.
        weight: how much of the source is mixed in; 1 replaces.
        metric: `loss` (the next token's, nats), `log_prob` and `logit_diff` (of `targets`, less that of
            `against`), `kl`, KL(clean || patched) in nats, each a mean over `read`; or a function of logits
            `[read, d_vocab]` that gives one number.
        read: the positions whose predictions count; None is all for `loss` and `kl` that have a next token,
            and the last for the others.
        targets: for `log_prob` and `logit_diff`: one token, or one for each position; None is the next token
            for `log_prob`.
        against: for `logit_diff`.
        direction: `noising` patches the run on `prompt` with the source; `denoising` patches the `Corrupted`
            run with what the run on `prompt` has. The metric is about `prompt`'s tokens in both.
        prepend_bos: for a text: None prepends BOS where the tokenizer has one.
        token_budget: positions (rows x length) that run together; it is halved when memory runs out.
        progress: show a bar.

    Returns:
        The metric of each patched run, with the clean (and the corrupted) run's.

    Raises:
        ValueError: a site, layer, head or position that is not there, sequences of other lengths, a metric
            that does not give one number, a denoising without a corrupted run; before anything is run.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; the article "How one can
    Interpret GPT2-Small".
    Cost: on HookedTransformer what lies behind each patch, in layers and positions; on a bridge what lies
    behind it in positions, through all layers. Three runs for each prompt, and what the source needs.
    """
    info = describe(model)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    check_tokens(model, tokens)
    n_pos = tokens.shape[1]
    grid = _Grid.of(model, site, layers, heads, positions, n_pos)
    read_at = _read(metric, read, n_pos)
    _check_source(model, source, site, tokens, direction)
    judge = _Judge.of(model, metric, tokens, read_at, targets, against)
    if not reads_as_streamed(model, tokens[:1, :8]):
        raise ValueError(
            "this model's logits are more than its last norm, W_U, b_U and a soft-cap: patched runs would be "
            "judged by something else"
        )
    other = _other_tokens(model, source, tokens)
    base = other if direction == "denoising" and other is not None else tokens
    fast = is_safe(model, tokens[:1])
    values = torch.empty(len(tokens), *grid.shape)
    clean, corrupted = torch.empty(len(tokens)), torch.full((len(tokens),), torch.nan)
    bar = tqdm(total=values.numel(), desc=f"patch {site}", unit="run", disable=not progress)
    try:
        for index in range(len(tokens)):
            one = tokens[index : index + 1]
            finals = _final(model, one)
            judge.begin(index, finals)
            clean[index] = judge.of_run(finals)
            own = base[index : index + 1]
            if other is not None:
                other_final = _final(model, other[index : index + 1])
                corrupted[index] = judge.of_run(other_final)
                finals = finals if base is tokens else other_final
            given = one if base is not tokens or other is None else other[index : index + 1]
            replacement = _values(model, source, site, given, index, grid.layers)
            patches = grid.patches(site, replacement, weight)
            flat = values[index].view(-1)
            for part in sweep(
                model, own, patches, token_budget=token_budget, last_read=max(read_at), fast=fast
            ):
                flat[part.which] = judge.of_rows(part.final, part.start, finals).cpu()
                bar.update(len(part.which))
    finally:
        bar.close()
    bos = own_bos_token_id(model.tokenizer)
    return PatchGridResult(
        model=info,
        tokens=tokens,
        site=site,
        source=_named(source),
        weight=weight,
        direction=direction,
        axes=grid.axes,
        layers=grid.layers,
        heads=grid.heads or (),
        positions=grid.positions or (),
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__),
        read=read_at,
        values=values,
        clean=clean,
        corrupted=corrupted,
        strings=token_strings(model, tokens[0]),
        seed=source.seed if isinstance(source, Resampled) else None,
        prepend_bos=bos is not None and bool((tokens[:, 0] == bos).all()),
        note="" if fast else _PLAIN,
    )


def ablate_mlps_from_first_half(
    model: LensModel,
    *,
    seq_len: int = 50,
    batch: int = 1,
    seed: int = 0,
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    progress: bool = False,
) -> PatchGridResult:
    """Replace each MLP's output at each position of the second copy by what it was in the first.

    Args:
        seq_len: random tokens in one copy; the model reads BOS, the copy and the same again.
        batch: sequences.
        seed: of the sequences.

    Returns:
        A grid of layer x position of the second copy. The metric is the mean loss of what the second copy's
        tokens predict, nats.

    Raises:
        ValueError: a model without MLPs, or sizes that do not fit the model.

    Source: the article "How one can Interpret GPT2-Small", "How do MLP layers attribute?".
    Cost: as `patch_grid`.
    """
    random = repeated_tokens(model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=prepend_bos)
    second = range(int(random.starts[0, 1]), random.tokens.shape[1])
    return patch_grid(
        model,
        random.tokens,
        site="mlp_out",
        source=Earlier(seq_len),
        positions=second,
        read=second[:-1],
        token_budget=token_budget,
        progress=progress,
    )


def ablate_heads(
    model: LensModel,
    *,
    how: str = "mean",
    seq_len: int = 50,
    batch: int = 4,
    seed: int = 0,
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    progress: bool = False,
) -> PatchGridResult:
    """Remove each attention head's output, at all positions, and measure the loss on the second copy.

    Args:
        how: `zero`; `mean`, the head's mean over other random sequences, position by position; `resample`,
            its output on another random sequence.
        seq_len: random tokens in one copy; the model reads BOS, the copy and the same again.
        batch: sequences.
        seed: of the sequences; those that heads are replaced from have the next one.

    Returns:
        A grid of layer x head. The metric is the mean loss of what the second copy's tokens predict, nats:
        the heads that continue the copy have the largest effect.

    Raises:
        ValueError: another `how`, or sizes that do not fit the model.

    Cost: as `patch_grid`: a run from its own layer on for each head and sequence.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how must be zero, mean or resample, but is {how!r}")
    random = repeated_tokens(model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=prepend_bos)
    draw = partial(repeated_tokens, model, seq_len=seq_len, prepend_bos=prepend_bos)
    source: Source = "zero"
    if how == "mean":
        source = Mean(draw(batch=32, seed=seed + 1).tokens)
    elif how == "resample":
        source = Resampled(draw(batch=batch, seed=seed + 1).tokens, seed=seed)
    second = range(int(random.starts[0, 1]), random.tokens.shape[1])
    return patch_grid(
        model,
        random.tokens,
        site="z",
        source=source,
        heads="each",
        positions=None,
        read=second[:-1],
        token_budget=token_budget,
        progress=progress,
    )


# -- which runs ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Grid:
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    positions: tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        model: LensModel,
        site: str,
        layers: Sequence[int] | None,
        heads: Sequence[int] | str | None,
        positions: Sequence[int] | str | None,
        n_pos: int,
    ) -> _Grid:
        if site not in SITES:
            raise ValueError(f"site must be one of {', '.join(SITES)}, but is {site!r}")
        if site == "mlp_out" and getattr(model.cfg, "attn_only", False):
            raise ValueError("this model has no MLPs, so there is no mlp_out to patch")
        if SITES[site].format(0) not in model.hook_dict:
            raise ValueError(f"this model has no {site}: its attention and MLP read the same stream")
        if heads is not None and site not in PER_HEAD:
            raise ValueError(f"heads are for {', '.join(PER_HEAD)}, but site is {site!r}")
        n_heads = model.cfg.n_heads
        if site in _KEY_VALUE:
            n_heads = getattr(model.cfg, "n_key_value_heads", None) or n_heads
        return cls(
            chosen("layer", layers, model.cfg.n_layers),
            None if heads is None else chosen("head", None if isinstance(heads, str) else heads, n_heads),
            None
            if positions is None
            else chosen("position", None if isinstance(positions, str) else positions, n_pos),
        )

    @property
    def axes(self) -> tuple[str, ...]:
        heads, positions = ("head",) * (self.heads is not None), ("pos",) * (self.positions is not None)
        return ("layer", *heads, *positions)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(each) for each in (self.layers, self.heads, self.positions) if each is not None)

    def patches(self, site: str, values: _Values, weight: float) -> Patches:
        cells = torch.cartesian_prod(
            torch.tensor(self.layers),
            torch.tensor(self.heads if self.heads is not None else (-1,)),
            torch.tensor(self.positions if self.positions is not None else (-1,)),
        ).view(-1, 3)
        whole, every = slice(None), cells.tolist()

        def write(activation: Tensor, which: Tensor, start: int) -> Tensor:
            replacement = values(every[int(which[0])][0]).to(activation)
            # by position, head and the rest, wherever the site has its heads
            view = activation.movedim(1, 2) if site in _ATTENTION else activation
            for row, index in enumerate(which.tolist()):
                _, head, position = every[index]
                here = whole if position < 0 else position - start
                there = slice(start, start + view.shape[1]) if position < 0 else position
                one = (here,) if head < 0 else (here, head)
                put = replacement[(there,) if head < 0 else (there, head)]
                put = put[..., : view.shape[-1]]
                # exactly, where the source replaces: what is not mixed is not rounded
                view[(row, *one)] = put if weight == 1 else view[(row, *one)].lerp(put, weight)
            return activation

        return Patches(site, cells[:, 0], cells[:, 2].clamp(min=0), write)


# -- what is put there -----------------------------------------------------------------------------


def _check_source(
    model: LensModel, source: Source, site: str, tokens: Int[Tensor, "prompt pos"], direction: str
) -> None:
    if direction not in ("noising", "denoising"):
        raise ValueError(f"direction must be noising or denoising, but is {direction!r}")
    if direction == "denoising" and not isinstance(source, Corrupted):
        raise ValueError("denoising restores a corrupted run: give source=Corrupted(tokens)")
    if isinstance(source, str) and source != "zero":
        raise ValueError(
            "source must be 'zero', Earlier, Corrupted, Mean, Resampled, NextEmbedding or a function, but is "
            f"{source!r}"
        )
    if isinstance(source, Earlier) and not 0 < source.shift < tokens.shape[1]:
        raise ValueError(
            f"Earlier(shift) must lie between 1 and {tokens.shape[1] - 1} for {tokens.shape[1]} tokens, but "
            f"is {source.shift}"
        )
    if isinstance(source, NextEmbedding) and not site.startswith("resid"):
        raise ValueError(f"an embedding belongs into the residual stream, but site is {site!r}")
    if isinstance(source, (Mean, Resampled)):
        check_tokens(model, source.tokens)
        if source.tokens.shape[1] != tokens.shape[1]:
            raise ValueError(
                f"the reference sequences have {source.tokens.shape[1]} tokens, the prompt has "
                f"{tokens.shape[1]}: they must be equally long"
            )
    if isinstance(source, Corrupted):
        _other_tokens(model, source, tokens)


def _other_tokens(
    model: LensModel, source: Source, tokens: Int[Tensor, "prompt pos"]
) -> Int[Tensor, "prompt pos"] | None:
    """The corrupted prompts, one for each prompt."""
    if not isinstance(source, Corrupted):
        return None
    other = prompt_tokens(model, source.tokens)
    check_tokens(model, other)
    if other.shape[1] != tokens.shape[1] or len(other) not in (1, len(tokens)):
        raise ValueError(
            f"the corrupted tokens are {tuple(other.shape)}, but the prompt's are {tuple(tokens.shape)}: "
            "give one sequence of the same length, or one for each prompt"
        )
    return other.expand(len(tokens), -1)


def _named(source: Source) -> str:
    if isinstance(source, str):
        return source
    if isinstance(source, Earlier):
        return f"{source.shift} positions earlier"
    if isinstance(source, (Corrupted, Mean, Resampled, NextEmbedding)):
        return type(source).__name__.lower()
    return str(getattr(source, "__name__", type(source).__name__))


def _values(
    model: LensModel,
    source: Source,
    site: str,
    given: Int[Tensor, "1 pos"],
    index: int,
    layers: Sequence[int],
) -> _Values:
    """What is put into the patched run of prompt `index`.

    Args:
        given: the run that values are taken from, where the source has no tokens of its own.
    """
    at = _by_layer(model, site, layers)
    if isinstance(source, Mean):
        means = {layer: activation.mean(0) for layer, activation in at(source.tokens).items()}
        return lambda layer: means[layer]
    if isinstance(source, Resampled):
        order = torch.randperm(len(source.tokens), generator=torch.Generator().manual_seed(source.seed))
        drawn = int(order[index % len(order)])
        given = source.tokens[drawn : drawn + 1]
    if isinstance(source, NextEmbedding):
        following = model.W_E[given[0].roll(-1).to(model.W_E.device)].detach()
        return lambda layer: following
    kept = at(given)
    if isinstance(source, (Corrupted, Resampled)):
        return lambda layer: kept[layer][0]
    if source == "zero":
        void = -torch.inf if site == "attn_scores" else 0.0
        return lambda layer: torch.full_like(kept[layer][0], void)
    if isinstance(source, Earlier):
        shift = source.shift
        # the first positions have nothing so far before them: they stay as they are
        return lambda layer: torch.cat([kept[layer][0, :shift], kept[layer][0, :-shift]])
    assert callable(source)
    return lambda layer: source(kept[layer][0].clone(), layer)


def _by_layer(
    model: LensModel, site: str, layers: Sequence[int]
) -> Callable[[Int[Tensor, "row pos"]], dict[int, Tensor]]:
    """A run's activations at a site, `[row, pos, ...]` by layer."""

    def run(tokens: Int[Tensor, "row pos"]) -> dict[int, Tensor]:
        kept: dict[int, Tensor] = {}

        def keep(activation: Tensor, layer: int) -> None:
            kept[layer] = activation.movedim(1, 2) if site in _ATTENTION else activation

        watch(model, tokens, {SITES[site].format(layer): partial(keep, layer=layer) for layer in layers})
        return kept

    return run


# -- how it is judged ------------------------------------------------------------------------------


def _read(metric: Metric, read: Sequence[int] | None, n_pos: int) -> tuple[int, ...]:
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)} or a function, but is {metric!r}")
    if n_pos < 2 and metric == "loss":
        raise ValueError("a single token has no loss: it predicts nothing that is known")
    if read is None:
        return tuple(range(n_pos - 1)) if metric in ("loss", "kl") else (n_pos - 1,)
    found = tuple(sorted(chosen("position", read, n_pos)))
    if metric == "loss" and found[-1] == n_pos - 1:
        raise ValueError(f"position {n_pos - 1} is the last: no token follows whose loss it could have")
    return found


@dataclasses.dataclass(eq=False)
class _Judge:
    """The metric, of runs given by what their logits are read from."""

    model: LensModel
    unembedding: Unembedding
    metric: Metric
    read: Tensor
    targets: Int[Tensor, "prompt read"] | None
    against: Int[Tensor, "prompt read"] | None
    prompt: int = 0
    clean: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: LensModel,
        metric: Metric,
        tokens: Int[Tensor, "prompt pos"],
        read: Sequence[int],
        targets: Any,
        against: Any,
    ) -> _Judge:
        at = torch.tensor(read)
        if targets is not None and metric not in ("log_prob", "logit_diff"):
            raise ValueError(f"targets are for log_prob and logit_diff, but metric is {metric!r}")
        if (against is not None) != (metric == "logit_diff"):
            raise ValueError("logit_diff needs targets and against; no other metric has an against")
        if metric == "logit_diff" and targets is None:
            raise ValueError("logit_diff needs targets and against")
        ids = _ids(model, targets, tokens, "targets")
        if ids is None and metric in ("loss", "log_prob"):
            if int(at.max()) == tokens.shape[1] - 1:
                raise ValueError(
                    f"position {tokens.shape[1] - 1} is the last, and no token follows it: give targets, or "
                    "other positions to read"
                )
            ids = tokens.roll(-1, 1)
        other = _ids(model, against, tokens, "against")
        if not isinstance(metric, str):
            tried = metric(torch.zeros(len(at), model.cfg.d_vocab))
            if not isinstance(tried, Tensor) or tried.numel() != 1:
                came = tuple(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
                raise ValueError(
                    f"a metric gives one number for logits [read, d_vocab], but this gives {came} for "
                    f"{(len(at), model.cfg.d_vocab)}"
                )
        wide = torch.promote_types(model.W_U.dtype, torch.float32)
        unembedding = Unembedding(model.W_U.detach().to(wide), model.b_U.detach().to(wide), soft_cap(model))
        return cls(
            model,
            unembedding,
            metric,
            at,
            None if ids is None else ids[:, at],
            None if other is None else other[:, at],
        )

    def begin(self, prompt: int, final: Float[Tensor, "1 pos d_model"]) -> None:
        """Judge runs on this prompt from now on, against its clean run."""
        self.prompt = prompt
        self.clean = self._vectors(final, 0, None)

    def of_run(self, final: Float[Tensor, "1 pos d_model"]) -> float:
        return float(self.of_rows(final, 0, final))

    def of_rows(
        self,
        final: Float[Tensor, "row suffix d_model"],
        start: int,
        base: Float[Tensor, "1 pos d_model"],
    ) -> Float[Tensor, " row"]:
        """Of rows that are like the run `base` before `start`."""
        with torch.inference_mode():
            if callable(self.metric):
                return self.unembedding.judged(self._vectors(final, start, base), self.metric)
            late = self.read >= start
            terms = self._terms(self._vectors(final, start, None), late).sum(1)
            if not bool(late.all()):
                terms = terms + self._terms(self._vectors(base, 0, None)[:, ~late], ~late).sum(1)
            return (terms / len(self.read)).float()

    def _vectors(
        self, final: Float[Tensor, "row suffix d_model"], start: int, base: Tensor | None
    ) -> Float[Tensor, "row read d_model"]:
        """After the last norm, at the positions read from `start` on; with `base`, those before as well."""
        late = self.read[self.read >= start].to(final.device)
        with torch.inference_mode():
            vectors = final[:, late - start]
            if base is not None:
                before = self.read[self.read < start].to(final.device)
                vectors = torch.cat([base[:, before].expand(len(final), -1, -1), vectors], dim=1)
            return final_norm(self.model, vectors)

    def _terms(self, vectors: Float[Tensor, "row some d_model"], which: Tensor) -> Float[Tensor, "row some"]:
        shape, flat = vectors.shape[:2], vectors.flatten(0, 1)
        if flat.numel() == 0:
            return vectors.new_zeros(shape)

        def each(values: Tensor) -> Tensor:
            return values[self.prompt, which].to(flat.device).expand(shape).flatten()

        if self.metric == "kl":
            assert self.clean is not None
            reference = self.clean[:, which.to(flat.device)].expand(*shape, -1).flatten(0, 1)
            return self.unembedding.kl(reference, flat).view(shape)
        assert self.targets is not None
        if self.metric == "logit_diff":
            assert self.against is not None
            found = self.unembedding.of(flat, each(self.targets)) - self.unembedding.of(
                flat, each(self.against)
            )
            return found.view(shape)
        log_prob = self.unembedding.log_prob(flat, each(self.targets)).view(shape)
        return -log_prob if self.metric == "loss" else log_prob


def _ids(
    model: LensModel, target: Any, tokens: Int[Tensor, "prompt pos"], name: str
) -> Int[Tensor, "prompt pos"] | None:
    """A target as one id per position."""
    if target is None:
        return None
    if not isinstance(target, Tensor):
        return torch.full_like(tokens, target_id(model, target))
    ids = (target[None] if target.ndim == 1 else target).cpu().long()
    if ids.shape != tokens.shape:
        raise ValueError(
            f"{name} must be one id for every position of the prompt, {tuple(tokens.shape)}, but are "
            f"{tuple(target.shape)}"
        )
    return ids


def _final(model: LensModel, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "1 pos d_model"]:
    """What a run's logits are read from."""
    kept: list[Tensor] = []
    watch(model, tokens, {SITES["resid_post"].format(model.cfg.n_layers - 1): kept.append})
    return kept.pop()
