"""What an episode may be. A task is a function (slot, its settings, pool, random numbers) -> plan or reason.

Each task has a file here, settings in `mmicl_core.config.episodes` and a line in `GROUPINGS` of the pool.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from mmicl_core.data.plans import Plan, Slot
from mmicl_core.data.pool import Pool
from mmicl_core.data.tasks.caption import plan_caption
from mmicl_core.data.tasks.instruction import plan_instruction
from mmicl_core.data.tasks.interleaved import plan_interleaved
from mmicl_core.data.tasks.kind import plan_kind
from mmicl_core.data.tasks.same_task import plan_same_task
from mmicl_core.data.tasks.two_way import plan_two_way

__all__ = ["TASKS"]

TASKS: Mapping[str, Callable[[Slot, Any, Pool, random.Random], Plan | str]] = {
    "two_way": plan_two_way,
    "caption": plan_caption,
    "interleaved": plan_interleaved,
    "same_task": plan_same_task,
    "instruction": plan_instruction,
    "kind": plan_kind,
}
