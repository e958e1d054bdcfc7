"""Maximally activating examples: the windows of a corpus where each feature is largest."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.analyses.features.spec import Features, FeatureSpec, check_numbers
from mechlens.arguments import check_counts
from mechlens.measures.accumulators import TopRows
from mechlens.measures.memory import in_parts
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch
from mechlens.models.run.patched_runs import TOKEN_BUDGET, row_charge
from mechlens.models.run.properties import check_rows_alike
from mechlens.results import FeatureExamples
from mechlens.results.checkpoint import Checkpoint
from mechlens.text.corpus import LENGTH, Corpus, corpus_ids, token_windows
from mechlens.text.prompts import bos_to_prepend
from mechlens.text.tokens import all_bos, special_ids

_TENSORS = ("values", "numbers", "kept", "tokens", "corpus")


def feature_examples(
    model: LensModel,
    features: Features | None,
    corpus: Corpus | Int[Tensor, "window pos"],
    *,
    top_k: int = 5,
    length: int | None = None,
    prepend_bos: bool | None = None,
    limit: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> FeatureExamples:
    """Find each feature's maximally activating examples: the windows of a corpus where it is largest.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Windows are
    ranked by their largest activation. Special tokens (BOS, the ends of documents) are read but do not count,
    because they often activate features most and are not text.

    Args:
        model: with unprocessed weights.
        features: which layers and features; None is all of `resid_post`.
        corpus: text or token ids, as for `token_windows`. It is read once, as a stream.
        top_k: windows to keep for each feature.
        length: tokens in a window, including BOS; None is 128, or the model's context if that is shorter.
        prepend_bos: None begins each window with BOS if the tokenizer has one. Without it, the first token of
            a window takes its place, which changes many features of GPT-2.
        limit: the maximum number of windows to read; None reads to the end.
        resume: a `.safetensors` file to save progress to, every half minute and when the search ends or is
            interrupted. If the file exists, the search resumes from it; the corpus must be the same.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        The windows, with each feature's activations in the model's own units, float32.

    Raises:
        TypeError: features of the wrong type.
        ValueError: processed weights, a layer or feature out of range, a corpus that cannot be read or does
            not fill one window, activations that are nan, or a checkpoint from another search or corpus.

    Example:
        >>> texts = ["The captain of the ship looked at the sea, and the sea looked at the captain."]
        >>> features = mechlens.Features(layers=2, indices=7)
        >>> found = mechlens.feature_examples(raw, features, texts, length=8, top_k=2)
        >>> found.activations.shape  # layer, feature, k, position
        torch.Size([1, 1, 2, 8])

    References: Badger, "Language Model Features", for the comparison with searched tokens.
    Cost: one forward pass over the corpus up to the deepest layer, and one over the windows kept. A batch and
        at most `top_k` windows for each feature of each layer are in memory.
    """
    check_counts(top_k=top_k, length=length, limit=limit)
    spec = FeatureSpec.of(model, features)
    ids = corpus_ids(corpus)
    if ids is not None:
        length = ids.shape[-1] if length is None else length
    length = min(LENGTH, model.cfg.n_ctx) if length is None else length
    windows = token_windows(
        model, corpus if ids is None else ids, length=length, prepend_bos=prepend_bos, limit=limit
    )
    bos = None if ids is not None else bos_to_prepend(model, prepend_bos)
    heap = _Heap(spec, top_k, length, bos)
    rows = _rows(model, length)

    def batches() -> Iterator[Int[Tensor, "row pos"]]:
        for index, batch in enumerate(_batches(windows, rows)):
            if index == 0:
                check_rows_alike(model, batch[:2])
            yield from (tokens for tokens, _ in in_parts(heap.add, batch, len(batch)))

    with Checkpoint(
        resume, "search", heap.arguments, owner="a search for examples in a corpus", names=_TENSORS
    ) as saved:
        if saved.tensors:
            heap.resume(saved, windows, limit)
        for _ in saved.loop(
            batches(),
            lambda: (heap.tensors(), heap.read),
            total=limit,
            desc="reading",
            unit="window",
            progress=progress,
            size=len,
        ):
            pass
    if not heap.read:
        raise ValueError(
            f"the corpus is shorter than one window of {length} tokens: give more text, or a smaller length"
        )
    given = ids is not None and all_bos(model.tokenizer, ids[:, 0])
    return heap.result(bos is not None or given)


@dataclasses.dataclass(frozen=True, eq=False)
class _Seen:
    """The state after some windows."""

    read: int
    best: dict[int, TopRows]
    """By layer, each feature's largest activations and the numbers of their windows."""
    kept: dict[int, Int[Tensor, " pos"]]
    """The best windows, by number."""
    corpus: Any
    """A hash of all windows so far."""


class _Heap:
    """The best windows so far."""

    def __init__(self, spec: FeatureSpec, top_k: int, length: int, bos: int | None) -> None:
        self.spec, self.top_k, self.length, self.bos = spec, top_k, length, bos
        model = spec.model
        self.special = torch.tensor(sorted(special_ids(model.tokenizer)), dtype=torch.long)
        empty = TopRows.empty(top_k, len(spec.features), model.W_E.device)
        # one object, so an interruption never leaves a part of it ahead of the rest
        self.seen = _Seen(0, dict.fromkeys(spec.layers, empty), {}, hashlib.sha256())

    @property
    def read(self) -> int:
        return self.seen.read

    def counts(self, tokens: Int[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """The positions whose activations count."""
        return ~torch.isin(tokens, self.special)

    def add(self, tokens: Int[Tensor, "row pos"]) -> None:
        """Run windows and keep the best so far."""
        seen, found = self.seen, dict[int, TopRows]()
        silent = ~self.counts(tokens)
        numbers = torch.arange(seen.read, seen.read + len(tokens))

        def note(activation: Tensor, layer: int) -> None:
            values = self.spec.read(activation)
            check_numbers(values.flatten(0, 1), self.spec.name(layer))
            values = values.masked_fill(silent.to(values.device)[..., None], -torch.inf).amax(1)
            found[layer] = seen.best[layer].joined(values, numbers.to(values.device))

        self._watch(tokens, note)
        used = torch.cat([best.rows[best.values > -torch.inf] for best in found.values()]).unique().tolist()
        own = dict(zip(numbers.tolist(), tokens, strict=True))
        # copies, because a view would keep its whole batch in memory
        kept = {number: seen.kept[number] if number in seen.kept else own[number].clone() for number in used}
        corpus = seen.corpus.copy()
        corpus.update(tokens.numpy().tobytes())
        self.seen = _Seen(seen.read + len(tokens), found, kept, corpus)

    def _watch(self, tokens: Int[Tensor, "row pos"], note: Any) -> None:
        readers = {self.spec.name(layer): functools.partial(note, layer=layer) for layer in self.spec.layers}
        watch(self.spec.model, tokens, readers)

    def result(self, prepend_bos: bool) -> FeatureExamples:
        numbers = torch.tensor(sorted(self.seen.kept), dtype=torch.long)
        tokens = (
            torch.stack([self.seen.kept[number] for number in numbers.tolist()])
            if len(numbers)
            else (torch.zeros(0, self.length, dtype=torch.long))
        )
        bests = [self.seen.best[layer] for layer in self.spec.layers]
        wanted = torch.stack([best.rows.T for best in bests]).cpu().clone()
        absent = torch.stack([best.values.T for best in bests]).cpu() == -torch.inf
        windows = torch.searchsorted(numbers, wanted).masked_fill(absent, -1)
        activations = self._activations(tokens, windows)
        peaks = activations.nan_to_num(nan=-torch.inf).amax(-1)
        # sorted again, because rounding in another batch may swap two windows
        order = peaks.sort(dim=-1, descending=True, stable=True).indices
        windows = windows.gather(-1, order)
        activations = activations.gather(2, order[..., None].expand_as(activations))
        positions = activations.nan_to_num(nan=-torch.inf).argmax(-1).masked_fill(windows < 0, -1)
        fields = self.spec.fields()
        del fields["prefix"]
        return FeatureExamples(
            **fields | {"prepend_bos": prepend_bos},
            layers=self.spec.layers,
            read=self.read,
            numbers=numbers,
            tokens=tokens,
            windows=windows,
            positions=positions,
            activations=activations,
            strings=self.spec.strings(tokens),
        )

    def _activations(
        self, tokens: Int[Tensor, "window pos"], windows: Int[Tensor, "layer feature k"]
    ) -> Float[Tensor, "layer feature k pos"]:
        """Activations of the kept windows, at every position that counts."""
        found = torch.full((*windows.shape, self.length), torch.nan, dtype=torch.float32)
        begin = 0

        def note(activation: Tensor, layer: int, begin: int, silent: Tensor) -> None:
            values = self.spec.read(activation).cpu().masked_fill(silent[..., None], torch.nan)
            at = self.spec.layers.index(layer)
            own = windows[at]
            feature, k = ((own >= begin) & (own < begin + len(values))).nonzero(as_tuple=True)
            found[at, feature, k] = values[own[feature, k] - begin, :, feature]

        def run(part: Tensor) -> None:
            self._watch(part, functools.partial(note, begin=begin, silent=~self.counts(part)))

        for part, _ in in_parts(run, tokens, _rows(self.spec.model, self.length)):
            begin += len(part)
        return found

    # -- the checkpoint ----------------------------------------------------------------------------

    def arguments(self) -> dict[str, object]:
        return self.spec.fingerprint | {"top_k": self.top_k, "length": self.length, "BOS": self.bos}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        seen = self.seen
        best = [seen.best[layer] for layer in self.spec.layers]
        kept = list(seen.kept.values())
        return {
            "values": torch.stack([each.values for each in best]).clone(),
            "numbers": torch.stack([each.rows for each in best]).clone(),
            "kept": torch.tensor(list(seen.kept), dtype=torch.long),
            "tokens": torch.stack(kept) if kept else torch.zeros(0, self.length, dtype=torch.long),
            "corpus": torch.tensor(list(seen.corpus.digest()), dtype=torch.uint8),
        }

    def resume(self, saved: Checkpoint, windows: Iterator[Tensor], limit: int | None) -> None:
        """Restore a checkpoint, and skip the windows already read."""
        tensors, read = saved.tensors, saved.step
        if limit is not None and read > limit:
            raise ValueError(
                f"the search in {saved.path} has already read {read} windows, more than the limit of "
                f"{limit}: give a larger limit, or another file"
            )
        corpus = hashlib.sha256()
        for window in itertools.islice(windows, read):
            corpus.update(window.numpy().tobytes())
        if list(corpus.digest()) != tensors["corpus"].tolist():
            raise ValueError(
                f"the search in {saved.path} was begun on another corpus: use the same one to resume it, or "
                "another file"
            )
        device = self.spec.model.W_E.device
        best = {
            layer: TopRows(tensors["values"][at].to(device), tensors["numbers"][at].to(device))
            for at, layer in enumerate(self.spec.layers)
        }
        kept = dict(zip(tensors["kept"].tolist(), tensors["tokens"], strict=True))
        self.seen = _Seen(read, best, kept, corpus)


def _rows(model: LensModel, length: int) -> int:
    """How many windows run together."""
    return max(1, int(TOKEN_BUDGET / row_charge(model, length, length)))


def _batches(windows: Iterator[Int[Tensor, " pos"]], rows: int) -> Iterator[Int[Tensor, "row pos"]]:
    while some := list(itertools.islice(windows, rows)):
        yield torch.stack(some)
