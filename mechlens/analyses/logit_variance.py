"""Whether the logits of improbable tokens vary more across layers than those of probable tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import chosen, generator_of, whole_number
from mechlens.errors import ArgumentError
from mechlens.measures.vocabulary_variance import vocabulary_variance
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, watch
from mechlens.models.run.sites import SITES
from mechlens.models.run.unembedding import check_streamed, final_norm, unembedding
from mechlens.results import LogitVariance
from mechlens.text.prompts import Prompt, prompt_tokens
from mechlens.text.tokens import all_bos


def logit_variance(
    model: LensModel,
    prompt: Prompt,
    *,
    bins: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    nulls: int = 20,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> LogitVariance:
    """Compare how much logit-lens logits vary across layers between finally probable and improbable tokens.

    The conjecture: the directions of tokens that the context rules out are used for other purposes in the
    middle layers, and "smoothly subtracted out at the end". Then the logits of these tokens vary more across
    layers than those of probable tokens, and more than those of the same tokens at other positions, and the
    excess vanishes at the end.

    Logits are those of the lens with the decoder `final_norm`, before any soft-cap. They are centered over
    the vocabulary, because adding a constant to all of them changes no prediction.

    Args:
        prompt: texts or token ids `[batch, pos]`, all rows of the same length; ids are used as they are.
        bins: tokens are binned by their rank in the final prediction: the last rank of each bin, increasing.
            A further bin takes the rest of the vocabulary. None is 1, 10, 100 and so on, so the first bin is
            the model's top token.
        positions: positions to read, negative ones from the end; None reads all. In many models the first
            position is an outlier.
        nulls: number of random assignments of tokens to bins, at least 1.
        seed: for these, and for drawing the other positions whose ranks bin the tokens for comparison.
        prepend_bos: whether to prepend BOS to texts; None prepends it if the tokenizer has one.

    Returns:
        Variance across layers for each bin, in logits², with that for random bins and for ranks at another
        position; and mean, spread and distance from the final logit by layer.

    Raises:
        ArgumentError: bins do not increase or are outside the vocabulary, or `nulls` is below 1.
        ValueError: a position is out of range, the prompt is longer than the context, or the model's logits
            involve more than its final norm, `W_U`, `b_U` and a soft-cap.

    Example:
        >>> found = mechlens.logit_variance(model, "The captain of the ship", nulls=2)
        >>> found.labels
        ('1', '2-10', '11-100', '101-1000', '1001-2048')

    References: a comment on nostalgebraist 2020, "interpreting GPT: the logit lens", makes the conjecture but
    proposes no test; the measure is ours.
    Cost: one forward pass, one product with `W_U` per row and one more, and, per position, a sort of the
    vocabulary and `nulls` passes over it. `[row, pos, d_vocab]` tensors cover a chunk of positions at most.
    """
    info = describe(model)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    read = chosen("position", positions, tokens.shape[1])
    ranks = _bins(bins, model.cfg.d_vocab)
    nulls = whole_number("nulls", nulls, least=1)
    check_streamed(model, tokens)
    rows = ("embed", *(str(layer) for layer in range(model.cfg.n_layers)))
    vectors = torch.cat([_residuals(model, part, read) for part in parts(tokens)], dim=1)
    generator = generator_of(seed)
    n_vectors = vectors.shape[1] * vectors.shape[2]
    with torch.inference_mode():
        found = vocabulary_variance(
            vectors.flatten(1, 2),
            unembedding(model),
            bins=ranks,
            over=slice(1, None),
            elsewhere=_others(n_vectors, generator).to(vectors.device) if n_vectors > 1 else None,
            nulls=nulls,
            generator=generator,
            decode=partial(final_norm, model),
        )
    shape = (len(tokens), len(read))

    def apart(values: Tensor) -> Tensor:
        return values.cpu().unflatten(-1, shape).clone()

    return LogitVariance(
        model=info,
        tokens=tokens,
        positions=read,
        rows=rows,
        bins=ranks,
        probability=apart(found.probability),
        variance=apart(found.variance),
        null_variance=found.null_variance.mean(-1).cpu().clone(),
        elsewhere_variance=apart(found.elsewhere_variance),
        mean_logit=apart(found.mean),
        spread=apart(found.spread),
        excess=apart(found.excess),
        seed=seed,
        prepend_bos=all_bos(model.tokenizer, tokens[:, 0]),
    )


def _bins(ends: Sequence[int] | None, d_vocab: int) -> tuple[tuple[int, int], ...]:
    """First and last rank of each bin."""
    given = [10**power for power in range(12) if 10**power < d_vocab] if ends is None else list(ends)
    if any(b <= a for a, b in zip([0, *given], given, strict=False)) or (given and given[-1] > d_vocab):
        raise ArgumentError("bins", f"increasing ranks between 1 and {d_vocab} (d_vocab)", tuple(given))
    if not given or given[-1] < d_vocab:
        given.append(d_vocab)
    return tuple(zip([1, *(end + 1 for end in given)], given, strict=False))


def _others(count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """A random cyclic permutation, so that no vector is its own partner."""
    around = torch.randperm(count, generator=generator)
    others = torch.empty_like(around)
    others[around] = around.roll(1)
    return others


def _residuals(model: LensModel, tokens: Int[Tensor, "batch pos"], read: Sequence[int]) -> Tensor:
    """`[row, batch, read, d_model]`: block 0's `resid_pre` and every `resid_post`."""
    kept: list[Tensor] = []
    where = torch.tensor(read)

    def keep(activation: Tensor) -> None:
        kept.append(activation[:, where.to(activation.device)])

    names = [SITES["resid_pre"].format(0)]
    names += [SITES["resid_post"].format(layer) for layer in range(model.cfg.n_layers)]
    readers: dict[str, Callable[[Tensor], None]] = dict.fromkeys(names, keep)
    watch(model, tokens, readers)
    return torch.stack(kept)
