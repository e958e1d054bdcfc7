"""One head's output, patched only as another component sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.patching.grid import patch_grid
from mechlens.analyses.patching.judge import Metric, Targets
from mechlens.analyses.patching.sources import (
    Made,
    Mean,
    Source,
    check_source,
    named,
    other_tokens,
    values_of,
)
from mechlens.arguments import chosen
from mechlens.models.properties import check_adds_up, key_value_head
from mechlens.models.protocol import LensModel
from mechlens.models.runs import Enough, check_tokens, run, running, watch
from mechlens.models.sweeps import SITES
from mechlens.prompts import Prompt, prompt_tokens
from mechlens.results import PatchGridResult, head_label, parse_head


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
    Cost: as one cell of `patch_grid`, and up to four runs more for each prompt.
    """
    path = _Path.of(model, sender, receiver, input)
    tokens, other = _prompts(model, prompt, source, direction, prepend_bos)
    at, there_of = _at(positions, tokens), _senders(model, source, path.sender[0])

    def make(own: Int[Tensor, "1 pos"], index: int) -> dict[int, Tensor]:
        from_tokens = other if direction == "noising" else tokens
        given = own if from_tokens is None else from_tokens[index : index + 1]
        return {path.layer: path.seen(own, there_of(given, index), at)}

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

    Cost: up to five runs for each prompt.
    """
    if input not in ("q", "k", None):
        raise ValueError(f"attention is made from q and k, so input must be one of them, but is {input!r}")
    layer, head = parse_head(receiver)
    (head,) = chosen("head", [head], model.cfg.n_heads)
    read = key_value_head(model, head) if input == "k" else head
    path = _Path.of(model, sender, (layer, read), input or "q")
    tokens, other = _prompts(model, prompt, source, "noising", prepend_bos)
    at, there_of = _at(positions, tokens), _senders(model, source, path.sender[0])
    found = []
    for index in range(len(tokens)):
        own = tokens[index : index + 1]
        given = own if other is None else other[index : index + 1]
        there = there_of(given, index)
        if input is None:
            hook = (SITES["z"].format(path.sender[0]), partial(_put, at=at, head=path.sender[1], there=there))
        else:
            assert path.head is not None
            seen = path.seen(own, there, at)
            hook = (SITES[path.site].format(path.layer), partial(_put, at=at, head=path.head, there=seen))
        kept: list[Tensor] = []
        with running(model, [hook, (SITES["pattern"].format(path.layer), _keeper(kept))]):
            run(model, own)
        found.append(kept.pop()[0, head].float().cpu())
    return torch.stack(found)


@dataclasses.dataclass(frozen=True)
class _Path:
    """From one head to what another component reads."""

    model: LensModel
    sender: tuple[int, int]
    layer: int
    head: int | None
    """Of the receiver; None for an MLP."""
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
    ) -> _Path:
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
        return cls(
            model,
            (from_layer, from_head),
            layer,
            head,
            "mlp_out" if input == "mlp" else input,
            SITES["resid_mid" if within else "resid_pre"].format(layer),
        )

    @property
    def name(self) -> str:
        if self.head is None:
            return f"layer {self.layer}'s MLP"
        return f"the {self.site} of {head_label(self.layer, self.head)}"

    def seen(
        self, own: Int[Tensor, "1 pos"], there: Tensor, at: slice | list[int]
    ) -> Float[Tensor, "pos *rest"]:
        """The receiver's layer at `site` when it reads the sender's `z` from there."""
        change = _change(self.model, own, self.sender, there, at)
        kept: list[Tensor] = []
        hooks = [
            (self.enter, lambda a, hook: a + change),
            (SITES[self.site].format(self.layer), _keeper(kept)),
        ]
        with running(self.model, hooks):
            run(self.model, own)
        return kept.pop()[0]


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


def _senders(
    model: LensModel, source: Source, layer: int
) -> Callable[[Int[Tensor, "1 pos"], int], Float[Tensor, "pos head d_head"]]:
    """What `z` becomes, by the run that it is taken from and its number; a mean is taken once."""
    last: list[Tensor] = []

    def there(given: Int[Tensor, "1 pos"], index: int) -> Tensor:
        if not last or not isinstance(source, Mean):
            last[:] = [values_of(model, source, "z", given, index, [layer])(layer)]
        return last[0]

    return there


def _at(positions: Sequence[int] | None, tokens: Int[Tensor, "prompt pos"]) -> slice | list[int]:
    return slice(None) if positions is None else list(chosen("position", positions, tokens.shape[1]))


def _change(
    model: LensModel,
    tokens: Int[Tensor, "1 pos"],
    sender: tuple[int, int],
    there: Tensor,
    at: slice | list[int],
) -> Float[Tensor, "1 pos d_model"]:
    """What the head adds to the stream with its `z` from there, less what it adds without.

    By the block's own output, so that a norm behind the heads, where there is one, has its say.
    """
    layer, head = sender
    out = SITES["attn_out"].format(layer)
    clean: list[Tensor] = []
    watch(model, tokens, {out: clean.append})
    patched: list[Tensor] = []

    patch = partial(_put, at=at, head=head, there=there)
    with running(model, [(SITES["z"].format(layer), patch), (out, _keeper(patched))]):
        run(model, tokens)
        return patched.pop() - clean.pop()


def _put(
    activation: Float[Tensor, "1 pos head d_head"],
    hook: object,
    at: slice | list[int],
    head: int,
    there: Float[Tensor, "pos head d_head"],
) -> Float[Tensor, "1 pos head d_head"]:
    changed = activation.clone()
    changed[0, at, head] = there[at, head].to(changed)
    return changed


def _keeper(kept: list[Tensor]) -> Callable[[Tensor, object], None]:
    def keep(activation: Tensor, hook: object) -> None:
        kept.append(activation)
        raise Enough

    return keep
