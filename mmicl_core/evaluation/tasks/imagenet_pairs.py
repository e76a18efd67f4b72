"""ImageNet-100 2-way: which of two classes of ImageNet, by its real name, that LCL was not trained on?

By Tai et al. (arXiv:2308.07891, section 5.2), asked and scored as ISEKAI is. Classes are pairs in the order
of their list: the first with the second, the third with the fourth. Every class is asked about, against the
other one of its pair, in its first 50 test pictures; names are written small, as in the released code.

| what | which |
|---|---|
| `test100_pairs.jsonl` | one class a line: `class_id`, `class_name`, `context_samples`, `test_samples` |
| `train/`, `val/` | the pictures of ILSVRC 2012, in the folders that they are released in |

Samples are paths below the folder, such as `train/n02091134/n02091134_7.JPEG`, or
`val/ILSVRC2012_val_00000042.JPEG` without a folder for the class. Demonstrations are of `context_samples`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmicl_core.config.evaluation_tasks import ImageNetPairsConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item, Questions, must_exist
from mmicl_core.evaluation.tasks.isekai import LinkContextTask, read_paths
from mmicl_core.evaluation.tasks.json_lines import Record, read_records

__all__ = ["MOST_QUESTIONS", "ImageNetPairsTask"]

FILE = "test100_pairs.jsonl"
MOST_QUESTIONS = 50
"""Test pictures of a class that are asked about."""


@dataclass(frozen=True)
class _Class:
    name: str
    context: tuple[str, ...]
    tests: tuple[str, ...]


class ImageNetPairsTask(LinkContextTask):
    """A real class against another one."""

    name: ClassVar[str] = "imagenet_pairs"
    source: ClassVar[str] = (
        f"ImageNet-100 (Tai et al., arXiv:2308.07891), {FILE} of "
        "https://github.com/isekai-portal/Link-Context-Learning/tree/main/docs, and ILSVRC 2012, "
        "https://image-net.org, train and val of ILSVRC/Data/CLS-LOC"
    )

    def __init__(self, config: ImageNetPairsConfig) -> None:
        super().__init__(Path(config.folder))

    def load(self) -> Questions:
        """Up to 50 queries for each class of the file."""
        path = must_exist(self._folder / FILE, f"the file {FILE}", self.source)
        classes = [_read_class(record) for record in read_records(path)]
        if not classes or len(classes) % 2:
            raise DataError(
                f"{path} holds {len(classes)} classes, but they are asked about in pairs: take the whole "
                f"file, from {self.source}"
            )
        queries = list[Item]()
        for number, one in enumerate(classes):
            other = classes[number ^ 1]
            if one.name == other.name:
                raise DataError(
                    f"{path}: the classes of lines {number} and {number ^ 1} are a pair, but both are called "
                    f"{one.name!r}: no answer could tell them apart"
                )
            queries += [
                self.query(f"{number}/{place}", test, (one.name, other.name), (one.context, other.context))
                for place, test in enumerate(one.tests[:MOST_QUESTIONS])
            ]
        return self.questions(queries)


def _read_class(record: Record) -> _Class:
    if "neighbors" in record.fields:
        # What one version of LCL's repository holds under this name.
        raise record.wrong("it has neighbors, so the file is that of the 900 classes for training")
    name = record.text("class_name").lower()
    return _Class(name, read_paths(record, "context_samples"), read_paths(record, "test_samples"))
