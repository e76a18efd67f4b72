"""Does a model learn from its demonstrations, or only from their form? What is changed, and what follows.

    shuffled     their answers dealt out anew among them                    falls
    swapped      each of two classes under the other's name                 falls
    blank        grey in place of their pictures                            falls
    other        those of another query                                     falls where queries have their own
    reversed     in reverse order                                           stays
    query_rule   the same rule asked about another query, which has         stays
                 another answer: one vector for all queries must fail

The query, and what counts as right, never change; under `query_rule` both are the other query's. That wrong
labels must cost a model its answers is the test of a causal link in Tai et al. (arXiv:2308.07891).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mmicl_core.config.evaluate import Control
from mmicl_core.evaluation.tasks.base import Item, Task

__all__ = ["BLANK", "CONTROLS", "Direction", "Shown", "change", "expected"]

Direction = Literal["falls", "stays"]

BLANK = "blank:"
"""Before the key of a picture: a grey one of its size."""

CONTROLS: Mapping[Control, str] = {
    "shuffled": "answers dealt out anew",
    "swapped": "the two names swapped",
    "blank": "blank pictures",
    "other": "another query's demonstrations",
    "reversed": "order reversed",
    "query_rule": "the other class asked",
}


@dataclass(frozen=True)
class Shown:
    """A query behind its demonstrations."""

    query: Item
    demonstrations: tuple[Item, ...]


def expected(control: Control, *, own: bool) -> Direction:
    """What the score of a model that learns from its demonstrations does.

    Args:
        own: whether queries have demonstrations of their own, without which they cannot be answered.
    """
    if control in ("reversed", "query_rule") or (control == "other" and not own):
        return "stays"
    return "falls"


def change(task: Task, shown: Shown, control: Control, other: Shown | None, seed: int) -> Shown | None:
    """The same under a control; None where the task, or so few demonstrations, do not have it.

    Args:
        other: another query of the same task with its demonstrations, which say something else.
        seed: of what is shuffled.
    """
    query, demonstrations = shown.query, shown.demonstrations
    if not demonstrations:
        return None
    if control == "shuffled":
        return _shuffle(shown, random.Random(f"{seed}/{task.name}/{query.id}/shuffled"))
    if control == "swapped":
        exchanged = task.exchanged(query, demonstrations)
        return None if exchanged is None else replace(shown, demonstrations=tuple(exchanged))
    if control == "blank":
        if not any(item.pictures for item in demonstrations):
            return None
        blank = (
            replace(item, pictures=tuple(BLANK + key for key in item.pictures)) for item in demonstrations
        )
        return replace(shown, demonstrations=tuple(blank))
    if control == "other":
        if other is None or other.demonstrations == demonstrations:
            return None
        return replace(shown, demonstrations=other.demonstrations)
    if control == "reversed":
        return replace(shown, demonstrations=demonstrations[::-1]) if len(demonstrations) > 1 else None
    turned = task.counterpart(query, demonstrations)
    return None if turned is None else Shown(turned[0], tuple(turned[1]))


def _shuffle(shown: Shown, rng: random.Random) -> Shown | None:
    answers = [item.answer for item in shown.demonstrations]
    if len(set(answers)) < 2:
        return None
    dealt = list(answers)
    while dealt == answers:
        rng.shuffle(dealt)
    changed = (replace(item, answer=answer) for item, answer in zip(shown.demonstrations, dealt, strict=True))
    return replace(shown, demonstrations=tuple(changed))
