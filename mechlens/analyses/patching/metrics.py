"""Metrics of a run: one number for its predictions at some positions.

To add a metric, subclass `Metric` and define `name`, `unit`, `terms`, and `ids` if it is about some tokens.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import chosen
from mechlens.measures.readout import kl_from
from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel
from mechlens.models.run.unembedding import final_norm, unembedding
from mechlens.text.tokens import target_id, token_strings

Target = str | int | Sequence[str | int] | Int[Tensor, "..."]
"""One token (a text or an id), one for each prompt, or ids with the prompts' shape."""
Ids = Mapping[str, Int[Tensor, "prompt pos"]]


class Metric(abc.ABC):
    """A number for a run's predictions, usually a mean over positions."""

    name: ClassVar[str]
    unit: ClassVar[str] = "nats"
    by_position: ClassVar[bool] = True
    """Whether the metric is a mean of one number per position."""
    at: Sequence[int] | None

    def positions(self, n_pos: int) -> tuple[int, ...]:
        """The positions whose predictions count, in increasing order."""
        if self.at is None:
            return self.usual_positions(n_pos)
        return tuple(sorted(chosen("position", self.at, n_pos)))

    def usual_positions(self, n_pos: int) -> tuple[int, ...]:
        """The positions for `at=None`: the last."""
        return (n_pos - 1,)

    def ids(
        self, model: LensModel, tokens: Int[Tensor, "prompt pos"]
    ) -> dict[str, Int[Tensor, "prompt pos"]]:
        """The tokens that the metric is about, by argument name."""
        return {}

    def check(self, model: LensModel, n_read: int) -> None:  # noqa: B027  # most have nothing to check
        """Raise if the metric does not work for this model, before anything is run."""

    @abc.abstractmethod
    def terms(
        self,
        unembedding: Unembedding,
        vectors: Float[Tensor, "row some d_model"],
        ids: Ids,
        clean: Float[Tensor, "1 some d_model"],
    ) -> Float[Tensor, "row some"]:
        """The number for each position, differentiable.

        Args:
            vectors: residual vectors after the final norm.
            ids: the tokens from the method `ids`, for each vector.
            clean: the same vectors in the clean run.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Loss(Metric):
    """The next-token loss (minus the log-probability) in nats, averaged over positions.

    Args:
        at: positions whose predictions count; None is all but the last.

    Example:
        >>> mechlens.Patching(model, "Mr. Pickwick", metric=mechlens.Loss()).grid("mlp_out", values="zero")
        PatchGridResult(model='mechlens-books', ...)
    """

    at: Sequence[int] | None = None
    name: ClassVar[str] = "loss"

    def usual_positions(self, n_pos: int) -> tuple[int, ...]:
        return tuple(range(max(1, n_pos - 1)))

    def ids(
        self, model: LensModel, tokens: Int[Tensor, "prompt pos"]
    ) -> dict[str, Int[Tensor, "prompt pos"]]:
        return {"next": _next_tokens(self, tokens)}

    def terms(self, unembedding: Unembedding, vectors: Tensor, ids: Ids, clean: Tensor) -> Tensor:
        return -_log_prob(unembedding, vectors, ids["next"])


@dataclasses.dataclass(frozen=True, eq=False)
class LogProb(Metric):
    """The log-probability of a token, in nats, averaged over positions.

    Args:
        target: one token (a text or an id), one for each prompt, or ids with the prompts' shape; None is the
            next token.
        at: positions whose predictions count; None is the last.

    Example:
        >>> mechlens.LogProb(" Pickwick").name
        'log_prob'
    """

    target: Target | None = None
    at: Sequence[int] | None = None
    name: ClassVar[str] = "log_prob"

    def ids(
        self, model: LensModel, tokens: Int[Tensor, "prompt pos"]
    ) -> dict[str, Int[Tensor, "prompt pos"]]:
        if self.target is None:
            return {"target": _next_tokens(self, tokens)}
        return {"target": token_ids(model, "target", self.target, tokens)}

    def terms(self, unembedding: Unembedding, vectors: Tensor, ids: Ids, clean: Tensor) -> Tensor:
        return _log_prob(unembedding, vectors, ids["target"])


@dataclasses.dataclass(frozen=True, eq=False)
class LogitDiff(Metric):
    """The logit of one token minus that of another, averaged over positions.

    Args:
        target: one token (a text or an id), one for each prompt, or ids with the prompts' shape.
        against: the token whose logit is subtracted, in any of these forms.
        at: positions whose predictions count; None is the last.

    Example:
        >>> metric = mechlens.LogitDiff(" sea", " town")
        >>> mechlens.Patching(model, "She went to the", metric=metric).grid("z", values="zero").unit
        'logits'

    References: Wang et al. 2022, "Interpretability in the Wild", arXiv:2211.00593.
    """

    target: Target
    against: Target
    at: Sequence[int] | None = None
    name: ClassVar[str] = "logit_diff"
    unit: ClassVar[str] = "logits"

    def __post_init__(self) -> None:
        if self.target is None or self.against is None:
            raise ValueError("LogitDiff(target, against) needs both tokens, but one of them is None")

    def ids(
        self, model: LensModel, tokens: Int[Tensor, "prompt pos"]
    ) -> dict[str, Int[Tensor, "prompt pos"]]:
        return {name: token_ids(model, name, getattr(self, name), tokens) for name in ("target", "against")}

    def terms(self, unembedding: Unembedding, vectors: Tensor, ids: Ids, clean: Tensor) -> Tensor:
        flat = vectors.flatten(0, 1)
        target, against = (unembedding.of(flat, ids[name].flatten()) for name in ("target", "against"))
        return (target - against).view(vectors.shape[:2])


@dataclasses.dataclass(frozen=True, eq=False)
class KL(Metric):
    """KL(clean || patched) of the predictions, in nats, averaged over positions.

    Args:
        at: positions whose predictions count; None is all but the last.

    Example:
        >>> mechlens.KL(at=[3, 4]).unit
        'nats'
    """

    at: Sequence[int] | None = None
    name: ClassVar[str] = "kl"

    def usual_positions(self, n_pos: int) -> tuple[int, ...]:
        return tuple(range(n_pos - 1)) or (0,)

    def terms(self, unembedding: Unembedding, vectors: Tensor, ids: Ids, clean: Tensor) -> Tensor:
        return kl_from(unembedding, clean[0], vectors)


@dataclasses.dataclass(frozen=True, eq=False)
class LogitFunction(Metric):
    """Your own metric: a function of logits.

    Args:
        function: takes float32 logits `[read, d_vocab]` at the positions in `at`, and returns one number.
        at: positions whose logits the function takes; None is the last.

    Example:
        >>> mechlens.LogitFunction(lambda logits: logits.max(), at=[-2, -1]).at
        [-2, -1]
    """

    function: Callable[[Float[Tensor, "read d_vocab"]], Tensor]
    at: Sequence[int] | None = None
    unit: ClassVar[str] = ""
    by_position: ClassVar[bool] = False

    @property
    def name(self) -> str:  # type: ignore[override]  # of the class elsewhere
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def check(self, model: LensModel, n_read: int) -> None:
        shape = (n_read, model.cfg.d_vocab)
        tried = self.function(torch.zeros(shape, dtype=torch.float32))
        if not isinstance(tried, Tensor) or tried.numel() != 1:
            came = tuple(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
            raise ValueError(
                f"a metric must return one number for logits [read, d_vocab], got {came} for {shape}"
            )

    def terms(self, unembedding: Unembedding, vectors: Tensor, ids: Ids, clean: Tensor) -> Tensor:
        """One number for all positions, which the function gets together."""
        found = [self.function(unembedding.logits(row)).reshape(()).float() for row in vectors]
        return torch.stack(found)[:, None]


def metric_of(given: Any) -> Metric:
    """The metric given as an object or as a function of logits."""
    if isinstance(given, Metric):
        return given
    if isinstance(given, type) or not callable(given):
        raise TypeError(
            "metric must be Loss(), LogProb(target), LogitDiff(target, against), KL() or a function of "
            f"logits, got {given!r}"
        )
    return LogitFunction(given)


def _log_prob(
    unembedding: Unembedding, vectors: Float[Tensor, "row some d_model"], ids: Int[Tensor, "row some"]
) -> Float[Tensor, "row some"]:
    return unembedding.log_prob(vectors.flatten(0, 1), ids.flatten())[0].view(ids.shape)


def _next_tokens(metric: Metric, tokens: Int[Tensor, "prompt pos"]) -> Int[Tensor, "prompt pos"]:
    n_pos = tokens.shape[1]
    if metric.positions(n_pos)[-1] == n_pos - 1:
        raise ValueError(
            f"position {n_pos - 1} is the last, and no token follows it: "
            + ("choose other positions" if metric.at is not None else "")
            + (
                ""
                if metric.at is not None
                else "give a target"
                if metric.name != "loss"
                else "give more tokens"
            )
        )
    return tokens.roll(-1, 1)


def token_ids(
    model: LensModel, name: str, target: Target, tokens: Int[Tensor, "prompt pos"]
) -> Int[Tensor, "prompt pos"]:
    """A target as one id per position."""
    if isinstance(target, (list, tuple)):
        target = torch.tensor([target_id(model, each) for each in target])
    if not isinstance(target, Tensor):
        return torch.full_like(tokens, target_id(model, target))
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"{name} must be token ids, which are integers, got {target.dtype}")
    ids = target.cpu().long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < model.cfg.d_vocab:
        raise ValueError(
            f"{name} is out of range: the vocabulary has {model.cfg.d_vocab} tokens, but the ids are between "
            f"{int(ids.min())} and {int(ids.max())}"
        )
    if ids.shape in ((len(tokens),), (len(tokens), 1)):
        ids = ids.reshape(-1, 1).expand_as(tokens)
    elif ids.ndim == 1:
        ids = ids[None]
    if ids.shape != tokens.shape:
        raise ValueError(
            f"{name} must be one token, one for each of the {len(tokens)} prompts, or ids with the prompts' "
            f"shape {tuple(tokens.shape)}, got shape {tuple(target.shape)}"
        )
    return ids


@dataclasses.dataclass(frozen=True, eq=False)
class Readout:
    """A metric for runs on some prompts. A run is given by its final residual stream."""

    model: LensModel
    metric: Metric
    unembedding: Unembedding
    at: tuple[int, ...]
    ids: dict[str, Int[Tensor, "prompt read"]]
    """The tokens that the metric is about, at the positions read."""

    @classmethod
    def of(cls, model: LensModel, metric: Metric, tokens: Int[Tensor, "prompt pos"]) -> Readout:
        at = metric.positions(tokens.shape[1])
        ids = {name: each[:, list(at)] for name, each in metric.ids(model, tokens).items()}
        metric.check(model, len(at))
        return cls(model, metric, unembedding(model), at, ids)

    @property
    def given(self) -> dict[str, Int[Tensor, "prompt read"]]:
        """The ids that do not come from the prompts."""
        return {name: each for name, each in self.ids.items() if name != "next"}

    def about(self) -> str:
        """The tokens that the metric is about in words, if they are the same everywhere; otherwise empty."""
        if any(len(ids.unique()) != 1 for ids in self.given.values()):
            return ""
        tokens = [repr(token_strings(self.model, ids.flatten()[:1])[0]) for ids in self.given.values()]
        return " less ".join(tokens)

    def of_prompt(self, index: int, clean: Float[Tensor, "1 pos d_model"]) -> PromptReadout:
        """The metric for runs on one prompt.

        Args:
            clean: the final residual stream of its clean run.
        """
        at = torch.tensor(self.at)
        # not in inference mode, because gradients are taken of distances to it
        with torch.no_grad():
            vectors = final_norm(self.model, clean[:, at.to(clean.device)])
        return PromptReadout(self, at, {name: each[index] for name, each in self.ids.items()}, vectors)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptReadout:
    """A metric for runs on one prompt."""

    of_all: Readout
    at: Int[Tensor, " read"]
    ids: dict[str, Int[Tensor, " read"]]
    clean: Float[Tensor, "1 read d_model"]
    """The clean run's vectors after the final norm."""

    def of_run(self, final: Float[Tensor, "1 pos d_model"]) -> float:
        return float(self.of_rows(final, 0, final))

    def of_rows(
        self, final: Float[Tensor, "row suffix d_model"], start: int, base: Float[Tensor, "1 pos d_model"]
    ) -> Float[Tensor, " row"]:
        """The metric for each row; before `start`, rows are the same as `base`."""
        with torch.inference_mode():
            return self.differentiable(final, start, base)

    def differentiable(
        self, final: Float[Tensor, "row suffix d_model"], start: int, base: Float[Tensor, "1 pos d_model"]
    ) -> Float[Tensor, " row"]:
        """`of_rows`, with gradients."""
        late = self.at >= start
        own, shared = final[:, self._there(late, final) - start], base[:, self._there(~late, base)]
        if not self.of_all.metric.by_position:
            together = torch.cat([shared.expand(len(final), -1, -1), own], dim=1)
            return self._terms(together, late | ~late)[:, 0]
        terms = self._terms(own, late).sum(1)
        if not bool(late.all()):
            terms = terms + self._terms(shared, ~late).sum(1)
        return (terms / len(self.at)).float()

    def _there(self, which: Tensor, like: Tensor) -> Tensor:
        return self.at[which].to(like.device)

    def _terms(self, streams: Float[Tensor, "row some d_model"], which: Tensor) -> Float[Tensor, "row _"]:
        shape = streams.shape[:2]
        if streams.numel() == 0:
            return streams.new_zeros(shape)
        ids = {name: each[which].to(streams.device).expand(shape) for name, each in self.ids.items()}
        vectors, clean = final_norm(self.of_all.model, streams), self.clean[:, which.to(self.clean.device)]
        return self.of_all.metric.terms(self.of_all.unembedding, vectors, ids, clean)
