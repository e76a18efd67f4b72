"""One picture with its whole conversation, every answer scored (M2PT, arXiv:2409.15657).

There are no demonstrations: the first turn shows the picture, the others go on about it. Every picture that
has a conversation is as likely as any other, unless its task also has pictures without one.
"""

from __future__ import annotations

import random

from mmicl_core.config.episodes import InstructionConfig
from mmicl_core.data import reasons
from mmicl_core.data.plans import NO_PICTURE, Plan, Slot
from mmicl_core.data.pool import Pool

__all__ = ["plan_instruction"]


def plan_instruction(slot: Slot, task: InstructionConfig, pool: Pool, rng: random.Random) -> Plan | str:
    """Draw a task by its number of pictures, and a picture of it that has a conversation."""
    section = pool.section(task.type)
    group = section.draw_by_pictures(rng)
    if group is None:
        return reasons.NO_TASK.format(1)
    pictures = section.worded(group, ("turns",))
    if not len(pictures):
        return reasons.NO_CONVERSATION
    picture = int(rng.choice(pictures))
    turns = section.catalogue.scan("turns")[picture].as_py()
    return Plan(
        slot,
        task.type,
        pictures=[picture, *[NO_PICTURE] * (len(turns) - 1)],
        questions=[turn["question"] for turn in turns],
        answers=[turn["answer"] for turn in turns],
        scored=[True] * len(turns),
        demonstrations=0,
    )
