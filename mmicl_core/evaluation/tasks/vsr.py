"""Visual Spatial Reasoning (arXiv:2205.00363): is what a caption says of where things are true?

| file below the folder, the `data/` of the repository | holds |
|---|---|
| `splits/{random,zeroshot}/test.jsonl` | the queries: `image` (a file name), `caption`, `label` (1 is true) |
| `splits/{random,zeroshot}/train.jsonl` | the pool, in the same form |
| `images/` | the pictures, of COCO 2017 |

The random split is one of captions: it has pictures of queries in its pool, with other captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mmicl_core.config.evaluation_tasks import VsrConfig
from mmicl_core.evaluation.tasks.base import (
    FolderPictures,
    Item,
    Metric,
    Prediction,
    Questions,
    Style,
    Task,
    mean_of,
    must_exist,
)
from mmicl_core.evaluation.tasks.json_lines import Record, read_items
from mmicl_core.evaluation.yes_no import exchange_yes_no, said_at_once

__all__ = ["VsrTask"]

LABELS = {0: "no", 1: "yes"}


class VsrTask(Task):
    """True or not, asked as a yes-no question; what is neither yes nor no is wrong."""

    name: ClassVar[str] = "vsr"
    source: ClassVar[str] = (
        "Visual Spatial Reasoning (Liu et al. 2023, arXiv:2205.00363), "
        "https://github.com/cambridgeltl/visual-spatial-reasoning"
    )
    metrics: Sequence[Metric] = (Metric("accuracy", mean_of("right"), chance=0.5),)
    max_new_tokens = 10

    def __init__(self, config: VsrConfig) -> None:
        self._folder, self._split = Path(config.folder), config.split

    def load(self) -> Questions:
        """The queries of the split's `test.jsonl`, and its `train.jsonl` as the pool."""
        split = self._folder / "splits" / self._split
        queries, pool = (
            read_items(split / name, self.source, _item) for name in ("test.jsonl", "train.jsonl")
        )
        images = must_exist(
            self._folder / "images", "the pictures of COCO 2017 that it is about", self.source
        )
        return Questions(queries, pool, FolderPictures(images))

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Whether the answer begins with the right one of yes and no."""
        return {"right": float(said_at_once(prediction.text) == item.answer)}

    def words(self, item: Item, style: Style) -> str:
        """The caption in a question."""
        return f"{item.question}\nIs this statement about the image true? Answer yes or no."

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item]:
        """True captions as false, and the other way round."""
        return exchange_yes_no(demonstrations)


def _item(record: Record) -> Item:
    picture = record.text("image")
    return Item(
        id=str(record.number),
        pictures=(picture,),
        question=record.text("caption"),
        answer=record.one_of("label", LABELS),
        group=picture,
    )
