"""Continuous batching: answers grow side by side by one token a step, and new ones begin in between.

    waiting --prefill, at most one group a step--> rows of a running batch --one token each--> texts

A step first looks at the oldest waiting questions that may be prefilled together, then gives every running
answer one token. An answer that ends, is cancelled or runs out of time leaves its row at once. Which others
are in the batch does not change an answer: rows see themselves alone, and each draws by its own seed.

The engine belongs to one thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mmicl_core.backbones.decoding import Decoding, context_length
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.backbones.vision import look_up
from mmicl_core.data.collate import pack
from mmicl_core.errors import DataError
from mmicl_core.methods.base import Method, Pictures
from mmicl_core.prompts import Turn
from mmicl_core.serving.choosing import choose, likelihood
from mmicl_core.serving.prefixes import Prefix, Prefixes
from mmicl_core.serving.sampling import Likelihood, Sampling

__all__ = ["Begun", "Ended", "Engine", "Grown", "Job"]

# A prefix shorter than this is computed anew in less time than it takes to copy it.
SHORTEST_PREFIX = 16


@dataclass(eq=False)
class Job:
    """One question to be answered, once for each of its samplings."""

    method: Method
    turns: tuple[Turn, ...]
    """The last one unanswered."""
    pictures: Pictures
    samplings: tuple[Sampling, ...]
    tell: Callable[[Begun | Grown | Ended], None]
    """Called in the engine's thread with all that happens to it."""
    fused: tuple[torch.Tensor, ...] = ()
    """Fused tokens of demonstrations, (T, D) each, which stand before the first turn."""
    prefix: str | None = None
    """The name of what stands before the last turn: the same name stands for the same content. None where it
    is not worth keeping."""
    deadline: float = float("inf")
    """By `time.monotonic`."""
    cancelled: bool = False
    """Set from any thread; the engine then forgets it without another word."""


@dataclass(frozen=True)
class Begun:
    """The prompt was read."""

    prompt_tokens: int
    cached_tokens: int
    """Of these, how many were read before, for another question."""


@dataclass(frozen=True)
class Grown:
    """An answer has one more token."""

    index: int
    token: int
    likelihood: Likelihood | None


@dataclass(frozen=True)
class Ended:
    """An answer is complete, or the whole job failed."""

    index: int
    reason: Literal["stop", "length"]
    error: Exception | None = None


@dataclass(eq=False)
class _Row:
    """One growing answer."""

    job: Job
    index: int
    token: int = -1
    count: int = 0
    stopped: bool = False

    @property
    def sampling(self) -> Sampling:
        return self.job.samplings[self.index]


@dataclass
class _Batch:
    """Rows that are computed together."""

    decoding: Decoding
    rows: list[_Row] = field(default_factory=list)


class OutOfTimeError(Exception):
    """A job whose deadline has passed."""


class Engine:
    """Answers jobs.

    Args:
        backbone: the model of all methods of jobs.
        most_rows: answers that grow at the same time.
        prefix_bytes: of keys and values that are kept for the next job with the same prefix.
    """

    def __init__(self, backbone: HuggingFaceBackbone, most_rows: int, prefix_bytes: int) -> None:
        self._backbone, self._most_rows = backbone, most_rows
        self.prefixes = Prefixes(prefix_bytes)
        self._waiting = deque[Job]()
        self._batches: list[_Batch] = []

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that grow."""
        return sum(len(batch.rows) for batch in self._batches)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._batches

    def add(self, job: Job) -> None:
        """Let a job wait for its turn."""
        self._waiting.append(job)

    @torch.no_grad()
    def step(self) -> None:
        """Begin what can begin, and give every answer one token."""
        self._drop_what_is_late()
        begun = self._begin()
        for batch in self._batches:
            batch.decoding.feed(torch.tensor([row.token for row in batch.rows], device=self._backbone.device))
            self._grow(batch)
        self._batches += begun
        self._join()

    def stop(self, job: Job, index: int) -> None:
        """End one answer of a job after the token that it was last told; for texts that end answers."""
        for batch in self._batches:
            for row in batch.rows:
                row.stopped |= row.job is job and row.index == index

    def _drop_what_is_late(self) -> None:
        now = time.monotonic()
        late = [job for job in self._jobs() if job.deadline < now and not job.cancelled]
        for job in late:
            job.cancelled = True
            job.tell(Ended(0, "stop", OutOfTimeError("the deadline of the request has passed")))
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for batch in self._batches:
            self._leave(batch)
        self._batches = [batch for batch in self._batches if batch.rows]

    def _jobs(self) -> Iterator[Job]:
        yield from self._waiting
        yield from dict.fromkeys(row.job for batch in self._batches for row in batch.rows)

    def _begin(self) -> list[_Batch]:
        """Prefill the oldest jobs that share method and prefix, as many as there are rows for."""
        group = self._next_group()
        if not group:
            return []
        try:
            batch = self._prefill(group)
        except Exception as error:
            self._begin_one_by_one_or_tell(group, error)
            return []
        self._grow(batch)
        return [batch] if batch.rows else []

    def _begin_one_by_one_or_tell(self, group: Sequence[Job], error: Exception) -> None:
        """One bad job does not fail those that were read with it."""
        if len(group) == 1:
            group[0].tell(Ended(0, "stop", error))
            return
        for job in group:
            try:
                batch = self._prefill([job])
            except Exception as own:
                job.tell(Ended(0, "stop", own))
                continue
            self._grow(batch)
            self._batches += [batch] if batch.rows else []

    def _next_group(self) -> list[Job]:
        free = self._most_rows - self.running
        group = list[Job]()
        for job in self._waiting:
            alike = not group or (job.method is group[0].method and job.prefix == group[0].prefix)
            needed = len(job.samplings)
            # A job that needs more rows than there ever are begins where nothing else runs.
            if not alike or (needed > free and (group or self.running)):
                break
            group.append(job)
            free -= needed
        for _ in group:
            self._waiting.popleft()
        return group

    def _prefill(self, group: Sequence[Job]) -> _Batch:
        method = group[0].method
        prompts, lengths = self._embed(group)
        for job, length in zip(group, lengths, strict=True):
            self._refuse_too_long(job, length)
        before = self._before(group[0], prompts, lengths[0])
        if before is None:
            with method.applied(prompts):
                decoding, cached = Decoding(self._backbone, prompts), 0
        else:
            prefix, is_new = before
            tails = prompts.tails([length - prefix.length for length in lengths], prefix.length)
            decoding, cached = Decoding(self._backbone, tails, prefix.cache), prefix.length
        for number, (job, length) in enumerate(zip(group, lengths, strict=True)):
            reused = cached if before is not None and (number or not before[1]) else 0
            job.tell(Begun(length, reused))
        rows = [_Row(job, index) for job in group for index in range(len(job.samplings))]
        if len(rows) > len(group):
            decoding.keep([place for place, job in enumerate(group) for _ in job.samplings])
        return _Batch(decoding, rows)

    def _embed(self, group: Sequence[Job]) -> tuple[Embedded, list[int]]:
        """Prompts of jobs, padded on the left, and their lengths."""
        method = group[0].method
        pictures = {
            f"{number}/{key}": picture
            for number, job in enumerate(group)
            for key, picture in job.pictures.items()
        }
        conversations = [_renamed(job.turns, number) for number, job in enumerate(group)]
        if any(job.fused for job in group):
            prompts = self._embed_behind_fused(group, conversations, pictures)
        else:
            prompts = method.embed(method.arrange(conversations, pictures, "left"))
        return prompts, prompts.mask_BL.sum(1).tolist()

    def _embed_behind_fused(
        self, group: Sequence[Job], conversations: Sequence[Sequence[Turn]], pictures: Pictures
    ) -> Embedded:
        method, fused = group[0].method, [one for job in group for one in job.fused]
        prepared, shown = look_up((turn for turns in conversations for turn in turns), pictures)
        packed = pack(
            [
                method.chat.conversation(turns, len(job.fused))
                for job, turns in zip(group, conversations, strict=True)
            ],
            pictures=prepared,
            fused_tokens=[len(one) for one in fused],
            padding_id=method.padding_id,
            side="left",
        )
        device = self._backbone.device
        fused_TD = torch.cat([one.to(device) for one in fused])
        return self._backbone.embed(packed.to(device), self._backbone.see(shown), fused_TD)

    def _before(self, job: Job, prompts: Embedded, length: int) -> tuple[Prefix, bool] | None:
        """What stands before the last turn, and whether it was computed just now; None where it is read with
        the question."""
        if job.prefix is None or not self._can_split(job.method):
            return None
        known = self.prefixes.get(job.prefix)
        if known is not None:
            return known, False
        columns = length - job.method.demonstration_tokens(job.turns[-1], job.pictures)
        if columns < SHORTEST_PREFIX:
            return None
        head = prompts.head(0, columns)
        with job.method.applied(head):
            cache = self._backbone.read(head, use_cache=True).past_key_values
        prefix = Prefix(cache, columns, _nbytes(cache))
        self.prefixes.put(job.prefix, prefix)
        return prefix, True

    def _can_split(self, method: Method) -> bool:
        """Whether tokens before a question do not depend on it."""
        family = self._backbone.family
        return family.decoder is None and family.attends != "prefix" and method.writes_turns_apart

    def _refuse_too_long(self, job: Job, prompt_tokens: int) -> None:
        most, limit = max(one.max_new_tokens for one in job.samplings), context_length(self._backbone)
        if prompt_tokens + most > limit:
            raise DataError(
                f"the prompt takes {prompt_tokens} tokens and the answer may take {most}, the model reads "
                f"{limit}: register the demonstrations as a demo_pack, or lower max_tokens"
            )

    def _grow(self, batch: _Batch) -> None:
        """Choose the next token of every row; those that end leave."""
        end, scores_BV = self._backbone.tokenizer.eos_token_id, batch.decoding.scores_BV
        samplings = [row.sampling for row in batch.rows]
        tokens = choose(scores_BV, samplings, [row.count for row in batch.rows])
        for place, (row, token) in enumerate(zip(batch.rows, tokens, strict=True)):
            if row.job.cancelled or row.stopped:
                continue
            if token == end:
                row.stopped = True
                row.job.tell(Ended(row.index, "stop"))
                continue
            row.token, row.count = token, row.count + 1
            count = row.sampling.top_logprobs
            told = likelihood(scores_BV[place], token, count) if count is not None else None
            row.job.tell(Grown(row.index, token, told))
            if row.count == row.sampling.max_new_tokens and not row.stopped:
                row.stopped = True
                row.job.tell(Ended(row.index, "length"))
        self._leave(batch)

    def _leave(self, batch: _Batch) -> None:
        going_on = [
            place for place, row in enumerate(batch.rows) if not row.stopped and not row.job.cancelled
        ]
        if len(going_on) < len(batch.rows):
            batch.rows = [batch.rows[place] for place in going_on]
            if going_on:
                batch.decoding.keep(going_on)

    def _join(self) -> None:
        """One batch of all that can be computed together."""
        batches = [batch for batch in self._batches if batch.rows]
        joined = [batch for batch in batches if batch.decoding.can_join]
        for batch in joined[1:]:
            joined[0].decoding.join(batch.decoding)
            joined[0].rows += batch.rows
        self._batches = [*joined[:1], *(batch for batch in batches if not batch.decoding.can_join)]


def _renamed(turns: Sequence[Turn], number: int) -> list[Turn]:
    """Turns whose pictures have keys of their own among those of other jobs."""
    return [
        Turn(tuple(f"{number}/{key}" for key in turn.pictures), turn.question, turn.answer, turn.scored)
        for turn in turns
    ]


def _nbytes(cache: object) -> int:
    layers = getattr(cache, "layers", ())
    return sum(one.nbytes for layer in layers for one in (layer.keys, layer.values))
