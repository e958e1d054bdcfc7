"""Padding and windows: every token is read once, with the promised context."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from mechlens.text.batches import Batch, cut, prompt_batch
from mechlens.text.prompts import prompt_tokens

BOS = 0


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    n_ctx=st.integers(2, 12),
    with_bos=st.booleans(),
    left=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_token_is_read_after_the_tokens_before_it(lengths, n_ctx, with_bos, left, seed):
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths)
    tokens = torch.full((len(lengths), width), 99)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        places = slice(width - length, width) if left else slice(0, length)
        tokens[row, places] = torch.randint(1, 90, (length,), generator=draw)
        if with_bos:
            tokens[row, width - length if left else 0] = BOS
        mask[row, places] = True
    pieces = cut(Batch(tokens, mask), n_ctx, bos=BOS)
    assert pieces.tokens.shape[1] <= n_ctx
    for row, length in enumerate(lengths):
        own = tokens[row][mask[row]].tolist()
        places = mask[row].nonzero()[:, 0].tolist()
        for index, pos in enumerate(places):
            piece, offset = int(pieces.piece[row, pos]), int(pieces.offset[row, pos])
            seen = pieces.tokens[piece, : offset + 1].tolist()
            if length <= n_ctx:
                assert seen == own[: index + 1]
            elif with_bos:
                assert seen[0] == BOS
                assert seen[1:] == own[max(1, index + 2 - len(seen)) : index + 1]
            else:
                assert seen == own[index + 1 - len(seen) : index + 1]
            # from the second window on, half a context precedes the new positions (minus BOS and a new token)
            if index >= n_ctx:
                assert len(seen) >= n_ctx // 2


def test_texts_are_padded_on_the_right(tiny_bos_model):
    batch = prompt_batch(tiny_bos_model, ["abc", "a"])
    tokenizer = tiny_bos_model.tokenizer
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert tokenizer.decode(batch.tokens[1, 1:2]) == "a"
    assert (batch.first_tokens == tokenizer.bos_token_id).all()


@pytest.mark.parametrize(
    ("prompt", "mask", "message"),
    [
        ([], None, "the list of prompts is empty"),
        (["a", ""], None, "the text is empty"),
        ("abc", [[1, 1, 1, 1]], "but the prompt is text"),
        (torch.ones(2, 3, dtype=torch.long), [[1, 1, 1]], r"attention_mask is \(1, 3\), but the tokens are"),
        (torch.ones(1, 3, dtype=torch.long), [[0, 0, 0]], "row 0 of attention_mask is all padding"),
        (torch.ones(1, 3, dtype=torch.long), [[1, 0, 1]], "row 0 of attention_mask has padding between"),
    ],
)
def test_invalid_prompts_and_masks_are_errors(tiny_bos_model, prompt, mask, message):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=message):
        prompt_batch(tiny_bos_model, prompt, attention_mask=mask)


def test_a_mixed_list_of_texts_and_ids_is_refused(tiny_bos_model):
    with pytest.raises(TypeError, match="got a int: pass token ids as a tensor"):
        prompt_batch(tiny_bos_model, ["ab", 2])


@pytest.mark.parametrize(
    "given", [[[5, 6, 7]], np.array([5, 6, 7]), [5, 6, 7], BatchEncoding({"input_ids": [[5, 6, 7]]})]
)
def test_ids_may_be_lists_arrays_or_the_output_of_a_tokenizer(tiny_bos_model, given):
    assert prompt_batch(tiny_bos_model, given).tokens.tolist() == [[5, 6, 7]]
    assert prompt_tokens(tiny_bos_model, given).tolist() == [[5, 6, 7]]


def test_a_tokenizers_mask_is_used(tiny_bos_model):
    given = BatchEncoding({"input_ids": [[5, 6, 7], [0, 0, 9]], "attention_mask": [[1, 1, 1], [0, 0, 1]]})
    assert prompt_batch(tiny_bos_model, given).mask.tolist() == [[True] * 3, [False, False, True]]
    with pytest.raises(ValueError, match="sequences must have the same length here"):
        prompt_tokens(tiny_bos_model, given)


def test_rows_of_ids_of_different_lengths_are_refused(tiny_bos_model):
    with pytest.raises(ValueError, match="mark the padding with attention_mask"):
        prompt_batch(tiny_bos_model, [[1, 2], [3]])
