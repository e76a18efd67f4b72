"""Scores as counts first, ratios last, so that shards add up."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["names_exactly", "names_only", "wilson_interval"]


def names_only(answer: str, right: str, other: str) -> bool:
    """Whether an answer contains the right name and not the other; case does not count.

    An answer that names both, or neither, is wrong, so chance is below one half.
    """
    said = answer.lower()
    return right.lower() in said and other.lower() not in said


def names_exactly(answer: str, right: str) -> bool:
    """Whether an answer is the right name and nothing else; case does not count.

    True names contain one another ("cat", "cat face"), so that containing is not enough.
    """
    return answer.strip().lower() == right.lower()


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a proportion by Wilson's score (1927), which stay right near 0 and 1."""
    assert 0 <= successes <= trials and trials > 0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At no success, or nothing but success, one bound is the share itself, which rounding would miss.
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))
