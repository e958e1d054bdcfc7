"""What single MLP neurons add to a logit, and the tokens that they promote."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.readout import read_out
from mechlens.measures.unembedding import TILE_ROWS, Unembedding
from mechlens.models.protocol import LensModel
from mechlens.models.weights.access import (
    before_norm,
    final_norm_scale,
    mlp_bias,
    mlp_out_affine,
    neuron_weights,
    norm_scale,
)


class LargestNeurons:
    """The neurons with the largest contributions at each place, found while a model runs.

    One layer's neurons exist at a time. Contributions exclude the division by the final norm's scale, which
    is known only after the run and changes no order.

    Args:
        directions: read the stream before the final norm, one for each distinct pair of tokens.
        which: the direction of each place.
        top: number of neurons to keep at each place.
    """

    def __init__(
        self,
        model: LensModel,
        directions: Float[Tensor, "pair d_model"],
        which: Int[Tensor, "batch read"],
        top: int,
    ) -> None:
        self.model, self.directions, self.which, self.top = model, directions, which, top
        none = directions.new_empty(*which.shape, 0)
        self.layers: Int[Tensor, "batch read rank"] = none.long()
        self.indices: Int[Tensor, "batch read rank"] = none.long()
        self.contributions: Float[Tensor, "batch read rank"] = none
        self.activations: Float[Tensor, "batch read rank"] = none
        self.biases: list[Float[Tensor, "batch read"]] = []
        """By layer, what the MLP adds without its neurons."""
        self._sum = self._size = none

    def add(self, layer: int, activations: Float[Tensor, "batch read d_mlp"]) -> None:
        """Add the neurons of the next layer."""
        W_out, b_out = neuron_weights(self.model, layer).float(), mlp_bias(self.model, layer)
        norm = mlp_out_affine(self.model, layer)
        seen = self.directions if norm is None else before_norm(self.model, self.directions, norm[0])
        added = (seen @ W_out.T)[self.which].mul_(activations)
        bias = (seen @ b_out)[self.which]
        if norm is not None:
            scale = norm_scale(self.model, activations @ W_out + b_out)
            added /= scale[..., None]
            bias = bias / scale + (self.directions @ norm[1])[self.which]
        self.biases.append(bias)
        sizes = added.abs()
        self._sum, self._size = added.sum(-1) + bias, sizes.sum(-1) + bias.abs()
        at = sizes.topk(min(self.top, sizes.shape[-1])).indices
        contributions = torch.cat([self.contributions, added.gather(-1, at)], -1)
        best = contributions.abs().topk(min(self.top, contributions.shape[-1])).indices
        self.contributions = contributions.gather(-1, best)
        self.layers = torch.cat([self.layers, torch.full_like(at, layer)], -1).gather(-1, best)
        self.indices = torch.cat([self.indices, at], -1).gather(-1, best)
        self.activations = torch.cat([self.activations, activations.gather(-1, at)], -1).gather(-1, best)

    def check(
        self,
        layer: int,
        mlp_out: Float[Tensor, "batch read d_model"],
        contribution: Float[Tensor, "batch read"],
    ) -> None:
        """Check that the neurons and the bias of the layer added last sum to its MLP's contribution.

        Args:
            mlp_out: what the MLP adds to the stream.
            contribution: that in the logit.

        Raises:
            ValueError: they do not, up to rounding in the model's dtype.
        """
        off = (self._sum - contribution).abs()
        # rounding is relative to the neurons' terms, and to the elements of their sum, which may be large in
        # dimensions that cancel in the logit; 16, because thousands are summed
        elements = torch.linalg.vecdot(mlp_out.abs(), self.directions.abs()[self.which])
        allowed = 16 * torch.finfo(self.model.W_U.dtype).eps * (self._size + elements)
        worst = (off - allowed).argmax()
        if not bool(((off <= allowed) | contribution.isnan()).all()):
            raise ValueError(
                f"the neurons of layer {layer} (`post` @ W_out) and b_out do not sum to what its MLP adds to "
                "the residual stream: this model scales it or adds something else, or a hook changes it, so "
                "neurons cannot be read separately; they miss a contribution of "
                f"{float(contribution.flatten()[worst]):.4g} by {float(off.flatten()[worst]):.2g}, before "
                "the final norm's scale"
            )

    @torch.inference_mode()
    def found(self, scale: Float[Tensor, "batch read"]) -> dict[str, Tensor]:
        """Layers, indices, contributions, activations `[batch, read, rank]`, and the MLPs' biases
        `[layer, batch, read]`.

        Args:
            scale: of the final norm.
        """
        return {
            "layers": self.layers,
            "indices": self.indices,
            "contributions": self.contributions / scale[..., None],
            "activations": self.activations,
            "biases": torch.stack(self.biases) / scale,
        }


def check_neurons(model: LensModel) -> int:
    """The number of neurons in all layers.

    Raises:
        ValueError: a layer has no MLP, or one without `W_out`.
    """
    return sum(len(neuron_weights(model, layer)) for layer in range(model.cfg.n_layers))


def promoted_tokens(
    model: LensModel, neurons: Int[Tensor, "neuron 2"], top_k: int
) -> tuple[Int[Tensor, "neuron token"], Int[Tensor, "neuron token"]]:
    """The tokens whose logits a neuron's output weights raise most, and those that they lower most.

    Includes the learned scales of the norm behind the MLP, if there is one, and of the final norm.

    Args:
        neurons: (layer, neuron) of each, sorted by layer.

    Cost: two products with `W_U` per neuron, in tiles.
    """
    most, least = [], []
    without_bias = Unembedding(model.W_U.detach(), torch.zeros_like(model.b_U))
    with torch.inference_mode():
        final = final_norm_scale(model)
        whole = torch.ones_like(final)
        for some in neurons.split(TILE_ROWS):
            vectors = []
            for layer in some[:, 0].unique().tolist():
                written = neuron_weights(model, layer)
                written = written[some[some[:, 0] == layer, 1].to(written.device)].float()
                norm = mlp_out_affine(model, layer)
                if norm is not None:
                    written = before_norm(model, written, whole) * norm[0]
                vectors.append(before_norm(model, written, whole) * final)
            both = torch.cat(vectors)
            ids = read_out(
                torch.stack([both, -both]),
                without_bias,
                targets=torch.empty(len(both), 0, dtype=torch.long, device=both.device),
                top_k=min(top_k, without_bias.d_vocab),
                statistics=(),
            ).top_ids
            most.append(ids[0].cpu())
            least.append(ids[1].cpu())
    # clones made outside inference mode are ordinary tensors
    return torch.cat(most).clone(), torch.cat(least).clone()
