"""Many patched runs of one prompt, at the cost of what the patches can change.

A patch at layer l and position p cannot change an earlier layer or an earlier position. So each patched run
is a *row* that begins at its own layer with what the clean run had there, and covers the positions from p on
only, against the clean keys and values of those before. Rows of many patches run together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.memory import is_out_of_memory
from mechlens.models.protocol import LensModel, describe, engine_of
from mechlens.models.run.forward import Enough, run, running, watch
from mechlens.models.run.properties import alike, key_value_heads, last_residual, rows_run_alike
from mechlens.models.run.user_hooks import user_hooks

SITES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "attn_scores": "blocks.{}.attn.hook_attn_scores",
    "pattern": "blocks.{}.attn.hook_pattern",
}
_AFTER_THE_BLOCK = ("mlp_out", "resid_post")
TOKEN_BUDGET = 8192
"""Positions that run through a block together; see `row_charge` for what a row counts."""
ENOUGH = 768
"""Positions with which a block runs at its full speed; fewer run together with those of the next position."""

Write = Callable[[Tensor, Int[Tensor, " row"], int], Tensor]
"""`(activation, which, start) -> patched`: the activation of some rows `[row, pos, ...]` (scores and patterns
`[row, head, dest, src]`), all at one layer; which of the patches each row is; and the position that the axis
`pos` (`dest`) begins with. The activation may be written to."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """What is to be patched, each patch in a run of its own."""

    site: str
    """One of `SITES`."""
    layer: Int[Tensor, " patch"]
    first: Int[Tensor, " patch"]
    """The first position that a patch can change."""
    write: Write

    def __len__(self) -> int:
        return len(self.layer)


@dataclasses.dataclass(frozen=True, eq=False)
class Clean:
    """The clean run of one prompt, as far as patched runs need it."""

    tokens: Int[Tensor, "1 pos"]
    resid_pre: Sequence[Float[Tensor, "1 pos d_model"]]
    """By layer, and last what the logits are read from."""
    base: Sequence[Float[Tensor, "1 pos d_model"]]
    """By layer: what `mlp_out` is added to. Empty where nobody patches that."""
    mlp_out: Sequence[Float[Tensor, "1 pos d_model"]]
    past: Sequence[tuple[Tensor, Tensor]]
    """By layer: keys and values as the engine caches them."""

    def until(self, end: int) -> Clean:
        """The same without the positions from `end` on; what is in `past` is read only up to a row's own."""
        streams = ("resid_pre", "base", "mlp_out")
        return dataclasses.replace(
            self,
            tokens=self.tokens[:, :end],
            **{name: [each[:, :end] for each in getattr(self, name)] for name in streams},
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some patched runs that are done."""

    which: Int[Tensor, " row"]
    """Which of the patches they are."""
    start: int
    """Before this position they are as the clean run."""
    final: Float[Tensor, "row suffix d_model"]
    """What the logits are read from, from `start` on."""


def sweep(
    model: LensModel,
    tokens: Int[Tensor, "1 pos"],
    patches: Patches,
    *,
    token_budget: int | None = None,
    last_read: int | None = None,
    begun: Start | None = None,
) -> Iterator[Part]:
    """Run every patch on its own, many at a time, and hand out what comes of them.

    Args:
        tokens: one prompt.
        token_budget: positions that run together, a row counting `row_charge`; None takes `TOKEN_BUDGET`.
            It is halved when memory runs out.
        last_read: the last position that anybody reads; what comes behind it is not run where runs can be
            resumed. None reads all.
        begun: of the same tokens and last position, where somebody has called `start_sweeps` already. Without
            a clean run in it rows are whole runs.

    Yields:
        Every patch once, in no fixed order. One that lies behind the last reader changes nothing and has an
        empty `final`.

    Cost: on HookedTransformer each row runs through the blocks from its own layer on. On a bridge it runs
    through all of them, for a bridge's blocks cannot be called one by one.
    """
    budget = TOKEN_BUDGET if token_budget is None else token_budget
    begun = start_sweeps(model, tokens, patches.site, last_read=last_read) if begun is None else begun
    clean, end = begun.clean, tokens.shape[1] if begun.clean is None else begun.clean.tokens.shape[1]
    tokens = tokens[:, :end]
    late = (patches.first >= end).nonzero()[:, 0]
    if len(late):
        yield Part(late, end, model.W_U.new_empty(len(late), 0, model.cfg.d_model))
    rows_of = _plain if clean is None else _grow if engine_of(model) == "HookedTransformer" else _suffix
    # one at a time where rows of a batch are not all treated alike
    waiting = list(_groups(model, patches, end, budget if begun.together else 0, whole=clean is None))[::-1]
    while waiting:
        start, which = waiting.pop()
        try:
            yield Part(which, start, rows_of(model, tokens, clean, patches, which, start))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(which) == 1:
                raise
            half = len(which) // 2
            waiting += [(start, which[half:]), (start, which[:half])]


def row_charge(model: LensModel, length: int, end: int) -> float:
    """What a row from position `end - length` on takes of the token budget.

    Its own positions, and the memory of the keys, values and scores over all positions up to `end` in terms
    of what a block holds for one position. A bridge copies the keys and values of all layers at once.
    """
    cfg = model.cfg
    one = position_floats(model)
    keys_values = 2 * key_value_heads(model) * cfg.d_head
    if engine_of(model) != "HookedTransformer":
        keys_values *= cfg.n_layers
    return length + end * (keys_values + 2 * length * cfg.n_heads) / one


def position_floats(model: LensModel) -> int:
    """About how many numbers a block holds for one position while it runs."""
    widest = getattr(model.cfg, "d_mlp", None) or model.cfg.d_model
    # the widest activation goes through a function that makes copies
    return 4 * int(widest)


def _groups(
    model: LensModel, patches: Patches, end: int, budget: int, *, whole: bool
) -> Iterator[tuple[int, Int[Tensor, " row"]]]:
    """Patches that run together, with the position at which their rows begin."""
    early = (patches.first < end).nonzero()[:, 0].tolist()
    order = sorted(early, key=lambda i: (int(patches.first[i]), int(patches.layer[i])))
    group: list[int] = []
    start = 0
    for index in order:
        first = 0 if whole else int(patches.first[index])
        length = end - start
        # a group is closed when it is large enough at a change of position, or full
        if group and (
            (first != start and len(group) * length >= ENOUGH)
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
    """Whether what a hook makes of scores and patterns reaches the rest of the model.

    A bridge of GPT-Neo shows them, and goes on with its own.
    """
    return engine_of(model) == "HookedTransformer" or describe(model).architecture != "GPTNeoForCausalLM"


# -- the clean run ---------------------------------------------------------------------------------


def clean_run(model: LensModel, tokens: Int[Tensor, "1 pos"], *, with_mlp: bool = False) -> Clean:
    """Run a prompt once and keep what patched runs begin with."""
    n_layers = model.cfg.n_layers
    kept: dict[str, Tensor] = {}
    names = [SITES["resid_pre"].format(layer) for layer in range(n_layers)]
    names.append(SITES["resid_post"].format(n_layers - 1))
    sequential = SITES["resid_mid"].format(0) in model.hook_dict
    if with_mlp:
        names += [SITES["mlp_out"].format(layer) for layer in range(n_layers)]
        names += [SITES["resid_mid" if sequential else "attn_out"].format(layer) for layer in range(n_layers)]
    hooks = [(name, partial(_keep, kept=kept, name=name)) for name in names]
    begin: list[Tensor] = []
    watch(model, tokens, {names[0]: begin.append})
    past: list[tuple[Tensor, Tensor]] = []
    with running(model, hooks):
        if engine_of(model) == "HookedTransformer":
            # block by block: a whole run with a cache wants a tokenizer to make a mask of
            x = begin.pop()
            for block in model.blocks:
                entry = _empty_entry(model)
                x = block(x, past_kv_cache_entry=entry)
                past.append((entry.past_keys, entry.past_values))
        else:
            cache = bridge_cache()
            run(model, tokens, past_key_values=cache)
            past = [(layer.keys, layer.values) for layer in cache.layers]
        base = []
        if with_mlp:
            for layer in range(n_layers):
                if sequential:
                    base.append(kept[SITES["resid_mid"].format(layer)])
                else:
                    # parallel blocks add both to what came in, in this order
                    base.append(
                        kept[SITES["resid_pre"].format(layer)] + kept[SITES["attn_out"].format(layer)]
                    )
    return Clean(
        tokens=tokens,
        resid_pre=[kept[name] for name in names[: n_layers + 1]],
        base=base,
        mlp_out=[kept[SITES["mlp_out"].format(layer)] for layer in range(n_layers)] if with_mlp else [],
        past=past,
    )


def _keep(activation: Tensor, hook: Any, kept: dict[str, Tensor], name: str) -> None:
    kept[name] = activation


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What patched runs of one prompt begin with."""

    final: Float[Tensor, "1 pos d_model"]
    """What the clean run's logits are read from."""
    clean: Clean | None
    """Up to the last position that is read; None where patched runs are whole ones."""
    why: str = ""
    """Why a run of this model on this prompt cannot be resumed."""
    together: bool = True
    """Whether runs of this prompt may share a batch."""


def start_sweeps(
    model: LensModel, tokens: Int[Tensor, "1 pos"], site: str, *, last_read: int | None = None
) -> Start:
    """Run the prompt clean, and see whether a run resumed in its middle, and in the middle of the model, and
    cut behind what is read, is that part of the whole run.

    That is tried, on these very tokens, against the model's own run: kinds of attention, and what an engine
    makes of padding, are too many to list. Where the user has hooks on the model, it is not even tried: they
    may act at one layer, site or position only.

    Cost: two forward passes and a half; three for a model with hooks.
    """
    final = last_residual(model, tokens)
    hooks = user_hooks(model)
    if hooks:
        together = rows_run_alike(model, tokens.repeat(2, 1))
        return Start(final, None, f"your hook at {hooks[0]} acts on them", together)
    end = tokens.shape[1] if last_read is None else last_read + 1
    unlike = "this model cannot be resumed in the middle of such a prompt"
    if tokens.shape[1] < 2:
        return Start(final, None, "the prompt is a single token")
    # of a single token there is no middle
    tried = max(end, 2)
    try:
        clean = clean_run(model, tokens, with_mlp=site == "mlp_out").until(tried)
        nothing = Patches(
            "resid_pre",
            torch.tensor([0, model.cfg.n_layers - 1]),
            torch.tensor([tried // 2] * 2),
            lambda activation, which, start: activation,
        )
        rows_of = _grow if engine_of(model) == "HookedTransformer" else _suffix
        found = rows_of(model, tokens[:, :tried], clean, nothing, torch.arange(2), tried // 2)
    except (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError):
        return Start(final, None, unlike)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return Start(final, None, unlike)
    if not alike(found, final[:, tried // 2 : tried].expand(2, -1, -1)):
        return Start(final, None, unlike)
    # the rest of a block is added to what somebody patches into mlp_out
    for base, mlp_out, after in zip(clean.base, clean.mlp_out, clean.resid_pre[1:], strict=False):
        if not alike(base + mlp_out, after):
            return Start(final, None, "its blocks do not add mlp_out to the stream as it is")
    return Start(final, clean.until(end))


# -- HookedTransformer -----------------------------------------------------------------------------


def _grow(
    model: LensModel,
    tokens: Int[Tensor, "1 pos"],
    clean: Clean | None,
    patches: Patches,
    which: Int[Tensor, " row"],
    start: int,
) -> Float[Tensor, "row suffix d_model"]:
    """One sweep through the layers with a batch that grows: each row joins where its patch lies."""
    assert clean is not None
    n_layers = model.cfg.n_layers
    layers = patches.layer[which]
    after = patches.site in _AFTER_THE_BLOCK
    running_rows: list[Tensor] = []
    x: Tensor | None = None

    def join(fresh: Tensor) -> Tensor:
        return fresh if x is None else torch.cat([x, fresh])

    for layer in range(int(layers.min()), n_layers):
        places = (layers == layer).nonzero()[:, 0]
        new = which[places]
        old = 0 if x is None else len(x)
        hooks = []
        if len(new) and not after:
            fresh = clean.resid_pre[layer][:, start:].expand(len(new), -1, -1).clone()
            if patches.site == "resid_pre":
                fresh = patches.write(fresh, new, start)
            else:
                patch = partial(_patch_behind, old=old, new=new, start=start, write=patches.write)
                hooks.append((SITES[patches.site].format(layer), patch))
            x = join(fresh)
            running_rows.append(places)
        if x is not None:
            keys, values = clean.past[layer]
            entry = _entry(
                keys[:, :start].expand(len(x), -1, -1, -1), values[:, :start].expand(len(x), -1, -1, -1)
            )
            with running(model, hooks):
                x = model.blocks[layer](x, past_kv_cache_entry=entry)
        if len(new) and after:
            if patches.site == "resid_post":
                fresh = clean.resid_pre[layer + 1][:, start:].expand(len(new), -1, -1).clone()
                fresh = patches.write(fresh, new, start)
            else:
                fresh = clean.mlp_out[layer][:, start:].expand(len(new), -1, -1).clone()
                fresh = clean.base[layer][:, start:] + patches.write(fresh, new, start)
            x = join(fresh)
            running_rows.append(places)
    assert x is not None
    # back in the order of `which`
    final = torch.empty_like(x)
    final[torch.cat(running_rows).to(x.device)] = x
    return final


def _patch_behind(
    activation: Tensor, hook: Any, old: int, new: Int[Tensor, " row"], start: int, write: Write
) -> Tensor:
    """Patch the rows behind the first `old` ones, which have their own patch in an earlier layer."""
    patched = write(activation[old:].clone(), new, start)
    return torch.cat([activation[:old], patched.to(activation.dtype)])


# -- bridge ----------------------------------------------------------------------------------------


def _suffix(
    model: LensModel,
    tokens: Int[Tensor, "1 pos"],
    clean: Clean | None,
    patches: Patches,
    which: Int[Tensor, " row"],
    start: int,
) -> Float[Tensor, "row suffix d_model"]:
    """All rows through all layers, from `start` on, behind the clean keys and values of the prefix."""
    assert clean is not None
    past = bridge_cache()
    for layer, (keys, values) in enumerate(clean.past):
        rows = (len(which), -1, -1, -1)
        past.update(keys[:, :, :start].expand(rows), values[:, :, :start].expand(rows), layer)
    return _whole_rows(model, tokens[:, start:], patches, which, start, {"past_key_values": past})


def _plain(
    model: LensModel,
    tokens: Int[Tensor, "1 pos"],
    clean: Clean | None,
    patches: Patches,
    which: Int[Tensor, " row"],
    start: int,
) -> Float[Tensor, "row suffix d_model"]:
    """Whole rows from layer 0: what any model can do."""
    return _whole_rows(model, tokens, patches, which, 0, {})[:, start:]


def _whole_rows(
    model: LensModel,
    tokens: Int[Tensor, "1 suffix"],
    patches: Patches,
    which: Int[Tensor, " row"],
    start: int,
    options: Mapping[str, Any],
) -> Float[Tensor, "row suffix d_model"]:
    layers = patches.layer[which]
    kept: list[Tensor] = []
    hooks: list[tuple[str, Callable[..., Any]]] = []
    # a bridge's hook there is the MLP's input alone: what the stream carries past it has no hook of its own
    past_the_mlp = patches.site == "resid_mid" and engine_of(model) == "TransformerBridge"
    for layer in layers.unique().tolist():
        places = (layers == layer).nonzero()[:, 0]
        changes: list[Tensor] | None = [] if past_the_mlp else None
        patch = partial(
            _patch_some,
            places=places,
            new=which[places],
            start=start,
            write=patches.write,
            changes=changes,
        )
        hooks.append((SITES[patches.site].format(layer), patch))
        if changes is not None:
            hooks.append((SITES["resid_post"].format(layer), partial(_add, changes=changes)))
    final = SITES["resid_post"].format(model.cfg.n_layers - 1)

    def keep_and_end(activation: Tensor, hook: Any) -> None:
        kept.append(activation)
        raise Enough

    hooks.append((final, keep_and_end))
    with running(model, hooks):
        run(model, tokens.expand(len(which), -1), **options)
    return kept.pop()


def _patch_some(
    activation: Tensor,
    hook: Any,
    places: Int[Tensor, " row"],
    new: Int[Tensor, " row"],
    start: int,
    write: Write,
    changes: list[Tensor] | None,
) -> Tensor:
    places = places.to(activation.device)
    patched = activation.clone()
    patched[places] = write(activation[places], new, start).to(activation.dtype)
    if changes is not None:
        changes.append(patched - activation)
    return patched


def _add(activation: Tensor, hook: Any, changes: list[Tensor]) -> Tensor:
    return activation + changes.pop()


# -- the engines' caches ---------------------------------------------------------------------------


def bridge_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _empty_entry(model: LensModel) -> Any:
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

    return TransformerLensKeyValueCacheEntry.init_cache_entry(model.cfg, model.cfg.device, 1)


def _entry(keys: Tensor, values: Tensor) -> Any:
    from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

    return TransformerLensKeyValueCacheEntry(keys, values, frozen=True)
