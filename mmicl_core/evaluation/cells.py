"""What is asked in an evaluation: for each task, numbers of demonstrations and controls, the same queries.

task, settings --lay_out--> cells: (shots, control) with every query behind its demonstrations
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from mmicl_core.config.evaluate import Control, EvaluateConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.controls import Shown, change
from mmicl_core.evaluation.demonstrations import Alike, choose
from mmicl_core.evaluation.tasks.base import Item, Questions, Task

__all__ = ["TEXT_ONLY", "Cell", "Layout", "lay_out", "sampled"]

TEXT_ONLY = 2
"""Demonstrations that OpenFlamingo's 0 shots have, without their pictures."""


@dataclass(frozen=True)
class Cell:
    """One number of shots of one task, as it is or under a control."""

    shots: int
    control: Control | None
    shown: tuple[Shown, ...]
    note: str = ""
    """What a reader has to know of it."""


@dataclass(frozen=True)
class Layout:
    """All cells of a task."""

    task: Task
    questions: Questions
    cells: tuple[Cell, ...]
    left_out: Mapping[str, int]
    """Queries that a cell does not have, by the reason why."""


def sampled(items: Sequence[Item], count: int | None, seed: int, what: str) -> list[Item]:
    """At most so many, drawn by the seed, in their own order."""
    if count is None or len(items) <= count:
        return list(items)
    places = random.Random(f"{seed}/{what}").sample(range(len(items)), count)
    return [items[place] for place in sorted(places)]


def lay_out(
    task: Task, config: EvaluateConfig, similar: Callable[[Questions], Alike] | None = None
) -> Layout:
    """Read a task and lay out all that is asked of it.

    Args:
        similar: ranks the pool by how alike pictures are; called where `config.demonstrations` asks for it.

    Raises:
        DataError: files are missing or wrong, there is nothing to ask, or too few demonstrations.
    """
    read = task.load()
    if not read.queries:
        raise DataError(f"task {task.name} has no questions: {task.source}")
    pool = read.pool if config.demonstrations in ("similar", "hard") else _pool(read, config)
    questions = replace(
        read, queries=sampled(read.queries, config.queries, config.seed, "queries"), pool=pool
    )
    shots, left_out = _possible_shots(task, config, len(questions.queries))
    compares = config.demonstrations in ("similar", "hard") and bool(pool)
    shows = max(shots) or config.style == "open_flamingo"
    alike = similar(questions) if similar is not None and compares and shows else None
    cells = [_cell(task, questions, config, count, alike) for count in shots]
    whole = cells[-1]
    for control in config.controls:
        changed = _changed(task, whole, control, config.seed)
        missing = len(whole.shown) - len(changed.shown)
        if missing:
            left_out[f"{control} does not apply"] = missing
        if changed.shown:
            cells.append(changed)
    return Layout(task, questions, tuple(cells), left_out)


def _pool(read: Questions, config: EvaluateConfig) -> list[Item]:
    return sampled(read.pool, config.pool, config.seed, "pool")


def _possible_shots(task: Task, config: EvaluateConfig, queries: int) -> tuple[list[int], dict[str, int]]:
    most = task.most_shots
    possible = [count for count in config.shots if most is None or count <= most]
    if not possible:
        raise DataError(
            f"task {task.name} takes at most {most} demonstrations, but evaluate.shots are "
            f"{list(config.shots)}: add {most}"
        )
    return possible, {
        f"{count} shots are too many": queries for count in config.shots if count not in possible
    }


def _cell(task: Task, questions: Questions, config: EvaluateConfig, shots: int, alike: Alike | None) -> Cell:
    def shown(query: Item, count: int) -> tuple[Item, ...]:
        how = config.demonstrations
        return tuple(choose(task, query, questions.pool, count, how, config.seed, alike))

    if shots or config.style != "open_flamingo" or task.most_shots == 0:
        return Cell(shots, None, tuple(Shown(query, shown(query, shots)) for query in questions.queries))
    return Cell(
        shots,
        None,
        tuple(
            Shown(query, tuple(replace(item, pictures=()) for item in shown(query, TEXT_ONLY)))
            for query in questions.queries
        ),
        note=f"{TEXT_ONLY} demonstrations without pictures",
    )


def _changed(task: Task, cell: Cell, control: Control, seed: int) -> Cell:
    """The queries that the control applies to."""
    answers = [frozenset(item.answer for item in shown.demonstrations) for shown in cell.shown]
    changed = (
        change(task, shown, control, other, seed)
        for place, shown in enumerate(cell.shown)
        for other in [_other(task, cell.shown, answers, place) if control == "other" else None]
    )
    return Cell(cell.shots, control, tuple(shown for shown in changed if shown is not None))


def _other(task: Task, shown: Sequence[Shown], answers: Sequence[frozenset[str]], place: int) -> Shown | None:
    """The next query with other demonstrations; where queries need their own, with other answers too.

    Args:
        answers: of the demonstrations of each.
    """
    for at in chain(range(place + 1, len(shown)), range(place)):
        same = shown[at].demonstrations == shown[place].demonstrations
        # They were chosen beside another query, and may show this one's own picture with its answer.
        seen = {key for item in shown[at].demonstrations for key in item.pictures}
        if seen & set(shown[place].query.pictures):
            continue
        if not same and not (task.needs_its_own and answers[at] & answers[place]):
            return shown[at]
    return None
