"""Work that several ask for at the same time."""

from __future__ import annotations

import asyncio

import pytest

from pipelines.serve.flights import Flights


class Work:
    """Counts its beginnings and ends."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.ended, self.error = 0, 0, error
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.begun += 1
        await self.go.wait()
        self.ended += 1
        if self.error is not None:
            raise self.error
        return self.begun


async def begin(flights: Flights[int], work: Work, *names: str) -> list[asyncio.Future[int]]:
    joined = [asyncio.ensure_future(flights.join(name, work)) for name in names]
    await asyncio.sleep(0.01)
    return joined


def test_work_of_one_name_is_done_once_for_all_who_wait():
    async def run() -> tuple[list[int], int]:
        work = Work()
        joined = await begin(Flights(), work, "a", "a", "b")
        work.go.set()
        await asyncio.gather(*joined)
        return [future.result() for future in joined], work.begun

    (first, second, _), begun = asyncio.run(run())
    assert first == second
    assert begun == 2


def test_work_that_has_ended_is_begun_again():
    async def run() -> int:
        work, flights = Work(), Flights[int]()
        work.go.set()
        await flights.join("a", work)
        return await flights.join("a", work)

    assert asyncio.run(run()) == 2


def test_work_goes_on_while_somebody_waits_and_ends_with_the_last():
    async def run() -> tuple[int, int]:
        work, flights = Work(), Flights[int]()
        leaving, staying = await begin(flights, work, "a", "a")
        leaving.cancel()
        await asyncio.sleep(0)
        work.go.set()
        await staying
        work.go.clear()
        (alone,) = await begin(flights, work, "a")
        alone.cancel()
        await asyncio.gather(alone, return_exceptions=True)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1
        return work.begun, work.ended

    assert asyncio.run(run()) == (2, 1)


def test_error_reaches_all_who_wait_and_is_not_remembered():
    async def run() -> None:
        work, flights = Work(ValueError("broken")), Flights[int]()
        joined = await begin(flights, work, "a", "a")
        work.go.set()
        assert [str(error) for error in await asyncio.gather(*joined, return_exceptions=True)] == [
            "broken"
        ] * 2
        work.error = None
        assert await flights.join("a", work) == 2

    asyncio.run(run())


def test_who_joins_as_the_last_one_leaves_has_the_work_begun_anew():
    async def run() -> int:
        work, flights = Work(), Flights[int]()
        (leaving,) = await begin(flights, work, "a")
        leaving.cancel()
        work.go.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return await flights.join("a", work)

    assert asyncio.run(run()) == 2
