"""Token sequences for experiments: random tokens, the same tokens repeated, and text."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import check_model, seeds_of, whole_number
from mechlens.text.tokens import check_text, drawable_tokens, own_bos_token_id, token_strings

Prompt = str | Sequence[Any] | Tensor | np.ndarray | Mapping[str, Any]
"""Text, texts, or token ids: a tensor, an array, lists of numbers, or the output of a tokenizer."""


@dataclasses.dataclass(frozen=True, eq=False)
class RandomTokens:
    """Random tokens, some of which may be repeated."""

    tokens: Int[Tensor, "batch pos"]
    """What the model reads: BOS (if `prepend_bos`), then random tokens and their copies."""
    starts: Int[Tensor, "batch copy"]
    """The position at which each copy begins."""
    seq_len: int
    """Tokens in one copy."""
    prepend_bos: bool
    seed: int


@dataclasses.dataclass(frozen=True)
class RepeatedTokens:
    """What to draw for experiments on induction: random tokens, repeated once.

    Args:
        seq_len: random tokens in one copy, S; the model reads `[BOS, S tokens, the same S]`.
        batch: sequences per seed.
        seeds: each seed draws its own sequences.
        jitter: insert 0 to `jitter` other random tokens between the copies, the number drawn for each
            sequence, so that attending at a fixed distance gains a head nothing.
        prepend_bos: None prepends BOS if the tokenizer has one.

    Raises:
        TypeError: a size that is not a whole number.
        ValueError: a size below 1, a negative jitter, or seeds that are not distinct.

    Example:
        >>> on = mechlens.RepeatedTokens(seq_len=10, batch=2, seeds=[0])
        >>> on.draw(model, 0).tokens.shape
        torch.Size([2, 21])

    References: Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895.
    """

    seq_len: int = 50
    batch: int = 30
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    jitter: int = 0
    prepend_bos: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 1), ("batch", 1), ("jitter", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=least))
        object.__setattr__(self, "seeds", seeds_of(self.seeds))

    def draw(self, model: Any, seed: int) -> RandomTokens:
        """Draw the sequences of one seed for a model.

        Raises:
            ValueError: the sequences do not fit the context, or `prepend_bos=True` without a BOS token.
        """
        return repeated_tokens(
            model,
            seq_len=self.seq_len,
            batch=self.batch,
            seed=seed,
            prepend_bos=self.prepend_bos,
            jitter=self.jitter,
        )


DEFAULT_REPEATED = RepeatedTokens()
"""What experiments on repeated tokens draw by default."""


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
    """Draw sequences `[BOS, S random tokens, the same S tokens, ...]`.

    Tokens are drawn uniformly with replacement, without special tokens. BOS replaces none of them.

    Args:
        model: anything with TransformerLens's `cfg` and `tokenizer`.
        seq_len: S, the number of random tokens in one copy.
        batch: number of sequences, each drawn independently.
        copies: number of copies; 1 repeats nothing.
        seed: seed of the `torch.Generator`; the same seed gives the same tokens.
        prepend_bos: whether to prepend BOS; None does so if the tokenizer has one.
        jitter: vary the distance between the two copies: insert 0 to `jitter` other random tokens between
            them, the number drawn for each sequence. The rest of `jitter` follows the second copy, so that
            all sequences have the same length.

    Returns:
        Token ids on the CPU, with the position at which each copy begins.

    Raises:
        TypeError: a size that is not a whole number.
        ValueError: a size below 1, jitter with other than 2 copies, `prepend_bos=True` with a
            tokenizer that has no BOS, or more tokens than fit the context.

    Example:
        >>> drawn = mechlens.repeated_tokens(model, seq_len=3, batch=2)
        >>> drawn.tokens.shape, drawn.starts[0]
        (torch.Size([2, 7]), tensor([1, 4]))

    References: Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895.
    """
    check_model(model)
    seq_len, batch, copies, seed = (
        whole_number(name, value, least=least)
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch", batch, 1),
            ("copies", copies, 1),
            ("seed", seed, 0),
        )
    )
    jitter = whole_number("jitter", jitter)
    if jitter < 0 or (jitter and copies != 2):
        raise ValueError(
            f"jitter must be at least 0, and needs 2 copies, got jitter {jitter} with {copies} copies"
        )
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
    """The id of BOS if sequences begin with it, else None.

    Args:
        prepend_bos: None uses BOS if the tokenizer has one, and warns otherwise.

    Raises:
        ValueError: `prepend_bos=True`, but the tokenizer has no BOS.
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
    """Tokenize a text into one row of ids.

    Args:
        model: anything with TransformerLens's `cfg` and `tokenizer`.
        prepend_bos: whether to prepend BOS; None does so if the tokenizer has one. A text that begins with
            BOS gets no second one.

    Returns:
        Token ids `[1, pos]` on the CPU.

    Raises:
        ValueError: no tokenizer, an empty text, or more tokens than fit the context.

    Example:
        >>> mechlens.text_tokens(model, "The captain", prepend_bos=False)
        tensor([[ 562,  276, 1586]])
    """
    return _in_context(model, text_ids(model, text, prepend_bos=prepend_bos)[None], "text")


def _in_context(model: Any, tokens: Int[Tensor, "1 pos"], what: str) -> Int[Tensor, "1 pos"]:
    if tokens.shape[1] > model.cfg.n_ctx:
        raise ValueError(
            f"the {what} has {tokens.shape[1]} tokens, but the model's context is {model.cfg.n_ctx}: "
            "shorten it"
        )
    return tokens


def text_ids(model: Any, text: str, *, prepend_bos: bool | None = None) -> Int[Tensor, " pos"]:
    """The ids of a text, which may be longer than the context."""
    check_model(model)
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: pass token ids instead of text")
    check_text(text, "text")
    if not text.strip():
        raise ValueError(
            "the text is empty"
            if not text
            else f"the text is blank ({text!r}): pass its token ids if you mean it"
        )
    # not verbose, or it warns of texts longer than the context
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"the tokenizer turns the text {text!r} into no tokens")
    bos = bos_to_prepend(model, prepend_bos)
    # rendered chat templates and decoded tokens may begin with BOS
    return torch.tensor(ids if bos is None or ids[0] == bos else [bos, *ids])


def chat_tokens(
    model: Any, messages: str | Sequence[Mapping[str, Any]], *, generation_prompt: bool = True
) -> Int[Tensor, "1 pos"]:
    """Tokenize a conversation with the model's chat template into one row of ids.

    The ids are those of the tokenizer's own `apply_chat_template`; BOS is added only if the template
    has it. Every analysis takes them as its prompt, and figures mark where each turn begins.

    Args:
        model: anything with TransformerLens's `cfg` and `tokenizer`.
        messages: mappings with a `role` (`system`, `user`, `assistant`, or another that the template knows)
            and a `content`. A single text is one message from the user.
        generation_prompt: end with the header of the assistant's turn, so that the last position predicts the
            first token of the answer.

    Returns:
        Token ids `[1, pos]` on the CPU.

    Raises:
        TypeError: `messages` is neither a list of messages nor a text.
        ValueError: no tokenizer or chat template, messages that the template refuses, or more tokens than
            fit the context.

    Example:
        >>> # mechlens-books has no chat template, so it borrows one
        >>> model.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        >>> mechlens.chat_tokens(model, "The captain").shape
        torch.Size([1, 6])
        >>> model.tokenizer.chat_template = None
    """
    check_model(model)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not is_chat(messages):
        raise TypeError(
            "messages must be a list of {'role': ..., 'content': ...} or one text from the user, got "
            f"{str(messages)[:80]!r}"
        )
    for message in messages:
        check_text(str(message["content"]), f"message of the {message['role']}")
    if getattr(model.tokenizer, "chat_template", None) is None:
        raise ValueError(
            "this model has no chat template: pass the prompt as text"
            if model.tokenizer is not None
            else "this model has no tokenizer: pass token ids instead of text"
        )
    try:
        encoded = model.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=generation_prompt,
            tokenize=True,
            return_dict=True,
        )
    except Exception as error:  # the template is code, which may raise anything
        raise ValueError(f"the chat template does not accept these messages: {error}") from error
    return _in_context(model, torch.tensor(encoded["input_ids"])[None], "conversation")


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, (list, tuple))
        and bool(prompt)
        and all(isinstance(each, Mapping) and {"role", "content"} <= set(each) for each in prompt)
    )


def prompt_tokens(model: Any, prompt: Prompt, *, prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
    """The token ids of a prompt (one sequence or several), as a copy on the CPU.

    Raises:
        TypeError: the prompt is neither text nor ids.
        ValueError: no tokenizer, an empty text, more tokens than fit the context, sequences of different
            lengths or with padding, or ids that are not integers.
    """
    check_model(model)
    texts = as_texts(prompt)
    if texts is not None:
        rows = [text_tokens(model, text, prepend_bos=prepend_bos) for text in texts]
        check_equally_long(model, rows)
        return torch.cat(rows)
    tokens, mask = as_ids(prompt)
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            "the prompt has padding (zeros in its attention_mask), but sequences must have the same length "
            "here: pass sequences of the same length together"
        )
    if mask is None:
        warn_of_padding(model, tokens)
    return tokens


def check_equally_long(model: Any, rows: Sequence[Tensor]) -> None:
    """Check that texts have the same number of tokens.

    Raises:
        ValueError: they do not; the message shows the tokens.
    """
    for row in rows:
        if row.shape != rows[0].shape:
            raise ValueError(
                f"the texts must have the same number of tokens, got {rows[0].shape[1]}, "
                f"{list(token_strings(model, rows[0][0]))}, and {row.shape[1]}, "
                f"{list(token_strings(model, row[0]))}"
            )


def as_texts(prompt: Any) -> list[str] | None:
    """The texts of a prompt; None for one of ids.

    Raises:
        TypeError: the prompt mixes texts with something else, or is a list of messages.
        ValueError: an empty list.
    """
    if isinstance(prompt, str):
        return [prompt]
    if is_chat(prompt):
        raise TypeError("these are messages: turn them into a prompt with chat_tokens(model, messages)")
    if isinstance(prompt, (Tensor, Mapping)) or not isinstance(prompt, Iterable):
        return None
    entries = list(prompt)
    if not entries and isinstance(prompt, (list, tuple)):
        raise ValueError("the list of prompts is empty")
    if not any(isinstance(entry, str) for entry in entries):
        return None
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(
                f"a list of prompts must contain only texts, got a {type(entry).__name__}: pass token ids as "
                "a tensor"
            )
    return entries


def as_ids(prompt: Any) -> tuple[Int[Tensor, "*batch pos"], Tensor | None]:
    """Token ids `[batch, pos]` as a copy on the CPU, and their mask if a tokenizer returned one.

    Raises:
        TypeError: not token ids.
        ValueError: ids that are not integers, or rows of different lengths.
    """
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        mask = prompt.get("attention_mask")
        ids, _ = as_ids(prompt["input_ids"])
        if mask is not None:
            # a copy, because the caller may change the mask later
            mask = torch.as_tensor(mask).to("cpu", torch.bool, copy=True)
            mask = mask[None] if mask.ndim == 1 else mask
        return ids, mask
    if isinstance(prompt, (list, tuple, np.ndarray)):
        try:
            prompt = torch.as_tensor(np.asarray(prompt))
        except (TypeError, ValueError) as error:
            raise ValueError(
                "token ids must be integers [batch, pos] with rows of the same length; pad shorter ones and "
                f"mark the padding with attention_mask ({error})"
            ) from None
    if not isinstance(prompt, Tensor):
        raise TypeError(
            f"a prompt is text or token ids, got {prompt!r:.80}: pass tokens as torch.tensor(ids) "
            "or the output of a tokenizer"
        )
    if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
        raise ValueError(f"token ids must be integers, got {prompt.dtype}")
    # a copy, because the caller may change the tokens later
    ids = prompt[None] if prompt.ndim == 1 else prompt
    return ids.to("cpu", torch.long, copy=True), None


def warn_of_padding(model: Any, tokens: Int[Tensor, "batch pos"]) -> None:
    """Warn of ids that look like padding but have no mask, and so are read like all others."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    if pad is None or tokens.ndim != 2 or not tokens.numel():
        return
    real = tokens != pad
    counts = {}
    for side, at in (("begins", real), ("ends", real.flip(1))):
        count = (at.int().cumsum(1) == 0).sum(1)
        # a sequence may begin with BOS and end with EOS, which are the padding token in many models
        counts[side] = (
            count if bool((count > 1).any()) or len(count.unique()) > 1 else torch.zeros_like(count)
        )
    for side, count in counts.items():
        row = int(count.argmax())
        if count[row]:
            warnings.warn(
                f"row {row} of the prompt {side} with {int(count[row])} padding tokens (id {pad}), which are "
                "read like any others: leave them out, or pass attention_mask where it is accepted",
                stacklevel=4,
            )
            return
