"""Demonstrations for data sets that have nothing but queries: other queries, about other pictures."""

from __future__ import annotations

import random
from collections.abc import Iterable

from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item

__all__ = ["OtherPictures"]


class OtherPictures:
    """Draws among items whose groups are their pictures.

    The second question about a picture may give the answer to the first away, so that a query's own picture
    is never drawn.

    Args:
        items: what may be drawn.
        what: they are called.
    """

    def __init__(self, items: Iterable[Item], what: str) -> None:
        self._what = what
        self._items: dict[str, list[Item]] = {}
        for item in items:
            self._items.setdefault(item.group, []).append(item)

    def draw(self, query: Item, shots: int, rng: random.Random) -> list[Item]:
        """One item of each of `shots` other pictures than the query's; the first of them are what fewer are.

        Raises:
            DataError: there are not as many.
        """
        others = [picture for picture in self._items if picture != query.group]
        if len(others) < shots:
            raise DataError(
                f"{self._what} has {len(others)} pictures beside that of question {query.id}, but {shots} "
                "demonstrations of different pictures are asked for: lower evaluate.shots"
            )
        rng.shuffle(others)
        return [rng.choice(self._items[picture]) for picture in others[:shots]]
