"""The lens's picture on a result with known values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.plots.logit_lens import plot_logit_lens
from mechlens.results import LogitLensResult
from tests import hand_made


def lens() -> LogitLensResult:
    """Rows embed and 0, tokens `<s>`, ` a`, `b`; the last row guesses ` a` (right), `<b>` (wrong), ` a`."""
    values = torch.tensor([[[8.0, 4.0, 2.0]], [[0.0, 0.5, 0.25]]])
    return LogitLensResult(
        model=hand_made.model(),
        tokens=torch.tensor([[0, 1, 2]]),
        mask=torch.ones(1, 3, dtype=torch.bool),
        positions=(0, 1, 2),
        context_length=torch.tensor([[1, 2, 3]]),
        rows=("embed", "0"),
        component="resid_post",
        onto_stream=False,
        decoder="final_norm",
        last_blocks=0,
        top_ids=torch.tensor([[[[2, 1], [2, 1], [2, 1]]], [[[1, 2], [3, 1], [1, 2]]]]),
        top_probabilities=torch.tensor([[[[0.5, 0.25]] * 3], [[[0.75, 0.125]] * 3]]),
        entropy=values,
        kl_final=values,
        kl_input=torch.full_like(values, math.nan),
        final_ids=torch.tensor([[1, 3, 1]]),
        log_prob={},
        rank={"final": torch.tensor([[[100.0, 10.0, 1.0]], [[1.0, 1.0, 1.0]]]), "input": values + 1},
        target_ids={},
        strings={"0": "<s>", "1": " a", "2": "b", "3": "<b>x</b>"},
        prepend_bos=True,
    )


def test_cells_axes_and_stars():
    figure = plot_logit_lens(lens(), "kl")
    heat = figure.data[0]
    assert heat.z.tolist() == [[8.0, 4.0, 2.0], [0.0, 0.5, 0.25]]
    assert list(heat.y) == ["embed", "0"]
    assert list(heat.text[1]) == ["·a", "&lt;b&gt;x&lt;/b&gt;", "·a"]
    assert list(figure.layout.xaxis.ticktext) == ["&lt;s&gt;", "·a", "b"]
    # what follows <s> is ` a`, and the last row says so; after ` a` comes b, and it does not
    assert list(figure.layout.xaxis2.ticktext) == ["·a*", "b", ""]
    assert "row 0" in heat.hovertext[1][0]
    assert "·a 0.750" in heat.hovertext[1][0]


def test_ranks_are_coloured_by_their_logarithm():
    figure = plot_logit_lens(lens(), "rank")
    assert figure.data[0].z.tolist() == [[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert figure.data[0].colorbar.ticktext == ("1", "10", "100")
    assert "100.000" in figure.data[0].hovertext[0][0]


def test_markup_in_a_token_stays_text():
    shown = str(plot_logit_lens(lens(), "probability").to_dict())
    assert "<b>x" not in shown


def test_errors():
    with pytest.raises(ValueError, match="stat must be one of"):
        plot_logit_lens(lens(), "colour")
    with pytest.raises(ValueError, match="there is no sequence 1: there are 1"):
        plot_logit_lens(lens(), row=1)
    with pytest.raises(ValueError, match="is not tied to its embedding"):
        plot_logit_lens(lens(), "kl_input")
    tied = dataclasses.replace(lens(), kl_input=torch.ones(2, 1, 3))
    assert plot_logit_lens(tied, "kl_input").data[0].z.max() == 1
