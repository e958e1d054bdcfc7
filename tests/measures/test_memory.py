"""Halving of batches when memory runs out."""

from __future__ import annotations

import pytest
import torch

from mechlens.measures.memory import in_parts, is_out_of_memory


def no_room(size):
    """Work that has memory for only `room` rows."""

    def work(rows):
        if len(rows) > size:
            # more than there is, to raise PyTorch's own error
            torch.empty(2**60, dtype=torch.uint8)
        return rows.tolist()

    return work


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("room", [1, 2, 5])
def test_every_row_is_done_once_and_in_order(size, room):
    rows = torch.arange(11)
    done = list(in_parts(no_room(room), rows, size))
    assert [row for _, made in done for row in made] == rows.tolist()
    assert all(part.tolist() == made for part, made in done)
    assert max(len(part) for part, _ in done) <= min(size, room)


def test_as_many_as_fit_continue_together():
    sizes = [len(part) for part, _ in in_parts(no_room(2), torch.arange(8), 8)]
    assert sizes == [2, 2, 2, 2]


def test_one_row_too_many_is_an_error():
    with pytest.raises(RuntimeError, match="memory") as caught:
        list(in_parts(no_room(0), torch.arange(3), 2))
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_swallowed():
    def work(rows):
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match="sizes differ"):
        list(in_parts(work, torch.arange(3), 2))
