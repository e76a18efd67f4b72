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
from typing import Any, Protocol

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Counter", "counting"]

log = logging.getLogger("mmicl")

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0


class Counter(Protocol):
    """Something that other processes tell what they have done."""

    add: Any
    """`add.remote(count, note)`."""


@ray.remote(num_cpus=0)
class _Counter:
    def __init__(self) -> None:
        self._done, self._note = 0, ""

    def add(self, count: int, note: str = "") -> None:
        self._done, self._note = self._done + count, note or self._note

    def read(self) -> tuple[int, str]:
        return self._done, self._note


@contextmanager
def counting(title: str, total: int) -> Iterator[Counter]:
    """Show progress of `total` pieces of work for as long as the block runs."""
    counter = _Counter.remote()  # type: ignore[attr-defined]
    done = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(title, total, counter, done), daemon=True)
    thread.start()
    try:
        yield counter
    finally:
        done.set()
        thread.join()
        ray.kill(counter)


def _show_bar(title: str, total: int, counter: Any, done: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(title, total=total, note="")
        while not done.wait(POLL_SECONDS):
            count, note = ray.get(counter.read.remote())
            bars.update(bar, completed=min(count, total), note=note)
        count, note = ray.get(counter.read.remote())
        bars.update(bar, completed=min(count, total), note=note)


def _show_lines(title: str, total: int, counter: Any, done: threading.Event) -> None:
    start = last = time.monotonic()
    log.info(f"{title}: {total} to do")
    while not done.wait(POLL_SECONDS):
        if time.monotonic() - last < LINE_SECONDS:
            continue
        last = time.monotonic()
        count, note = ray.get(counter.read.remote())
        left = f"{(last - start) * (total - count) / count:.0f}" if count else "unknown"
        log.info(f"{title}: {count} of {total}, {left} s left {note}".rstrip())
    log.info(f"{title}: {time.monotonic() - start:.0f} s")
