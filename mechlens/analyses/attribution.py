"""Direct logit attribution: what each component adds directly to the logit of a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import chosen, whole_number
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, watch
from mechlens.models.run.neurons import LargestNeurons, check_neurons, promoted_tokens
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.sites import NEURONS, SITES
from mechlens.models.run.unembedding import check_streamed, final_norm, unembedding
from mechlens.models.weights.access import (
    attention_out_affine,
    before_norm,
    final_affine,
    norm_scale,
    output_bias,
    output_weights,
)
from mechlens.results import LogitAttribution, NeuronAttribution, head_label
from mechlens.text.prompts import Prompt, prompt_tokens
from mechlens.text.tokens import all_bos, target_id, token_strings

Target = str | int | Int[Tensor, "..."]
NAMED = 5
"""Tokens that are named at either end of a neuron's output weights."""


def direct_logit_attribution(
    model: LensModel,
    prompt: Prompt,
    targets: Target | None = None,
    *,
    against: Target | None = None,
    positions: Sequence[int] | None = None,
    neurons: int = 0,
    prepend_bos: bool | None = None,
) -> LogitAttribution:
    """Split the logit of a token, or a difference of two logits, into what each component adds directly.

    Each component adds a vector to the residual stream. The logit is linear in that vector if the scale of
    the final norm is frozen at its value in this run, and likewise the scale of any norm between a head or
    an MLP and the stream (Gemma-2). A component's effect through later components is credited to those.

    An MLP's contribution is the sum of its neurons' and its bias's; this is checked in each layer if neurons
    are listed. A neuron's is its activation times its output weights (`W_out`) in the direction of the logit.

    Weight processing moves value biases from the heads into `L0 bias` and so on, and the final norm's bias
    into `b_U`. It also centers the logits over the vocabulary, so only logit differences agree between
    processed and raw weights.

    Args:
        prompt: texts or token ids `[batch, pos]`, all rows of the same length; ids are used as they are.
        targets: the token to explain at every position, as a text of one token or an id; or one id per
            position of the prompt, such as `tokens.roll(-1, -1)` for the next tokens (the last position has
            none). None takes the model's most likely token at each position.
        against: the token whose logit is subtracted, in the same forms; None subtracts nothing.
        positions: positions to read, negative ones from the end; None reads all.
        neurons: how many MLP neurons to list for each sequence and position read: the largest contributions
            of all layers, of either sign, with the 5 tokens that their output weights promote and suppress
            most.
        prepend_bos: whether to prepend BOS to texts; None prepends it if the tokenizer has one.

    Returns:
        Contributions `[component, batch, read]` in logits. They sum to the model's logit before any soft-cap.
        The field `neurons` has layers, indices, contributions and activations `[batch, read, rank]`; it is
        None if none are listed.

    Raises:
        ArgumentError: `neurons` is negative, or more than the model has.
        ValueError: a target is not one token or not one id per position, a position is out of range, or the
            prompt is longer than the context; or the contributions would not sum to the logit, because the
            logits involve more than the final norm, `W_U`, `b_U` and a soft-cap, or because the model adds
            something else to its stream; or neurons are to be listed, but a layer has no MLP, or one that is
            not the sum of its neurons (a mixture of experts).

    Example:
        >>> found = mechlens.direct_logit_attribution(model, "The captain of the", " ship", positions=[-1])
        >>> torch.allclose(found.contributions.sum(0), found.logit, atol=1e-3)
        True
        >>> found = mechlens.direct_logit_attribution(model, "The captain of the", neurons=2, positions=[-1])
        >>> found.neurons.contributions.shape  # batch, read, rank
        torch.Size([1, 1, 2])
        >>> len(found.neurons_to_dataframe()["promoted"][0])
        5

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". TransformerLens's
    `ActivationCache.logit_attrs` includes a norm's learned scale only if the weights are processed.
    Cost: one forward pass, another if `targets` is None, and for each head one product with its `W_O`. No
    `[head, pos, d_model]` tensor is created. Neurons cost one product with each layer's `W_out` for each
    distinct pair of tokens (with a norm behind the MLP, for each position, too), and two with `W_U` for each
    neuron that is listed; one layer's neurons `[batch, read, d_mlp]` exist at a time.
    """
    info = describe(model)
    top = whole_number("neurons", neurons, least=0)
    n_neurons = check_neurons(model) if top else 0
    if top > n_neurons:
        raise ArgumentError("neurons", f"at most the model's {n_neurons:,}", top)
    tokens = prompt_tokens(model, prompt, prepend_bos=prepend_bos)
    read = chosen("position", positions, tokens.shape[1])
    fixed = None if targets is None else _ids(model, "targets", targets, tokens)
    subtracted = None if against is None else _ids(model, "against", against, tokens)
    check_streamed(model, tokens)
    rows = parts(tokens)
    if len(rows) > 1:
        check_rows_alike(model, tokens)
    wanted = [_top(model, part, read) for part in rows] if fixed is None else list(_at(fixed, read, rows))
    lesser = [None] * len(rows) if subtracted is None else list(_at(subtracted, read, rows))
    components = _components(model)
    found = [
        _attribute(model, part, read, target, less, len(components), top)
        for part, target, less in zip(rows, wanted, lesser, strict=True)
    ]
    target_ids = torch.cat(wanted)
    against_ids = None if subtracted is None else subtracted[:, list(read)]
    listed = _listed(model, [part for _, _, part in found if part is not None], n_neurons)
    named = () if listed is None else (listed.promoted, listed.suppressed)
    every = (tokens, target_ids, against_ids, *named)
    seen = torch.cat([ids.flatten() for ids in every if ids is not None]).unique()
    return LogitAttribution(
        model=info,
        tokens=tokens,
        positions=read,
        components=components,
        contributions=torch.cat([contributions for contributions, _, _ in found], dim=1),
        logit=torch.cat([logit for _, logit, _ in found]),
        target_ids=target_ids,
        against_ids=against_ids,
        strings=dict(zip(map(str, seen.tolist()), token_strings(model, seen), strict=True)),
        prepend_bos=all_bos(model.tokenizer, tokens[:, 0]),
        neurons=listed,
    )


def _listed(
    model: LensModel, parts_found: Sequence[dict[str, Tensor]], n_neurons: int
) -> NeuronAttribution | None:
    """The neurons of all parts of the batch, and the tokens that they promote."""
    if not parts_found:
        return None
    whole = {
        name: torch.cat([part[name] for part in parts_found], dim=1 if name == "biases" else 0)
        for name in parts_found[0]
    }
    listed = torch.stack([whole["layers"], whole["indices"]], -1).flatten(0, 2).unique(dim=0)
    promoted, suppressed = promoted_tokens(model, listed, NAMED)
    return NeuronAttribution(
        **whole, n_neurons=n_neurons, listed=listed, promoted=promoted, suppressed=suppressed
    )


def _ids(
    model: LensModel, name: str, target: Target, tokens: Int[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"]:
    """A target as one id per position."""
    if not isinstance(target, Tensor):
        return torch.full_like(tokens, target_id(model, target))
    ids = (target[None] if target.ndim == 1 else target).cpu().long()
    if ids.shape != tokens.shape:
        raise ValueError(
            f"{name} needs one id for every position of the prompt, {tuple(tokens.shape)}, got "
            f"{tuple(target.shape)}: give one token as a text or an int, or select positions with `positions`"
        )
    for extreme in (ids.min(), ids.max()):
        target_id(model, int(extreme))
    return ids


def _at(
    ids: Int[Tensor, "batch pos"], read: Sequence[int], rows: Sequence[Tensor]
) -> Iterator[Int[Tensor, "part read"]]:
    return iter(ids[:, list(read)].split([len(part) for part in rows]))


def _components(model: LensModel) -> tuple[str, ...]:
    names = ["embed", "pos_embed"] if _adds_positions(model) else ["embed"]
    for layer in range(model.cfg.n_layers):
        names += [head_label(layer, head) for head in range(model.cfg.n_heads)]
        names += [f"L{layer} bias"]
        names += [f"L{layer} MLP"] if _has_mlp(model) else []
    return (*names, "final bias")


def _adds_positions(model: LensModel) -> bool:
    return model.cfg.positional_embedding_type == "standard"


def _has_mlp(model: LensModel) -> bool:
    return not getattr(model.cfg, "attn_only", False)


def _final_name(model: LensModel) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"


def _top(
    model: LensModel, tokens: Int[Tensor, "batch pos"], read: Sequence[int]
) -> Int[Tensor, "batch read"]:
    """The model's most likely tokens."""
    kept: list[Tensor] = []
    watch(model, tokens, {_final_name(model): lambda resid: kept.append(resid[:, list(read)])})
    with torch.inference_mode():
        top = unembedding(model).most_likely(final_norm(model, kept.pop()).flatten(0, 1))
    return top.cpu().view(len(tokens), len(read)).clone()


def _attribute(
    model: LensModel,
    tokens: Int[Tensor, "batch pos"],
    read: Sequence[int],
    targets: Int[Tensor, "batch read"],
    against: Int[Tensor, "batch read"] | None,
    n_components: int,
    top: int,
) -> tuple[Float[Tensor, "component batch read"], Float[Tensor, "batch read"], dict[str, Tensor] | None]:
    """What each component adds, in the order of `_components`, the logits these sum to, and the `top` neurons
    as fields of `NeuronAttribution`."""
    pairs = torch.stack([targets, targets if against is None else against], dim=-1).flatten(0, 1)
    # one direction for each distinct pair of tokens, often a single one
    unique, which = pairs.to(model.W_U.device).unique(dim=0, return_inverse=True)
    which = which.view(targets.shape)
    with torch.inference_mode():
        columns, biases = model.W_U[:, unique[:, 0]].float().T, model.b_U[unique[:, 0]].float()
        if against is not None:
            columns = columns - model.W_U[:, unique[:, 1]].float().T
            biases = biases - model.b_U[unique[:, 1]].float()
        norm_weight, norm_bias = final_affine(model)
        directions = before_norm(model, columns, norm_weight)

    where = torch.tensor(read, device=which.device)
    added: dict[int, Tensor] = {}
    kept: dict[str, Tensor] = {}
    largest = LargestNeurons(model, directions, which, top)
    readers: dict[str, Callable[[Tensor], None]] = {}

    def keep(name: str, activation: Tensor) -> None:
        kept[name] = activation[:, where].float()

    def add_neurons(layer: int, activation: Tensor) -> None:
        largest.add(layer, activation[:, where].float())

    def add_mlp(index: int, layer: int, activation: Tensor) -> None:
        written = activation[:, where].float()
        added[index] = torch.linalg.vecdot(written, directions[which])
        if top:
            largest.check(layer, written, added[index])

    def add_heads(index: int, layer: int, z: Tensor) -> None:
        values, norm = z[:, where].float(), attention_out_affine(model, layer)
        W_O, b_O = output_weights(model, layer), output_bias(model, layer)
        seen = directions if norm is None else before_norm(model, directions, norm[0])
        # for each pair of tokens, by head and coordinate of z
        through = einsum(seen, W_O, "pair d_model, head d d_model -> pair head d")
        heads = einsum(values, through[which], "batch read head d, batch read head d -> head batch read")
        bias = (seen @ b_O)[which]
        if norm is not None:
            scale = norm_scale(model, values.flatten(-2) @ W_O.flatten(0, 1) + b_O)
            heads, bias = heads / scale, bias / scale + (directions @ norm[1])[which]
        for head, contribution in enumerate(heads):
            added[index + head] = contribution
        added[index + len(heads)] = bias

    readers["hook_embed"] = partial(keep, "embed")
    readers["blocks.0.hook_resid_pre"] = partial(keep, "start")
    index = 2 if _adds_positions(model) else 1
    for layer in range(model.cfg.n_layers):
        readers[f"blocks.{layer}.attn.hook_z"] = partial(add_heads, index, layer)
        index += model.cfg.n_heads + 1
        if _has_mlp(model):
            if top:
                readers[NEURONS.format(layer)] = partial(add_neurons, layer)
            readers[SITES["mlp_out"].format(layer)] = partial(add_mlp, index, layer)
            index += 1
    readers[_final_name(model)] = partial(keep, "final")
    watch(model, tokens, readers)

    with torch.inference_mode():
        embed = kept["embed"] if _adds_positions(model) else kept["start"]
        added[0] = torch.linalg.vecdot(embed, directions[which])
        if _adds_positions(model):
            added[1] = torch.linalg.vecdot(kept["start"] - embed, directions[which])
        final = kept["final"]
        scale = norm_scale(model, final)
        summands = torch.stack([added[i] for i in range(n_components - 1)]) / scale
        final_bias = (columns @ norm_bias + biases)[which]
        contributions = torch.cat([summands, final_bias[None]])
        normed = final_norm(model, final.to(model.W_U.dtype)).float()
        logit = torch.linalg.vecdot(normed, columns[which]) + biases[which]
    _check_sum(model, contributions, logit, directions.norm(dim=-1)[which])
    # clones made outside inference mode are ordinary tensors
    neurons = {name: each.cpu().clone() for name, each in largest.found(scale).items()} if top else None
    return contributions.cpu().clone(), logit.cpu().clone(), neurons


def _check_sum(
    model: LensModel,
    contributions: Float[Tensor, "component batch read"],
    logit: Float[Tensor, "batch read"],
    size: Float[Tensor, "batch read"],
) -> None:
    """Raise if contributions do not sum to the logit, up to rounding in the model's dtype."""
    off = (contributions.sum(0) - logit).abs()
    # rounding is relative to the largest terms; 16, because several hundred are summed
    allowed = 16 * torch.finfo(model.W_U.dtype).eps * (contributions.abs().sum(0) + size)
    worst = (off - allowed).argmax()
    # the parts of a nan logit are nan
    if not bool(((off <= allowed) | logit.isnan()).all()):
        raise ValueError(
            "this model adds something to its residual stream besides embeddings, heads, their biases and "
            "MLPs, or scales what they add, so it has no direct attribution: the contributions miss a logit "
            f"of {float(logit.flatten()[worst]):.4g} by {float(off.flatten()[worst]):.2g}"
        )
