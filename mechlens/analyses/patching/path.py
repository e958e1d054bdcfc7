"""One head's output, patched only as another component sees it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.patching.batched_runs import Hooks, PatchedRuns
from mechlens.analyses.patching.grid import patch_grid
from mechlens.analyses.patching.metrics import Metric, Targets
from mechlens.analyses.patching.sources import (
    Made,
    Mean,
    Source,
    check_source,
    named,
    other_tokens,
    values_of,
)
from mechlens.arguments import check_model, chosen
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import check_tokens
from mechlens.models.run.patched_runs import SITES
from mechlens.models.run.properties import check_adds_up, key_value_head, key_value_heads
from mechlens.results import PatchGridResult, head_label, parse_head
from mechlens.text.prompts import Prompt, prompt_tokens

Read = Callable[[Tensor], Tensor]
"""What is kept of an activation."""
EVERYWHERE = slice(None)


def patch_path(
    model: LensModel,
    prompt: Prompt,
    *,
    sender: str | tuple[int, int],
    receiver: str | tuple[int, int] | int,
    input: str,
    source: Source,
    positions: Sequence[int] | None = None,
    metric: Metric = "loss",
    read: Sequence[int] | None = None,
    targets: Targets | None = None,
    against: Targets | None = None,
    direction: str = "noising",
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
) -> PatchGridResult:
    """Patch one head's output only as one other component sees it: the direct path between the two.

    The change of what the sender writes is added to the stream that the receiver's `q`, `k` or `v`, or the
    MLP, is made from, through the block's own norm; whatever lies between, and the receiver's other
    inputs, read the clean run. What the receiver then does passes on to all that follows.

    Args:
        sender: (layer, head) or `L5H5`, whose `z` is patched.
        receiver: a head, or for an MLP its layer.
        input: `q`, `k`, `v`, or `mlp`. Where several query heads share a key/value head, `k` and `v`
            patch that of all of them, and the receiver is the key/value head's number.
        source: what `z` becomes; see `patch_grid`.
        positions: where the sender is patched; None is everywhere.

    The other arguments are those of `patch_grid`.

    Returns:
        A grid of one cell, the receiver's; `source` names the path.

    Raises:
        ValueError: a receiver that does not read what the sender writes, an input of the wrong kind, or what
            `patch_grid` refuses.

    Source: Wang et al. 2022, "Interpretability in the Wild", arXiv:2211.00593; Goldowsky-Dill et al. 2023,
    "Localizing Model Behavior with Path Patching", arXiv:2304.05969.
    Cost: as one cell of `patch_grid`, and that of `PathRuns`.
    """
    path = HeadPath.of(model, sender, receiver, input)
    tokens, other = _prompts(model, prompt, source, direction, prepend_bos)
    at = _at(positions, tokens)

    # when the first prompt is patched, which is after all arguments were checked
    @functools.cache
    def seen() -> Tensor:
        base, given = (tokens, other) if direction == "noising" else (other, tokens)
        assert base is not None
        return PathRuns.of(model, base, source, [path], given=given, at=at).seen(path)

    def make(own: Int[Tensor, "1 pos"], index: int) -> dict[int, Tensor]:
        return {path.layer: seen()[index]}

    return patch_grid(
        model,
        tokens,
        site=path.site,
        source=Made(f"{named(source)} {head_label(*path.sender)} as {path.name} sees it", make, of=source),
        layers=[path.layer],
        heads=None if path.head is None else [path.head],
        positions=None,
        metric=metric,
        read=read,
        targets=targets,
        against=against,
        direction=direction,
        prepend_bos=prepend_bos,
        token_budget=token_budget,
    )


def path_attention(
    model: LensModel,
    prompt: Prompt,
    *,
    sender: str | tuple[int, int],
    receiver: str | tuple[int, int],
    input: str | None,
    source: Source,
    positions: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "prompt dest src"]:
    """The attention of one head when another one's output is patched: only as it sees it, or altogether.

    Args:
        receiver: the head whose attention is wanted; its own number also where several share a key.
        input: `q` or `k`, through which alone it sees the patch; None patches the sender altogether.

    The other arguments are those of `patch_path`.

    Returns:
        Attention after softmax, in float32 on the CPU.

    Raises:
        ValueError: as `patch_path`.

    Cost: that of `PathRuns`, and a run from the receiver's layer up to its pattern.
    """
    check_model(model)
    if input not in ("q", "k", None):
        raise ValueError(f"attention is made from q and k, so input must be one of them, but is {input!r}")
    layer, head = parse_head(receiver)
    (head,) = chosen("head", [head], model.cfg.n_heads)
    read = key_value_head(model, head) if input == "k" else head
    path = HeadPath.of(model, sender, (layer, read), input or "q")
    tokens, other = _prompts(model, prompt, source, "noising", prepend_bos)
    at = _at(positions, tokens)
    runs = PathRuns.of(model, tokens, source, [path], given=other, at=at)
    pattern = SITES["pattern"].format(path.layer)
    wanted = {pattern: lambda activation: activation[:, head].float().cpu()}
    found = runs.altogether(path.sender, wanted) if input is None else runs.through(path, wanted)
    return found[pattern]


@dataclasses.dataclass(frozen=True)
class HeadPath:
    """From one head to what another component reads."""

    sender: tuple[int, int]
    layer: int
    head: int | None
    """Of the receiver; None for an MLP."""
    readers: tuple[tuple[int, int], ...]
    """The query heads that read what the receiver reads: one, or those that share a key and a value."""
    site: str
    enter: str
    """Where what the sender writes comes in."""

    @classmethod
    def of(
        cls,
        model: LensModel,
        sender: str | tuple[int, int],
        receiver: str | tuple[int, int] | int,
        input: str,
    ) -> HeadPath:
        check_model(model)
        if input not in ("q", "k", "v", "mlp"):
            raise ValueError(f"input must be q, k, v or mlp, but is {input!r}")
        if isinstance(receiver, int) != (input == "mlp"):
            raise ValueError(
                "the input mlp has a layer for its receiver, and q, k and v a (layer, head), but receiver "
                f"is {receiver!r} and input {input!r}"
            )
        sender = parse_head(sender)
        (from_layer,) = chosen("layer", [sender[0]], model.cfg.n_layers)
        (from_head,) = chosen("head", [sender[1]], model.cfg.n_heads)
        to, head = (receiver, None) if isinstance(receiver, int) else parse_head(receiver)
        (layer,) = chosen("layer", [to], model.cfg.n_layers)
        # blocks that are not parallel have their MLP read what their own heads wrote
        within = input == "mlp" and SITES["resid_mid"].format(0) in model.hook_dict
        if layer < from_layer + (not within):
            raise ValueError(
                f"the {input} of layer {layer} does not read what {head_label(from_layer, from_head)} "
                "writes: the receiver must come behind the sender"
                + (
                    ", and this model's attention and MLP read the same stream"
                    if input == "mlp" and layer == from_layer
                    else ""
                )
            )
        shared = (
            model.cfg.n_heads // key_value_heads(model) if input in ("k", "v") and head is not None else 1
        )
        first = shared * (head or 0)
        return cls(
            (from_layer, from_head),
            layer,
            head,
            tuple((layer, each) for each in range(first, first + shared)),
            "mlp_out" if input == "mlp" else input,
            SITES["resid_mid" if within else "resid_pre"].format(layer),
        )

    @property
    def name(self) -> str:
        if self.head is None:
            return f"layer {self.layer}'s MLP"
        return f"the {self.site} of {' and '.join(head_label(*each) for each in self.readers)}"


@dataclasses.dataclass(frozen=True, eq=False)
class PathRuns:
    """Runs of some prompts in which heads are patched: as one other component sees them, or altogether."""

    runs: PatchedRuns
    there: Mapping[int, Float[Tensor, "prompt pos head d_head"]]
    """What `z` becomes, by the sender's layer."""
    at: slice | list[int]
    """The positions where senders are patched."""
    changes: dict[tuple[int, int], Float[Tensor, "prompt pos d_model"]] = dataclasses.field(
        default_factory=dict
    )
    """What a sender then adds to the stream, less what it adds without; those that are known. By the block's
    own output, so that a norm behind the heads, where there is one, has its say."""

    @classmethod
    def of(
        cls,
        model: LensModel,
        tokens: Int[Tensor, "prompt pos"],
        source: Source,
        paths: Sequence[HeadPath],
        *,
        given: Int[Tensor, "prompt pos"] | None = None,
        at: slice | list[int] = EVERYWHERE,
        keep: Collection[str] = (),
    ) -> PathRuns:
        """Run the prompts clean, and take from the source what the senders' `z` becomes.

        Args:
            paths: of all heads that will be patched.
            given: the runs that values are taken from; None is the prompts themselves.
            at: the positions where senders are patched.
            keep: names of other hooks whose activations are wanted of the clean run.

        Cost: that of `PatchedRuns`, and what the source needs. A path then is a run up to what the sender's
        layer writes, one up to what the receiver reads, and one from there on; each of them begins at its
        layer, or is a whole one.
        """
        senders = sorted({path.sender[0] for path in paths})
        z, out = ({layer: SITES[site].format(layer) for layer in senders} for site in ("z", "attn_out"))
        layers = {*senders, *(path.layer for path in paths)}
        runs = PatchedRuns.of(model, tokens, layers=layers, keep={*z.values(), *out.values(), *keep})
        own = {layer: runs.clean[name] for layer, name in z.items()} if given is None else None
        there = _values(model, source, tokens if given is None else given, list(z), own)
        return cls(runs, there, at)

    def altogether(self, sender: tuple[int, int], wanted: Mapping[str, Read]) -> dict[str, Tensor]:
        """Activations when the sender is patched for all to see; see `PatchedRuns.read`."""
        layer, head = sender
        out = SITES["attn_out"].format(layer)
        hooks = _put(SITES["z"].format(layer), (EVERYWHERE, self.at, head), self.there[layer])
        found = self.runs.read(layer, hooks, {**wanted, out: lambda activation: activation})
        self.changes[sender] = found.pop(out) - self.runs.clean[out]
        return found

    def seen(self, path: HeadPath) -> Float[Tensor, "prompt pos *rest"]:
        """The receiver's layer at the path's site when it reads what the sender then writes."""
        if path.sender not in self.changes:
            self.altogether(path.sender, {})
        change = self.changes[path.sender]

        def hooks(rows: slice) -> Hooks:
            return [(path.enter, lambda activation, hook: activation + change[rows])]

        site = SITES[path.site].format(path.layer)
        return self.runs.read(path.layer, hooks, {site: lambda activation: activation})[site]

    def through(
        self, path: HeadPath, wanted: Mapping[str, Read], *, alone: int | None = None
    ) -> dict[str, Tensor]:
        """Activations when the receiver alone sees the sender patched; see `PatchedRuns.read`.

        Args:
            alone: of a key that several query heads share: the one head that attends by the patched key,
                while the others attend as in the clean run. None is all of them.
        """
        head = () if path.head is None else (path.head,)
        hooks = _put(SITES[path.site].format(path.layer), (EVERYWHERE, EVERYWHERE, *head), self.seen(path))
        if alone is not None:
            pattern = SITES["pattern"].format(path.layer)
            patched = self.runs.read(path.layer, hooks, {pattern: lambda activation: activation})[pattern]
            hooks = _put(pattern, (EVERYWHERE, alone), patched)
        return self.runs.read(path.layer, hooks, wanted)


def _put(name: str, place: tuple[Any, ...], there: Float[Tensor, "prompt *rest"]) -> Callable[[slice], Hooks]:
    """Hooks that put values at a place of an activation."""

    def hooks(rows: slice) -> Hooks:
        def put(activation: Tensor, hook: Any) -> Tensor:
            changed = activation.clone()
            changed[place] = there[rows][place].to(changed)
            return changed

        return [(name, put)]

    return hooks


def _values(
    model: LensModel,
    source: Source,
    given: Int[Tensor, "prompt pos"],
    layers: Sequence[int],
    own: Mapping[int, Float[Tensor, "prompt pos head d_head"]] | None,
) -> dict[int, Float[Tensor, "prompt pos head d_head"]]:
    """What `z` becomes by layer, in every prompt; a mean is taken once.

    Args:
        own: the `z` of the runs that values are taken from, where it is known.
    """
    by_prompt: list[dict[int, Tensor]] = []
    for index in range(len(given)):
        if by_prompt and isinstance(source, Mean):
            by_prompt.append(by_prompt[0])
            continue
        one = slice(index, index + 1)
        kept = None if own is None else {layer: z[one] for layer, z in own.items()}
        values = values_of(model, source, "z", given[one], index, layers, kept=kept)
        by_prompt.append({layer: values(layer) for layer in layers})
    return {layer: torch.stack([each[layer] for each in by_prompt]) for layer in layers}


def _prompts(
    model: LensModel,
    prompt: Prompt,
    source: Source,
    direction: str,
    prepend_bos: bool | None,
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"] | None]:
    """The prompts and, where there are any, the corrupted ones."""
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    check_tokens(model, tokens)
    check_source(model, source, "z", tokens, direction, prepend_bos)
    check_adds_up(model, tokens)
    return tokens, other_tokens(model, source, tokens, prepend_bos)


def _at(positions: Sequence[int] | None, tokens: Int[Tensor, "prompt pos"]) -> slice | list[int]:
    return EVERYWHERE if positions is None else list(chosen("position", positions, tokens.shape[1]))
