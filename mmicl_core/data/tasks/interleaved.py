"""Web documents as they lie: their earlier pairs before, a later one asked (AIM, arXiv:2406.07588).

The target is any pair of a document but the first, and the demonstrations are the pairs right before it, in
their order. Pairs without a text are passed over. Where a picture like the target's stands before it, its
text may give the answer away, and another target is drawn.
"""

from __future__ import annotations

import random

from mmicl_core.config.episodes import InterleavedConfig
from mmicl_core.data import reasons
from mmicl_core.data.plans import Plan, Slot
from mmicl_core.data.pool import Pool
from mmicl_core.data.sections import shuffled

__all__ = ["plan_interleaved"]


def plan_interleaved(slot: Slot, task: InterleavedConfig, pool: Pool, rng: random.Random) -> Plan | str:
    """Draw a document, every one as likely as any other, and a target in it."""
    section = pool.section(task.type)
    documents = section.able(1).groups
    if not len(documents):
        return reasons.NO_DOCUMENT
    numbers = section.asked(int(rng.choice(documents)))
    positions, texts = (
        section.catalogue.scan(name).slice(numbers.start, len(numbers)).to_pylist()
        for name in ("position", "text")
    )
    pairs = sorted(pair for pair in zip(positions, numbers, texts, strict=True) if pair[2])
    if len(pairs) < 2:
        return reasons.TOO_FEW_TEXTS
    for place in shuffled(range(1, len(pairs)), rng):
        shown = pairs[max(0, place - task.max_demonstrations) : place]
        guard = pool.guard(section, pairs[place][1])
        if all(guard.admits(picture) for _, picture, _ in shown):
            turns = [*shown, pairs[place]]
            return Plan(
                slot,
                task.type,
                pictures=[picture for _, picture, _ in turns],
                questions=[task.question] * len(turns),
                answers=[text for _, _, text in turns],
                scored=[False] * len(shown) + [True],
                demonstrations=len(shown),
            )
    return reasons.LOOK_ALIKES
