"""Which vectors a lens reads: outputs of layers or heads, alone or added to the stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.logit_lens.decoders import through_last_blocks
from mechlens.analyses.logit_lens.windows import Part
from mechlens.arguments import chosen
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch
from mechlens.models.run.sites import SITES
from mechlens.models.weights.access import check_heads_add_up, head_outputs
from mechlens.results import head_label, parse_heads
from mechlens.results.heads import Heads, check_in_range

Read: TypeAlias = "str | Heads"
STREAMS = ("resid_pre", "resid_mid", "resid_post")
OUTPUTS = ("attn_out", "mlp_out", "result")
"""What a layer adds to the stream; for `result`, what each head adds."""
_NEEDS = (
    f"one of {', '.join((*STREAMS, *OUTPUTS))}, an output added to the stream such as resid_pre+attn_out, or "
    "heads such as L3H5"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the lens."""

    label: str
    layer: int
    head: int | None
    next_block: int
    """The first block that has not run on what this row reads."""

    @property
    def place(self) -> str:
        """The row of a `resid_post` lens at the same point in the stream."""
        return "embed" if self.next_block == 0 else str(self.next_block - 1)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read from each layer."""

    site: str
    stream: str | None
    """The stream that the site is added to, if any."""
    heads: tuple[tuple[int, int], ...] | None = None
    """For the site `result`; None is all heads."""

    @property
    def name(self) -> str:
        return self.site if self.stream is None else f"{self.stream}+{self.site}"

    @classmethod
    def of(cls, read: Read) -> Reading:
        """Parse the argument `read`.

        Raises:
            ArgumentError: `read` is invalid.
        """
        if not isinstance(read, (str, tuple, list)):
            raise ArgumentError("read", _NEEDS, read)
        one = isinstance(read, str) or not all(isinstance(each, (str, tuple)) for each in read)
        several: list[Any] = [read] if one else list(read)
        texts = [each for each in several if isinstance(each, str)]
        streams = {each.rpartition("+")[0] for each in texts} | ({""} if len(texts) < len(several) else set())
        if len(streams) != 1 or not streams <= {"", *STREAMS[:2]}:
            raise ArgumentError("read", _NEEDS, read)
        stream = streams.pop() or None
        sites = [each.rpartition("+")[2] if isinstance(each, str) else each for each in several]
        if len(sites) == 1 and sites[0] in (*STREAMS, *OUTPUTS):
            if stream is not None and sites[0] in STREAMS:
                raise ArgumentError("read", _NEEDS, read)
            return cls(sites[0], stream)
        try:
            return cls("result", stream, tuple(sorted(parse_heads(sites))))
        except (ValueError, TypeError) as error:
            raise ArgumentError("read", _NEEDS, read) from error

    def rows(self, model: LensModel, layers: Sequence[int] | None) -> list[Row]:
        """The rows of the lens: `embed`, then the layers or heads in order.

        Raises:
            ValueError: a layer or head is out of range, or both heads and layers are given.
        """
        embed, n_layers, n_heads = Row("embed", 0, None, 0), model.cfg.n_layers, model.cfg.n_heads
        if self.heads is not None and layers is not None:
            raise ArgumentError("layers", "left out where read names heads", layers)
        chosen_layers = sorted(chosen("layer", layers, n_layers))
        if self.site != "result":
            after = 0 if self.site == "resid_pre" else 1
            return [embed, *(Row(str(layer), layer, None, layer + after) for layer in chosen_layers)]
        heads = self.heads
        if heads is None:
            heads = tuple((layer, head) for layer in chosen_layers for head in range(n_heads))
        for layer, head in heads:
            check_in_range(layer, head, n_layers, n_heads)
        return [embed, *(Row(head_label(layer, head), layer, head, layer + 1) for layer, head in heads)]

    def check(self, model: LensModel) -> None:
        """Raise if the model does not have the stream.

        Raises:
            ValueError: `resid_mid` in a model whose attention and MLP both read `resid_pre`.
        """
        if "resid_mid" in (self.site, self.stream) and "blocks.0.hook_resid_mid" not in model.hook_dict:
            raise ValueError(
                "this model has no resid_mid, because attention and MLP both read resid_pre: use resid_pre "
                "or resid_pre+mlp_out"
            )


def read_vectors(
    model: LensModel, part: Part, rows: Sequence[Row], reading: Reading, last_blocks: int
) -> Float[Tensor, "row here d_model"]:
    """The vectors of each row, and last those that give the model's own logits."""
    n_pieces, width = part.tokens.shape
    # further blocks attend to all positions, so they need the vectors of all
    everywhere = last_blocks > 0
    piece, offset = part.piece, part.offset
    if everywhere:
        piece = repeat(torch.arange(n_pieces), "piece -> (piece width)", width=width)
        offset = repeat(torch.arange(width), "width -> (piece width)", piece=n_pieces)
    vectors = _watched(model, part, rows, reading, piece, offset)
    if not everywhere:
        return vectors
    with torch.inference_mode():
        at = part.piece.to(vectors.device), part.offset.to(vectors.device)
        whole = rearrange(vectors, "row (piece width) d_model -> row piece width d_model", piece=n_pieces)
        done = [
            through_last_blocks(model, each, row.next_block, last_blocks)[at]
            for each, row in zip(whole, rows, strict=False)
        ]
        return torch.stack([*done, whole[-1][at]])


def _watched(
    model: LensModel, part: Part, rows: Sequence[Row], reading: Reading, piece: Tensor, offset: Tensor
) -> Float[Tensor, "row here d_model"]:
    """The vectors of one forward pass at the given positions of its pieces."""
    n_layers = model.cfg.n_layers
    vectors = torch.zeros(
        len(rows) + 1, len(piece), model.cfg.d_model, dtype=model.W_U.dtype, device=model.W_U.device
    )
    unchecked: dict[int, Tensor] = {}
    """`z` of the layers whose heads are read, until their outputs are checked to sum to `attn_out`."""
    site = SITES["z" if reading.site == "result" else reading.site]
    readers: dict[str, list[tuple[int, int | None]]] = {"blocks.0.hook_resid_pre": [(0, None)]}
    for index, row in enumerate(rows[1:], start=1):
        readers.setdefault(site.format(row.layer), []).append((index, row.head))
        if reading.stream is not None:
            readers.setdefault(SITES[reading.stream].format(row.layer), []).append((index, None))
    readers.setdefault(f"blocks.{n_layers - 1}.hook_resid_post", []).append((len(rows), None))

    def add(name: str, activation: Tensor) -> None:
        some = activation[piece.to(activation.device), offset.to(activation.device)]
        indices = [index for index, _ in readers[name]]
        heads = [head for _, head in readers[name] if head is not None]
        if heads:
            layer = rows[indices[0]].layer
            unchecked[layer] = some
            written = head_outputs(model, layer, some, heads)
            vectors[indices] += rearrange(written, "here head d_model -> head here d_model").to(vectors.dtype)
        else:
            vectors[indices] += some

    def check(layer: int, attn_out: Tensor) -> None:
        some = attn_out[piece.to(attn_out.device), offset.to(attn_out.device)]
        check_heads_add_up(model, layer, unchecked.pop(layer), some)

    # a list for each hook, because attn_out may be both read and checked
    watched: dict[str, list[Callable[[Tensor], None]]] = {name: [partial(add, name)] for name in readers}
    if reading.site == "result":
        for layer in {row.layer for row in rows[1:]}:
            watched.setdefault(SITES["attn_out"].format(layer), []).append(partial(check, layer))
    watch(model, part.tokens, {name: partial(_each, reads) for name, reads in watched.items()})
    return vectors


def _each(reads: Sequence[Callable[[Tensor], None]], activation: Tensor) -> None:
    for read in reads:
        read(activation)
