"""OV circuits: what a head writes at the destination, given what it reads at the source."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.circuits.factors import (
    SOURCE_DESTINATION,
    check_heads,
    head_names,
    make_circuit,
    read_tokens,
)
from mechlens.models.protocol import LensModel
from mechlens.models.weights.folding import folded_heads, to_logits
from mechlens.results import Circuit
from mechlens.results.heads import Heads


def OV(model: LensModel, heads: Heads) -> Circuit:
    """What a head writes to the residual stream at the destination, given the stream at the source.

    Args:
        heads: one head, such as `"L3H5"` or `(3, 5)`, or a list of heads whose circuits are summed.

    Returns:
        `W_V @ W_O`, [source, destination], d_model x d_model; the inner dimension is d_head times the number
        of heads.

    Raises:
        TypeError: not a head.
        ValueError: a head is out of range, or given twice.

    Example:
        >>> mechlens.OV(model, "L3H5").name
        'OV of L3H5'

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Cost: no forward pass; a copy of the layers' attention weights.
    """
    read, write, chosen = _values(model, heads)
    return make_circuit(model, (read, write), f"OV of {head_names(chosen)}", chosen, SOURCE_DESTINATION)


def full_OV(model: LensModel, heads: Heads, *, embedding: str = "W_E") -> Circuit:
    """What attending to each token adds to the logit of each token.

    Args:
        heads: one head, such as `"L3H5"` or `(3, 5)`, or a list of heads whose circuits are summed: the
            effective OV circuit of heads that attend to the same places.
        embedding: `W_E`, or `effective`: `W_E` plus the first layer's MLP applied to it, without attention or
            positions.

    Returns:
        `W_E @ W_V @ W_O @ W_U`, [source token, destination token]. A destination token is a possible next
        token.

    Raises:
        TypeError: not a head.
        ValueError: a head is out of range or given twice, or `effective` for a model without MLPs.

    Example:
        >>> circuit = mechlens.full_OV(model, "L3H5")
        >>> circuit.shape
        (2048, 2048)

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Effective embedding:
    Wang et al. 2022, arXiv:2211.00593; ours includes the first MLP's biases.
    Cost: one pass of the vocabulary through the embedding and, with `effective`, the first MLP.
    """
    read, write, chosen = _values(model, heads)
    factors = read_tokens(model, read, embedding), to_logits(model, write)
    name = f"full OV of {head_names(chosen)}"
    return make_circuit(model, factors, name, chosen, SOURCE_DESTINATION, embedding=embedding)


def _values(
    model: LensModel, heads: Heads
) -> tuple[Float[Tensor, "d_model inner"], Float[Tensor, "inner d_model"], list[tuple[int, int]]]:
    """The heads' `W_V` concatenated, their `W_O` stacked, and the heads."""
    chosen = check_heads(model, heads)
    layers = {layer: folded_heads(model, layer) for layer, _ in chosen}
    read = torch.cat([layers[layer].W_V[index] for layer, index in chosen], dim=1)
    return read, torch.cat([layers[layer].W_O[index] for layer, index in chosen]), chosen
