"""POPE (arXiv:2305.10355): is an object in a picture? Half of the objects asked about are not.

| file | holds |
|---|---|
| `coco_pope_{random,popular,adversarial}.json` | JSON lines: `question_id`, `image`, `text`, `label` |
| `val2014/` | the pictures of COCO 2014 that are for validation |

All questions are queries; what is demonstrated for one are others, about other pictures.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mmicl_core.config.evaluation_tasks import PopeConfig
from mmicl_core.evaluation.tasks.base import (
    Columns,
    FolderPictures,
    Item,
    Metric,
    Numbers,
    Prediction,
    Questions,
    Style,
    Task,
    mean_of,
    must_exist,
)
from mmicl_core.evaluation.tasks.json_lines import Record, read_items
from mmicl_core.evaluation.tasks.other_pictures import OtherPictures
from mmicl_core.evaluation.yes_no import YES_NO, exchange_yes_no, said_in_first_sentence

__all__ = ["PopeTask", "f1", "precision", "recall"]


def precision(columns: Columns, weights: Numbers) -> float:
    """The share of what is there in what is said to be; 0 where nothing is, as is usual."""
    said = weights @ columns["said"]
    return float(_found(columns, weights) / said) if said else 0.0


def recall(columns: Columns, weights: Numbers) -> float:
    """The share of what is said to be there in what is; not a number where nothing is."""
    return float(_found(columns, weights) / (weights @ columns["label"]))


def f1(columns: Columns, weights: Numbers) -> float:
    """The harmonic mean of precision and recall; not a number where nothing is there, or said to be."""
    return float(2 * _found(columns, weights) / (weights @ (columns["said"] + columns["label"])))


class PopeTask(Task):
    """Yes or no, read and scored as the official script does."""

    name: ClassVar[str] = "pope"
    source: ClassVar[str] = "POPE (Li et al. 2023, arXiv:2305.10355), https://github.com/AoiDragon/POPE"
    metrics: Sequence[Metric] = (
        Metric("accuracy", mean_of("right"), chance=0.5),
        Metric("precision", precision, chance=0.5),
        Metric("recall", recall, chance=0.5),
        Metric("f1", f1, chance=0.5),
        Metric("yes_ratio", mean_of("said"), chance=0.5),
    )
    # The whole first sentence counts.
    max_new_tokens = 50

    def __init__(self, config: PopeConfig) -> None:
        self._folder, self._split = Path(config.folder), config.split
        self._others = OtherPictures((), self.name)

    def load(self) -> Questions:
        """The questions of the split; there is no pool."""
        queries = read_items(self._folder / f"coco_pope_{self._split}.json", self.source, _item)
        images = must_exist(
            self._folder / "val2014", "COCO's pictures of val2014", "https://cocodataset.org/#download"
        )
        self._others = OtherPictures(queries, f"{self.name} {self._split}")
        return Questions(queries, (), FolderPictures(images))

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """The label, what is said, and whether they agree; 1 is yes."""
        said = said_in_first_sentence(prediction.text)
        return {
            "label": float(item.answer == "yes"),
            "said": float(said == "yes"),
            "right": float(said == item.answer),
        }

    def words(self, item: Item, style: Style) -> str:
        """The question, and how to answer it."""
        return f"{item.question}\nAnswer the question using a single word or phrase."

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item]:
        """Questions of the same split about other pictures, one about each."""
        return self._others.draw(query, shots, rng)

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item]:
        """What is there as if it were not, and the other way round."""
        return exchange_yes_no(demonstrations)


def _found(columns: Columns, weights: Numbers) -> np.float64:
    """The weight of what is there and said to be."""
    return np.float64(weights @ (columns["said"] * columns["label"]))


def _item(record: Record) -> Item:
    picture = record.text("image")
    return Item(
        id=str(record.integer("question_id")),
        pictures=(picture,),
        question=record.text("text"),
        answer=record.one_of("label", {answer: answer for answer in YES_NO}),
        group=picture,
    )
