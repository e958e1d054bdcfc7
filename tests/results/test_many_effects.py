"""Which of many effects stand, compared with scipy's t test of every cell."""

from __future__ import annotations

import math

import torch
from scipy.stats import ttest_1samp

from tests import examples


def test_cells_that_stand_are_those_of_a_corrected_t_test():
    n, shape = 9, (2, 3)
    changes = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).double()
    changes += torch.tensor([[0.0, 1.0, 2.0], [-2.0, 0.5, 4.0]])
    grid = examples.role_grid(
        prompts=tuple("abcdefghi"),
        clean=torch.zeros(n),
        corrupted=torch.zeros(n),
        into="corrupted",
        layers=(0, 1),
        roles=("a", "b", "c"),
        values=changes,
    )
    p = torch.from_numpy(ttest_1samp(changes.numpy(), 0).pvalue)
    assert grid.stands.equal(6 * p < 0.05)
    assert 0 < int(grid.stands.sum()) < 6
    low, high = grid.corrected_interval()
    assert ((low < grid.effect) & (grid.effect < high)).all()
    assert f"Of 6 effects, {int(grid.stands.sum())} stand" in grid.said_of_effects()
    # an effect as large as half the interval stands every second time with as many prompts
    half = float((high - low)[0, 0]) / 2
    assert float(grid.prompts_needed(half * 1.001, power=0.5)[0, 0]) == n
    assert float(grid.prompts_needed(half * 0.999, power=0.5)[0, 0]) == n + 1


def test_a_single_prompt_says_nothing_of_effects():
    unknown = torch.full_like(examples.edge_effects().effect, math.nan)
    single = examples.edge_effects(prompts=("a",), standard_error=unknown)
    assert single.said_of_effects() == ""
    assert not single.stands.any()
