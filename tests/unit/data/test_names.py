from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, product

import pytest
from scipy.stats import chisquare

from mmicl_core.data.names import SYLLABLES, clash, draw_names, made_up_names, random_letters

NAMINGS = ("made_up", "random_letters", "true_name")
# A true name that most short strings lie in, and one that lies in many.
LONG, SHORT = "the quick brown fox jumps over a lazy Dog", "a"


def test_names_of_one_draw_share_no_syllable_and_none_contains_another() -> None:
    for seed in range(300):
        names = made_up_names(random.Random(seed), 3)
        syllables = [name[start : start + 2] for name in names for start in (0, 2)]
        assert set(syllables) <= set(SYLLABLES)
        assert len(set(syllables)) == len(syllables)
        assert not any(one in other or other in one for one, other in combinations(names, 2))


def test_names_are_rarely_the_same_in_two_draws() -> None:
    drawn = {tuple(made_up_names(random.Random(seed))) for seed in range(1000)}
    # 70 * 69 * 68 * 67 ordered draws: among 1,000 an equal pair of them has a chance of 2 in 100.
    assert len(drawn) >= 999


def test_random_letters_are_of_every_length_from_1_to_10_equally_often() -> None:
    rng = random.Random(0)
    names = [random_letters(rng) for _ in range(10_000)]
    lengths = Counter(map(len, names))
    assert sorted(lengths) == list(range(1, 11))
    assert chisquare(list(lengths.values())).pvalue > 1e-3
    letters = Counter("".join(names))
    assert "".join(sorted(letters)) == "abcdefghijklmnopqrstuvwxyz"
    assert chisquare(list(letters.values())).pvalue > 1e-3


@pytest.mark.parametrize(
    ("one", "other", "clashes"),
    [
        ("cat", "cat", True),
        ("cat", "Wild Cat", True),
        ("WILD CAT", "cat", True),
        ("cat", "cut", False),
        ("wild cat", "wild dog", False),
    ],
)
def test_names_clash_where_one_lies_inside_the_other_whatever_the_case(
    one: str, other: str, clashes: bool
) -> None:
    assert clash(one, other) == clash(other, one) == clashes


@pytest.mark.parametrize("naming", [*product(NAMINGS, repeat=2)])
def test_drawn_names_never_clash_and_are_of_the_kinds_asked_for(naming: tuple[str, str]) -> None:
    true_names = ("octopus", "vacuum")
    for seed in range(200):
        names = draw_names(naming, true_names, random.Random(seed))
        assert names is not None and not clash(*names)
        for kind, name, true in zip(naming, names, true_names, strict=True):
            assert (name == true) == (kind == "true_name")
            if kind == "made_up":
                assert name[:2] in SYLLABLES and name[2:] in SYLLABLES


@pytest.mark.parametrize("true", [LONG, SHORT])
@pytest.mark.parametrize("kind", ["made_up", "random_letters"])
def test_drawn_name_is_drawn_again_until_it_fits_beside_the_true_one(kind: str, true: str) -> None:
    for seed in range(200):
        names = draw_names((kind, "true_name"), ("unused", true), random.Random(seed))
        assert names is not None and names[1] == true and not clash(*names)


def test_names_that_cannot_be_told_apart_are_none() -> None:
    both = ("true_name", "true_name")
    assert draw_names(both, ("cat", "wild Cat"), random.Random(0)) is None
    everything = " ".join(one + other for one in SYLLABLES for other in SYLLABLES)
    assert draw_names(("made_up", "true_name"), ("", everything), random.Random(0)) is None
