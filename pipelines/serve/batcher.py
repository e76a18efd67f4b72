"""Work of many requests, done in few passes on one thread.

    submit --> queue, oldest first --> pass: the oldest item, and what is like it and fits --> results

The thread never waits while there is work. An idle one waits a moment, as those who ask at the same time do
not arrive at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

__all__ = ["Batcher", "Item"]


class Item(Protocol):
    """Something to be worked on."""

    @property
    def shape(self) -> Hashable:
        """Items of equal shapes may share a pass."""
        ...

    @property
    def cost(self) -> int:
        """Its part of what a pass may cost."""
        ...


Submitted = TypeVar("Submitted", bound=Item)
Result = TypeVar("Result")


@dataclass(eq=False)
class _Waiting:
    work: Callable[[Sequence[Any]], Sequence[Any]]
    item: Any
    done: asyncio.Future[Any]

    @property
    def kind(self) -> tuple[Hashable, ...]:
        return self.work, self.item.shape


class Batcher:
    """Collects items and works on them in passes, one at a time.

    Nothing runs while nothing waits, so there is nothing to be started or stopped.

    Args:
        thread: where passes run.
        most: that the items of a pass may cost together; one that costs more has a pass of its own.
        wait_seconds: for further items, while idle.
    """

    def __init__(self, thread: Executor, most: int, wait_seconds: float) -> None:
        self._thread, self._most, self._wait = thread, most, wait_seconds
        # A dict keeps order, and lets go of what is in its middle at once.
        self._queue: dict[_Waiting, None] = {}
        self._cost = 0
        self._passes: asyncio.Task[None] | None = None
        self._full = asyncio.Event()

    async def submit(
        self, work: Callable[[Sequence[Submitted]], Sequence[Result]], item: Submitted
    ) -> Result:
        """Have an item worked on, beside others.

        Whoever stops waiting takes the item out of the queue; a pass that has begun goes on for the others.

        Args:
            work: items -> a result for each. What it raises for several is asked again of each alone, so that
                an error reaches nobody but whose it is.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(work, item, loop.create_future())
        self._queue[waiting] = None
        self._cost += item.cost
        if self._passes is None or self._passes.done():
            self._full = asyncio.Event()
            self._passes = loop.create_task(self._work())
        if self._cost >= self._most:
            self._full.set()
        try:
            result: Result = await waiting.done
            return result
        finally:
            self._drop(waiting)

    def _drop(self, waiting: _Waiting) -> None:
        if waiting in self._queue:
            del self._queue[waiting]
            self._cost -= waiting.item.cost

    async def _work(self) -> None:
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), self._wait)
            while self._queue:
                await self._pass(self._take())
        finally:
            # There is somebody only where this was ended from outside.
            for waiting in self._queue:
                waiting.done.cancel()

    def _take(self) -> list[_Waiting]:
        first, *others = self._queue
        taken, cost = [first], first.item.cost
        for waiting in others:
            if waiting.kind != first.kind:
                continue
            cost += waiting.item.cost
            if cost > self._most:
                break
            taken.append(waiting)
        for waiting in taken:
            self._drop(waiting)
        return taken

    async def _pass(self, taken: Sequence[_Waiting]) -> None:
        try:
            results = await self._run(taken)
        except Exception as error:
            if len(taken) > 1:
                for waiting in taken:
                    if not waiting.done.done():
                        await self._pass([waiting])
            elif not taken[0].done.done():
                taken[0].done.set_exception(error)
        else:
            for waiting, result in zip(taken, results, strict=True):
                if not waiting.done.done():
                    waiting.done.set_result(result)
        finally:
            # As above.
            for waiting in taken:
                waiting.done.cancel()

    async def _run(self, taken: Sequence[_Waiting]) -> Sequence[Any]:
        work, items = taken[0].work, [waiting.item for waiting in taken]
        results = await asyncio.get_running_loop().run_in_executor(self._thread, work, items)
        assert len(results) == len(items), (len(results), len(items))
        return results
