"""The translators of a tuned lens, and the gradients that train them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.tuned_lens.plan import CHUNK, RESIDUAL_BYTES
from mechlens.measures.divergence import Reference, reference_of
from mechlens.measures.readout import read_out
from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch
from mechlens.models.run.unembedding import final_norm, unembedding

CAPPED_BYTES = 16 * 2**20
"""Memory for one float32 tensor of soft-capped logits, which are not tiled; a few are in memory at a time."""
BETAS, EPSILON = (0.9, 0.999), 1e-8


def residuals(
    model: LensModel, tokens: Int[Tensor, "batch pos"]
) -> Iterator[Float[Tensor, "every some d_model"]]:
    """The vectors of each row and of the last layer, a few windows at a time."""
    n_layers = model.cfg.n_layers
    hooks = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]
    at_once = max(1, RESIDUAL_BYTES // (4 * len(hooks) * tokens.shape[1] * model.cfg.d_model))
    for some in tokens.split(at_once):
        kept: dict[str, Tensor] = {}
        watch(model, some, {name: partial(kept.__setitem__, name) for name in hooks})
        yield torch.stack([kept[name].flatten(0, 1) for name in hooks])


@dataclasses.dataclass(frozen=True)
class Head:
    """From the final residual stream to the model's distribution."""

    model: LensModel
    reader: Unembedding

    @classmethod
    def of(cls, model: LensModel) -> Head:
        """Converts `W_U` once to the dtype that products use."""
        reader = unembedding(model)
        return cls(model, dataclasses.replace(reader, W_U=reader.W_U.to(reader.dtype)))

    def norm(self, vectors: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_model"]:
        # as a batch of one sequence in the model's dtype, like all inputs of the norm
        return final_norm(self.model, vectors[None].to(self.model.W_U.dtype))[0]

    def chunks(self, vectors: Float[Tensor, "every some d_model"]) -> Iterator[Tensor]:
        """A few positions at a time, as tensors that gradients can pass through."""
        n_pos, most = vectors.shape[1], CHUNK
        if self.reader.soft_cap is not None:
            most = min(most, max(1, CAPPED_BYTES // (4 * self.reader.d_vocab)))
        for chunk in vectors.tensor_split(-(-n_pos // most), dim=1):
            yield chunk.clone()

    @torch.no_grad()
    def final(self, vectors: Float[Tensor, "some d_model"]) -> Reference:
        """The model's own distributions, the targets of all rows."""
        return reference_of(self.reader, self.norm(vectors).to(self.reader.dtype))

    @torch.no_grad()
    def kl(
        self, vectors: Float[Tensor, "every some d_model"], translate: Callable[[int, Tensor], Tensor]
    ) -> Float[Tensor, "every some"]:
        """KL(final || row) in nats for each translated row."""
        found = read_out(
            vectors,
            self.reader,
            targets=torch.empty(vectors.shape[1], 0, dtype=torch.long, device=vectors.device),
            references=(len(vectors) - 1,),
            top_k=1,
            statistics=("kl",),
            decode=lambda row, some: self.norm(translate(row, some[0]))[None],
        )
        assert found.kl is not None
        return found.kl[..., 0]


@dataclasses.dataclass(frozen=True)
class Translators:
    """The translators and Adam's running means. Each step makes a new object, so an interruption never leaves
    a half-updated one."""

    weight: Float[Tensor, "row d_model d_model"]
    bias: Float[Tensor, "row d_model"]
    weight_mean: Float[Tensor, "row d_model d_model"]
    bias_mean: Float[Tensor, "row d_model"]
    weight_square: Float[Tensor, "row d_model d_model"]
    bias_square: Float[Tensor, "row d_model"]
    step: int

    def after(self, found: tuple[Tensor, Tensor], rate: float) -> Translators:
        """The state one step of Adam later (Kingma and Ba 2015, arXiv:1412.6980)."""
        step = self.step + 1
        new: dict[str, Tensor] = {}
        for name, gradient in zip(("weight", "bias"), found, strict=True):
            mean = BETAS[0] * getattr(self, f"{name}_mean") + (1 - BETAS[0]) * gradient
            square = BETAS[1] * getattr(self, f"{name}_square") + (1 - BETAS[1]) * gradient**2
            size = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
            new[name] = getattr(self, name) - rate / (1 - BETAS[0] ** step) * mean / size
            new |= {f"{name}_mean": mean, f"{name}_square": square}
        return Translators(**new, step=step)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

    def translate(self, row: int, x: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_model"]:
        wide = x.to(self.weight.dtype)
        return wide + wide @ self.weight[row] + self.bias[row]


TENSORS = tuple(field.name for field in dataclasses.fields(Translators) if field.name != "step")


def translators(model: LensModel, tensors: Mapping[str, Tensor] | None = None, step: int = 0) -> Translators:
    """Translators from the tensors of a checkpoint, or all zero."""
    rows, d_model = model.cfg.n_layers, model.cfg.d_model
    like = model.W_U.detach()
    if tensors:
        return Translators(**{name: tensor.to(like.device) for name, tensor in tensors.items()}, step=step)
    dtype = torch.promote_types(like.dtype, torch.float32)
    shapes = {name: (rows, d_model, d_model) if "weight" in name else (rows, d_model) for name in TENSORS}
    zeros = {name: torch.zeros(shape, dtype=dtype, device=like.device) for name, shape in shapes.items()}
    return Translators(**zeros, step=0)


def gradients(
    model: LensModel, head: Head, batch: Int[Tensor, "batch pos"], state: Translators
) -> tuple[float, tuple[Tensor, Tensor]]:
    """The loss on a batch (mean over rows and positions, nats), and the gradient of each row's mean loss."""
    weight, bias = torch.zeros_like(state.weight), torch.zeros_like(state.bias)
    loss = 0.0
    for vectors in residuals(model, batch):
        for chunk in head.chunks(vectors):
            final = head.final(chunk[-1])
            for row, x in enumerate(chunk[:-1]):
                kl, g = _backward(head, final, state.translate(row, x))
                loss += kl / (len(weight) * batch.numel())
                weight[row].addmm_(x.to(g.dtype).T, g, alpha=1 / batch.numel())
                bias[row] += g.sum(0) / batch.numel()
    return loss, (weight, bias)


def _backward(
    head: Head, final: Reference, translated: Float[Tensor, "some d_model"]
) -> tuple[float, Float[Tensor, "some d_model"]]:
    """The sum of KL(final || translated), and its gradient with respect to the translated vectors.

    The gradient through the vocabulary is written out by hand, because autograd would keep several tensors of
    that width.
    """
    with torch.enable_grad():
        leaf = translated.requires_grad_()
        normed = head.norm(leaf)
    with torch.no_grad():
        kl, by_normed = final.kl_and_gradient(normed.to(head.reader.dtype))
    (gradient,) = torch.autograd.grad(normed, leaf, by_normed.to(normed.dtype))
    return float(kl.sum()), gradient


def held_out_kl(
    model: LensModel, head: Head, tokens: Int[Tensor, "window pos"], state: Translators
) -> tuple[Float[Tensor, " every"], Float[Tensor, " every"]]:
    """The mean KL of each row and of the last layer in nats, plain and tuned."""
    n_rows = model.cfg.n_layers
    plain, tuned = torch.zeros(2, n_rows + 1, dtype=torch.float64)
    for vectors in residuals(model, tokens):
        plain += head.kl(vectors, lambda _, x: x).double().sum(1).cpu()
        tuned += (
            head.kl(vectors, lambda row, x: state.translate(row, x) if row < n_rows else x)
            .double()
            .sum(1)
            .cpu()
        )
    plain, tuned = (torch.stack([plain, tuned]) / tokens.numel()).float()
    return plain, tuned
