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
"""Characters that are encoded at once, up to the end of a line: a tokenizer needs memory for several times
what it is given."""
LENGTH = 128
"""Tokens in a window, where nothing else is asked for and the model's context holds them."""

Source: TypeAlias = "str | os.PathLike[str] | Iterable[Any]"
"""A path, or an iterable of paths, texts or mappings with a `text`; see `read_texts`."""


class Windows(Iterator[Tensor]):
    """Windows of tokens, made as they are asked for; an analysis of a corpus reads them as they are."""

    def __init__(self, made: Iterator[Tensor]) -> None:
        self._made = made

    def __next__(self) -> Int[Tensor, " pos"]:
        return next(self._made)


def read_texts(source: Source) -> Iterator[str]:
    """The documents of files or of a dataset, one after the other.

    Args:
        source: a path, as `str` or `Path`: of a `.txt` file (one document), of a `.jsonl` or `.jsonl.gz` file
            (one document per line, in the field `text`), or of a folder that is searched for those, in
            the order of their names; or an iterable of texts, of mappings with a `text` such as a Hugging
            Face dataset, or of `Path`s. A `str` by itself is a path and within an iterable a text: give a
            single text as `[text]`.

    Returns:
        Texts that are not blank. An iterable is read once, as far as texts are asked for.

    Raises:
        FileNotFoundError: a `Path` to nothing.
        ValueError: a `str` that is no path, another ending, a folder without such files, a file that is
            damaged or has a line without `text`, an entry of another kind, or nothing but blanks in all.
    """
    return _joined(_pieces(source, _opened(source)))


def token_windows(
    model: Any,
    source: Source | Int[Tensor, "window pos"],
    *,
    length: int | None = None,
    prepend_bos: bool | None = None,
    limit: int | None = None,
    drop_last: bool = True,
) -> Windows:
    """Cut a corpus into windows of tokens, each beginning with BOS where there is one.

    Documents follow each other with the tokenizer's EOS (or else its BOS) between them, and windows are cut
    from that stream without overlap, so that one may hold the end of a document and the beginning of the
    next. No more than a piece of text and a window of tokens is held at a time.

    Args:
        model: anything with TransformerLens's `cfg` and `tokenizer`.
        source: see `read_texts`; or token ids `[window, pos]`, whose rows are the windows as they are (BOS
            is yours to put).
        length: tokens in a window with its BOS; None is 128, or the context of a model with a shorter one,
            and the length of the rows of ids.
        prepend_bos: None prepends BOS where the tokenizer has one.
        limit: how many windows to make at most; None reads to the end.
        drop_last: leave out the tokens after the last whole window; otherwise they make a shorter one.

    Returns:
        Windows of ids on the CPU, made as they are asked for.

    Raises:
        ValueError: as `read_texts`; a length that the context does not hold, or that leaves no token beside
            BOS; no tokenizer for texts; ids that the model does not have, or rows of another length.
    """
    check_model(model)
    check_counts(limit=limit, length=length)
    n_ctx = model.cfg.n_ctx
    if isinstance(source, Windows):
        return Windows(islice(source, limit))
    rows = corpus_ids(source)
    if rows is not None:
        _check_ids(model, rows, length)
        return Windows(iter(rows if limit is None else rows[:limit]))
    length = min(LENGTH, n_ctx) if length is None else length
    if length > n_ctx:
        raise ValueError(f"windows of {length} tokens do not fit into the model's context of {n_ctx}")
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it reads no text: pass token ids [window, pos]")
    bos = bos_to_prepend(model, prepend_bos)
    if length < 1 + (bos is not None):
        raise ValueError(
            f"windows of {length} tokens hold no text{' beside BOS' if bos is not None else ''}: "
            f"length must be at least {1 + (bos is not None)}"
        )
    stream = _ids(model.tokenizer, _pieces(source, _opened(source)))
    return Windows(_windows(stream, length, bos, limit, drop_last))


def corpus_ids(source: Any) -> Int[Tensor, "window pos"] | None:
    """The windows of a corpus of ids: a tensor, an array, lists or what a tokenizer gives; None for text.

    Raises:
        ValueError: numbers that are no integers, or rows with padding.
    """
    lists = isinstance(source, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in source)
    encoded = isinstance(source, Mapping) and "input_ids" in source
    if not (isinstance(source, (Tensor, np.ndarray)) or encoded or (lists and source)):
        return None
    rows, mask = as_ids(source)
    if mask is not None and not bool(mask.all()):
        raise ValueError("the rows of ids have padding (zeros in attention_mask): windows are equally long")
    return rows


def _check_ids(model: Any, rows: Int[Tensor, "window pos"], length: int | None) -> None:
    if rows.ndim != 2:
        raise ValueError(f"a corpus of ids is [window, pos], but has the shape {tuple(rows.shape)}")
    if rows.numel() == 0:
        raise ValueError(f"a corpus of ids needs at least one token, but is {tuple(rows.shape)}")
    if length not in (None, rows.shape[1]):
        raise ValueError(
            f"the rows of ids are {rows.shape[1]} tokens long, but windows of {length} are asked for: cut "
            "them, or leave length out"
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
    """Where the next window's own tokens begin: a text that comes with its BOS does not get a second one."""
    while bos is not None and start < len(rest) and rest[start] == bos:
        start += 1
    return start


def _ids(tokenizer: Any, pieces: Iterator[str | None]) -> Iterator[list[int]]:
    """The ids of each piece; the end of a document as a token of its own where the tokenizer has one."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    for piece in pieces:
        if piece is not None:
            check_text(piece, "corpus")
            # not verbose: it would warn of more tokens than the context holds, which are cut here
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


def _opened(source: Source) -> Iterator[tuple[str, Any]]:
    """(where, entry) of a source; an entry is a file, a text or a mapping. What is named by paths is looked
    for at once, before anything is read."""
    if isinstance(source, str) and not os.path.exists(source):
        raise ValueError(
            f"the corpus {source[:80]!r} is no file or folder; if it is a text, give it in a list: [text]"
        )
    if isinstance(source, (str, os.PathLike)):
        return iter([(str(file), file) for file in _files(Path(source))])
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        kind = type(source).__name__
        keys = f" with {', '.join(map(str, list(source)[:5]))}" if isinstance(source, Mapping) else ""
        raise ValueError(
            f"a corpus is a path or an iterable of texts, but this is a {kind}{keys}"
            + (": give one of its entries" if keys else "")
        )
    if isinstance(source, (list, tuple)):
        for entry in source:
            if isinstance(entry, os.PathLike):
                _files(Path(entry))
    return (
        place
        for number, entry in enumerate(source)
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
            raise ValueError(f"the folder {path} holds no {', '.join(ENDINGS)} file")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no such corpus: {path}")
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"a corpus is a {', '.join(ENDINGS)} file or a folder of those, but this is {path}")
    return [path]


def _pieces(source: Source, entries: Iterator[tuple[str, Any]]) -> Iterator[str | None]:
    """Texts in pieces that end with a line; None ends a document."""
    empty = True
    for where, entry in entries:
        for pieces in _documents(where, entry):
            blank = True
            held: list[str] = []
            for piece in pieces:
                # what is blank so far is kept back, because a blank document does not count
                blank = blank and not piece.strip()
                held.append(piece)
                if not blank:
                    yield from held
                    held = []
            if not blank:
                empty = False
                yield None
    if empty:
        what = f"in {source}" if isinstance(source, (str, os.PathLike)) else "in this corpus"
        raise ValueError(f"there is no text {what}")


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
            raise ValueError(f"{where} is the name of a file, {entry!r}: give it as a Path, not as a text")
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
