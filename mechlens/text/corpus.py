"""Text in files or datasets, read as a stream and cut into windows of tokens."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import check_counts, check_model
from mechlens.text.prompts import as_ids, bos_to_prepend
from mechlens.text.tokens import check_text

ENDINGS = (".txt", ".jsonl", ".jsonl.gz")
PIECE = 16384
"""Characters encoded at once, up to the end of a line: a tokenizer needs several times the memory of its
input."""
LENGTH = 128
"""Tokens in a window by default, if the context is not shorter."""

Corpus: TypeAlias = "str | os.PathLike[str] | Iterable[Any]"
"""A path, or an iterable of paths, texts or mappings with a `text`."""


class Windows(Iterator[Tensor]):
    """An iterator over windows of tokens, which every analysis of a corpus accepts."""

    def __init__(self, made: Iterator[Tensor]) -> None:
        self._made = made

    def __next__(self) -> Int[Tensor, " pos"]:
        return next(self._made)


def read_texts(corpus: Corpus) -> Iterator[str]:
    """Read the documents of files or of a dataset, one at a time.

    Args:
        corpus: a path (`str` or `Path`) or an iterable. A path is a `.txt` file (one document), a `.jsonl` or
            `.jsonl.gz` file (one document per line, in the field `text`), or a folder of such files, which
            are read in order of their names. An iterable yields texts, mappings with a `text` (such as a
            Hugging Face dataset) or `Path`s. Pass a single text as `[text]`.

    Returns:
        A lazy iterator over the texts that are not blank.

    Raises:
        FileNotFoundError: a `Path` that does not exist.
        ValueError: a `str` that is not a path, a file with another ending, a folder without such files, a
            damaged file, a line or an entry without text, or a corpus without any text.

    Example:
        >>> list(mechlens.read_texts(["The captain", " ", {"text": "The boatswain"}]))
        ['The captain', 'The boatswain']
    """
    return _joined(_pieces(corpus, _opened(corpus)))


def token_windows(
    model: Any,
    corpus: Corpus | Int[Tensor, "window pos"],
    *,
    length: int | None = None,
    prepend_bos: bool | None = None,
    limit: int | None = None,
    drop_last: bool = True,
) -> Windows:
    """Cut a corpus into windows of tokens, each of which begins with BOS.

    Documents are joined into one stream, with the tokenizer's EOS (or else its BOS) between them. Windows are
    cut from the stream without overlap, so one may contain the end of a document and the beginning of the
    next. Only one window and one piece of text are in memory at a time.

    Args:
        model: anything with TransformerLens's `cfg` and `tokenizer`.
        corpus: a path to a `.txt`, `.jsonl` or `.jsonl.gz` file or to a folder of those; an iterable of
            texts, of mappings with a `text`, or of `Path`s; or token ids `[window, pos]`, whose rows are used
            as they are, without a BOS added.
        length: tokens in a window, with BOS. None means 128 (or the context, if it is shorter), and for token
            ids the length of the rows.
        prepend_bos: whether windows begin with BOS; None means they do if the tokenizer has one.
        limit: the maximum number of windows; None reads the whole corpus.
        drop_last: leave out an incomplete window at the end.

    Returns:
        An iterator over windows of ids `[pos]`, on the CPU.

    Raises:
        FileNotFoundError: a `Path` that does not exist.
        ValueError: a corpus that cannot be read or has no text, a length longer than the context or too short
            for BOS and a token, texts for a model without a tokenizer, token ids outside the vocabulary, or
            rows of ids of another length.

    Example:
        >>> windows = mechlens.token_windows(model, ["The captain came on deck."], length=8)
        >>> [len(window) for window in windows]
        [8]
    """
    check_model(model)
    check_counts(limit=limit, length=length)
    n_ctx = model.cfg.n_ctx
    if isinstance(corpus, Windows):
        return Windows(islice(corpus, limit))
    rows = corpus_ids(corpus)
    if rows is not None:
        _check_ids(model, rows, length)
        return Windows(iter(rows if limit is None else rows[:limit]))
    length = min(LENGTH, n_ctx) if length is None else length
    if length > n_ctx:
        raise ValueError(f"windows of {length} tokens do not fit into the model's context of {n_ctx}")
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: pass token ids [window, pos] instead of text")
    bos = bos_to_prepend(model, prepend_bos)
    if length < 1 + (bos is not None):
        raise ValueError(
            f"windows of {length} tokens have no room for text{' after BOS' if bos is not None else ''}: "
            f"length must be at least {1 + (bos is not None)}"
        )
    stream = _ids(model.tokenizer, _pieces(corpus, _opened(corpus)))
    return Windows(_windows(stream, length, bos, limit, drop_last))


def corpus_ids(corpus: Any) -> Int[Tensor, "window pos"] | None:
    """The windows of a corpus of ids (a tensor, an array, lists or the output of a tokenizer); None for text.

    Raises:
        ValueError: ids that are not integers, or rows with padding.
    """
    lists = isinstance(corpus, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in corpus)
    encoded = isinstance(corpus, Mapping) and "input_ids" in corpus
    if not (isinstance(corpus, (Tensor, np.ndarray)) or encoded or (lists and corpus)):
        return None
    rows, mask = as_ids(corpus)
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            "the rows of ids have padding (zeros in attention_mask): windows must have the same length"
        )
    return rows


def _check_ids(model: Any, rows: Int[Tensor, "window pos"], length: int | None) -> None:
    if rows.ndim != 2:
        raise ValueError(f"a corpus of ids must be [window, pos], got {tuple(rows.shape)}")
    if rows.numel() == 0:
        raise ValueError(f"a corpus of ids needs at least one token, got {tuple(rows.shape)}")
    if length not in (None, rows.shape[1]):
        raise ValueError(
            f"the rows of ids are {rows.shape[1]} tokens long, which does not match length={length}: cut "
            "them, or leave out length"
        )
    if rows.shape[1] > model.cfg.n_ctx:
        raise ValueError(
            f"rows of {rows.shape[1]} tokens do not fit into the model's context of {model.cfg.n_ctx}: cut "
            "them"
        )
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= model.cfg.d_vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is not in the model's vocabulary of {model.cfg.d_vocab}")


def _windows(
    stream: Iterator[list[int]], length: int, bos: int | None, limit: int | None, drop_last: bool
) -> Iterator[Tensor]:
    first = [] if bos is None else [bos]
    room = length - len(first)
    made = 0
    rest: list[int] = []
    for ids in stream:
        rest += ids
        start = _begin(rest, bos, 0)
        while start + room <= len(rest):
            if made == limit:
                return
            yield torch.tensor(first + rest[start : start + room])
            made += 1
            start = _begin(rest, bos, start + room)
        rest = rest[start:]
        if made == limit:
            return
    if rest and not drop_last and made != limit:
        yield torch.tensor(first + rest)


def _begin(rest: list[int], bos: int | None, start: int) -> int:
    """Where the text of the next window begins: a text's own BOS is not repeated."""
    while bos is not None and start < len(rest) and rest[start] == bos:
        start += 1
    return start


def _ids(tokenizer: Any, pieces: Iterator[str | None]) -> Iterator[list[int]]:
    """The ids of each piece, and EOS (or else BOS) at the end of a document."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    for piece in pieces:
        if piece is not None:
            check_text(piece, "corpus")
            # not verbose, or it warns of texts longer than the context, which are cut here
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        elif end is not None:
            yield [end]


def _joined(pieces: Iterator[str | None]) -> Iterator[str]:
    text = io.StringIO()
    for piece in pieces:
        if piece is not None:
            text.write(piece)
        else:
            yield text.getvalue()
            text = io.StringIO()


def _opened(corpus: Corpus) -> Iterator[tuple[str, Any]]:
    """(where, entry) of a corpus; an entry is a file, a text or a mapping.

    All paths are checked before anything is read.
    """
    if isinstance(corpus, str) and not os.path.exists(corpus):
        raise ValueError(f"the corpus {corpus[:80]!r} is not a file or folder; pass a text in a list: [text]")
    if isinstance(corpus, (str, os.PathLike)):
        return iter([(str(file), file) for file in _files(Path(corpus))])
    if isinstance(corpus, (Mapping, bytes)) or not isinstance(corpus, Iterable):
        kind = type(corpus).__name__
        keys = f" with {', '.join(map(str, list(corpus)[:5]))}" if isinstance(corpus, Mapping) else ""
        raise ValueError(
            f"a corpus is a path or an iterable of texts, got a {kind}{keys}"
            + (": pass one of its entries" if keys else "")
        )
    if isinstance(corpus, (list, tuple)):
        for entry in corpus:
            if isinstance(entry, os.PathLike):
                _files(Path(entry))
    return (
        place
        for number, entry in enumerate(corpus)
        for place in (
            [(str(file), file) for file in _files(Path(entry))]
            if isinstance(entry, os.PathLike)
            else [(f"entry {number}", entry)]
        )
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(ENDINGS) and file.is_file())
        if not found:
            raise ValueError(f"the folder {path} has no {', '.join(ENDINGS)} file")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no such corpus: {path}")
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"a corpus is a {', '.join(ENDINGS)} file or a folder of those, got {path}")
    return [path]


def _pieces(corpus: Corpus, entries: Iterator[tuple[str, Any]]) -> Iterator[str | None]:
    """Pieces of text that end at the end of a line; None ends a document."""
    empty = True
    for where, entry in entries:
        for pieces in _documents(where, entry):
            blank = True
            held: list[str] = []
            for piece in pieces:
                # blank pieces wait until the document has text, because blank documents are skipped
                blank = blank and not piece.strip()
                held.append(piece)
                if not blank:
                    yield from held
                    held = []
            if not blank:
                empty = False
                yield None
    if empty:
        what = f"in {corpus}" if isinstance(corpus, (str, os.PathLike)) else "in this corpus"
        raise ValueError(f"no text found {what}")


def _documents(where: str, entry: Any) -> Iterator[Iterator[str]]:
    """The documents of an entry, each in pieces."""
    if isinstance(entry, Path) and entry.suffix == ".txt":
        with entry.open(encoding="utf-8-sig") as file:
            yield _readable(where, _lines(file))
    elif isinstance(entry, Path):
        opener = gzip.open if entry.suffix == ".gz" else open
        with opener(entry, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(_readable(where, file), start=1):
                if line.strip():
                    yield _lines(io.StringIO(_field(f"{where}, line {number}", _parsed(where, number, line))))
    elif isinstance(entry, str):
        if len(entry) < 1024 and entry.endswith(ENDINGS) and os.path.isfile(entry):
            raise ValueError(f"{where} is the name of a file, {entry!r}: pass it as a Path")
        yield _lines(io.StringIO(entry))
    else:
        yield _lines(io.StringIO(_field(where, entry)))


def _lines(file: Any) -> Iterator[str]:
    while lines := file.readlines(PIECE):
        yield "".join(lines)


def _readable(where: str, texts: Iterable[str]) -> Iterator[str]:
    try:
        yield from texts
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{where} cannot be read as UTF-8 text ({error})") from error


def _parsed(where: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {number} is not JSON ({error})") from error


def _field(where: str, entry: Any) -> str:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is a {type(entry).__name__}, not a text or a mapping with a 'text'")
    if not isinstance(entry.get("text"), str):
        has = ", ".join(map(str, list(entry)[:8])) or "nothing"
        raise ValueError(f"{where} has no text in a field 'text'; it has {has}")
    return str(entry["text"])
