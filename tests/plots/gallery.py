"""Every figure of the package, from a made-up model, for tests of properties that all figures share."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import plotly.graph_objects as go
import torch

import mechlens
from mechlens.models.run.graph import Graph
from mechlens.results import (
    CompositionScores,
    EdgeEffects,
    ExhaustiveSearch,
    FeatureAlignment,
    InputProbe,
    LogitAttribution,
    LogitVariance,
    PatchGridResult,
    PositionalAttention,
    Result,
    TunedLens,
)
from tests import examples

WORDS = ("<|im_start|>", "The", "·E", "iffel", " Tower", " is", " in", " the", " city", " of")
"""The input of a gallery model: long and short tokens, as in real text."""


def edges(info, n_layers: int, n_heads: int, draw: torch.Generator) -> EdgeEffects:
    """A model's edges, a few of which have large effects."""
    graph = Graph(n_layers, n_heads, n_heads, True, True)
    effect = torch.randn(graph.possible.shape, generator=draw).pow(7).masked_fill(~graph.possible, math.nan)
    return examples.edge_effects(
        model=info,
        senders=graph.senders,
        receivers=graph.receivers,
        effect=effect,
        standard_error=effect.abs() / 8,
        node_standard_error=torch.ones(len(graph.senders)),
        roles=("IO", "S1", "S2", "END", "elsewhere"),
        node_roles=torch.randn(len(graph.senders), 5, generator=draw).pow(3),
        exact_edges=(),
        exact=torch.empty(0),
    )


def results(n_layers: int, n_heads: int = 9) -> Mapping[str, Result]:
    """One result of each kind that has layers or heads."""
    draw = torch.Generator().manual_seed(0)
    info = examples.model("smollm2-135m", n_layers=n_layers, n_heads=n_heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    def uniform(*shape: int) -> torch.Tensor:
        # squared, so few are large, like scores
        return torch.rand(*shape, generator=draw).pow(4)

    lens = examples.deep_lens(n_layers, tokens=WORDS)
    induction = uniform(1, 2, n_layers, n_heads)
    scores = dataclasses.replace(
        examples.head_scores(),
        model=info,
        scores={"induction_score": induction, "copying_score": 2 * uniform(1, 2, n_layers, n_heads) - 1},
        nulls={"induction_score": induction / 8},
        intervals={
            kind: torch.stack([induction.mean((0, 1)) * 0.9, induction.mean((0, 1)) * 1.1])
            for kind in ("induction_score", "copying_score")
        },
    )
    rows = ("embed", *map(str, range(n_layers)))
    n_rows = len(rows)
    pair = torch.full((n_layers, n_heads, n_layers, n_heads), math.nan)
    for layer in range(n_layers - 1):
        pair[layer, :, layer + 1 :] = 0.1 + uniform(n_heads, n_layers - layer - 1, n_heads)
    # as in real models, the strongest pairs are in few layers
    for late in range(6):
        pair[n_layers // 2, 0, n_layers - 1 - late % (n_layers // 2), late] = 2.0 - late / 10

    def grid(*axes: str, n_prompts: int = 1) -> PatchGridResult:
        sizes = {"layer": n_layers, "head": n_heads, "pos": len(WORDS)}
        return dataclasses.replace(
            examples.patch_grid(axes=("layer", "pos")),
            model=info,
            tokens=torch.zeros(n_prompts, len(WORDS), dtype=torch.long),
            site="z" if "head" in axes else "resid_pre",
            into="corrupted",
            metric="logit_diff",
            unit="logits",
            about=" John - Mary",
            axes=axes,
            layers=tuple(range(n_layers)),
            heads=tuple((layer, head) for layer in range(n_layers) for head in range(n_heads))
            if "head" in axes
            else (),
            positions=tuple(range(len(WORDS))) if "pos" in axes else (),
            values=(normal(n_prompts, *(sizes[axis] for axis in axes)) / 2).pow(3),
            clean=torch.full((n_prompts,), 4.0),
            corrupted=torch.full((n_prompts,), -3.0),
            strings=WORDS,
        )

    components = ("embed", "pos_embed")
    for layer in range(n_layers):
        components += (*(f"L{layer}H{head}" for head in range(n_heads)), f"L{layer} bias", f"L{layer} MLP")
    components += ("final bias",)
    added = normal(len(components), 1, 1).pow(3)
    n_features, k = 32, 3
    ids = torch.randint(2, 10, (n_layers, n_features, k), generator=draw)
    same = torch.rand(n_layers, n_layers, n_features, generator=draw) < 0.4
    probe: InputProbe = examples.input_probe()
    fits = (*rows, "shared")

    def stretched(values: torch.Tensor, axis: int, size: int) -> torch.Tensor:
        return values.index_select(axis, torch.arange(size) % values.shape[axis])

    probe = dataclasses.replace(
        probe,
        model=info,
        rows=rows,
        fits=fits,
        **{
            name: {key: stretched(each, 1, n_rows) for key, each in getattr(probe, name).items()}
            for name in ("accuracy", "accuracy_interval", "r2", "element_r2")
        },
        **{
            name: {key: stretched(each, 0, n_rows + 1) for key, each in getattr(probe, name).items()}
            for name in (
                *("weights", "biases", "similarity", "similarity_null", "unembedding_similarity"),
                *("unembedding_similarity_null", "weight", "weight_correlation", "weight_correlation_null"),
            )
        },
    )
    variance = LogitVariance(
        model=info,
        tokens=torch.zeros(1, 3, dtype=torch.long),
        positions=(0, 1, 2),
        rows=rows,
        bins=((1, 1), (2, 10), (11, 100), (101, 1000), (1001, 49152)),
        probability=torch.full((5, 1, 3), 0.2),
        variance=1 + uniform(5, 1, 3),
        null_variance=1 + uniform(4, 5) / 4,
        elsewhere_variance=1 + uniform(5, 1, 3),
        mean_logit=normal(n_rows, 5, 1, 3),
        spread=uniform(n_rows, 5, 1, 3),
        excess=uniform(n_rows, 5, 1, 3),
        seed=0,
        prepend_bos=True,
    )
    return {
        "lens": lens,
        "scores": scores,
        "performance": examples.performance(),
        "patterns": examples.attention(tokens=WORDS),
        "composition": CompositionScores(
            model=info,
            kind="k",
            scores=pair,
            baseline_mean=0.1,
            baseline_std=0.01,
            baseline_draws=16,
            seed=0,
            rotary="relative",
            relative_position=49,
        ),
        "positional": PositionalAttention(
            model=info,
            head=(0, 1),
            pattern=torch.softmax(normal(12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -9), -1),
            scale=0.5,
            normalized_positions=True,
        ),
        "edges": edges(info, n_layers, n_heads, draw),
        "roles": examples.role_grid(
            model=info, layers=tuple(range(n_layers)), values=normal(2, n_layers, 2).pow(3), note="a note"
        ),
        "role_heads": examples.role_grid(
            model=info,
            site="z",
            axes=("layer", "head", "role"),
            layers=tuple(range(n_layers)),
            heads=tuple(itertools.product(range(n_layers), range(n_heads))),
            values=normal(2, n_layers, n_heads, 2).pow(3),
        ),
        "patch_layer": grid("layer", n_prompts=3),
        "patch_heads": grid("layer", "head", n_prompts=3),
        "patch_positions": grid("layer", "pos"),
        "attribution": LogitAttribution(
            model=info,
            tokens=torch.arange(len(WORDS))[None],
            positions=(len(WORDS) - 1,),
            components=components,
            contributions=added,
            logit=added.sum(0),
            target_ids=torch.tensor([[4]]),
            against_ids=None,
            strings={str(at): word for at, word in enumerate(WORDS)},
            prepend_bos=True,
        ),
        "probe": probe,
        "variance": variance,
        "tuned": TunedLens(
            model=info,
            rows=rows[:-1],
            weight=torch.zeros(n_layers, 8, 8),
            bias=torch.zeros(n_layers, 8),
            kl_plain=torch.linspace(9, 0.2, n_rows),
            kl_tuned=torch.linspace(4, 0.1, n_rows),
            source="trained",
            steps=20,
            batch_tokens=64,
            length=8,
            train_tokens=100,
            held_out_tokens=16,
            learning_rate=1e-3,
            seed=0,
            prepend_bos=True,
        ),
        "search": ExhaustiveSearch(
            model=info,
            site="mlp_out",
            layers=tuple(range(n_layers)),
            features=tuple(range(n_features)),
            directions=None,
            prefix=torch.tensor([0]),
            prepend_bos=True,
            ids=ids,
            activations=1 + uniform(n_layers, n_features, k),
            lowest_ids=ids,
            lowest_activations=-uniform(n_layers, n_features, k),
            strings={"0": "<|im_start|>", **{str(at): f" straightfor{at}" for at in range(2, 10)}},
            vocabulary=None,
        ),
        "alignment": FeatureAlignment(
            model=info,
            other=info,
            within=True,
            site="mlp_out",
            other_site="mlp_out",
            layers=tuple(range(n_layers)),
            other_layers=tuple(range(n_layers)),
            features=tuple(range(n_features)),
            top_k=4,
            prefix=torch.tensor([0]),
            other_prefix=torch.tensor([0]),
            activated=torch.ones(n_layers, n_features, dtype=torch.bool),
            other_activated=torch.ones(n_layers, n_features, dtype=torch.bool),
            same=same,
            overlap=same.float(),
            chance_same=torch.full((n_layers, n_layers), 0.1),
            chance_overlap=torch.full((n_layers, n_layers), 0.1),
            is_index=torch.zeros(n_layers, n_features, dtype=torch.bool),
            other_is_index=torch.zeros(n_layers, n_features, dtype=torch.bool),
        ),
    }


def figures(n_layers: int, n_heads: int = 9) -> dict[str, go.Figure]:
    """Each figure with default arguments."""
    made = results(n_layers, n_heads)
    lens, heads, grids = made["lens"], made["scores"], made["patch_heads"]
    long = examples.deep_lens(n_layers, tokens=WORDS * 4)
    attn = dataclasses.replace(lens, read="attn_out")
    return {
        "lens": mechlens.plot_logit_lens(lens),
        "lens_rank": mechlens.plot_logit_lens(lens, "rank_ a"),
        "lens_long": mechlens.plot_logit_lens(long),
        "lens_lines": mechlens.plot_lens_lines(lens),
        "facts": mechlens.plot_facts(examples.facts(n_layers)),
        "sublayers": mechlens.plot_logit_lens(
            mechlens.interleaved(attn, dataclasses.replace(lens, read="mlp_out"))
        ),
        "head_scores": mechlens.plot_head_scores(heads, "induction_score"),
        "copying": mechlens.plot_head_scores(heads, "copying_score"),
        "nulls": mechlens.plot_scores_against_nulls(heads, "induction_score"),
        "log_probs": mechlens.plot_log_probs(made["performance"]),
        "attention": mechlens.plot_attention_heatmap(made["patterns"]),
        "composition": mechlens.plot_composition_scores(made["composition"]),
        "head_graph": mechlens.plot_head_graph(made["composition"]),
        "positional": mechlens.plot_positional_attention(made["positional"]),
        "roles": mechlens.plot_role_grid(made["roles"]),
        "role heads": mechlens.plot_role_grid(made["role_heads"]),
        "circuit curve": mechlens.plot_circuit_curve(examples.circuit_curve()),
        "edge graph": mechlens.plot_edge_graph(made["edges"]),
        "patch_layer": mechlens.plot_patch_grid(made["patch_layer"]),
        "patch_heads": mechlens.plot_patch_grid(grids),
        "patch_recovered": mechlens.plot_patch_grid(grids, value="recovered"),
        "patch_positions": mechlens.plot_patch_grid(made["patch_positions"]),
        "head_effects": mechlens.plot_head_effects(grids),
        "spread": mechlens.plot_attention_spread(examples.attention_spread(n_layers, n_heads)),
        "attribution": mechlens.plot_attribution(made["attribution"]),
        "probe": mechlens.plot_input_probe(made["probe"]),
        "variance": mechlens.plot_logit_variance(made["variance"]),
        "tuned": mechlens.plot_tuned_lens(made["tuned"]),
        "features": mechlens.plot_feature_tokens(made["search"]),
        "alignment": mechlens.plot_feature_alignment(made["alignment"]),
        "alignments": mechlens.plot_feature_alignment(
            made["alignment"], made["alignment"], made["alignment"]
        ),
    }
