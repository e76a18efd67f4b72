from __future__ import annotations

import random

import pytest

from mmicl_core.errors import DataError
from mmicl_core.training.order import RowOrder, micro_batches_of_step, share_of_worker


def _shuffled(length: int) -> RowOrder:
    def order(epoch: int) -> list[int]:
        rows = list(range(length))
        random.Random(epoch).shuffle(rows)
        return rows

    return RowOrder(order, batch=4)


def test_every_row_is_visited_once_in_each_pass() -> None:
    order = _shuffled(10)
    visits = [visit for step in range(10) for visit in order.step(step)]
    assert [position for _, position in visits] == list(range(40))
    for epoch in range(4):
        rows = [row for row, _ in visits[10 * epoch : 10 * epoch + 10]]
        assert sorted(rows) == list(range(10))


def test_passes_of_different_lengths_follow_each_other_without_a_gap() -> None:
    passes = [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    order = RowOrder(lambda epoch: passes[epoch % 3], batch=2)
    rows = [row for step in range(9) for row, _ in order.step(step)]
    assert rows == [*range(9), *range(9)]


def test_a_step_is_the_same_whether_or_not_the_steps_before_were_asked_for() -> None:
    resumed = _shuffled(7)
    from_the_start = _shuffled(7)
    expected = [from_the_start.step(step) for step in range(30)]
    assert resumed.step(29) == expected[29]
    assert resumed.step(3) == expected[3]


def test_a_step_is_shared_out_whole_on_any_number_of_workers() -> None:
    rows = list(range(24))
    for world_size in (1, 2, 3, 4, 5, 6, 7, 24, 30):
        for micro_batch in (1, 3, 5, 24):
            shares = [share_of_worker(rows, rank, world_size, micro_batch) for rank in range(world_size)]
            assert [row for share in shares for batch in share for row in batch] == rows
            assert max(len(batch) for share in shares for batch in share) <= micro_batch
            # Workers that take a different number of micro-batches would wait for each other for ever.
            assert {len(share) for share in shares} == {
                micro_batches_of_step(len(rows), world_size, micro_batch)
            }
            held = [sum(map(len, share)) for share in shares]
            assert max(held) - min(held) <= 1


def test_a_pass_without_rows_is_refused_instead_of_searched_for_ever() -> None:
    with pytest.raises(DataError, match="no row to train on"):
        RowOrder(lambda epoch: [], batch=2).step(0)
    order = RowOrder(lambda epoch: [1] if epoch == 0 else [], batch=2)
    with pytest.raises(DataError, match="pass 1"):
        order.step(0)
