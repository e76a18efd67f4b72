from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.evaluation_tasks import IsekaiConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.answering import request_of
from mmicl_core.evaluation.controls import Shown, change
from mmicl_core.evaluation.tasks.base import Item, Prediction, Style
from mmicl_core.evaluation.tasks.isekai import IsekaiTask
from tests.unit.evaluation.tasks.scoring import columns_of, numbers_of, write_json_lines

MOST = 4
POSITIVE = [f"icemic/{number}.png" for number in range(MOST)]
NEGATIVE = [f"ice cream/{number}.png" for number in range(MOST)]
OPENING = (
    "You should find the causal relationship between the examples I am going to show you. And use that to "
    "answer to the [FINAL QUESTION]. "
)
SHOWN = "[BEGIN EXAMPLE] What is in the image?"
ASKED = "[FINAL QUESTION]: Based on the previous examples, what is in the image?"


def _row(**changes: Any) -> dict[str, Any]:
    """A line with all the fields of the released code, by its spelling of them."""
    return {
        "image_name": "icemic/9.png",
        "positive_list": POSITIVE,
        "negative_list": NEGATIVE,
        "positive_promt": "icemic",
        "negative_promt": "ice cream",
        "label_name": "icemic",
    } | changes


def _task(folder: Path, *rows: dict[str, Any], split: str = "ten") -> IsekaiTask:
    """A task about rows whose pictures all exist."""
    name = {"ten": "ISEKAI-10.json", "pair": "ISEKAI-pair.json"}[split]
    write_json_lines(folder / name, rows)
    for row in rows:
        for picture in [row["image_name"], *row["positive_list"], *row["negative_list"]]:
            (folder / picture).parent.mkdir(exist_ok=True)
            (folder / picture).write_bytes(picture.encode())
    return IsekaiTask(IsekaiConfig.model_validate({"folder": str(folder), "split": split}))


def _query(folder: Path, **changes: Any) -> tuple[IsekaiTask, Item]:
    task = _task(folder, _row(**changes))
    (query,) = task.load().queries
    return task, query


def _shown(task: IsekaiTask, query: Item, shots: int, seed: int = 0) -> list[Item]:
    return task.demonstrations(query, shots, random.Random(seed))


def test_lines_of_either_split_become_queries_in_their_order(tmp_path: Path) -> None:
    rows = [_row(), _row(image_name="icemic/8.png"), _row(image_name="ice cream/9.png")]
    rows[2]["label_name"] = "ice cream"
    for split in ("ten", "pair"):
        questions = _task(tmp_path, *rows, split=split).load()
        assert [query.pictures for query in questions.queries] == [(row["image_name"],) for row in rows]
        assert len({query.id for query in questions.queries}) == 3 and not questions.pool
        assert questions.pictures.read("icemic/8.png") == b"icemic/8.png"


def test_questions_about_one_picture_are_one_group(tmp_path: Path) -> None:
    task = _task(tmp_path, _row(), _row(negative_promt="cactihog"), split="pair")
    one, other = task.load().queries
    assert one.group == other.group and one.id != other.id


@pytest.mark.parametrize("style", ["chat", "open_flamingo"])
@pytest.mark.parametrize("shots", [1, 2, 5])
def test_model_reads_the_sentences_of_the_released_code_with_its_opening_once(
    tmp_path: Path, style: Style, shots: int
) -> None:
    task, query = _query(tmp_path)
    shown = _shown(task, query, shots)
    *turns, asked = request_of(task, Shown(query, tuple(shown)), style).turns
    assert [turn.question for turn in turns] == [OPENING + SHOWN, *[SHOWN] * (shots - 1)]
    assert [turn.pictures for turn in turns] == [item.pictures for item in shown]
    names = [item.pictures[0].partition("/")[0] for item in shown]
    assert [turn.answer for turn in turns] == [
        f'there is "{name}" in the image. [END EXAMPLE]' for name in names
    ]
    assert (asked.question, asked.pictures, asked.answer) == (ASKED, query.pictures, None)


def test_query_without_demonstrations_has_no_opening_as_in_the_released_code(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    (asked,) = request_of(task, Shown(query, ()), "chat").turns
    assert asked.question == ASKED


def test_opening_still_stands_first_where_demonstrations_are_reversed(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    shown = Shown(query, tuple(_shown(task, query, 6)))
    turned = change(task, shown, "reversed", None, 1)
    assert turned is not None
    before, after = (request_of(task, one, "chat").turns for one in (shown, turned))
    assert [turn.question for turn in after] == [OPENING + SHOWN, *[SHOWN] * 5, ASKED]
    assert [turn.pictures for turn in after[:-1]] == [turn.pictures for turn in before[-2::-1]]
    assert [turn.answer for turn in after[:-1]] == [turn.answer for turn in before[-2::-1]]


def test_query_is_asked_in_the_sentence_of_the_released_code_in_either_style(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    for style in ("chat", "open_flamingo"):
        turn = task.turn(query, style)  # type: ignore[arg-type]
        assert turn.question == ASKED
        assert turn.answer == 'there is "icemic" in the image.'


def test_demonstrations_are_the_first_of_both_lists_and_more_hold_fewer(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    before: set[str] = set()
    for shots in range(2 * MOST + 1):
        shown = {item.pictures[0] for item in _shown(task, query, shots)}
        assert len(shown) == shots and before <= shown
        for pictures in (POSITIVE, NEGATIVE):
            taken = [picture for picture in pictures if picture in shown]
            assert taken == pictures[: len(taken)] and len(taken) in (shots // 2, (shots + 1) // 2)
        before = shown


def test_order_of_demonstrations_is_drawn_with_the_seed(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    orders = {tuple(item.pictures[0] for item in _shown(task, query, 8, seed)) for seed in range(20)}
    assert len(orders) > 10
    assert _shown(task, query, 8, 3) == _shown(task, query, 8, 3)
    last_is_positive = [_shown(task, query, 8, seed)[-1].pictures[0] in POSITIVE for seed in range(200)]
    assert 60 < sum(last_is_positive) < 140


def test_odd_demonstration_is_of_either_class(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    positive = [_shown(task, query, 1, seed)[0].pictures[0] in POSITIVE for seed in range(200)]
    assert 60 < sum(positive) < 140


def test_query_of_the_second_class_is_named_like_it(tmp_path: Path) -> None:
    task, query = _query(tmp_path, image_name="ice cream/9.png", label_name="Ice Cream")
    assert query.answer == 'there is "ice cream" in the image.'
    assert task.score(query, Prediction("ice cream"))["right"] == 1
    assert task.score(query, Prediction("icemic")) == {"right": 0, "right_as_released": 0, "other": 1}


def test_picture_that_is_asked_about_is_not_shown(tmp_path: Path) -> None:
    task, query = _query(tmp_path, image_name=POSITIVE[0])
    assert {item.pictures[0] for item in _shown(task, query, 4)} == {*POSITIVE[1:3], *NEGATIVE[:2]}


def test_more_demonstrations_than_there_are_name_the_question_and_both_numbers(tmp_path: Path) -> None:
    task, query = _query(tmp_path, positive_list=POSITIVE[:2])
    with pytest.raises(
        DataError, match=r"question 0 has 2 pictures of 'icemic'.* 6 .* 3: lower evaluate.shots"
    ):
        _shown(task, query, 6)


def test_exchanged_demonstrations_keep_their_pictures_and_words_under_the_other_name(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    shown = _shown(task, query, 6)
    exchanged = task.exchanged(query, shown)
    other = {"icemic": "ice cream", "ice cream": "icemic"}
    for before, after in zip(shown, exchanged, strict=True):
        assert (before.pictures, before.question) == (after.pictures, after.question)
        name = before.pictures[0].partition("/")[0]
        assert after.answer == before.answer.replace(f'"{name}"', f'"{other[name]}"') != before.answer


def test_counterpart_asks_about_the_other_class_behind_the_same_demonstrations(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    shown = _shown(task, query, 4)
    turned = task.counterpart(query, shown)
    assert turned is not None and turned[1] == shown
    asked = turned[0]
    assert asked.pictures == (NEGATIVE[2],) and asked.id == query.id and asked.question == query.question
    assert task.turn(asked, "chat").answer == 'there is "ice cream" in the image.'
    assert [task.score(asked, Prediction(said))["right"] for said in ("ice cream", "icemic")] == [1, 0]


def test_counterpart_is_none_where_all_pictures_are_shown(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    assert task.counterpart(query, _shown(task, query, 2 * MOST)) is None


def _released(answer: str, row: dict[str, Any]) -> bool:
    """`LCLComputeMetrics` with `ISEKAIMetrics`, step by step as their code goes."""
    target = f'there is "{row["label_name"]}" in the image.'
    for removed in ("The answer is", "there is", "in the image", '"', "'", "."):
        target = "".join(target.split(removed))
    target = target.strip().lower()
    other = ""
    for name in (row["positive_promt"].lower(), row["negative_promt"].lower()):
        if name != target:
            other = name
    return len(answer.split(target)) > 1 and not any(
        other in part for part in ["".join(answer.split(target))]
    )


def test_score_as_released_is_that_of_the_released_code_on_odd_answers(tmp_path: Path) -> None:
    names = [("icemic", "ice cream"), ("octopus vacuum", "octopus"), ("octopus", "octopus vacuum")]
    rows = [
        _row(positive_promt=one, negative_promt=other, label_name=label)
        for one, other in names
        for label in (one, other)
    ]
    task = _task(tmp_path, *rows)
    words = ["icemic", "Icemic", "ice cream", "octopus", "vacuum", "octopus vacuum", ".", "not", '"', ""]
    rng, counted = random.Random(1), 0
    for query, row in zip(task.load().queries, rows, strict=True):
        for _ in range(300):
            answer = " ".join(rng.choice(words) for _ in range(rng.randrange(5)))
            expected = _released(answer, row)
            assert task.score(query, Prediction(answer))["right_as_released"] == expected, (answer, row)
            counted += expected
    assert 200 < counted < 1600


def test_metrics_are_shares_of_answers_the_corrected_one_first(tmp_path: Path) -> None:
    task, query = _query(tmp_path)
    said = ['there is "icemic" in the image.', "Icemic", "ice cream", "icemic or ice cream"]
    told = numbers_of(task.metrics, columns_of(task, [query] * 4, said))
    assert told == {"accuracy": 0.5, "accuracy as released": 0.25, "named the other class": 0.25}
    assert next(iter(told)) == "accuracy"


def test_missing_file_is_named_with_what_belongs_there_and_where_it_is_to_be_had(tmp_path: Path) -> None:
    for split, name in (("ten", "ISEKAI-10.json"), ("pair", "ISEKAI-pair.json")):
        task = IsekaiTask(IsekaiConfig.model_validate({"folder": str(tmp_path), "split": split}))
        with pytest.raises(
            DataError, match=rf"{name} is missing: put .* https://huggingface.co/ISEKAI-Portal"
        ):
            task.load()


@pytest.mark.parametrize("picture", ["icemic/9.png", POSITIVE[-1], NEGATIVE[-1]])
def test_missing_picture_is_named_before_anything_is_asked(tmp_path: Path, picture: str) -> None:
    task = _task(tmp_path, _row())
    (tmp_path / picture).unlink()
    with pytest.raises(DataError, match=rf"{picture} is missing: put the picture there, from ISEKAI"):
        task.load()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"label_name": "cactihog"}, "label_name is 'cactihog' instead of 'icemic' or 'ice cream'"),
        ({"negative_promt": "Icemic"}, "positive_promt and negative_promt are both 'icemic'"),
        ({"positive_promt": 3}, "positive_promt is 3"),
        ({"negative_list": []}, r"negative_list is \[\] instead of a list of the paths"),
        ({"positive_list": ["icemic/0.png", ""]}, r"positive_list is \['icemic/0.png', ''\]"),
    ],
)
def test_line_that_breaks_the_layout_is_named_with_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    task = _task(tmp_path, _row())
    write_json_lines(tmp_path / "ISEKAI-10.json", [_row(), _row(**changes)])
    with pytest.raises(DataError, match=rf"ISEKAI-10.json: line 1: {told}"):
        task.load()


@pytest.mark.parametrize("field", list(_row()))
def test_absent_field_is_named(tmp_path: Path, field: str) -> None:
    task, row = _task(tmp_path, _row()), _row()
    del row[field]
    write_json_lines(tmp_path / "ISEKAI-10.json", [row])
    with pytest.raises(DataError, match=rf"line 0: .*{field}"):
        task.load()
