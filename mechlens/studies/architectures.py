"""Which models load, how near their predictions are to Hugging Face's, and which analyses they have.

Nothing is taken from a list: each model is loaded as users load it and run beside the original, and each
analysis is called. A refusal is a verdict, and its message the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.attribution import direct_logit_attribution
from mechlens.analyses.circuits.qk import QK
from mechlens.errors import ModelLoadError
from mechlens.models.load import local, transformer_lens_format
from mechlens.models.load.engines import choose_backends
from mechlens.models.load.hub import BUNDLED, PACKAGED
from mechlens.models.load.loading import converted, load_model, locate, parse_device
from mechlens.models.load.tiny_architectures import (
    ARCHITECTURES,
    CONTEXT,
    Architecture,
    limits,
    random_model,
    write_model,
    write_tokenizer,
)
from mechlens.models.protocol import Engine, LensModel, engine_of
from mechlens.models.run.patched_runs import PatchedRuns
from mechlens.models.weights.access import norm_scale
from mechlens.models.weights.rotary import is_rotary
from mechlens.progress import progress_bar
from mechlens.results import Circuit

TOLERANCE = 1e-4
"""Nats of a log-probability: rounding in float32 gives some 1e-5, a window or a rotation that is left out
tenths and more."""
_SHARE = 1e-3
"""How far what an analysis makes may be from Hugging Face's own numbers, as a share of their size."""
_LENGTH, _BEYOND = 48, 64
"""Tokens where nothing begins within the context; and at most how many behind where something does."""
_LONGEST = 256
"""Tokens of texts whose patterns are all kept."""
_TARGET, _AGAINST = 7, 11
"""Any two tokens."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Whether a model has an analysis."""

    verdict: str
    """`yes`, `no` or in which way."""
    reason: str = ""
    """Why not, or why not wholly."""


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was found out about one model."""

    name: str
    engine: str | None
    """The one that `load_model` takes, `HookedTransformer` or `TransformerBridge`; None where none does."""
    version: str
    """Of TransformerLens."""
    limits: dict[str, int]
    """As `mechlens.models.load.tiny_architectures.limits`."""
    lengths: tuple[int, ...]
    """Tokens in the comparisons: up to all limits and, where there are some, beyond them."""
    differences: tuple[float | None, ...]
    """By length: the largest difference in log-probability from Hugging Face's float32 model, in nats, over
    positions and tokens, of processed and unprocessed weights. None where the engine's context is shorter."""
    refused: dict[str, str]
    """Why not, by what is not had: an engine, or the `unprocessed` weights on the one that has it."""
    qk: Analysis
    """`QK` and what is made of it, held against the original's attention: `yes`, `at a distance` or `no`."""
    resuming: Analysis
    """Where a patched run can begin: `at any layer and position`, `at any position`, or `no`."""
    attribution: Analysis
    """`direct_logit_attribution`, whose parts are held against the original's logits: `yes` or `no`."""

    @property
    def right(self) -> bool:
        """Whether the model loads, and predicts what the original does at all lengths."""
        return bool(self.differences) and all(each is None or each <= TOLERANCE for each in self.differences)

    @property
    def reasons(self) -> tuple[str, ...]:
        """All of them, each with what it is about."""
        analyses = {"QK circuits": self.qk, "resuming": self.resuming, "attribution": self.attribution}
        return (
            *(why if why.startswith(what) else f"{what}: {why}" for what, why in self.refused.items()),
            *(f"{what}: {each.reason}" for what, each in analyses.items() if each.reason),
        )


def verify_architectures(
    *,
    like: str = "",
    device: str | torch.device | None = None,
    cache: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Verified]:
    """Verify a tiny random model of each architecture, the bundled model, and those of packages that are
    installed.

    Args:
        like: only those with this in their names.
        device: as for `verify_model`.
        cache: as for `verify_model`.
        seed: of the random weights and tokens.

    Raises:
        ValueError: no architecture and no real model has that in its name.

    Cost: half a second for each architecture, and what the real models take to load, twice.
    """
    tiny = [each for each in ARCHITECTURES if like.lower() in each.name.lower()]
    names = [BUNDLED, *(name for name, each in PACKAGED.items() if each.find() is not None)]
    names = [name for name in names if like.lower() in name.lower()]
    if not tiny and not names:
        have = ", ".join(each.name for each in ARCHITECTURES)
        raise ValueError(f"no architecture has {like!r} in its name; there are: {have}")
    found = []
    with progress_bar(desc="models", progress=progress, unit="model", total=len(tiny) + len(names)) as bar:
        for each in tiny:
            found.append(verify_architecture(each, device=device, seed=seed))
            bar.update()
        for name in names:
            found.append(verify_model(name, device=device, cache=cache, seed=seed))
            bar.update()
    return found


def verify_architecture(
    architecture: Architecture,
    *,
    device: str | torch.device | None = None,
    seed: int = 0,
    both: bool = True,
) -> Verified:
    """Verify a tiny random model of one architecture; see `verify_model`."""
    with tempfile.TemporaryDirectory(prefix="mechlens-") as folder:
        directory = Path(folder) / "model"
        write_model(directory, random_model(architecture.config(), seed=seed))
        write_tokenizer(directory)
        found = verify_model(directory, device=device, seed=seed, both=both)
    return dataclasses.replace(found, name=architecture.name)


def verify_model(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    cache: bool = True,
    seed: int = 0,
    both: bool = True,
) -> Verified:
    """Load a model as users do, hold its predictions against Hugging Face's own, and call each analysis.

    Args:
        name_or_path: as for `load_model`.
        revision: as for `load_model`.
        device: as for `load_model`; the original runs on the CPU.
        cache: as for `load_model`.
        seed: of the random tokens.
        both: compare the unprocessed weights, too.

    Raises:
        ModelLoadError: there is no such model, or its files are damaged. A model that no engine takes is no
            error, but a result.
        ValueError: a model in TransformerLens's own format, of which Hugging Face has no version.

    Cost: memory for the original beside the model, and a run of both on tokens beyond the longest window or
    original context, with eager attention.
    """
    given: dict[str, Any] = {"revision": revision, "device": parse_device(device), "cache": cache}
    with converted(locate(name_or_path, revision=revision), cache=cache) as place:
        config = local.read_config(place.directory)
        if transformer_lens_format.is_own(config):
            raise ValueError(
                f"{place.name} is in TransformerLens's own format, so there is no Hugging Face model to "
                "compare it with: give another one"
            )
        original = _original(place.directory, config)
    begins = limits(original.config)
    n_ctx = getattr(original.config, "max_position_embeddings", None) or CONTEXT
    lengths = _lengths(begins, n_ctx)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, original.config.vocab_size, (1, max(lengths)), generator=draw)
    with torch.no_grad():
        expected = [original(tokens[:, :length]).logits[0].log_softmax(-1) for length in lengths]
    backend, analyses, differences, refused = "auto", None, [], {}
    # as `load_model` does, which takes the first engine that has the model; then the other state on it
    for state in ("processed", "unprocessed") if both else ("processed",):
        for tried in choose_backends(backend):
            try:
                with warnings.catch_warnings():
                    # that patching sweeps take longer
                    warnings.simplefilter("ignore", UserWarning)
                    model = load_model(name_or_path, backend=tried, processing=state == "processed", **given)
            except ModelLoadError as error:
                refused[ENGINES[tried] if state == "processed" else state] = _without_advice(error)
                continue
            backend = tried
            differences.append([_difference(model, tokens, each, n_ctx) for each in expected])
            analyses = analyses or _analyses(model, original, tokens, begins, lengths)
            del model
            break
    if backend == "auto":
        refused.pop("unprocessed", None)
    no = Analysis("no")
    qk, resuming, attribution = analyses or (no, no, no)
    return Verified(
        name=place.name,
        engine=ENGINES.get(backend),
        version=version("transformer-lens"),
        limits=begins,
        lengths=lengths,
        differences=tuple(
            max((one for one in each if one is not None), default=None)
            for each in zip(*differences, strict=True)
        ),
        refused=refused,
        qk=qk,
        resuming=resuming,
        attribution=attribution,
    )


ENGINES: dict[str, Engine] = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}


def _without_advice(error: Exception) -> str:
    """Why, without what else to try, which is what the verification does."""
    return re.split(": (?:use|try) |, which has more", local.first_line(error))[0]


def _original(directory: Path, config: dict[str, Any]) -> Any:
    """What transformers makes of a directory by itself. Its attention is computed step by step, because
    others leave soft-caps out, and show no patterns."""
    import transformers

    architecture = getattr(transformers, local.architecture_of(config, directory))
    local.weight_files(directory)
    with local.quiet_transformers():
        try:
            model = architecture.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
        except Exception as error:  # of any kind: every architecture and quantization has checks of its own
            raise ModelLoadError(
                f"transformers cannot read {directory}: {local.first_line(error)}"
            ) from error
    return model.eval()


def _lengths(begins: Mapping[str, int], n_ctx: int) -> tuple[int, ...]:
    """Before the first limit; and as far behind the last as the context goes, or past a context that is one.

    Not as long as a limit: after a longer text transformers reads one so long with the longer one's rotation.
    """
    if not begins:
        return (min(_LENGTH, n_ctx),)
    last = max(begins.values())
    beyond = last + min(last, _BEYOND)
    return min(_LENGTH, *(each - 1 for each in begins.values())), beyond if last >= n_ctx else min(
        beyond, n_ctx
    )


def _difference(model: LensModel, tokens: Int[Tensor, "1 pos"], expected: Tensor, n_ctx: int) -> float | None:
    """Of the log-probabilities of the beginning of some tokens."""
    if len(expected) > model.cfg.n_ctx < n_ctx:
        return None
    with torch.no_grad():
        logits = model(tokens[:, : len(expected)].to(model.cfg.device), return_type="logits")[0].cpu()
    return float((logits.float().log_softmax(-1) - expected).abs().max())


def _analyses(
    model: LensModel,
    original: Any,
    tokens: Int[Tensor, "1 pos"],
    begins: Mapping[str, int],
    lengths: tuple[int, ...],
) -> tuple[Analysis, Analysis, Analysis]:
    return (
        _qk(model, original, begins, lengths),
        _resuming(model, tokens, begins, lengths),
        _attribution(model, original, tokens[:, : max(each for each in lengths if each <= model.cfg.n_ctx)]),
    )


def _resuming(
    model: LensModel, tokens: Int[Tensor, "1 pos"], begins: Mapping[str, int], lengths: tuple[int, ...]
) -> Analysis:
    whole = "at any layer and position" if ENGINES["hooked"] == engine_of(model) else "at any position"
    within = [length for length in lengths if length <= model.cfg.n_ctx]
    why = [PatchedRuns.of(model, tokens[:, :length], "resid_pre") for length in within]
    failed = {length: each.why for length, each in zip(within, why, strict=True) if each.start is None}
    if not failed:
        return Analysis(whole)
    if len(failed) == len(within):
        return Analysis("no", failed[within[0]])
    return Analysis(f"{whole}, not of {max(failed)} tokens", failed[max(failed)])


def _attribution(model: LensModel, original: Any, tokens: Int[Tensor, "1 pos"]) -> Analysis:
    """Whether parts sum to the original's logit; to a difference of two where these are only told apart by
    that in a processed model."""
    cap = getattr(original.config, "final_logit_softcapping", None)
    try:
        found = direct_logit_attribution(model, tokens, _TARGET, against=None if cap else _AGAINST)
    except ValueError as error:
        return Analysis("no", str(error))
    with torch.no_grad():
        logits = original(tokens).logits[0]
    made, expected = found.contributions.sum(0)[0], logits[:, _TARGET]
    if cap:
        made = cap * torch.tanh(made / cap)
    else:
        expected = expected - logits[:, _AGAINST]
    off = float((made - expected).abs().max() / expected.abs().max())
    if off > _SHARE:
        return Analysis("no", f"the parts miss the original's logits by {off:.1%} of their size")
    return Analysis("yes")


def _qk(model: LensModel, original: Any, begins: Mapping[str, int], lengths: tuple[int, ...]) -> Analysis:
    """Whether the circuit gives the scores of the original's own attention.

    Of the last head of the first layer, whose input is known, and of tokens one position apart. Patterns give
    differences of scores; in a difference of such differences, between two keys and between two queries,
    biases and the scores of tokens with themselves are gone, and what is left is the circuit's, up to the
    attention scale.
    """
    head, distance = (0, model.cfg.n_heads - 1), 1 if is_rotary(model) else None
    try:
        circuit = QK(model, head, relative_position=distance)
    except ValueError as error:
        return Analysis("no", str(error))
    whole = "yes" if distance is None else "at a distance"
    off = _misfit(model, circuit, original, 2)
    # a comparison with nan is false
    if not off <= _SHARE:
        return Analysis("no", f"the circuit misses the original's scores by {off:.1%} of their size")
    if not begins:
        return Analysis(whole)
    if lengths[-1] > _LONGEST:
        return Analysis(whole, f"compared in texts of 2 tokens, not in texts of {lengths[-1]}")
    if not _misfit(model, circuit, original, lengths[-1]) <= _SHARE:
        return Analysis(
            f"{whole}, in texts up to {min(begins.values())} tokens",
            "how far this model turns queries and keys depends on how long the text is",
        )
    return Analysis(whole)


def _misfit(model: LensModel, circuit: Circuit, original: Any, length: int) -> float:
    """How far a circuit's scores are from a multiple of those of the last two tokens of some texts."""
    ((layer, head),) = circuit.heads
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(0, original.config.vocab_size, (2, 2, 32, length), generator=draw)
    # [query, key, draw, position]; what stands before is not seen in a first layer
    texts[:, :, :, -1] = texts[:, :1, :, -1]
    texts[:, :, :, -2] = texts[:1, :, :, -2]
    with torch.no_grad(), _uncapped(original):
        ran = original(texts.flatten(0, 2), output_attentions=True, output_hidden_states=True)
    streams = ran.hidden_states[layer].unflatten(0, texts.shape[:3])
    scores = ran.attentions[layer][:, head, -1, -2:].log().unflatten(0, texts.shape[:3])
    measured = (scores[..., 0] - scores[..., 1]).diff(dim=1).diff(dim=0).flatten()
    normed = streams / norm_scale(model, streams)[..., None]
    query, key = normed[1, 0, :, -1] - normed[0, 0, :, -1], normed[0, 1, :, -2] - normed[0, 0, :, -2]
    A, B = circuit.matrix.A.cpu(), circuit.matrix.B.cpu()
    expected = ((query @ A) * (key @ B.T)).sum(-1)
    scale = (expected @ measured).clamp(min=0) / (expected @ expected)
    return float((measured - scale * expected).norm() / measured.norm())


@contextlib.contextmanager
def _uncapped(original: Any) -> Iterator[None]:
    """Without soft-caps of the scores, which no circuit has in it."""
    name = "attn_logit_softcapping"
    capped = [(each, getattr(each, name)) for each in original.modules() if getattr(each, name, None)]
    try:
        for module, _ in capped:
            setattr(module, name, None)
        yield
    finally:
        for module, cap in capped:
            setattr(module, name, cap)
