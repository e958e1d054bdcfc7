"""Exhaustive search: each feature's maximally activating tokens in the whole vocabulary."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.features.spec import Features, FeatureSpec, PrefixLike, check_numbers
from mechlens.arguments import check_counts
from mechlens.errors import ArgumentError
from mechlens.measures.accumulators import TopRows
from mechlens.models.protocol import LensModel
from mechlens.models.run.arithmetic import block_flop, block_rate
from mechlens.models.run.next_token_scan import candidates
from mechlens.progress import announce, duration
from mechlens.results import ExhaustiveSearch
from mechlens.results.checkpoint import Checkpoint
from mechlens.text.tokens import vocabulary_hash

_TENSORS = ("highest", "highest_ids", "lowest", "lowest_ids")


def search_exhaustive(
    model: LensModel,
    features: Features | None = None,
    *,
    prefix: PrefixLike = None,
    top_k: int = 1,
    batch_size: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> ExhaustiveSearch:
    """Find each feature's maximally and minimally activating tokens in the whole vocabulary.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Its activation is
    read at every token of the vocabulary, alone or after a prefix.

    Args:
        model: with unprocessed weights.
        features: which layers and features; None is all of `resid_post`. One pass serves all of them.
        prefix: text or token ids before every token; `Prefix` adds BOS. None is no prefix.
        top_k: tokens to keep at each end.
        batch_size: tokens that run together; None is 1024, or as many as memory allows after a long prefix.
            It is halved when memory runs out.
        resume: a `.safetensors` file to save progress to, every half minute and when the search ends or is
            interrupted. If the file exists, the search resumes from it.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        Ids and activations in the model's own units, float32. Ids beyond the tokenizer's length are included.

    Raises:
        TypeError: features or a prefix of the wrong type.
        ValueError: processed weights, a layer or feature out of range, a prefix that the model cannot read,
            `top_k` larger than the vocabulary, activations that are nan, or a checkpoint from another search.

    Example:
        >>> found = mechlens.search_exhaustive(raw, mechlens.Features(layers=2, indices=[0, 7]), top_k=3)
        >>> found.ids.shape  # layer, feature, k
        torch.Size([1, 2, 3])

    References: Badger, "Language Model Features", "Complete Search Features", which searches one feature of
        one layer at a time.
    Cost: one forward pass over the vocabulary up to the deepest layer, for any number of features. After a
        prefix, each token costs one position. Without a prefix, attention is trivial: queries and keys are
        not computed, and `W_V @ W_O` is one product, so a GPT-2 block costs 9/12 as much.
    """
    spec = FeatureSpec.of(model, features, prefix)
    d_vocab = model.cfg.d_vocab
    check_counts(top_k=top_k, batch_size=batch_size)
    if top_k > d_vocab:
        raise ArgumentError("top_k", f"at most {d_vocab}, the size of the vocabulary", top_k)
    runs = candidates(model, spec.prefix, spec.names)
    found: dict[int, tuple[TopRows, TopRows]] = {}
    with Checkpoint(
        resume,
        "search",
        lambda: spec.fingerprint | {"top_k": top_k},
        owner="an exhaustive search",
        names=_TENSORS,
    ) as saved:
        done = _Best(spec, top_k, saved)

        def note(activation: Tensor, layer: int, ids: Tensor) -> None:
            rows = spec.read(activation)
            # few columns change after the first batches, so only those are updated
            # (aminmax takes ten times as long along this axis)
            low, high = rows.amin(0), rows.amax(0)
            check_numbers(torch.stack([low, high]), spec.name(layer))
            highest, lowest = done.best[layer]
            numbers, above, below = ids.to(rows.device), highest.changed_by(high), lowest.changed_by(-low)
            found[layer] = (
                highest.joined(rows[:, above], numbers, above),
                lowest.joined(-rows[:, below], numbers, below),
            )

        def readers(ids: Int[Tensor, " row"]) -> dict[str, functools.partial[None]]:
            return {spec.name(layer): functools.partial(note, layer=layer, ids=ids) for layer in spec.layers}

        if progress is not False:
            _announce(spec, d_vocab - done.count, saved.path, progress)
        for ids in saved.loop(
            runs.vocabulary(readers, begin=done.count, batch_size=batch_size),
            lambda: (done.tensors(), done.count),
            total=d_vocab,
            desc="searching",
            unit="token",
            progress=progress,
            size=len,
        ):
            # one assignment, so an interruption never leaves a layer or the count ahead of the rest
            done.so_far = (done.count + len(ids), dict(found))
    tensors = done.tensors()
    return ExhaustiveSearch(
        **spec.fields(),
        layers=spec.layers,
        ids=tensors["highest_ids"],
        activations=tensors["highest"],
        lowest_ids=tensors["lowest_ids"],
        lowest_activations=-tensors["lowest"],
        strings=spec.strings(tensors["highest_ids"], tensors["lowest_ids"]),
        vocabulary=vocabulary_hash(model.tokenizer),
    )


def _announce(spec: FeatureSpec, n_tokens: int, path: Path | None, progress: bool | None) -> None:
    """Announce how much is computed, and about how long it takes."""
    model, blocks = spec.model, max(spec.layers) + 1
    operations = n_tokens * blocks * block_flop(model, len(spec.prefix) + 1)
    seconds = operations / block_rate(model)
    announce(
        f"search: {n_tokens:,} tokens through {blocks} blocks for {len(spec.features):,} features of "
        f"{len(spec.layers)} layers ({operations / 1e12:.2g} TFLOP), about {duration(seconds)}"
        + (f"; progress is saved to {path}" if path else ""),
        seconds=seconds,
        progress=progress,
    )


class _Best:
    """The best tokens so far, by layer. Lowest activations are stored negated."""

    def __init__(self, spec: FeatureSpec, top_k: int, saved: Checkpoint) -> None:
        self.layers = spec.layers
        device = spec.model.W_E.device
        empty = TopRows.empty(top_k, len(spec.features), device)

        def rows(end: str, index: int) -> TopRows:
            if not saved.tensors:
                return empty
            values, ids = saved.tensors[end][index], saved.tensors[f"{end}_ids"][index]
            return TopRows(values.T.to(device), ids.T.to(device))

        best = {
            layer: (rows("highest", index), rows("lowest", index)) for index, layer in enumerate(self.layers)
        }
        self.so_far = (saved.step, best)

    @property
    def count(self) -> int:
        return self.so_far[0]

    @property
    def best(self) -> dict[int, tuple[TopRows, TopRows]]:
        return self.so_far[1]

    def tensors(self) -> dict[str, Tensor]:
        """`[layer, feature, k]`, by name."""
        both = [self.best[layer] for layer in self.layers]
        found = {}
        for index, end in enumerate(("highest", "lowest")):
            # copies, because tensors made in inference mode do not support autograd
            found[end] = torch.stack([each[index].values.T for each in both]).cpu().clone()
            found[f"{end}_ids"] = torch.stack([each[index].rows.T for each in both]).cpu().clone()
        return found
