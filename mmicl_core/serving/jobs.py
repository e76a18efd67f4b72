"""What the engine is asked, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError
from mmicl_core.methods.base import Method
from mmicl_core.prompts import Turn
from mmicl_core.serving.prefixes import Prefix
from mmicl_core.serving.sampling import Likelihood, Sampling

__all__ = ["Begun", "Ended", "Grown", "Happening", "Job", "OutOfTimeError"]


class OutOfTimeError(Exception):
    """A job whose deadline has passed."""


@dataclass(frozen=True)
class Begun:
    """The prompt was read."""

    prompt_tokens: int
    cached_tokens: int
    """Of these, how many were read before, for another question."""
    demo_tokens: int
    """Of these, what stands between the system message and the last turn."""
    began: float
    """When its reading began, by `time.monotonic`."""
    running: int
    """Answers that grow now, those of this job among them."""


@dataclass(frozen=True)
class Grown:
    """An answer has one more token."""

    index: int
    token: int
    likelihood: Likelihood | None


@dataclass(frozen=True)
class Ended:
    """An answer is complete; with an error, the whole job is over."""

    index: int
    reason: Literal["stop", "length"]
    error: Exception | None = None


Happening: TypeAlias = Begun | Grown | Ended


@dataclass(eq=False)
class Job:
    """One question to be answered, once for each of its samplings."""

    method: Method
    turns: tuple[Turn, ...]
    """The last one unanswered."""
    pictures: Mapping[str, PreparedPicture]
    """Those of all turns; of the last one alone where it is `known` what stands before."""
    samplings: tuple[Sampling, ...]
    tell: Callable[[Happening], None]
    """Called in the engine's thread with all that happens to it; it must not fail."""
    fused: tuple[Tensor, ...] = ()
    """Fused tokens of demonstrations, (T, D) each, which stand before the first turn."""
    system: str | None = None
    """Instructions before everything else."""
    prefix: str | None = None
    """The name of what stands before the last turn: the same name stands for the same content. None where it
    is not worth keeping."""
    known: Prefix | None = None
    """What stands before the last turn, where it was read already; `fused` is not needed then."""
    deadline: float = float("inf")
    """By `time.monotonic`."""
    cancelled: bool = False
    """Set from any thread; the engine then forgets it without another word."""
    stopped: set[int] = field(default_factory=set)
    """Answers that shall not grow any more, for texts that end answers. Set by `tell`."""

    def refuse_longer_than(self, limit: int, prompt_tokens: int) -> None:
        """Refuse what the model cannot read to the end of its longest answer.

        Args:
            limit: tokens that the model reads.

        Raises:
            DataError: it is too long; says by how much.
        """
        most = max(one.max_new_tokens for one in self.samplings)
        if prompt_tokens + most > limit:
            raise DataError(
                f"the prompt takes {prompt_tokens} tokens and the answer may take {most}, the model reads "
                f"{limit}: register the demonstrations as a demo_pack, or lower max_tokens"
            )
