"""Greedy search: an input that excites a feature, built from left to right."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.analyses.features.spec import SAVE_SECONDS, Sought, check_numbers
from mechlens.arguments import check_counts
from mechlens.measures.accumulators import TopRows
from mechlens.models.protocol import LensModel
from mechlens.models.run.next_token_scan import candidates
from mechlens.progress import progress_bar
from mechlens.results import GreedySearch
from mechlens.results.checkpoint import load_state, save_state, state_file

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
    state: str | os.PathLike[str] | None = None,
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
        state: a `.safetensors` file. Progress is saved there now and then, and whenever the search is
            interrupted; a search that finds the file goes on from there.
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
    d_vocab, n_ctx, file = model.cfg.d_vocab, model.cfg.n_ctx, state_file(state)
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
    beams, arguments = _Beams.begin(len(sought.features), beam), dict[str, object]()
    if file is not None:
        arguments = sought.fingerprint | {"n_tokens": n_tokens, "aggregate": aggregate, "beam": beam}
        if file.exists():
            beams = _Beams.load(file, arguments)
    saved = time.monotonic()
    bar = progress_bar(total=0, desc="searching", unit="token", progress=progress)
    try:
        while beams.ids.shape[-1] < n_tokens:
            groups = list(beams.unread())
            bar.total += len(groups) * d_vocab
            for before, users in groups:
                top = _best_behind(sought, before, users[:, 0].unique(), beam, batch_size, bar)
                beams.note(users, top)
                if file is not None and time.monotonic() - saved > SAVE_SECONDS:
                    beams.save(file, arguments)
                    saved = time.monotonic()
            beams = beams.extended(aggregate)
    finally:
        bar.close()
        if file is not None:
            beams.save(file, arguments)
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

    @classmethod
    def load(cls, file: Path, arguments: dict[str, object]) -> _Beams:
        names = [field.name for field in dataclasses.fields(cls)]
        tensors, _ = load_state(file, "search", "a greedy search", names, arguments)
        return cls(**tensors)

    def save(self, file: Path, arguments: dict[str, object]) -> None:
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        save_state(file, "search", tensors, arguments, step=self.ids.shape[-1])

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
