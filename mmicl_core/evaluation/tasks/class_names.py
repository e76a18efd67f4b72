"""Which of some class names an answer gives."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["class_named"]


def class_named(answer: str, names: tuple[str, ...]) -> str | None:
    """The only one of `names` that an answer holds as whole words; None where it holds none or several.

    Case does not count. Of a name inside another one, as in "fish" and "aquarium fish", the longer is meant.
    """
    found = set(_pattern(names).findall(answer.lower()))
    return next((name for name in names if name.lower() in found), None) if len(found) == 1 else None


@lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted((re.escape(name.lower()) for name in names), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")
