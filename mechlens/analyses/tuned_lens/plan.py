"""What training a tuned lens takes: compute, time and memory."""

from __future__ import annotations

import dataclasses
import time

import torch

from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel
from mechlens.models.run.arithmetic import block_flop
from mechlens.models.run.unembedding import unembedding
from mechlens.progress import duration
from mechlens.text.display import count

CHUNK = 256
"""Vectors multiplied by `W_U` together: a tile of their logits fits in the cache."""
RESIDUAL_BYTES = 256 * 2**20
"""Memory for the residual vectors of all rows of the windows that run together."""
RATE_FLOP = 30 * 10**9
"""Size of the product that measures the machine's speed: a few tenths of a second."""


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What training a tuned lens takes. A FLOP is one floating-point addition or multiplication."""

    step_tokens: int
    step_flop: int
    """For a batch: one forward pass, and for each row its translator and two products with `W_U` (the logits
    and their gradient). The model's own distribution takes one or two more."""
    held_out_tokens: int
    held_out_flop: int
    """For all held-out tokens: one forward pass, and each row's logits with and without its translator."""
    bytes: int
    """Memory besides the model: the translators with Adam's two moments and, during a step, their gradients
    and new values; residual vectors; a float32 `W_U`."""

    def seconds(self, steps: int, rate: float) -> float:
        """How long training and measuring take, at a rate in FLOP per second."""
        return (steps * self.step_flop + self.held_out_flop) / rate

    def words(self, steps: int, rate: float, *, fixed: bool) -> tuple[str, float]:
        """How long training will take, in words and in seconds.

        Args:
            fixed: whether the number of held-out tokens is independent of the number of steps; otherwise it
                is proportional to it.
        """
        seconds = self.seconds(steps, rate)
        step = self.step_flop / rate
        affordable = (600 - (seconds - steps * step)) / step if fixed else 600 * steps / seconds
        said = (
            f"about {duration(seconds)} for {count(steps, 'step')} of {self.step_tokens:,} tokens, of which "
            f"{duration(self.held_out_flop / rate)} measure it on {self.held_out_tokens:,} tokens held out "
            f"({self.step_flop / 1e12:.3g} TFLOP a step, {rate / 1e12:.2g} a second here); 10 minutes buy "
            f"{count(max(0, int(affordable)), 'step')}"
        )
        return said, seconds


def training_plan(model: LensModel, *, batch_tokens: int, length: int, held_out: int) -> TrainingPlan:
    """Count what training a tuned lens takes, without running anything.

    Args:
        batch_tokens: tokens in a step.
        length: tokens in a window.
        held_out: held-out windows.

    Operations are counted as in `block_flop`; exponentials are not, but they lower the measured rate.
    """
    cfg = model.cfg
    forward = cfg.n_layers * block_flop(model, length)
    unembed = 2 * cfg.d_model * cfg.d_vocab
    translate = 2 * cfg.d_model**2
    rows = cfg.n_layers
    # with a soft-cap the model's own logits are enough
    own = unembed if unembedding(model).soft_cap is not None else 2 * unembed
    step = forward + own + rows * (2 * translate + 2 * unembed)
    # each row and the model's own logits, once plain and once translated
    measure = forward + 2 * (rows + 1) * unembed + rows * translate
    tokens = held_out * length
    translators = 4 * rows * cfg.d_model * (cfg.d_model + 1)
    residuals = 4 * (rows + 1) * cfg.d_model * max(batch_tokens, tokens)
    return TrainingPlan(
        step_tokens=batch_tokens,
        step_flop=step * batch_tokens,
        held_out_tokens=tokens,
        held_out_flop=measure * tokens,
        bytes=7 * translators + min(residuals, RESIDUAL_BYTES) + 4 * cfg.d_model * cfg.d_vocab,
    )


def measured_rate(reader: Unembedding) -> float:
    """FLOP per second of the main cost of training: a gradient through part of the vocabulary."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(CHUNK, len(reader.W_U), generator=draw, dtype=torch.float32).to(reader.W_U)
    of_tile = 4 * vectors.numel() * reader.width
    # more weights than fit in the cache, as in training
    n_tiles = min(max(1, RATE_FLOP // of_tile), -(-reader.d_vocab // reader.width))
    reader = dataclasses.replace(reader, soft_cap=None)
    for n in (1, n_tiles):  # the first one also allocates memory
        start = time.perf_counter()
        float(reader.expected_column(vectors, n_tiles=n)[0].sum())  # float() waits for the GPU
    return n_tiles * of_tile / (time.perf_counter() - start)
