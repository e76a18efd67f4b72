"""Reading prompts: what of each is known already, and the rest of several in one pass.

    [soft tokens, template's prefix]    once for each method
    [system, fused tokens, turns]       once for each name that a job gives it, if it gives one
    [last turn]                         for each job, behind one or both of these

What is known has keys and values of its own length, and is padded on the left among others. Methods that make
one prompt of a whole conversation, encoder-decoders, and models that see a question from what stands before
it, read every prompt as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mmicl_core.backbones.caches import changed, side_by_side
from mmicl_core.backbones.decoding import Decoding, can_pad_behind, context_length
from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.language import Embedded
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError
from mmicl_core.methods.base import Method
from mmicl_core.prompts import Piece, Prompt, Turn, count_text, places
from mmicl_core.serving.jobs import Job
from mmicl_core.serving.prefixes import Prefix, Prefixes

__all__ = ["Plan", "Prefill", "embed_alone"]

# A prefix shorter than this is computed anew in less time than it takes to look it up.
SHORTEST_PREFIX = 16

Shown = tuple[PreparedPicture, str]
"""A picture, and what is asked about it."""


@dataclass(frozen=True)
class _Part:
    """A stretch of a prompt, not read yet."""

    pieces: Prompt
    shown: tuple[Shown, ...]
    fused: tuple[torch.Tensor, ...]
    length: int


@dataclass(frozen=True, eq=False)
class Plan:
    """How the prompt of a job is read."""

    job: Job
    before: Prefix | None
    """What is known."""
    head: _Part | None
    """What is read first, and kept by the job's name for it."""
    tail: _Part
    """What is read for this job alone."""
    cached: int
    """Columns that were read for others."""
    demo_tokens: int

    @property
    def read_first(self) -> int:
        """Tokens of the head."""
        return self.head.length if self.head is not None else 0

    @property
    def prompt_tokens(self) -> int:
        """All columns of the prompt."""
        known = self.before.length if self.before is not None else 0
        return known + self.read_first + self.tail.length


class Prefill:
    """Reads prompts of jobs.

    Args:
        backbone: the model of all methods of jobs.
        prefixes: where what jobs name is kept.
    """

    def __init__(self, backbone: HuggingFaceBackbone, prefixes: Prefixes) -> None:
        self._backbone, self._prefixes = backbone, prefixes
        self._splits = backbone.family.decoder is None and backbone.family.attends != "prefix"
        self._pads = self._splits and can_pad_behind(backbone)
        self._limit = context_length(backbone)
        self._openings = WeakKeyDictionary[Method, dict[bool, Prefix | None]]()

    def plan(self, job: Job) -> Plan:
        """Look at a job.

        Raises:
            DataError: a text holds control tokens, the prompt is too long, or the model takes no such.
        """
        plan = self._plan(job) if job.method.writes_turns_apart else _plan_whole(job)
        if job.method.writes_turns_apart:
            self._refuse_too_long(job, plan.prompt_tokens)
        return plan

    def alike(self, plan: Plan, other: Plan) -> bool:
        """Whether two prompts may be read in one pass."""
        if plan.job.method is not other.job.method:
            return False
        if self._pads or (plan.before is other.before is None and plan.head is other.head is None):
            return True
        same = plan.before is other.before and plan.head is other.head is None
        return same and plan.tail.length == other.tail.length

    @torch.no_grad()
    def read(self, plans: Sequence[Plan]) -> tuple[Decoding, list[tuple[int, int]]]:
        """Read prompts of one method.

        Returns:
            What goes on from them, and of each the length and how much of it was read for others.
        """
        method = plans[0].job.method
        if not method.writes_turns_apart:
            return self._read_whole(method, plans)
        befores, cached = self._befores(plans)
        prompts = _embed(method, [plan.tail for plan in plans])
        if not self._splits:
            prompts = method.behind_opening(prompts)
        prompts, cache = _behind(prompts, befores)
        decoding = Decoding(self._backbone, prompts, cache)
        lengths = prompts.mask_behind(0 if cache is None else cache.get_seq_length()).sum(1).tolist()
        return decoding, list(zip(lengths, cached, strict=True))

    def _plan(self, job: Job) -> Plan:
        method, (*earlier, last) = job.method, job.turns
        question = _part(method, method.write_turn(last), [last], job)
        if self._splits and (known := self._known(job)) is not None:
            return Plan(job, known, None, question, known.length, known.demo_tokens)
        opening, is_new = self._opening(method, with_prefix=job.system is None)
        covered = opening is not None and job.system is None
        head, demo_tokens = _head(job, earlier, [] if covered else method.chat.prefix(job.system))
        cached = 0 if opening is None or is_new else opening.length
        if job.prefix is not None and self._is_worth_keeping(head):
            return Plan(job, opening, head, question, cached, demo_tokens)
        return Plan(job, opening, None, _joined(head, question), cached, demo_tokens)

    def _known(self, job: Job) -> Prefix | None:
        if job.known is not None or job.prefix is None:
            return job.known
        return self._prefixes.get(job.prefix)

    def _is_worth_keeping(self, head: _Part) -> bool:
        return self._splits and self._prefixes.keeps_any and head.length >= SHORTEST_PREFIX

    def _opening(self, method: Method, *, with_prefix: bool) -> tuple[Prefix | None, bool]:
        """What stands before every prompt of a method, and whether it was read just now."""
        if not self._splits:
            return None, False
        made = self._openings.setdefault(method, {})
        if is_new := with_prefix not in made:
            made[with_prefix] = self._read_opening(method, method.chat.prefix() if with_prefix else [])
        return made[with_prefix], is_new

    @torch.no_grad()
    def _read_opening(self, method: Method, pieces: Prompt) -> Prefix | None:
        if method.opening() is None and count_text(pieces) < SHORTEST_PREFIX:
            return None
        part = _Part(pieces, (), (), count_text(pieces))
        return self._kept(method.behind_opening(_embed(method, [part])), None)

    def _befores(self, plans: Sequence[Plan]) -> tuple[list[Prefix | None], list[int]]:
        """What stands before each tail, read where it was not known; and how much of it was."""
        befores, cached, made = list[Prefix | None](), list[int](), dict[str, Prefix]()
        for plan in plans:
            before, count, name = plan.before, plan.cached, plan.job.prefix
            if plan.head is not None:
                assert name is not None
                before = made.get(name) or self._prefixes.get(name)
                if before is not None:
                    count = before.length
                else:
                    before = made[name] = self._read_head(plan, plan.head)
                    self._prefixes.put(name, before)
            befores.append(before)
            cached.append(count)
        return befores, cached

    def _read_head(self, plan: Plan, head: _Part) -> Prefix:
        return self._kept(_embed(plan.job.method, [head]), plan.before, plan.demo_tokens)

    def _kept(self, prompts: Embedded, before: Prefix | None, demo_tokens: int = 0) -> Prefix:
        prompts, cache = _behind(prompts, [before])
        columns = before.length if before is not None else 0
        output = self._backbone.read(prompts, use_cache=True, past_key_values=_copied(cache))
        next_position = int(prompts.last_positions()) + 1 + columns
        length = columns + prompts.mask_BL.shape[1]
        return Prefix(output.past_key_values, length, next_position, demo_tokens)

    def _read_whole(self, method: Method, plans: Sequence[Plan]) -> tuple[Decoding, list[tuple[int, int]]]:
        pictures = {
            f"{number}/{key}": picture
            for number, plan in enumerate(plans)
            for key, picture in plan.job.pictures.items()
        }
        conversations = [_renamed(plan.job.turns, number) for number, plan in enumerate(plans)]
        prompts = method.embed(method.arrange(conversations, pictures, "left"))
        lengths = prompts.mask_BL.sum(1).tolist()
        for plan, length in zip(plans, lengths, strict=True):
            self._refuse_too_long(plan.job, length)
        with method.applied(prompts):
            return Decoding(self._backbone, prompts), [(length, 0) for length in lengths]

    def _refuse_too_long(self, job: Job, prompt_tokens: int) -> None:
        if not self._splits and (opening := job.method.opening()) is not None:
            prompt_tokens += len(opening[0])
        job.refuse_longer_than(self._limit, prompt_tokens)


@torch.no_grad()
def embed_alone(job: Job) -> tuple[Embedded, int]:
    """The whole prompt of a job, for whoever reads embeddings, and how much of it is demonstrations.

    Raises:
        DataError: a text holds control tokens, or the model takes no such.
    """
    method, (*earlier, last) = job.method, job.turns
    if not method.writes_turns_apart:
        plan = _plan_whole(job)
        return method.embed(method.arrange([job.turns], job.pictures, "left")), plan.demo_tokens
    head, demo_tokens = _head(job, earlier, method.chat.prefix(job.system))
    question = _part(method, method.write_turn(last), [last], job)
    return method.behind_opening(_embed(method, [_joined(head, question)])), demo_tokens


def _head(job: Job, earlier: Sequence[Turn], beginning: Prompt) -> tuple[_Part, int]:
    """What stands before the last turn, and how much of it is demonstrations."""
    pieces = [*beginning, *places(len(job.fused))]
    pieces += [piece for turn in earlier for piece in job.method.write_turn(turn)]
    head = _part(job.method, pieces, earlier, job, job.fused)
    return head, head.length - count_text(beginning)


def _plan_whole(job: Job) -> Plan:
    """Of a method that makes one prompt of a conversation; lengths are those of all turns written out, which
    is what is looked at."""
    method, kind = job.method, type(job.method).__name__
    if job.fused:
        raise DataError(f"{kind} reads demonstrations itself and takes no fused ones: send them as turns")
    if job.system is not None:
        raise DataError(
            f"models of {kind} take no system message: write the instructions into the first question"
        )
    written = [Method.demonstration_tokens(method, turn, job.pictures) for turn in job.turns]
    demo_tokens = sum(method.demonstration_tokens(turn, job.pictures) for turn in job.turns[:-1])
    return Plan(job, None, None, _Part([], (), (), sum(written)), 0, demo_tokens)


def _part(
    method: Method,
    pieces: Prompt,
    turns: Iterable[Turn],
    job: Job,
    fused: tuple[torch.Tensor, ...] = (),
) -> _Part:
    shown = tuple((job.pictures[key], turn.question) for turn in turns for key in turn.pictures)
    visual = sum(len(picture.ids) + method.tokens_per_picture for picture, _ in shown)
    length = count_text(pieces) + visual + sum(len(one) for one in fused)
    return _Part(pieces, shown, fused, length)


def _joined(first: _Part, second: _Part) -> _Part:
    pieces: list[Piece] = [*first.pieces, *second.pieces]
    fused = (*first.fused, *second.fused)
    return _Part(pieces, (*first.shown, *second.shown), fused, first.length + second.length)


def _embed(method: Method, parts: Sequence[_Part]) -> Embedded:
    """Parts side by side, padded on the left."""
    fused = [one for part in parts for one in part.fused]
    shown = [one for part in parts for one in part.shown]
    batch = method.pack([part.pieces for part in parts], shown, "left", [len(one) for one in fused])
    device = method.backbone.device
    fused_TD = torch.cat([one.to(device) for one in fused]) if fused else None
    return method.embed_without_opening(batch, fused_TD)


def _behind(prompts: Embedded, befores: Sequence[Prefix | None]) -> tuple[Embedded, Any]:
    """Prompts behind what is known of each, and its keys and values side by side."""
    longest = max((one for one in befores if one is not None), key=lambda one: one.length, default=None)
    if longest is None:
        return prompts, None
    device = prompts.mask_BL.device
    lengths = [0 if one is None else one.length for one in befores]
    positions = [0 if one is None else one.next_position for one in befores]
    empty_B1 = longest.length - torch.tensor(lengths, device=device)[:, None]
    before_BP = (torch.arange(longest.length, device=device) >= empty_B1).long()
    behind = prompts.behind(before_BP, torch.tensor(positions, device=device))
    if all(one is longest for one in befores):
        return behind, longest.cache
    nothing = changed(longest.cache, lambda rows_BHLE: rows_BHLE[..., :0, :])
    caches = [nothing if one is None else one.cache for one in befores]
    return behind, side_by_side(caches, longest.length)


def _copied(cache: Any) -> Any:
    return None if cache is None else changed(cache, lambda rows_BHLE: rows_BHLE)


def _renamed(turns: Sequence[Turn], number: int) -> list[Turn]:
    """Turns whose pictures have keys of their own among those of other jobs."""
    return [
        Turn(tuple(f"{number}/{key}" for key in turn.pictures), turn.question, turn.answer, turn.scored)
        for turn in turns
    ]
