from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmicl_core.config.evaluation_tasks import PopeConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.pope import PopeTask
from tests.unit.evaluation.tasks.scoring import (
    columns_of,
    numbers_of,
    weights_repeat_items,
    write_json_lines,
)

OBJECTS = ("dining table", "chair", "sandwich", "bowl")


def _records(pictures: int) -> list[dict[str, Any]]:
    return [
        {
            "question_id": len(OBJECTS) * picture + number,
            "image": f"COCO_val2014_{picture:012}.jpg",
            "image_id": picture,
            "text": f"Is there a {thing} in the image?",
            "label": ("yes", "no")[number % 2],
        }
        for picture in range(pictures)
        for number, thing in enumerate(OBJECTS)
    ]


def _write(folder: Path, pictures: int = 3, split: Any = "adversarial") -> PopeTask:
    write_json_lines(folder / f"coco_pope_{split}.json", _records(pictures))
    (folder / "val2014").mkdir()
    (folder / "val2014" / "COCO_val2014_000000000000.jpg").write_bytes(b"a table")
    return PopeTask(PopeConfig(folder=str(folder), split=split))


@pytest.mark.parametrize("split", ["random", "popular", "adversarial"])
def test_published_split_becomes_queries_without_a_pool(tmp_path: Path, split: str) -> None:
    task = _write(tmp_path, split=split)
    questions = task.load()
    first = questions.queries[0]
    assert len(questions.queries) == 12 and not questions.pool
    assert (first.id, first.answer, first.group) == ("0", "yes", "COCO_val2014_000000000000.jpg")
    assert questions.pictures.read(first.pictures[0]) == b"a table"
    assert task.words(first, "chat") == (
        "Is there a dining table in the image?\nAnswer the question using a single word or phrase."
    )


@pytest.mark.parametrize("name", ["coco_pope_adversarial.json", "val2014"])
def test_missing_part_is_an_error_that_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    task = _write(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{name} is missing: put .*from (POPE|https://cocodataset)"):
        task.load()


def test_label_that_is_no_answer_is_an_error(tmp_path: Path) -> None:
    task = _write(tmp_path)
    write_json_lines(
        tmp_path / "coco_pope_adversarial.json", [*_records(1), {**_records(2)[-1], "label": "Yes"}]
    )
    with pytest.raises(DataError, match="line 4: label is 'Yes' instead of one of"):
        task.load()


def test_demonstrations_are_of_different_other_pictures(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=6)
    questions = task.load()
    orders = set()
    for seed in range(20):
        shown = task.demonstrations(questions.queries[5], 5, random.Random(seed))
        pictures = [item.pictures[0] for item in shown]
        assert len(set(pictures)) == 5 and questions.queries[5].pictures[0] not in pictures
        assert all(item in questions.queries for item in shown)
        orders.add(tuple(item.id for item in shown))
        # Fewer are the first of more.
        assert task.demonstrations(questions.queries[5], 2, random.Random(seed)) == shown[:2]
    assert len(orders) > 10


def test_more_demonstrations_than_other_pictures_are_an_error(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=3)
    query = task.load().queries[0]
    assert task.demonstrations(query, 0, random.Random(0)) == []
    with pytest.raises(DataError, match="pope adversarial has 2 pictures .* question 0, but 3 demonstr"):
        task.demonstrations(query, 3, random.Random(0))


def _as_published(answers: list[str], labels: list[str]) -> dict[str, float]:
    """As the official script goes about it: read each answer, count four cases, divide."""
    cases = {"TP": 0, "FP": 0, "TN": 0, "FN": 0}
    for answer, label in zip(answers, labels, strict=True):
        words = answer.split(".")[0].replace(",", "").split(" ")
        positive = not any(word in ("No", "not", "no") for word in words)
        cases[("T" if positive == (label == "yes") else "F") + ("P" if positive else "N")] += 1
    precision = cases["TP"] / (cases["TP"] + cases["FP"])
    recall = cases["TP"] / (cases["TP"] + cases["FN"])
    return {
        "accuracy": (cases["TP"] + cases["TN"]) / len(answers),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": (cases["TP"] + cases["FP"]) / len(answers),
    }


def test_metrics_agree_with_the_published_script_on_odd_answers(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=20)
    queries = list(task.load().queries)
    odd = ["Yes", "no", "No, there is not.", "Yes, but no chair", "NO", "", "I see. No.", "It's not there"]
    said = random.Random(4).choices(odd, k=len(queries))
    columns = columns_of(task, queries, said)
    expected = _as_published(said, [item.answer for item in queries])
    assert numbers_of(task.metrics, columns) == pytest.approx(expected)
    weights_repeat_items(task.metrics, columns, [item.group for item in queries])


def test_metrics_agree_with_a_case_worked_out_by_hand(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=1)
    # Labels yes, no, yes, no: one hit, one false alarm, one miss, one right no.
    columns = columns_of(task, list(task.load().queries), ["yes", "yes", "no", "no"])
    half = dict.fromkeys(["accuracy", "precision", "recall", "f1", "yes_ratio"], 0.5)
    assert numbers_of(task.metrics, columns) == pytest.approx(half)


def test_model_that_never_says_yes_has_a_score_of_nothing(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=1)
    numbers = numbers_of(task.metrics, columns_of(task, list(task.load().queries), ["no"] * 4))
    assert numbers == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_recall_without_anything_to_find_is_not_a_number(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=1)
    columns = columns_of(task, list(task.load().queries), ["no"] * 4)
    with np.errstate(invalid="ignore"):
        assert math.isnan(task.metrics[2].of(columns, np.array([0.0, 1.0, 0.0, 1.0])))


def test_exchanged_demonstrations_have_the_other_answer(tmp_path: Path) -> None:
    task = _write(tmp_path)
    query, *others = task.load().queries
    assert [item.answer for item in task.exchanged(query, others[:2])] == ["yes", "no"]
