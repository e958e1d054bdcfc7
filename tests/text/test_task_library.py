"""Built-in tasks for a tokenizer that splits years like GPT-2: two pairs of digits, or one token."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechlens.text.task_library import made
from mechlens.text.task_prompts import encoded

WHOLE = ("1776", "1492")


@pytest.fixture(scope="module")
def reader():
    """A tokenizer of bytes, pairs of digits, the years in `WHOLE` and two nouns."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(pair) for pair in product("0123456789", repeat=2)]
    merges = [("Ġ", "1"), *(("Ġ1", digit) for digit in "0123456789"), *(tuple(pair) for pair in pairs)]
    merges += [(f"Ġ{year[:2]}", year[2:]) for year in WHOLE]
    pieces = dict.fromkeys([*letters, *("".join(merge) for merge in merges)])
    tokenizer = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(" war", normalized=False), AddedToken(" tour", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return SimpleNamespace(tokenizer=fast, cfg=SimpleNamespace(d_vocab=len(fast), n_ctx=256))


def test_later_years_are_right_and_single_token_years_are_left_out(reader):
    assert len(reader.tokenizer(" 1776")["input_ids"]) == 1
    assert len(reader.tokenizer(" 1775")["input_ids"]) == 2
    prompts, counterfactual = made(reader, "greater-than", 400, torch.Generator().manual_seed(0), None)
    assert counterfactual == "year-01"
    for prompt in prompts:
        century, year = prompt.clean.split("year ")[1][:2], int(prompt.clean.split("year ")[1][2:4])
        assert f"{century}{year:02}" not in WHOLE
        assert prompt.clean.endswith(f"to the year {century}")
        assert list(map(int, prompt.answers)) == [later for later in range(100) if later > year]
        assert max(map(int, prompt.wrong)) == year
        assert prompt.corrupted == prompt.clean.replace(f"{century}{year:02}", f"{century}01")
        found = encoded(reader, prompt, prepend_bos=False)
        tokens = found.clean[0]
        assert reader.tokenizer.decode(tokens[found.roles["YY"]]) == f"{year:02}"
        assert reader.tokenizer.decode(tokens[found.roles["XX"]]).strip() == century
        assert found.roles["XX"] == found.roles["END"]
        assert [reader.tokenizer.decode(each) for each in found.answers] == list(prompt.answers)
