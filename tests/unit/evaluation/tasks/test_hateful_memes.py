from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmicl_core.config.evaluation_tasks import HatefulMemesConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item, Prediction
from mmicl_core.evaluation.tasks.hateful_memes import HatefulMemesTask
from tests.unit.evaluation.tasks.scoring import (
    columns_of,
    numbers_of,
    weights_repeat_items,
    write_json_lines,
)

QUERIES = [
    {"id": 8291, "img": "img/08291.png", "label": 1, "text": "white people is this a shooting range"},
    {"id": 46971, "img": "img/46971.png", "label": 0, "text": "bravery at its finest"},
]
POOL = [{"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character not their color"}]


def _write(folder: Path, **changes: Any) -> HatefulMemesTask:
    """The published files, with pictures of a few bytes."""
    write_json_lines(folder / "dev_seen.jsonl", QUERIES)
    write_json_lines(folder / "train.jsonl", POOL)
    (folder / "img").mkdir()
    for record in [*QUERIES, *POOL]:
        (folder / str(record["img"])).write_bytes(str(record["id"]).encode())
    return HatefulMemesTask(HatefulMemesConfig(folder=str(folder)))


def _said(yes: float, no: float, text: str = "") -> Prediction:
    return Prediction(text, {"yes": yes, "no": no})


def _item(label: int) -> Item:
    return Item("1", ("img/1.png",), "text", ("no", "yes")[label])


def test_published_files_become_queries_pool_and_pictures(tmp_path: Path) -> None:
    questions = _write(tmp_path).load()
    first, second = questions.queries
    assert (first.id, first.pictures, first.answer) == ("8291", ("img/08291.png",), "yes")
    assert second.answer == "no"
    assert [item.id for item in questions.pool] == ["42953"]
    assert questions.pictures.read("img/08291.png") == b"8291"


def test_meme_is_asked_about_in_the_words_of_each_style(tmp_path: Path) -> None:
    task = _write(tmp_path)
    item = task.load().queries[1]
    assert task.words(item, "open_flamingo") == (
        "is an image with: 'bravery at its finest' written on it. Is it hateful? Answer:"
    )
    assert task.words(item, "chat") == (
        "This is an image with: 'bravery at its finest' written on it. Is it hateful?\nAnswer yes or no."
    )
    assert task.turn(item, "chat").answer == "no"
    assert task.choices(item) == ("yes", "no")


@pytest.mark.parametrize("name", ["dev_seen.jsonl", "train.jsonl", "img"])
def test_missing_part_is_an_error_that_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    task = _write(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{name} is missing: put .*from Hateful Memes .*hatefulmemes"):
        task.load()


def test_split_without_labels_is_an_error(tmp_path: Path) -> None:
    task = _write(tmp_path)
    write_json_lines(tmp_path / "dev_seen.jsonl", [{key: QUERIES[0][key] for key in ("id", "img", "text")}])
    with pytest.raises(DataError, match=r"dev_seen\.jsonl: line 0: there is no label: this split has no"):
        task.load()


def test_text_of_an_answer_does_not_count() -> None:
    task = HatefulMemesTask(HatefulMemesConfig(folder=""))
    assert task.score(_item(1), _said(-1, -2, "no")) == {"label": 1, "score": 1, "right": 1}
    assert task.score(_item(0), _said(-1, -2, "no")) == {"label": 0, "score": 1, "right": 0}
    # Neither is more probable: it is no yes.
    assert task.score(_item(0), _said(-1, -1))["right"] == 1


def test_area_and_accuracy_agree_with_a_case_worked_out_by_hand() -> None:
    task = HatefulMemesTask(HatefulMemesConfig(folder=""))
    items = [_item(label) for label in (1, 1, 1, 0, 0)]
    # Scores 2, 0, -1 of hateful memes against 0, -2: of 6 pairs 4 are in order, and one is a tie.
    said = [_said(score, 0) for score in (2, 0, -1, 0, -2)]
    numbers = numbers_of(task.metrics, columns_of(task, items, said))
    assert numbers == pytest.approx({"roc_auc": 4.5 / 6, "accuracy": 3 / 5})


def _area(labels: list[int], predictions: list[Prediction]) -> float:
    """By its definition, and as OpenFlamingo scores: by the probability of yes among the two answers."""
    scores = []
    for said in predictions:
        yes, no = math.exp(said.log_probabilities["yes"]), math.exp(said.log_probabilities["no"])
        # Equal log-probabilities would differ in their last bits.
        scores.append(round(yes / (yes + no), 12))
    won = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, hateful in zip(scores, labels, strict=True)
        for other, harmful in zip(scores, labels, strict=True)
        if hateful and not harmful
    ]
    return sum(won) / len(won)


def test_area_agrees_with_all_pairs_one_by_one() -> None:
    rng = np.random.default_rng(3)
    task = HatefulMemesTask(HatefulMemesConfig(folder=""))
    labels = rng.integers(2, size=60).tolist()
    # Quarters give ties, and their sums are exact.
    said = [_said(*(-rng.integers(1, 12, size=2) / 4).tolist()) for _ in labels]
    columns = columns_of(task, [_item(label) for label in labels], said)
    assert numbers_of(task.metrics, columns)["roc_auc"] == pytest.approx(_area(labels, said))
    weights_repeat_items(task.metrics, columns, [""] * len(labels))


def test_area_of_one_label_alone_is_not_a_number() -> None:
    task = HatefulMemesTask(HatefulMemesConfig(folder=""))
    columns = columns_of(task, [_item(1), _item(0)], [_said(0, -1), _said(0, -2)])
    area = task.metrics[0]
    assert math.isnan(area.of(columns, np.array([2.0, 0.0])))
    assert math.isnan(area.of(columns, np.array([0.0, 1.0])))
    assert area.of(columns, np.array([3.0, 1.0])) == 0.0


def test_exchanged_demonstrations_have_the_other_label(tmp_path: Path) -> None:
    task = _write(tmp_path)
    questions = task.load()
    exchanged = task.exchanged(questions.queries[0], list(questions.pool))
    assert [item.answer for item in exchanged] == ["yes"]
