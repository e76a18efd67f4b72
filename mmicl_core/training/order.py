"""Which rows a step reads: a function of seed and step, the same on any number of workers."""

from __future__ import annotations

import random

__all__ = ["rows_of_step", "share_of_worker"]


def rows_of_step(step: int, batch: int, total: int, *, block: int = 1, seed: int = 0) -> list[int]:
    """Rows of optimiser step `step`.

    The first pass reads rows in their order, so that a curriculum keeps its order; each later pass
    shuffles them in blocks of `block` neighbours.
    """
    first = step * batch
    orders: dict[int, list[int]] = {}
    rows = []
    for position in range(first, first + batch):
        epoch, place = divmod(position, total)
        if epoch not in orders:
            orders[epoch] = _order(epoch, total, block, seed)
        rows.append(orders[epoch][place])
    return rows


def share_of_worker(rows: list[int], rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
    """The micro-batches of one worker: its even, contiguous share, cut into pieces of `micro_batch`."""
    share = len(rows) // world_size
    mine = rows[rank * share : (rank + 1) * share]
    return [mine[start : start + micro_batch] for start in range(0, share, micro_batch)]


def _order(epoch: int, total: int, block: int, seed: int) -> list[int]:
    if epoch == 0:
        return list(range(total))
    blocks = [range(start, min(start + block, total)) for start in range(0, total, block)]
    random.Random(f"{seed}/order/{epoch}").shuffle(blocks)
    return [row for rows in blocks for row in rows]
