"""The one thread that works for a backbone: it steps the engine, and hands on what happened.

    event loop --add(job)--> engine (thread) --step--> happenings --once a step--> queues in the event loop

It sleeps while there is nothing to do. One that is retired ends with its last answer, and begins again if
somebody who knows it still asks.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from threading import Condition, Thread
from typing import TypeAlias

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.serving.engine import Engine
from mmicl_core.serving.jobs import Job
from pipelines.serve.errors import UnavailableError
from pipelines.serve.telling import Mail, Teller

__all__ = ["EngineThread"]

log = logging.getLogger("ray.serve")

_Letter: TypeAlias = tuple[Job, Teller, list[Mail]]


class EngineThread:
    """An engine and its thread.

    Args:
        backbone: the model of all methods that are asked here.
        rows: answers that grow at the same time.
        prefix_bytes: of keys and values that are kept.
    """

    def __init__(self, backbone: HuggingFaceBackbone, rows: int, prefix_bytes: int) -> None:
        self.backbone = backbone
        self.engine = Engine(backbone, rows, prefix_bytes)
        self._awake = Condition()
        self._thread: Thread | None = None
        self._retired = False
        # Changed in the event loops, read in the thread.
        self._told = dict[Job, Teller]()
        self._failure: BaseException | None = None

    def add(self, job: Job, teller: Teller) -> None:
        """Let a job wait for its turn.

        Args:
            teller: whom the job tells; what it was told is sent after each step.

        Raises:
            UnavailableError: the thread has died.
        """
        with self._awake:
            if self._failure is not None:
                raise UnavailableError(f"the engine of this replica has died: {self._failure!r}")
            self._told[job] = teller
            self.engine.add(job)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._awake.notify()

    def forget(self, job: Job) -> None:
        """Nobody waits for its answers any more; those that still grow end."""
        job.cancelled = True
        with self._awake:
            self._told.pop(job, None)

    def retire(self) -> None:
        """End when the last answer has ended."""
        with self._awake:
            self._retired = True
            self._awake.notify()

    def check_health(self) -> None:
        """Make sure that the thread works.

        Raises:
            RuntimeError: it has died.
        """
        if self._failure is not None:
            raise RuntimeError(f"the engine's thread died of {self._failure!r}") from self._failure

    def _run(self) -> None:
        try:
            while self._has_work():
                self.engine.step()
                self._send()
        # Whatever it is, nobody may wait for answers that will never come.
        except BaseException as error:
            log.exception("the engine's thread has died")
            with self._awake:
                self._failure = error
            self._send_to_all(UnavailableError(f"the engine of this replica has died: {error!r}"))

    def _has_work(self) -> bool:
        """Wait for some; False when there will be none."""
        with self._awake:
            while self.engine.idle:
                if self._retired:
                    self._thread = None
                    return False
                self._awake.wait()
            return True

    def _send(self) -> None:
        with self._awake:
            told = list(self._told.items())
        letters = [(job, teller, mail) for job, teller in told if (mail := teller.collect())]
        by_loop = defaultdict[asyncio.AbstractEventLoop, list[_Letter]](list)
        for letter in letters:
            by_loop[letter[1].loop].append(letter)
        for loop, some in by_loop.items():
            _deliver_in(loop, some)

    def _send_to_all(self, error: Exception) -> None:
        with self._awake:
            told = list(self._told.items())
        for job, teller in told:
            _deliver_in(teller.loop, [(job, teller, [error])])


def _deliver_in(loop: asyncio.AbstractEventLoop, letters: Sequence[_Letter]) -> None:
    try:
        loop.call_soon_threadsafe(_deliver, letters)
    except RuntimeError:
        # The loop is closed: nobody is left to read.
        for job, _, _ in letters:
            job.cancelled = True


def _deliver(letters: Sequence[_Letter]) -> None:
    for _, teller, mail in letters:
        teller.send(mail)
