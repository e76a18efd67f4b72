"""How an answer is chosen, and how likely its tokens were, in plain values: no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Likelihood", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability, likeliest tokens first, that is drawn from."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end an answer, which do not belong to it."""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are told with each token; None tells no probabilities at all."""
    ignore_eos: bool = False
    """Whether it goes on to its last token, whatever the model would do."""


@dataclass(frozen=True)
class Likelihood:
    """A token, and those that were the likeliest in its place."""

    token: int
    logprob: float
    """Natural logarithm, before temperature and nucleus."""
    likeliest: tuple[tuple[int, float], ...]
