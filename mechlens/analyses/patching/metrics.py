"""What a patched run is judged by: a metric of the predictions that are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import chosen
from mechlens.measures.readout import kl_from
from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel
from mechlens.models.run.unembedding import final_norm, unembedding
from mechlens.text.tokens import target_id, token_strings

METRICS = ("loss", "log_prob", "logit_diff", "kl")

Metric = str | Callable[[Float[Tensor, "read d_vocab"]], Tensor]
Targets = str | int | Sequence[str | int] | Int[Tensor, "..."]


def read_positions(metric: Metric, read: Sequence[int] | None, n_pos: int) -> tuple[int, ...]:
    """The positions whose predictions count."""
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
class Judge:
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
    ) -> Judge:
        at = torch.tensor(read)
        if targets is not None and metric not in ("log_prob", "logit_diff"):
            raise ValueError(f"targets are for log_prob and logit_diff, but metric is {metric!r}")
        if (against is not None) != (metric == "logit_diff"):
            raise ValueError(
                "logit_diff is the logit of targets less that of against: it needs both"
                if metric == "logit_diff"
                else f"against is for logit_diff, but metric is {metric!r}"
            )
        if metric == "logit_diff" and targets is None:
            raise ValueError("logit_diff is the logit of targets less that of against: it needs both")
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
            tried = metric(torch.zeros(len(at), model.cfg.d_vocab, dtype=torch.float32))
            if not isinstance(tried, Tensor) or tried.numel() != 1:
                came = tuple(tried.shape) if isinstance(tried, Tensor) else type(tried).__name__
                raise ValueError(
                    f"a metric gives one number for logits [read, d_vocab], but this gives {came} for "
                    f"{(len(at), model.cfg.d_vocab)}"
                )
        return cls(
            model,
            unembedding(model),
            metric,
            at,
            None if ids is None else ids[:, at],
            None if other is None else other[:, at],
        )

    def about(self) -> str:
        """The tokens that the metric is of, where they are the same everywhere."""
        said = []
        for ids in (self.targets, self.against):
            if self.metric == "loss" or ids is None or len(ids.unique()) != 1:
                continue
            said.append(repr(token_strings(self.model, ids.flatten()[:1])[0]))
        return " less ".join(said) if len(said) == 1 + (self.against is not None) else ""

    def begin(self, prompt: int, final: Float[Tensor, "1 pos d_model"]) -> None:
        """Judge runs on this prompt from now on, against its clean run."""
        self.prompt = prompt
        # no inference mode: a gradient may be taken of the distance to it
        with torch.no_grad():
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
            return self.differentiable(final, start, base)

    def differentiable(
        self,
        final: Float[Tensor, "row suffix d_model"],
        start: int,
        base: Float[Tensor, "1 pos d_model"],
    ) -> Float[Tensor, " row"]:
        """The same; a gradient may be taken of it."""
        if callable(self.metric):
            vectors = self._vectors(final, start, base)
            return torch.stack(
                [self.metric(self.unembedding.logits(row)).reshape(()).float() for row in vectors]
            )
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
            return kl_from(self.unembedding, self.clean[0, which.to(flat.device)], vectors)
        assert self.targets is not None
        if self.metric == "logit_diff":
            assert self.against is not None
            found = self.unembedding.of(flat, each(self.targets)) - self.unembedding.of(
                flat, each(self.against)
            )
            return found.view(shape)
        log_prob = self.unembedding.log_prob(flat, each(self.targets))[0].view(shape)
        return -log_prob if self.metric == "loss" else log_prob


def _ids(
    model: LensModel, target: Any, tokens: Int[Tensor, "prompt pos"], name: str
) -> Int[Tensor, "prompt pos"] | None:
    """A target as one id per position."""
    if target is None:
        return None
    if isinstance(target, (list, tuple)):
        target = torch.tensor([target_id(model, each) for each in target])
    if not isinstance(target, Tensor):
        return torch.full_like(tokens, target_id(model, target))
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"{name} are token ids, which are integers, but these are {target.dtype}")
    ids = target.cpu().long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < model.cfg.d_vocab:
        raise ValueError(
            f"{name} must be in the vocabulary of {model.cfg.d_vocab}, but lie between {int(ids.min())} and "
            f"{int(ids.max())}"
        )
    if ids.shape in ((len(tokens),), (len(tokens), 1)):
        ids = ids.reshape(-1, 1).expand_as(tokens)
    elif ids.ndim == 1:
        ids = ids[None]
    if ids.shape != tokens.shape:
        raise ValueError(
            f"{name} must be one token, one for each of {len(tokens)} prompts, or ids of the prompts' shape "
            f"{tuple(tokens.shape)}, but are {tuple(target.shape)}"
        )
    return ids
