"""Random and repeated tokens, and text."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mechlens.arguments import chosen
from mechlens.text.batches import prompt_batch
from mechlens.text.prompts import RepeatedTokens, chat_tokens, prompt_tokens, repeated_tokens, text_tokens
from mechlens.text.tokens import drawable_tokens, token_strings


class Letters:
    """A tokenizer of a, b, c, ... with special tokens; the tests of analyses use real ones."""

    def __init__(self, n: int = 20, bos: int | None = 0) -> None:
        self.n = n
        self.bos_token_id = bos
        self.bos_token = self.eos_token = None if bos is None else "<s>"
        self.init_kwargs = {"bos_token": self.bos_token}
        self.all_special_ids = [0, 1]
        self.added_tokens_decoder = {7: SimpleNamespace(special=True), 8: SimpleNamespace(special=False)}

    def __len__(self) -> int:
        return self.n

    def __call__(self, text, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": [2 + ord(letter) - ord("a") for letter in text]}


def model(n_ctx=64, d_vocab=24, tokenizer=None, **options):
    return SimpleNamespace(
        cfg=SimpleNamespace(n_ctx=n_ctx, d_vocab=d_vocab), tokenizer=tokenizer or Letters(**options)
    )


def test_specials_and_padding_are_never_drawn():
    ids = drawable_tokens(Letters(20), d_vocab=24)
    assert ids.tolist() == [2, 3, 4, 5, 6, 8, *range(9, 20)]
    assert drawable_tokens(Letters(20), d_vocab=10).tolist() == [2, 3, 4, 5, 6, 8, 9]
    assert drawable_tokens(None, d_vocab=3).tolist() == [0, 1, 2]
    drawn = repeated_tokens(model(), seq_len=30, batch=50).tokens[:, 1:]
    assert set(drawn.flatten().tolist()) == set(ids.tolist()), "every drawable token comes, no other"


def test_bos_precedes_the_tokens_and_overwrites_none():
    random = repeated_tokens(model(), seq_len=6, batch=4, seed=3)
    assert random.prepend_bos
    assert random.tokens.shape == (4, 13)
    assert (random.tokens[:, 0] == 0).all()
    assert torch.equal(random.tokens[:, 1:7], random.tokens[:, 7:])
    assert random.starts.tolist() == [[1, 7]] * 4
    without = repeated_tokens(model(), seq_len=6, batch=4, seed=3, prepend_bos=False)
    assert torch.equal(without.tokens, random.tokens[:, 1:]), "the same tokens, only without BOS"
    assert without.starts.tolist() == [[0, 6]] * 4


def test_draws_depend_on_the_seed_not_on_global_state():
    torch.manual_seed(0)
    first = repeated_tokens(model(), seed=1, seq_len=9).tokens
    state = torch.random.get_rng_state()
    again = repeated_tokens(model(), seed=1, seq_len=9).tokens
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random state is left alone"
    assert not torch.equal(first, repeated_tokens(model(), seed=2, seq_len=9).tokens)


def test_jitter_puts_a_varying_number_of_tokens_between_the_copies():
    random = repeated_tokens(model(), seq_len=5, batch=40, jitter=3)
    assert random.tokens.shape == (40, 1 + 5 + 5 + 3)
    gaps = set()
    for row, (first, second) in zip(random.tokens, random.starts.tolist(), strict=True):
        assert torch.equal(row[first : first + 5], row[second : second + 5])
        gaps.add(second - first - 5)
    assert gaps == {0, 1, 2, 3}


def test_four_copies_are_equal():
    random = repeated_tokens(model(n_ctx=101), seq_len=25, copies=4, batch=2)
    assert random.starts.tolist() == [[1, 26, 51, 76]] * 2
    assert torch.equal(random.tokens[:, 1:26], random.tokens[:, 76:101])


def test_a_model_without_bos_warns_and_draws_without_it():
    with pytest.warns(UserWarning, match="no BOS token: its sequences begin with an ordinary token"):
        random = repeated_tokens(model(bos=None), seq_len=4)
    assert not random.prepend_bos
    with pytest.raises(ValueError, match="use prepend_bos=False"):
        repeated_tokens(model(bos=None), seq_len=4, prepend_bos=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"seq_len": 32},
            "make 65 positions, but the model's context is 64: the largest seq_len that fits is 31",
        ),
        ({"seq_len": 33, "prepend_bos": False}, "the largest seq_len that fits is 32"),
        ({"seq_len": 20, "jitter": 40}, "with a jitter of 40.*the largest seq_len that fits is 11"),
        ({"seq_len": 20, "jitter": 64}, "no seq_len fits"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"jitter": 2, "copies": 3, "seq_len": 3}, "needs 2 copies, got jitter 2 with 3 copies"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        repeated_tokens(model(), **options)


def test_the_largest_sequence_that_fits_fits():
    assert repeated_tokens(model(), seq_len=31).tokens.shape[1] == 63


def test_a_text_becomes_one_row_that_fits_the_context():
    assert text_tokens(model(), "abc").tolist() == [[0, 2, 3, 4]]
    assert text_tokens(model(), "abc", prepend_bos=False).tolist() == [[2, 3, 4]]
    with pytest.raises(ValueError, match="the text is empty"):
        text_tokens(model(), "")
    with pytest.raises(ValueError, match="65 tokens, but the model's context is 64"):
        text_tokens(model(), "a" * 64)
    bare = SimpleNamespace(cfg=SimpleNamespace(n_ctx=8, d_vocab=4), tokenizer=None)
    with pytest.raises(ValueError, match="has no tokenizer: pass token ids"):
        text_tokens(bare, "a")
    with pytest.raises(ValueError, match="none to draw"):
        drawable_tokens(Letters(2), d_vocab=24)


def test_chosen_indices_are_plain_numbers():
    """Including those from a table or tensor: results save them as JSON."""
    found = chosen("position", [np.int64(2), torch.tensor(-3)], 3)
    assert [type(index) for index in found] == [int, int]
    assert found == (2, 0)
    with pytest.raises(TypeError):
        inspect.unwrap(chosen)("position", [0.5], 3)


def test_single_bytes_are_distinguished_from_letters(bundled):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ids = torch.arange(len(bundled.tokenizer))
    strings = token_strings(bundled, ids)
    parts = [i for i in ids.tolist() if "\ufffd" in bundled.tokenizer.decode([i])]
    assert len(parts) > 100
    for i in parts:
        own = bytes(of_letter[letter] for letter in bundled.tokenizer.convert_ids_to_tokens(i))
        assert strings[i] == own.decode("utf-8", errors="backslashreplace")
        assert "\\x" in strings[i]
    # the letter itself is two bytes
    assert "ü" not in strings


# -- conversations ---------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
TURNS = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
TEMPLATE = "{{ bos_token }}" + TURNS + "{% if add_generation_prompt %}assistant{% endif %}"


@pytest.fixture
def chatting(tiny_directories):
    """A real tokenizer with a token per letter, whose BOS `<s>` is not its EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_directories / "llama")
    tokenizer.chat_template = TEMPLATE
    return model(n_ctx=32, d_vocab=64, tokenizer=tokenizer)


def test_a_conversation_is_rendered_by_the_tokenizers_own_template(chatting):
    tokenizer = chatting.tokenizer
    for wanted, text in ((True, "<s>userabcassistantdeassistant"), (False, "<s>userabcassistantde")):
        found = chat_tokens(chatting, MESSAGES, generation_prompt=wanted)
        own = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=wanted, return_dict=True)
        assert found.tolist() == [own["input_ids"]]
        assert "".join(token_strings(chatting, found[0])) == text
        assert int((found == tokenizer.bos_token_id).sum()) == 1
        # as text, it does not get another BOS
        assert torch.equal(text_tokens(chatting, text), found)
        assert torch.equal(text_tokens(chatting, text, prepend_bos=True), found)
    one = chat_tokens(chatting, "abc", generation_prompt=False)
    assert torch.equal(one, chat_tokens(chatting, MESSAGES[:1], generation_prompt=False))


def test_a_template_without_bos_gets_none(chatting):
    chatting.tokenizer.chat_template = TURNS
    found = chat_tokens(chatting, MESSAGES)
    assert "".join(token_strings(chatting, found[0])) == "userabcassistantde"


@pytest.mark.parametrize(
    ("template", "messages", "error", "message"),
    [
        (None, MESSAGES, ValueError, "no chat template: pass the prompt as text"),
        (TEMPLATE, [], TypeError, "messages must be a list of {'role'"),
        (TEMPLATE, [{"content": "a"}], TypeError, "messages must be a list of {'role'"),
        (TEMPLATE, [{"role": "user"}], TypeError, "messages must be a list of {'role'"),
        (TEMPLATE, "abc" * 10, ValueError, "the conversation has 44 tokens, but the model's context is 32"),
        (TEMPLATE, "a\udcff", ValueError, "the message of the user is not text"),
        ("{{ raise_exception('roles alternate') }}", MESSAGES, ValueError, "these messages: roles alternate"),
    ],
)
def test_invalid_messages_are_errors(chatting, template, messages, error, message):
    chatting.tokenizer.chat_template = template
    with pytest.raises(error, match=message):
        chat_tokens(chatting, messages)


@pytest.mark.parametrize("read", [prompt_tokens, prompt_batch])
def test_messages_as_a_prompt_point_to_chat_tokens(chatting, read):
    with pytest.raises(
        TypeError, match=r"these are messages: turn them into a prompt with chat_tokens\(model, messages\)"
    ):
        read(chatting, MESSAGES)


def test_repeated_tokens_objects_draw_the_same_as_the_function():
    on = RepeatedTokens(seq_len=7, batch=3, seeds=range(2), jitter=2)
    assert on.seeds == (0, 1)
    expected = repeated_tokens(model(), seq_len=7, batch=3, seed=1, jitter=2)
    assert torch.equal(on.draw(model(), 1).tokens, expected.tokens)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"batch": True}, "batch must be an integer"),
        ({"jitter": -1}, "jitter must be at least 0"),
        ({"seeds": (0, 0)}, "seeds must be distinct"),
        ({"seeds": ()}, "at least one integer"),
    ],
)
def test_invalid_repeated_tokens_objects_are_refused_without_a_model(wrong, complaint):
    with pytest.raises((TypeError, ValueError), match=complaint):
        RepeatedTokens(**wrong)
