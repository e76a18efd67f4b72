"""What the ingress asks of the replicas, in plain values: no torch and no Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mmicl_core.bank import Demonstration, Fused, Pack, PackEntry
from mmicl_core.prompts import Turn

__all__ = ["Answer", "Compressing", "Generating", "Question"]


@dataclass(frozen=True)
class Question:
    """A conversation whose last turn has no answer yet."""

    turns: tuple[Turn, ...]
    pictures: Mapping[str, bytes]
    """Encoded pictures by the references of the turns."""
    max_new_tokens: int
    fused: tuple[Fused, ...] = ()
    """Fused tokens of demonstrations, put before the first turn."""


@dataclass(frozen=True)
class Answer:
    """A whole answer and what it cost."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    """Positions of the prompt: text, visual and fused tokens."""
    completion_tokens: int
    ttft_ms: float
    """From the arrival of the question in the replica to its first token, in milliseconds."""


class Compressing(Protocol):
    """Makes packs of demonstrations and keeps them."""

    async def register(self, demonstrations: Sequence[Demonstration]) -> PackEntry:
        """Fuse and store demonstrations; those that are known are not read again."""
        ...

    async def describe(self, pack_id: str) -> PackEntry:
        """Token counts of a pack."""
        ...

    async def load(self, pack_id: str) -> Pack:
        """A pack with its fused tokens."""
        ...


class Generating(Protocol):
    """Answers questions."""

    async def answer(self, question: Question) -> Answer:
        """The whole answer."""
        ...

    def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        """Text as it grows, piece after piece, and the whole answer last."""
        ...
