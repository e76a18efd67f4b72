"""Scores as counts first, ratios last, so that shards add up."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["names_as_released", "names_exactly", "names_only", "wilson_interval"]

UNREAD = str.maketrans("", "", "\"'.")


def names_only(answer: str, right: str, other: str) -> bool:
    """Whether an answer contains the right name and not the other; case does not count.

    Where one name lies in the other ("octopus" in "octopus vacuum"), the longer one is meant where it stands.
    An answer that names both, or neither, is wrong, so chance is below one half.
    """
    said, right, other = answer.lower(), right.lower(), other.lower()
    apart = said.replace(right, "\n") if other in right else said
    return right in said and other not in apart


def names_as_released(answer: str, right: str, other: str) -> bool:
    """The same as the released code of link-context learning counts it, to compare with its numbers.

    The names are written small and the answer is not, so that a capital letter makes it wrong. The right name
    loses its quotation marks and full stops, and is cut out of the answer before the other is looked for, so
    that "octopus" is right where "octopus vacuum" is said.
    """
    right = right.lower().translate(UNREAD).strip()
    return right in answer and other.lower() not in answer.replace(right, "")


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
