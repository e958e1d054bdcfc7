"""TransformerLens's weight processing, one block at a time.

TransformerLens copies all of a model's weights several times. Here at most one block exists twice: each
tensor is released as soon as its processed version exists.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mechlens.measures.memory import give_back

State = dict[str, Tensor]


@contextlib.contextmanager
def processing_by_blocks() -> Iterator[None]:
    """Make both of TransformerLens's engines process weights block by block until the `with` block ends.
    Processed tensors are removed from the state dict passed in."""
    from transformer_lens.weight_processing import ProcessWeights

    names = ("process_weights", "distribute_weights_to_components")
    own = {name: vars(ProcessWeights)[name] for name in names}
    process, distribute = (getattr(ProcessWeights, name) for name in names)
    waiting: list[Callable[[State], Iterator[State]]] = []

    def process_weights(state_dict: State, cfg: Any, adapter: Any = None, **wanted: bool) -> State:
        def parts(given: State) -> Iterator[State]:
            return _processed(process, given, cfg, adapter, wanted)

        if adapter is None:
            done: State = {}
            for part in parts(state_dict):
                done |= part
            return done
        # a bridge next assigns the weights to its modules, which releases the old ones
        waiting.append(parts)
        return state_dict

    def distribute_weights(
        state_dict: State, component_mapping: dict[str, Any], verbose: bool = False
    ) -> None:
        parts = waiting.pop()(state_dict) if waiting else iter([state_dict])
        for part in parts:
            distribute(part, component_mapping, verbose)

    ProcessWeights.process_weights = staticmethod(process_weights)
    ProcessWeights.distribute_weights_to_components = staticmethod(distribute_weights)
    try:
        yield
    finally:
        for name in names:
            setattr(ProcessWeights, name, own[name])


def _processed(
    process: Callable[..., State], state: State, cfg: Any, adapter: Any, wanted: dict[str, bool]
) -> Iterator[State]:
    """The processed weights of each block, then those outside the blocks."""
    from transformer_lens.weight_processing import ProcessWeights

    blocks: dict[int, list[str]] = {}
    for name in state:
        found = re.match(r"blocks\.(\d+)\.", name)
        if found:
            blocks.setdefault(int(found[1]), []).append(name)
        elif re.search(r"\.\d+\.", name):
            # an adapter with other block names
            yield process(state, cfg, adapter=adapter, **wanted)
            return
    embeddings = [ProcessWeights._get_param_key(name, adapter) for name in ("embed.W_E", "pos_embed.W_pos")]
    for layer, names in sorted(blocks.items()):
        # as a model with one block; processing expects embeddings
        block = {_renumbered(name, 0): state.pop(name) for name in names}
        block |= {name: torch.zeros(1, cfg.d_model, dtype=torch.float32) for name in embeddings}
        dtypes = {name: tensor.dtype for name, tensor in block.items() if name not in embeddings}
        # biases that folding creates get the dtype of the other weights
        own = next(dtype for dtype in dtypes.values() if dtype.is_floating_point)
        # folding value biases copies all weights of the block, so it is skipped if no bias is nonzero
        biased = any(re.search(r"\b_?b(_|$)|\bbias\b", name) and each.any() for name, each in block.items())
        here = wanted | {"center_unembed": False, "fold_value_biases": wanted["fold_value_biases"] and biased}
        done = process(block, _of_blocks(cfg, 1), adapter=adapter, **here)
        yield {
            _renumbered(name, layer): done[name].to(dtypes.get(name, own))
            for name in done
            if name not in embeddings
        }
        del block, done
        give_back()
    rest = dict(state)
    state.clear()
    yield _ends(rest, _of_blocks(cfg, 0), adapter, wanted)


def _ends(state: State, cfg: Any, adapter: Any, wanted: dict[str, bool]) -> State:
    """Process the embeddings, final norm and unembedding as `ProcessWeights.process_weights` does, but with
    fewer copies, because these are the largest tensors."""
    from transformer_lens.weight_processing import ProcessWeights

    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    kind = str(getattr(cfg, "normalization_type", "LN"))
    is_layer_norm = kind.startswith("LN")
    W_U, b_U, W_E, W_pos = (
        ProcessWeights._get_param_key(name, adapter)
        for name in ("unembed.W_U", "unembed.b_U", "embed.W_E", "pos_embed.W_pos")
    )
    written = {name: state.pop(name) for name in (W_E, W_pos) if name in state}
    # weights that read from the stream
    for name in state:
        state[name] = _wide(state[name])
    if wanted["fold_ln"] and kind.startswith(("LN", "RMS")) and getattr(adapter, "supports_fold_ln", True):
        if is_layer_norm:
            state = ProcessWeights._fold_final_rms_bias(state, cfg, True, adapter)
        state = ProcessWeights._fold_unembed_layer_norm(state, cfg, is_layer_norm, is_layer_norm, adapter)
    if wanted["center_unembed"]:
        # on a bridge the vocabulary is the first axis, as in transformers
        state[W_U] = _centered(state[W_U], -1 if adapter is None else 0)
        if b_U in state:
            state[b_U] = _centered(state[b_U], -1)
    done = {name: state.pop(name).to(dtypes.get(name, torch.float32)) for name in list(state)}
    # weights that write to the stream
    if (
        wanted["center_writing_weights"]
        and is_layer_norm
        and not getattr(cfg, "final_rms", False)
        and getattr(adapter, "supports_center_writing_weights", True)
    ):
        for name in written:
            written[name] = _wide(written[name])
        written = ProcessWeights.center_writing_weights(written, cfg, adapter=adapter)
    return done | {name: written.pop(name).to(dtypes[name]) for name in list(written)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _centered(tensor: Tensor, axis: int) -> Tensor:
    return tensor - tensor.mean(axis, keepdim=True)


def _renumbered(name: str, layer: int) -> str:
    return re.sub(r"^blocks\.\d+\.", f"blocks.{layer}.", name)


def _of_blocks(cfg: Any, n_layers: int) -> Any:
    same = copy.copy(cfg)
    same.n_layers = n_layers
    return same
