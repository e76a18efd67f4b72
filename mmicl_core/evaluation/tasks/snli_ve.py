"""SNLI-VE (arXiv:1901.06706): does a picture entail a sentence, contradict it, or neither?

| file | holds |
|---|---|
| `snli_ve_{dev,test}.jsonl` | the queries: `Flickr30K_ID`, `sentence2`, `gold_label` |
| `snli_ve_train.jsonl` | the pool, in the same form |
| `flickr30k_images/` | the pictures of Flickr30k |

Files of before 2020 have `Flikr30kID` instead, which ends in `.jpg`. No picture is in two of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mmicl_core.config.evaluation_tasks import SnliVeConfig
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
from mmicl_core.evaluation.tasks.class_names import class_named
from mmicl_core.evaluation.tasks.json_lines import Record, read_items

__all__ = ["SnliVeTask"]

LABELS = ("entailment", "neutral", "contradiction")


class SnliVeTask(Task):
    """One of three relations; an answer that names none or several of them is wrong."""

    name: ClassVar[str] = "snli_ve"
    source: ClassVar[str] = "SNLI-VE (Xie et al. 2019, arXiv:1901.06706), https://github.com/necla-ml/SNLI-VE"
    metrics: Sequence[Metric] = (Metric("accuracy", mean_of("right"), chance=1 / len(LABELS)),)
    max_new_tokens = 10

    def __init__(self, config: SnliVeConfig) -> None:
        self._folder, self._split = Path(config.folder), config.split

    def load(self) -> Questions:
        """The queries of the split, and all that is for training as the pool."""
        queries, pool = (
            read_items(self._folder / f"snli_ve_{split}.jsonl", self.source, _item)
            for split in (self._split, "train")
        )
        images = must_exist(self._folder / "flickr30k_images", "the pictures of Flickr30k", self.source)
        return Questions(queries, pool, FolderPictures(images))

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Whether the answer names the right relation and no other."""
        return {"right": float(class_named(prediction.text, LABELS) == item.answer)}

    def words(self, item: Item, style: Style) -> str:
        """The sentence in a question."""
        return (
            f"{item.question}\nDoes the image entail this sentence, contradict it, or is it neutral? "
            "Answer entailment, neutral or contradiction."
        )


def _item(record: Record) -> Item:
    picture = record.text("Flickr30K_ID", "Flikr30kID").removesuffix(".jpg") + ".jpg"
    return Item(
        id=str(record.number),
        pictures=(picture,),
        question=record.text("sentence2"),
        answer=record.one_of("gold_label", {label: label for label in LABELS}),
        group=picture,
    )
