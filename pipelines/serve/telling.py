"""What an engine tells of a question, as the events that its asker reads.

Begun, Grown, Ended --transcripts--> Started, Piece, Finished --> mail, in groups that happened together
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from functools import cached_property
from typing import Any, TypeAlias

from mmicl_core.serving.jobs import Begun, Ended, Grown, Happening, OutOfTimeError
from mmicl_core.serving.sampling import Likelihood
from mmicl_core.serving.transcript import TokenTexts, Told, Transcript
from pipelines.serve.contracts import Event, Finished, Piece, Question, Started, TokenLogprob
from pipelines.serve.errors import DeadlineError

__all__ = ["Mail", "Teller", "late"]

GATHERING_SECONDS = 0.05
"""Every group costs each process that it comes through the same, whatever is in it; nobody reads faster."""

Mail: TypeAlias = tuple[Event, ...] | Exception
"""What happened together, or why it is over."""


class Teller:
    """Tells one asker. It is told from one thread, and read in the event loop that made it.

    Args:
        saved: tokens that demonstrations would take beside what they take, were all of them written out.
        tokenizer: of the model.
        arrived: when the question came, by `time.monotonic`.
    """

    def __init__(self, question: Question, saved: int, tokenizer: Any, arrived: float) -> None:
        self.loop, self._mail = asyncio.get_running_loop(), asyncio.Queue[Mail]()
        self.stopped = set[int]()
        """Answers that a stop text has ended."""
        self._question, self._saved, self._arrived = question, saved, arrived
        self._tokenizer = tokenizer
        self._answers = [Transcript(tokenizer, sampling.stop) for sampling in question.samplings]
        self._ttft_ms = dict[int, float]()
        self._events, self._errors = list[Event](), list[Exception]()
        self._growing, self._read_at = len(question.samplings), float("-inf")

    def tell(self, happening: Happening) -> None:
        """Something happened."""
        if isinstance(happening, Begun):
            self._events.append(self._started(happening))
        elif isinstance(happening, Grown):
            self._grow(happening)
        elif happening.error is not None:
            self._errors.append(happening.error)
        else:
            self._finish(happening)

    def collect(self) -> list[Mail]:
        """What happened since the last time."""
        mail: list[Mail] = [tuple(self._events)] if self._events else []
        mail += self._errors
        self._events, self._errors = [], []
        return mail

    def send(self, mail: Iterable[Mail]) -> None:
        """Let the asker read it; in the event loop."""
        for one in mail:
            self._mail.put_nowait(one)

    async def groups(self, deadline: float) -> AsyncGenerator[tuple[Event, ...], None]:
        """All events to the last: the first ones at once, later ones gathered for a moment.

        Args:
            deadline: by the event loop's clock.

        Raises:
            DeadlineError: nothing came in time.
        """
        while self._growing:
            yield await self._gather(deadline)

    async def _gather(self, deadline: float) -> tuple[Event, ...]:
        events = await self._next(deadline)
        self._growing -= _count_ends(events)
        while self._growing and (left := self._read_at + GATHERING_SECONDS - self.loop.time()) > 0:
            try:
                async with asyncio.timeout(left):
                    more = await self._mail.get()
            except TimeoutError:
                break
            if isinstance(more, Exception):
                # What came before it is told before it.
                self._mail.put_nowait(more)
                break
            events += more
            self._growing -= _count_ends(more)
        self._read_at = self.loop.time()
        return events

    async def _next(self, deadline: float) -> tuple[Event, ...]:
        try:
            async with asyncio.timeout_at(deadline):
                mail = await self._mail.get()
        except TimeoutError as error:
            raise late(self._question) from error
        if isinstance(mail, OutOfTimeError):
            raise late(self._question) from mail
        if isinstance(mail, Exception):
            raise mail
        return mail

    @cached_property
    def _texts(self) -> TokenTexts:
        return TokenTexts(self._tokenizer)

    def _started(self, begun: Begun) -> Started:
        return Started(
            begun.prompt_tokens,
            begun.cached_tokens,
            begun.demo_tokens + self._saved,
            begun.demo_tokens,
            (begun.began - self._arrived) * 1000,
            begun.running,
        )

    def _grow(self, grown: Grown) -> None:
        index, transcript = grown.index, self._answers[grown.index]
        self._mark_first_token(index)
        self._events.append(self._piece(index, transcript.add(grown.token, grown.likelihood)))
        if transcript.stopped:
            self.stopped.add(index)
            self._events.append(Finished(index, "stop", transcript.tokens, self._ttft_ms[index]))

    def _finish(self, ended: Ended) -> None:
        index, transcript = ended.index, self._answers[ended.index]
        # An answer that ends at once has the end token as its first.
        self._mark_first_token(index)
        rest = self._piece(index, transcript.end())
        if rest.text or rest.logprobs:
            self._events.append(rest)
        self._events.append(Finished(index, ended.reason, transcript.tokens, self._ttft_ms[index]))

    def _piece(self, index: int, told: Told) -> Piece:
        return Piece(index, told.text, tuple(self._spell(one) for one in told.likelihoods))

    def _spell(self, likelihood: Likelihood) -> TokenLogprob:
        likeliest = tuple((self._texts.text(token), logprob) for token, logprob in likelihood.likeliest)
        return TokenLogprob(self._texts.text(likelihood.token), likelihood.logprob, likeliest)

    def _mark_first_token(self, index: int) -> None:
        if index not in self._ttft_ms:
            self._ttft_ms[index] = (time.monotonic() - self._arrived) * 1000


def late(question: Question) -> DeadlineError:
    """The error of an answer that takes too long."""
    return DeadlineError(f"the answer took longer than the {question.seconds:g} seconds that it may take")


def _count_ends(events: Iterable[Event]) -> int:
    return sum(isinstance(event, Finished) for event in events)
