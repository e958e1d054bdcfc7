"""The ids of a tokenizer: which are special, and the label of each."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import whole_number

_AS_THEY_ARE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(byte): byte for byte in _AS_THEY_ARE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_AS_THEY_ARE)))
}
"""What byte-level vocabularies, such as GPT-2's, write for each byte."""


_SPACE = "\u2581"
"""What SentencePiece vocabularies write for a space."""
_KNOWN: weakref.WeakKeyDictionary[Any, Labels] = weakref.WeakKeyDictionary()


def own_bos_token_id(tokenizer: Any) -> int | None:
    """The id of a tokenizer's BOS; None if it has none of its own (TransformerLens sets it to EOS)."""
    if tokenizer is None or tokenizer.bos_token is None:
        return None
    if tokenizer.bos_token == tokenizer.eos_token:
        # its saved settings still tell, or else the default of its class
        default = inspect.signature(type(tokenizer).__init__).parameters.get("bos_token")
        first = tokenizer.init_kwargs.get("bos_token", default.default if default else None)
        if first is None:
            return None
    return int(tokenizer.bos_token_id)


def all_bos(tokenizer: Any, ids: Int[Tensor, " id"]) -> bool:
    """Whether every one of some ids, such as the first of each sequence, is the tokenizer's own BOS."""
    bos = own_bos_token_id(tokenizer)
    return bos is not None and len(ids) > 0 and bool((ids == bos).all())


def drawable_tokens(tokenizer: Any, d_vocab: int) -> Int[Tensor, " drawable"]:
    """The ids that may be drawn at random: no special tokens, and none past the tokenizer's length.

    Args:
        tokenizer: a Hugging Face tokenizer, or None for a model without one, for which all ids may be drawn.
        d_vocab: the model's vocabulary, which may be padded beyond the tokenizer's.

    Returns:
        Increasing ids in [0, d_vocab).

    Raises:
        ValueError: no id is left to draw.
    """
    if tokenizer is None:
        return torch.arange(d_vocab)
    special = special_ids(tokenizer)
    ids = torch.tensor([i for i in range(min(len(tokenizer), d_vocab)) if i not in special])
    if len(ids) == 0:
        raise ValueError(
            f"a tokenizer of {len(tokenizer)} tokens, {len(special)} of them special, leaves none to draw"
        )
    return ids


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens; none without a tokenizer."""
    if tokenizer is None:
        return set()
    special = {token for token in tokenizer.all_special_ids if token is not None}
    return special | {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """A unique label for each token of a tokenizer."""

    texts: tuple[str, ...]
    """By id."""
    ids: Mapping[str, int]
    """By label."""


def labels_of(tokenizer: Any) -> Labels:
    """The labels of a tokenizer's tokens: their text, with any leading space.

    Bytes that are only part of a character are written as `\\xfc`. If two tokens have the same text, the id
    is appended to the second.

    Cost: one pass over the vocabulary, once for each tokenizer.
    """
    known = _KNOWN.get(tokenizer)
    if known is None or len(known.texts) != len(tokenizer):
        known = _KNOWN[tokenizer] = _labels(tokenizer)
    return known


def _labels(tokenizer: Any) -> Labels:
    n_tokens = len(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(range(n_tokens)))
    # added tokens are plain text in every kind of vocabulary
    added = {token: str(each) for token, each in tokenizer.added_tokens_decoder.items() if token < n_tokens}
    plain = [piece for token, piece in enumerate(pieces) if piece is not None and token not in added]
    if any(_SPACE in piece for piece in plain):
        texts = [None if piece is None else piece.replace(_SPACE, " ") for piece in pieces]
    elif all(set(piece) <= _BYTES.keys() for piece in plain):
        # lone bytes look like letters in these vocabularies
        texts = [
            None if piece is None or token in added else _of_bytes(piece)
            for token, piece in enumerate(pieces)
        ]
    else:
        decoded = tokenizer.batch_decode([[token] for token in range(n_tokens)])
        texts = [
            piece if not text or "\ufffd" in text else text
            for piece, text in zip(pieces, decoded, strict=True)
        ]
    ids: dict[str, int] = {}
    for token, text in enumerate(texts):
        label = added.get(token) or text or f"[{token}]"
        while label in ids:
            label = f"{label}[{token}]"
        ids[label] = token
    return Labels(tuple(ids), ids)


def _of_bytes(piece: str) -> str:
    return bytes(_BYTES[letter] for letter in piece).decode("utf-8", "backslashreplace")


def token_strings(model: Any, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """The label of each token, which `target_id` accepts.

    Without a tokenizer, the label is the id. The label of an id past the tokenizer's length is `[id]`.
    """
    if model.tokenizer is None:
        return tuple(str(token) for token in tokens.tolist())
    texts = labels_of(model.tokenizer).texts
    return tuple(
        texts[token] if token < len(texts) else _past_the_end(model.tokenizer, token)
        for token in tokens.tolist()
    )


def _past_the_end(tokenizer: Any, token: int) -> str:
    label = f"[{token}]"
    while label in labels_of(tokenizer).ids:
        label = f"[{label}]"
    return label


def target_id(model: Any, target: Any) -> int:
    """The id of a target token, given as an id, a label, or a text of exactly one token.

    Labels come first: with a tokenizer that puts a space before every text (Llama's), `"a"` is the token
    without a space, and `" a"` the one with it.

    Raises:
        TypeError: the target is neither a text nor an id.
        ValueError: the text is not one token (the message shows its tokens), the model has no tokenizer, or
            the id is not in the vocabulary.
    """
    d_vocab = model.cfg.d_vocab
    if not isinstance(target, str):
        try:
            index = whole_number("target", target)
        except TypeError:
            raise TypeError(
                f"a target is an id or a text of one token, but this is a {type(target).__name__}: {target!r}"
            ) from None
        if not 0 <= index < d_vocab:
            raise ValueError(f"token id {index} is not in the model's vocabulary of {d_vocab}")
        return index
    if model.tokenizer is None:
        if target.isdecimal() and int(target) < d_vocab:
            return int(target)
        raise ValueError(f"this model has no tokenizer: pass the target {target!r} as an id")
    labels = labels_of(model.tokenizer)
    found = labels.ids.get(target)
    if found is None:
        inner = target.strip("[]")
        past = inner.isdecimal() and len(labels.texts) <= int(inner) < d_vocab
        if past and target == _past_the_end(model.tokenizer, int(inner)):
            return int(inner)
        check_text(target, "target")
        ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = [labels.texts[token] for token in ids]
            near = [each for each in (f" {target}", target.strip()) if each != target and each in labels.ids]
            hint = f"; did you mean {near[0]!r}, which is one?" if near else ""
            raise ValueError(f"the target {target!r} is {len(ids)} tokens, not one: {pieces}{hint}")
        found = int(ids[0])
    if found >= d_vocab:
        raise ValueError(
            f"the target {target!r} is the tokenizer's token {found}, but the model's vocabulary has "
            f"{d_vocab} tokens: tokenizer and model do not match"
        )
    return found


def check_text(text: str, what: str) -> None:
    """Check that a text is valid Unicode.

    Raises:
        TypeError: it is not a string.
        ValueError: it has a lone surrogate, such as Python substitutes for bytes that are not UTF-8.
    """
    if not isinstance(text, str):
        raise TypeError(f"the {what} must be a string, got {text!r}")
    for place, letter in enumerate(text):
        if "\ud800" <= letter <= "\udfff":
            raise ValueError(
                f"the {what} is not text: character {place} is {letter!a}, a lone surrogate: decode the "
                "bytes with their own encoding"
            )


def vocabulary_hash(tokenizer: Any) -> str | None:
    """A hash of a tokenizer's tokens by id, to compare vocabularies; None without a tokenizer."""
    if tokenizer is None:
        return None
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12]
