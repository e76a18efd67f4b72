"""What every evaluation task is: items read from files, a turn about each, a score of each answer, and sums.

    load --> Questions(queries, pool, pictures)     from local files, in the data set's published layout
    turn(item)                                      what is asked, in the words of a style
    demonstrations(query, shots, rng)               only where the data set says which belong to a query
    score(item, prediction) --> statistics          numbers of one answer, nothing averaged
    metrics: statistics of all answers, weights --> a number

A metric is computed from the statistics of all answers at once, with a weight for each: an average of
averages cannot arise, and a bootstrap draws weights. The first metric of a task is what it is known by.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mmicl_core.errors import DataError
from mmicl_core.prompts import Turn

__all__ = [
    "Columns",
    "FolderPictures",
    "Item",
    "Metric",
    "PictureSource",
    "Prediction",
    "Questions",
    "Style",
    "Task",
    "mean_of",
    "must_exist",
]

Style = Literal["chat", "open_flamingo"]
"""In whose words tasks ask: ours for models that follow instructions, or OpenFlamingo's."""

Numbers = NDArray[np.float64]
Columns = Mapping[str, Numbers]
"""Statistics by name, one number for each answer."""


@dataclass(frozen=True)
class Item:
    """One question with its pictures and all that it takes to score an answer, or to show it answered."""

    id: str
    """Unique in its split."""
    pictures: tuple[str, ...]
    """Keys of a `PictureSource`, in the order in which they are shown."""
    question: str
    """The data set's own words, which a style may put into a frame."""
    answer: str
    """What it is shown with as a demonstration."""
    references: tuple[str, ...] = ()
    """All that may be answered, where that is more than `answer`."""
    group: str = ""
    """Items that are one draw of the data set, such as two questions about one picture; a bootstrap keeps
    them together. Empty stands for an item of its own."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the task needs: a subtask, the other class's name."""


@dataclass(frozen=True)
class Prediction:
    """What a model said of an item."""

    text: str
    log_probabilities: Mapping[str, float] = field(default_factory=dict)
    """Of each of the task's choices as the answer; empty where there are none."""


class PictureSource(Protocol):
    """Encoded pictures by key. It travels to workers."""

    def read(self, key: str) -> bytes:
        """The encoded bytes.

        Raises:
            DataError: there is no such picture.
        """
        ...


@dataclass(frozen=True)
class FolderPictures:
    """Pictures that are files; keys are paths below a folder, with forward slashes."""

    folder: Path

    def read(self, key: str) -> bytes:
        """The bytes of a file below the folder."""
        try:
            return (self.folder / key).read_bytes()
        except OSError as error:
            raise DataError(f"picture {key!r} cannot be read in {self.folder}: {error}") from error


@dataclass(frozen=True)
class Questions:
    """All that is asked, and what demonstrations may be drawn from."""

    queries: Sequence[Item]
    pool: Sequence[Item]
    """Answered items, none of which is a query; empty where each query has its own demonstrations."""
    pictures: PictureSource


@dataclass(frozen=True)
class Metric:
    """A number about all answers of a task."""

    name: str
    of: Callable[[Columns, Numbers], float]
    """Takes the statistics and the weight of each answer, most often 1; not a number where it is not
    defined."""
    scale: float = 100.0
    """What it is multiplied with to be shown, as papers show it."""
    chance: float | None = None
    """What guessing among the allowed answers would give, before scaling."""


def mean_of(column: str) -> Callable[[Columns, Numbers], float]:
    """The weighted mean of one statistic."""

    def of(columns: Columns, weights: Numbers) -> float:
        return float((columns[column] * weights).sum() / weights.sum())

    return of


class Task(ABC):
    """One data set with the way it is asked and scored. Tasks are built from their settings."""

    name: ClassVar[str]
    """As in `evaluate.tasks`."""
    source: ClassVar[str]
    """The paper, and where its files are to be had."""
    metrics: Sequence[Metric]
    max_new_tokens: int
    """Tokens of an answer before it is cut, where `most_tokens` says nothing else."""
    most_shots: int | None = None
    """Demonstrations that a question has at most; None where that is not limited."""
    needs_its_own: bool = False
    """Whether a query has demonstrations of its own, without which it cannot be answered."""

    @abstractmethod
    def load(self) -> Questions:
        """Read the files.

        Raises:
            DataError: a file is missing, and where it belongs; or it breaks its layout, and where.
        """

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Statistics of one answer, by the same names for every item; of tasks where it depends on that one
        alone."""
        raise NotImplementedError(f"{type(self).__name__} scores all answers together")

    def score_all(self, items: Sequence[Item], predictions: Sequence[Prediction]) -> list[dict[str, float]]:
        """Statistics of all answers, in their order."""
        return [self.score(item, said) for item, said in zip(items, predictions, strict=True)]

    def turn(self, item: Item, style: Style) -> Turn:
        """The item as it is shown, with its answer."""
        return Turn(item.pictures, self.words(item, style), item.answer)

    def opening(self, style: Style, shots: int) -> str:
        """What stands before the first turn, whatever that is, where so many demonstrations are shown."""
        return ""

    def words(self, item: Item, style: Style) -> str:
        """The question as it is asked."""
        return item.question

    def most_tokens(self, style: Style) -> int:
        """Tokens of an answer before it is cut, to a question in the words of a style."""
        return self.max_new_tokens

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item] | None:
        """Demonstrations that the data set gives a query, the last one next to it; None where they are chosen
        out of the pool.

        Raises:
            DataError: it gives fewer.
        """
        return None

    def choices(self, item: Item) -> tuple[str, ...]:
        """Answers whose log-probabilities are asked for beside a text; most tasks ask for none."""
        return ()

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item] | None:
        """The demonstrations with the two answers exchanged; None where there are not two."""
        return None

    def counterpart(self, query: Item, demonstrations: Sequence[Item]) -> tuple[Item, list[Item]] | None:
        """Another query, which the same rule answers differently, with its demonstrations: what is answered
        without a look at the query is wrong once. None where there is no such query."""
        return None


def must_exist(path: Path, what: str, source: str) -> Path:
    """The path.

    Raises:
        DataError: nothing is there; says what belongs there and where it is to be had.
    """
    if not path.exists():
        raise DataError(f"{path} is missing: put {what} there, from {source}")
    return path
