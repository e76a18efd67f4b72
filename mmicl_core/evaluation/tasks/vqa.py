"""Visual question answering by a word or a phrase, scored by the official accuracy.

The queries are the validation split and the pool is the training split, as OpenFlamingo has them. Files keep
their published names, which `FILES` lists:

| data set | questions and answers | picture |
|---|---|---|
| VQAv2, OK-VQA | two files, joined by `question_id`; each answer is an object | COCO's, by `image_id` |
| VizWiz | one array; each answer is an object | `image`, in the folder of its split |
| TextVQA | `data` of one object; each answer is a string | `image_id`, in `train_images` |

Hazards:
- The `answer`s of OK-VQA are stems (`race` for `racing`), and the official accuracy compares with these. It
  leaves it to the model to say them; OpenFlamingo brings what a model says to its stem with WordNet and a
  tagger first, and its numbers are higher for it. Demonstrations show stems, so few shots teach them: the
  official accuracy may rise with shots for that alone. `vqa_accuracy of unstemmed answers` is the same
  accuracy by what people wrote, `raw_answer`; who says stems loses there.
- TextVQA's own evaluation splits words a little differently; OpenFlamingo's is the accuracy used here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mmicl_core.config.evaluation_tasks import VqaConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import (
    FolderPictures,
    Item,
    Metric,
    Prediction,
    Questions,
    Style,
    Task,
    mean_of,
    must_exist,
)
from mmicl_core.evaluation.tasks.json_arrays import read_entries
from mmicl_core.evaluation.vqa_accuracy import vqa_accuracy
from mmicl_core.prompts import Turn

__all__ = ["VqaTask"]

SOURCES: Mapping[str, str] = {
    "vqav2": "VQAv2 (Goyal et al. 2017, arXiv:1612.00837), https://visualqa.org/download.html",
    "ok_vqa": "OK-VQA 1.1 (Marino et al. 2019, arXiv:1906.00067), https://okvqa.allenai.org/download.html",
    "vizwiz": "VizWiz-VQA (Gurari et al. 2018, arXiv:1802.08218), https://vizwiz.org/tasks-and-datasets/vqa",
    "textvqa": "TextVQA 0.5.1 (Singh et al. 2019, arXiv:1904.08920), https://textvqa.org/dataset",
}
COCO_PICTURES = {"{}2014": "COCO's pictures of 2014 ({}2014.zip of https://cocodataset.org, unpacked)"}
FILES: Mapping[str, Mapping[str, str]] = {
    "vqav2": {
        "v2_OpenEnded_mscoco_{}2014_questions.json": "the questions",
        "v2_mscoco_{}2014_annotations.json": "their answers",
        **COCO_PICTURES,
    },
    "ok_vqa": {
        "OpenEnded_mscoco_{}2014_questions.json": "the questions",
        "mscoco_{}2014_annotations.json": "their answers",
        **COCO_PICTURES,
    },
    "vizwiz": {
        "Annotations/{}.json": "the questions with their answers",
        "{}": "the pictures ({}.zip, unpacked)",
    },
    "textvqa": {
        "TextVQA_0.5.1_{}.json": "the questions with their answers",
        "train_images": "the pictures of both splits (train_val_images.zip, unpacked)",
    },
}
"""What a data set consists of, and what it is."""

SHORTLY = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
UNSTEMMED = Metric("vqa_accuracy of unstemmed answers", mean_of("unstemmed"))
NEXT_QUESTION = re.compile(r"\n|Question:|Short answer:|Answer:")


class VqaTask(Task):
    """Short answers to questions about pictures, each compared with those of ten people."""

    name: ClassVar[str] = "vqa"
    source: ClassVar[str] = "; ".join(SOURCES.values())
    metrics: Sequence[Metric] = (Metric("vqa_accuracy", mean_of("vqa_accuracy")),)
    max_new_tokens: int = 10

    def __init__(self, config: VqaConfig) -> None:
        self._folder, self._dataset = Path(config.folder), config.dataset
        if config.dataset == "ok_vqa":
            self.metrics = (*self.metrics, UNSTEMMED)

    def load(self) -> Questions:
        """The validation split as queries, the training split as the pool."""
        source = SOURCES[self._dataset]
        for split in ("val", "train"):
            for name, what in FILES[self._dataset].items():
                must_exist(self._folder / name.format(split), what.format(split), source)
        queries, pool = self._read("val"), self._read("train")
        seen = set[str]()
        for item in (*queries, *pool):
            if item.id in seen:
                raise DataError(
                    f"{self._folder}: question {item.id} comes twice, in one split or in both, which share "
                    f"none: take the files again, from {source}"
                )
            seen.add(item.id)
        return Questions(queries, pool, FolderPictures(self._folder))

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """The accuracy, between 0 and 1.

        An answer ends where a line does, or where a model goes on with a next question. Where ten people
        agree, the official accuracy compares letter by letter; there an answer may also be right in lower
        case and without a period at its end, as evaluations submit it.
        """
        said = NEXT_QUESTION.split(prediction.text.strip(), maxsplit=1)[0].strip()
        forms = (said, said.lower().removesuffix("."))
        compared = {"vqa_accuracy": item.references}
        if self._dataset == "ok_vqa":
            compared["unstemmed"] = item.facts["unstemmed"]
        return {
            name: max(vqa_accuracy(form, references) for form in forms)
            for name, references in compared.items()
        }

    def most_tokens(self, style: Style) -> int:
        """In OpenFlamingo's words as many as it allows: 10 for TextVQA and 5 for the others, which cut a time
        or a long number where each digit is a token."""
        if style == "open_flamingo" and self._dataset != "textvqa":
            return 5
        return self.max_new_tokens

    def turn(self, item: Item, style: Style) -> Turn:
        """The item with what most people said; OpenFlamingo shows what the first one said."""
        turn = super().turn(item, style)
        return replace(turn, answer=item.references[0]) if style == "open_flamingo" else turn

    def words(self, item: Item, style: Style) -> str:
        """The question, and that its answer is short."""
        if style == "open_flamingo":
            return f"Question:{item.question} Short answer:"
        asked = (
            [item.question, UNANSWERABLE, SHORTLY] if self._dataset == "vizwiz" else [item.question, SHORTLY]
        )
        return "\n".join(asked)

    def _read(self, split: str) -> list[Item]:
        paths = [self._folder / name.format(split) for name in FILES[self._dataset]]
        return list(READERS[self._dataset](paths))


def _two_files(paths: Sequence[Path]) -> Iterator[Item]:
    """VQAv2, and OK-VQA by its stems."""
    questions, annotations, pictures = paths
    answers = _answers(annotations, "answer")
    for entry in read_entries(questions, "questions"):
        question = entry.integer("question_id")
        said = answers.pop(question, None)
        if said is None:
            raise entry.wrong(
                f"question {question} has no answers of its own in {annotations.name}: take both files of "
                "one split and version"
            )
        picture = f"{pictures.name}/COCO_{pictures.name}_{entry.integer('image_id'):012d}.jpg"
        yield _item(question, picture, entry.text("question"), said)
    if answers:
        raise DataError(
            f"{annotations} answers {len(answers)} questions that {questions.name} does not ask, such as "
            f"{next(iter(answers))}: take both files of one split and version"
        )


def _ok_vqa(paths: Sequence[Path]) -> Iterator[Item]:
    unstemmed = _answers(paths[1], "raw_answer")
    for item in _two_files(paths):
        yield replace(item, facts={"unstemmed": unstemmed[int(item.id)]})


def _answers(annotations: Path, form: str) -> dict[int, tuple[str, ...]]:
    """What people said to each question, in one of the forms that the file has."""
    answers = dict[int, tuple[str, ...]]()
    for entry in read_entries(annotations, "annotations", partial(_answer_alone, form)):
        question = entry.integer("question_id")
        if question in answers:
            raise entry.wrong(f"question {question} was answered by a record before: remove one of them")
        said = entry.fields.get("answers")
        if isinstance(said, list) and any(isinstance(answer, dict) for answer in said):
            raise entry.wrong(f"an answer has no text in its field {form}: take the file as it is published")
        answers[question] = entry.texts("answers")
    return answers


def _vizwiz(paths: Sequence[Path]) -> Iterator[Item]:
    """VizWiz, where people asked one question about each picture, which is its name."""
    annotations, pictures = paths
    for entry in read_entries(annotations, None, partial(_answer_alone, "answer")):
        image = entry.text("image")
        yield _item(image, f"{pictures.name}/{image}", entry.text("question"), entry.texts("answers"))


def _textvqa(paths: Sequence[Path]) -> Iterator[Item]:
    annotations, pictures = paths
    for entry in read_entries(annotations, "data"):
        picture = f"{pictures.name}/{entry.text('image_id')}.jpg"
        yield _item(entry.integer("question_id"), picture, entry.text("question"), entry.texts("answers"))


READERS: Mapping[str, Callable[[Sequence[Path]], Iterable[Item]]] = {
    "vqav2": _two_files,
    "ok_vqa": _ok_vqa,
    "vizwiz": _vizwiz,
    "textvqa": _textvqa,
}


def _item(key: int | str, picture: str, question: str, said: tuple[str, ...]) -> Item:
    """Questions about one picture are one draw; of answers that are as frequent, the first is shown."""
    return Item(str(key), (picture,), question, max(said, key=said.count), said, group=picture)


def _answer_alone(form: str, told: dict[str, Any]) -> Any:
    """An answer's text in place of its object: VQAv2 has four million, which repeat each other."""
    answer = told.get(form)
    return sys.intern(answer) if type(answer) is str else told
