"""Runs in which any set of edges carries replaced values, several sets at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.forward import MAX_POSITIONS, check_tokens, running, watch
from mechlens.models.run.graph import Graph
from mechlens.models.run.properties import alike, check_adds_up, key_value_heads
from mechlens.models.run.sites import SITES, last_hook
from mechlens.models.run.user_hooks import probe, user_hooks
from mechlens.models.weights.access import (
    attention_out_affine,
    check_heads_add_up,
    norm_affine,
    norm_scale,
    output_bias,
    output_weights,
)

READS = ("q", "k", "v")
BYTES = 2**29
"""Memory for what components write, of the runs that go together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """What each component of some runs writes."""

    embed: Float[Tensor, "prompt pos d_model"]
    z: Sequence[Float[Tensor, "prompt pos head d_head"]]
    """By layer; a head writes `z @ W_O`."""
    mlp_out: Sequence[Float[Tensor, "prompt pos d_model"]]
    """By layer; empty in a model without MLPs."""

    @classmethod
    def of(cls, model: LensModel, tokens: Int[Tensor, "prompt pos"]) -> Written:
        """Of whole runs of some prompts. Cost: one forward pass."""
        size = max(1, MAX_POSITIONS // tokens.shape[1])
        several = [slice(start, start + size) for start in range(0, len(tokens), size)]
        return cls.kept(model, CleanRun.of(model, tokens, cls.hooks(model), parts=several).kept)

    @staticmethod
    def hooks(model: LensModel) -> list[str]:
        """The hooks that it is read from."""
        sites = ["z"] if getattr(model.cfg, "attn_only", False) else ["z", "mlp_out"]
        layers = range(model.cfg.n_layers)
        return [SITES["resid_pre"].format(0), *(SITES[site].format(n) for site in sites for n in layers)]

    @classmethod
    def kept(cls, model: LensModel, kept: Mapping[str, Tensor]) -> Written:
        """Of activations by hook name."""
        embed, *rest = (kept[name] for name in cls.hooks(model))
        n_layers = model.cfg.n_layers
        return cls(embed, rest[:n_layers], rest[n_layers:])

    def rows(self, rows: slice) -> Written:
        """The same for some of the prompts."""
        return self.map(lambda each: each[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Written:
        """The same with every activation changed."""
        z, mlp_out = ([change(each) for each in some] for some in (self.z, self.mlp_out))
        return Written(change(self.embed), z, mlp_out)


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """How the heads of one layer read the stream: through its norm and the weights of q, k and v."""

    scale: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    W: dict[str, Float[Tensor, "head d_model d_head"]]
    """By `q`, `k`, `v`; keys and values have one entry for each of their own heads."""

    @classmethod
    def of(cls, model: LensModel, layer: int) -> Reader:
        block = model.blocks[layer]
        scale, bias = norm_affine(getattr(block, "ln1", None), model.cfg.d_model, model)
        found = {}
        for read, count in zip(READS, (model.cfg.n_heads, *[key_value_heads(model)] * 2), strict=True):
            W = getattr(block.attn, f"W_{read.upper()}").detach().float()
            # HookedTransformer repeats the keys' and values' weights for each query head
            found[read] = W[:: len(W) // count]
        return cls(scale, bias, found)

    def normed(self, model: LensModel, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the norm makes of a stream, in float32."""
        x = x.float()
        if (model.cfg.normalization_type or "").startswith("LN"):
            x = x - x.mean(-1, keepdim=True)
        return x / norm_scale(model, x)[..., None] * self.scale + self.bias


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeRuns:
    """Runs of some prompts of one length in which edges carry what was written elsewhere."""

    model: LensModel
    graph: Graph
    tokens: Int[Tensor, "prompt pos"]
    there: Written
    """What replaced edges carry, for each prompt."""

    @classmethod
    def of(cls, model: LensModel, tokens: Int[Tensor, "prompt pos"], there: Written) -> EdgeRuns:
        return cls(model, Graph.of(model), tokens, there)

    @functools.cached_property
    def readers(self) -> list[Reader]:
        """By layer. Whole components need none."""
        return [Reader.of(self.model, layer) for layer in range(self.model.cfg.n_layers)]

    def final(self, removed: Bool[Tensor, "set sender receiver"]) -> Float[Tensor, "set prompt d_model"]:
        """The stream that the last position's logits are made from, for each set of replaced edges.

        A component of which every edge is replaced is replaced as a whole. The others write to the stream as
        ever; each input of which some edges are replaced is made apart: the stream less what it does not get.

        Cost: one forward pass per set; 2 d_model per position and replaced or kept edge, whichever are fewer;
        and the projections to q, k and v that read such an input once more.
        """
        n_sets, n_prompts = len(removed), len(self.tokens)
        pairs = [(one, prompt) for one in range(n_sets) for prompt in range(n_prompts)]
        # what components write is kept where single edges are replaced
        kept = 0 if _whole(self.graph, removed).any(2).equal((removed & self.graph.possible).any(2)) else 1
        floats = kept * len(self.graph.senders) + 8 * (self.model.cfg.n_heads + 2)
        at_once = max(1, BYTES // (4 * self.tokens.shape[1] * self.model.cfg.d_model * floats))
        found = []
        for start in range(0, len(pairs), at_once):
            sets, prompts = torch.tensor(pairs[start : start + at_once]).T
            found.append(_Rows(self, removed[sets], prompts).run())
        return torch.cat(found).unflatten(0, (n_sets, n_prompts))


def _whole(graph: Graph, removed: Bool[Tensor, "set sender receiver"]) -> Bool[Tensor, "set sender receiver"]:
    """The replaced edges of components of which every edge is replaced."""
    every = ((removed | ~graph.possible).all(2))[..., None]
    return removed & graph.possible & every


class _Rows:
    """Some runs together, each with its own edges replaced."""

    def __init__(
        self, runs: EdgeRuns, removed: Bool[Tensor, "row sender receiver"], prompts: Int[Tensor, " row"]
    ) -> None:
        self.runs, self.model, self.graph = runs, runs.model, runs.graph
        self.prompts = prompts
        possible = self.graph.possible
        removed = removed & possible
        self.whole = _whole(self.graph, removed).any(2)
        """Components that are replaced as a whole."""
        part = removed & ~self.whole[..., None]
        self.partial = part.any(0).any(0)
        """The inputs that are made apart."""
        kept = possible & ~removed & self.partial
        self.adding = int(kept.sum()) < int(part.sum())
        """Whether inputs are made of the kept edges, on top of a stream in which everything is replaced."""
        # the sign with which a difference enters
        self.weights = kept.float() if self.adding else -part.float()
        self.needed = self.weights.any(0).any(1)
        # senders, over rows: their column in what is kept
        self.column = torch.cumsum(self.needed, 0) - 1
        device = self.model.W_U.device
        self.weights = self.weights[:, self.needed].to(device)
        n_pos, d_model = runs.tokens.shape[1], self.model.cfg.d_model
        self.changes = torch.zeros(
            len(prompts), int(self.needed.sum()), n_pos, d_model, dtype=torch.float32, device=device
        )
        """What a needed component writes less what its replaced edges carry."""
        self.stream = self.all_replaced = torch.empty(0, dtype=torch.float32)
        self.seen = self.stream
        self.attn_out = self.stream

    def run(self) -> Float[Tensor, "row d_model"]:
        final: list[Tensor] = []
        with running(self.model, self._hooks()):
            tokens = self.runs.tokens[self.prompts]
            watch(self.model, tokens, {last_hook(self.model): lambda stream: final.append(stream[:, -1])})
            if self.partial.any():
                # the run's own stream holds what each MLP read
                return self._input(slice(len(self.graph.receivers) - 1, None))[:, 0, -1]
        return final.pop()

    def _hooks(self) -> list[tuple[str, Any]]:
        """Hooks that replace whole components, and that follow the stream where inputs are made apart."""
        apart = bool(self.partial.any())
        sites: list[tuple[str, int, Callable[[Tensor, int], Any]]] = []
        for layer in range(self.model.cfg.n_layers):
            inputs = self.graph.receivers_of(layer)
            if apart or (layer == 0 and self.whole[:, 0].any()):
                sites.append(("resid_pre", layer, self._begin))
            if self.partial[inputs].any():
                sites += [(read, layer, partial(self._read, read)) for read in READS]
            sites.append(("z", layer, self._heads))
            if apart:
                sites.append(("attn_out", layer, self._attention))
            if self.graph.mlps:
                if self.graph.sequential and self.partial[inputs.stop - 1]:
                    sites.append(("resid_mid", layer, self._middle))
                sites.append(("mlp_out", layer, self._mlp))
        return [(SITES[site].format(layer), self._hook(function, layer)) for site, layer, function in sites]

    @staticmethod
    def _hook(function: Callable[[Tensor, int], Any], layer: int) -> Callable[..., Any]:
        return lambda activation, hook: function(activation, layer)

    def _input(self, receivers: slice) -> Float[Tensor, "row receiver pos d_model"]:
        """What some inputs get at this point of the run: the stream, where no set replaces any of it."""
        partial = self.partial[receivers].to(self.stream.device)
        base = self.stream[:, None]
        if self.adding:
            base = torch.where(partial[:, None, None], self.all_replaced[:, None], base)
        weights = self.weights[..., receivers]
        columns = weights.any(0).any(1).nonzero()[:, 0]
        if not len(columns):
            return base.expand(-1, len(partial), -1, -1)
        some = rearrange(self.changes[:, columns], "row sender pos d -> row sender (pos d)")
        return base + (weights[:, columns].mT @ some).unflatten(2, base.shape[2:])

    def _begin(self, stream: Tensor, layer: int) -> Tensor:
        if layer == 0:
            there = self.runs.there.embed[self.prompts]
            whole = self.whole[:, 0].to(stream.device)[:, None, None]
            stream = torch.where(whole, there.to(stream), stream)
            self.stream, self.all_replaced = stream.float(), there.float().to(stream.device)
            self._keep(0, self.stream - self.all_replaced)
        self.seen = self.stream
        inputs = self.graph.receivers_of(layer)
        if self.graph.mlps and not self.graph.sequential and self.partial[inputs.stop - 1]:
            # the block's MLP reads this, too: its heads' q, k and v are made apart
            self.seen = self._input(slice(inputs.stop - 1, inputs.stop))[:, 0]
        return self.seen.to(stream.dtype)

    def _read(self, read: str, own: Tensor, layer: int) -> Tensor | None:
        """Queries, keys or values of inputs that are made apart."""
        inputs = self.graph.receivers_of(layer)
        sizes = (self.graph.n_heads, self.graph.n_keys, self.graph.n_keys)
        first = inputs.start + sum(sizes[: READS.index(read)])
        these = slice(first, first + sizes[READS.index(read)])
        chosen = self.partial[these]
        if self.seen is not self.stream:
            chosen = torch.ones_like(chosen)
        if not chosen.any():
            return None
        heads = chosen.nonzero()[:, 0].to(own.device)
        reader = self.runs.readers[layer]
        low, high = int(heads.min()), int(heads.max()) + 1
        x = self._input(slice(first + low, first + high))[:, heads - low]
        change = reader.normed(self.model, x) - reader.normed(self.model, self.seen)[:, None]
        added = einsum(change, reader.W[read][heads], "row head pos d, head d e -> row pos head e")
        changed = own.clone()
        changed[:, :, heads] = (own[:, :, heads].float() + added).to(own.dtype)
        return changed

    def _heads(self, z: Tensor, layer: int) -> Tensor:
        at = self.graph.senders_of(layer)
        senders = slice(at.start, at.start + self.graph.n_heads)
        there = self.runs.there.z[layer][self.prompts].to(z)
        whole = self.whole[:, senders].to(z.device)
        if whole.any():
            z = torch.where(whole[:, None, :, None], there, z)
        if not self.partial.any():
            return z
        W_O = output_weights(self.model, layer)
        for head in self.needed[senders].nonzero()[:, 0].tolist():
            change = z[:, :, head].float() - there[:, :, head].float()
            self._keep(senders.start + head, change @ W_O[head])
        if self.adding:
            flat = rearrange(there.float(), "row pos head d -> row pos (head d)")
            self.all_replaced = self.all_replaced + flat @ W_O.flatten(0, 1) + output_bias(self.model, layer)
        return z

    def _attention(self, attn_out: Tensor, layer: int) -> None:
        self.attn_out = attn_out.float()
        if not self.graph.mlps:
            self.stream = self.stream + self.attn_out

    def _middle(self, stream: Tensor, layer: int) -> Tensor:
        self.stream = self.stream + self.attn_out
        receiver = self.graph.receivers_of(layer).stop - 1
        made = self._input(slice(receiver, receiver + 1))[:, 0]
        self.stream = self.stream - self.attn_out
        return made.to(stream.dtype)

    def _mlp(self, mlp_out: Tensor, layer: int) -> Tensor:
        sender = self.graph.senders_of(layer).stop - 1
        there = self.runs.there.mlp_out[layer][self.prompts].to(mlp_out)
        whole = self.whole[:, sender].to(mlp_out.device)
        if whole.any():
            mlp_out = torch.where(whole[:, None, None], there, mlp_out)
        if not self.partial.any():
            return mlp_out
        self.stream = self.stream + self.attn_out + mlp_out.float()
        if self.adding:
            self.all_replaced = self.all_replaced + there.float()
        self._keep(sender, mlp_out.float() - there.float())
        return mlp_out

    def _keep(self, sender: int, change: Float[Tensor, "row pos d_model"]) -> None:
        if self.needed[sender]:
            self.changes[:, int(self.column[sender])] = change


def check_edges(model: LensModel, tokens: Int[Tensor, "prompt pos"]) -> None:
    """Check that the inputs of a model's components are sums of what earlier components write.

    Raises:
        ValueError: a norm between a block and the stream (Gemma-2), scaled blocks (Granite), queries that are
            not the norm's output through `W_Q`, or a hook of the user's.

    Cost: two forward passes of at most 8 tokens.
    """
    check_tokens(model, tokens)
    hooks = user_hooks(model)
    if hooks:
        raise ValueError(
            f"your hook at {hooks[0]} would act on inputs that are made apart: remove it with "
            "model.reset_hooks(including_permanent=True)"
        )
    check_adds_up(model, tokens)
    kept: dict[str, Tensor] = {}
    names = [
        SITES[site].format(layer)
        for site in ("resid_pre", *READS, "z", "attn_out")
        for layer in range(model.cfg.n_layers)
    ]
    some = probe(model, tokens)
    watch(model, some, {name: partial(kept.__setitem__, name) for name in names})
    kept = {name: each[0] for name, each in kept.items()}
    for layer in range(model.cfg.n_layers):
        if attention_out_affine(model, layer) is not None:
            raise ValueError(
                f"layer {layer} of this model has a norm between its attention and the stream, so a head's "
                "own part of the stream depends on the others: patch it with Patching.path"
            )
        at = {site: kept[SITES[site].format(layer)] for site in ("resid_pre", *READS, "z", "attn_out")}
        check_heads_add_up(model, layer, at["z"], at["attn_out"])
        reader = Reader.of(model, layer)
        normed = reader.normed(model, at["resid_pre"])
        for read in READS:
            made = einsum(normed, reader.W[read], "pos d, head d e -> pos head e")
            # up to a bias, which is the same at each position
            found, expected = (x.float() - x.float().mean(0) for x in (made, at[read]))
            if not alike(found.to(at[read].dtype), expected.to(at[read].dtype)):
                raise ValueError(
                    f"the {read} of layer {layer} is not the block's norm through W_{read.upper()}: edges "
                    "into this model's heads cannot be replaced one by one"
                )
