"""Complete search: which token of the whole vocabulary excites each feature most."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.spec import Sought, check_numbers
from mechlens.arguments import check_counts
from mechlens.measures.accumulators import TopRows
from mechlens.models.protocol import LensModel
from mechlens.models.run.arithmetic import block_flop, block_rate
from mechlens.models.run.next_token_scan import candidates
from mechlens.progress import announce, duration
from mechlens.results import CompleteSearch
from mechlens.results.checkpoint import Checkpoint
from mechlens.text.tokens import vocabulary_hash

_TENSORS = ("highest", "highest_ids", "lowest", "lowest_ids")


def search_complete(
    model: LensModel,
    *,
    layers: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    site: str = "resid_post",
    directions: Float[Tensor, "direction d_model"] | None = None,
    prefix: str | Int[Tensor, "*one prefix"] | None = None,
    prepend_bos: bool = False,
    top_k: int = 1,
    batch_size: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> CompleteSearch:
    """Find the tokens that excite each feature most, and least, among all tokens of the vocabulary.

    A feature is one element of an activation: the input of one token, alone or behind a prefix, that makes
    it largest at that token. Ids past the tokenizer's length are searched, too, as in the source.

    Args:
        layers: whose features are searched; None is all. All are served by one pass.
        features: elements of the activation; None is all.
        site: `resid_post` (a block's output), `attn_out`, `mlp_out` or `post` (the MLP's neurons).
        directions: vectors whose product with `resid_post` is the feature, instead of its elements; then
            `features` chooses among them. For what a logit reads behind the last norm, multiply by the
            norm's weights, which are not folded into `W_U` here: `(W_U[:, a] - W_U[:, b]) * ln_final.w`.
        prefix: a text or token ids to stand before every token.
        prepend_bos: begin with BOS; the source does not.
        top_k: how many tokens to keep at either end.
        batch_size: tokens that run together; None takes 1024, or what memory allows behind a long prefix. It
            is halved when memory runs out.
        resume: a `.safetensors` file to save progress to, every half minute and when the search ends or is
            interrupted. If the file exists, the search resumes from it.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        Ids and activations in the model's own units, float32.

    Raises:
        ValueError: processed weights, a layer, feature or site that is not there, a prefix that the model
            cannot be run on, `top_k` beyond the vocabulary, activations that are nan, or a checkpoint of
            another search.

    Source: Badger, "Language Model Features", "Complete Search Features"; there one feature of one layer at a
    time.
    Cost: one forward pass of the vocabulary up to the deepest layer, for any number of features. Behind a
    prefix each token costs one position. Without one, queries and keys are not computed (they change
    nothing), and values and output are one product, so that a GPT-2 block costs 9/12.
    """
    sought = Sought.of(
        model,
        site=site,
        layers=layers,
        features=features,
        directions=directions,
        prefix=prefix,
        prepend_bos=prepend_bos,
    )
    d_vocab = model.cfg.d_vocab
    check_counts(top_k=top_k, batch_size=batch_size)
    if top_k > d_vocab:
        raise ValueError(f"top_k must be at most the vocabulary's {d_vocab}, but is {top_k}")
    runs = candidates(model, sought.prefix, sought.names)
    found: dict[int, tuple[TopRows, TopRows]] = {}
    with Checkpoint(
        resume,
        "search",
        lambda: sought.fingerprint | {"top_k": top_k},
        owner="an exhaustive search",
        names=_TENSORS,
    ) as saved:
        done = _Done(sought, top_k, saved)

        def note(activation: Tensor, layer: int, ids: Tensor) -> None:
            rows = sought.read(activation)
            # few columns have anything new after the first tokens: the rest of the work is done on those
            # alone (aminmax takes ten times as long along this axis)
            low, high = rows.amin(0), rows.amax(0)
            check_numbers(torch.stack([low, high]), sought.name(layer))
            highest, lowest = done.best[layer]
            numbers, above, below = ids.to(rows.device), highest.changed_by(high), lowest.changed_by(-low)
            found[layer] = (
                highest.joined(rows[:, above], numbers, above),
                lowest.joined(-rows[:, below], numbers, below),
            )

        def readers(ids: Int[Tensor, " row"]) -> dict[str, functools.partial[None]]:
            return {
                sought.name(layer): functools.partial(note, layer=layer, ids=ids) for layer in sought.layers
            }

        if progress is not False:
            _announce(sought, d_vocab - done.count, saved.path, progress)
        for ids in saved.loop(
            runs.vocabulary(readers, begin=done.count, batch_size=batch_size),
            lambda: (done.tensors(), done.count),
            total=d_vocab,
            desc="searching",
            unit="token",
            progress=progress,
            size=len,
        ):
            # at once, so that an interruption finds neither a layer nor the count ahead of the rest
            done.so_far = (done.count + len(ids), dict(found))
    tensors = done.tensors()
    return CompleteSearch(
        **sought.fields(),
        layers=sought.layers,
        ids=tensors["highest_ids"],
        activations=tensors["highest"],
        lowest_ids=tensors["lowest_ids"],
        lowest_activations=-tensors["lowest"],
        strings=sought.strings(tensors["highest_ids"], tensors["lowest_ids"]),
        vocabulary=vocabulary_hash(model.tokenizer),
    )


def _announce(sought: Sought, n_tokens: int, path: Path | None, progress: bool | None) -> None:
    """Say how much there is to compute, and how long it takes."""
    model, blocks = sought.model, max(sought.layers) + 1
    operations = n_tokens * blocks * block_flop(model, len(sought.prefix) + 1)
    seconds = operations / block_rate(model)
    announce(
        f"search: {n_tokens:,} tokens through {blocks} blocks for {len(sought.features):,} features of "
        f"{len(sought.layers)} layers ({operations / 1e12:.2g} TFLOP), about {duration(seconds)}"
        + (f"; progress is saved to {path}" if path else ""),
        seconds=seconds,
        progress=progress,
    )


class _Done:
    """The best of the tokens so far, by layer; of the lowest, their negatives."""

    def __init__(self, sought: Sought, top_k: int, saved: Checkpoint) -> None:
        self.layers = sought.layers
        device = sought.model.W_E.device
        empty = TopRows.empty(top_k, len(sought.features), device)

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
            # a copy: what leaves inference mode can be computed with
            found[end] = torch.stack([each[index].values.T for each in both]).cpu().clone()
            found[f"{end}_ids"] = torch.stack([each[index].rows.T for each in both]).cpu().clone()
        return found
