"""What the ingress asks of the replicas, in plain values: no torch and no Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from mmicl_core.bank import Demonstration, Fused, PackEntry
from mmicl_core.prompts import Turn
from mmicl_core.serving.sampling import Sampling

__all__ = [
    "Compressing",
    "Embeddings",
    "Event",
    "Finished",
    "Fusion",
    "Generating",
    "PackReference",
    "Piece",
    "Question",
    "ServedModel",
    "Started",
    "TokenLogprob",
]


@dataclass(frozen=True)
class PackReference:
    """A pack in the bank."""

    tenant: str
    pack_id: str


FusedTokens: TypeAlias = tuple[Fused, ...] | Awaitable[tuple[Fused, ...]] | PackReference
"""(T, D) for each demonstration: here, in Ray's object store, or in the bank."""


@dataclass(frozen=True)
class Fusion:
    """Demonstrations as fused tokens."""

    name: str
    """Digest of the fused tokens: equal names, equal tokens."""
    tokens_full: tuple[int, ...]
    """Of each demonstration, written out."""
    tokens_fused: tuple[int, ...]
    """Of each, fused."""
    known: int
    """How many of them the bank had."""
    fused: FusedTokens


@dataclass(frozen=True)
class Question:
    """A conversation whose last turn has no answer yet."""

    model: str
    """As requests name it."""
    turns: tuple[Turn, ...]
    pictures: Mapping[str, bytes]
    """Encoded pictures by the references of the turns."""
    samplings: tuple[Sampling, ...]
    """One for each answer that is wanted."""
    seconds: float
    """Until it is too late to answer."""
    fusion: Fusion | None = None
    """Fused demonstrations that stand before the first turn."""
    system: str | None = None
    """Instructions before everything else."""
    prefix: str | None = None
    """Digest of all that stands before the last turn, where that is worth keeping: equal digests, equal
    content."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer, how likely it was, and what else was likely in its place."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Started:
    """The prompt was read."""

    prompt_tokens: int
    """Positions of the prompt: text, visual and fused tokens."""
    cached_tokens: int
    """Of these, how many were read before, for another question."""
    demo_tokens_full: int
    """What earlier turns and fused demonstrations cost, were all of them written out."""
    demo_tokens: int
    """What they cost as they are, part of `prompt_tokens`."""
    queued_ms: float
    """From the arrival in the replica until the prompt began to be read."""
    batch: int
    """Answers that grow in the replica at this moment, those of this question included."""


@dataclass(frozen=True)
class Piece:
    """An answer has more text."""

    index: int
    text: str
    """May be empty: a token may hold half a character, or the beginning of what may be a stop text."""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """An answer is complete."""

    index: int
    reason: Literal["stop", "length"]
    completion_tokens: int
    ttft_ms: float
    """From the arrival of the question in the replica to the first token of this answer, in milliseconds."""


Event: TypeAlias = Started | Piece | Finished
"""`Started` comes first and once; each answer has pieces, which joined are its text, and ends once."""


@dataclass(frozen=True)
class ServedModel:
    """A model as a replica has loaded it."""

    id: str
    method: str
    """`base` where there is no adapter."""
    fuses: bool
    """Whether it turns demonstrations into fused tokens."""
    maker: Mapping[str, str]
    """What packs made by it were made by."""
    context_length: int
    """Most tokens of a prompt and its answer."""


@dataclass(frozen=True)
class Embeddings:
    """Pictures as vectors of length 1, and what they took."""

    vectors: tuple[tuple[float, ...], ...]
    tokens: int
    """Visual tokens of all pictures."""


class Compressing(Protocol):
    """Turns demonstrations into fused tokens. `model` names an adapter that can; errors: DataError for
    demonstrations that cannot be read, UnknownModelError, RequestError for a model that does not fuse."""

    async def fuse(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> Fusion:
        """Fuse; what the bank has of the tenant's demonstrations is not read again."""
        ...

    async def register(self, model: str, tenant: str, demonstrations: Sequence[Demonstration]) -> PackEntry:
        """Fuse and store as a pack; an equal pack of the tenant is given back as it is."""
        ...

    async def select(self, model: str, pack: PackReference, pictures: Sequence[bytes], count: int) -> Fusion:
        """The demonstrations of a pack that are nearest to pictures, nearest last (RICES)."""
        ...

    async def embed(self, pictures: Sequence[bytes]) -> Embeddings:
        """Pictures as vectors, in which near ones look alike."""
        ...


class Generating(Protocol):
    """Answers questions."""

    async def models(self) -> tuple[ServedModel, ...]:
        """All that it serves, the base model first."""
        ...

    async def answer(self, question: Question) -> tuple[Event, ...]:
        """All events at once.

        Raises:
            DataError: what was asked cannot be answered.
            BankError: its pack is gone, damaged, or of another model.
            DeadlineError: it came too late.
            OverloadedError: too many questions wait.
        """
        ...

    def stream(self, question: Question) -> AsyncGenerator[tuple[Event, ...], None]:
        """Events as they happen, in groups of those that happened together. Raises as `answer` does."""
        ...
