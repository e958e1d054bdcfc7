"""Training a tuned lens."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.tuned_lens.plan import TrainingPlan, measured_rate, training_plan
from mechlens.analyses.tuned_lens.translators import TENSORS, Head, gradients, held_out_kl, translators
from mechlens.analyses.tuned_lens.windows import batch_windows, training_windows
from mechlens.arguments import check_counts, check_reals, check_type, generator_of
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.unembedding import check_streamed
from mechlens.progress import announce
from mechlens.results import TunedLens
from mechlens.results.checkpoint import Checkpoint, checkpoint_path
from mechlens.text.corpus import Corpus
from mechlens.text.tokens import all_bos


@dataclasses.dataclass(frozen=True)
class Training:
    """How a tuned lens is trained: with Adam, at a learning rate that falls linearly to zero.

    Args:
        steps: optimizer steps.
        batch_tokens: tokens in each batch, in whole windows.
        learning_rate: at the first step; None is 0.5 / d_model, which moves each component of a residual of
            unit scale by at most 0.5.
        seed: for drawing the windows of each batch.

    Raises:
        TypeError: a number of another type.
        ArgumentError: a number out of range.

    Example:
        >>> mechlens.Training(steps=40, batch_tokens=256).steps
        40
    """

    steps: int = 250
    batch_tokens: int = 1024
    learning_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch_tokens=self.batch_tokens)
        check_reals(learning_rate=self.learning_rate)
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ArgumentError("learning_rate", "above 0", self.learning_rate)
        generator_of(self.seed)

    def rate(self, d_model: int) -> float:
        """The learning rate of the first step."""
        return 0.5 / d_model if self.learning_rate is None else self.learning_rate


@torch.inference_mode(False)  # it needs gradients, even if its caller is in inference mode
def train_tuned_lens(
    model: LensModel,
    corpus: Corpus | Int[Tensor, "window pos"],
    *,
    training: Training = Training(),
    held_out: int | None = None,
    held_out_corpus: Corpus | Int[Tensor, "other pos"] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> TunedLens:
    """Train an affine translator for each row of the lens but the last, to predict what the model does.

    Each translator minimizes KL(final || tuned), where final is the model's own distribution, and tuned
    applies the model's final norm, `W_U`, `b_U` and soft-cap to `x + x @ weight + bias`. Weight and bias
    start at zero, which is the plain lens. The model's weights are not changed.

    Args:
        corpus: a path, or several as `Path`s, to `.txt`, `.jsonl` or `.jsonl.gz` files or folders of them; an
            iterable of texts (a single text in a list); token ids `[window, pos]`, such as those of
            `sample_tokens`; or the windows of `token_windows`, which sets their length and BOS. Only as many
            windows are read as the steps need; if there are fewer, they are reused.
        training: steps, batch, learning rate and seed.
        held_out: number of windows to measure the KLs on instead of training: evenly spaced in the corpus, or
            the first ones of `held_out_corpus`. None is a tenth of the windows, at least 1 and at most 64.
        held_out_corpus: text or ids to measure on, instead of part of `corpus`.
        resume: a `.safetensors` file to save progress to, every half minute and when training ends or is
            interrupted. If the file exists, training resumes from it, and the result is the same as without
            the interruption, up to rounding.
        progress: show a bar with the loss (nats, mean over rows and positions of the batch). First print how
            long training will take and how many steps fit in ten minutes. None does both in a terminal and in
            Jupyter.

    Returns:
        The lens, with each row's held-out KL with and without its translator.

    Raises:
        ValueError: the corpus has too few windows for a batch and the held-out ones; the checkpoint was
            started with other arguments, another model or corpus; or the model's logits involve more than its
            final norm, `W_U`, `b_U` and a soft-cap.

    Example:
        >>> text = mechlens.sample_tokens(model, batch=8, seq_len=16)
        >>> tuned = mechlens.train_tuned_lens(model, text, training=mechlens.Training(2, 32), held_out=2)
        >>> tuned.rows
        ('embed', '0', '1', '2')

    References: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens",
    arXiv:2303.08112, who train with SGD on larger batches.
    Cost: per batch, one forward pass, and two products with `W_U` for each row. No `[row, pos, d_vocab]`
    tensor is created.
    """
    info = describe(model)
    check_counts(held_out=held_out)
    checkpoint_path(resume)
    check_type("training", training, Training)
    steps, rate = training.steps, training.rate(model.cfg.d_model)
    train, rest = training_windows(
        model, corpus, held_out_corpus, steps=steps, batch_tokens=training.batch_tokens, held_out=held_out
    )
    check_streamed(model, train)
    length = train.shape[1]
    per_step = max(1, training.batch_tokens // length)
    check_rows_alike(model, train[:per_step])
    shared: dict[str, Any] = {"steps": steps, "batch_tokens": per_step * length, "length": length}
    shared |= {"learning_rate": rate, "seed": training.seed}
    corpus_hash = hashlib.sha256(train.numpy().tobytes()).hexdigest()
    arguments = {"model": dataclasses.asdict(info), "corpus": corpus_hash, "held_out": len(rest), **shared}
    head = Head.of(model)
    with Checkpoint(
        resume, "training", lambda: arguments, owner="the training of a tuned lens", names=TENSORS
    ) as saved:
        state = translators(model, saved.tensors, saved.step)
        if progress is not False and state.step < steps:
            plan = training_plan(model, batch_tokens=per_step * length, length=length, held_out=len(rest))
            _announce(plan, head, steps - state.step, fixed=held_out is not None, progress=progress)

        def now() -> tuple[dict[str, Tensor], int]:
            return state.tensors(), state.step

        bar: dict[str, Any] = {"desc": "tuned lens", "unit": "step", "progress": progress}
        for step in saved.loop(range(state.step, steps), now, total=steps, **bar):
            batch = train[batch_windows(step, per_step, len(train), training.seed)]
            loss, found = gradients(model, head, batch, state)
            state = state.after(found, rate * (1 - step / steps))
            if not saved.bar.disable:
                saved.bar.set_postfix(loss=f"{loss:.4f}")
    plain, tuned = held_out_kl(model, head, rest, state)
    return TunedLens(
        model=info,
        rows=("embed", *(str(layer) for layer in range(model.cfg.n_layers - 1))),
        weight=state.weight.cpu(),
        bias=state.bias.cpu(),
        kl_plain=plain,
        kl_tuned=tuned,
        source="trained",
        train_tokens=min(len(train), steps * per_step) * length,
        held_out_tokens=rest.numel(),
        prepend_bos=all_bos(model.tokenizer, train[:, 0]),
        **shared,
    )


def _announce(plan: TrainingPlan, head: Head, steps: int, *, fixed: bool, progress: bool | None) -> None:
    """Print how long it will take."""
    said, seconds = plan.words(steps, measured_rate(head.reader), fixed=fixed)
    announce(f"tuned lens: {said}", seconds=seconds, progress=progress)
