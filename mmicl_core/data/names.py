"""Made-up names: pronounceable, of several letters, new in every episode.

A name that no corpus holds can only be learnt from the demonstrations, so a right answer shows that
the model read them. The two names of an episode share no syllable, and neither contains the other.
"""

from __future__ import annotations

import random

__all__ = ["SYLLABLES", "made_up_names"]

ONSETS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = tuple(onset + vowel for onset in ONSETS for vowel in VOWELS)
"""70 open syllables; two of them make a name."""


def made_up_names(rng: random.Random, count: int = 2) -> list[str]:
    """Draw `count` names, each of two syllables that no other name of the draw uses."""
    syllables = rng.sample(SYLLABLES, 2 * count)
    return [first + second for first, second in zip(syllables[::2], syllables[1::2], strict=True)]
