"""Progress of long work: a bar with the time left on a terminal, a line now and then elsewhere.

Work that runs in other processes counts itself through a `Counter` actor, so that the bar is right on
any number of machines.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

__all__ = ["Counter", "beside_the_driver", "counting"]

log = logging.getLogger("mmicl")

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0
IDLE: list[tuple[str, Any]] = []


class Counter(Protocol):
    """Something that other processes tell what they have done."""

    add: Any
    """`add.remote(count, note)`."""

    resume: Any
    """`resume.remote(count)`: so much was done before, by an earlier run or before a failure."""


@dataclass(frozen=True)
class _Count:
    done: int
    note: str
    here: int
    """Of what is done, how much in `seconds`: what was done before says nothing about the speed."""
    seconds: float

    def time_left(self, total: int) -> str:
        if not self.here:
            return "unknown time"
        return f"{self.seconds * max(total - self.done, 0) / self.here:.0f} s"

    @property
    def rate(self) -> str:
        """Pieces a second, by what was done here."""
        speed = self.here / self.seconds if self.seconds else 0.0
        return f"{speed:.0f}/s" if speed >= 10 else f"{speed:.2g}/s"


@ray.remote(num_cpus=0)
class _Counter:
    def __init__(self) -> None:
        self.resume(0)

    def resume(self, count: int) -> None:
        self._done = self._before = count
        self._note = ""
        self._since = time.monotonic()

    def add(self, count: int, note: str = "") -> None:
        self._done, self._note = self._done + count, note or self._note

    def read(self) -> _Count:
        here, seconds = self._done - self._before, time.monotonic() - self._since
        return _Count(self._done, self._note, here, seconds)


@contextmanager
def counting(title: str, total: int) -> Iterator[Counter]:
    """Show progress of `total` pieces of work for as long as the block runs.

    Whoever counts waits for its last count: the counter may serve other work right afterwards.
    """
    counter = _take_counter()
    done = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(title, total, counter, done), daemon=True)
    thread.start()
    try:
        yield counter
    except BaseException:
        _end(thread, done)
        # Somebody may still be counting.
        ray.kill(counter)
        raise
    _end(thread, done)
    IDLE.append((_session(), counter))


def _take_counter() -> Any:
    """An idle counter of this connection to Ray, or another one: its process takes a second to start."""
    while IDLE:
        session, counter = IDLE.pop()
        if session == _session():
            ray.get(counter.resume.remote(0))
            return counter
    return _Counter.options(scheduling_strategy=beside_the_driver()).remote()  # type: ignore[attr-defined]


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Where an actor is lost only with the driver that asks it, and not with some other machine."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _session() -> str:
    return str(ray.get_runtime_context().get_job_id() + ray.get_runtime_context().gcs_address)


def _end(thread: threading.Thread, done: threading.Event) -> None:
    done.set()
    thread.join()


def _show_bar(title: str, total: int, counter: Any, done: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}, {task.fields[left]} left {task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(title, total=total, note="", left="unknown time", rate="0/s")
        ended = False
        while not ended:
            ended = done.wait(POLL_SECONDS)
            count = ray.get(counter.read.remote())
            told = {"note": count.note, "left": count.time_left(total), "rate": count.rate}
            bars.update(bar, completed=min(count.done, total), **told)


def _show_lines(title: str, total: int, counter: Any, done: threading.Event) -> None:
    start = last = time.monotonic()
    log.info(f"{title}: {total} to do")
    while not done.wait(POLL_SECONDS):
        if time.monotonic() - last < LINE_SECONDS:
            continue
        last = time.monotonic()
        count = ray.get(counter.read.remote())
        told = f"{min(count.done, total)} of {total}, {count.rate}, {count.time_left(total)} left"
        log.info(f"{title}: {told} {count.note}".rstrip())
    log.info(f"{title}: {time.monotonic() - start:.0f} s")
