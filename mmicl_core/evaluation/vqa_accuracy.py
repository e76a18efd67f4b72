"""The accuracy of VQA (arXiv:1505.00468, section 4; arXiv:1612.00837), as its evaluation code computes it.

    normalised(answer), normalised(what each of ten people said)
    for each of them: min(how many of the other nine said it / 3, 1), and the mean of these ten

What text becomes: marks of punctuation go, or become a space; a period stays before a digit alone; case goes;
number words become digits; articles go; a contraction without its apostrophe gets it back.

The code has habits that its description does not tell and that scores depend on:
- Where all people said the same, nothing is normalised on either side: `Yes` is wrong where ten said `yes`.
- With a comma between two digits anywhere, every mark is taken out without a space in its place.
- The table of contractions has one entry the wrong way round.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["normalised", "vqa_accuracy"]

ENOUGH = 3
"""People who must have said the same for an answer to be fully right."""

MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""In the order in which they are replaced. Colons and apostrophes stay: `10:30`, `girl's`."""
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32
"""The official code passes a flag where the number of replacements belongs, and this is its value."""

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))

CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
"""
"""The right side of the official table. `I'm` and its like stand there with a capital, which no text has when
they are looked up; `she'd` and `we'll` do not, because `shed` and `well` are words."""

RESTORED = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A contraction by how it is written with one apostrophe missing."""


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """How much of the way to fully right an answer is, between 0 and 1.

    Args:
        references: what each person said, ten in all official data sets.
    """
    said, truths = _on_one_line(answer), [_on_one_line(truth) for truth in references]
    if len(set(truths)) > 1:
        said, truths = normalised(said), [normalised(truth) for truth in truths]
    count = truths.count(said)
    # Those who said it have one less among the others than those who did not.
    points = count * _credit(count - 1) + (len(truths) - count) * _credit(count)
    return points / len(truths)


def normalised(text: str) -> str:
    """An answer without what does not tell answers apart."""
    words = (NUMBERS.get(word, word) for word in _without_marks(text).lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def _credit(others: int) -> float:
    return min(others / ENOUGH, 1.0)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    has_number = COMMA_IN_NUMBER.search(text) is not None
    left = text
    for mark in MARKS:
        stands_at_a_space = f"{mark} " in text or f" {mark}" in text
        left = left.replace(mark, "" if stands_at_a_space or has_number else " ")
    return PERIOD.sub("", left, count=MOST_PERIODS)
