"""Which answered items stand before a query.

    random     drawn for each query
    fixed      the same for all queries
    similar    the most alike pictures, the most similar one last (RICES, Yang et al., arXiv:2109.05014)
    hard       alike pictures, half of them with another answer than the query's, in random order

Where a data set says itself which demonstrations belong to a query, these are taken whatever is asked for.
More demonstrations of a query are a superset of fewer, so that a curve over shots changes one thing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from mmicl_core.config.evaluate import Choice
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item, Task

__all__ = ["Alike", "choose"]

Alike = Callable[[Item], Sequence[int]]
"""Places in the pool of what looks most like a query, the nearest first, all that were ranked."""


def choose(
    task: Task, query: Item, pool: Sequence[Item], shots: int, how: Choice, seed: int, alike: Alike | None
) -> list[Item]:
    """The demonstrations of one query, the last one next to it; a function of seed and query.

    Args:
        alike: needed by `similar` and `hard`.

    Raises:
        DataError: there are not as many.
    """
    if not shots:
        return []
    own = task.demonstrations(query, shots, random.Random(f"{seed}/{task.name}/{query.id}"))
    if own is not None:
        return own
    if how in ("random", "fixed"):
        about = query.id if how == "random" else "fixed"
        places = _drawn(pool, query, shots, random.Random(f"{seed}/{task.name}/{about}"))
    else:
        assert alike is not None
        others = [place for place in alike(query) if not _shares_picture(pool[place], query)]
        places = others[:shots][::-1]
        if how == "hard":
            places = _hard(pool, query, others, shots, random.Random(f"{seed}/{task.name}/{query.id}"))
    if len(places) < shots:
        raise DataError(
            f"{task.name} has {len(places)} answered items for {how} demonstrations of question {query.id}, "
            f"but {shots} are asked for: lower evaluate.shots"
        )
    return [pool[place] for place in places]


def _drawn(pool: Sequence[Item], query: Item, shots: int, rng: random.Random) -> list[int]:
    """One by one, so that more draws begin with the same."""
    drawn, seen = list[int](), set[int]()
    while len(drawn) < shots and len(seen) < len(pool):
        place = rng.randrange(len(pool))
        if place not in seen and not _shares_picture(pool[place], query):
            drawn.append(place)
        seen.add(place)
    return drawn


def _hard(
    pool: Sequence[Item], query: Item, nearest: Sequence[int], shots: int, rng: random.Random
) -> list[int]:
    other = [place for place in nearest if pool[place].answer != query.answer]
    same = [place for place in nearest if pool[place].answer == query.answer]
    few = min(shots - shots // 2, len(same))
    places = [*same[:few], *other[: shots - few]]
    rng.shuffle(places)
    return places


def _shares_picture(one: Item, other: Item) -> bool:
    return bool(set(one.pictures) & set(other.pictures))
