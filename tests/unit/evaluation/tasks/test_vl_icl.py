from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.evaluation_tasks import VlIclConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item, Prediction
from mmicl_core.evaluation.tasks.vl_icl import VlIclTask, first_sentence
from tests.unit.evaluation.tasks.scoring import columns_of, numbers_of

TASKS = ("open_mi", "operator_induction", "operator_induction_interleaved", "clevr", "textocr", "matching_mi")
CLASSES = ["dax", "blicket", "perpo", "slation", "shously"]
RESULT = "What is the result of the following mathematical expression?"
SAME = "Do the two images satisfy the induced relationship?"


def _open_query(number: int, answer: str = "dax") -> dict[str, Any]:
    """A query that brings five pictures of each of five classes, under one caption."""
    support = {
        name: {
            "images": [f"open_mi/support/{number}_{name}_{shot}.jpg" for shot in range(5)],
            "caption": name,
        }
        for name in CLASSES
    }
    query = {"id": f"q{number}", "image": [f"open_mi/query/{number}.jpg"], "question": "This is a"}
    return {**query, "answer": answer, "classes": CLASSES, "support": support}


def _operands(task: str, one: int, other: int) -> dict[str, Any]:
    images = [f"{task}/images/{one}_{other}.png"]
    if task == "operator_induction_interleaved":
        images = [f"{task}/images/{one}.png", f"{task}/images/{other}.png"]
    answer = [one + other, one - other, one * other]
    return {"id": f"{one}_{other}", "image": images, "question": RESULT, "answer": answer}


def _operator_query(task: str, one: int, other: int, operator: str) -> dict[str, Any]:
    record = _operands(task, one, other)
    answer = record["answer"]["+-x".index(operator)]
    return record | {"id": f"q{one}{other}{operator}", "answer": answer, "operator": operator}


def _pictures(number: int, kind: str, answer: str) -> dict[str, Any]:
    image = [f"matching_mi/{kind}/{number}_{side}.jpg" for side in (1, 2)]
    return {"id": f"{kind}{number}", "image": image, "question": SAME, "answer": answer}


def _one(task: str, number: int, question: str, answer: Any, part: str) -> dict[str, Any]:
    image = [f"{task}/{part}/{number}.png"]
    return {"id": f"{part}{number}", "image": image, "question": question, "answer": answer}


def _records(task: str) -> tuple[list[Any], list[Any]]:
    """Queries and support, as published."""
    if task == "open_mi":
        return [_open_query(0), _open_query(1, "blicket")], []
    if task.startswith("operator_induction"):
        queries = [_operator_query(task, 7, 2, operator) for operator in "+-x"]
        return queries, [_operands(task, one, other) for one in (3, 4, 5) for other in (1, 6)]
    if task == "matching_mi":
        pairs = [
            {"same": _pictures(number, "same", "Yes"), "diff": _pictures(number, "diff", "No")}
            for number in range(4)
        ]
        return [_pictures(9, "query", "Yes"), _pictures(8, "query", "No")], pairs
    question, answers = {
        "clevr": ("shape: large", [3, 0, 10]),
        "textocr": ("What text is shown in the red box?", ["STOP", "Café 7", "exit"]),
    }[task]
    return [_one(task, number, question, answer, "query") for number, answer in enumerate(answers)], [
        _one(task, number, question, answer, "support") for number, answer in enumerate(answers * 2)
    ]


def _images(value: Any) -> list[str]:
    """All that a file names as a picture, wherever it does."""
    if isinstance(value, list):
        return [image for part in value for image in _images(part)]
    if not isinstance(value, dict):
        return []
    found = [image for key in ("image", "images") for image in value.get(key, ())]
    return found + [image for part in value.values() for image in _images(part)]


def _task(folder: Path, task: str, queries: Any = None, support: Any = None) -> VlIclTask:
    published = _records(task)
    queries, support = queries or published[0], support or published[1]
    (folder / task).mkdir(exist_ok=True)
    (folder / task / "query.json").write_text(json.dumps(queries, indent=4), encoding="utf-8")
    if support:
        (folder / task / "support.json").write_text(json.dumps(support, indent=4), encoding="utf-8")
    for image in _images([queries, support]):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(image.encode())
    return VlIclTask(VlIclConfig.model_validate({"folder": str(folder), "task": task}))


def _shown(task: VlIclTask, query: Item, shots: int, seed: int = 0) -> list[Item]:
    shown = task.demonstrations(query, shots, random.Random(seed))
    assert shown is not None and len(shown) == shots
    return shown


@pytest.mark.parametrize("name", TASKS)
def test_queries_have_the_pictures_and_words_of_the_file_in_its_order(tmp_path: Path, name: str) -> None:
    questions = _task(tmp_path, name).load()
    records = _records(name)[0]
    assert [query.pictures for query in questions.queries] == [tuple(record["image"]) for record in records]
    assert [query.question for query in questions.queries] == [record["question"] for record in records]
    assert [query.answer for query in questions.queries] == [str(record["answer"]) for record in records]
    assert len({query.id for query in questions.queries}) == len(records)
    for query in questions.queries:
        for picture in query.pictures:
            assert questions.pictures.read(picture) == picture.encode()


@pytest.mark.parametrize("name", TASKS)
def test_instruction_stands_before_all_turns_and_never_in_one(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, name)
    questions = task.load()
    query = questions.queries[0]
    shown = task.demonstrations(query, 2, random.Random(0)) or questions.pool[:2]
    assert len(task.opening("chat", 0)) > 60 and task.opening("chat", 0).endswith("\n")
    for item in (query, *shown):
        assert task.words(item, "chat") == item.question
        assert task.words(item, "open_flamingo") == f"{item.question}\nAnswer:"


def test_instructions_are_those_of_the_benchmark(tmp_path: Path) -> None:
    begin = {
        "open_mi": "Induce the concept from the in-context examples.",
        "operator_induction": "The image contains two digit numbers and a ? representing",
        "operator_induction_interleaved": "There are two input images, each representing a single digit",
        "clevr": "The image contains objects of different shapes, colors, sizes and materials.",
        "textocr": "An image will be provided where a red box is drawn around",
        "matching_mi": "According to the few-shot examples, induce what operation to do",
    }
    for name in TASKS:
        task = _task(tmp_path, name)
        assert task.opening("chat", 0).startswith(begin[name])
        assert task.max_new_tokens == 15


@pytest.mark.parametrize("name", ["clevr", "textocr"])
def test_any_support_may_be_shown_where_it_does_not_depend_on_the_query(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, name)
    questions = task.load()
    assert [(item.pictures, item.question, item.answer) for item in questions.pool] == [
        (tuple(record["image"]), record["question"], str(record["answer"])) for record in _records(name)[1]
    ]
    query = questions.queries[0]
    assert task.demonstrations(query, 2, random.Random(0)) is None
    assert task.exchanged(query, questions.pool[:2]) is None
    assert task.counterpart(query, questions.pool[:2]) is None


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("clevr", "textocr")])
def test_more_demonstrations_begin_with_fewer(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, name)
    questions = task.load()
    assert not questions.pool
    for query in questions.queries:
        for seed in range(5):
            most = _shown(task, query, 6, seed)
            for shots in range(6):
                assert _shown(task, query, shots, seed) == most[:shots]


def test_open_mi_shows_the_query_class_and_another_in_turn_in_the_order_of_the_file(tmp_path: Path) -> None:
    task = _task(tmp_path, "open_mi")
    for query in task.load().queries:
        firsts, others = set[str](), set[str]()
        for seed in range(60):
            shown = _shown(task, query, 10, seed)
            names = [item.answer for item in shown]
            assert names == names[:2] * 5 and query.answer in names[:2] and len(set(names)) == 2
            assert {item.question for item in shown} == {"This is a"}
            for name in set(names):
                of_class = [item.pictures for item in shown if item.answer == name]
                number = query.pictures[0].removesuffix(".jpg")[-1]
                assert of_class == [(f"open_mi/support/{number}_{name}_{shot}.jpg",) for shot in range(5)]
            firsts.add("query" if names[0] == query.answer else "other")
            others |= set(names) - {query.answer}
        assert firsts == {"query", "other"} and others == set(CLASSES) - {query.answer}


def test_open_mi_takes_no_more_than_five_pictures_of_both_classes(tmp_path: Path) -> None:
    task = _task(tmp_path, "open_mi")
    assert task.most_shots == 10 and _task(tmp_path, "matching_mi").most_shots is None
    with pytest.raises(
        DataError, match=r"question 0 of open_mi has 10 demonstrations, but 11 .* evaluate.shots"
    ):
        task.demonstrations(task.load().queries[0], 11, random.Random(0))


@pytest.mark.parametrize("name", ["operator_induction", "operator_induction_interleaved"])
def test_operator_of_the_query_decides_what_demonstrations_answer(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, name)
    results = {tuple(record["image"]): record["answer"] for record in _records(name)[1]}
    drawn = set[tuple[str, ...]]()
    for place, query in enumerate(task.load().queries):
        for seed in range(20):
            for item in _shown(task, query, 3, seed):
                assert item.answer == str(results[item.pictures][place])
                drawn.add(item.pictures)
    assert drawn == set(results)


def test_questions_of_three_operators_about_one_picture_are_one_group(tmp_path: Path) -> None:
    queries = _task(tmp_path, "operator_induction").load().queries
    assert len({query.group for query in queries}) == 1 and len({query.id for query in queries}) == 3


def test_matching_shows_pairs_that_are_the_same_and_pairs_that_are_not_in_turn(tmp_path: Path) -> None:
    task = _task(tmp_path, "matching_mi")
    query = task.load().queries[0]
    firsts = set[str]()
    for seed in range(40):
        shown = _shown(task, query, 8, seed)
        assert [item.answer for item in shown] == ["Yes", "No"] * 4
        numbers = [item.pictures[0].split("/")[2] for item in shown]
        assert numbers[::2] == numbers[1::2] and len(set(numbers)) == 4
        assert all(len(item.pictures) == 2 and item.question == SAME for item in shown)
        firsts.add(numbers[0])
    assert len(firsts) == 4


def test_exchanged_demonstrations_have_the_other_of_two_answers(tmp_path: Path) -> None:
    for name, two in (("open_mi", None), ("matching_mi", {"Yes", "No"})):
        task = _task(tmp_path, name)
        query = task.load().queries[0]
        shown = _shown(task, query, 4)
        exchanged = task.exchanged(query, shown)
        assert exchanged is not None
        assert [item.pictures for item in exchanged] == [item.pictures for item in shown]
        for before, after in zip(shown, exchanged, strict=True):
            assert {before.answer, after.answer} == (two or {item.answer for item in shown})


def test_operators_have_no_two_answers_to_exchange(tmp_path: Path) -> None:
    task = _task(tmp_path, "operator_induction")
    query = task.load().queries[0]
    assert task.exchanged(query, _shown(task, query, 2)) is None


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("clevr", "textocr")])
def test_counterpart_has_another_answer_by_the_same_demonstrations(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, name)
    results = {tuple(record["image"]): record["answer"] for record in _records("operator_induction")[1]}
    for place, query in enumerate(task.load().queries):
        shown = _shown(task, query, 2)
        turned = task.counterpart(query, shown)
        assert turned is not None and turned[1] == shown
        asked = turned[0]
        assert asked.pictures not in {query.pictures, *(item.pictures for item in shown)}
        assert asked.answer != query.answer and task.words(asked, "chat") == task.words(query, "chat")
        assert task.score(asked, Prediction(asked.answer))["right"] == 1
        if name == "open_mi":
            assert asked.answer in {item.answer for item in shown} and asked.answer in asked.pictures[0]
        if name == "operator_induction":
            assert asked.answer == str(results[asked.pictures][place])


def test_counterpart_is_none_where_all_pictures_are_shown(tmp_path: Path) -> None:
    for name, shots in (("open_mi", 10), ("matching_mi", 8)):
        task = _task(tmp_path, name)
        query = task.load().queries[0]
        assert task.counterpart(query, _shown(task, query, shots)) is None
        assert task.counterpart(query, []) is None


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("dax", "dax"),
        ("  dax.\n", "dax"),
        ("dax. It is one", "dax"),
        ("dax is. one\nand more", "dax is. one"),
        ("dax \nmore", "dax "),
        (".5 is. it", ".5 is. it"),
        ("\n\n", ""),
    ],
)
def test_answer_is_read_up_to_a_new_line_or_else_to_a_full_stop(answer: str, read: str) -> None:
    assert first_sentence(answer) == read


def _released(task: str, answer: str, expected: str) -> bool:
    """`exact_match` and `exact_yes_no` of the released code, by patterns in place of its steps."""
    text = answer.strip()
    cut = re.match(r"(?s)([^\n]+)\n", text) or re.match(r"(?s)([^.]+)\.", text)
    said = (cut.group(1) if cut else text).lower()
    if task == "matching_mi":
        return ("yes" in said) if expected.lower() == "yes" else ("yes" not in said)
    if "operator_induction" in task:
        said = (re.findall(r"\d+", said) or [""])[0]
    return said == expected.lower()


@pytest.mark.parametrize("name", TASKS)
def test_accuracy_is_that_of_the_released_code_on_odd_answers(tmp_path: Path, name: str) -> None:
    task, rng, right, told = _task(tmp_path, name), random.Random(1), 0, 0
    for query in task.load().queries:
        pieces = [query.answer, query.answer.upper(), "Yes", "no", "-", "1", "0", ".", "\n", " ", "is", ""]
        for _ in range(1000):
            answer = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 5)))
            expected = _released(name, answer, query.answer)
            assert task.score(query, Prediction(answer))["right"] == expected, (answer, query.answer)
            right, told = right + expected, told + 1
    assert 0.05 < right / told < 0.95


@pytest.mark.parametrize(
    ("name", "expected", "answer", "right", "right_number"),
    [
        ("operator_induction", 9, "9", 1, 1),
        ("operator_induction", 9, "The result is 9", 1, 1),
        ("operator_induction", 9, "7 + 2 = 9", 0, 0),
        ("operator_induction", -5, "-5", 0, 1),
        ("operator_induction", 5, "-5", 1, 0),
        ("operator_induction", 9, "nine", 0, 0),
        ("clevr", 3, "3", 1, 1),
        ("clevr", 3, "3.", 1, 1),
        ("clevr", 3, "3 objects", 0, 1),
        ("clevr", 3, "03", 0, 1),
        ("clevr", 3, "", 0, 0),
    ],
)
def test_numbers_are_scored_as_released_and_by_the_first_one_with_its_sign(
    tmp_path: Path, name: str, expected: int, answer: str, right: int, right_number: int
) -> None:
    record = _records(name)[0][0] | {"answer": expected}
    task = _task(tmp_path, name, [record])
    (query,) = task.load().queries
    assert task.score(query, Prediction(answer)) == {"right": right, "right_number": right_number}


def test_yes_and_no_are_scored_by_whether_yes_is_said(tmp_path: Path) -> None:
    task = _task(tmp_path, "matching_mi")
    yes, no = task.load().queries
    for answer, is_yes in (("Yes", 1), ("yes, they do.", 1), ("No", 0), ("", 0), ("no.\nyes", 0)):
        assert task.score(yes, Prediction(answer)) == {"right": is_yes}
        assert task.score(no, Prediction(answer)) == {"right": 1 - is_yes}


@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_shares_of_the_answers(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, name)
    query = task.load().queries[0]
    said = [query.answer] * 3 + ["no number at all"]
    texts = name in ("open_mi", "textocr", "matching_mi")
    expected = {"accuracy": 0.75} | ({} if texts else {"accuracy of numbers": 0.75})
    assert numbers_of(task.metrics, columns_of(task, [query] * 4, said)) == expected


@pytest.mark.parametrize("name", TASKS)
def test_missing_files_are_named_with_where_they_are_to_be_had(tmp_path: Path, name: str) -> None:
    for file in ("query.json", "support.json"):
        task = _task(tmp_path, name)
        (tmp_path / name / file).unlink(missing_ok=True)
        if (name, file) == ("open_mi", "support.json"):
            assert task.load().queries
            continue
        told = rf"{name}/{file} is missing: put the file {file} there, from .*huggingface.co/datasets/ys-zong"
        with pytest.raises(DataError, match=told):
            task.load()


@pytest.mark.parametrize("name", TASKS)
def test_any_missing_picture_is_named_before_anything_is_asked(tmp_path: Path, name: str) -> None:
    for image in dict.fromkeys(_images(_records(name))):
        task = _task(tmp_path, name)
        (tmp_path / image).unlink()
        with pytest.raises(DataError, match=rf"{image} is missing: put the picture there"):
            task.load()


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("open_mi", {"answer": "wug"}, "classes .* are not the answer 'wug' and others"),
        ("open_mi", {"classes": ["blicket", "wug"]}, r"support has no pictures of \['wug'\]"),
        ("open_mi", {"classes": ["blicket"]}, "classes .* are not the answer 'blicket' and"),
        ("operator_induction", {"operator": "/"}, r"operator: .*'\+', '-' or 'x' \(found /\)"),
        ("operator_induction", {"answer": "nine"}, r"answer.*\(found nine\)"),
        ("matching_mi", {"answer": "maybe"}, r"answer: .*\(found maybe\)"),
        ("clevr", {"image": "clevr/query/0.png"}, r"image: .*list \(found clevr/query/0.png\)"),
        ("clevr", {"answer": True}, r"answer.*\(found True\)"),
        ("textocr", {"question": ""}, "question: "),
    ],
)
def test_query_that_breaks_the_layout_is_named_with_its_field_and_what_was_found(
    tmp_path: Path, name: str, changes: dict[str, Any], told: str
) -> None:
    first, second, *_ = _records(name)[0]
    task = _task(tmp_path, name)
    text = json.dumps([first, second | changes])
    (tmp_path / name / "query.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}/query.json: record 1: {told}.*: take the file from"):
        task.load()


def test_support_that_breaks_the_layout_is_named(tmp_path: Path) -> None:
    operands = [_operands("operator_induction", 3, 1), _operands("operator_induction", 4, 1)]
    del operands[1]["answer"][2]
    pair = {"same": _pictures(0, "same", "Yes"), "diff": _pictures(0, "diff", "No")}
    del pair["diff"]["answer"]
    for name, support, told in (
        ("operator_induction", operands, "record 1: answer: "),
        ("matching_mi", [pair], "record 0: diff.answer: "),
    ):
        task = _task(tmp_path, name, support=support)
        with pytest.raises(DataError, match=rf"{name}/support.json: {told}"):
            task.load()


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", "[{"])
def test_file_that_holds_no_records_is_refused(tmp_path: Path, content: str) -> None:
    task = _task(tmp_path, "clevr")
    (tmp_path / "clevr" / "query.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"clevr/query.json"):
        task.load()
