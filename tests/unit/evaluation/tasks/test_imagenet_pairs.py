from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.evaluation_tasks import ImageNetPairsConfig
from mmicl_core.data.wordings import WORDINGS
from mmicl_core.errors import DataError
from mmicl_core.evaluation.answering import request_of
from mmicl_core.evaluation.controls import Shown
from mmicl_core.evaluation.tasks.base import Prediction
from mmicl_core.evaluation.tasks.imagenet_pairs import MOST_QUESTIONS, ImageNetPairsTask
from tests.unit.evaluation.tasks.scoring import write_json_lines

NAMES = {"n02091134": "whippet", "n02091635": "Scottish deerhound", "n01440764": "tench", "n02640242": "gar"}


def _class(wnid: str, tests: int = 2, context: int = 3) -> dict[str, Any]:
    """A line of the pair file; its test pictures are of the validation set, which has no folders."""
    first = list(NAMES).index(wnid) * 1000
    return {
        "class_id": wnid,
        "class_name": NAMES[wnid],
        "context_samples": [f"train/{wnid}/{wnid}_{number}.JPEG" for number in range(context)],
        "test_samples": [f"val/ILSVRC2012_val_{first + number:08}.JPEG" for number in range(tests)],
    }


def _task(folder: Path, *rows: dict[str, Any]) -> ImageNetPairsTask:
    write_json_lines(folder / "test100_pairs.jsonl", rows)
    for row in rows:
        for picture in [*row.get("context_samples", ()), *row.get("test_samples", ())]:
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            (folder / picture).write_bytes(picture.encode())
    return ImageNetPairsTask(ImageNetPairsConfig(folder=str(folder)))


def test_every_class_is_asked_about_against_the_other_one_of_its_pair(tmp_path: Path) -> None:
    rows = [_class(wnid) for wnid in NAMES]
    task = _task(tmp_path, *rows)
    questions = task.load()
    told = [(query.pictures[0], query.facts["name"], query.facts["other"]) for query in questions.queries]
    pairs = [
        ("whippet", "scottish deerhound"),
        ("scottish deerhound", "whippet"),
        ("tench", "gar"),
        ("gar", "tench"),
    ]
    assert told == [
        (test, *names) for row, names in zip(rows, pairs, strict=True) for test in row["test_samples"]
    ]
    assert len({query.id for query in questions.queries}) == 8 and not questions.pool
    assert questions.pictures.read(rows[0]["test_samples"][0]) == rows[0]["test_samples"][0].encode()


def test_names_are_written_small_in_demonstrations_and_in_the_answer(tmp_path: Path) -> None:
    task = _task(tmp_path, _class("n02091635"), _class("n02091134"))
    query = task.load().queries[0]
    assert query.answer == 'there is "scottish deerhound" in the image.'
    shown = task.demonstrations(query, 4, random.Random(0))
    assert {item.answer for item in shown} == {
        'there is "scottish deerhound" in the image. [END EXAMPLE]',
        'there is "whippet" in the image. [END EXAMPLE]',
    }


def test_demonstrations_are_the_first_context_samples_of_both_classes(tmp_path: Path) -> None:
    rows = [_class("n01440764"), _class("n02640242")]
    task = _task(tmp_path, *rows)
    for query in task.load().queries:
        shown = {item.pictures[0] for item in task.demonstrations(query, 4, random.Random(0))}
        assert shown == {*rows[0]["context_samples"][:2], *rows[1]["context_samples"][:2]}


def test_opening_stands_before_whichever_demonstration_is_the_first(tmp_path: Path) -> None:
    task = _task(tmp_path, _class("n01440764"), _class("n02640242"))
    query = task.load().queries[0]
    shown = task.demonstrations(query, 4, random.Random(0))
    words = WORDINGS["released"]
    for demonstrations in (shown, shown[::-1]):
        *turns, _ = request_of(task, Shown(query, tuple(demonstrations)), "chat").turns
        assert [turn.question for turn in turns] == [
            words.opening + words.shown_question,
            *[words.shown_question] * 3,
        ]


def test_no_class_is_asked_about_more_than_fifty_times(tmp_path: Path) -> None:
    rows = [_class("n01440764", MOST_QUESTIONS + 5), _class("n02640242", 3)]
    queries = _task(tmp_path, *rows).load().queries
    assert [query.pictures[0] for query in queries] == [
        *rows[0]["test_samples"][:50],
        *rows[1]["test_samples"],
    ]


def test_answer_is_scored_by_real_names_by_both_ways_to_tell(tmp_path: Path) -> None:
    task = _task(tmp_path, _class("n02091635"), _class("n02091134"))
    query = task.load().queries[0]
    scores = [
        task.score(query, Prediction(said))
        for said in ("a scottish deerhound", "a Scottish deerhound", "a whippet", "a dog")
    ]
    assert [score["right"] for score in scores] == [1, 1, 0, 0]
    assert [score["right_as_released"] for score in scores] == [1, 0, 0, 0]
    assert [score["other"] for score in scores] == [0, 0, 1, 0]


def test_exchanged_demonstrations_have_the_other_class_name(tmp_path: Path) -> None:
    task = _task(tmp_path, _class("n01440764"), _class("n02640242"))
    query = task.load().queries[0]
    shown = task.demonstrations(query, 2, random.Random(0))
    for before, after in zip(shown, task.exchanged(query, shown), strict=True):
        name, other = ("tench", "gar") if "n01440764" in before.pictures[0] else ("gar", "tench")
        assert name in before.answer and other in after.answer and name not in after.answer


def test_missing_pair_file_is_named_with_where_it_is_to_be_had(tmp_path: Path) -> None:
    task = ImageNetPairsTask(ImageNetPairsConfig(folder=str(tmp_path)))
    told = (
        r"test100_pairs.jsonl is missing: put the file .*isekai-portal/Link-Context-Learning.*image-net.org"
    )
    with pytest.raises(DataError, match=told):
        task.load()


@pytest.mark.parametrize("place", ["context_samples", "test_samples"])
def test_missing_picture_is_named(tmp_path: Path, place: str) -> None:
    rows = [_class("n01440764"), _class("n02640242")]
    task, picture = _task(tmp_path, *rows), rows[1][place][-1]
    (tmp_path / picture).unlink()
    with pytest.raises(DataError, match=rf"{picture} is missing: put the picture there"):
        task.load()


def test_picture_that_is_never_asked_about_may_be_missing(tmp_path: Path) -> None:
    rows = [_class("n01440764", MOST_QUESTIONS + 1), _class("n02640242")]
    task = _task(tmp_path, *rows)
    (tmp_path / rows[0]["test_samples"][-1]).unlink()
    assert len(task.load().queries) == MOST_QUESTIONS + 2


def test_odd_number_of_classes_is_refused_as_one_has_no_other(tmp_path: Path) -> None:
    for count in (0, 1, 3):
        task = _task(tmp_path, *(_class(wnid) for wnid in list(NAMES)[:count]))
        with pytest.raises(DataError, match=rf"holds {count} classes, but .* in pairs"):
            task.load()


def test_pair_of_one_name_is_refused(tmp_path: Path) -> None:
    rows = [_class("n01440764"), _class("n02640242") | {"class_name": "Tench"}]
    with pytest.raises(DataError, match="lines 0 and 1 are a pair, but both are called 'tench'"):
        _task(tmp_path, *rows).load()


def test_file_of_the_classes_for_training_is_recognised(tmp_path: Path) -> None:
    row = {"class_id": "1", "class_name": "kit fox", "samples": ["train/a.JPEG"], "neighbors": []}
    with pytest.raises(DataError, match=r"test100_pairs.jsonl: line 0: .* the 900 classes for training"):
        _task(tmp_path, row, row).load()


@pytest.mark.parametrize("field", ["class_name", "context_samples", "test_samples"])
def test_absent_field_is_named_with_its_line(tmp_path: Path, field: str) -> None:
    rows = [_class("n01440764"), _class("n02640242")]
    del rows[1][field]
    with pytest.raises(DataError, match=rf"line 1: .*{field}"):
        _task(tmp_path, *rows).load()
