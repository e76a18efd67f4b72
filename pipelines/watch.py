"""What each worker of a training is doing, seen from outside: a stall is explained and ended.

    worker --every second: step, module, pictures--> watch --nothing new for too long--> every worker ends

Workers that wait for each other for ever cannot say so themselves; a thread beside the training can.

A worker on a node that is cut off goes on, and writes to the storage that all share. It has a lease: it ends
when the watch has not answered for `LONGEST_SILENCE`, and who takes its place begins no sooner.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray

from mmicl_core.errors import MmiclError, TrainingError
from pipelines.progress import beside_the_driver

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Beat", "Place", "Watch", "naming_the_worker", "start_watch", "watching"]

log = logging.getLogger("mmicl")

BEAT_SECONDS = 1.0
LONGEST_SILENCE = 30.0
"""In seconds, after which a worker that the watch does not answer ends."""
ENDED_BY_WATCH = 86
LOST_PEER = ("gloo", "NCCL", "Connection closed", "Connection reset")


@dataclass(frozen=True)
class Beat:
    """Where a worker is."""

    attempt: int
    """Which start of the workers it belongs to."""
    rank: int
    world_size: int
    worker: str
    """Names the process, behind its node: a worker that comes back is another one."""
    moves: int
    """Grows with everything that it does."""
    step: int
    place: str
    calls: Mapping[str, int]

    def __str__(self) -> str:
        seen = ", ".join(f"{count} {name}" for name, count in self.calls.items() if count)
        return f"worker {self.rank}: step {self.step}, in {self.place}, with {seen or 'nothing to look at'}"


def _reachable_nodes() -> Set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _node_of(worker: str) -> str:
    return worker.partition("/")[0]


class Watch:
    """Gathers the beats of a training's workers.

    Args:
        seconds: without anything new from a worker after which they stall.
        clock: tells the time, in seconds.
        nodes: gives the nodes that Ray can reach.
    """

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        nodes: Callable[[], Set[str]] = _reachable_nodes,
    ) -> None:
        self._seconds, self._clock, self._nodes = seconds, clock, nodes
        self._heard: dict[str, float] = {}
        self._beats: dict[int, Beat] = {}
        self._since: dict[int, float] = {}
        self._stall: str | None = None
        self._attempt = 0

    def begin(self) -> int:
        """Forget what was: a training starts, or goes on; gives the number of this attempt. Workers of an
        earlier one, which may have outlived whoever started them, are told to end."""
        self._beats, self._since, self._stall = {}, {}, None
        self._attempt += 1
        return self._attempt

    def wait(self) -> float:
        """Seconds that a worker has to wait before it begins, until those on nodes that were lost have ended.
        What was on a node that Ray can reach, Ray has ended."""
        now, nodes = self._clock(), self._nodes()
        left = {worker: heard + LONGEST_SILENCE - now for worker, heard in self._heard.items()}
        return max((left[worker] for worker in left if _node_of(worker) not in nodes), default=0.0)

    def beat(self, beat: Beat) -> bool:
        """Take a beat in; gives whether the worker shall go on."""
        self._heard[beat.worker] = self._clock()
        if beat.attempt != self._attempt:
            return False
        known = self._beats.get(beat.rank)
        if known is None or (known.worker, known.moves) != (beat.worker, beat.moves):
            self._since[beat.rank] = self._clock()
        self._beats[beat.rank] = beat
        for rank in [rank for rank in self._beats if rank >= beat.world_size]:
            self._forget(rank)
        self._look()
        return self._stall is None

    def leave(self, beat: Beat) -> None:
        """A worker has ended, and may be silent."""
        self._heard.pop(beat.worker, None)
        self._forget(beat.rank)

    def _forget(self, rank: int) -> None:
        self._beats.pop(rank, None)
        self._since.pop(rank, None)

    def stall(self) -> str | None:
        """What was found when the workers stalled; None while they do not."""
        self._look()
        return self._stall

    def _look(self) -> None:
        now = self._clock()
        silent = [rank for rank, since in self._since.items() if now - since > self._seconds]
        if silent and self._stall is None:
            where = "; ".join(str(self._beats[rank]) for rank in sorted(self._beats))
            self._stall = (
                f"worker {min(silent, key=self._since.__getitem__)} did nothing new for {self._seconds:g} s "
                f"(train.stall_seconds). {where}"
            )


def start_watch(seconds: float) -> Any:
    """A watch for one run, on this connection to Ray."""
    return ray.remote(Watch).options(num_cpus=0, scheduling_strategy=beside_the_driver()).remote(seconds)


@dataclass
class Place:
    """What this worker is doing, as its thread tells the watch."""

    step: int = 0
    name: str = "its start"
    calls: Mapping[str, int] = field(default_factory=dict)
    moves: int = 0

    def at(self, name: str) -> None:
        """Go on to a module, or to another part of a step."""
        self.name = name
        self.moves += 1


@contextmanager
def watching(
    watch: Any, attempt: int, rank: int, world_size: int, method: nn.Module, place: Place
) -> Iterator[None]:
    """Tell the watch where this worker is for as long as the block runs, down to the module of `method`. The
    block is not entered while one on a node that was lost may still run."""
    # Not for the watch itself, which needs no PyTorch.
    from torch.nn.modules.module import register_module_forward_pre_hook

    while (seconds := ray.get(watch.wait.remote())) > 0:
        log.info("waiting %.0f s for workers on a node that was lost to end", seconds)
        time.sleep(seconds)
    done = threading.Event()
    names = {id(module): name for name, module in method.named_modules()}
    worker = f"{ray.get_runtime_context().get_node_id()}/{os.getpid()}/{time.time_ns()}"
    about = Beat(attempt, rank, world_size, worker, 0, 0, "", {})
    thread = threading.Thread(target=_tell, args=(watch, about, place, done), daemon=True)

    def entered(module: nn.Module, _: Any) -> None:
        place.at(names.get(id(module)) or place.name)

    hook = register_module_forward_pre_hook(entered)
    thread.start()
    try:
        yield
    finally:
        hook.remove()
        done.set()
        thread.join()


def _tell(watch: Any, about: Beat, place: Place, done: threading.Event) -> None:
    answered = time.monotonic()
    while not done.is_set():
        beat = replace(about, moves=place.moves, step=place.step, place=place.name, calls=dict(place.calls))
        # Before it is heard, so that who waits for this one to end waits for long enough.
        asked = time.monotonic()
        try:
            go_on = ray.get(watch.beat.remote(beat), timeout=max(0.0, answered + LONGEST_SILENCE - asked))
            answered = asked
        except ray.exceptions.RayError:
            # The driver is gone, or cannot be reached.
            go_on = time.monotonic() < answered + LONGEST_SILENCE
        if not go_on and not done.is_set():
            # It waits inside a collective, where no exception reaches it.
            os._exit(ENDED_BY_WATCH)
        done.wait(BEAT_SECONDS)
    watch.leave.remote(about)


@contextmanager
def naming_the_worker(rank: int, place: Place) -> Iterator[None]:
    """Say of every error which worker met it, in which step and where.

    Raises:
        TrainingError: for what a worker met by itself. That another one was lost is passed on as it is.
    """
    try:
        yield
    except MmiclError as error:
        raise type(error)(f"{_where(rank, place)}: {error}") from error
    except Exception as error:
        if any(sign in str(error) for sign in LOST_PEER) or isinstance(error, ConnectionError):
            raise
        raise TrainingError(f"{_where(rank, place)}: {type(error).__name__}: {error}") from error


def _where(rank: int, place: Place) -> str:
    return f"worker {rank}, step {place.step}, in {place.name}"
