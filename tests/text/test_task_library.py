"""Built-in tasks for a tokenizer that splits years like GPT-2: two pairs of digits, or one token."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mechlens.text.task_library import ARGUMENTS, made
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


def words_tokenizer(style, words):
    """A tokenizer of some words with a space before them, written as in GPT-2 or as in Llama."""
    space = "Ġ" if style == "gpt2" else "▁"
    pieces = ["<unk>", *(f"{space}{word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(pieces)}, "<unk>"))
    if style == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        # Llama's puts a space before every text
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    return SimpleNamespace(tokenizer=fast, cfg=SimpleNamespace(d_vocab=len(fast), n_ctx=256))


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_an_induction_prompt_begins_again_and_its_answer_came_next(style):
    model = words_tokenizer(style, ARGUMENTS)
    prompts, counterfactual = made(model, "induction", 40, torch.Generator().manual_seed(0), None)
    assert counterfactual == "other-successor"
    lengths, distances = set(), set()
    for prompt in prompts:
        found = encoded(model, prompt, prepend_bos=False)
        clean, corrupted = found.clean[0].tolist(), found.corrupted[0].tolist()
        lengths.add(len(clean))
        first, following, other, end = (found.roles[role] for role in ("FIRST", "NEXT", "OTHER", "END"))
        distances.add(end - first)
        size = clean.index(clean[0], 1)
        assert len(set(clean[:size])) == size
        assert clean[size:] == clean[: first + 1] == corrupted[size:] == corrupted[: first + 1]
        assert (following, clean[following]) == (first + 1, found.answers[0])
        assert clean[other] == found.wrong[0]
        # nothing but the two words' places differs, and neither is repeated
        assert (corrupted[following], corrupted[other]) == (clean[other], clean[following])
        same = set(range(len(clean))) - {following, other}
        assert [clean[at] for at in same] == [corrupted[at] for at in same]
        assert clean.count(clean[following]) == clean.count(clean[other]) == 1
    assert lengths == {18}
    assert distances == {10, 11, 12, 13, 14}


def test_too_few_words_for_an_induction_prompt_are_counted():
    model = words_tokenizer("gpt2", ARGUMENTS[:9])
    with pytest.raises(ValueError, match="at least 14 words that are one token of this model, but only 9 of"):
        made(model, "induction", 4, torch.Generator().manual_seed(0), None)


def test_a_tokenizer_that_joins_words_cannot_read_an_induction_prompt():
    model = words_tokenizer("gpt2", ARGUMENTS)
    model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match=r"does not read the words of .* as one token each"):
        made(model, "induction", 1, torch.Generator().manual_seed(0), None)
