"""Work that several ask for at the same time is done once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Flights"]

Result = TypeVar("Result")


@dataclass(eq=False)
class _Flight(Generic[Result]):
    task: asyncio.Task[Result]
    waiting: int = 0


class Flights(Generic[Result]):
    """Work under way, by name."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, _Flight[Result]] = {}

    async def join(self, name: Hashable, start: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """The result of `start`, or of work of the same name that is under way. It ends with the last one who
        waits for it; an error reaches all of them."""
        flight = self._under_way.get(name)
        if flight is None:
            flight = self._under_way[name] = _Flight(asyncio.get_running_loop().create_task(start()))
        flight.waiting += 1
        try:
            # The work goes on for the others when one stops waiting.
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                flight.task.cancel()
            if (not flight.waiting or flight.task.done()) and self._under_way.get(name) is flight:
                del self._under_way[name]
