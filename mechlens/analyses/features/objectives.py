"""What gradient search makes small."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.spec import Sought
from mechlens.measures.memory import in_parts
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import check_tokens
from mechlens.models.run.from_embeddings import run_embedded
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.unembedding import check_streamed, token_log_probs
from mechlens.text.prompts import prompt_tokens

OBJECTIVES = ("constant", "maximise", "maximin", "l1", "cosine", "continuation")
_WITH_TARGET = ("l1", "cosine", "continuation")


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """The objective of some embeddings, which a run gives."""

    sought: Sought
    embeddings: Float[Tensor, "d_vocab d_model"]
    tokens: Int[Tensor, "... pos"]
    """Prefix, room for the searched tokens, and the continuation."""
    n_tokens: int
    selected: Int[Tensor, "selected 2"]
    """(pos, feature) pairs."""
    objective: str
    constant: float
    target: Int[Tensor, " target"] | None
    wanted: Float[Tensor, " selected"] | None
    """The selected activations of the target."""
    alone: int | None

    @classmethod
    def of(
        cls,
        sought: Sought,
        selection: Any,
        n_tokens: int,
        objective: str,
        target: str | Int[Tensor, "*one target"] | None,
        constant: float,
        isolated: bool,
        embeddings: Float[Tensor, "d_vocab d_model"],
    ) -> Judge:
        model, goes_on = sought.model, objective == "continuation"
        ids = _target(model, objective, target, n_tokens)
        behind = ids if goes_on and ids is not None else torch.tensor([], dtype=torch.long)
        tokens = torch.cat([sought.prefix, torch.zeros(n_tokens, dtype=torch.long), behind])
        if len(tokens) > model.cfg.n_ctx:
            raise ValueError(
                f"{len(tokens)} tokens, of which {n_tokens} are searched, do not fit into the model's "
                f"context of {model.cfg.n_ctx}: search fewer"
            )
        if goes_on and isolated:
            raise ValueError("a block alone predicts no continuation: use isolated=False")
        if goes_on:
            check_streamed(model, tokens[None])
        check_rows_alike(model, tokens.repeat(2, 1))
        if isolated and getattr(model.cfg, "positional_embedding_type", None) == "shortformer":
            raise ValueError("this model's blocks get positions beside the stream: use isolated=False")
        selected = (
            torch.zeros(0, 2, dtype=torch.long)
            if goes_on
            else _selected(selection, n_tokens, len(sought.features))
        )
        alone = sought.layers[0] if isolated else None
        if objective == "cosine" and len(selected) < 2:
            raise ValueError(
                "a cosine of one number is 1 or -1: select at least two elements, or use the objective 'l1'"
            )
        judge = cls(sought, embeddings, tokens, n_tokens, selected, objective, constant, ids, None, alone)
        if objective in ("l1", "cosine"):
            assert ids is not None
            wanted = judge._read_tokens(ids.to(embeddings.device)[None])[0].detach()
            judge = dataclasses.replace(judge, wanted=wanted)
        return judge

    @torch.no_grad()
    def beyond(self, starts: Float[Tensor, "row pos d_model"]) -> Judge:
        """With a constant that the starts' activations do not come near."""
        parts = in_parts(lambda some: float(self._read(some).abs().max()), starts, len(starts))
        largest = max(found for _, found in parts)
        return dataclasses.replace(self, constant=max(self.constant, 10 * largest))

    def __call__(
        self, embedded: Float[Tensor, "row pos d_model"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """The objective, and the mean of the selected activations (nan for a continuation)."""
        if self.objective == "continuation":
            objective = -self._log_prob(embedded)
            return objective, torch.full_like(objective, torch.nan)
        own = self._read(embedded)
        if self.objective == "constant":
            objective = (self.constant - own).abs().mean(-1)
        elif self.objective == "maximise":
            objective = -own.mean(-1)
        elif self.objective == "maximin":
            objective = -own.amin(-1)
        else:
            assert self.wanted is not None
            if self.objective == "l1":
                objective = (own - self.wanted).abs().mean(-1)
            else:
                objective = 1 - torch.nn.functional.cosine_similarity(own, self.wanted[None], dim=-1)
        return objective, own.mean(-1)

    def judge_tokens(
        self, ids: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """The same of tokens."""
        return self(self.embeddings[ids])

    @torch.no_grad()
    def of_tokens(self, ids: Int[Tensor, "row pos"], at_once: int) -> Float[Tensor, "row selected"]:
        """The selected activations when tokens are run; none for a continuation."""
        if self.objective == "continuation":
            return torch.zeros(len(ids), 0, dtype=torch.float32)
        given = ids.to(self.embeddings.device)
        parts = in_parts(self._read_tokens, given, at_once)
        return torch.cat([made.cpu() for _, made in parts])

    def _read_tokens(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row selected"]:
        return self._read(self.embeddings[ids])

    def _run(self, embedded: Float[Tensor, "row pos d_model"], name: str) -> Tensor:
        given = embedded.to(self.embeddings.dtype)
        start = len(self.sought.prefix)
        return run_embedded(self.sought.model, self.tokens, given, start, name, alone=self.alone)

    def _read(self, embedded: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row selected"]:
        (name,) = self.sought.names
        start = len(self.sought.prefix)
        own = self.sought.read(self._run(embedded, name)[:, start : start + self.n_tokens])
        pos, feature = self.selected.to(own.device).T
        return own[:, pos, feature]

    def _log_prob(self, embedded: Float[Tensor, "row pos d_model"]) -> Float[Tensor, " row"]:
        model = self.sought.model
        assert self.target is not None
        last = self._run(embedded, f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
        # each position predicts the token after it
        ahead = last[:, -len(self.target) - 1 : -1]
        return token_log_probs(model, ahead, self.target.expand(len(ahead), -1))[0].sum(-1)


def _target(
    model: LensModel, objective: str, target: str | Int[Tensor, "*one target"] | None, n_tokens: int
) -> Int[Tensor, " target"] | None:
    if objective not in _WITH_TARGET:
        if target is not None:
            raise ValueError(f"the objective {objective!r} has no target: leave it out, or use another one")
        return None
    if target is None:
        raise ValueError(f"the objective {objective!r} needs a target: a text or token ids")
    one_id = hasattr(target, "__index__") and np.ndim(target) == 0
    ids = prompt_tokens(model, [target] if one_id else target, prepend_bos=False)
    check_tokens(model, ids)
    if len(ids) != 1:
        raise ValueError(f"a target is one sequence, but here are {len(ids)}")
    if objective != "continuation" and ids.shape[1] != n_tokens:
        raise ValueError(
            f"the target must have as many tokens as are searched, {n_tokens}, but has {ids.shape[1]}"
        )
    return ids[0]


def _selected(selection: Any, n_tokens: int, width: int) -> Int[Tensor, "selected 2"]:
    """The (pos, feature) pairs that an index of `[pos, feature]` selects, as numpy has it."""
    grid = np.arange(n_tokens * width).reshape(n_tokens, width)
    parts = selection if isinstance(selection, tuple) else (selection,)
    try:
        index = tuple(part.cpu().numpy() if isinstance(part, torch.Tensor) else part for part in parts)
        flat = torch.from_numpy(grid[index].flatten())
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"the selection {selection!r} is no index of [{n_tokens} positions, {width} features]: {error}"
        ) from error
    if not len(flat):
        raise ValueError(
            f"the selection {selection!r} is empty: there are {n_tokens} positions and {width} features"
        )
    return torch.stack([flat // width, flat % width], dim=1)
