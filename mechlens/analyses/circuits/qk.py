"""QK circuits: how much a head's query at one position matches its key at another."""

from __future__ import annotations

from torch import Tensor

from mechlens.analyses.circuits.factors import QUERY_KEY, check_head, make_circuit, read_token_pair
from mechlens.models.protocol import LensModel
from mechlens.models.weights.folding import folded_heads
from mechlens.models.weights.rotary import HeadRotation, head_rotation
from mechlens.results import Circuit, head_label
from mechlens.results.heads import Head


def QK(
    model: LensModel, head: Head, *, relative_position: int | None = None, rotary: str | None = None
) -> Circuit:
    """How much a head's query, read from the residual stream, matches its key.

    Args:
        head: one head, such as `"L3H5"` or `(3, 5)`: scores of several heads do not add up.
        relative_position: for a rotary model: how many positions the key is before the query; 0 is the
            query's own position.
        rotary: for a rotary model: `unrotated` keeps only the dimensions of the head that are not rotated
            (GPT-NeoX has some). Their contribution to a score is the same at every distance.

    Returns:
        `W_Q @ W_K.T`, [query, key], d_model x d_model, before the attention scale.

    Raises:
        TypeError: not one head.
        ValueError: the head is out of range; a rotary model without `relative_position` or `rotary`, or
            another model with one of them; a model that normalizes queries and keys.

    Example:
        >>> mechlens.QK(model, "L3H5", relative_position=1).axes
        ('query', 'key')

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Cost: for a rotary model on a TransformerBridge, a run of `relative_position + 1` tokens up to the layer.
    """
    place, queries, keys, rotation = _queries_and_keys(model, head, relative_position, rotary)
    name = f"QK of {head_label(*place)}"
    return make_circuit(model, (queries, keys.T), name, [place], QUERY_KEY, rotation=rotation)


def full_QK(
    model: LensModel,
    head: Head,
    *,
    embedding: str = "W_E",
    relative_position: int | None = None,
    rotary: str | None = None,
) -> Circuit:
    """How much a head prefers to attend from each token to each token.

    Args:
        head: one head, such as `"L3H5"` or `(3, 5)`.
        embedding: `W_E`, or `effective`: `W_E` plus the first layer's MLP applied to it, without attention or
            positions.
        relative_position: for a rotary model: how many positions the key is before the query.
        rotary: for a rotary model: `unrotated` keeps only the dimensions that are not rotated.

    Returns:
        `W_E @ W_Q @ W_K.T @ W_E.T`, [query token, key token], before the attention scale.

    Raises:
        TypeError: not one head.
        ValueError: the head is out of range; a rotary model without `relative_position` or `rotary`, or
            another model with one of them; a model that normalizes queries and keys; `effective` for a model
            without MLPs.

    Example:
        >>> mechlens.full_QK(model, "L3H5", rotary="unrotated").shape
        (2048, 2048)

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Cost: one pass of the vocabulary through the embedding and, with `effective`, the first MLP.
    """
    place, queries, keys, rotation = _queries_and_keys(model, head, relative_position, rotary)
    factors = read_token_pair(model, queries, keys, embedding)
    name = f"full QK of {head_label(*place)}"
    return make_circuit(model, factors, name, [place], QUERY_KEY, embedding=embedding, rotation=rotation)


def _queries_and_keys(
    model: LensModel, head: Head, relative_position: int | None, rotary: str | None
) -> tuple[tuple[int, int], Tensor, Tensor, HeadRotation]:
    """The head, its rotated `W_Q` and `W_K`, and the rotation."""
    layer, index = check_head(model, head)
    weights = folded_heads(model, layer)
    rotation = head_rotation(model, layer, relative_position, rotary)
    return (layer, index), *rotation.apply(weights.W_Q[index], weights.W_K[index]), rotation
