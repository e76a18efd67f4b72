from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.evaluation_tasks import SnliVeConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.snli_ve import SnliVeTask
from tests.unit.evaluation.tasks.scoring import (
    columns_of,
    numbers_of,
    weights_repeat_items,
    write_json_lines,
)


def _record(picture: str, sentence: str, label: str) -> dict[str, Any]:
    return {
        "Flickr30K_ID": picture,
        "annotator_labels": [label, label, "neutral"],
        "captionID": f"{picture}.jpg#2",
        "gold_label": label,
        "pairID": f"{picture}.jpg#2r1n",
        "sentence1": "This church choir sings to the masses.",
        "sentence1_binary_parse": "( )",
        "sentence1_parse": "(ROOT)",
        "sentence2": sentence,
        "sentence2_binary_parse": "( )",
        "sentence2_parse": "(ROOT)",
    }


TEST = [
    _record("2677109430", "The church is filled with song.", "entailment"),
    _record("2677109430", "The church has cracks in the ceiling.", "neutral"),
    _record("6160193920", "A woman is asleep.", "contradiction"),
]
TRAIN = [_record("3416050480", "A person is training his horse.", "neutral")]


def _write(folder: Path, split: Any = "test") -> SnliVeTask:
    write_json_lines(folder / f"snli_ve_{split}.jsonl", TEST)
    write_json_lines(folder / "snli_ve_train.jsonl", TRAIN)
    (folder / "flickr30k_images").mkdir()
    (folder / "flickr30k_images" / "2677109430.jpg").write_bytes(b"a church")
    return SnliVeTask(SnliVeConfig(folder=str(folder), split=split))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_published_split_becomes_queries_pool_and_pictures(tmp_path: Path, split: str) -> None:
    questions = _write(tmp_path, split).load()
    one, two, three = questions.queries
    assert [item.answer for item in questions.queries] == ["entailment", "neutral", "contradiction"]
    assert one.group == two.group != three.group
    assert len({item.id for item in questions.queries}) == 3
    assert [item.question for item in questions.pool] == ["A person is training his horse."]
    assert questions.pictures.read(one.pictures[0]) == b"a church"


def test_files_of_before_2020_name_the_same_pictures(tmp_path: Path) -> None:
    task = _write(tmp_path)
    new = [item.pictures for item in task.load().queries]
    old = [{**record, "Flikr30kID": f"{record['Flickr30K_ID']}.jpg"} for record in TEST]
    for record in old:
        del record["Flickr30K_ID"]
    write_json_lines(tmp_path / "snli_ve_test.jsonl", old)
    assert [item.pictures for item in task.load().queries] == new


@pytest.mark.parametrize("name", ["snli_ve_test.jsonl", "snli_ve_train.jsonl", "flickr30k_images"])
def test_missing_part_is_an_error_that_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    task = _write(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{name} is missing: put .*from SNLI-VE"):
        task.load()


def test_label_without_a_majority_is_an_error(tmp_path: Path) -> None:
    task = _write(tmp_path)
    write_json_lines(tmp_path / "snli_ve_test.jsonl", [{**TEST[0], "gold_label": "-"}])
    with pytest.raises(DataError, match=r"snli_ve_test\.jsonl: line 0: gold_label is '-' instead of one of"):
        task.load()


def test_sentence_is_asked_about_with_the_three_relations(tmp_path: Path) -> None:
    task = _write(tmp_path)
    item = task.load().queries[0]
    asked = task.words(item, "chat")
    assert asked.startswith("The church is filled with song.\n")
    assert asked.endswith("Answer entailment, neutral or contradiction.")
    assert task.words(item, "open_flamingo") == asked


def _right(answer: str, label: str) -> bool:
    """Word by word."""
    words = re.split(r"\W+", answer.lower())
    return {word for word in words if word in ("entailment", "neutral", "contradiction")} == {label}


def test_accuracy_agrees_with_answers_looked_at_word_by_word(tmp_path: Path) -> None:
    task = _write(tmp_path)
    said = [
        "entailment",
        "Entailment.",
        "The image and the sentence are neutral",
        "neutral or contradiction",
        "contradictions",
        "contradiction, a clear contradiction",
        "yes",
        "",
    ]
    queries = [item for item in task.load().queries for _ in said]
    columns = columns_of(task, queries, said * 3)
    right = [_right(answer, item.answer) for item, answer in zip(queries, said * 3, strict=True)]
    assert sum(right) == 4
    assert numbers_of(task.metrics, columns) == pytest.approx({"accuracy": 4 / 24})
    weights_repeat_items(task.metrics, columns, [""] * len(queries))
    assert task.metrics[0].chance == pytest.approx(1 / 3)
