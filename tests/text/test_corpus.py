"""Texts are read unchanged from every kind of source, and windows have exactly their tokens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from mechlens.text.corpus import PIECE, read_texts, token_windows
from tests.shared import SHARED, needs_shared

BOS = 0
"""BOS of the tiny tokenizer, which is also its EOS; `a` is 2, `b` is 3, and so on."""


def ids(text: str) -> list[int]:
    return [ord(letter) - ord("a") + 2 for letter in text]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four documents and some blanks, in files of every kind, with one unrelated file."""
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("\ufefffirst\ntext\n", encoding="utf-8")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "second"}\n\n{"text": "  "}\n{"text": "thürd"}')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"id": 1, "text": "fourth"}) + "\n")
    (tmp_path / "README.md").write_text("not this")
    return tmp_path


TEXTS = ["first\ntext\n", "second", "thürd", "fourth"]


# -- texts -----------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_of_file_names(folder: Path):
    assert list(read_texts(folder)) == TEXTS
    assert list(read_texts(str(folder))) == TEXTS


def test_several_paths_texts_and_mappings_may_be_mixed(folder: Path):
    source = [folder / "d.jsonl.gz", "a text", {"text": "of a data set", "id": 3}, folder / "a.txt"]
    assert list(read_texts(source)) == ["fourth", "a text", "of a data set", TEXTS[0]]


def test_a_long_text_is_read_completely():
    text = "".join(f"line {number}, which is as long as the others\n" for number in range(2000)) + "the end"
    assert len(text) > 3 * PIECE
    assert list(read_texts([text, "\n" * 20000 + "x"])) == [text, "\n" * 20000 + "x"]


def test_an_iterable_is_read_only_as_far_as_requested():
    asked = []

    def texts():
        for number in range(100):
            asked.append(number)
            yield f"text {number}"

    found = read_texts(texts())
    assert [next(found), next(found)] == ["text 0", "text 1"]
    assert len(asked) <= 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"id": 1}\n', "line 2 has no text in a field 'text'; it has id"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl, line 2 has no text"),
        ("a.jsonl", b'{"text": "x"}\n"x"\n', r"a\.jsonl, line 2 is a str, not"),
        ("a.jsonl", b'{"text": "x"}\n{"te\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl.gz", b"no archive", r"a\.jsonl\.gz cannot be read"),
        ("a.txt", b"\xff\xfe\xff", r"a\.txt cannot be read as UTF-8"),
        ("a.txt", b" \n", r"no text found in .*a\.txt"),
        ("a.csv", b"x", r"a corpus is a \.txt, \.jsonl, \.jsonl\.gz file or a folder"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


def test_errors_of_a_corpus_state_what_is_needed(tmp_path: Path, folder: Path):
    with pytest.raises(FileNotFoundError, match=r"no such corpus: .*absent"):
        read_texts(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_texts(["a text", tmp_path / "absent.txt"])
    with pytest.raises(ValueError, match=r"'The cat sat\.' is not a file or folder; pass a text in a list"):
        read_texts("The cat sat.")
    with pytest.raises(ValueError, match=r"is the name of a file.*pass it as a Path"):
        list(read_texts([str(folder / "a.txt")]))
    with pytest.raises(ValueError, match="got a dict with train, test: pass one of its entries"):
        read_texts({"train": ["x"], "test": ["y"]})
    with pytest.raises(ValueError, match="entry 1 is a int, not a text"):
        list(read_texts(["x", 3]))
    with pytest.raises(ValueError, match="no text found in this corpus"):
        list(read_texts(["", " "]))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty has no \.txt"):
        read_texts(empty)


# -- windows ---------------------------------------------------------------------------------------


def test_a_lone_surrogate_in_a_corpus_is_an_error(tiny_bos_model):
    with pytest.raises(ValueError, match=r"the corpus is not text: character 2 is '\\udcff'"):
        list(token_windows(tiny_bos_model, ["ab\udcff"], length=4))


def test_windows_of_known_texts(tiny_bos_model):
    windows = token_windows(tiny_bos_model, ["abc", "defgh", "ij"], length=4)
    # EOS, here equal to BOS, separates documents; no window begins with two of them
    expected = [[BOS, *ids("abc")], [BOS, *ids("def")], [BOS, *ids("gh"), BOS], [BOS, *ids("ij"), BOS]]
    assert [window.tolist() for window in windows] == expected


def test_the_last_window_is_kept_with_drop_last_false(tiny_bos_model):
    windows = token_windows(tiny_bos_model, ["abcde"], length=4, drop_last=False)
    assert [window.tolist() for window in windows] == [[BOS, *ids("abc")], [BOS, *ids("de"), BOS]]


def test_windows_without_bos_and_a_limit(tiny_bos_model):
    windows = token_windows(tiny_bos_model, ["abcdefgh"], length=3, prepend_bos=False, limit=2)
    assert [window.tolist() for window in windows] == [ids("abc"), ids("def")]


def test_a_model_without_bos_has_windows_of_only_text(tiny_directories):
    from mechlens.models.load.loading import load_model

    model = load_model(tiny_directories / "qwen2")
    with pytest.warns(UserWarning, match="no BOS token"):
        windows = list(token_windows(model, ["abcd"], length=2))
    first = [model.tokenizer.convert_tokens_to_ids(letter) for letter in "ab"]
    assert windows[0].tolist() == first


def test_every_token_of_a_long_text_is_in_one_window(bundled):
    text = "".join(f"Line {number}: it was a dark and stormy night.\n" for number in range(1500))
    assert len(text) > 3 * PIECE
    windows = list(token_windows(bundled, [text], drop_last=False))
    assert [len(window) for window in windows[:-1]] == [128] * (len(windows) - 1)
    bos = bundled.tokenizer.bos_token_id
    assert all(window[0] == bos for window in windows)
    joined = torch.cat([window[1:] for window in windows])
    assert joined[-1] == bundled.tokenizer.eos_token_id
    assert bundled.tokenizer.decode(joined[:-1]) == text


def test_an_endless_stream_is_read_no_further_than_needed(tiny_bos_model):
    def forever():
        while True:
            yield "abcdef"

    windows = token_windows(tiny_bos_model, forever(), length=5)
    assert next(windows).tolist() == [BOS, *ids("abcd")]
    assert next(windows).tolist() == [BOS, *ids("ef"), BOS, *ids("a")]
    assert len(list(token_windows(tiny_bos_model, forever(), length=5, limit=1000))) == 1000


def test_token_ids_are_used_as_windows_unchanged(tiny_bos_model):
    rows = torch.arange(12).view(3, 4)
    assert torch.equal(torch.stack(list(token_windows(tiny_bos_model, rows))), rows)
    assert len(list(token_windows(tiny_bos_model, rows, length=4, limit=2))) == 2


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (["abc"], {"length": 1}, "have no room for text after BOS: length must be at least 2"),
        (["abc"], {"length": 33}, "windows of 33 tokens do not fit into the model's context of 32"),
        (["abc"], {"limit": 0}, "limit must be at least 1"),
        (torch.zeros(2, 4, dtype=torch.long), {"length": 3}, "4 tokens long, which does not match length=3"),
        (torch.zeros(2, 33, dtype=torch.long), {}, "rows of 33 tokens do not fit"),
        (torch.full((2, 4), 64), {}, "token id 64 is not in the model's vocabulary of 64"),
        (torch.zeros(0, 4, dtype=torch.long), {}, "at least one token"),
        ("absent", {}, "is not a file or folder"),
    ],
)
def test_errors_come_before_anything_is_read(tiny_bos_model, source, options, message):
    with pytest.raises(ValueError, match=message):
        token_windows(tiny_bos_model, source, **options)


def test_a_model_without_tokenizer_reads_ids_but_no_text(fixed_distance_model):
    model, _ = fixed_distance_model
    with pytest.raises(ValueError, match=r"no tokenizer.*pass token ids"):
        token_windows(model, ["abc"])
    rows = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(next(token_windows(model, rows)), rows[0])


@needs_shared
def test_windows_of_the_books_begin_with_their_first_document(bundled):
    path = SHARED / "corpus" / "books-validation.jsonl.gz"
    first = next(read_texts(path))
    windows = list(token_windows(bundled, path, length=64, limit=20))
    text = bundled.tokenizer.decode(torch.cat([window[1:] for window in windows]))
    # a piece ends with a line, so spaces may be tokenized differently, but no character is lost
    assert first.startswith(text)
