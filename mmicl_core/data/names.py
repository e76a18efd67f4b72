"""What an episode calls its classes: made-up names, random letters, or true names.

A name that no corpus holds can only be learnt from the demonstrations, so a right answer shows that the
model read them. Made-up names are pronounceable; random letters are what the released code of link-context
learning (arXiv:2308.07891) gives to the first class.

The names of an episode never lie inside one another, whatever their case: an answer that holds one of them
would else hold both, and could not be scored.
"""

from __future__ import annotations

import random
from string import ascii_lowercase

from mmicl_core.config.episodes import Naming

__all__ = ["SYLLABLES", "clash", "draw_names", "made_up_names", "random_letters"]

ONSETS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = tuple(onset + vowel for onset in ONSETS for vowel in VOWELS)
"""70 open syllables; two of them make a name."""

MOST_LETTERS = 10
# A true name can hold most short strings only if it is thousands of letters long.
MOST_TRIES = 1000


def made_up_names(rng: random.Random, count: int = 2) -> list[str]:
    """Draw `count` names, each of two syllables that no other name of the draw uses."""
    syllables = rng.sample(SYLLABLES, 2 * count)
    return [first + second for first, second in zip(syllables[::2], syllables[1::2], strict=True)]


def random_letters(rng: random.Random) -> str:
    """Draw 1 to 10 lower-case letters; every length is as likely as any other."""
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(1, MOST_LETTERS)))


def clash(one: str, other: str) -> bool:
    """Whether one name is the other or lies inside it, whatever the case."""
    one, other = one.casefold(), other.casefold()
    return one in other or other in one


def draw_names(
    naming: tuple[Naming, Naming], true_names: tuple[str, str], rng: random.Random
) -> tuple[str, str] | None:
    """Draw the names of two classes again until they do not clash.

    Returns:
        The names, or None where none fit: both are true names that clash, or a true name holds everything.
    """
    for _ in range(MOST_TRIES):
        made_up = iter(made_up_names(rng, naming.count("made_up")))
        first, second = (
            next(made_up) if kind == "made_up" else random_letters(rng) if kind == "random_letters" else true
            for kind, true in zip(naming, true_names, strict=True)
        )
        if not clash(first, second):
            return first, second
    return None
