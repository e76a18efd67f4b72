"""Continuous batching: answers grow side by side by one token a step, and new ones begin in between.

    waiting --prefill, at most one group a step--> rows of a running batch --one token each--> texts

A step first reads the oldest waiting questions that may be read together, up to a number of tokens, then
gives every running answer one token. An answer that ends, is cancelled or runs out of time leaves its row at
once. Which others are in the batch does not change an answer: rows see themselves alone, and each draws by
its own seed. Only rounding differs, by which a draw that falls where two tokens meet may be the other one.
What fails of one job fails that job alone, and what fails in a step of a batch is told to all in it.

The engine belongs to one thread; jobs are added and cancelled from any.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mmicl_core.backbones.decoding import Decoding
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.serving.choosing import choose, likelihood
from mmicl_core.serving.jobs import Begun, Ended, Grown, Job, OutOfTimeError
from mmicl_core.serving.prefill import Plan, Prefill
from mmicl_core.serving.prefixes import Prefixes
from mmicl_core.serving.sampling import Sampling

__all__ = ["PREFILL_TOKENS", "Engine"]

PREFILL_TOKENS = 4096
"""Bounds the memory of one pass, and how long running answers wait for it."""


@dataclass(eq=False)
class _Row:
    """One growing answer."""

    job: Job
    index: int
    token: int = -1
    count: int = 0
    ended: bool = False

    @property
    def sampling(self) -> Sampling:
        return self.job.samplings[self.index]

    @property
    def goes_on(self) -> bool:
        return not (self.ended or self.job.cancelled or self.index in self.job.stopped)


@dataclass
class _Batch:
    """Rows that are computed together."""

    decoding: Decoding
    rows: list[_Row] = field(default_factory=list)


class Engine:
    """Answers jobs.

    Args:
        backbone: the model of all methods of jobs.
        most_rows: answers that grow at the same time.
        prefix_bytes: of keys and values that are kept for the next job with the same prefix.
        prefill_tokens: of prompts that are read in one step, if more than one is.
    """

    def __init__(
        self,
        backbone: HuggingFaceBackbone,
        most_rows: int,
        prefix_bytes: int,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self._backbone, self._most_rows, self._most_tokens = backbone, most_rows, prefill_tokens
        self.prefixes = Prefixes(prefix_bytes)
        self._prefill = Prefill(backbone, self.prefixes)
        self._added, self._waiting = deque[Job](), deque[Job]()
        self._batches: list[_Batch] = []
        self._next: Plan | None = None

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting) + len(self._added)

    @property
    def running(self) -> int:
        """Answers that grow."""
        return sum(len(batch.rows) for batch in self._batches)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._added and not self._waiting and not self._batches

    def add(self, job: Job) -> None:
        """Let a job wait for its turn."""
        self._added.append(job)

    @torch.no_grad()
    def step(self) -> None:
        """Begin what can begin, and give every answer one token."""
        while self._added:
            self._waiting.append(self._added.popleft())
        self._drop_what_is_over()
        begun = self._begin()
        for batch in self._batches:
            self._try(batch, self._feed)
        self._batches += begun
        self._join()

    def _drop_what_is_over(self) -> None:
        now = time.monotonic()
        late = [job for job in self._jobs() if job.deadline < now and not job.cancelled]
        for job in late:
            _end(job, OutOfTimeError("the deadline of the request has passed"))
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for batch in self._batches:
            self._try(batch, self._leave)
        self._batches = [batch for batch in self._batches if batch.rows]

    def _jobs(self) -> Iterator[Job]:
        yield from self._waiting
        yield from dict.fromkeys(row.job for batch in self._batches for row in batch.rows)

    def _begin(self) -> list[_Batch]:
        """Read the oldest jobs, as many as may be read together and there are rows for."""
        group = self._next_group()
        if not group:
            return []
        try:
            return self._read(group)
        except Exception as error:
            if len(group) == 1:
                _end(group[0].job, error)
                return []
        # One bad job does not fail those that were read with it.
        return [batch for plan in group for batch in self._read_alone(plan)]

    def _read_alone(self, plan: Plan) -> list[_Batch]:
        try:
            return self._read([plan])
        except Exception as error:
            _end(plan.job, error)
            return []

    def _next_group(self) -> list[Plan]:
        group, free = list[Plan](), self._most_rows - self.running
        while self._waiting:
            needed = len(self._waiting[0].samplings)
            # A job that needs more rows than there ever are begins where nothing else runs.
            if needed > free and (group or self.running):
                break
            plan = self._plan(self._waiting[0])
            if plan is not None and not self._fits(group, plan):
                break
            self._waiting.popleft()
            if plan is not None:
                group.append(plan)
                free -= needed
        return group

    def _plan(self, job: Job) -> Plan | None:
        """How a job is read; one that cannot be is told so."""
        if self._next is None or self._next.job is not job:
            try:
                self._next = self._prefill.plan(job)
            except Exception as error:
                _end(job, error)
                return None
        return self._next

    def _fits(self, group: Sequence[Plan], plan: Plan) -> bool:
        if not group:
            return True
        every = [*group, plan]
        tokens = len(every) * max(one.tail.length for one in every) + sum(one.read_first for one in every)
        return self._prefill.alike(group[0], plan) and tokens <= self._most_tokens

    def _read(self, group: Sequence[Plan]) -> list[_Batch]:
        began = time.monotonic()
        decoding, lengths = self._prefill.read(group)
        rows = [_Row(plan.job, index) for plan in group for index in range(len(plan.job.samplings))]
        if len(rows) > len(group):
            decoding.keep([place for place, plan in enumerate(group) for _ in plan.job.samplings])
        batch, running = _Batch(decoding, rows), self.running + len(rows)
        for plan, (length, cached) in zip(group, lengths, strict=True):
            plan.job.tell(Begun(length, cached, plan.demo_tokens, began, running))
        self._try(batch, self._grow)
        return [batch] if batch.rows else []

    def _try(self, batch: _Batch, work: Callable[[_Batch], None]) -> None:
        """Work on a batch; what fails is told to all in it, and ends them."""
        try:
            work(batch)
        except Exception as error:
            _fail(batch, error)

    def _feed(self, batch: _Batch) -> None:
        tokens = torch.tensor([row.token for row in batch.rows], device=self._backbone.device)
        batch.decoding.feed(tokens)
        self._grow(batch)

    def _grow(self, batch: _Batch) -> None:
        """Choose the next token of every row; those that end leave."""
        end, scores_BV = self._backbone.tokenizer.eos_token_id, batch.decoding.scores_BV
        broken = scores_BV.isnan().any(1).tolist()
        samplings = [row.sampling for row in batch.rows]
        allowed_BV = scores_BV.nan_to_num()
        if end is not None:
            allowed_BV[[place for place, one in enumerate(samplings) if one.ignore_eos], end] = float("-inf")
        tokens = choose(allowed_BV, samplings, [row.count for row in batch.rows])
        for place, (row, token) in enumerate(zip(batch.rows, tokens, strict=True)):
            if not row.goes_on:
                continue
            if broken[place]:
                _end(row.job, ArithmeticError("the model gives no numbers behind this prompt"))
            elif token == end:
                row.ended = True
                row.job.tell(Ended(row.index, "stop"))
            else:
                row.token, row.count = token, row.count + 1
                count = row.sampling.top_logprobs
                told = likelihood(scores_BV[place], token, count) if count is not None else None
                row.job.tell(Grown(row.index, token, told))
                if row.count == row.sampling.max_new_tokens and row.goes_on:
                    row.ended = True
                    row.job.tell(Ended(row.index, "length"))
        self._leave(batch)

    def _leave(self, batch: _Batch) -> None:
        going_on = [place for place, row in enumerate(batch.rows) if row.goes_on]
        if len(going_on) < len(batch.rows):
            batch.rows = [batch.rows[place] for place in going_on]
            if going_on:
                batch.decoding.keep(going_on)

    def _join(self) -> None:
        """One batch of all that can be computed together."""
        batches = [batch for batch in self._batches if batch.rows]
        joined = [batch for batch in batches if batch.decoding.can_join]
        for batch in joined[1:]:
            try:
                joined[0].decoding.join(batch.decoding)
            except Exception as error:
                # Half joined, neither can go on.
                _fail(joined[0], error)
                _fail(batch, error)
                break
            joined[0].rows += batch.rows
            batch.rows = []
        self._batches = [batch for batch in batches if batch.rows]


def _fail(batch: _Batch, error: Exception) -> None:
    for job in dict.fromkeys(row.job for row in batch.rows):
        _end(job, error)
    batch.rows = []


def _end(job: Job, error: Exception) -> None:
    if not job.cancelled:
        job.cancelled = True
        job.tell(Ended(0, "stop", error))
