from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmicl_core.config.evaluation_tasks import ClassificationConfig
from mmicl_core.data.images import decode
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.classification import ClassificationTask
from tests.unit.evaluation.tasks.scoring import columns_of, numbers_of, weights_repeat_items

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FINE = ["apple", "aquarium_fish", *(f"class_{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(98))]
MNIST = (
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
)


def _pixels(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def _cifar_row(labels: list[int], seed: int) -> bytes:
    """Labels, then all red, all green and all blue values, row by row."""
    picture = _pixels(seed, 32, 32, 3)
    return bytes(labels) + b"".join(picture[:, :, plane].tobytes() for plane in range(3))


def _task(folder: Path, dataset: Any) -> ClassificationTask:
    return ClassificationTask(ClassificationConfig(folder=str(folder), dataset=dataset))


def _write_cifar10(folder: Path) -> ClassificationTask:
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n\n")
    (folder / "test_batch.bin").write_bytes(_cifar_row([3], 0) + _cifar_row([9], 1))
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(_cifar_row([number], 10 * number))
    return _task(folder, "cifar10")


def _write_cifar100(folder: Path) -> ClassificationTask:
    (folder / "coarse_label_names.txt").write_text("fish\nfruit_and_vegetables\n")
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (folder / "test.bin").write_bytes(_cifar_row([0, 1], 0) + _cifar_row([1, 0], 1))
    (folder / "train.bin").write_bytes(_cifar_row([1, 0], 2))
    return _task(folder, "cifar100")


def _write_mnist(folder: Path, packed: bool = False) -> ClassificationTask:
    contents = (
        struct.pack(">4i", 2051, 2, 28, 28) + _pixels(0, 28, 28).tobytes() + _pixels(1, 28, 28).tobytes(),
        struct.pack(">2i", 2049, 2) + bytes([7, 0]),
        struct.pack(">4i", 2051, 1, 28, 28) + _pixels(2, 28, 28).tobytes(),
        struct.pack(">2i", 2049, 1) + bytes([4]),
    )
    for name, content in zip(MNIST, contents, strict=True):
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)
    return _task(folder, "mnist")


def _shown(encoded: bytes) -> Any:
    picture = Image.open(io.BytesIO(encoded))
    assert picture.format == "PNG"
    return np.asarray(picture)


def test_cifar10_batches_become_queries_pool_and_pictures(tmp_path: Path) -> None:
    questions = _write_cifar10(tmp_path).load()
    assert [item.answer for item in questions.queries] == ["cat", "truck"]
    assert [item.answer for item in questions.pool] == list(CIFAR10[1:6])
    assert questions.queries[1].question == (
        "Classify the main object in the image.\n"
        "Options: airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck\n"
        "Answer with one of the options."
    )
    for number, item in enumerate(questions.queries):
        shown = _shown(questions.pictures.read(item.pictures[0]))
        np.testing.assert_array_equal(shown, _pixels(number, 32, 32, 3))
    shown = _shown(questions.pictures.read(questions.pool[4].pictures[0]))
    np.testing.assert_array_equal(shown, _pixels(50, 32, 32, 3))


def test_cifar100_is_asked_by_its_fine_classes(tmp_path: Path) -> None:
    questions = _write_cifar100(tmp_path).load()
    assert [item.answer for item in questions.queries] == ["aquarium fish", "apple"]
    assert [item.answer for item in questions.pool] == ["apple"]
    assert "\nOptions: apple, aquarium fish, class aa, " in questions.queries[0].question
    shown = _shown(questions.pictures.read(questions.queries[1].pictures[0]))
    np.testing.assert_array_equal(shown, _pixels(1, 32, 32, 3))


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files_become_queries_pool_and_pictures_plain_or_in_gzip(tmp_path: Path, packed: bool) -> None:
    questions = _write_mnist(tmp_path, packed).load()
    assert [item.answer for item in questions.queries] == ["7", "0"]
    assert [item.answer for item in questions.pool] == ["4"]
    assert "the digit in the image.\nOptions: 0, 1, 2" in questions.queries[0].question
    encoded = questions.pictures.read(questions.queries[1].pictures[0])
    np.testing.assert_array_equal(_shown(encoded), _pixels(1, 28, 28))
    assert decode(encoded).mode == "RGB"


@pytest.mark.parametrize(
    "name", ["test_batch.bin", "data_batch_1.bin", "data_batch_5.bin", "batches.meta.txt"]
)
def test_missing_file_of_cifar_is_an_error_that_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    task = _write_cifar10(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing: put .*from the binary version of CIFAR"):
        task.load()


@pytest.mark.parametrize("name", MNIST)
def test_missing_file_of_mnist_is_an_error_that_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    task = _write_mnist(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing: put the file {name}, or {name}\.gz there"):
        task.load()


@pytest.mark.parametrize("cut", [1, 3073 * 2])
def test_file_of_cifar_without_a_whole_row_is_an_error(tmp_path: Path, cut: int) -> None:
    task = _write_cifar10(tmp_path)
    path = tmp_path / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        DataError, match=r"test_batch\.bin (has 6145 bytes, which is not 0 and a mu|cannot be)"
    ):
        task.load()


def test_label_beyond_the_classes_is_an_error(tmp_path: Path) -> None:
    task = _write_cifar10(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(_cifar_row([3], 0) + _cifar_row([10], 1))
    with pytest.raises(DataError, match=r"data_batch_2\.bin: row 1 has the label 10, but there are 10"):
        task.load()


def test_list_of_names_of_another_length_is_an_error(tmp_path: Path) -> None:
    task = _write_cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("\n".join(CIFAR10[:9]))
    with pytest.raises(DataError, match=r"batches\.meta\.txt has 9 names instead of 10"):
        task.load()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (
            MNIST[0],
            struct.pack(">4i", 2049, 2, 28, 28) + bytes(2 * 784),
            "begins with .* instead of .2051, 2, 28",
        ),
        (
            MNIST[0],
            struct.pack(">4i", 2051, 3, 28, 28) + bytes(2 * 784),
            "begins with .2051, 3, 28, 28. instead",
        ),
        (
            MNIST[0],
            struct.pack(">4i", 2051, 2, 28, 28) + bytes(700),
            "has 716 bytes, which is not 16 and a mu",
        ),
        (MNIST[1], struct.pack(">2i", 2051, 2) + bytes(2), "begins with .2051, 2. instead of .2049, 2."),
        (MNIST[1], struct.pack(">2i", 2049, 1) + bytes(1), "has 2 pictures, but .* has 1 labels"),
        (MNIST[1], struct.pack(">2i", 2049, 2) + bytes([3, 11]), "row 1 has the label 11"),
    ],
)
def test_broken_file_of_mnist_is_an_error(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    task = _write_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        task.load()


def test_broken_gzip_is_an_error(tmp_path: Path) -> None:
    task = _write_mnist(tmp_path, packed=True)
    path = tmp_path / f"{MNIST[0]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        task.load()


@pytest.mark.parametrize("key", ["test_batch.bin/2", "test_batch.bin/-1", "test_batch.bin/x", "other.bin/0"])
def test_picture_that_is_not_there_is_an_error(tmp_path: Path, key: str) -> None:
    pictures = _write_cifar10(tmp_path).load().pictures
    with pytest.raises(DataError, match="is not in|cannot be read"):
        pictures.read(key)


def _right(answer: str, truth: str) -> bool:
    """Word by word."""
    words = "".join(letter if letter.isalnum() else " " for letter in answer.lower()).split()
    return {word for word in words if word in CIFAR10} == {truth}


def test_accuracy_agrees_with_answers_looked_at_word_by_word(tmp_path: Path) -> None:
    task = _write_cifar10(tmp_path)
    said = ["cat", "It is a Cat.", "cat or dog", "cats", "truck", "A truck, a big truck", "", "lorry"]
    queries = [item for item in task.load().queries for _ in said]
    columns = columns_of(task, queries, said * 2)
    right = [_right(answer, item.answer) for item, answer in zip(queries, said * 2, strict=True)]
    assert sum(right) == 4
    assert numbers_of(task.metrics, columns) == {"accuracy": 4 / 16}
    weights_repeat_items(task.metrics, columns, [""] * len(queries))


@pytest.mark.parametrize(("dataset", "chance"), [("cifar10", 0.1), ("cifar100", 0.01), ("mnist", 0.1)])
def test_chance_is_one_of_the_classes(tmp_path: Path, dataset: str, chance: float) -> None:
    assert _task(tmp_path, dataset).metrics[0].chance == pytest.approx(chance)
