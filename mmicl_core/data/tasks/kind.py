"""One picture and the kind of thing that it shows, by the taxonomy of the corpus.

Without demonstrations it is classification as an instruction, like those of M2PT (arXiv:2409.15657), for
corpora that have a taxonomy and no conversations. With demonstrations, one of them, wherever it stands, is of
the query's kind and another concept, and the others are of other kinds: the query can be answered by the
picture that is most like it.
"""

from __future__ import annotations

import random
from functools import lru_cache

from mmicl_core.config.episodes import KindConfig
from mmicl_core.data import reasons
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.plans import Plan, Slot
from mmicl_core.data.pool import Pool
from mmicl_core.data.sections import Section, shuffled

__all__ = ["KIND_QUESTION", "kinds_of", "plan_kind"]

KIND_QUESTION = "What kind is it?"


def plan_kind(slot: Slot, task: KindConfig, pool: Pool, rng: random.Random) -> Plan | str:
    """Draw the query among all concepts of a kind that has enough others to show."""
    section = pool.section(task.type)
    kinds = kinds_of(section.catalogue)
    concept = next((group for group in shuffled(section.able(0).groups, rng) if kinds[group]), None)
    if concept is None:
        return reasons.NO_KIND
    query = rng.choice(section.asked(concept))
    shown = _shown(pool, section, concept, query, task.demonstrations, rng)
    if shown is None:
        return reasons.TOO_FEW_KINDS.format(task.demonstrations)
    rng.shuffle(shown)
    answers = [*(kind for _, kind in shown), kinds[concept]]
    return Plan(
        slot,
        task.type,
        pictures=[*(picture for picture, _ in shown), query],
        questions=[KIND_QUESTION] * len(answers),
        answers=answers,
        scored=[False] * len(shown) + [True],
        demonstrations=task.demonstrations,
    )


@lru_cache(maxsize=4)
def kinds_of(catalogue: Catalogue) -> tuple[str, ...]:
    """The kinds of all concepts in words; nothing where the corpus does not say."""
    told = catalogue.groups.column("subcategory").to_pylist()
    return tuple((kind or "").replace("-", " ").strip() for kind in told)


def _shown(
    pool: Pool, section: Section, concept: int, query: int, count: int, rng: random.Random
) -> list[tuple[int, str]] | None:
    """Pictures to show with their kinds, one of the query's own kind; None where there are too few."""
    if not count:
        return []
    kinds, guard = kinds_of(section.catalogue), pool.guard(section, query)
    found: list[tuple[int, str]] = []
    others: list[tuple[int, str]] = []
    for group in shuffled(section.showing().groups, rng):
        wanted = found if kinds[group] == kinds[concept] else others
        if group == concept or not kinds[group] or len(wanted) == (1 if wanted is found else count - 1):
            continue
        picture = guard.first(shuffled(section.shown(group), rng), 1)
        wanted += [(picture[0], kinds[group])] if picture else []
        if len(found) + len(others) == count:
            return [*found, *others]
    return None
