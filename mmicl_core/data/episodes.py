"""Episodes: a pure function of (seed, number), the same whoever draws them, in whatever order and batches.

The number decides the shots, which neighbouring episodes share, by random numbers of its row of episodes.
Everything else comes from one stream that (seed, number) seeds: first the task, by the weights of the
mixture, then what the task draws (`mmicl_core.data.tasks`). The result is a plan, or the reason why there
is none; many plans become EPISODE rows at once.

    pool = open_pool(catalogues, neighbours, config)
    plans = [draw(number, pool, config) for number in range(config.total)]
    table = render([plan for plan in plans if not isinstance(plan, str)], pool)

Hazard: Python promises the same `random()` in every version, but not the same `choice` or `sample`; another
version of it may draw other episodes.
"""

from __future__ import annotations

import random
from functools import lru_cache
from math import exp

from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.data.plans import Plan, Slot, episode_id, parse_id, render
from mmicl_core.data.pool import Catalogues, Pool, needed_groupings, open_pool
from mmicl_core.data.tasks import TASKS

__all__ = [
    "Catalogues",
    "Plan",
    "Pool",
    "draw",
    "draw_shots",
    "episode_id",
    "needed_groupings",
    "open_pool",
    "parse_id",
    "render",
    "shot_weights",
    "shots_of",
]


def draw(number: int, pool: Pool, config: EpisodeConfig) -> Plan | str:
    """Draw episode `number`.

    Args:
        config: the one that the pool was opened with; only its seed and stages may be others.

    Returns:
        A plan, or the reason why there is none, which begins with the name of the task.
    """
    rng = random.Random(f"{config.seed}/{number}")
    (task,) = rng.choices(config.tasks, [task.weight for task in config.tasks])
    slot = Slot(config.seed, number, shots_of(number, config))
    plan = TASKS[task.type](slot, task, pool, rng)
    return f"{task.type}: {plan}" if isinstance(plan, str) else plan


def shots_of(number: int, config: EpisodeConfig) -> int:
    """Demonstrations of both classes together in a 2-way episode `number`, without drawing it."""
    first = 0
    for stage in config.stages:
        if number < first + stage.episodes:
            row = (number - first) // config.same_shots_in_a_row
            return _shots_of_row(stage, f"{config.seed}/shots/{first}/{row}")
        first += stage.episodes
    raise AssertionError(f"episode {number} is beyond the {first} of all stages")


def draw_shots(stage: ShotStage, rng: random.Random) -> int:
    """Draw a number of shots k by its weight."""
    weights = shot_weights(stage)
    return rng.choices([*weights], [*weights.values()])[0]


def shot_weights(stage: ShotStage) -> dict[int, float]:
    """The numbers of shots k of a stage, with weights in proportion to exp(growth * k), the largest 1."""
    low, high, growth = stage.min_shots_of_both_classes, stage.max_shots_of_both_classes, stage.growth
    # From the larger end, so that none overflows.
    most = max(growth * low, growth * high)
    shots = range(low, high + 1, 1 if stage.odd_shots else 2)
    return {k: exp(growth * k - most) for k in shots}


@lru_cache(maxsize=64)
def _shots_of_row(stage: ShotStage, seed: str) -> int:
    return draw_shots(stage, random.Random(seed))
