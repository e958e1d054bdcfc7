"""Text that a model writes itself."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from mechlens.models.protocol import LensModel
from mechlens.models.runs import final_norm, parts, reads_as_streamed, soft_cap, watch
from mechlens.prompts import bos_to_prepend, drawable_tokens


def sample_tokens(
    model: LensModel,
    *,
    batch: int,
    seq_len: int,
    seed: int = 0,
    temperature: float = 1.0,
    prepend_bos: bool | None = None,
    progress: bool = False,
) -> Int[Tensor, "batch pos"]:
    """Let a model write sequences, each token drawn from its own prediction.

    Args:
        batch: how many sequences.
        seq_len: tokens in each, the first one included.
        seed: of the `torch.Generator` that draws; the same seed gives the same tokens.
        temperature: 1 draws from the model's distribution, less prefers likely tokens.
        prepend_bos: None begins with BOS where the tokenizer has one. Without, each sequence begins with a
            token drawn uniformly.
        progress: show a bar.

    Returns:
        Ids on the CPU, all of them (but BOS) from `drawable_tokens`: a sequence never ends early.

    Raises:
        ValueError: a size below 1, more tokens than the context holds, a temperature that is not above 0, a
            BOS wanted but not there, or a model whose logits are more than norm, `W_U`, `b_U` and soft-cap.

    Cost: `seq_len - 1` forward passes over ever longer sequences (half of `seq_len` on average), since the
    engines' caches of keys and values behave differently; of each the last position is unembedded.
    """
    for name, value in (("batch", batch), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")
    if seq_len > model.cfg.n_ctx:
        raise ValueError(f"{seq_len} tokens do not fit into the model's context of {model.cfg.n_ctx}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, but is {temperature}")
    bos = bos_to_prepend(model, prepend_bos)
    generator = torch.Generator().manual_seed(seed)
    drawable = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    tokens = torch.empty(batch, seq_len, dtype=torch.long)
    tokens[:, 0] = (
        drawable[torch.randint(len(drawable), (batch,), generator=generator)] if bos is None else bos
    )
    if not reads_as_streamed(model, drawable[None, : min(8, model.cfg.n_ctx)]):
        raise ValueError(
            "this model's logits are more than its last norm, W_U, b_U and a soft-cap: what it writes cannot "
            "be drawn from these"
        )
    W_U, b_U = model.W_U.detach().float(), model.b_U.detach().float()
    cap = soft_cap(model)
    for pos in tqdm(range(1, seq_len), desc="sampling", unit="token", disable=not progress):
        logits = torch.cat([_last_logits(model, rows, W_U, b_U, cap) for rows in parts(tokens[:, :pos])])
        chances = (logits[:, drawable] / temperature).softmax(-1)
        tokens[:, pos] = drawable[torch.multinomial(chances, 1, generator=generator)[:, 0]]
    return tokens


def _last_logits(
    model: LensModel, rows: Int[Tensor, "batch pos"], W_U: Tensor, b_U: Tensor, cap: float | None
) -> Tensor:
    """`[batch, d_vocab]` at the last position, in float32 on the CPU."""
    kept: list[Tensor] = []

    def keep(residual: Tensor) -> None:
        # a copy, so that the other positions are freed
        kept.append(residual[:, -1:].clone())

    watch(model, rows, {f"blocks.{model.cfg.n_layers - 1}.hook_resid_post": keep})
    with torch.inference_mode():
        logits = torch.addmm(b_U, final_norm(model, kept[0])[:, 0].float(), W_U)
        return (logits if cap is None else cap * (logits / cap).tanh()).cpu()
