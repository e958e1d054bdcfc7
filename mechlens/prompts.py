"""Token sequences for experiments: random tokens, the same tokens repeated, and text."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import operator
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

_AS_THEY_ARE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(byte): byte for byte in _AS_THEY_ARE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_AS_THEY_ARE)))
}
"""What byte-level vocabularies, GPT-2's and those like it, write for each byte."""


def own_bos_token_id(tokenizer: Any) -> int | None:
    """A tokenizer's BOS, unless it only has one since TransformerLens set it to the EOS."""
    if tokenizer is None or tokenizer.bos_token is None:
        return None
    if tokenizer.bos_token == tokenizer.eos_token:
        # What it was made with still tells: the settings in its files, else its class's own default.
        default = inspect.signature(type(tokenizer).__init__).parameters.get("bos_token")
        first = tokenizer.init_kwargs.get("bos_token", default.default if default else None)
        if first is None:
            return None
    return int(tokenizer.bos_token_id)


def drawable_tokens(tokenizer: Any, d_vocab: int) -> Int[Tensor, " drawable"]:
    """The ids that may be drawn at random: no special token, nothing past the tokenizer's length.

    Args:
        tokenizer: a Hugging Face tokenizer, or None for a model without one, which may draw all ids.
        d_vocab: the model's vocabulary, which may be padded beyond the tokenizer's.

    Returns:
        Increasing ids in [0, d_vocab).

    Raises:
        ValueError: nothing is left to draw.
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
class RandomTokens:
    """Random tokens, some of which may be repeated."""

    tokens: Int[Tensor, "batch pos"]
    """What the model reads: BOS (where `prepend_bos`), then random tokens and their copies."""
    starts: Int[Tensor, "batch copy"]
    """The position at which each copy begins."""
    seq_len: int
    """Tokens in one copy."""
    prepend_bos: bool
    seed: int


def repeated_tokens(
    model: Any,
    *,
    seq_len: int = 50,
    batch: int = 30,
    copies: int = 2,
    seed: int = 0,
    prepend_bos: bool | None = None,
    jitter: int = 0,
) -> RandomTokens:
    """Draw `[BOS, S random tokens, the same S again, ...]` for each row of a batch.

    BOS is put before the random tokens and overwrites none. Tokens are drawn uniformly and with
    replacement from `drawable_tokens`.

    Args:
        model: anything with TransformerLens's `cfg` and `tokenizer`.
        seq_len: S, the random tokens in one copy.
        batch: rows, all drawn independently.
        copies: how often the S tokens come in all; 1 repeats nothing.
        seed: of the `torch.Generator` that draws; the same seed gives the same tokens.
        prepend_bos: None prepends BOS where the tokenizer has one. What was done is in the result.
        jitter: for a repeat at no fixed distance: 0 to `jitter` further random tokens, a number drawn
            for each row, come between the first and the second copy (and what is left of `jitter`
            after the last one, so that all rows are equally long).

    Raises:
        ValueError: a size below 1, jitter with other than 2 copies, a BOS wanted but not there, or
            more tokens than the model's context holds.

    Source: the repeated-token experiment of Olsson et al. 2022, arXiv:2209.11895.
    """
    for name, value, least in (("seq_len", seq_len, 1), ("batch", batch, 1), ("copies", copies, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but it is {value}")
    if jitter < 0 or (jitter and copies != 2):
        raise ValueError(f"jitter must be 0 or more, with 2 copies; it is {jitter} with {copies}")
    bos = bos_to_prepend(model, prepend_bos)
    first = 0 if bos is None else 1
    n_ctx = model.cfg.n_ctx
    if first + copies * seq_len + jitter > n_ctx:
        fits = (n_ctx - first - jitter) // copies
        raise ValueError(
            f"{copies} copies of {seq_len} tokens"
            + (" after BOS" if first else "")
            + (f" with a jitter of {jitter}" if jitter else "")
            + f" make {first + copies * seq_len + jitter} positions, but the model's context is {n_ctx}: "
            + (f"the largest seq_len that fits is {fits}" if fits > 0 else "no seq_len fits")
        )
    generator = torch.Generator().manual_seed(seed)
    drawable = drawable_tokens(model.tokenizer, model.cfg.d_vocab)

    def draw(n: int) -> Int[Tensor, "batch drawn"]:
        return drawable[torch.randint(len(drawable), (batch, n), generator=generator)]

    once = draw(seq_len)
    starts = first + seq_len * torch.arange(copies).expand(batch, copies).contiguous()
    if jitter:
        gap = torch.randint(jitter + 1, (batch,), generator=generator)
        starts[:, 1] += gap
        tokens = draw(first + 2 * seq_len + jitter)
    else:
        tokens = once.new_empty(batch, first + copies * seq_len)
    within = torch.arange(seq_len)
    for copy in range(copies):
        tokens.scatter_(1, starts[:, copy, None] + within, once)
    if bos is not None:
        tokens[:, 0] = bos
    return RandomTokens(tokens, starts, seq_len, bos is not None, seed)


def bos_to_prepend(model: Any, prepend_bos: bool | None) -> int | None:
    """The id of the BOS token to begin with, or None for none.

    Args:
        prepend_bos: None asks for BOS where there is one and warns where there is none.

    Raises:
        ValueError: BOS is asked for, but the tokenizer has none.
    """
    if prepend_bos is False:
        return None
    bos = own_bos_token_id(model.tokenizer)
    if bos is None:
        what = "this model has no BOS token" if model.tokenizer else "this model has no tokenizer, so no BOS"
        if prepend_bos:
            raise ValueError(f"{what}: use prepend_bos=False")
        warnings.warn(f"{what}: its sequences begin with an ordinary token", stacklevel=3)
    return bos


def text_tokens(model: Any, text: str, *, prepend_bos: bool | None = None) -> Int[Tensor, "1 pos"]:
    """The tokens of a text, as one row.

    Args:
        prepend_bos: None prepends BOS where the tokenizer has one.

    Raises:
        ValueError: no tokenizer, an empty text, or more tokens than the model's context holds.
    """
    tokens = text_ids(model, text, prepend_bos=prepend_bos)[None]
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(
            f"the text has {tokens.shape[1]} tokens, but the model's context is {model.cfg.n_ctx}: shorten it"
        )
    return tokens


def text_ids(model: Any, text: str, *, prepend_bos: bool | None = None) -> Int[Tensor, " pos"]:
    """The tokens of a text of any length; see `text_tokens`."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it reads no text: pass token ids")
    # verbose: longer than the context is no mistake here
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the text is empty: there is no token to run the model on")
    bos = bos_to_prepend(model, prepend_bos)
    return torch.tensor(ids if bos is None else [bos, *ids])


def prompt_tokens(
    model: Any,
    prompt: str | Sequence[str] | Int[Tensor, "*batch pos"],
    *,
    prepend_bos: bool | None = None,
) -> Int[Tensor, "batch pos"]:
    """The rows of a prompt, on the CPU: texts' tokens, or a copy of ids, one sequence or several.

    Raises:
        TypeError: neither text nor a tensor.
        ValueError: as `text_tokens`, texts of different lengths, or ids that are no integers.
    """
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(text, str) for text in prompt):
        rows = [text_tokens(model, text, prepend_bos=prepend_bos) for text in prompt]
        for row in rows:
            if row.shape != rows[0].shape:
                raise ValueError(
                    "the texts must have equally many tokens, but here are "
                    f"{rows[0].shape[1]}, {list(token_strings(model, rows[0][0]))}, and "
                    f"{row.shape[1]}, {list(token_strings(model, row[0]))}"
                )
        return torch.cat(rows)
    if not isinstance(prompt, (str, torch.Tensor)):
        raise TypeError(
            f"a prompt is text or a tensor of token ids, but this is a {type(prompt).__name__}: give "
            "tokens as torch.tensor(ids), and a tokenizer's output as its input_ids"
        )
    tokens = text_tokens(model, prompt, prepend_bos=prepend_bos) if isinstance(prompt, str) else prompt
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"token ids are integers, but these are {tokens.dtype}")
    # a copy, so that a result does not change with what its maker does to the tokens afterwards
    return (tokens[None] if tokens.ndim == 1 else tokens).to("cpu", torch.long, copy=True)


def token_strings(model: Any, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Each token as text; bytes that are only a part of a character as `\\xfc`.

    Without a tokenizer they are the ids; an id past the tokenizer's length is `[id]`.
    """
    if model.tokenizer is None:
        return tuple(str(token) for token in tokens.tolist())
    texts = []
    for token in tokens.tolist():
        text = model.tokenizer.decode([token])
        if not text or "\ufffd" in text:
            text = _bytes_shown(model.tokenizer.convert_ids_to_tokens(token))
        texts.append(text or f"[{token}]")
    return tuple(texts)


def _bytes_shown(token: str | None) -> str | None:
    """A token of a byte-level vocabulary with its lone bytes as such: there they look like letters."""
    if token is None or not set(token) <= _BYTES.keys():
        return token
    return bytes(_BYTES[each] for each in token).decode("utf-8", "backslashreplace")


def vocabulary_hash(tokenizer: Any) -> str | None:
    """What tells one tokenizer's ids from another's: a hash of its tokens by id; None without a tokenizer."""
    if tokenizer is None:
        return None
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12]


def target_id(model: Any, target: Any) -> int:
    """The id of a target token, which is given as an id or as a text of exactly one token.

    Raises:
        TypeError: neither a text nor an id.
        ValueError: the text is not one token (its pieces are shown), there is no tokenizer to read it, or the
            id is not in the vocabulary.
    """
    if isinstance(target, str):
        if model.tokenizer is None:
            raise ValueError(f"this model has no tokenizer: give the target {target!r} as an id")
        ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = [model.tokenizer.decode([i]) for i in ids]
            spaced = model.tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
            hint = f"; did you mean {f' {target}'!r}, which is one?" if len(spaced) == 1 else ""
            raise ValueError(f"the target {target!r} is {len(ids)} tokens, not one: {pieces}{hint}")
        return int(ids[0])
    try:
        index = operator.index(target)
    except TypeError:
        raise TypeError(
            f"a target is an id or a text of one token, but this is a {type(target).__name__}: {target!r}"
        ) from None
    if not 0 <= index < model.cfg.d_vocab:
        raise ValueError(f"token id {index} is not in the model's vocabulary of {model.cfg.d_vocab}")
    return index


def chosen(what: str, given: Sequence[SupportsIndex] | None, count: int) -> tuple[int, ...]:
    """Indices of positions, layers or the like from 0; None is all of them, negative ones count from the end.

    Raises:
        TypeError: not a sequence of whole numbers.
        ValueError: none is asked for, one that is not there, or one twice.
    """
    if given is None:
        return tuple(range(count))
    try:
        # plain ints also where they come from an array or a table, because results save them
        indices = tuple(operator.index(index) for index in given)
    except TypeError:
        raise TypeError(f"{what}s are given as numbers, such as [0, 1], but here is {given!r}") from None
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"there is no {what} {index}: there are {count}, 0 to {count - 1}")
    if not indices:
        raise ValueError(f"no {what} is asked for; there are {count}")
    found = tuple(index % count for index in indices)
    if len(set(found)) < len(found):
        raise ValueError(f"the same {what} is asked for twice: {indices}")
    return found
