"""CIFAR-10, CIFAR-100 and MNIST as questions that name the classes, like the tasks of M2PT.

| data set | folder | queries | pool | class names |
|---|---|---|---|---|
| CIFAR-10 | `cifar-10-batches-bin` | `test_batch.bin` | `data_batch_{1..5}.bin` | `batches.meta.txt` |
| CIFAR-100 | `cifar-100-binary` | `test.bin` | `train.bin` | `fine_label_names.txt` |
| MNIST | any | `t10k-{images-idx3,labels-idx1}-ubyte` | `train-...` | the digits |

Of CIFAR it is the binary version: the Python version is pickled, and reading it would run what it holds. A
row is the label (of CIFAR-100 the coarse label, then the fine one) and 32 x 32 pixels of red, then of green,
then of blue. MNIST's files may be in gzip, as they are published.

M2PT (arXiv:2409.15657) has a language model judge the answers; here they are compared with the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mmicl_core.config.evaluation_tasks import ClassificationConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item, Metric, Prediction, Questions, Task, mean_of, must_exist
from mmicl_core.evaluation.tasks.class_names import class_named
from mmicl_core.evaluation.tasks.rows import RowPictures, idx_header_bytes, read_idx, read_rows
from mmicl_core.evaluation.tasks.text_lines import read_lines

__all__ = ["ClassificationTask"]

CIFAR_SHAPE = (3, 32, 32)
MNIST_SHAPE = (28, 28)
OBJECT, DIGIT = "main object", "digit"
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class _Cifar:
    queries: tuple[str, ...]
    pool: tuple[str, ...]
    names: str
    classes: int
    labels: int
    """Bytes of labels before the pixels, the last of which counts."""


CIFAR = {
    "cifar10": _Cifar(
        ("test_batch.bin",), tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "batches.meta.txt", 10, 1
    ),
    "cifar100": _Cifar(("test.bin",), ("train.bin",), "fine_label_names.txt", 100, 2),
}


class ClassificationTask(Task):
    """Which of the named classes? An answer that names none or several of them is wrong."""

    name: ClassVar[str] = "classification"
    source: ClassVar[str] = (
        "the binary version of CIFAR (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html, or "
        "MNIST (LeCun et al. 1998), http://yann.lecun.com/exdb/mnist"
    )
    max_new_tokens = 20

    def __init__(self, config: ClassificationConfig) -> None:
        self._folder, self._cifar = Path(config.folder), CIFAR.get(config.dataset)
        self._names = DIGITS
        classes = self._cifar.classes if self._cifar else len(DIGITS)
        self.metrics: Sequence[Metric] = (Metric("accuracy", mean_of("right"), chance=1 / classes),)

    def load(self) -> Questions:
        """What is for testing as the queries, and what is for training as the pool."""
        if self._cifar is None:
            pictures = RowPictures(self._folder, idx_header_bytes(MNIST_SHAPE), MNIST_SHAPE)
            return Questions(list(self._mnist("t10k")), list(self._mnist("train")), pictures)
        self._names = self._read_names(self._cifar)
        queries, pool = (
            [item for name in names for item in self._batch(name, self._cifar)]
            for names in (self._cifar.queries, self._cifar.pool)
        )
        return Questions(queries, pool, RowPictures(self._folder, 0, CIFAR_SHAPE, self._cifar.labels))

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Whether the answer names the right class and no other."""
        return {"right": float(class_named(prediction.text, self._names) == item.answer)}

    def _batch(self, name: str, cifar: _Cifar) -> Iterator[Item]:
        path = must_exist(self._folder / name, f"the file {name}", self.source)
        rows = read_rows(path, 0, cifar.labels + math.prod(CIFAR_SHAPE))
        return self._items(path, rows[:, cifar.labels - 1], OBJECT)

    def _mnist(self, split: str) -> Iterator[Item]:
        images, labels = self._idx(f"{split}-images-idx3-ubyte"), self._idx(f"{split}-labels-idx1-ubyte")
        pixels, column = read_idx(images, MNIST_SHAPE), read_idx(labels, ())
        if len(pixels) != len(column):
            raise DataError(
                f"{images} has {len(pixels)} pictures, but {labels} has {len(column)} labels: take both "
                f"anew, from {self.source}"
            )
        return self._items(images, column[:, 0], DIGIT)

    def _idx(self, name: str) -> Path:
        """The file as it is, or else in gzip."""
        path, packed = self._folder / name, self._folder / f"{name}.gz"
        if packed.exists() and not path.exists():
            return packed
        return must_exist(path, f"the file {name}, or {packed.name}", self.source)

    def _items(self, path: Path, labels: NDArray[np.uint8], what: str) -> Iterator[Item]:
        question = (
            f"Classify the {what} in the image.\nOptions: {', '.join(self._names)}\n"
            "Answer with one of the options."
        )
        for row, label in enumerate(labels.tolist()):
            if label >= len(self._names):
                raise DataError(
                    f"{path}: row {row} has the label {label}, but there are {len(self._names)} classes: the "
                    "file is broken, or of another data set; take it anew"
                )
            key = f"{path.name}/{row}"
            yield Item(key, (key,), question, self._names[label])

    def _read_names(self, cifar: _Cifar) -> tuple[str, ...]:
        path = must_exist(self._folder / cifar.names, "the names of the classes", self.source)
        names = tuple(name.replace("_", " ") for name in read_lines(path))
        if len(names) != cifar.classes:
            raise DataError(f"{path} has {len(names)} names instead of {cifar.classes}: take it anew")
        return names
