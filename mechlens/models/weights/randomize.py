"""A copy of a model with random weights, as if untrained."""

from __future__ import annotations

import copy
import math
import numbers
from typing import Any

import torch

from mechlens.arguments import generator_of
from mechlens.models.protocol import LensModel, Provenance, describe, provenance_of, set_provenance
from mechlens.models.run.forward import kept_graphs
from mechlens.models.weights.access import all_parameters

_EMBEDDINGS = ("embed", "pos_embed")
_WRITERS = {"W_O", "W_out", "o", "c_proj"}
"""Names of GPT-2's matrices that write to the stream, in the engines and in transformers."""


def random_like(
    model: LensModel, seed: int, *, keep_embeddings: bool = False, std: float = 0.02
) -> LensModel:
    """Copy a model with random weights, initialized as Hugging Face initializes GPT-2, NeoX and Llama models.

    Matrices are drawn from a normal distribution with mean 0; biases are 0; norms have scale 1 and bias 0.
    GPT-2's matrices that write to the stream are divided by the square root of twice the number of layers. A
    tied unembedding stays tied.

    Args:
        model: a model on either engine; it is not changed.
        seed: seed of the `torch.Generator`. The same seed gives different weights on the two engines, which
            order weights differently.
        keep_embeddings: keep the token and position embeddings, and a tied unembedding.
        std: standard deviation of the weights; the default is Hugging Face's.

    Returns:
        A new model with the same tokenizer, in evaluation mode, on the same device, with unprocessed weights.

    Raises:
        TypeError: the model is not from either engine, or `seed` or `std` is not a number.
        ValueError: `std` is not above 0, torch does not accept the seed, or embeddings to keep are processed.

    Example:
        >>> mechlens.random_like(model, seed=0).W_E.shape
        torch.Size([2048, 192])

    References: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", for the
    initialization; Badger, "Language Model Features", for the comparison with random weights.
    Cost: the memory of a second model.
    """
    info, source, draw = describe(model), provenance_of(model), generator_of(seed)
    if isinstance(std, bool) or not isinstance(std, numbers.Real):
        raise TypeError(f"std must be a number, got {std!r}")
    if not std > 0 or not math.isfinite(std):
        raise ValueError(f"std must be a finite number above 0, got {std}")
    if keep_embeddings and info.processing is not False:
        raise ValueError(
            f"the embeddings of {info.name} are or may be processed, but random blocks are not: load it with "
            "load_model(..., processing=False)"
        )
    # on one of the engines, processing unties them
    tied = source.tied if source else torch.equal(model.W_U, model.W_E.T)
    # a bridge keeps an activation from a run with gradients; with its graph it could not be copied
    kept = {id(value): value.detach() for _, _, value in kept_graphs(model)}
    other: Any = copy.deepcopy(model, kept)
    # HookedTransformer stores Gemma's embedding already scaled; other code scales it in the forward pass
    wide = math.sqrt(info.d_model) if info.architecture.startswith("Gemma") else 1.0
    wide = wide if info.engine == "HookedTransformer" else 1.0
    smaller = math.sqrt(2 * info.n_layers) if info.architecture == "GPT2LMHeadModel" else 1.0
    with torch.no_grad():
        for path, owner, name, parameter in all_parameters(other):
            place = path.split(".")
            if keep_embeddings and (place[0] in _EMBEDDINGS or (tied and place[0] == "unembed")):
                continue
            if "Norm" in type(owner).__name__:
                # a Gemma norm multiplies by 1 + weight
                begin = 0.0 if type(owner).__name__.startswith("Gemma") else 1.0
                parameter.fill_(begin if name in ("w", "weight") else 0.0)
            elif name.lstrip("_").startswith(("b_", "bias")):
                parameter.zero_()
            else:
                scale = std / smaller if _WRITERS.intersection((*place, name)) else std
                scale *= wide if place[0] == "embed" else 1.0
                parameter.copy_(
                    (torch.randn(parameter.shape, generator=draw, dtype=torch.float32) * scale).to(parameter)
                )
        if tied and not keep_embeddings:
            other.W_U.copy_(other.W_E.T / wide)
    words = ", trained embeddings" if keep_embeddings else ""
    name = f"{info.name} (random weights, seed {seed}{words})"
    set_provenance(other, Provenance(name, None, info.architecture, processing=False, tied=tied))
    return other.eval()
