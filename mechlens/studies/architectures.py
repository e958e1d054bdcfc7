"""Which models load, how close their predictions are to Hugging Face's, and which analyses support them.

Each model is loaded as users load it and compared with the original, and each analysis is called. If an
analysis raises an error, that is its verdict, and the message is the reason.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

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
from mechlens.models.protocol import Engine, LensModel
from mechlens.progress import progress_bar
from mechlens.results.columns import Column
from mechlens.show.section import Section, Table
from mechlens.studies.supported_analyses import Analysis, supported_analyses

TOLERANCE = 1e-4
"""Largest difference in log-probability that rounding may cause, in nats. Float32 gives about 1e-5; a sliding
window or a rotation that the engine ignores gives 0.1 and more."""
_LENGTH, _BEYOND = 48, 64
"""Maximum tokens of the text within all limits, and maximum tokens beyond the last limit."""


@dataclasses.dataclass(frozen=True)
class Verified:
    """What was measured on one model."""

    name: str
    engine: str | None
    """The engine that `load_model` takes, `HookedTransformer` or `TransformerBridge`; None if it does not
    load."""
    version: str
    """Of TransformerLens."""
    limits: dict[str, int]
    """As returned by `mechlens.models.load.tiny_architectures.limits`."""
    lengths: tuple[int, ...]
    """Tokens in the comparisons: within all limits and, where there are limits, beyond them."""
    differences: tuple[float | None, ...]
    """By length: the largest difference in log-probability from Hugging Face's float32 model, in nats, over
    positions, tokens, and processed and unprocessed weights. None where the engine's context is shorter."""
    refused: dict[str, str]
    """Reasons, by what does not load: an engine, or the `unprocessed` weights on the engine that loads the
    model."""
    qk: Analysis
    """`QK` compared with the original's attention: `yes`, `at a distance` or `no`."""
    resuming: Analysis
    """Where a patched run can begin: `at any layer and position`, `at any position`, or `no`."""
    attribution: Analysis
    """`direct_logit_attribution`, the sum of its parts compared with the original's logits: `yes` or `no`."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("model"),
        Column("engine", help="The engine that `load_model` takes."),
        Column(
            "limit",
            help="A sliding window or a kind of rope scaling, and the text length beyond which it acts.",
        ),
        Column("within", unit="nats", help="Largest difference in log-probability from Hugging Face."),
        Column("beyond", unit="nats", help="The same for texts longer than the limits."),
        Column("qk", "QK circuits"),
        Column("resuming", help="Where a patched run can begin."),
        Column("attribution"),
    )

    @property
    def row(self) -> tuple[str, ...]:
        """The texts of `columns`."""
        within, beyond = (*map(_nats, self.differences), "", "")[:2]
        return (
            self.name,
            self.engine or "does not load",
            ", ".join(f"{what} {tokens}" for what, tokens in self.limits.items()),
            within,
            beyond,
            self.qk.verdict,
            self.resuming.verdict,
            self.attribution.verdict,
        )

    @property
    def right(self) -> bool:
        """Whether the model loads and its predictions match those of the original at all lengths."""
        return bool(self.differences) and all(each is None or each <= TOLERANCE for each in self.differences)

    @property
    def reasons(self) -> tuple[str, ...]:
        """All reasons, each with its subject."""
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
    """Verify a tiny random model of each architecture, the bundled model, and the models of installed
    packages.

    Args:
        like: only those whose name contains this.
        device: as for `verify_model`.
        cache: as for `verify_model`.
        seed: of the random weights and tokens.

    Raises:
        ValueError: no architecture and no real model has such a name.

    Cost: half a second for each architecture, and loading the real models twice.
    """
    tiny = [each for each in ARCHITECTURES if like.lower() in each.name.lower()]
    names = [BUNDLED, *(name for name, each in PACKAGED.items() if each.find() is not None)]
    names = [name for name in names if like.lower() in name.lower()]
    if not tiny and not names:
        have = ", ".join(each.name for each in ARCHITECTURES)
        raise ValueError(f"no architecture has {like!r} in its name: choose among {have}")
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
    architecture: Architecture, *, device: str | torch.device | None = None, seed: int = 0, both: bool = True
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
    """Load a model as users do, compare its predictions with Hugging Face's, and call each analysis.

    Args:
        name_or_path: as for `load_model`.
        revision: as for `load_model`.
        device: as for `load_model`; the original runs on the CPU.
        cache: as for `load_model`.
        seed: of the random tokens.
        both: compare the unprocessed weights, too.

    Raises:
        ModelLoadError: the model does not exist, or its files are damaged. A model that no engine supports is
            a result, not an error.
        ValueError: a model in TransformerLens's own format, which has no Hugging Face original.

    Cost: memory for the original and the model, and a run of both, with eager attention, on texts beyond the
    longest window or original context.
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
    # like `load_model`, take the first engine that supports the model; then load the other state on it
    for state in ("processed", "unprocessed") if both else ("processed",):
        for tried in choose_backends(backend):
            try:
                with warnings.catch_warnings():
                    # warnings about slower patching sweeps
                    warnings.simplefilter("ignore", UserWarning)
                    model = load_model(name_or_path, backend=tried, processing=state == "processed", **given)
            except ModelLoadError as error:
                refused[ENGINES[tried] if state == "processed" else state] = _without_advice(error)
                continue
            backend = tried
            differences.append([_difference(model, tokens, each, n_ctx) for each in expected])
            analyses = analyses or supported_analyses(model, original, tokens, begins, lengths)
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


LIBRARIES = ("transformer-lens", "transformers", "torch")


def architectures_section(found: Sequence[Verified]) -> Section:
    """A table of the models, and a table of the reasons."""
    lens, transformers, pytorch = (version(name).split("+")[0] for name in LIBRARIES)
    title = f"TransformerLens {lens}, with transformers {transformers} and torch {pytorch}"
    reasons = [(each.name, reason) for each in found for reason in each.reasons]
    tables = [Table(Verified.columns, [each.row for each in found], "Models")]
    if reasons:
        tables.append(Table(("model", "reason"), reasons, "What does not load or is not supported"))
    return Section(title, "", tables)


def architectures_json(found: Sequence[Verified]) -> dict[str, Any]:
    """The versions and all measurements, for other programs."""
    versions = {name.replace("-", "_"): version(name) for name in LIBRARIES}
    return {**versions, "models": [dataclasses.asdict(each) | {"right": each.right} for each in found]}


def _nats(difference: float | None) -> str:
    """A difference, such as `3e-6`, or `0.12, wrong`."""
    if difference is None:
        return "past its context"
    # nan is wrong, too
    return f"{difference:.0e}".replace("e-0", "e-") if difference <= TOLERANCE else f"{difference:.2g}, wrong"


ENGINES: dict[str, Engine] = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}


def _without_advice(error: Exception) -> str:
    """The reason, without advice on other engines, which the verification tries anyway."""
    return re.split(": (?:use|try) |, which has more", local.first_line(error))[0]


def _original(directory: Path, config: dict[str, Any]) -> Any:
    """The model as transformers loads it, with eager attention: other implementations ignore soft-caps and
    return no patterns."""
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
    """One length within the first limit and one beyond the last: at most the context, unless the context is
    itself a limit.

    Neither equals a limit: after a longer text, transformers reads a text of exactly that length with the
    rotation of the longer one.
    """
    if not begins:
        return (min(_LENGTH, n_ctx),)
    last = max(begins.values())
    beyond = last + min(last, _BEYOND)
    return min(_LENGTH, *(each - 1 for each in begins.values())), beyond if last >= n_ctx else min(
        beyond, n_ctx
    )


def _difference(model: LensModel, tokens: Int[Tensor, "1 pos"], expected: Tensor, n_ctx: int) -> float | None:
    """The largest difference of the log-probabilities on the first tokens."""
    if len(expected) > model.cfg.n_ctx < n_ctx:
        return None
    with torch.no_grad():
        logits = model(tokens[:, : len(expected)].to(model.cfg.device), return_type="logits")[0].cpu()
    return float((logits.float().log_softmax(-1) - expected).abs().max())
