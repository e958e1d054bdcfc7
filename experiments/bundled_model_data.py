"""Training data for `train_bundled_model.py`: the tokenizer, and batches of text and stories."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights, except the text."""

    vocab_size: int = 2048
    n_layers: int = 4
    d_model: int = 192
    n_heads: int = 6
    context: int = 512
    steps: int = 11000
    batch_tokens: int = 2048
    learning_rate: float = 3e-3
    warmup: int = 200
    decay: float = 4 / 11  # final share of the steps, over which the learning rate decays to zero
    weight_decay: float = 0.05
    short_until: float = 0.28  # initial share of the steps, with a context of 64 and mostly stories
    long_from: float = 0.70  # share of the steps after which the context is full; before that it is 256
    text_share: float = 0.30  # share of text in a batch of the first stage
    final_text_share: float = 0.75  # share of text afterwards
    seed: int = 0

    def stage(self, step: int) -> tuple[int, float]:
        """Context length and share of text at a step."""
        done = step / max(1, self.steps)
        if done < self.short_until:
            return min(64, self.context), self.text_share
        if done < self.long_from:
            return min(256, self.context), self.final_text_share
        return self.context, self.final_text_share

    def rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * rise * fall


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, which is both BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> Tensor:
    """All documents as one int32 vector, each followed by EOS."""
    ids: list[int] = []
    for text in texts:
        # by paragraph, because the tokenizer needs several times the memory of its input
        for piece in text.splitlines(keepends=True):
            ids.extend(tokenizer.backend_tokenizer.encode(piece).ids)
        ids.append(tokenizer.bos_token_id)
    return torch.tensor(ids, dtype=torch.int32)


def bigram_loss(train: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Mean loss in nats of a bigram model with absolute discounting and back-off, fitted on `train`.

    The discount is n1 / (n1 + 2 n2). The freed probability goes to the unigram distribution, with add-one
    counts.

    References: Ney, Essen and Kneser 1994, "On structuring probabilistic dependences in stochastic language
        modelling".
    """
    unigram = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    unigram /= unigram.sum()
    pairs, counts = (train[:-1].long() * vocab_size + train[1:].long()).unique(return_counts=True)
    counts = counts.double()
    n1, n2 = float((counts == 1).sum()), float((counts == 2).sum())
    discount = n1 / (n1 + 2 * n2) if n1 + n2 else 0.0
    first = pairs // vocab_size
    total = torch.zeros(vocab_size, dtype=torch.double).index_add_(0, first, counts)
    kinds = torch.zeros(vocab_size, dtype=torch.double).index_add_(0, first, torch.ones_like(counts))
    before, after = held_out[:-1].long(), held_out[1:].long()
    wanted = before * vocab_size + after
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, counts[place] - discount, 0.0)
    freed = torch.where(total[before] > 0, discount * kinds[before], 1.0)
    probability = (seen + freed * unigram[after]) / total[before].clamp(min=1)
    return float(-probability.log().mean())


def story(length: int, base: Tensor, mean_chunk: float, generator: torch.Generator) -> Tensor:
    """`length` tokens in chunks of `base`: the first from its beginning, the others from random places.

    A chunk has two tokens plus a geometrically distributed number of further ones, so it can be predicted
    from its second token on.
    """
    pieces: list[Tensor] = []
    have = start = 0
    while have < length:
        u = torch.rand(2, generator=generator)
        more = int(math.log(max(float(u[0]), 1e-9)) / math.log(1 - 1 / max(1.5, mean_chunk - 1)))
        piece = base[start : start + 2 + more]
        pieces.append(piece)
        have += len(piece)
        start = int(float(u[1]) * (len(base) - 1))
    return torch.cat(pieces)[:length]


def make_batch(recipe: Recipe, step: int, text: Tensor, bos: int, valid: Tensor) -> Tensor:
    """The token ids `[batch, context]` of one step, determined by the recipe, the step and the text."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    context, text_share = recipe.stage(step)
    rows = []
    for _ in range(max(1, recipe.batch_tokens // context)):
        u = torch.rand(3, generator=generator).tolist()
        if u[0] < text_share:
            at = torch.randint(len(text) - context, (1,), generator=generator).item()
            row = text[at : at + context - 1].long()
        else:
            # log-uniform: repeats at all distances up to half the context, chunks of all lengths
            longest = max(4, context // 2)
            n_base = int(math.exp(math.log(4) + u[1] * (math.log(longest) - math.log(4))))
            mean_chunk = math.exp(math.log(3) + u[2] * (math.log(max(4, n_base)) - math.log(3)))
            if torch.rand(1, generator=generator).item() < 0.8:
                base = valid[torch.randint(len(valid), (n_base,), generator=generator)]
            else:
                at = torch.randint(len(text) - n_base, (1,), generator=generator).item()
                base = text[at : at + n_base].long()
            row = story(context - 1, base, mean_chunk, generator)
        rows.append(torch.cat([torch.tensor([bos]), row]))
    return torch.stack(rows)
