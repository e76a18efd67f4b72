"""Demonstrations of the query's own task (MMICT, arXiv:2312.06363).

A task is drawn, every one as likely as any other, so a large one does not crowd out the others; then a
picture of it. Demonstrations are any other pictures of the task, or those whose embeddings are nearest to
the query's, the most similar one last (RICES, as OpenFlamingo evaluates). Nearest ones are looked for among
at most `pool` pictures of a task, those whose SHA-256 is smallest: a choice that no seed decides.

What is asked about a picture is the first question of its own conversation, or else its caption.
"""

from __future__ import annotations

import random

from mmicl_core.config.episodes import SameTaskConfig
from mmicl_core.data import reasons
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.plans import Plan, Slot
from mmicl_core.data.pool import Pool
from mmicl_core.data.sections import shuffled

__all__ = ["plan_same_task"]

WORDS = ("turns", "text")


def plan_same_task(slot: Slot, task: SameTaskConfig, pool: Pool, rng: random.Random) -> Plan | str:
    """Draw a task, a query, and demonstrations."""
    section = pool.section(task.type)
    count = task.demonstrations
    able = section.able(count).groups
    if not len(able):
        return reasons.NO_TASK.format(count + 1)
    group = int(rng.choice(able))
    pictures = section.worded(group, WORDS)
    if len(pictures) <= count:
        return reasons.NOTHING_TOLD.format(count + 1)
    query = int(rng.choice(pictures))
    if task.choice == "similar":
        candidates = pool.nearest(query, group, pictures, task.pool)
    else:
        candidates = shuffled(pictures, rng)
    shown = pool.guard(section, query).first(candidates, count)
    if shown is None:
        return reasons.LOOK_ALIKES
    turns = [*reversed(shown), query]
    told = [_first_turn(section.catalogue, picture, task.question) for picture in turns]
    questions, answers = zip(*told, strict=True)
    scored = [False] * count + [True]
    return Plan(slot, task.type, turns, questions, answers, scored, demonstrations=count)


def _first_turn(catalogue: Catalogue, picture: int, question: str) -> tuple[str, str]:
    turns, text = (catalogue.scan(name)[picture].as_py() for name in WORDS)
    return (turns[0]["question"], turns[0]["answer"]) if turns else (question, text)
