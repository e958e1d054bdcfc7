"""Decoders: what turns a residual vector into the vector that the unembedding reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import whole_number
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch_from
from mechlens.models.run.unembedding import bare_norm, final_norm
from mechlens.results import ModelInfo, TunedLens

DECODERS = ("final_norm", "norm_only", "none")
OwnDecoder = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class LastBlocks:
    """A logit-lens decoder that first runs the model's last blocks on each row.

    A block never runs on its own output, so none runs on the last row.

    Args:
        count: how many of the last blocks, from 1 to the model's number of layers.
        decoder: what follows them: `final_norm`, `norm_only`, `none` or a function, as in `logit_lens`.

    Raises:
        TypeError: the count is not an integer.
        ArgumentError: the count is below 1.

    Example:
        >>> lens = mechlens.logit_lens(model, "The captain", decoder=mechlens.LastBlocks(1))
        >>> lens.decoder
        'LastBlocks(1)'

    Cost: up to `count` more blocks for each row (on a TransformerBridge, all blocks).
    """

    count: int
    decoder: str | OwnDecoder = "final_norm"

    def __post_init__(self) -> None:
        whole_number("count", self.count, least=1)

    def __str__(self) -> str:
        after = "" if self.decoder == "final_norm" else f", {decoder_name(self.decoder)}"
        return f"LastBlocks({self.count}{after})"


Decoder = str | OwnDecoder | TunedLens | LastBlocks


def decoder_name(decoder: Decoder) -> str:
    """What a result calls a decoder."""
    if isinstance(decoder, TunedLens):
        return "tuned_lens"
    if isinstance(decoder, (str, LastBlocks)):
        return str(decoder)
    return getattr(decoder, "__name__", type(decoder).__name__)


def decoding(model: LensModel, decoder: Decoder, info: ModelInfo) -> Callable[[str, Tensor], Tensor]:
    """The function that decodes the vectors of a row, given the row's place in the stream.

    The blocks of `LastBlocks` are not part of it; see `through_last_blocks`.

    Raises:
        ArgumentError: there is no such decoder.
        ValueError: it needs `processing=False`, or belongs to other weights.
    """
    if isinstance(decoder, LastBlocks):
        if decoder.count > model.cfg.n_layers:
            raise ArgumentError("count", f"at most the model's {model.cfg.n_layers} blocks", decoder.count)
        decoder = decoder.decoder
    if isinstance(decoder, TunedLens):
        lens = decoder
        lens.check_fits(info)
        return lambda place, vectors: final_norm(model, lens.translate(place, vectors))
    if callable(decoder):
        return partial(_own, decoder)
    if decoder not in DECODERS:
        needs = f"one of {', '.join(DECODERS)}, a function, a TunedLens or LastBlocks(n)"
        raise ArgumentError("decoder", needs, decoder)
    if decoder == "final_norm":
        return lambda _, vectors: final_norm(model, vectors)
    if info.processing is not False:
        raise ValueError(
            f"the decoder {decoder!r} leaves out the final norm's learned scale, which is folded into W_U in "
            "these weights: load the model with processing=False"
        )
    if decoder == "norm_only":
        return lambda _, vectors: bare_norm(model, vectors)
    return lambda _, vectors: vectors


def through_last_blocks(
    model: LensModel, residual: Float[Tensor, "piece pos d_model"], next_block: int, count: int
) -> Float[Tensor, "piece pos d_model"]:
    """The residual stream after running those of the last `count` blocks that have not run on it yet."""
    n_layers = model.cfg.n_layers
    first = max(next_block, n_layers - count)
    if first == n_layers:
        return residual
    kept: list[Tensor] = []
    watch_from(model, first, residual, {f"blocks.{n_layers - 1}.hook_resid_post": kept.append})
    return kept.pop()


def _own(decoder: OwnDecoder, _: str, vectors: Tensor) -> Tensor:
    """Decode with a user's function. It gets a copy, because some rows are decoded again."""
    decoded = decoder(vectors.clone())
    if not isinstance(decoded, Tensor) or decoded.shape != vectors.shape:
        came = tuple(decoded.shape) if isinstance(decoded, Tensor) else type(decoded).__name__
        raise ValueError(
            f"a decoder must return vectors of the shape it gets, {tuple(vectors.shape)}, got {came}"
        )
    return decoded
