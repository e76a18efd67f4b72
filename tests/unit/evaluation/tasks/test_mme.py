from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.config.evaluation_tasks import MmeConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item, Prediction
from mmicl_core.evaluation.tasks.mme import COGNITION, PERCEPTION, MmeTask
from tests.unit.evaluation.tasks.scoring import columns_of, numbers_of, weights_repeat_items

IN_TWO_FOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")
ODD = ("Yes", "no", "yes, it is", "No.", "Not at all", "I think yes", "", "  yes", "maybe", "NO WAY")


def _write(folder: Path, pictures: int = 2) -> MmeTask:
    """The published layout, with as many pictures for each subtask, whose bytes are their names."""
    for subtask in (*PERCEPTION, *COGNITION):
        apart = subtask in IN_TWO_FOLDERS
        images = folder / subtask / ("images" if apart else "")
        texts = folder / subtask / ("questions_answers_YN" if apart else "")
        images.mkdir(parents=True)
        texts.mkdir(exist_ok=True)
        for number in range(pictures):
            suffix = ".png" if subtask == "code_reasoning" else ".jpg"
            (images / f"{number:04}{suffix}").write_bytes(f"{subtask} {number}".encode())
            (texts / f"{number:04}.txt").write_text(
                f"Is the number {number} shown? Please answer yes or no.\tYes\n"
                f"Is the number {number + 1} shown? Please answer yes or no.\tNo\n"
            )
    (folder / "eval_tool").mkdir()
    return MmeTask(MmeConfig(folder=str(folder)))


def test_published_folders_become_queries_without_a_pool(tmp_path: Path) -> None:
    task = _write(tmp_path)
    questions = task.load()
    assert len(questions.queries) == 14 * 2 * 2 and not questions.pool
    assert len({item.id for item in questions.queries}) == 14 * 2 * 2
    of_code = [item for item in questions.queries if item.facts["subtask"] == "code_reasoning"]
    assert [item.answer for item in of_code] == ["yes", "no"] * 2
    assert of_code[0].question == "Is the number 0 shown? Please answer yes or no."
    assert task.words(of_code[0], "chat") == of_code[0].question
    for item in questions.queries:
        assert questions.pictures.read(item.pictures[0]).decode().startswith(item.facts["subtask"])


def test_two_questions_about_a_picture_are_one_group(tmp_path: Path) -> None:
    queries = _write(tmp_path).load().queries
    assert all(one.group == two.group for one, two in zip(queries[::2], queries[1::2], strict=True))
    assert len({item.group for item in queries}) == 14 * 2


@pytest.mark.parametrize("name", ["count", "artwork/images", "artwork/questions_answers_YN", "OCR"])
def test_missing_folder_is_an_error_that_says_what_belongs_there(tmp_path: Path, name: str) -> None:
    task = _write(tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{name} is missing: put the .* there, from MME .*github"):
        task.load()


def test_question_file_without_its_picture_is_an_error(tmp_path: Path) -> None:
    task = _write(tmp_path)
    (tmp_path / "count" / "0001.jpg").unlink()
    with pytest.raises(DataError, match=r"count/0001\.txt is about one picture, but 0 of \['0001\.jpg', "):
        task.load()
    (tmp_path / "count" / "0001.jpg").touch()
    (tmp_path / "count" / "0001.png").touch()
    with pytest.raises(DataError, match=r"count/0001\.txt is about one picture, but 2 of"):
        task.load()


def test_subtask_without_questions_is_an_error(tmp_path: Path) -> None:
    task = _write(tmp_path)
    for path in (tmp_path / "scene" / "questions_answers_YN").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"scene/questions_answers_YN has no \.txt file: put"):
        task.load()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"Is it?\tYes\n", "has 1 lines instead of the two questions"),
        (b"Is it?\tYes\nIs it?\tNo\nIs it?\tNo\n", "has 3 lines"),
        (b"Is it?\tYes\nIs it? No\n", "'Is it\\? No' is no question with a tab"),
        (b"Is it?\tYes\nIs it?\tMaybe\n", "'Is it\\?\\\\tMaybe' is no question"),
        (b"Is it?\tYes\n\tNo\n", "'No' is no question"),
        (b"Is \xff it?\tYes\nIs it?\tNo\n", "cannot be read"),
    ],
)
def test_broken_question_file_is_an_error(tmp_path: Path, content: bytes, told: str) -> None:
    task = _write(tmp_path)
    (tmp_path / "color" / "0000.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"color/0000\.txt.*{told}"):
        task.load()


def test_demonstrations_are_of_other_pictures_of_the_same_subtask(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=5)
    query = next(item for item in task.load().queries if item.facts["subtask"] == "color")
    answers = set()
    for seed in range(20):
        shown = task.demonstrations(query, 4, random.Random(seed))
        assert {item.facts["subtask"] for item in shown} == {"color"}
        assert len({item.group for item in shown} - {query.group}) == 4
        assert task.demonstrations(query, 3, random.Random(seed)) == shown[:3]
        answers |= {item.answer for item in shown}
    assert answers == {"yes", "no"}
    with pytest.raises(
        DataError, match="mme color has 4 pictures beside that of question color/0000/0, but 5"
    ):
        task.demonstrations(query, 5, random.Random(0))


def _as_published(items: Sequence[Item], answers: Sequence[str]) -> dict[str, float]:
    """As the official script goes about it: lines of each subtask, two by two."""
    lines: dict[str, list[str]] = {}
    for item, answer in zip(items, answers, strict=True):
        line = "\t".join((item.pictures[0], item.question, item.answer.capitalize(), answer))
        lines.setdefault(item.facts["subtask"], []).append(line)
    numbers = {}
    for subtask, of_subtask in lines.items():
        hits, both = 0, 0
        for first in range(0, len(of_subtask), 2):
            right = 0
            for line in of_subtask[first : first + 2]:
                _, _, truth, said = line.lower().split("\t")
                if said not in ("yes", "no"):
                    beginning = said[:4]
                    said = "yes" if "yes" in beginning else "no" if "no" in beginning else "other"
                right += said == truth
            hits += right
            both += right == 2
        numbers[f"{subtask}_acc"] = hits / len(of_subtask)
        numbers[f"{subtask}_acc_plus"] = both / (len(of_subtask) / 2)
        numbers[subtask] = hits / len(of_subtask) + both / (len(of_subtask) / 2)
    numbers["perception"] = sum(numbers[subtask] for subtask in PERCEPTION)
    numbers["cognition"] = sum(numbers[subtask] for subtask in COGNITION)
    return numbers


def test_metrics_agree_with_the_published_script_on_odd_answers(tmp_path: Path) -> None:
    task = _write(tmp_path, pictures=6)
    queries = list(task.load().queries)
    said = random.Random(2).choices(ODD, weights=[6, 6, *[1] * (len(ODD) - 2)], k=len(queries))
    columns = columns_of(task, queries, said)
    assert numbers_of(task.metrics, columns) == pytest.approx(_as_published(queries, said))
    weights_repeat_items(task.metrics, columns, [item.group for item in queries])


def test_scores_agree_with_a_case_worked_out_by_hand(tmp_path: Path) -> None:
    task = _write(tmp_path)
    queries = list(task.load().queries)
    # Always yes: half of all answers, and no picture, are right. In one subtask all answers are right.
    said = [item.answer if item.facts["subtask"] == "OCR" else "Yes" for item in queries]
    shown = {metric.name: metric.scale for metric in task.metrics}
    numbers = numbers_of(task.metrics, columns_of(task, queries, said))
    assert numbers["OCR"] * shown["OCR"] == pytest.approx(200)
    assert numbers["count"] * shown["count"] == pytest.approx(50)
    assert numbers["perception"] * shown["perception"] == pytest.approx(9 * 50 + 200)
    assert numbers["cognition"] * shown["cognition"] == pytest.approx(4 * 50)


def test_chance_is_what_guessing_comes_to(tmp_path: Path) -> None:
    task = _write(tmp_path)
    queries = list(task.load().queries)
    rng = random.Random(7)
    runs = [columns_of(task, queries, rng.choices(["Yes", "No"], k=len(queries))) for _ in range(300)]
    columns = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    numbers = numbers_of(task.metrics, columns)
    for metric in task.metrics[:2]:
        assert numbers[metric.name] == pytest.approx(metric.chance, rel=0.05)


def test_task_is_known_by_perception_and_each_subtask_has_three_numbers() -> None:
    names = [metric.name for metric in MmeTask(MmeConfig(folder="")).metrics]
    assert names[:2] == ["perception", "cognition"]
    assert names[2:5] == ["existence", "existence_acc", "existence_acc_plus"]
    assert len(set(names)) == len(names) == 2 + 14 * 3


def test_half_a_pair_counts_for_the_share_of_answers_and_not_of_pictures(tmp_path: Path) -> None:
    task = _write(tmp_path)
    queries = [item for item in task.load().queries if item.facts["subtask"] == "existence"][:3]
    numbers = numbers_of(task.metrics, columns_of(task, queries, ["yes", "no", "no"]))
    assert numbers["existence_acc"] == pytest.approx(2 / 3)
    assert numbers["existence_acc_plus"] == 1
    assert task.score(queries[0], Prediction("yes")) == {
        "subtask": 0,
        "right": 1,
        "pair": 0,
        "pair_right": 0,
    }


def test_total_without_one_of_its_subtasks_is_not_a_number(tmp_path: Path) -> None:
    task = _write(tmp_path)
    queries = [item for item in task.load().queries if item.facts["subtask"] != "OCR"]
    numbers = numbers_of(task.metrics, columns_of(task, queries, ["yes"] * len(queries)))
    assert math.isnan(numbers["perception"]) and math.isnan(numbers["OCR"])
    assert numbers["cognition"] == pytest.approx(4 * 0.5)


def test_answers_to_one_picture_are_a_pair_wherever_they_stand(tmp_path: Path) -> None:
    task = _write(tmp_path)
    queries = list(task.load().queries)
    said = [ODD[place % len(ODD)] for place in range(len(queries))]
    order = np.random.default_rng(1).permutation(len(queries))
    mixed = columns_of(task, [queries[n] for n in order], [said[n] for n in order])
    expected = numbers_of(task.metrics, columns_of(task, queries, said))
    assert numbers_of(task.metrics, mixed) == pytest.approx(expected)


def test_exchanged_demonstrations_have_the_other_answer(tmp_path: Path) -> None:
    task = _write(tmp_path)
    query, *others = task.load().queries
    assert [item.answer for item in task.exchanged(query, others[:2])] == ["yes", "no"]
