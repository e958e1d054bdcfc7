"""Greedy search: an input that excites a feature, built from left to right."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.analyses.features.spec import Sought, check_numbers
from mechlens.arguments import check_counts
from mechlens.measures.accumulators import TopRows
from mechlens.models.protocol import LensModel
from mechlens.models.run.next_token_scan import candidates
from mechlens.results import GreedySearch
from mechlens.results.checkpoint import Checkpoint

AGGREGATES = ("last", "sum")


def search_greedy(
    model: LensModel,
    *,
    layer: int,
    features: Sequence[int] | None,
    n_tokens: int,
    aggregate: str = "last",
    site: str = "resid_post",
    directions: Float[Tensor, "direction d_model"] | None = None,
    prefix: str | Int[Tensor, "*one prefix"] | None = None,
    prepend_bos: bool = False,
    beam: int = 1,
    batch_size: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> GreedySearch:
    """Build inputs from left to right, each token the one of the whole vocabulary that excites the feature
    most behind those before it.

    Args:
        layer: whose feature it is.
        features: as in `search_complete`; each gets inputs of its own.
        n_tokens: how many tokens to find.
        aggregate: what an input is judged by: the activation at its `last` token, or the `sum` over the
            tokens that were found. With one input at a time both find the same, since a token changes
            nothing before it: they differ in which inputs a beam keeps.
        site: as in `search_complete`; so are `directions`, `prefix`, `prepend_bos`, `batch_size`.
        beam: how many inputs to go on with at each step; 1 is the source's search.
        resume: a `.safetensors` file to save progress to, every half minute and when the search ends or is
            interrupted. If the file exists, the search resumes from it.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        For each feature `beam` inputs, the best first.

    Raises:
        ValueError: as `search_complete`; a size below 1, a beam beyond the vocabulary, an unknown aggregate,
            or more tokens than the context holds.

    Source: Badger, "Language Model Features", "Greedy Search Features".
    Cost: for the first token one pass of the vocabulary for all features; for each further one a pass for
    each different input so far (at most features x beam). In a pass each token costs one position, up to
    `layer`, whatever stands before it.
    """
    sought = Sought.of(
        model,
        site=site,
        layers=[layer],
        features=features,
        directions=directions,
        prefix=prefix,
        prepend_bos=prepend_bos,
    )
    d_vocab, n_ctx = model.cfg.d_vocab, model.cfg.n_ctx
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, but is {aggregate!r}")
    check_counts(n_tokens=n_tokens, beam=beam, batch_size=batch_size)
    if beam > d_vocab:
        raise ValueError(f"beam must be at most the vocabulary's {d_vocab}, but is {beam}")
    if len(sought.prefix) + n_tokens > n_ctx:
        raise ValueError(
            f"{n_tokens} tokens behind a prefix of {len(sought.prefix)} do not fit into the model's context "
            f"of {n_ctx}: search fewer"
        )
    asked = {"n_tokens": n_tokens, "aggregate": aggregate, "beam": beam}
    with Checkpoint(
        resume, "search", lambda: sought.fingerprint | asked, owner="a greedy search", names=_TENSORS
    ) as saved:
        beams = _Beams(**saved.tensors) if saved.tensors else _Beams.begin(len(sought.features), beam)

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
            beams.note(users, _best_behind(sought, before, users[:, 0].unique(), beam, batch_size, saved.bar))
    return GreedySearch(
        **sought.fields(),
        layer=sought.layers[0],
        aggregate=aggregate,
        ids=beams.ids,
        activations=beams.activations,
        strings=sought.strings(beams.ids),
    )


def _best_behind(
    sought: Sought,
    before: Int[Tensor, " pos"],
    columns: Int[Tensor, " some"],
    k: int,
    batch_size: int | None,
    bar: tqdm[None],
) -> dict[int, tuple[Float[Tensor, " k"], Int[Tensor, " k"]]]:
    """Of some features, by number in `sought.features`: the activations and ids of the best next tokens."""
    (name,) = sought.names
    runs = candidates(sought.model, torch.cat([sought.prefix, before]), [name])
    best = TopRows.empty(k, len(columns), sought.model.W_E.device)
    found: list[TopRows] = []

    def note(activation: Tensor, ids: Tensor) -> None:
        rows = sought.read(activation)[:, columns.to(activation.device)]
        check_numbers(rows, name)
        found[:] = [best.joined(rows, ids.to(rows.device))]

    def readers(ids: Tensor) -> dict[str, functools.partial[None]]:
        return {name: functools.partial(note, ids=ids)}

    for ids in runs.vocabulary(readers, batch_size=batch_size):
        best = found[0]
        bar.update(len(ids))
    # copies: what leaves inference mode can be computed with
    values, rows = best.values.T.cpu().clone(), best.rows.T.cpu().clone()
    return {column: (values[i], rows[i]) for i, column in enumerate(columns.tolist())}


@dataclasses.dataclass(frozen=True, eq=False)
class _Beams:
    """The inputs so far, and what is known of the tokens that may come next."""

    ids: Int[Tensor, "feature beam pos"]
    activations: Float[Tensor, "feature beam pos"]
    next_ids: Int[Tensor, "feature beam k"]
    """The best tokens behind each input."""
    next_activations: Float[Tensor, "feature beam k"]
    known: Bool[Tensor, "feature beam"]
    """Behind which inputs these were searched."""

    @classmethod
    def begin(cls, n_features: int, k: int) -> _Beams:
        """One input without tokens."""
        nothing = torch.zeros(n_features, 1, 0, dtype=torch.float32)
        return cls._unread(nothing.long(), nothing, k)

    @classmethod
    def _unread(cls, ids: Tensor, activations: Tensor, k: int) -> _Beams:
        unknown = torch.zeros(*ids.shape[:2], k, dtype=torch.float32)
        return cls(ids, activations, unknown.long(), unknown, unknown[..., 0].bool())

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    def unread(self) -> list[tuple[Int[Tensor, " pos"], Int[Tensor, "user 2"]]]:
        """Inputs behind which nothing is known, and the (feature, beam) pairs that have each."""
        users: dict[tuple[int, ...], list[list[int]]] = {}
        for feature, beam in (~self.known).nonzero().tolist():
            users.setdefault(tuple(self.ids[feature, beam].tolist()), []).append([feature, beam])
        return [
            (torch.tensor(before, dtype=torch.long), torch.tensor(pairs)) for before, pairs in users.items()
        ]

    def note(
        self,
        users: Int[Tensor, "user 2"],
        found: dict[int, tuple[Float[Tensor, " k"], Int[Tensor, " k"]]],
    ) -> None:
        for feature, beam in users.tolist():
            self.next_activations[feature, beam], self.next_ids[feature, beam] = found[feature]
            # last, so that whatever interrupts finds no input without its next tokens
            self.known[feature, beam] = True

    def extended(self, aggregate: str) -> _Beams:
        """The best inputs that are one token longer; of equally good ones those of the better input."""
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
