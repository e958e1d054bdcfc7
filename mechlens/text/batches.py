"""Batches of sequences of different lengths, which may be longer than the model's context.

In a causal model, activations at a token depend only on the tokens before it. So padding is moved to the
right, where it changes nothing, and a sequence longer than the context is run in overlapping windows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechlens.text.prompts import Prompt, as_ids, as_texts, text_ids, warn_of_padding


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, padded to one length."""

    tokens: Int[Tensor, "batch pos"]
    """0 at padding, because padding ids may lie outside the vocabulary."""
    mask: Bool[Tensor, "batch pos"]
    """False at padding; the True positions of a row are contiguous."""

    @property
    def first_tokens(self) -> Int[Tensor, " rows"]:
        """The first token of each row."""
        return self.tokens.gather(1, self.mask.int().argmax(1, keepdim=True))[:, 0]


def prompt_batch(
    model: Any, prompt: Prompt, *, attention_mask: Tensor | None = None, prepend_bos: bool | None = None
) -> Batch:
    """Make a batch from a text, several texts (padded on the right) or token ids, on the CPU.

    Args:
        model: anything with TransformerLens's `cfg` and `tokenizer`.
        prompt: a text, several texts, token ids `[batch, pos]`, or the output of a tokenizer with its mask.
        attention_mask: for token ids, 1 or True at tokens, 0 or False at padding, which may be at both ends.
        prepend_bos: for texts, whether to prepend BOS; None does so if the tokenizer has one.

    Returns:
        Tokens and mask `[batch, pos]`, which `logit_lens` accepts as its prompt.

    Raises:
        TypeError: the prompt is neither text nor token ids.
        ValueError: no text or an empty one, ids that are not integers, a mask for texts, or a mask that
            differs from the tokens in shape, has padding between tokens, or has a row of padding only.

    Example:
        >>> batch = mechlens.prompt_batch(model, ["The captain", "The"], prepend_bos=False)
        >>> batch.mask.sum(1) == batch.tokens.shape[1]
        tensor([ True, False])
    """
    texts = as_texts(prompt)
    if texts is None:
        tokens, mask = as_ids(prompt)
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(
                f"tokens must be [batch, pos] with at least one token, got {tuple(tokens.shape)}"
            )
        if attention_mask is not None:
            # a copy, because the caller may change the mask later
            mask = torch.as_tensor(attention_mask).to("cpu", torch.bool, copy=True)
            mask = mask[None] if mask.ndim == 1 else mask
        if mask is None:
            warn_of_padding(model, tokens)
            return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        _check_mask(mask, tokens)
        return Batch(tokens.masked_fill(~mask, 0), mask)
    if attention_mask is not None:
        raise ValueError("attention_mask is for token ids, but the prompt is text")
    rows = [text_ids(model, text, prepend_bos=prepend_bos) for text in texts]
    length = torch.tensor([len(row) for row in rows])
    return Batch(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.arange(int(length.max())) < length[:, None],
    )


def _check_mask(mask: Bool[Tensor, "rows cols"], tokens: Int[Tensor, "batch pos"]) -> None:
    if mask.shape != tokens.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, but the tokens are {tuple(tokens.shape)}")
    for index, row in enumerate(mask.int()):
        stretches = int(row[0]) + int((row.diff() == 1).sum())
        if stretches == 0:
            raise ValueError(f"row {index} of attention_mask is all padding: leave that row out")
        if stretches > 1:
            raise ValueError(
                f"row {index} of attention_mask has padding between tokens: padding must be at the ends"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """The windows that a model is run on, and where each token of a batch is in them."""

    tokens: Int[Tensor, "piece width"]
    """Padded on the right."""
    piece: Int[Tensor, "batch pos"]
    """The piece in which each position is read."""
    offset: Int[Tensor, "batch pos"]
    """Its index in that piece, where it sees `offset + 1` tokens. Both are 0 for padding."""
    lengths: Int[Tensor, " piece"]
    """Length of each piece without padding."""


def cut(batch: Batch, n_ctx: int, *, bos: int | None) -> Pieces:
    """Cut a batch into pieces that fit a context.

    A row that fits is one piece. A longer one is read in windows of `n_ctx` tokens, each of which except
    the first begins half a context before the first token read in it. If the row begins with BOS, so does
    every window.

    Args:
        bos: the tokenizer's own BOS, or None.
    """
    pieces: list[Tensor] = []
    piece, offset = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens)
    for row, (ids, real) in enumerate(zip(batch.tokens, batch.mask, strict=True)):
        places = real.nonzero()[:, 0]
        own = ids[places]
        head = own[:1] if bos is not None and int(own[0]) == bos else own[:0]
        done = 0
        while done < len(own):
            begin = 0 if done == 0 else max(len(head), done - n_ctx // 2)
            lead = head if done and n_ctx > 1 else own[:0]
            # at least one new token in each window, however small the context
            begin = max(begin, done - (n_ctx - len(lead) - 1))
            window = torch.cat([lead, own[begin : begin + n_ctx - len(lead)]])
            end = begin + len(window) - len(lead)
            piece[row, places[done:end]] = len(pieces)
            offset[row, places[done:end]] = torch.arange(done, end) - begin + len(lead)
            pieces.append(window)
            done = end
    lengths = torch.tensor([len(window) for window in pieces])
    return Pieces(torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), piece, offset, lengths)
