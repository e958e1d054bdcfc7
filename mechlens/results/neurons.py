"""The neurons with the largest contributions to a logit."""

from __future__ import annotations

import dataclasses

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Record


def neuron_label(layer: int, neuron: int) -> str:
    """An MLP neuron's name in text, such as `L5N123`."""
    return f"L{layer}N{neuron}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class NeuronAttribution(Record):
    """The neurons that contribute most at each position read, and the tokens that their weights promote."""

    layers: Int[Tensor, "batch read rank"]
    """The layer of each neuron. The first rank is the largest contribution, of either sign."""
    indices: Int[Tensor, "batch read rank"]
    """Its index in the MLP of this layer."""
    contributions: Float[Tensor, "batch read rank"]
    """In logits."""
    activations: Float[Tensor, "batch read rank"]
    """After the nonlinearity; in a gated MLP, the product of gate and linear half."""
    biases: Float[Tensor, "layer batch read"]
    """What each layer's MLP adds without its neurons, in logits: its bias, and that of a norm behind it. All
    neurons of a layer and this sum to its MLP's contribution."""
    n_neurons: int
    """The number of neurons in all layers."""
    listed: Int[Tensor, "neuron 2"]
    """(layer, index) of each neuron above, once, in this order."""
    promoted: Int[Tensor, "neuron token"]
    """The tokens whose logits the output weights of each `listed` neuron raise most, through the final norm's
    learned scale and `W_U`; the first most of all. Where its activation is negative, it lowers them."""
    suppressed: Int[Tensor, "neuron token"]
    """The tokens whose logits they lower most."""

    def places(self) -> dict[tuple[int, int], int]:
        """The row of each neuron in `listed`, by (layer, index)."""
        return {(layer, index): row for row, (layer, index) in enumerate(self.listed.tolist())}
