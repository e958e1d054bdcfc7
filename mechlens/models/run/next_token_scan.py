"""A scan of the vocabulary: every token is run alone, or as the next token after one prefix."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.memory import in_parts, is_out_of_memory
from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.clean_run import CleanRun, bridge_cache, cache_entry
from mechlens.models.run.forward import check_tokens, serve, watch
from mechlens.models.run.patched_runs import TOKEN_BUDGET, row_charge
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.user_hooks import alone, user_hooks
from mechlens.models.weights.access import output_bias, output_weights, per_query_head

MOST_ROWS = 1024
"""Rows in one run; few enough for the MLP's activations to stay in the processor's cache."""

Readers = Mapping[str, Callable[[Float[Tensor, "row width"]], None]]
"""By hook name, the functions that read the activations at the candidates' position."""


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Runs of candidate tokens after a prefix; made by `candidates`."""

    model: LensModel
    prefix: Int[Tensor, " prefix"]
    serve: Callable[[Int[Tensor, "row 1"], Mapping[str, Callable[[Tensor], None]]], None]
    """Runs candidates and passes activations, whose last position is the candidate's, to readers."""
    rows: int
    """The default number of candidates that run together."""

    def watch(self, ids: Int[Tensor, " row"], readers: Readers) -> None:
        """Run each id after the prefix and pass the activations at its position to readers; see
        `forward.watch`.

        Cost: the blocks up to the deepest activation that is read, for one token per id.
        """

        def last(activation: Tensor, read: Callable[[Tensor], None]) -> None:
            read(activation[:, -1])

        self.serve(ids[:, None], {name: functools.partial(last, read=read) for name, read in readers.items()})

    def vocabulary(
        self,
        readers: Callable[[Int[Tensor, " row"]], Readers],
        *,
        begin: int = 0,
        batch_size: int | None = None,
    ) -> Iterator[Int[Tensor, " row"]]:
        """Run every token in the vocabulary, many at a time; their number is halved if memory runs out.

        Args:
            readers: makes the readers for some ids. It is called again if these ids have to be rerun, so use
                what readers record only after the ids are yielded.
            begin: the first id.
            batch_size: ids that run together; None means `rows`.

        Yields:
            The finished ids.
        """
        every = torch.arange(begin, self.model.cfg.d_vocab)
        rows = self.rows if batch_size is None else batch_size
        for ids, _ in in_parts(lambda ids: self.watch(ids, readers(ids)), every, rows):
            yield ids


def candidates(model: LensModel, prefix: Int[Tensor, " prefix"], names: Sequence[str]) -> Candidates:
    """Prepare runs of tokens after a prefix that do not recompute what all candidates share.

    After a prefix, each token attends to the prefix's cached keys and values. Without a prefix, a token can
    attend only to itself, so attention is one linear map, the sum over heads of `W_V @ W_O`. Either shortcut
    is compared with whole runs of a few tokens. If they differ, or the user has hooks on the model, whole
    runs are used.

    Args:
        prefix: token ids, possibly none.
        names: the hook points that will be read.

    Raises:
        ValueError: ids out of range, no room for another token in the context, an unknown hook point, or a
            user hook that treats the rows of a batch differently.

    Cost: one run of the prefix, and runs of a few tokens after it.
    """
    n_prefix, n_ctx = len(prefix), model.cfg.n_ctx
    if n_prefix >= n_ctx:
        raise ValueError(
            f"a prefix of {n_prefix} tokens leaves no room for another one in the model's context of "
            f"{n_ctx}: shorten it"
        )
    if n_prefix:
        check_tokens(model, prefix[None])
    rows = max(1, min(MOST_ROWS, int(TOKEN_BUDGET / row_charge(model, 1, n_prefix + 1))))
    whole = Candidates(
        model, prefix, functools.partial(_whole, model, prefix), max(1, rows // (n_prefix + 1))
    )
    tried = torch.linspace(0, model.cfg.d_vocab - 1, 4, dtype=torch.double).long().unique()
    if user_hooks(model):
        check_rows_alike(model, _after(prefix, tried[:, None]))
        return whole
    expected = _all(whole, tried, names)
    try:
        short = Candidates(model, prefix, _cached(model, prefix) if n_prefix else _alone(model), rows)
        found = _all(short, tried, names)
    except (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError):
        return whole
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return whole
    return short if all(map(_same, found, expected)) else whole


def _all(of: Candidates, ids: Int[Tensor, " row"], names: Sequence[str]) -> list[Tensor]:
    def some(ids: Int[Tensor, " row"]) -> list[Tensor]:
        kept: dict[str, Tensor] = {}
        of.watch(ids, {name: functools.partial(kept.__setitem__, name) for name in names})
        return [kept[name] for name in names]

    # fewer at a time if memory runs out, as it may after a long prefix
    parts = [made for _, made in in_parts(some, ids, len(ids))]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def _same(found: Float[Tensor, "row width"], expected: Float[Tensor, "row width"]) -> bool:
    # other shapes sum in a different order
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    # by column, since in trained models a few columns are much larger than all others
    scale = expected.float().abs().amax(0)
    off = (found.float() - expected.float()).abs().amax(0)
    return bool((off <= tolerance * (scale + 0.01 * scale.max())).all())


def _after(prefix: Int[Tensor, " prefix"], ids: Int[Tensor, "row 1"]) -> Int[Tensor, "row pos"]:
    return torch.cat([prefix.expand(len(ids), -1), ids], dim=1)


def _whole(
    model: LensModel,
    prefix: Int[Tensor, " prefix"],
    ids: Int[Tensor, "row 1"],
    readers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    """Run prefix and candidate together, which works for any model."""
    watch(model, _after(prefix, ids), readers)


# -- after a prefix --------------------------------------------------------------------------------


def _cached(
    model: LensModel, prefix: Int[Tensor, " prefix"]
) -> Callable[[Int[Tensor, "row 1"], Mapping[str, Callable[[Tensor], None]]], None]:
    """Run only the candidates, which attend to the prefix's cached keys and values."""
    past = CleanRun.of(model, prefix[None], with_past=True).past

    def on_hooked(ids: Tensor, readers: Mapping[str, Callable[[Tensor], None]]) -> None:
        # embedded with the prefix, so that candidates get their learned positions
        embedded: list[Tensor] = []
        watch(model, _after(prefix, ids), {"blocks.0.hook_resid_pre": embedded.append})
        some = (len(ids), -1, -1, -1)
        entries = [cache_entry(keys.expand(some), values.expand(some)) for keys, values in past]
        serve(model, embedded.pop()[:, -1:], readers, start_at_layer=0, past_kv_cache=entries)

    def on_bridge(ids: Tensor, readers: Mapping[str, Callable[[Tensor], None]]) -> None:
        cache, some = bridge_cache(), (len(ids), -1, -1, -1)
        for layer, (keys, values) in enumerate(past):
            cache.update(keys.expand(some), values.expand(some), layer)
        serve(model, ids, readers, past_key_values=cache)

    return on_hooked if engine_of(model) == "HookedTransformer" else on_bridge


# -- no prefix -------------------------------------------------------------------------------------


def _alone(
    model: LensModel,
) -> Callable[[Int[Tensor, "row 1"], Mapping[str, Callable[[Tensor], None]]], None]:
    """Run tokens without a prefix, which needs no queries and keys."""
    # computed once, when a layer is reached
    map_of = functools.cache(functools.partial(_attention_of_one, model))

    def watch_alone(ids: Tensor, readers: Mapping[str, Callable[[Tensor], None]]) -> None:
        with _linear_attention(model, map_of):
            watch(model, ids, readers)

    return watch_alone


def _attention_of_one(
    model: LensModel, layer: int
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]:
    """Attention to a single token as a matrix and a bias."""
    attention, n_heads = model.blocks[layer].attn, model.cfg.n_heads
    W_O = output_weights(model, layer)
    # a bridge has values once per group of heads
    W_V = per_query_head(
        rearrange(attention.W_V.detach().float(), "kv d_model d_head -> d_model kv d_head"), n_heads
    )
    matrix = einsum(W_V, W_O, "read head d_head, head d_head write -> read write")
    bias = output_bias(model, layer)
    b_V = getattr(attention, "b_V", None)
    if b_V is not None:
        values = per_query_head(b_V.detach().float().reshape(-1, W_O.shape[1]), n_heads)
        bias = bias + einsum(values, W_O, "head d_head, head d_head write -> write")
    return matrix.to(model.W_E.dtype), bias.to(model.W_E.dtype)


@contextlib.contextmanager
def _linear_attention(model: LensModel, map_of: Callable[[int], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Replace each attention layer by its matrix and bias; norms, MLPs and hooks stay the engine's."""

    def on_hooked(layer: int, attention: Any, value_input: Tensor, **others: Any) -> Tensor:
        matrix, bias = map_of(layer)
        return value_input @ matrix + bias

    def on_bridge(
        layer: int, attention: Any, hidden_states: Tensor, *others: Any, **named: Any
    ) -> tuple[Tensor, None]:
        matrix, bias = map_of(layer)
        return attention.hook_out(hidden_states @ matrix + bias), None

    forward = on_hooked if engine_of(model) == "HookedTransformer" else on_bridge
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(model))
        for layer, block in enumerate(model.blocks):
            # in its own dict, since a bridge passes attributes on to the wrapped module
            own = vars(block.attn)
            stack.callback(_put_back, own, own.get("forward"))
            own["forward"] = functools.partial(forward, layer, block.attn)
        yield


def _put_back(own: dict[str, Any], forward: Any) -> None:
    if forward is None:
        own.pop("forward", None)
    else:
        own["forward"] = forward
