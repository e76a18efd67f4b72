"""Which rows a step reads: a function of seed and step, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mmicl_core.errors import DataError

Row = TypeVar("Row")

__all__ = ["RowOrder", "micro_batches_of_step", "share_of_worker"]


class RowOrder:
    """Endless passes over the rows, cut into steps.

    Args:
        epoch_order: the row numbers of a pass, by its number; passes may differ in length.
        batch: rows of one step.

    Raises:
        DataError: a pass has no rows; looking for the next one would never end.
    """

    def __init__(self, epoch_order: Callable[[int], list[int]], batch: int) -> None:
        self._epoch_order, self._batch = epoch_order, batch
        self._starts, self._orders = [0], [self._pass(0)]

    def step(self, step: int) -> list[tuple[int, int]]:
        """The rows of a step, each with its position in the whole run."""
        first = step * self._batch
        return [(self._row(position), position) for position in range(first, first + self._batch)]

    def _row(self, position: int) -> int:
        while position >= self._starts[-1] + len(self._orders[-1]):
            self._starts.append(self._starts[-1] + len(self._orders[-1]))
            self._orders.append(self._pass(len(self._orders)))
        epoch = max(number for number, start in enumerate(self._starts) if start <= position)
        return self._orders[epoch][position - self._starts[epoch]]

    def _pass(self, number: int) -> list[int]:
        order = self._epoch_order(number)
        if not order:
            raise DataError(f"pass {number} over the training data holds no row to train on: give it more")
        return order


def micro_batches_of_step(rows: int, world_size: int, micro_batch: int) -> int:
    """How many micro-batches every worker takes in a step, so that none holds more than `micro_batch`
    rows."""
    return -(-rows // (world_size * micro_batch))


def share_of_worker(rows: Sequence[Row], rank: int, world_size: int, micro_batch: int) -> list[list[Row]]:
    """The micro-batches of one worker: its contiguous share, cut as evenly as can be.

    Shares differ by one row where the workers do not divide the rows. All workers get as many micro-batches;
    one may get an empty one, at its end.
    """
    count = micro_batches_of_step(len(rows), world_size, micro_batch)
    mine = _slice(rows, rank, world_size)
    return [list(_slice(mine, number, count)) for number in range(count)]


def _slice(rows: Sequence[Row], number: int, count: int) -> Sequence[Row]:
    """One of `count` contiguous slices; the first ones are longer by one where they do not divide the
    rows."""
    size, rest = divmod(len(rows), count)
    start = number * size + min(number, rest)
    return rows[start : start + size + (number < rest)]
