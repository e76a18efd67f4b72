from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.evaluation_tasks import VsrConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.vsr import VsrTask
from tests.unit.evaluation.tasks.scoring import (
    columns_of,
    numbers_of,
    weights_repeat_items,
    write_json_lines,
)


def _record(number: int, caption: str, label: int) -> dict[str, Any]:
    image = f"{number:012}.jpg"
    return {
        "image": image,
        "image_link": f"http://images.cocodataset.org/train2017/{image}",
        "caption": caption,
        "label": label,
        "relation": "behind",
        "subj": "car",
        "obj": "suitcase",
        "annotator_id": 2,
        "vote_true_validator_id": "[18, 2]",
        "vote_false_validator_id": "[1]",
    }


TEST = [
    _record(17697, "The car is behind the suitcase.", 1),
    _record(199940, "The cat is under the backpack.", 0),
    _record(199940, "The cat is on the backpack.", 1),
]
TRAIN = [_record(470862, "The handbag is right of the cat.", 0)]


def _write(folder: Path, split: Any = "random") -> VsrTask:
    write_json_lines(folder / "splits" / split / "test.jsonl", TEST)
    write_json_lines(folder / "splits" / split / "train.jsonl", TRAIN)
    (folder / "images").mkdir()
    (folder / "images" / "000000017697.jpg").write_bytes(b"a car")
    return VsrTask(VsrConfig(folder=str(folder), split=split))


@pytest.mark.parametrize("split", ["random", "zeroshot"])
def test_published_split_becomes_queries_pool_and_pictures(tmp_path: Path, split: str) -> None:
    questions = _write(tmp_path, split).load()
    assert [item.answer for item in questions.queries] == ["yes", "no", "yes"]
    assert len({item.id for item in questions.queries}) == 3
    assert [item.question for item in questions.pool] == ["The handbag is right of the cat."]
    assert questions.pictures.read(questions.queries[0].pictures[0]) == b"a car"


def test_captions_of_one_picture_are_one_group(tmp_path: Path) -> None:
    one, two, three = _write(tmp_path).load().queries
    assert two.group == three.group != one.group


def test_caption_is_asked_about_as_a_yes_no_question(tmp_path: Path) -> None:
    task = _write(tmp_path)
    item = task.load().queries[0]
    asked = "The car is behind the suitcase.\nIs this statement about the image true? Answer yes or no."
    assert task.words(item, "chat") == task.words(item, "open_flamingo") == asked


@pytest.mark.parametrize("name", ["splits/random/test.jsonl", "splits/random/train.jsonl", "images"])
def test_missing_part_is_an_error_that_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    task = _write(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{name} is missing: put .*from Visual Spatial Reasoning"):
        task.load()


def test_answer_counts_only_if_it_begins_with_the_right_word(tmp_path: Path) -> None:
    task = _write(tmp_path)
    queries = list(task.load().queries)
    for said, share in (
        (["Yes", "No", "yes, it is"], 1),
        (["No", "Yes", "true"], 0),
        (["Yes.", "There is no cat", ""], 1 / 3),
    ):
        columns = columns_of(task, queries, said)
        assert numbers_of(task.metrics, columns) == pytest.approx({"accuracy": share})


def test_weights_of_answers_count_as_so_many_answers(tmp_path: Path) -> None:
    task = _write(tmp_path)
    queries = list(task.load().queries) * 5
    columns = columns_of(task, queries, ["yes", "no", "maybe", "No", "Yes"] * 3)
    weights_repeat_items(task.metrics, columns, [""] * len(queries))


def test_exchanged_demonstrations_have_the_other_answer(tmp_path: Path) -> None:
    task = _write(tmp_path)
    questions = task.load()
    assert task.exchanged(questions.queries[0], list(questions.pool))[0].answer == "yes"
