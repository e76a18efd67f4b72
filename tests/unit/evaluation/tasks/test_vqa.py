from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from mmicl_core.config.evaluation_tasks import VqaConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.answering import request_of
from mmicl_core.evaluation.controls import Shown
from mmicl_core.evaluation.tasks.base import Item, Prediction
from mmicl_core.evaluation.tasks.vqa import VqaTask
from tests.unit.evaluation.tasks.scoring import columns_of, numbers_of

Dataset = Literal["vqav2", "ok_vqa", "vizwiz", "textvqa"]
DATASETS: tuple[Dataset, ...] = ("vqav2", "ok_vqa", "vizwiz", "textvqa")

ANSWERS = ["net"] * 4 + ["netting"] + ["mesh"] * 5
WRITTEN = {"net": "nets", "netting": "netting", "mesh": "meshes"}
"""What OK-VQA keeps of an answer beside its stem."""
FILES = {
    "vqav2": [
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "v2_OpenEnded_mscoco_train2014_questions.json",
        "v2_mscoco_train2014_annotations.json",
        "val2014",
        "train2014",
    ],
    "ok_vqa": [
        "OpenEnded_mscoco_val2014_questions.json",
        "mscoco_val2014_annotations.json",
        "OpenEnded_mscoco_train2014_questions.json",
        "mscoco_train2014_annotations.json",
        "val2014",
        "train2014",
    ],
    "vizwiz": ["Annotations/val.json", "Annotations/train.json", "val", "train"],
    "textvqa": ["TextVQA_0.5.1_val.json", "TextVQA_0.5.1_train.json", "train_images"],
}
PICTURES = {
    "vqav2": ("val2014/COCO_val2014_000000262148.jpg", "train2014/COCO_train2014_000000458752.jpg"),
    "ok_vqa": ("val2014/COCO_val2014_000000262148.jpg", "train2014/COCO_train2014_000000458752.jpg"),
    "vizwiz": ("val/VizWiz_val_00000000.jpg", "train/VizWiz_train_00000000.jpg"),
    "textvqa": ("train_images/003a8ae2ef43b901.jpg", "train_images/0054c91397f2fe05.jpg"),
}
QUESTIONS = {
    "vqav2": ("262148000", "458752000"),
    "ok_vqa": ("262148000", "458752000"),
    "vizwiz": ("VizWiz_val_00000000.jpg", "VizWiz_train_00000000.jpg"),
    "textvqa": ("34602", "0"),
}


def _write(path: Path, told: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told), encoding="utf-8")


def _coco_questions(split: str, image: int, question: str) -> dict[str, Any]:
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"},
        "data_subtype": f"{split}2014",
        "questions": [{"image_id": image, "question": question, "question_id": image * 1000}],
    }


def _coco_annotations(split: str, image: int, answers: list[str], raw: bool) -> dict[str, Any]:
    said = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
        | ({"raw_answer": WRITTEN.get(answer, answer)} if raw else {})
        for number, answer in enumerate(answers)
    ]
    annotation = {
        "question_type": "what is this",
        "multiple_choice_answer": answers[0],
        "answers": said,
        "image_id": image,
        "answer_type": "other",
        "question_id": image * 1000,
    }
    return {"info": {}, "license": {}, "data_subtype": f"{split}2014", "annotations": [annotation]}


def _write_split(folder: Path, dataset: Dataset, split: str, question: str, answers: list[str]) -> None:
    image = {"val": 262148, "train": 458752}[split]
    if dataset in ("vqav2", "ok_vqa"):
        version = "v2_" if dataset == "vqav2" else ""
        questions = _coco_questions(split, image, question)
        annotations = _coco_annotations(split, image, answers, raw=dataset == "ok_vqa")
        _write(folder / f"{version}OpenEnded_mscoco_{split}2014_questions.json", questions)
        _write(folder / f"{version}mscoco_{split}2014_annotations.json", annotations)
    elif dataset == "vizwiz":
        said = [{"answer_confidence": "yes", "answer": answer} for answer in answers]
        told = {"answers": said, "image": f"VizWiz_{split}_00000000.jpg", "question": question}
        _write(folder / f"Annotations/{split}.json", [told | {"answer_type": "other", "answerable": 1}])
    else:
        told = {
            "question": question,
            "image_id": {"val": "003a8ae2ef43b901", "train": "0054c91397f2fe05"}[split],
            "image_classes": ["Cassette deck"],
            "flickr_original_url": "https://farm2.staticflickr.com/4/5_o.jpg",
            "flickr_300k_url": "https://c4.staticflickr.com/4/5_z.jpg",
            "image_width": 1024,
            "image_height": 730,
            "answers": answers,
            "question_tokens": question.rstrip("?").split(),
            "question_id": {"val": 34602, "train": 0}[split],
            "set_name": split,
        }
        about = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        _write(folder / f"TextVQA_0.5.1_{split}.json", about | {"data": [told]})


def _published(folder: Path, dataset: Dataset) -> VqaTask:
    """Two questions of a data set in its published layout, one in each split."""
    _write_split(folder, dataset, "val", "What is this?", ANSWERS)
    _write_split(folder, dataset, "train", "What is that?", ["2", "two", "2"] + ["none"] * 7)
    for number, picture in enumerate(PICTURES[dataset]):
        (folder / picture).parent.mkdir(parents=True, exist_ok=True)
        (folder / picture).write_bytes(b"picture %d" % number)
    return VqaTask(VqaConfig(folder=str(folder), dataset=dataset))


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a file says in its place."""
    told = json.loads(path.read_text(encoding="utf-8"))
    change(told)
    _write(path, told)


@pytest.mark.parametrize("dataset", DATASETS)
def test_validation_questions_are_asked_and_training_questions_may_be_shown(
    tmp_path: Path, dataset: Dataset
) -> None:
    questions = _published(tmp_path, dataset).load()
    (query,), (shown,) = questions.queries, questions.pool
    assert (query.id, shown.id) == QUESTIONS[dataset]
    assert (query.question, shown.question) == ("What is this?", "What is that?")
    assert (*query.pictures, *shown.pictures) == PICTURES[dataset]
    assert questions.pictures.read(query.pictures[0]) == b"picture 0"
    assert questions.pictures.read(shown.pictures[0]) == b"picture 1"
    assert query.references == tuple(ANSWERS)
    assert (query.answer, shown.answer) == ("mesh", "none")
    assert query.group == query.pictures[0]


@pytest.mark.parametrize(
    ("dataset", "name"), [(dataset, name) for dataset in DATASETS for name in FILES[dataset]]
)
def test_missing_file_is_named_with_what_belongs_there(tmp_path: Path, dataset: Dataset, name: str) -> None:
    task = _published(tmp_path, dataset)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=rf"{re.escape(name)} is missing: put (the|their|COCO's) .*, from .*https://"
    ):
        task.load()


def test_questions_about_one_picture_are_one_draw(tmp_path: Path) -> None:
    task = _published(tmp_path, "textvqa")
    path = tmp_path / "TextVQA_0.5.1_val.json"
    _edit(path, lambda told: told["data"].append(told["data"][0] | {"question_id": 34603}))
    first, second = task.load().queries
    assert first.id != second.id
    assert first.group == second.group


def test_answers_of_ok_vqa_are_the_stems_that_its_official_accuracy_reads(tmp_path: Path) -> None:
    (query,) = _published(tmp_path, "ok_vqa").load().queries
    assert query.references == tuple(ANSWERS)


@pytest.mark.parametrize(
    ("text", "stemmed", "unstemmed"),
    [
        ("mesh", 1.0, 0.0),
        ("meshes", 0.0, 1.0),
        ("Meshes.\nQuestion:", 0.0, 1.0),
        ("netting", 0.3, 0.3),
        ("", 0.0, 0.0),
    ],
)
def test_answer_to_ok_vqa_is_scored_by_stems_and_by_what_people_wrote(
    tmp_path: Path, text: str, stemmed: float, unstemmed: float
) -> None:
    task = _published(tmp_path, "ok_vqa")
    numbers = numbers_of(task.metrics, columns_of(task, task.load().queries, [text]))
    assert list(numbers) == ["vqa_accuracy", "vqa_accuracy of unstemmed answers"]
    assert list(numbers.values()) == pytest.approx([stemmed, unstemmed])


@pytest.mark.parametrize("dataset", [dataset for dataset in DATASETS if dataset != "ok_vqa"])
def test_answer_to_other_data_sets_has_the_official_accuracy_alone(tmp_path: Path, dataset: Dataset) -> None:
    task = _published(tmp_path, dataset)
    columns = columns_of(task, task.load().queries, ["mesh"])
    assert numbers_of(task.metrics, columns) == {"vqa_accuracy": 1.0}
    assert list(columns) == ["vqa_accuracy"]


@pytest.mark.parametrize("form", ["answer", "raw_answer"])
def test_answer_of_ok_vqa_without_one_of_its_forms_is_named(tmp_path: Path, form: str) -> None:
    task = _published(tmp_path, "ok_vqa")
    _edit(tmp_path / FILES["ok_vqa"][1], lambda told: told["annotations"][0]["answers"][2].pop(form))
    told = rf"mscoco_val2014_annotations.json: record 0: an answer has no text in its field {form}: take"
    with pytest.raises(DataError, match=told):
        task.load()


def test_answers_are_joined_to_questions_by_id_whatever_their_order(tmp_path: Path) -> None:
    task = _published(tmp_path, "vqav2")
    questions, annotations = (tmp_path / name for name in FILES["vqav2"][:2])
    other = {"image_id": 5, "question": "How many?", "question_id": 5000}
    said = [{"answer": "3", "answer_confidence": "maybe", "answer_id": 1}]
    _edit(questions, lambda told: told["questions"].append(other))
    _edit(annotations, lambda told: told["annotations"].insert(0, {"question_id": 5000, "answers": said}))
    first, second = task.load().queries
    assert (first.id, first.references) == ("262148000", tuple(ANSWERS))
    assert (second.id, second.references) == ("5000", ("3",))
    assert second.pictures == ("val2014/COCO_val2014_000000000005.jpg",)


def test_question_without_answers_is_named(tmp_path: Path) -> None:
    task = _published(tmp_path, "vqav2")
    (tmp_path / FILES["vqav2"][1]).write_bytes((tmp_path / FILES["vqav2"][3]).read_bytes())
    with pytest.raises(DataError, match=r"questions.json: record 0: question 262148000 has no answers"):
        task.load()


def test_answers_without_a_question_are_named(tmp_path: Path) -> None:
    task = _published(tmp_path, "vqav2")
    path = tmp_path / FILES["vqav2"][1]
    _edit(path, lambda told: told["annotations"].append(told["annotations"][0] | {"question_id": 7}))
    with pytest.raises(DataError, match=r"annotations.json answers 1 questions .* does not ask, such as 7"):
        task.load()


def test_question_that_is_answered_by_two_records_is_named(tmp_path: Path) -> None:
    task = _published(tmp_path, "vqav2")
    _edit(tmp_path / FILES["vqav2"][1], lambda told: told["annotations"].append(told["annotations"][0]))
    with pytest.raises(DataError, match=r"record 1: question 262148000 was answered by a record before"):
        task.load()


@pytest.mark.parametrize("dataset", ["vizwiz", "textvqa"])
def test_file_of_one_split_in_the_place_of_the_other_is_refused(tmp_path: Path, dataset: Dataset) -> None:
    task = _published(tmp_path, dataset)
    (tmp_path / FILES[dataset][1]).write_bytes((tmp_path / FILES[dataset][0]).read_bytes())
    with pytest.raises(DataError, match=rf"question {QUESTIONS[dataset][0]} comes twice"):
        task.load()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda told: told["data"][0].pop("answers"),
            "record 0: there is no answers: this split has no answers",
        ),
        (lambda told: told["data"][0].update(answers=[]), "record 0: answers is"),
        (lambda told: told["data"][0].update(answers=["a", 1]), "record 0: answers is"),
        (lambda told: told["data"][0].update(question=" "), "record 0: question is ' '"),
        (lambda told: told["data"][0].update(question_id="x"), "record 0: question_id is 'x'"),
        (lambda told: told["data"].append(3), "record 1: it is a int"),
        (lambda told: told.update(data=[]), "has no records in its field 'data'"),
    ],
)
def test_broken_record_is_named_with_its_file_and_place(
    tmp_path: Path, change: Callable[[Any], object], told: str
) -> None:
    task = _published(tmp_path, "textvqa")
    path = tmp_path / "TextVQA_0.5.1_val.json"
    _edit(path, change)
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        task.load()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "content", "told"),
    [
        ("vizwiz", "{}", "as a whole"),
        ("vizwiz", "[]", "as a whole"),
        ("textvqa", "[]", "in its field 'data'"),
        ("vqav2", '{"annotations": []}', "in its field 'questions'"),
    ],
)
def test_file_that_is_another_one_is_refused(
    tmp_path: Path, dataset: Dataset, content: str, told: str
) -> None:
    task = _published(tmp_path, dataset)
    (tmp_path / FILES[dataset][0]).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"has no records {told}"):
        task.load()


@pytest.mark.parametrize("dataset", DATASETS)
def test_cut_file_is_named(tmp_path: Path, dataset: Dataset) -> None:
    task = _published(tmp_path, dataset)
    path = tmp_path / FILES[dataset][0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} cannot be read as JSON"):
        task.load()


@pytest.mark.parametrize("dataset", DATASETS)
def test_model_that_follows_instructions_is_asked_for_a_word_or_phrase(
    tmp_path: Path, dataset: Dataset
) -> None:
    task = _published(tmp_path, dataset)
    (query,) = task.load().queries
    lines = task.turn(query, "chat").question.split("\n")
    assert (lines[0], lines[-1]) == ("What is this?", "Answer the question using a single word or phrase.")
    assert ("Unanswerable" in "".join(lines[1:-1])) is (dataset == "vizwiz")
    assert task.turn(query, "chat").answer == "mesh"


@pytest.mark.parametrize("dataset", DATASETS)
def test_open_flamingo_is_asked_in_its_words_and_shown_what_the_first_person_said(
    tmp_path: Path, dataset: Dataset
) -> None:
    task = _published(tmp_path, dataset)
    (query,) = task.load().queries
    turn = task.turn(query, "open_flamingo")
    assert turn.question == "Question:What is this? Short answer:"
    assert turn.answer == "net"
    assert turn.pictures == query.pictures


@pytest.mark.parametrize(
    ("dataset", "in_its_words"), [("vqav2", 5), ("ok_vqa", 5), ("vizwiz", 5), ("textvqa", 10)]
)
def test_open_flamingo_answers_in_as_many_tokens_as_its_evaluation_allows(
    tmp_path: Path, dataset: Dataset, in_its_words: int
) -> None:
    task = _published(tmp_path, dataset)
    shown = Shown(task.load().queries[0], ())
    assert request_of(task, shown, "open_flamingo").max_new_tokens == in_its_words
    assert request_of(task, shown, "chat").max_new_tokens == 10


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        ("mesh", 1.0),
        (" Mesh.\n\nIt keeps insects out.", 1.0),
        ("the mesh", 1.0),
        ("netting\nQuestion:What is that? Short answer:mesh", 0.3),
        ("nettingQuestion:What", 0.3),
        ("netting Answer: mesh", 0.3),
        ("It is a mesh", 0.0),
        ("", 0.0),
    ],
)
def test_answer_is_scored_up_to_where_a_model_goes_on(tmp_path: Path, text: str, accuracy: float) -> None:
    task = VqaTask(VqaConfig(folder=str(tmp_path)))
    item = Item("1", ("x.jpg",), "What is this?", "mesh", tuple(ANSWERS))
    assert task.score(item, Prediction(text)) == {"vqa_accuracy": pytest.approx(accuracy)}


@pytest.mark.parametrize(
    ("text", "all_said"),
    [
        ("Yes", "yes"),
        ("yes", "yes"),
        ("YES.", "yes"),
        (" Yes\n", "yes"),
        ("Nokia", "Nokia"),
        ("Inc.", "Inc."),
    ],
)
def test_capital_or_period_costs_nothing_where_ten_people_agree(
    tmp_path: Path, text: str, all_said: str
) -> None:
    task = VqaTask(VqaConfig(folder=str(tmp_path)))
    item = Item("1", ("x.jpg",), "Is it?", all_said, (all_said,) * 10)
    assert task.score(item, Prediction(text)) == {"vqa_accuracy": 1.0}
