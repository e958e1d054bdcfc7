"""A grid of patches: one activation at a time, in a run of its own each."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.analyses.patching.metrics import Metric, Targets
from mechlens.analyses.patching.sources import Made, Mean, Source, values_of
from mechlens.analyses.patching.spec import Asked
from mechlens.arguments import check_counts
from mechlens.models.protocol import LensModel
from mechlens.models.run.patched_runs import start_sweeps, sweep
from mechlens.models.run.properties import last_residual
from mechlens.progress import progress_bar
from mechlens.results import PatchGridResult
from mechlens.results.checkpoint import checkpoint_path, load_state, save_state
from mechlens.text.prompts import Prompt

SAVE_SECONDS = 30.0
"""Between two saves of the state."""


def patch_grid(
    model: LensModel,
    prompt: Prompt,
    *,
    site: str,
    source: Source,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | str | None = None,
    positions: Sequence[int] | str | None = "each",
    weight: float = 1.0,
    metric: Metric = "loss",
    read: Sequence[int] | None = None,
    targets: Targets | None = None,
    against: Targets | None = None,
    direction: str = "noising",
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> PatchGridResult:
    """Patch one activation at a time, in a run of its own each, and measure what becomes of the prediction.

    Args:
        prompt: text, or token ids, one sequence or several of one length. BOS is put before texts where the
            tokenizer has one (see `text_tokens`); ids are taken as they are.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or by head `q`, `k`, `v` (the
            key/value heads, where there are fewer), `z`, `pattern` or `attn_scores` (by position `dest`).
        source: what is put there: `"zero"` (for `attn_scores`: minus infinity, which knocks edges out; of `z`
            it takes `b_V` away from a raw model only, as processing moves that into `b_O`),
            `Earlier(shift)`, `Corrupted(tokens)`, `Mean(tokens)`, `Resampled(tokens, seed)`,
            `NextEmbedding()` (residual streams only), `Edges([(dest, src)])` (`pattern` or `attn_scores`:
            these edges alone are knocked out), or a function `(activation, layer) ->` the same shape,
            of each prompt's own activation `[pos, ...]`; of scores and patterns `[dest, head, src]`. It is
            called once for each prompt and layer.
        layers: None patches each layer.
        heads: `"each"` or some of them patches head by head; None patches all heads together.
        positions: `"each"` or some of them patches position by position; None patches all together. `"each"`
            leaves out those where the source has nothing: the first `shift` of `Earlier`, the last of
            `NextEmbedding`.
        weight: how much of the source is mixed in; 1 replaces.
        metric: `loss` (the next token's, nats), `log_prob` and `logit_diff` (of `targets`, less that of
            `against`), `kl`, KL(clean || patched) in nats, each a mean over `read`; or a function of logits
            `[read, d_vocab]` that gives one number.
        read: the positions whose predictions count, in increasing order; None is all for `loss` and `kl` that
            have a next token, and the last for the others.
        targets: for `log_prob` and `logit_diff`: one token (an id or a text), one for each prompt, or ids of
            the prompts' shape; None is the next token for `log_prob`.
        against: for `logit_diff`.
        direction: `noising` patches the run on `prompt` with the source; `denoising` patches the `Corrupted`
            run with what the run on `prompt` has. The metric is about `prompt`'s tokens in both.
        prepend_bos: for a text: None prepends BOS where the tokenizer has one.
        token_budget: positions that run together, with what they attend to counted in; None is 8192. It is
            halved when memory runs out.
        state: a `.safetensors` file to which finished cells are saved every half minute, when the sweep ends
            and when it is interrupted. If it is there, the sweep goes on where it stopped, with the same
            values to rounding. It is kept when the sweep is done. Of functions it knows the name only, so
            they must have one.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        The metric of each patched run, with the clean (and the corrupted) run's.

    Raises:
        ValueError: a site, layer, head or position that is not there, sequences of other lengths, a metric
            that does not give one number, a denoising without a corrupted run, a state that was begun with
            other arguments (what differs is named); before anything is patched.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; the article "How one can
    Interpret GPT2-Small".
    Cost: on HookedTransformer what lies behind each patch, in layers and positions; on a bridge what lies
    behind it in positions, through all layers. Three runs for each prompt, and what the source needs.
    """
    file = checkpoint_path(state)
    for what, function in (("source", source), ("metric", metric)):
        if file is not None and getattr(function, "__name__", "") == "<lambda>":
            raise ValueError(f"a state cannot tell one lambda from another: make the {what} by def")
    check_counts(token_budget=token_budget)
    asked = Asked.of(
        model,
        prompt,
        site=site,
        source=source,
        layers=layers,
        heads=heads,
        positions=positions,
        weight=weight,
        metric=metric,
        read=read,
        targets=targets,
        against=against,
        direction=direction,
        prepend_bos=prepend_bos,
    )
    tokens, grid, judge = asked.tokens, asked.grid, asked.judge
    done = _Done.begin(asked) if file is None or not file.exists() else _Done.load(file, asked)
    note = ""
    saved = time.monotonic()
    # the same for every prompt
    averages = (
        values_of(model, source, site, tokens[:1], 0, grid.layers) if isinstance(source, Mean) else None
    )
    bar = progress_bar(
        total=done.values.numel(),
        initial=done.count,
        desc=f"patch {site}",
        unit="run",
        progress=progress,
    )
    try:
        for index in range(len(tokens)):
            if bool(done.cells[index].all()):
                continue
            base, given = asked.runs(index)
            begun = start_sweeps(model, base, site, last_read=max(asked.read))
            finals = (
                begun.final if direction == "noising" else last_residual(model, tokens[index : index + 1])
            )
            judge.begin(index, finals)
            done.judged("clean", index, judge.of_run(finals), file)
            if asked.other is not None:
                others = begun.final if direction == "denoising" else last_residual(model, given)
                done.judged("corrupted", index, judge.of_run(others), file)
                finals = finals if direction == "noising" else others
            if begun.why and base.shape[1] > 1:
                note = f"patches were whole runs: {begun.why}"
            # what another analysis makes is made for the run that is patched
            given = base if isinstance(source, Made) else given
            replacement = averages or values_of(model, source, site, given, index, grid.layers)
            left = (~done.cells[index].view(-1)).nonzero()[:, 0]
            patches = grid.patches(site, replacement, weight, left)
            for part in sweep(
                model, base, patches, token_budget=token_budget, last_read=max(asked.read), begun=begun
            ):
                done.note(index, left[part.which], judge.of_rows(part.final, part.start, finals).cpu())
                bar.update(len(part.which))
                if file is not None and time.monotonic() - saved > SAVE_SECONDS:
                    done.save(file, asked)
                    saved = time.monotonic()
    finally:
        bar.close()
        if file is not None:
            done.save(file, asked)
    return PatchGridResult(
        **asked.fields(),
        values=done.values,
        clean=done.clean,
        corrupted=done.corrupted,
        note=note,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Done:
    """What is known of a grid so far."""

    values: Float[Tensor, "prompt *grid"]
    cells: Bool[Tensor, "prompt *grid"]
    """Whose values are there."""
    clean: Float[Tensor, " prompt"]
    corrupted: Float[Tensor, " prompt"]

    @classmethod
    def begin(cls, asked: Asked) -> _Done:
        shape = (len(asked.tokens), *asked.grid.shape)
        unknown = torch.full((len(asked.tokens),), torch.nan, dtype=torch.float32)
        return cls(
            torch.full(shape, torch.nan, dtype=torch.float32),
            torch.zeros(shape, dtype=torch.bool),
            unknown,
            unknown.clone(),
        )

    @classmethod
    def load(cls, file: Path, asked: Asked) -> _Done:
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**load_state(file, "sweep", "a sweep of patches", names, asked.fingerprint())[0])

    def save(self, file: Path, asked: Asked) -> None:
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        save_state(file, "sweep", tensors, asked.fingerprint(), step=self.count)

    def judged(self, run: str, index: int, value: float, file: Path | None) -> None:
        """Note what a run without a patch has; a state of other weights shows here."""
        known = float(getattr(self, run)[index])
        # float32, on another machine perhaps
        if known == known and abs(known - value) > 1e-3 * max(1.0, abs(known)):
            raise ValueError(
                f"the sweep in {file} was begun with a model whose {run} run has {known:.6g}, but here it "
                f"has {value:.6g}: these are other weights; delete the file to begin anew"
            )
        getattr(self, run)[index] = value

    @property
    def count(self) -> int:
        return int(self.cells.sum())

    def note(self, index: int, which: Int[Tensor, " row"], found: Float[Tensor, " row"]) -> None:
        self.values[index].view(-1)[which] = found
        # last, so that whatever interrupts finds no cell without its value
        self.cells[index].view(-1)[which] = True
