"""2-way episodes with hard negatives (link-context learning, arXiv:2308.07891, section 3.2).

An episode takes a concept and a neighbour of it, gives both a name, shows k pictures of both together in
random order and asks about one more, of either class by a fair coin. Neighbours are drawn by rank: of K, the
j-th has the weight K + 1 - j, which is the paper's (101 - j) / 5050 at 100; those that have too few pictures
or a name that clashes are no candidates, and the others share their chance in proportion.

The released code differs: it counts shots for each class, names the first class alone by random letters,
and may show the picture that it asks about. No picture like the query's is shown here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mmicl_core.config.episodes import TwoWayConfig
from mmicl_core.data import reasons
from mmicl_core.data.names import clash, draw_names
from mmicl_core.data.neighbours import draw_weights
from mmicl_core.data.plans import Plan, Slot
from mmicl_core.data.pool import Pool
from mmicl_core.data.sections import Able, Section, shuffled
from mmicl_core.data.wordings import WORDINGS

__all__ = ["draw_neighbour", "plan_two_way"]


def plan_two_way(slot: Slot, task: TwoWayConfig, pool: Pool, rng: random.Random) -> Plan | str:
    """Draw the two classes, their names, and the pictures."""
    section = pool.section(task.type)
    drawn = _draw_classes(slot.shots, task, pool, section, rng)
    if isinstance(drawn, str):
        return drawn
    classes, names = drawn
    right = rng.randrange(2)
    query = rng.choice(section.asked(classes[right]))
    guard = pool.guard(section, query)
    fewer = slot.shots // 2
    # An odd picture goes to either class by a fair coin.
    first = slot.shots - fewer if slot.shots % 2 and rng.randrange(2) else fewer
    shown = list[tuple[int, str]]()
    for concept, name, count in zip(classes, names, (first, slot.shots - first), strict=True):
        pictures = guard.first(shuffled(section.shown(concept), rng), count)
        if pictures is None:
            return reasons.LOOK_ALIKES
        shown += [(picture, name) for picture in pictures]
    rng.shuffle(shown)
    named = [*(name for _, name in shown), names[right]]
    questions, answers = _words(task, named, rng)
    rank, similarity = _rank(pool, *classes)
    return Plan(
        slot,
        task.type,
        pictures=[*(picture for picture, _ in shown), query],
        questions=questions,
        answers=answers,
        scored=_scored(named, dense=task.answers_scored == "dense"),
        demonstrations=slot.shots,
        other=names[1 - right],
        concepts=classes,
        names=names,
        rank=rank,
        similarity=similarity,
    )


def draw_neighbour(able: np.ndarray[Any, np.dtype[np.bool_]], rng: random.Random) -> int | None:
    """Draw a place among neighbours, nearest first, by their weights; None if none is able.

    Args:
        able: (K,), which of them can be drawn.
    """
    # Whole numbers, so that the draw is the same on every machine.
    sums = np.cumsum(_weights(len(able)) * able)
    if not len(sums) or not sums[-1]:
        return None
    return int(np.searchsorted(sums, rng.randrange(int(sums[-1])), side="right"))


@lru_cache(maxsize=256)
def _weights(count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(draw_weights(count), dtype=np.int64)


def _draw_classes(
    shots: int, task: TwoWayConfig, pool: Pool, section: Section, rng: random.Random
) -> tuple[tuple[int, int], tuple[str, str]] | str:
    naming = (task.positive_name, task.negative_name)
    named = "true_name" in naming
    # Both classes can show the larger half and be asked about, so that neither role tells which one is asked.
    needed = (shots + 1) // 2
    able = section.able(needed, named=named)
    if len(able.groups) < 2:
        reason = reasons.TOO_FEW_NAMED_CONCEPTS if named else reasons.TOO_FEW_CONCEPTS
        return reason.format(needed + 1)
    anchor = int(rng.choice(able.groups))
    hard = rng.random() < task.hard_negative_share
    candidates = _by_rank(pool.neighbours(anchor)[0], able, rng) if hard else shuffled(able.groups, rng)
    names_of = section.catalogue.names if naming == ("true_name", "true_name") else None
    negative = _first_apart(anchor, candidates, names_of)
    if isinstance(negative, str):
        return negative.format(needed + 1)
    true_names = ("", "")
    if named:
        true_names = (section.catalogue.names[anchor], section.catalogue.names[negative])
    names = draw_names(naming, true_names, rng)
    return reasons.NAMES_CLASH if names is None else ((anchor, negative), names)


def _by_rank(neighbours: Any, able: Able, rng: random.Random) -> Iterator[int]:
    # Who draws again without one candidate draws from the others in proportion.
    left = able.among[neighbours]
    while (place := draw_neighbour(left, rng)) is not None:
        yield int(neighbours[place])
        left[place] = False


def _first_apart(anchor: int, candidates: Iterator[int], names: Sequence[str] | None) -> int | str:
    reason = reasons.NO_NEIGHBOUR
    for candidate in candidates:
        if candidate != anchor:
            if names is None or not clash(names[anchor], names[candidate]):
                return candidate
            reason = reasons.NAMES_CLASH
    return reason


def _rank(pool: Pool, anchor: int, negative: int) -> tuple[int | None, float | None]:
    neighbours, similarity = pool.neighbours(anchor)
    places = np.flatnonzero(neighbours == negative)
    return (int(places[0]) + 1, float(similarity[places[0]])) if len(places) else (None, None)


def _words(task: TwoWayConfig, named: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Questions and answers of all turns, the query's last."""
    wording, question = WORDINGS[task.wording], rng.choice(task.questions)
    *shown, right = named
    questions = [wording.shown_question or question] * len(shown)
    asked = question
    if wording.asked_questions:
        asked = rng.choice(wording.asked_questions) if task.varied else wording.asked_questions[0]
    if questions:
        questions[0] = wording.opening + questions[0]
    answers = [wording.shown_answer.format(name=name) for name in shown]
    return [*questions, wording.asked_prefix + asked], [*answers, wording.asked_answer.format(name=right)]


def _scored(answers: list[str], *, dense: bool) -> list[bool]:
    scored = [False] * len(answers)
    met = set[str]()
    for place, answer in enumerate(answers if dense else ()):
        scored[place] = answer in met
        met.add(answer)
    scored[-1] = True
    return scored
