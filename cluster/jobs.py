"""Jobs that run: their log is followed until they end, left, and taken up again.

A job does not need whoever watches it. A connection that breaks is made again and the log goes on where it
was; Ctrl-C leaves the job alone.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from typing import Any

from cluster.client import Job, JobServer, SilentServerError, ray_client
from mmicl_core.errors import ConfigError

__all__ = ["INTERRUPTED", "follow", "how_to_reattach", "listed", "stop"]

INTERRUPTED = 130
GIVE_UP_SECONDS = 600.0
# After a silence of the first length the connection is taken for dead, then after twice as much, and so on:
# a new one sends the log from its beginning.
SILENCE_SECONDS, LONGEST_SILENCE_SECONDS = 60.0, 960.0
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 15.0
# Of a job that has ended the log may be gone, with the node that wrote it.
TRIES_AFTER_THE_END = 3
STOP_SECONDS = 30.0

Tail = Callable[[str], AsyncGenerator[str, None]]


def follow(server: JobServer, name: str, tail: Tail | None = None) -> int:
    """Print the log of a job until it ends; gives the job's exit code, or 130 if Ctrl-C ended the watching.

    Args:
        server: that runs it.
        name: of the job.
        tail: gives the log of a job from its beginning; Ray's own if None.

    Raises:
        ConfigError: there is no such job, or the server stays silent for long.
    """
    try:
        server.job(name)
        log = _Log(server, name, tail or ray_client(server).tail_job_logs)
        job = asyncio.run(log.to_the_end())
    except KeyboardInterrupt:
        print(f"mmicl: {name} goes on. {how_to_reattach(server, name)}", file=sys.stderr)
        return INTERRUPTED
    _tell_end(job)
    return job.code


def how_to_reattach(server: JobServer, name: str) -> str:
    """What to type to see a job again, and to stop it."""
    where = f"{name} --address {server.address}"
    return (
        f"`mmicl submit logs {where}` follows it again, `mmicl submit status {where}` says how it is, and "
        f"`mmicl submit stop {where}` stops it"
    )


def listed(job: Job) -> dict[str, Any]:
    """A job as plain values."""
    return {
        "job": job.name,
        "status": job.status.lower(),
        "exit_code": job.code if job.ended else None,
        "started": _iso(job.started),
        "ended": _iso(job.ended_at),
        "command": job.command,
        "message": job.message,
    }


def stop(server: JobServer, name: str) -> Job:
    """Stop a job and wait for its end; one that has ended is left as it is.

    Raises:
        ConfigError: there is no such job, or it does not end.
    """
    job = server.job(name)
    if job.ended:
        return job
    server.stop(name)
    deadline = time.monotonic() + STOP_SECONDS
    while not (job := server.job(name)).ended:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{name} was asked to stop and is {job.status.lower()} after {STOP_SECONDS:.0f} seconds: "
                f"`mmicl submit status {name} --address {server.address}` says what becomes of it"
            )
        time.sleep(RETRY_SECONDS)
    return job


class _Log:
    """The log of a job, printed once however often it is read."""

    def __init__(self, server: JobServer, name: str, tail: Tail) -> None:
        self._server = server
        self._name = name
        self._tail = tail
        self._printed = 0
        self._silence = SILENCE_SECONDS
        self._outage_told = False

    async def to_the_end(self) -> Job:
        heard, retry, tries = time.monotonic(), RETRY_SECONDS, 0
        while True:
            before = self._printed
            broken = await self._read()
            try:
                job = await asyncio.to_thread(self._server.job, self._name)
            except SilentServerError as error:
                broken = str(error)
                if time.monotonic() - heard > GIVE_UP_SECONDS:
                    raise SilentServerError(
                        f"{error}; it has been silent for {GIVE_UP_SECONDS:.0f} seconds, and {self._name} "
                        f"may go on: {how_to_reattach(self._server, self._name)}"
                    ) from error
            else:
                heard = time.monotonic()
                tries += job.ended
                if job.ended and (broken is None or tries == TRIES_AFTER_THE_END):
                    return job
            if self._printed > before:
                retry = RETRY_SECONDS
            self._tell_outage(broken)
            await asyncio.sleep(retry)
            retry = min(2 * retry, LONGEST_RETRY_SECONDS)

    async def _read(self) -> str | None:
        """Print what is new until nothing more comes; gives what broke the connection, if anything did."""
        log, seen = self._tail(self._name), 0
        try:
            while True:
                text = await asyncio.wait_for(_next(log), self._silence)
                if text is None:
                    return None
                new = text[max(0, self._printed - seen) :]
                seen += len(text)
                if new:
                    print(new, end="", flush=True)
                    self._printed, self._silence, self._outage_told = seen, SILENCE_SECONDS, False
        except TimeoutError:
            self._silence = min(2 * self._silence, LONGEST_SILENCE_SECONDS)
            return ""
        except Exception as error:
            # Whatever broke it: what the server says of the job decides what follows.
            return str(error) or type(error).__name__
        finally:
            await log.aclose()

    def _tell_outage(self, reason: str | None) -> None:
        if reason and not self._outage_told:
            print(f"mmicl: the log of {self._name} broke off, reading it again: {reason}", file=sys.stderr)
            self._outage_told = True


async def _next(log: AsyncGenerator[str, None]) -> str | None:
    return await anext(log, None)


def _tell_end(job: Job) -> None:
    if job.exit_code is None and job.message and job.status == "FAILED":
        # Its program has not run, so that the log says nothing of it.
        print(f"mmicl: {job.message.strip()}", file=sys.stderr)
    code = f" with exit code {job.exit_code}" if job.status == "FAILED" and job.exit_code is not None else ""
    print(f"mmicl: {job.name} {job.status.lower()}{code}", file=sys.stderr)


def _iso(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
