"""Whether an answer to a yes-no question says yes or no, as the scripts of MME and of POPE read it.

Both are kept to the letter, odd as they are, because published numbers were read that way: MME's takes the
"no" of "note" for an answer, and POPE's takes whatever does not say no for a yes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mmicl_core.evaluation.tasks.base import Item

__all__ = ["YES_NO", "exchange_yes_no", "said_at_once", "said_in_first_sentence"]

YES_NO = ("yes", "no")
"""The answers of items that ask yes-no questions."""

NEGATIONS = frozenset({"No", "not", "no"})
BEGINNING = 4


def said_at_once(answer: str) -> Literal["yes", "no", "other"]:
    """What the first four characters hold, whatever the case: "yes", else "no", else neither.

    It is how `calculation.py` of MME (arXiv:2306.13394) reads an answer. An answer of more lines, which the
    files of that script cannot hold, is read from its beginning like any other.
    """
    beginning = answer.lower()[:BEGINNING]
    if "yes" in beginning:
        return "yes"
    return "no" if "no" in beginning else "other"


def said_in_first_sentence(answer: str) -> Literal["yes", "no"]:
    """No if a word before the first full stop is "No", "no" or "not", else yes.

    It is how `evaluate.py` of POPE (arXiv:2305.10355) reads an answer: commas are dropped, nothing but spaces
    divides words, and case counts.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "yes" if NEGATIONS.isdisjoint(words) else "no"


def exchange_yes_no(items: Sequence[Item]) -> list[Item]:
    """Answered items, yes in the place of no and no in the place of yes."""
    yes, no = YES_NO
    return [replace(item, answer=no if item.answer == yes else yes) for item in items]
