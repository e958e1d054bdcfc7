"""Greedy search: build an input that activates a feature, from left to right."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.analyses.features.spec import Features, FeatureSpec, PrefixLike, check_numbers
from mechlens.arguments import check_counts
from mechlens.errors import ArgumentError
from mechlens.measures.accumulators import TopRows
from mechlens.models.protocol import LensModel
from mechlens.models.run.next_token_scan import candidates
from mechlens.results import GreedySearch
from mechlens.results.checkpoint import Checkpoint

AGGREGATES = ("last", "sum")


def search_greedy(
    model: LensModel,
    features: Features,
    *,
    n_tokens: int,
    aggregate: str = "last",
    beam: int = 1,
    prefix: PrefixLike = None,
    batch_size: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> GreedySearch:
    """Build inputs from left to right, always adding the token that activates the feature most.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Every token of the
    vocabulary is tried at each step.

    Args:
        model: with unprocessed weights.
        features: features of one layer; each gets its own inputs.
        n_tokens: how many tokens to find.
        aggregate: what inputs are ranked by: the activation at the `last` token, or its `sum` over the tokens
            found. With `beam=1` both find the same, because a token does not affect those before it.
        beam: inputs kept at each step; 1 is plain greedy search.
        prefix: text or token ids before the input; `Prefix` adds BOS.
        batch_size: tokens that run together; None is 1024, or as many as memory allows after a long prefix.
            It is halved when memory runs out.
        resume: a `.safetensors` file to save progress to, every half minute and when the search ends or is
            interrupted. If the file exists, the search resumes from it.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        `beam` inputs for each feature, best first.

    Raises:
        TypeError: features or a prefix of the wrong type.
        ValueError: processed weights, several layers, a feature out of range, a size below 1, a beam larger
            than the vocabulary, an unknown aggregate, more tokens than fit in the context, or a checkpoint
            from another search.

    Example:
        >>> found = mechlens.search_greedy(raw, mechlens.Features(layers=2, indices=[0, 7]), n_tokens=3)
        >>> found.ids.shape  # feature, beam, position
        torch.Size([2, 1, 3])

    References: Badger, "Language Model Features", "Greedy Search Features".
    Cost: one pass over the vocabulary for the first token, then at each step one for each distinct input so
        far (at most features x beam). In a pass each token costs one position, up to the layer.
    """
    spec = FeatureSpec.of(model, features, prefix).of_one_layer()
    d_vocab, n_ctx = model.cfg.d_vocab, model.cfg.n_ctx
    if aggregate not in AGGREGATES:
        raise ArgumentError("aggregate", f"one of {', '.join(AGGREGATES)}", aggregate)
    check_counts(n_tokens=n_tokens, beam=beam, batch_size=batch_size)
    if beam > d_vocab:
        raise ArgumentError("beam", f"at most {d_vocab}, the size of the vocabulary", beam)
    if len(spec.prefix) + n_tokens > n_ctx:
        raise ValueError(
            f"{n_tokens} tokens after a prefix of {len(spec.prefix)} do not fit into the model's context "
            f"of {n_ctx}: search fewer"
        )
    asked = {"n_tokens": n_tokens, "aggregate": aggregate, "beam": beam}
    with Checkpoint(
        resume, "search", lambda: spec.fingerprint | asked, owner="a greedy search", names=_TENSORS
    ) as saved:
        beams = _Beams(**saved.tensors) if saved.tensors else _Beams.begin(len(spec.features), beam)

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal beams
            while beams.ids.shape[-1] < n_tokens:
                groups = beams.unread()
                saved.bar.total += len(groups) * d_vocab
                yield from groups
                beams = beams.extended(aggregate)

        for before, users in saved.loop(
            passes(),
            lambda: (beams.tensors(), beams.ids.shape[-1]),
            total=0,
            desc="searching",
            unit="token",
            progress=progress,
            size=lambda _: 0,
        ):
            beams.note(users, _best_after(spec, before, users[:, 0].unique(), beam, batch_size, saved.bar))
    return GreedySearch(
        **spec.fields(),
        layer=spec.layer,
        aggregate=aggregate,
        ids=beams.ids,
        activations=beams.activations,
        strings=spec.strings(beams.ids),
    )


def _best_after(
    spec: FeatureSpec,
    before: Int[Tensor, " pos"],
    columns: Int[Tensor, " some"],
    k: int,
    batch_size: int | None,
    bar: tqdm[None],
) -> dict[int, tuple[Float[Tensor, " k"], Int[Tensor, " k"]]]:
    """Activations and ids of the best next tokens, by the features' indices in `spec.features`."""
    (name,) = spec.names
    runs = candidates(spec.model, torch.cat([spec.prefix, before]), [name])
    best = TopRows.empty(k, len(columns), spec.model.W_E.device)
    found: list[TopRows] = []

    def note(activation: Tensor, ids: Tensor) -> None:
        rows = spec.read(activation)[:, columns.to(activation.device)]
        check_numbers(rows, name)
        found[:] = [best.joined(rows, ids.to(rows.device))]

    def readers(ids: Tensor) -> dict[str, functools.partial[None]]:
        return {name: functools.partial(note, ids=ids)}

    for ids in runs.vocabulary(readers, batch_size=batch_size):
        best = found[0]
        bar.update(len(ids))
    # copies, because tensors made in inference mode do not support autograd
    values, rows = best.values.T.cpu().clone(), best.rows.T.cpu().clone()
    return {column: (values[i], rows[i]) for i, column in enumerate(columns.tolist())}


@dataclasses.dataclass(frozen=True, eq=False)
class _Beams:
    """The inputs so far, and the best next tokens after those already searched."""

    ids: Int[Tensor, "feature beam pos"]
    activations: Float[Tensor, "feature beam pos"]
    next_ids: Int[Tensor, "feature beam k"]
    """The best tokens after each input."""
    next_activations: Float[Tensor, "feature beam k"]
    known: Bool[Tensor, "feature beam"]
    """Whether an input's next tokens have been searched."""

    @classmethod
    def begin(cls, n_features: int, k: int) -> _Beams:
        """One empty input for each feature."""
        nothing = torch.zeros(n_features, 1, 0, dtype=torch.float32)
        return cls._unread(nothing.long(), nothing, k)

    @classmethod
    def _unread(cls, ids: Tensor, activations: Tensor, k: int) -> _Beams:
        unknown = torch.zeros(*ids.shape[:2], k, dtype=torch.float32)
        return cls(ids, activations, unknown.long(), unknown, unknown[..., 0].bool())

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    def unread(self) -> list[tuple[Int[Tensor, " pos"], Int[Tensor, "user 2"]]]:
        """The distinct inputs not yet searched, each with its (feature, beam) pairs."""
        users: dict[tuple[int, ...], list[list[int]]] = {}
        for feature, beam in (~self.known).nonzero().tolist():
            users.setdefault(tuple(self.ids[feature, beam].tolist()), []).append([feature, beam])
        return [
            (torch.tensor(before, dtype=torch.long), torch.tensor(pairs)) for before, pairs in users.items()
        ]

    def note(
        self, users: Int[Tensor, "user 2"], found: dict[int, tuple[Float[Tensor, " k"], Int[Tensor, " k"]]]
    ) -> None:
        for feature, beam in users.tolist():
            self.next_activations[feature, beam], self.next_ids[feature, beam] = found[feature]
            # last, so an interruption never leaves an input marked known without its next tokens
            self.known[feature, beam] = True

    def extended(self, aggregate: str) -> _Beams:
        """The best inputs with one more token; ties go to the better input."""
        k = self.next_ids.shape[-1]
        # every continuation of every input, `[feature, beam x k, pos]`
        longer_ids, longer = (
            torch.cat([old.unsqueeze(2).expand(-1, -1, k, -1), new.unsqueeze(3)], dim=3).flatten(1, 2)
            for old, new in ((self.ids, self.next_ids), (self.activations, self.next_activations))
        )
        scores = longer.sum(-1) if aggregate == "sum" else longer[..., -1]
        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k, None]
        order = order.expand(-1, -1, longer.shape[-1])
        return self._unread(longer_ids.gather(1, order), longer.gather(1, order), k)


_TENSORS = tuple(field.name for field in dataclasses.fields(_Beams))
