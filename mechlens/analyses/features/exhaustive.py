"""Complete search: which token of the whole vocabulary excites each feature most."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.spec import SAVE_SECONDS, Sought, check_numbers
from mechlens.arguments import check_counts
from mechlens.measures.accumulators import TopRows
from mechlens.models.protocol import LensModel
from mechlens.models.run.arithmetic import block_flop, block_rate
from mechlens.models.run.next_token_scan import candidates
from mechlens.progress import announce, progress_bar, spoken
from mechlens.results import CompleteSearch
from mechlens.results.checkpoint import load_state, save_state, state_file
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
    state: str | os.PathLike[str] | None = None,
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
        state: a `.safetensors` file. Progress is saved there now and then, and whenever the search is
            interrupted; a search that finds the file goes on from there.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        Ids and activations in the model's own units, float32.

    Raises:
        ValueError: processed weights, a layer, feature or site that is not there, a prefix that the model
            cannot be run on, `top_k` beyond the vocabulary, activations that are nan, or a state of another
            search.

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
    d_vocab, file = model.cfg.d_vocab, state_file(state)
    check_counts(top_k=top_k, batch_size=batch_size)
    if top_k > d_vocab:
        raise ValueError(f"top_k must be at most the vocabulary's {d_vocab}, but is {top_k}")
    runs = candidates(model, sought.prefix, sought.names)
    done = _Done(sought, top_k, file)
    found: dict[int, tuple[TopRows, TopRows]] = {}

    def note(activation: Tensor, layer: int, ids: Tensor) -> None:
        rows = sought.read(activation)
        # few columns have anything new after the first tokens: the rest of the work is done on those alone
        # (aminmax takes ten times as long along this axis)
        low, high = rows.amin(0), rows.amax(0)
        check_numbers(torch.stack([low, high]), sought.name(layer))
        highest, lowest = done.best[layer]
        numbers, above, below = ids.to(rows.device), highest.changed_by(high), lowest.changed_by(-low)
        found[layer] = (
            highest.joined(rows[:, above], numbers, above),
            lowest.joined(-rows[:, below], numbers, below),
        )

    def readers(ids: Int[Tensor, " row"]) -> dict[str, functools.partial[None]]:
        return {sought.name(layer): functools.partial(note, layer=layer, ids=ids) for layer in sought.layers}

    if progress is not False:
        blocks = max(sought.layers) + 1
        operations = (d_vocab - done.count) * blocks * block_flop(model, len(sought.prefix) + 1)
        seconds = operations / block_rate(model)
        announce(
            f"search: {d_vocab - done.count:,} tokens through {blocks} blocks for {len(sought.features):,} "
            f"features of {len(sought.layers)} layers ({operations / 1e12:.2g} TFLOP), "
            f"about {spoken(seconds)}" + (f"; saved in {file}, from where it goes on" if file else ""),
            seconds=seconds,
            progress=progress,
        )
    saved = time.monotonic()
    bar = progress_bar(total=d_vocab, initial=done.count, desc="searching", unit="token", progress=progress)
    try:
        for ids in runs.vocabulary(readers, begin=done.count, batch_size=batch_size):
            # at once, so that whatever interrupts finds neither a layer nor the count ahead of the rest
            done.so_far = (done.count + len(ids), dict(found))
            bar.update(len(ids))
            if file is not None and time.monotonic() - saved > SAVE_SECONDS:
                done.save(file)
                saved = time.monotonic()
    finally:
        bar.close()
        if file is not None:
            done.save(file)
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


class _Done:
    """The best of the tokens so far, by layer; of the lowest, their negatives."""

    def __init__(self, sought: Sought, top_k: int, file: Path | None) -> None:
        self.sought, self.top_k = sought, top_k
        device, columns = sought.model.W_E.device, len(sought.features)
        empty = TopRows.empty(top_k, columns, device)
        self.so_far = (0, dict.fromkeys(sought.layers, (empty, empty)))
        if file is not None and file.exists():
            self._load(file, device)

    @property
    def count(self) -> int:
        return self.so_far[0]

    @property
    def best(self) -> dict[int, tuple[TopRows, TopRows]]:
        return self.so_far[1]

    def _arguments(self) -> dict[str, object]:
        return self.sought.fingerprint | {"top_k": self.top_k}

    def _load(self, file: Path, device: torch.device) -> None:
        owner = "a complete search"
        tensors, count = load_state(file, "search", owner, _TENSORS, self._arguments())

        def rows(end: str, index: int) -> TopRows:
            return TopRows(tensors[end][index].T.to(device), tensors[f"{end}_ids"][index].T.to(device))

        best = {
            layer: (rows("highest", index), rows("lowest", index))
            for index, layer in enumerate(self.sought.layers)
        }
        self.so_far = (count, best)

    def save(self, file: Path) -> None:
        save_state(file, "search", self.tensors(), self._arguments(), step=self.count)

    def tensors(self) -> dict[str, Tensor]:
        """`[layer, feature, k]`, by name."""
        both = [self.best[layer] for layer in self.sought.layers]
        found = {}
        for index, end in enumerate(("highest", "lowest")):
            # a copy: what leaves inference mode can be computed with
            found[end] = torch.stack([each[index].values.T for each in both]).cpu().clone()
            found[f"{end}_ids"] = torch.stack([each[index].rows.T for each in both]).cpu().clone()
        return found
