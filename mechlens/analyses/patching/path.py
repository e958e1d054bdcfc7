"""One head's output, patched only as another component sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.patching.grid import patch_grid
from mechlens.analyses.patching.judge import Metric, Targets
from mechlens.analyses.patching.sources import Made, Source, check_source, named, other_tokens, values_of
from mechlens.models.protocol import LensModel
from mechlens.models.runs import Enough, check_tokens, run, running, watch
from mechlens.models.sweeps import SITES
from mechlens.prompts import chosen, prompt_tokens
from mechlens.results import PatchGridResult, head_label, parse_head


def patch_path(
    model: LensModel,
    prompt: str | Sequence[str] | Int[Tensor, "*prompt pos"],
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
    if input not in ("q", "k", "v", "mlp"):
        raise ValueError(f"input must be q, k, v or mlp, but is {input!r}")
    if isinstance(receiver, int) != (input == "mlp"):
        raise ValueError(
            f"the input mlp has a layer for its receiver, and q, k and v a (layer, head), but receiver is "
            f"{receiver!r} and input {input!r}"
        )
    sender = parse_head(sender)
    if not isinstance(receiver, int):
        receiver = int(receiver) if isinstance(receiver, Integral) else parse_head(receiver)
    (from_layer,) = chosen("layer", [sender[0]], model.cfg.n_layers)
    (from_head,) = chosen("head", [sender[1]], model.cfg.n_heads)
    sender = from_layer, from_head
    (layer,) = chosen("layer", [receiver if isinstance(receiver, int) else receiver[0]], model.cfg.n_layers)
    heads = None if isinstance(receiver, int) else [receiver[1]]
    # blocks that are not parallel have their MLP read what their own heads wrote
    within = input == "mlp" and SITES["resid_mid"].format(0) in model.hook_dict
    if layer < from_layer + (not within):
        raise ValueError(
            f"the {input} of layer {layer} does not read what {head_label(*sender)} writes: the receiver "
            "must come behind the sender"
            + (
                ", and this model's attention and MLP read the same stream"
                if input == "mlp" and layer == from_layer and not within
                else ""
            )
        )
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    check_tokens(model, tokens)
    check_source(model, source, "z", tokens, direction, prepend_bos)
    other = other_tokens(model, source, tokens, prepend_bos)
    at = slice(None) if positions is None else list(chosen("position", positions, tokens.shape[1]))
    site = "mlp_out" if input == "mlp" else input
    enter = SITES["resid_mid" if within else "resid_pre"].format(layer)

    def make(own: Int[Tensor, "1 pos"], index: int) -> dict[int, Tensor]:
        from_tokens = other if direction == "noising" else tokens
        given = own if from_tokens is None else from_tokens[index : index + 1]
        there = values_of(model, source, "z", given, index, [from_layer])(from_layer)
        change = _change(model, own, sender, there, at)
        kept: list[Tensor] = []
        hooks = [(enter, lambda a, hook: a + change), (SITES[site].format(layer), _keeper(kept))]
        with running(model, hooks):
            run(model, own)
        return {layer: kept.pop()[0]}

    seen = f"layer {layer}'s MLP" if heads is None else f"the {input} of {head_label(layer, heads[0])}"
    return patch_grid(
        model,
        tokens,
        site=site,
        source=Made(f"{named(source)} {head_label(*sender)} as {seen} sees it", make, of=source),
        layers=[layer],
        heads=heads,
        positions=None,
        metric=metric,
        read=read,
        targets=targets,
        against=against,
        direction=direction,
        prepend_bos=prepend_bos,
        token_budget=token_budget,
    )


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

    def patch(z: Tensor, hook: object) -> Tensor:
        z = z.clone()
        z[0, at, head] = there[at, head].to(z)
        return z

    with running(model, [(SITES["z"].format(layer), patch), (out, _keeper(patched))]):
        run(model, tokens)
        return patched.pop() - clean.pop()


def _keeper(kept: list[Tensor]) -> Callable[[Tensor, object], None]:
    def keep(activation: Tensor, hook: object) -> None:
        kept.append(activation)
        raise Enough

    return keep
