"""The logit lens of single vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.logit_lens.decoders import OwnDecoder, decoder_name, decoding
from mechlens.analyses.logit_lens.targets import named_targets
from mechlens.measures.readout import read_out
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.unembedding import unembedding
from mechlens.results import VectorLens
from mechlens.text.tokens import target_id, token_strings


def lens_vector(
    model: LensModel,
    vector: Float[Tensor, "*vector d_model"],
    *,
    decoder: str | OwnDecoder = "final_norm",
    top_k: int = 10,
    targets: str | int | Sequence[str | int] | Mapping[str, str | int] = (),
) -> VectorLens:
    """Read any vector of width `d_model` as a next-token distribution.

    Args:
        vector: one or several, such as a steering vector, a row of `W_out` or a feature's direction.
        decoder: what comes before `W_U` and `b_U`: `final_norm`, the model's final norm; `norm_only`, the
            same without learned scale and bias; `none`; or a function of vectors `[1, vector, d_model]`. A
            soft-cap is always applied.
        top_k: number of most likely tokens to keep.
        targets: tokens to give the rank and log-probability of, as texts of one token or ids; a mapping names
            them.

    Returns:
        The most likely tokens of each vector, its entropy in nats, and the targets' ranks.

    Raises:
        ArgumentError: an unknown decoder, or `top_k` is out of range.
        ValueError: vectors of the wrong width, a target that is not one token, or a decoder that needs
            `processing=False`.

    Example:
        >>> found = mechlens.lens_vector(model, model.blocks[2].mlp.W_out[0], top_k=3)
        >>> found.top_ids.shape
        torch.Size([1, 3])

    References: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Cost: one product with `W_U` per vector.
    """
    info = describe(model)
    if vector.numel() == 0 or vector.shape[-1] != info.d_model:
        raise ValueError(
            f"a vector needs the model's {info.d_model} elements, got shape {tuple(vector.shape)}"
        )
    decode = decoding(model, decoder, info)
    vectors = vector.detach().to(model.W_U).reshape(-1, info.d_model)
    asked = {name: target_id(model, target) for name, target in named_targets(targets)}
    ids = torch.tensor(list(asked.values()), dtype=torch.long)
    with torch.inference_mode():
        found = read_out(
            vectors[None],
            unembedding(model),
            targets=ids.expand(len(vectors), -1).to(vectors.device),
            top_k=top_k,
            statistics=("entropy", "log_prob", "rank"),
            decode=lambda _, some: decode("", some),
        )
    assert found.entropy is not None
    assert found.log_prob is not None
    assert found.rank is not None
    seen = torch.cat([found.top_ids.cpu().flatten(), ids]).unique()
    return VectorLens(
        model=info,
        vectors=vectors.float().cpu(),
        decoder=decoder_name(decoder),
        top_ids=found.top_ids[0].cpu(),
        top_probabilities=found.top_probabilities[0].cpu(),
        entropy=found.entropy[0].cpu(),
        log_prob={name: found.log_prob[0, :, at].cpu() for at, name in enumerate(asked)},
        rank={name: found.rank[0, :, at].float().cpu() for at, name in enumerate(asked)},
        strings=dict(zip(map(str, seen.tolist()), token_strings(model, seen), strict=True)),
    )
