"""Naming what a corpus shows: the tasks of this project's own, on any corpus that episodes can be drawn from.

    two_way      which of two made-up names a concept has, by demonstrations of both (link-context learning,
                 arXiv:2308.07891); no demonstration, no right answer
    kind         what kind of thing it is; one demonstration, wherever it stands, is of the query's kind
    true_name    the name that the corpus itself has for it: what a model knows without being shown

Each query has its own demonstrations, drawn as one episode with as many as the largest number asked for; a
smaller number takes some of the same, so that a curve over shots is about the same queries.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mmicl_core.data.storage import PictureReader
from mmicl_core.data.tasks.caption import NAME_QUESTION
from mmicl_core.errors import DataError
from mmicl_core.evaluation.metrics import names_exactly, names_only
from mmicl_core.evaluation.tasks.base import (
    Item,
    Metric,
    PictureSource,
    Prediction,
    Questions,
    Style,
    Task,
    mean_of,
)

__all__ = ["CorpusPictures", "EpisodeTask", "KindTask", "TrueNameTask", "TwoWayTask"]

Episode = Mapping[str, Any]


@dataclass(frozen=True)
class CorpusPictures:
    """Pictures of a corpus by key."""

    images: Mapping[str, Mapping[str, Any]]
    """IMAGE references."""
    reader: PictureReader

    def read(self, key: str) -> bytes:
        """The bytes of a picture, where the corpus keeps it."""
        return self.reader.read(self.images[key])


class EpisodeTask(Task):
    """Questions that are EPISODE rows.

    Args:
        rows: each with as many demonstrations as will be asked for at most.
        pictures: all of them.
        opening: what the wording of the episodes puts before their first turn.
    """

    source: ClassVar[str] = "the corpus of the run"
    max_new_tokens = 12

    def __init__(self, rows: Sequence[Episode], pictures: PictureSource, opening: str = "") -> None:
        self._rows, self._pictures, self._opening = rows, pictures, opening

    def load(self) -> Questions:
        """The queries; there is no pool, as each has demonstrations of its own."""
        return Questions([self._query(row) for row in self._rows], (), self._pictures)

    def _query(self, row: Episode) -> Item:
        *shown, query = (
            Item(
                f"{row['id']}/{place}",
                (turn["picture"],),
                turn["question"].removeprefix(self._opening),
                turn["answer"],
                facts={"concept": turn["concept"]},
            )
            for place, turn in enumerate(row["turns"])
        )
        return replace(query, id=row["id"], facts={**query.facts, **self._facts(row), "shown": tuple(shown)})

    def opening(self, style: Style, shots: int) -> str:
        """As the wording has it, which speaks of demonstrations."""
        return self._opening if shots else ""

    def _facts(self, row: Episode) -> dict[str, Any]:
        """What else is known of a query."""
        return {}

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item]:
        """Some of those that were drawn for the query, in their own order."""
        shown: tuple[Item, ...] = query.facts["shown"]
        if shots > len(shown):
            raise DataError(
                f"{self.name} question {query.id} has {len(shown)} demonstrations, but {shots} are asked for"
            )
        kept = self._some(query, shown, shots, rng)
        return [item for item in shown if item in kept]

    def _some(self, query: Item, shown: Sequence[Item], shots: int, rng: random.Random) -> Sequence[Item]:
        return shown[len(shown) - shots :]


class TwoWayTask(EpisodeTask):
    """Which of two names does it have?"""

    name: ClassVar[str] = "two_way"
    needs_its_own = True
    metrics: Sequence[Metric] = (
        Metric("accuracy", mean_of("right"), chance=0.5),
        Metric("named the other class", mean_of("other")),
    )

    def _facts(self, row: Episode) -> dict[str, Any]:
        (name,) = (name for name in row["names"] if name != row["other"])
        return {"name": name, "other": row["other"]}

    def _some(self, query: Item, shown: Sequence[Item], shots: int, rng: random.Random) -> Sequence[Item]:
        """As many of both classes; of an odd number, one more of either."""
        classes = list(dict.fromkeys(item.facts["concept"] for item in shown))
        rng.shuffle(classes)
        kept = list[Item]()
        for place, concept in enumerate(classes):
            of_class = [item for item in shown if item.facts["concept"] == concept]
            kept += of_class[max(len(of_class) - (shots + (place == 0)) // 2, 0) :]
        # An episode of an odd number has one more of a class, which need not be the one drawn here.
        left = [item for item in shown if item not in kept]
        return kept + left[len(left) - (shots - len(kept)) :] if len(kept) < shots else kept

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Whether the right name was said, or the other one; an answer with both, or neither, is wrong."""
        name, other = item.facts["name"], item.facts["other"]
        return {
            "right": float(names_only(prediction.text, name, other)),
            "other": float(names_only(prediction.text, other, name)),
        }

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item]:
        """Each class under the other's name."""
        names = query.facts["name"], query.facts["other"]
        return [replace(item, answer=_exchange(item.answer, *names)) for item in demonstrations]

    def counterpart(self, query: Item, demonstrations: Sequence[Item]) -> tuple[Item, list[Item]] | None:
        """The last demonstration of the other class asked, behind the others."""
        other = [item for item in demonstrations if item.facts["concept"] != query.facts["concept"]]
        if len(other) < 2 or len(other) == len(demonstrations):
            return None
        asked, name = other[-1], query.facts["name"]
        facts = {**query.facts, **asked.facts, "name": query.facts["other"], "other": name}
        answer = _exchange(query.answer, query.facts["name"], query.facts["other"])
        turned = replace(query, pictures=asked.pictures, answer=answer, facts=facts)
        return turned, [item for item in demonstrations if item is not asked]


class KindTask(EpisodeTask):
    """What kind of thing is it?"""

    name: ClassVar[str] = "kind"
    needs_its_own = True
    metrics: Sequence[Metric] = (Metric("accuracy", mean_of("right")),)

    def _some(self, query: Item, shown: Sequence[Item], shots: int, rng: random.Random) -> Sequence[Item]:
        """That of the query's kind is always among them."""
        helpful = [item for item in shown if item.answer == query.answer]
        others = [item for item in shown if item.answer != query.answer]
        return [*helpful, *others][:shots]

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Whether the answer is the kind and nothing else."""
        return {"right": float(names_exactly(prediction.text, item.answer))}


class TrueNameTask(EpisodeTask):
    """What is it called?

    Args:
        names: of the corpus, by concept.
    """

    name: ClassVar[str] = "true_name"
    most_shots = 0
    metrics: Sequence[Metric] = (Metric("accuracy", mean_of("right")),)

    def __init__(self, rows: Sequence[Episode], pictures: PictureSource, names: Mapping[str, str]) -> None:
        super().__init__(rows, pictures)
        self._names = names

    def _query(self, row: Episode) -> Item:
        query = super()._query(row)
        name = self._names[query.facts["concept"]]
        return replace(query, question=NAME_QUESTION, answer=name, facts={"shown": ()})

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Whether the answer is the name and nothing else."""
        return {"right": float(names_exactly(prediction.text, item.answer))}


def _exchange(answer: str, one: str, other: str) -> str:
    """An answer with the name in it exchanged; neither name lies inside the other."""
    return answer.replace(one, other) if one in answer else answer.replace(other, one)
