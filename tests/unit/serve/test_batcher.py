"""Work of many requests in few passes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from pipelines.serve.batcher import Batcher

SOON = 5.0
LONG = 60.0


@dataclass(frozen=True)
class Task:
    name: str
    shape: str = "usual"
    cost: int = 1


class Worker:
    """Remembers its passes; stands still while it is closed."""

    def __init__(self, *broken: str) -> None:
        self.passes: list[list[str]] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self._broken = broken

    def __call__(self, tasks: list[Task]) -> list[str]:
        self.passes.append([task.name for task in tasks])
        self.entered.set()
        assert self.open.wait(SOON)
        for task in tasks:
            if task.name in self._broken:
                raise ValueError(f"{task.name} is broken")
        return [task.name.upper() for task in tasks]


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


async def entered(work: Worker) -> None:
    await asyncio.to_thread(work.entered.wait, SOON)


async def submit_all(batcher: Batcher, work: Worker, tasks: list[Task]) -> list[object]:
    return await asyncio.gather(*(batcher.submit(work, task) for task in tasks), return_exceptions=True)


def names(text: str, **more) -> list[Task]:
    return [Task(name, **more) for name in text]


async def behind_a_pass(batcher: Batcher, work: Worker, tasks: list[Task]) -> list[object]:
    """Submit while a pass is under way, and let it end when all are in the queue."""
    work.open.clear()
    first = asyncio.ensure_future(batcher.submit(work, Task("first")))
    await entered(work)
    others = asyncio.ensure_future(submit_all(batcher, work, tasks))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    work.open.set()
    await first
    return await others


def test_items_of_many_callers_share_a_pass_and_each_gets_its_own_result(thread):
    work = Worker()
    found = asyncio.run(submit_all(Batcher(thread, 8, 0.05), work, names("abc")))
    assert found == ["A", "B", "C"]
    assert work.passes == [["a", "b", "c"]]


def test_pass_costs_no_more_than_it_may_and_the_oldest_go_first(thread):
    work = Worker()
    asyncio.run(behind_a_pass(Batcher(thread, 4, 0), work, names("abcde", cost=2)))
    assert work.passes == [["first"], ["a", "b"], ["c", "d"], ["e"]]


def test_item_that_costs_more_than_a_pass_may_goes_alone(thread):
    work = Worker()
    tasks = [Task("a"), Task("large", cost=9), Task("b"), Task("c")]
    found = asyncio.run(behind_a_pass(Batcher(thread, 4, 0), work, tasks))
    assert found == ["A", "LARGE", "B", "C"]
    assert work.passes == [["first"], ["a"], ["large"], ["b", "c"]]


def test_only_items_of_one_shape_share_a_pass_and_that_of_the_oldest_is_first(thread):
    work = Worker()
    tasks = [Task("a", "tall"), Task("b", "wide"), Task("c", "tall"), Task("d", "wide")]
    asyncio.run(behind_a_pass(Batcher(thread, 8, 0), work, tasks))
    assert work.passes == [["first"], ["a", "c"], ["b", "d"]]


def test_items_that_wait_for_other_work_do_not_share_a_pass(thread):
    one, other = Worker(), Worker()

    async def both() -> None:
        batcher = Batcher(thread, 8, 0.05)
        await asyncio.gather(*(batcher.submit(work, task) for task in names("ab") for work in (one, other)))

    asyncio.run(both())
    assert one.passes == other.passes == [["a", "b"]]


def test_idle_batcher_does_not_wait_once_a_pass_is_full(thread):
    work = Worker()
    start = time.monotonic()
    asyncio.run(submit_all(Batcher(thread, 2, LONG), work, names("ab")))
    assert time.monotonic() - start < SOON
    assert work.passes == [["a", "b"]]


def test_item_that_nothing_comes_beside_is_worked_on_after_the_wait(thread):
    work = Worker()
    start = time.monotonic()
    asyncio.run(submit_all(Batcher(thread, 8, 0.2), work, names("a")))
    assert 0.2 <= time.monotonic() - start < SOON


def test_busy_batcher_takes_what_waits_without_a_pause(thread):
    work = Worker()

    async def run() -> None:
        batcher = Batcher(thread, 4, LONG)
        work.open.clear()
        # The first one fills a pass, so that nothing else is waited for.
        first = asyncio.ensure_future(batcher.submit(work, Task("first", cost=4)))
        await entered(work)
        others = asyncio.ensure_future(submit_all(batcher, work, names("ab")))
        await asyncio.sleep(0.01)
        work.open.set()
        await asyncio.wait_for(asyncio.gather(first, others), SOON)

    asyncio.run(run())
    assert work.passes == [["first"], ["a", "b"]]


def test_error_reaches_nobody_but_whose_item_is_broken(thread):
    work = Worker("b")
    found = asyncio.run(behind_a_pass(Batcher(thread, 8, 0), work, names("abc")))
    assert (found[0], found[2]) == ("A", "C")
    assert isinstance(found[1], ValueError) and str(found[1]) == "b is broken"
    assert work.passes == [["first"], ["a", "b", "c"], ["a"], ["b"], ["c"]]


def test_items_after_an_error_are_worked_on(thread):
    work = Worker("a")
    batcher = Batcher(thread, 8, 0)
    assert isinstance(asyncio.run(submit_all(batcher, work, names("a")))[0], ValueError)
    assert asyncio.run(submit_all(batcher, work, names("b"))) == ["B"]


def test_item_of_a_caller_who_left_is_not_worked_on(thread):
    work = Worker()

    async def run() -> object:
        batcher = Batcher(thread, 8, 0)
        work.open.clear()
        first = asyncio.ensure_future(batcher.submit(work, Task("first")))
        await entered(work)
        leaving, staying = (asyncio.ensure_future(batcher.submit(work, task)) for task in names("ab"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        work.open.set()
        return await asyncio.gather(first, staying)

    assert asyncio.run(run()) == ["FIRST", "B"]
    assert work.passes == [["first"], ["b"]]


def test_caller_who_leaves_during_a_pass_takes_nothing_from_the_others(thread):
    work = Worker()

    async def run() -> object:
        batcher = Batcher(thread, 8, 0.02)
        work.open.clear()
        leaving, staying = (asyncio.ensure_future(batcher.submit(work, task)) for task in names("ab"))
        await entered(work)
        leaving.cancel()
        work.open.set()
        return await staying

    assert asyncio.run(run()) == "B"
    assert work.passes == [["a", "b"]]


def test_nothing_runs_when_nothing_waits(thread):
    async def run() -> int:
        await submit_all(Batcher(thread, 2, 0), Worker(), names("abc"))
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1


def test_callers_are_told_when_the_thread_is_ended(thread):
    work = Worker()

    async def run() -> list[object]:
        batcher = Batcher(thread, 1, 0)
        work.open.clear()
        waiting = asyncio.ensure_future(submit_all(batcher, work, names("ab")))
        await entered(work)
        thread.shutdown(wait=False, cancel_futures=True)
        work.open.set()
        return await asyncio.wait_for(waiting, SOON)

    first, second = asyncio.run(run())
    assert first == "A"
    assert isinstance(second, RuntimeError)
