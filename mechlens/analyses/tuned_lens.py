"""Training a tuned lens: for each row, the affine map after which it predicts what the model does."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import check_counts, check_reals, generator_of
from mechlens.measures.divergence import Reference, reference_of
from mechlens.measures.readout import read_out
from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.arithmetic import block_flop
from mechlens.models.run.forward import watch
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.unembedding import check_streamed, final_norm, unembedding
from mechlens.progress import announce, duration
from mechlens.results import TunedLens
from mechlens.results.checkpoint import Checkpoint, checkpoint_path
from mechlens.text.corpus import LENGTH, Source, token_windows
from mechlens.text.tokens import all_bos

CHUNK = 256
"""Vectors that go through `W_U` together: a tile of their logits stays near the processor."""
CAPPED_BYTES = 16 * 2**20
"""Memory for float32 logits with a soft-cap, which are held whole; a few such are held at a time."""
MOST_HELD_OUT = 64
"""Windows that are held out unasked, at most."""
RESIDUAL_BYTES = 256 * 2**20
"""Memory for the residual vectors of all rows, of as many windows as are run at once."""
RATE_FLOP = 30 * 10**9
"""Of the product by which the machine is measured: some tenths of a second."""
BETAS, EPSILON = (0.9, 0.999), 1e-8


@torch.inference_mode(False)  # it takes gradients, whatever mode its caller is in
def train_tuned_lens(
    model: LensModel,
    corpus: Source | Int[Tensor, "window pos"],
    *,
    steps: int = 250,
    batch_tokens: int = 1024,
    length: int | None = None,
    learning_rate: float | None = None,
    held_out: int | None = None,
    held_out_corpus: Source | Int[Tensor, "other pos"] | None = None,
    seed: int = 0,
    prepend_bos: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> TunedLens:
    """Train one affine translator for each row of the lens but the last, to predict what the model does.

    Each translator minimises KL(final || tuned), where final is the model's own distribution and tuned is
    the model's last norm, `W_U`, `b_U` and soft-cap on `x + x @ weight + bias`; weight and bias are zero at
    the start, which is the plain lens. The optimiser is Adam, with a rate that falls linearly to zero. The
    model's weights stay as they are.

    Args:
        corpus: a path, or several as `Path`s, to `.txt`, `.jsonl` or `.jsonl.gz` files or folders of them; an
            iterable of texts (a single text in a list); or token ids `[window, pos]`, such as
            `sample_tokens(model, ...)`; see `token_windows`. Its first windows are used, as many as the steps
            need; if there are fewer, they are used again.
        steps: of the optimiser.
        batch_tokens: tokens in each step's batch, in whole windows. Which windows make the batch of a step
            depends on the seed alone.
        length: tokens in a window with its BOS; see `token_windows`.
        learning_rate: of the first step; None is 0.5 / d_model, with which a step moves each component of a
            residual of unit scale by half of that at most.
        held_out: windows that are not trained on and on which the KLs are measured: every n-th of the
            windows, with the n that spreads them evenly, or the first ones of `held_out_corpus`. None is a
            tenth of the windows that are read, at least 1 and at most 64.
        held_out_corpus: text or ids to measure on, instead of a part of `corpus`.
        prepend_bos: for text: None begins each window with BOS where the tokenizer has one.
        resume: a `.safetensors` file to save progress to, every half minute and when training ends or is
            interrupted. If the file exists, training resumes from it; the result is that of an uninterrupted
            training, to rounding.
        progress: show a bar with the loss (the mean over rows of the KL on the batch, in nats), and say
            before how many minutes it is going to take and what ten minutes buy; None shows them in a
            terminal and in Jupyter.

    Returns:
        The lens, with the KL on the windows held out of each row with and without its translator.

    Raises:
        ValueError: a size below 1, a corpus of fewer windows than a batch and what is held out, a
            checkpoint that was begun with other arguments, another model or corpus (the error names what
            differs), or a model whose logits are more than norm, `W_U`, `b_U` and soft-cap.

    Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens",
    arXiv:2303.08112, who train with SGD on larger batches.
    Cost: one forward pass over each batch, and for each row two products with `W_U`; see `training_plan`. No
    `[row, pos, d_vocab]` tensor exists.
    """
    info = describe(model)
    check_counts(steps=steps, batch_tokens=batch_tokens, held_out=held_out)
    check_reals(learning_rate=learning_rate)
    learning_rate = 0.5 / model.cfg.d_model if learning_rate is None else learning_rate
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, but is {learning_rate}")
    checkpoint_path(resume)
    train, rest = _windows(model, corpus, held_out_corpus, steps, batch_tokens, length, held_out, prepend_bos)
    check_streamed(model, train)
    per_step = max(1, batch_tokens // train.shape[1])
    check_rows_alike(model, train[:per_step])
    arguments = {
        "model": dataclasses.asdict(info),
        "corpus": hashlib.sha256(train.numpy().tobytes()).hexdigest(),
        "steps": steps,
        "batch_tokens": per_step * train.shape[1],
        "length": train.shape[1],
        "held_out": len(rest),
        "learning_rate": learning_rate,
        "seed": seed,
    }
    head = _Head.of(model)
    with Checkpoint(
        resume, "training", lambda: arguments, owner="the training of a tuned lens", names=_TENSORS
    ) as saved:
        training = _begin(model, saved.tensors, saved.step)
        if progress is not False and training.step < steps:
            plan = training_plan(
                model, batch_tokens=per_step * train.shape[1], length=train.shape[1], held_out=len(rest)
            )
            said, seconds = plan.words(steps - training.step, _rate(head), fixed=held_out is not None)
            announce(f"tuned lens: {said}", seconds=seconds, progress=progress)

        def state() -> tuple[dict[str, Tensor], int]:
            return training.tensors(), training.step

        for step in saved.loop(
            range(training.step, steps),
            state,
            total=steps,
            desc="tuned lens",
            unit="step",
            progress=progress,
        ):
            batch = train[_chosen(step, per_step, len(train), seed)]
            loss, gradients = _gradients(model, head, batch, training)
            # in one assignment, so that an interruption finds a whole state
            training = training.after(gradients, learning_rate * (1 - step / steps))
            if not saved.bar.disable:
                saved.bar.set_postfix(loss=f"{loss:.4f}")
    plain, tuned = _held_out_kl(model, head, rest, training)
    return TunedLens(
        model=info,
        rows=_rows(model),
        weight=training.weight.cpu(),
        bias=training.bias.cpu(),
        kl_plain=plain,
        kl_tuned=tuned,
        source="trained",
        steps=steps,
        batch_tokens=per_step * train.shape[1],
        length=train.shape[1],
        train_tokens=min(len(train), steps * per_step) * train.shape[1],
        held_out_tokens=rest.numel(),
        learning_rate=learning_rate,
        seed=seed,
        prepend_bos=all_bos(model.tokenizer, train[:, 0]),
    )


# -- what it costs ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What training a tuned lens takes. One addition or multiplication of floats is a FLOP."""

    step_tokens: int
    step_flop: int
    """One forward pass over a batch, and for each row its translator and two products with `W_U`: logits,
    and what comes back from them. The model's own distribution takes as many once."""
    held_out_tokens: int
    held_out_flop: int
    """Of all that is held out: one forward pass, and the logits of each row with and without translator."""
    bytes: int
    """Of memory beside the model: the translators with Adam's two means and, while a step replaces them,
    their gradients and successors; residual vectors; a float32 `W_U`."""

    def seconds(self, steps: int, rate: float) -> float:
        """How long so many steps and measuring take, at a rate in FLOP per second."""
        return (steps * self.step_flop + self.held_out_flop) / rate

    def words(self, steps: int, rate: float, *, fixed: bool) -> tuple[str, float]:
        """What is going to take how long, and in how many seconds.

        Args:
            fixed: what is held out would be as much for fewer steps, else in proportion to them.
        """
        seconds = self.seconds(steps, rate)
        step = self.step_flop / rate
        affordable = (600 - (seconds - steps * step)) / step if fixed else 600 * steps / seconds
        said = (
            f"about {duration(seconds)} for {_steps(steps)} of {self.step_tokens:,} tokens, of which "
            f"{duration(self.held_out_flop / rate)} measure it on {self.held_out_tokens:,} tokens held out "
            f"({self.step_flop / 1e12:.3g} TFLOP a step, {rate / 1e12:.2g} a second here); 10 minutes buy "
            f"{_steps(max(0, int(affordable)))}"
        )
        return said, seconds


def training_plan(model: LensModel, *, batch_tokens: int, length: int, held_out: int) -> TrainingPlan:
    """Count what training a tuned lens takes; nothing is run.

    Args:
        batch_tokens: in a step.
        length: tokens in a window.
        held_out: windows.

    Counted is what `block_flop` counts; exponentials take part in the rate that `train_tuned_lens` measures.
    """
    cfg = model.cfg
    forward = cfg.n_layers * block_flop(model, length)
    unembed = 2 * cfg.d_model * cfg.d_vocab
    translate = 2 * cfg.d_model**2
    rows = cfg.n_layers
    # with a soft-cap the model's own logits are enough
    own = unembed if unembedding(model).soft_cap is not None else 2 * unembed
    step = forward + own + rows * (2 * translate + 2 * unembed)
    # each row and the last layer once plain and once translated; the model's own beside them in either
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


def _rate(head: _Head) -> float:
    """FLOP per second of what training does most: a gradient through a part of the vocabulary."""
    reader, draw = head.reader, torch.Generator().manual_seed(0)
    vectors = torch.randn(CHUNK, len(reader.W_U), generator=draw, dtype=torch.float32).to(reader.W_U)
    of_tile = 4 * vectors.numel() * reader.width
    # of more weights than a cache holds, as while it trains
    n_tiles = min(max(1, RATE_FLOP // of_tile), -(-reader.d_vocab // reader.width))
    reader = dataclasses.replace(reader, soft_cap=None)
    for n in (1, n_tiles):  # the first one also takes memory
        start = time.perf_counter()
        float(reader.expected_column(vectors, n_tiles=n)[0].sum())  # a GPU begins when somebody waits for it
    return n_tiles * of_tile / (time.perf_counter() - start)


def _steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


# -- what is read ----------------------------------------------------------------------------------


def _windows(
    model: LensModel,
    corpus: Source | Int[Tensor, "window pos"],
    held_out_corpus: Source | Int[Tensor, "other pos"] | None,
    steps: int,
    batch_tokens: int,
    length: int | None,
    held_out: int | None,
    prepend_bos: bool | None,
) -> tuple[Int[Tensor, "train length"], Int[Tensor, "rest length"]]:
    """The windows to train on, and those to measure on."""
    made = token_windows(model, corpus, length=length, prepend_bos=prepend_bos)
    found = list(islice(made, 1))
    length = len(found[0]) if found else length
    per_step = max(1, batch_tokens // (length or 1))
    wanted = held_out or _share(steps * per_step, 9)
    apart = wanted if held_out_corpus is None else 0
    found += islice(made, steps * per_step + apart - 1)
    if not found:
        tokens = length or min(LENGTH, model.cfg.n_ctx)
        raise ValueError(
            f"the corpus is shorter than one window of {tokens} tokens: give more text, or less length"
        )
    if held_out is None and apart:
        apart = _share(len(found), 10)
    if len(found) < per_step + apart:
        less = "batch_tokens or length" if held_out is None else "batch_tokens, held_out or length"
        raise ValueError(
            f"the corpus makes {len(found)} windows, but a batch takes {per_step}"
            + (f" and {apart} {'is' if apart == 1 else 'are'} held out" if apart else "")
            + f": give more text, or less {less}"
        )
    windows = torch.stack(found)
    if held_out_corpus is not None:
        others = token_windows(model, held_out_corpus, length=length, prepend_bos=prepend_bos, limit=wanted)
        rest = list(others)
        if not rest:
            raise ValueError(f"the held-out corpus makes no window of {length} tokens: give more text")
        return windows, torch.stack(rest)
    every = len(windows) // apart
    aside = torch.arange(apart) * every + every - 1
    kept = torch.ones(len(windows), dtype=torch.bool)
    kept[aside] = False
    return windows[kept], windows[aside]


def _share(windows: int, part: int) -> int:
    """One in so many windows, as many as are held out unasked."""
    return max(1, min(MOST_HELD_OUT, windows // part))


def _chosen(step: int, per_step: int, count: int, seed: int) -> Int[Tensor, " chosen"]:
    """The windows of a step: each once in an order drawn from the seed, then in another order, and so on."""
    places = range(step * per_step, (step + 1) * per_step)
    orders = {
        epoch: torch.randperm(count, generator=generator_of(seed + epoch))
        for epoch in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


def _rows(model: LensModel) -> tuple[str, ...]:
    return ("embed", *(str(layer) for layer in range(model.cfg.n_layers - 1)))


def _residuals(
    model: LensModel, tokens: Int[Tensor, "batch pos"]
) -> Iterator[Float[Tensor, "every some d_model"]]:
    """The vectors of each row and the last layer, some windows at a time."""
    n_layers = model.cfg.n_layers
    hooks = ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(n_layers))]
    at_once = max(1, RESIDUAL_BYTES // (4 * len(hooks) * tokens.shape[1] * model.cfg.d_model))
    for some in tokens.split(at_once):
        kept: dict[str, Tensor] = {}
        watch(model, some, {name: partial(kept.__setitem__, name) for name in hooks})
        yield torch.stack([kept[name].flatten(0, 1) for name in hooks])


# -- what is trained -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Head:
    """What the model makes of a last residual."""

    model: LensModel
    reader: Unembedding

    @classmethod
    def of(cls, model: LensModel) -> _Head:
        """With the weights as they are used over and over."""
        reader = unembedding(model)
        return cls(model, dataclasses.replace(reader, W_U=reader.W_U.to(reader.dtype)))

    def norm(self, vectors: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_model"]:
        # as a batch of one sequence and in the model's dtype, like everything the norm gets
        return final_norm(self.model, vectors[None].to(self.model.W_U.dtype))[0]

    def chunks(self, vectors: Float[Tensor, "every some d_model"]) -> Iterator[Tensor]:
        """Some positions at a time, as tensors that a gradient may pass through."""
        n_pos, most = vectors.shape[1], CHUNK
        if self.reader.soft_cap is not None:
            most = min(most, max(1, CAPPED_BYTES // (4 * self.reader.d_vocab)))
        for chunk in vectors.tensor_split(-(-n_pos // most), dim=1):
            yield chunk.clone()

    @torch.no_grad()
    def final(self, vectors: Float[Tensor, "some d_model"]) -> Reference:
        """The model's own distributions, which all rows are to predict."""
        return reference_of(self.reader, self.norm(vectors).to(self.reader.dtype))

    @torch.no_grad()
    def kl(
        self, vectors: Float[Tensor, "every some d_model"], translate: Callable[[int, Tensor], Tensor]
    ) -> Float[Tensor, "every some"]:
        """KL(final || row) in nats, of each row as it is translated."""
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
class _Training:
    """The translators and Adam's running means; never changed, so that it is whole at every moment."""

    weight: Float[Tensor, "row d_model d_model"]
    bias: Float[Tensor, "row d_model"]
    weight_mean: Float[Tensor, "row d_model d_model"]
    bias_mean: Float[Tensor, "row d_model"]
    weight_square: Float[Tensor, "row d_model d_model"]
    bias_square: Float[Tensor, "row d_model"]
    step: int

    def after(self, gradients: tuple[Tensor, Tensor], rate: float) -> _Training:
        """The state one step of Adam later (Kingma and Ba 2015, arXiv:1412.6980)."""
        step = self.step + 1
        new: dict[str, Tensor] = {}
        for name, gradient in zip(("weight", "bias"), gradients, strict=True):
            mean = BETAS[0] * getattr(self, f"{name}_mean") + (1 - BETAS[0]) * gradient
            square = BETAS[1] * getattr(self, f"{name}_square") + (1 - BETAS[1]) * gradient**2
            size = (square / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
            new[name] = getattr(self, name) - rate / (1 - BETAS[0] ** step) * mean / size
            new |= {f"{name}_mean": mean, f"{name}_square": square}
        return _Training(**new, step=step)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    def translate(self, row: int, x: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_model"]:
        wide = x.to(self.weight.dtype)
        return wide + wide @ self.weight[row] + self.bias[row]


_TENSORS = tuple(field.name for field in dataclasses.fields(_Training) if field.name != "step")


def _begin(model: LensModel, tensors: Mapping[str, Tensor] | None = None, step: int = 0) -> _Training:
    """From the tensors of a checkpoint, or from zero."""
    rows, d_model = model.cfg.n_layers, model.cfg.d_model
    like = model.W_U.detach()
    if tensors:
        return _Training(**{name: tensor.to(like.device) for name, tensor in tensors.items()}, step=step)
    dtype = torch.promote_types(like.dtype, torch.float32)
    shapes = {name: (rows, d_model, d_model) if "weight" in name else (rows, d_model) for name in _TENSORS}
    zeros = {name: torch.zeros(shape, dtype=dtype, device=like.device) for name, shape in shapes.items()}
    return _Training(**zeros, step=0)


def _gradients(
    model: LensModel, head: _Head, batch: Int[Tensor, "batch pos"], training: _Training
) -> tuple[float, tuple[Tensor, Tensor]]:
    """The loss on a batch (mean over rows and positions, nats), and the gradients of each row's own mean."""
    weight, bias = torch.zeros_like(training.weight), torch.zeros_like(training.bias)
    loss = 0.0
    for vectors in _residuals(model, batch):
        for chunk in head.chunks(vectors):
            final = head.final(chunk[-1])
            for row, x in enumerate(chunk[:-1]):
                kl, g = _backward(head, final, training.translate(row, x))
                loss += kl / (len(weight) * batch.numel())
                weight[row].addmm_(x.to(g.dtype).T, g, alpha=1 / batch.numel())
                bias[row] += g.sum(0) / batch.numel()
    return loss, (weight, bias)


def _backward(
    head: _Head, final: Reference, translated: Float[Tensor, "some d_model"]
) -> tuple[float, Float[Tensor, "some d_model"]]:
    """The sum of KL(final || translated), and its gradient by the translated vectors.

    By hand through the vocabulary, where autograd would keep several tensors of that width.
    """
    with torch.enable_grad():
        leaf = translated.requires_grad_()
        normed = head.norm(leaf)
    with torch.no_grad():
        kl, by_normed = final.kl_and_gradient(normed.to(head.reader.dtype))
    (gradient,) = torch.autograd.grad(normed, leaf, by_normed.to(normed.dtype))
    return float(kl.sum()), gradient


def _held_out_kl(
    model: LensModel, head: _Head, tokens: Int[Tensor, "window pos"], training: _Training
) -> tuple[Float[Tensor, " every"], Float[Tensor, " every"]]:
    """The mean KL of each row and the last layer in nats, plain and tuned."""
    n_rows = model.cfg.n_layers
    plain, tuned = torch.zeros(2, n_rows + 1, dtype=torch.float64)
    for vectors in _residuals(model, tokens):
        plain += head.kl(vectors, lambda _, x: x).double().sum(1).cpu()
        tuned += (
            head.kl(vectors, lambda row, x: training.translate(row, x) if row < n_rows else x)
            .double()
            .sum(1)
            .cpu()
        )
    plain, tuned = (torch.stack([plain, tuned]) / tokens.numel()).float()
    return plain, tuned
