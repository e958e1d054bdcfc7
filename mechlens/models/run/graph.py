"""A model as a graph: components that write to the residual stream, inputs that read it, and edges."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.models.run.properties import key_value_heads
from mechlens.models.run.sites import SITES
from mechlens.results.heads import check_in_range, head_label, parse_head
from mechlens.results.task_circuits import EMBED, LOGITS

Component: TypeAlias = "str | tuple[int, int]"
"""A head (`L9H6`, `9.6` or `(9, 6)`), an MLP (`L5.mlp`), a layer (`L5`), `embed`, or an edge
(`L4H11->L5H5.k`)."""
_FORMS = "a head as L9H6, an MLP as L5.mlp, a layer as L5, embed, or an edge as L4H11->L5H5.k"


@dataclasses.dataclass(frozen=True)
class Graph:
    """Every component and edge of a model.

    The input of a component is the sum of what earlier components write, so each pair of an earlier component
    and an input is an edge. Heads that share a key and a value, as in grouped-query attention, share these
    inputs: `L3H1.k` is the input of the second key head.
    """

    n_layers: int
    n_heads: int
    n_keys: int
    """Heads of keys and values."""
    mlps: bool
    sequential: bool
    """Whether an MLP reads what the heads of its own layer write."""

    @classmethod
    def of(cls, model: LensModel) -> Graph:
        cfg = model.cfg
        return cls(
            cfg.n_layers,
            cfg.n_heads,
            key_value_heads(model),
            not getattr(cfg, "attn_only", False),
            SITES["resid_mid"].format(0) in model.hook_dict,
        )

    @functools.cached_property
    def senders(self) -> tuple[str, ...]:
        """`embed`, then the heads and the MLP of each layer."""
        return (EMBED, *(name for layer in range(self.n_layers) for name in self.layer(layer)))

    @functools.cached_property
    def receivers(self) -> tuple[str, ...]:
        """The queries, keys and values of each layer's heads and its MLP; last the logits."""
        found = []
        for layer in range(self.n_layers):
            for read, count in (("q", self.n_heads), ("k", self.n_keys), ("v", self.n_keys)):
                found += [f"{head_label(layer, head)}.{read}" for head in range(count)]
            found += [f"L{layer}.mlp"] if self.mlps else []
        return (*found, LOGITS)

    def layer(self, layer: int) -> tuple[str, ...]:
        """The heads of a layer, and its MLP."""
        heads = [head_label(layer, head) for head in range(self.n_heads)]
        return (*heads, f"L{layer}.mlp") if self.mlps else tuple(heads)

    def senders_of(self, layer: int) -> slice:
        """Where the components of a layer are among `senders`."""
        width = self.n_heads + self.mlps
        return slice(1 + layer * width, 1 + (layer + 1) * width)

    def receivers_of(self, layer: int) -> slice:
        """Where the inputs of a layer are among `receivers`: queries, keys, values, MLP."""
        width = self.n_heads + 2 * self.n_keys + self.mlps
        return slice(layer * width, (layer + 1) * width)

    @functools.cached_property
    def possible(self) -> Bool[Tensor, "sender receiver"]:
        """Which pairs are edges: the sender is earlier."""
        found = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        found[:, -1] = True
        for layer in range(self.n_layers):
            inputs, own = self.receivers_of(layer), self.senders_of(layer)
            found[: own.start, inputs] = True
            if self.mlps and self.sequential:
                found[own.start : own.start + self.n_heads, inputs.stop - 1] = True
        return found

    def readers_of(self, receiver: int) -> list[int]:
        """The places among `senders` of the components that have this input; none for the logits.

        Several heads may share a key or a value.
        """
        name = self.receivers[receiver]
        if name == LOGITS:
            return []
        component, _, read = name.partition(".")
        if read == "mlp":
            return [self.senders.index(name)]
        layer, head = parse_head(component)
        shared = 1 if read == "q" else self.n_heads // self.n_keys
        first = self.senders.index(head_label(layer, head * shared))
        return [*range(first, first + shared)]

    def edge_names(self, chosen: Bool[Tensor, "sender receiver"]) -> tuple[str, ...]:
        """The chosen edges, such as `L4H11->L5H5.k`."""
        return tuple(f"{self.senders[u]}->{self.receivers[r]}" for u, r in chosen.nonzero().tolist())

    # -- what the user names -----------------------------------------------------------------------

    def components(self, given: Any) -> tuple[str, ...]:
        """Heads, MLPs and layers as names of senders, in the graph's order.

        Raises:
            ValueError: another way to write them, one that the model does not have, or an edge.
        """
        found: set[str] = set()
        for each in _listed(given):
            if isinstance(each, str) and "->" in each:
                raise ArgumentError("each component", "a head, an MLP or a layer", each)
            found.update(self._expanded(each))
        return tuple(name for name in self.senders if name in found)

    def edges(self, given: Any) -> Bool[Tensor, "sender receiver"]:
        """The edges that are named; a component stands for all edges that leave it.

        Raises:
            ValueError: another way to write one, a component that the model does not have, or an edge that
                runs backwards.
        """
        chosen = torch.zeros_like(self.possible)
        for each in _listed(given):
            if isinstance(each, str) and "->" in each:
                self._choose(each, chosen)
            else:
                at = [self.senders.index(name) for name in self._expanded(each)]
                chosen[at] = self.possible[at]
        return chosen

    def _choose(self, edge: str, chosen: Bool[Tensor, "sender receiver"]) -> None:
        left, _, right = (part.strip() for part in edge.partition("->"))
        senders, receivers = self._expanded(left), self._inputs(right)
        rows = torch.tensor([self.senders.index(name) for name in senders])
        columns = torch.tensor([self.receivers.index(name) for name in receivers])
        there = self.possible[rows[:, None], columns]
        if not there.any():
            raise ValueError(
                f"{edge} is not an edge of this model: {right} does not read what {left} writes, because it "
                "is not later"
            )
        chosen[rows[:, None], columns] |= there

    def _inputs(self, name: str) -> tuple[str, ...]:
        if name == LOGITS:
            return (LOGITS,)
        component, _, read = name.rpartition(".")
        if read == "mlp" or read not in ("q", "k", "v"):
            # an MLP has one input; a head without an input stands for its three
            component, read = name, ""
        (sender,) = self._single(component, name)
        if read == "" and sender.endswith(".mlp"):
            return (sender,)
        layer, head = parse_head(sender)
        shared = head // (self.n_heads // self.n_keys)
        if read:
            if read != "q" and head >= self.n_keys:
                raise ValueError(
                    f"{name} is out of range: this model has {self.n_keys} heads of keys and values for "
                    f"{self.n_heads} queries, and head {head} reads {head_label(layer, shared)}.{read}"
                )
            return (f"{head_label(layer, head)}.{read}",)
        return tuple(
            f"{head_label(layer, index)}.{each}"
            for each, index in (("q", head), ("k", shared), ("v", shared))
        )

    def _single(self, component: str, name: str) -> tuple[str, ...]:
        """The head or MLP that has an input."""
        needs = "an input of a head, as L5H5.k, an MLP, as L5.mlp, or logits"
        if not re.match(r"L?\d", component, re.IGNORECASE):
            raise ArgumentError("an edge's receiver", needs, name)
        found = self._expanded(component)
        if len(found) != 1:
            raise ArgumentError("an edge's receiver", needs, name)
        return found

    def _expanded(self, given: Component) -> tuple[str, ...]:
        if given == EMBED:
            return (EMBED,)
        if isinstance(given, str):
            written = re.fullmatch(r"L?(\d+)(\.mlp)?", given.strip(), re.IGNORECASE)
            if written:
                layer = int(written[1])
                if layer >= self.n_layers:
                    raise ValueError(f"{given} is out of range: there are layers 0 to {self.n_layers - 1}")
                if not written[2]:
                    return self.layer(layer)
                if not self.mlps:
                    raise ValueError(f"{given} is not in this model: it has no MLPs")
                return (f"L{layer}.mlp",)
        try:
            layer, head = parse_head(given)
        except (TypeError, ValueError):
            raise ArgumentError("each component", _FORMS, given) from None
        check_in_range(layer, head, self.n_layers, self.n_heads)
        return (head_label(layer, head),)


def has_edges(given: Any) -> bool:
    """Whether any of the named things is an edge."""
    return any(isinstance(each, str) and "->" in each for each in _listed(given))


def _listed(given: Any) -> list[Component]:
    one = isinstance(given, str) or (
        isinstance(given, tuple) and len(given) == 2 and all(isinstance(each, int) for each in given)
    )
    if one:
        return [given]
    if not isinstance(given, Iterable):
        raise TypeError(f'components must be a list such as ["L9H6", "L5.mlp"], got {given!r}')
    return list(given)
