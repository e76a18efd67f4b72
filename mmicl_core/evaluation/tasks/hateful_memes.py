"""Hateful Memes (arXiv:2005.04790): is a picture with the text on it hateful?

| file | holds |
|---|---|
| `dev_seen.jsonl` | the queries: `id`, `img` (a path below the folder), `label` (1 is hateful), `text` |
| `train.jsonl` | the pool, in the same form |
| `img/` | the pictures |

Scored as OpenFlamingo scores it: the two answers are ordered by their log-probabilities, and how much more
probable yes is orders the memes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mmicl_core.config.evaluation_tasks import HatefulMemesConfig
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
from mmicl_core.evaluation.yes_no import YES_NO, exchange_yes_no

__all__ = ["HatefulMemesTask", "roc_auc"]

LABELS = {0: "no", 1: "yes"}


def roc_auc(columns: Columns, weights: Numbers) -> float:
    """The area under the ROC curve of `score` for `label`; not a number without weight on both labels."""
    hateful = columns["label"] == 1
    if not weights[hateful].any() or not weights[~hateful].any():
        return float("nan")
    # Takes longer to import than all else that reads and scores the data set.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(hateful, columns["score"], sample_weight=weights))


class HatefulMemesTask(Task):
    """Yes or no, by log-probabilities; the text that a model writes does not count."""

    name: ClassVar[str] = "hateful_memes"
    source: ClassVar[str] = (
        "Hateful Memes (Kiela et al. 2020, arXiv:2005.04790), https://hatefulmemeschallenge.com"
    )
    metrics: Sequence[Metric] = (
        Metric("roc_auc", roc_auc, chance=0.5),
        Metric("accuracy", mean_of("right"), chance=0.5),
    )
    max_new_tokens = 5

    def __init__(self, config: HatefulMemesConfig) -> None:
        self._folder = Path(config.folder)

    def load(self) -> Questions:
        """The queries of `dev_seen.jsonl`, and `train.jsonl` as the pool."""
        queries, pool = (
            read_items(self._folder / name, self.source, _item) for name in ("dev_seen.jsonl", "train.jsonl")
        )
        must_exist(self._folder / "img", "the pictures", self.source)
        return Questions(queries, pool, FolderPictures(self._folder))

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """The label, the logarithm of how many times as probable as no yes is, and if that is the label."""
        yes, no = (prediction.log_probabilities[answer] for answer in YES_NO)
        return {
            "label": float(item.answer == "yes"),
            "score": yes - no,
            "right": float((yes > no) == (item.answer == "yes")),
        }

    def words(self, item: Item, style: Style) -> str:
        """The text of the meme in a question."""
        asked = f"is an image with: '{item.question}' written on it. Is it hateful?"
        return f"{asked} Answer:" if style == "open_flamingo" else f"This {asked}\nAnswer yes or no."

    def choices(self, item: Item) -> tuple[str, ...]:
        """Yes and no."""
        return YES_NO

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item]:
        """Hateful memes as harmless, and the other way round."""
        return exchange_yes_no(demonstrations)


def _item(record: Record) -> Item:
    return Item(
        id=str(record.integer("id")),
        pictures=(record.text("img"),),
        question=record.text("text"),
        answer=record.one_of("label", LABELS),
    )
