"""Which rows a step reads: a function of seed and step, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mmicl_core.errors import DataError

Row = TypeVar("Row")

__all__ = ["RowOrder", "share_of_worker"]


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


def share_of_worker(rows: list[Row], rank: int, world_size: int, micro_batch: int) -> list[list[Row]]:
    """The micro-batches of one worker: its even, contiguous share, cut into pieces of `micro_batch`."""
    share = len(rows) // world_size
    mine = rows[rank * share : (rank + 1) * share]
    return [mine[start : start + micro_batch] for start in range(0, share, micro_batch)]
