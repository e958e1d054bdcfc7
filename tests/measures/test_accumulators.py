"""The largest rows of each column, collected in parts, compared with a full sort."""

from __future__ import annotations

import pytest
import torch

from mechlens.measures.accumulators import TopRows


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("part", [1, 5, 12])
def test_parts_give_the_same_as_a_full_sort(k, part):
    # integers, so there are many ties
    values = torch.randint(0, 4, (12, 7), generator=torch.Generator().manual_seed(k)).float()
    best = TopRows.empty(k, 7)
    for numbers in torch.arange(12).split(part):
        best = best.joined(values[numbers], numbers)
    ordered, rows = values.sort(dim=0, descending=True, stable=True)
    assert torch.equal(best.values, ordered[:k])
    assert torch.equal(best.rows, rows[:k])


def test_inputs_are_not_changed():
    values, empty = torch.rand(4, 2), TopRows.empty(2, 2)
    before = values.clone()
    joined = empty.joined(values, torch.arange(4))
    joined.joined(values + 1, torch.arange(4))
    assert torch.equal(values, before)
    assert bool((empty.values == -torch.inf).all())
    assert torch.equal(joined.values[0], values.amax(0))


def test_fewer_rows_than_requested():
    best = TopRows.empty(3, 1).joined(torch.tensor([[2.0], [5.0]]), torch.tensor([7, 8]))
    assert best.values[:, 0].tolist() == [5.0, 2.0, -torch.inf]
    assert best.rows[:2, 0].tolist() == [8, 7]
