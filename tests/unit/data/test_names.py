from __future__ import annotations

import random
from itertools import combinations

from mmicl_core.data.names import SYLLABLES, made_up_names


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
