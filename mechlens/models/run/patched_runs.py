"""Many patched runs of one prompt, recomputing only what the patches can change.

A patch at layer l and position p cannot change an earlier layer or an earlier position. So each patched run
is a *row* that begins at its own layer with the activations of the clean run. It covers only the positions
from p on, which attend to the clean keys and values of earlier positions. Rows of many patches run together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.measures.memory import is_out_of_memory
from mechlens.models.protocol import LensModel, describe, engine_of
from mechlens.models.run.clean_run import CleanRun, bridge_cache, cache_entry
from mechlens.models.run.forward import StopForward, run, running
from mechlens.models.run.properties import alike, key_value_heads, rows_run_alike
from mechlens.models.run.sites import ATTENTION, SITES, last_hook
from mechlens.models.run.user_hooks import user_hooks
from mechlens.progress import note_run

_AFTER_THE_BLOCK = ("mlp_out", "resid_post")
TOKEN_BUDGET = 8192
"""Positions that run through a block together; `row_charge` gives how many a row counts for."""
SATURATED_POSITIONS = 768
"""Positions at which a block runs at full speed. Smaller groups also take patches at later positions."""

Write = Callable[[Tensor, Int[Tensor, " row"], int, int], Tensor]
"""`(activation, which, start, layer) -> patched`: the activation of some rows at a layer, `[row, pos, ...]`
(scores and patterns `[row, head, dest, src]`); the index of each row's patch; and the position at which the
axis `pos` (`dest`) begins. The activation may be modified in place."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """Patches, each with a run of its own."""

    site: str
    """One of `SITES`."""
    layer: Int[Tensor, " patch"]
    """The layer, or the first of several."""
    first: Int[Tensor, " patch"]
    """The first position that a patch can change."""
    write: Write
    later: Collection[int] = ()
    """Later layers at which every patch writes again."""

    def __len__(self) -> int:
        return len(self.layer)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some finished patched runs."""

    which: Int[Tensor, " row"]
    """The indices of their patches."""
    start: int
    """Before this position they equal the clean run."""
    final: Float[Tensor, "row suffix d_model"]
    """The final residual stream, from position `start` on."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """The clean activations that rows begin with, up to the last position that is read."""

    tokens: Int[Tensor, "1 pos"]
    resid_pre: Sequence[Float[Tensor, "1 pos d_model"]]
    """By layer, followed by the final stream."""
    base: Sequence[Float[Tensor, "1 pos d_model"]]
    """By layer: what `mlp_out` is added to. Empty if `mlp_out` is not patched."""
    mlp_out: Sequence[Float[Tensor, "1 pos d_model"]]
    past: Sequence[tuple[Tensor, Tensor]]
    """By layer: the whole prompt's keys and values, as the engine caches them."""

    @classmethod
    def of(cls, clean: CleanRun, site: str, end: int) -> _Start:
        layers = range(clean.model.cfg.n_layers)

        def all_of(name: str) -> list[Tensor]:
            return [clean.kept[SITES[name].format(layer)][:, :end] for layer in layers]

        base: list[Tensor] = []
        if site == "mlp_out":
            base = (
                all_of("resid_mid")
                if _is_sequential(clean.model)
                # parallel blocks add both outputs to their input, in this order
                else [a + b for a, b in zip(all_of("resid_pre"), all_of("attn_out"), strict=True)]
            )
        return cls(
            clean.tokens[:, :end],
            [*all_of("resid_pre"), clean.final[:, :end]],
            base,
            all_of("mlp_out") if base else [],
            clean.past,
        )

    @staticmethod
    def hooks(model: LensModel, site: str) -> list[str]:
        names = ["resid_pre"]
        if site == "mlp_out":
            names += ["mlp_out", "resid_mid" if _is_sequential(model) else "attn_out"]
        return [SITES[name].format(layer) for name in names for layer in range(model.cfg.n_layers)]


def _is_sequential(model: LensModel) -> bool:
    return SITES["resid_mid"].format(0) in model.hook_dict


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedRuns:
    """The clean run of one prompt, and patched runs that resume from it."""

    clean: CleanRun
    end: int
    """One past the last position that is read."""
    start: _Start | None
    """None if patched runs are whole runs."""
    why: str = ""
    """Why a run of this model on this prompt cannot be resumed."""
    together: bool = True
    """Whether runs of this prompt may share a batch."""

    @classmethod
    def of(
        cls,
        model: LensModel,
        tokens: Int[Tensor, "1 pos"],
        site: str,
        *,
        keep: Collection[str] = (),
        last_read: int | None = None,
    ) -> PatchedRuns:
        """Run the prompt clean, and test whether runs can be resumed from it.

        The test resumes a run in the middle of the prompt, in the first and the last layer, and compares it
        with the same part of the whole run. It uses these very tokens, because kinds of attention and of
        padding are too many to list. If the user has hooks, nothing is resumed: hooks may act at only one
        layer, site or position.

        Args:
            keep: names of the hooks whose activations the clean run keeps.
            last_read: the last position that is read; None reads all.

        Cost: one and a half forward passes; three if the user has hooks.
        """
        hooks, n_pos = user_hooks(model), tokens.shape[1]
        end = n_pos if last_read is None else last_read + 1
        if hooks or n_pos < 2:
            whole = CleanRun.of(model, tokens, keep)
            if not hooks:
                return cls(whole, end, None, "the prompt is a single token")
            together = rows_run_alike(model, tokens.repeat(2, 1))
            return cls(whole, end, None, f"your hook at {hooks[0]} acts on them", together)
        # a single token has no middle
        tried = max(end, 2)
        clean: CleanRun | None = None
        try:
            clean = CleanRun.of(model, tokens, [*_Start.hooks(model, site), *keep], with_past=True)
            start = _Start.of(clean, site, tried)
            why = _why_not_resumed(model, start)
        except (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError):
            why = _UNLIKE
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            why = _UNLIKE
        if why or clean is None:
            return cls(clean or CleanRun.of(model, tokens, keep), end, None, why)
        return cls(clean, end, start if end == tried else _Start.of(clean, site, end))

    def run(self, patches: Patches, *, token_budget: int | None = None) -> Iterator[Part]:
        """Run every patch on its own, many at a time.

        Args:
            token_budget: positions that run together, with `row_charge` for each row; None means
                `TOKEN_BUDGET`. It is halved when memory runs out.

        Yields:
            Every patch once, in no fixed order. A patch after the last position that is read changes nothing
            and has an empty `final`.

        Cost: on HookedTransformer, each row runs through the blocks from its own layer on; on a bridge,
        through all blocks, because a bridge's blocks cannot be called one by one.
        """
        budget = TOKEN_BUDGET if token_budget is None else token_budget
        model, start, end = self.clean.model, self.start, self.end
        if start is None:
            # without a cache, a shorter run need not equal the beginning of the whole one
            end = self.clean.tokens.shape[1]
        tokens = self.clean.tokens[:, :end]
        late = (patches.first >= end).nonzero()[:, 0]
        if len(late):
            yield Part(late, end, model.W_U.new_empty(len(late), 0, model.cfg.d_model))
        # one at a time if the rows of a batch are not treated alike
        budget = budget if self.together else 0
        waiting = list(_groups(model, patches, end, budget, whole=start is None))[::-1]
        while waiting:
            begin, which = waiting.pop()
            try:
                yield Part(which, begin, _rows(model, tokens, start, patches, which, begin))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(which) == 1:
                    raise
                half = len(which) // 2
                waiting += [(begin, which[half:]), (begin, which[:half])]


_UNLIKE = "this model cannot be resumed in the middle of such a prompt"


def _why_not_resumed(model: LensModel, start: _Start) -> str:
    """Empty if rows without changes, resumed in the first and the last layer, reproduce the clean run."""
    begin = start.tokens.shape[1] // 2
    nothing = Patches(
        "resid_pre",
        torch.tensor([0, model.cfg.n_layers - 1]),
        torch.tensor([begin] * 2),
        lambda activation, which, start, layer: activation,
    )
    found = _rows(model, start.tokens, start, nothing, torch.arange(2), begin)
    if not alike(found, start.resid_pre[-1][:, begin:].expand(2, -1, -1)):
        return _UNLIKE
    # a patch of mlp_out is added to the rest of the block
    for base, mlp_out, after in zip(start.base, start.mlp_out, start.resid_pre[1:], strict=False):
        if not alike(base + mlp_out, after):
            return "its blocks do not add mlp_out to the stream unchanged"
    return ""


def row_charge(model: LensModel, length: int, end: int) -> float:
    """How much of the token budget a row from position `end - length` on takes.

    This is its own positions, plus the memory of the keys, values and scores over all positions up to `end`,
    in units of what a block holds for one position. A bridge copies the keys and values of all layers at
    once.
    """
    cfg = model.cfg
    one = position_floats(model)
    keys_values = 2 * key_value_heads(model) * cfg.d_head
    if engine_of(model) != "HookedTransformer":
        keys_values *= cfg.n_layers
    return length + end * (keys_values + 2 * length * cfg.n_heads) / one


def position_floats(model: LensModel) -> int:
    """The approximate number of values a block holds for one position while it runs."""
    widest = getattr(model.cfg, "d_mlp", None) or model.cfg.d_model
    # the activation function copies the widest activation
    return 4 * int(widest)


def _groups(
    model: LensModel, patches: Patches, end: int, budget: int, *, whole: bool
) -> Iterator[tuple[int, Int[Tensor, " row"]]]:
    """Yield groups of patches that run together, with the position at which their rows begin."""
    early = (patches.first < end).nonzero()[:, 0].tolist()
    order = sorted(early, key=lambda i: (int(patches.first[i]), int(patches.layer[i])))
    group: list[int] = []
    start = 0
    for index in order:
        first = 0 if whole else int(patches.first[index])
        length = end - start
        # close a group when it is full, or large enough and the position changes
        if group and (
            (first != start and len(group) * length >= SATURATED_POSITIONS)
            or (len(group) + 1) * row_charge(model, length, end) > budget
        ):
            yield start, torch.tensor(group)
            group = []
        if not group:
            start = first
        group.append(index)
    if group:
        yield start, torch.tensor(group)


def patterns_count(model: LensModel) -> bool:
    """Whether changes that a hook makes to scores and patterns reach the rest of the model.

    A bridge of GPT-Neo shows them to hooks, but continues with its own.
    """
    return engine_of(model) == "HookedTransformer" or describe(model).architecture != "GPTNeoForCausalLM"


def check_site(model: LensModel, site: str) -> None:
    """Raise an error for a site that this model does not have, or where a patch would have no effect."""
    if not isinstance(site, str) or site not in SITES:
        raise ArgumentError("site", f"one of {', '.join(SITES)}", site)
    if site == "mlp_out" and getattr(model.cfg, "attn_only", False):
        raise ValueError("this model has no MLPs, so there is no mlp_out to patch")
    if SITES[site].format(0) not in model.hook_dict:
        raise ValueError(f"this model has no {site}: its attention and MLP read the same stream")
    if site in ATTENTION and not patterns_count(model):
        raise ValueError(
            f"a TransformerBridge of GPT-Neo ignores patches of {site}: patch z or v, or use "
            f"HookedTransformer"
        )
    if site == "resid_mid" and engine_of(model) == "TransformerBridge" and user_hooks(model):
        raise ValueError(
            "a TransformerBridge has no hook for the part of resid_mid that bypasses the MLP, so the patch "
            f"is added after the block, where your hook at {user_hooks(model)[0]} might see it: remove the "
            "hook, or patch attn_out"
        )


# -- rows ------------------------------------------------------------------------------------------


def _rows(
    model: LensModel,
    tokens: Int[Tensor, "1 pos"],
    start: _Start | None,
    patches: Patches,
    which: Int[Tensor, " row"],
    begin: int,
) -> Float[Tensor, "row suffix d_model"]:
    """The final streams of the rows of some patches, from position `begin` on."""
    if start is None:
        return _whole_rows(model, tokens, patches, which, 0, {})[:, begin:]
    if engine_of(model) == "HookedTransformer":
        return _growing_rows(model, start, patches, which, begin)
    past = bridge_cache()
    for layer, (keys, values) in enumerate(start.past):
        rows = (len(which), -1, -1, -1)
        past.update(keys[:, :, :begin].expand(rows), values[:, :, :begin].expand(rows), layer)
    return _whole_rows(model, tokens[:, begin:], patches, which, begin, {"past_key_values": past})


def _growing_rows(
    model: LensModel, start: _Start, patches: Patches, which: Int[Tensor, " row"], begin: int
) -> Float[Tensor, "row suffix d_model"]:
    """One pass through the blocks with a growing batch: each row joins at the layer of its patch."""
    site, layers, after = patches.site, patches.layer[which], patches.site in _AFTER_THE_BLOCK
    x = start.resid_pre[0].new_empty(0, start.tokens.shape[1] - begin, model.cfg.d_model)
    note_run(model, len(which), x.shape[1])
    # for each row of x, its place in `which`
    order = torch.empty(0, dtype=torch.long)

    def patched(activation: Tensor, hook: Any, layer: int, old: int) -> Tensor:
        """Patch all rows but the first `old`, which were patched in an earlier layer."""
        written = patches.write(activation[old:].clone(), which[order[old:]], begin, layer)
        return torch.cat([activation[:old], written.to(activation.dtype)]) if old else written

    for layer in range(int(layers.min()), model.cfg.n_layers):
        places = (layers == layer).nonzero()[:, 0]
        old = 0 if layer in patches.later else len(order)
        if len(places) and not after:
            fresh = start.resid_pre[layer][:, begin:].expand(len(places), -1, -1)
            x, order = torch.cat([x, fresh]), torch.cat([order, places])
        hooks = []
        if old < len(order) and site == "resid_pre":
            x = patched(x, None, layer, old)
        elif old < len(order) and site != "resid_post":
            hooks.append((SITES[site].format(layer), partial(patched, layer=layer, old=old)))
        if len(order):
            keys, values = (each[:, :begin].expand(len(order), -1, -1, -1) for each in start.past[layer])
            with running(model, hooks):
                x = model.blocks[layer](x, past_kv_cache_entry=cache_entry(keys, values))
        if old < len(order) and site == "resid_post":
            x = patched(x, None, layer, old)
        if len(places) and after:
            stream = start.resid_pre[layer + 1] if site == "resid_post" else start.mlp_out[layer]
            fresh = stream[:, begin:].expand(len(places), -1, -1).clone()
            fresh = patches.write(fresh, which[places], begin, layer)
            if site == "mlp_out":
                fresh = start.base[layer][:, begin:] + fresh
            x, order = torch.cat([x, fresh]), torch.cat([order, places])
    # back into the order of `which`
    final = torch.empty_like(x)
    final[order.to(x.device)] = x
    return final


def _whole_rows(
    model: LensModel,
    tokens: Int[Tensor, "1 suffix"],
    patches: Patches,
    which: Int[Tensor, " row"],
    begin: int,
    options: Mapping[str, Any],
) -> Float[Tensor, "row suffix d_model"]:
    """Run all rows through all layers: after a cache on a bridge, or from position 0 on any model."""
    layers = patches.layer[which]
    kept: list[Tensor] = []
    hooks: list[tuple[str, Callable[..., Any]]] = []
    # a bridge's hook there is only the MLP's input: the stream that bypasses the MLP has no hook
    past_the_mlp = patches.site == "resid_mid" and engine_of(model) == "TransformerBridge"

    def patch(activation: Tensor, hook: Any, layer: int, places: Tensor, changes: list[Tensor]) -> Tensor:
        there = places.to(activation.device)
        patched = activation.clone()
        written = patches.write(activation[there], which[places], begin, layer)
        patched[there] = written.to(activation.dtype)
        if past_the_mlp:
            changes.append(patched - activation)
        return patched

    def add(activation: Tensor, hook: Any, changes: list[Tensor]) -> Tensor:
        return activation + changes.pop()

    for layer in sorted({*layers.tolist(), *patches.later}):
        places = (layers == layer).nonzero()[:, 0] if layer not in patches.later else torch.arange(len(which))
        changes: list[Tensor] = []
        here = partial(patch, layer=layer, places=places, changes=changes)
        hooks.append((SITES[patches.site].format(layer), here))
        if past_the_mlp:
            hooks.append((SITES["resid_post"].format(layer), partial(add, changes=changes)))

    def keep_and_end(activation: Tensor, hook: Any) -> None:
        kept.append(activation)
        raise StopForward

    hooks.append((last_hook(model), keep_and_end))
    with running(model, hooks):
        run(model, tokens.expand(len(which), -1), **options)
    return kept.pop()
