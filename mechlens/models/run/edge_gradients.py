"""First-order effects of replacing every edge of a model, from backward passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.run.edge_runs import BYTES, READS, Reader, Written
from mechlens.models.run.gradients import gradients
from mechlens.models.run.graph import Graph
from mechlens.models.run.sites import SITES, last_hook
from mechlens.models.weights.access import before_norm, norm_scale, output_weights

Metric = Callable[..., Float[Tensor, " prompt"]]
"""`(the stream that the last logits are made from, prompts=which of them) -> metric`."""


@dataclasses.dataclass(frozen=True)
class Estimates:
    """What replacing edges and components does, to first order."""

    edges: Float[Tensor, "prompt sender receiver"]
    """nan for pairs that are no edges."""
    positions: Float[Tensor, "prompt sender pos"]
    """What replacing a component at one position does: the sum over positions is that over its edges."""


def edge_effects(
    model: LensModel, tokens: Int[Tensor, "prompt pos"], there: Written, metric: Metric, *, steps: int = 1
) -> Estimates:
    """Estimate for each edge how the metric changes when that edge alone carries what is written `there`.

    The estimate is the change of what the sender writes times the gradient by the receiver's input. Per
    component it is the sum over the edges that leave it.

    Args:
        steps: 1 takes the gradient in the run of the tokens. More average the gradients of runs whose
            embeddings lie between the tokens' own and those `there`, at the midpoints of equal steps.

    Cost: `steps` forward and backward passes, one more forward pass for several steps, and 2 d_model for each
    step, edge and position.
    """
    graph = Graph.of(model)
    width = tokens.shape[1] * model.cfg.d_model * 4
    # what is written, and the graph of the backward pass
    at_once = max(1, BYTES // (width * (len(graph.senders) + 24 * model.cfg.n_layers)))
    readers = [Reader.of(model, layer) for layer in range(model.cfg.n_layers)]
    found = []
    for start in range(0, len(tokens), at_once):
        rows = slice(start, start + at_once)
        number = partial(metric, prompts=rows)
        found.append(_effects(model, graph, tokens[rows], there.rows(rows), number, steps, readers))
    edges, positions = (torch.cat(each) for each in zip(*found, strict=True))
    return Estimates(edges, positions)


def _effects(
    model: LensModel,
    graph: Graph,
    tokens: Int[Tensor, "prompt pos"],
    there: Written,
    metric: Callable[[Tensor], Tensor],
    steps: int,
    readers: list[Reader],
) -> tuple[Float[Tensor, "prompt sender receiver"], Float[Tensor, "prompt sender pos"]]:
    names = [
        SITES[site].format(n) for site in ("resid_pre", *READS, "attn_out") for n in range(graph.n_layers)
    ]
    names = [*dict.fromkeys([*names, *Written.hooks(model), last_hook(model)])]
    own = Written.of(model, tokens) if steps > 1 else None
    changes: Tensor | None = None
    edges, positions = (torch.zeros((), dtype=torch.float32, device=model.W_U.device) for _ in range(2))
    for step in range(steps):
        begin = None
        if own is not None:
            share = (step + 0.5) / steps
            begin = (1 - share) * own.embed.float() + share * there.embed.float()
        _, kept, by = gradients(model, tokens, names, lambda final: metric(final[:, -1]).sum(), begin=begin)
        if changes is None:
            changes = _changes(model, graph, own or Written.kept(model, kept), there)
        with torch.no_grad():
            # one step at a time, so that memory does not grow with their number
            edges = edges + _contracted(model, graph, readers, changes, kept, by) / steps
            positions = positions + _by_position(graph, changes, by) / steps
    return edges.cpu().masked_fill(~graph.possible, torch.nan), positions.cpu()


def _changes(
    model: LensModel, graph: Graph, own: Written, there: Written
) -> Float[Tensor, "prompt sender pos_d"]:
    """What each component writes there, less what it writes here."""
    with torch.no_grad():
        rows = [(there.embed.float() - own.embed.float())[:, None]]
        for layer in range(graph.n_layers):
            change = there.z[layer].float() - own.z[layer].float()
            W_O = output_weights(model, layer)
            rows.append(einsum(change, W_O, "b pos head e, head e d -> b head pos d"))
            if graph.mlps:
                rows.append((there.mlp_out[layer].float() - own.mlp_out[layer].float())[:, None])
        return rearrange(torch.cat(rows, 1), "b sender pos d -> b sender (pos d)")


def _contracted(
    model: LensModel,
    graph: Graph,
    readers: list[Reader],
    changes: Float[Tensor, "prompt sender pos_d"],
    kept: dict[str, Tensor],
    by: dict[str, Tensor],
) -> Float[Tensor, "prompt sender receiver"]:
    """Changes times gradients by inputs, a layer's inputs at a time."""
    found = changes.new_zeros(len(changes), len(graph.senders), len(graph.receivers))

    def put(gradient: Tensor, receivers: slice, senders: int) -> None:
        flat = rearrange(gradient, "b receiver pos d -> b (pos d) receiver")
        found[:, :senders, receivers] = changes[:, :senders] @ flat

    after = by[last_hook(model)].float()
    put(after[:, None], slice(len(graph.receivers) - 1, None), len(graph.senders))
    for layer in reversed(range(graph.n_layers)):
        inputs, own = graph.receivers_of(layer), graph.senders_of(layer)
        grads = _head_gradients(model, readers[layer], kept, by, layer)
        put(grads, slice(inputs.start, inputs.start + grads.shape[1]), own.start)
        before = by[SITES["resid_pre"].format(layer)].float()
        if graph.mlps:
            if graph.sequential:
                through = (
                    by[SITES["attn_out"].format(layer)].float() - by[SITES["mlp_out"].format(layer)].float()
                )
            else:
                through = before - after - grads.sum(1)
            senders = own.start + graph.n_heads if graph.sequential else own.start
            put(through[:, None], slice(inputs.stop - 1, inputs.stop), senders)
        after = before
    return found


def _by_position(
    graph: Graph, changes: Float[Tensor, "prompt sender pos_d"], by: dict[str, Tensor]
) -> Float[Tensor, "prompt sender pos"]:
    """Changes times gradients by all that is downstream, position by position."""
    first = by[SITES["resid_pre"].format(0)].float()
    every = rearrange(changes, "b sender (pos d) -> b sender pos d", pos=first.shape[1])

    def times(senders: slice, gradient: Tensor) -> Tensor:
        return einsum(every[:, senders], gradient.float(), "b sender pos d, b pos d -> b sender pos")

    found = [times(slice(0, 1), first)]
    for layer in range(graph.n_layers):
        own = graph.senders_of(layer)
        heads = slice(own.start, own.start + graph.n_heads)
        found.append(times(heads, by[SITES["attn_out"].format(layer)]))
        if graph.mlps:
            found.append(times(slice(heads.stop, own.stop), by[SITES["mlp_out"].format(layer)]))
    return torch.cat(found, 1)


def _head_gradients(
    model: LensModel, reader: Reader, kept: dict[str, Tensor], by: dict[str, Tensor], layer: int
) -> Float[Tensor, "prompt receiver pos d_model"]:
    """By the inputs of a layer's queries, keys and values: back through the weights and the norm."""
    by_normed = torch.cat(
        [
            einsum(
                by[SITES[read].format(layer)].float(),
                reader.W[read],
                "b pos head e, head d e -> b head pos d",
            )
            for read in READS
        ],
        1,
    )
    if model.cfg.normalization_type is None:
        return by_normed
    x = kept[SITES["resid_pre"].format(layer)].float()
    if model.cfg.normalization_type.startswith("LN"):
        x = x - x.mean(-1, keepdim=True)
    scale = norm_scale(model, x)[:, None, :, None]
    unit = x[:, None] / scale
    moved = before_norm(model, by_normed, reader.scale)
    return (moved - unit * (unit * moved).mean(-1, keepdim=True)) / scale
