"""MME (arXiv:2306.13394): two yes-no questions about each picture, in 14 subtasks.

A folder for each subtask, of one of two layouts:

| subtask | pictures | questions |
|---|---|---|
| artwork, celebrity, landmark, posters, scene | `images/{name}.jpg` | `questions_answers_YN/{name}.txt` |
| all others | `{name}.jpg` or `.png` | `{name}.txt` |

A text file has two lines, each a question, a tab, and `Yes` or `No`. The question says how to answer it.

The score of a subtask is the share of questions answered rightly (acc) plus the share of pictures of which
both are (acc+), times 100. Perception sums 10 subtasks up, cognition 4; without one they are not defined.
All questions are queries; what is demonstrated for one are others of its subtask, about other pictures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from mmicl_core.config.evaluation_tasks import MmeConfig
from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import (
    Columns,
    FolderPictures,
    Item,
    Metric,
    Numbers,
    Prediction,
    Questions,
    Task,
    must_exist,
)
from mmicl_core.evaluation.tasks.other_pictures import OtherPictures
from mmicl_core.evaluation.tasks.text_lines import read_lines
from mmicl_core.evaluation.yes_no import YES_NO, exchange_yes_no, said_at_once

__all__ = ["COGNITION", "PERCEPTION", "MmeTask"]

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)

SUFFIXES = (".jpg", ".jpeg", ".png")
# Of a picture, if both answers are guessed.
CHANCE, CHANCE_PLUS = 0.5, 0.25

Measure = Callable[[Columns, Numbers], float]


class MmeTask(Task):
    """Yes or no, read and scored as the official script does."""

    name: ClassVar[str] = "mme"
    source: ClassVar[str] = (
        "MME (Fu et al. 2023, arXiv:2306.13394), "
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    )
    # Only the first four characters count.
    max_new_tokens = 10

    def __init__(self, config: MmeConfig) -> None:
        self._folder = Path(config.folder)
        self._others: dict[str, OtherPictures] = {}
        self.metrics: Sequence[Metric] = tuple(_metrics())

    def load(self) -> Questions:
        """The questions of all subtasks; there is no pool."""
        queries = list[Item]()
        for subtask in SUBTASKS:
            items = list(self._subtask(subtask))
            self._others[subtask] = OtherPictures(items, f"{self.name} {subtask}")
            queries += items
        return Questions(queries, (), FolderPictures(self._folder))

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """The number of the subtask, and whether the answer is right; one answer is no pair."""
        return {
            "subtask": float(SUBTASKS.index(item.facts["subtask"])),
            "right": float(said_at_once(prediction.text) == item.answer),
            "pair": 0.0,
            "pair_right": 0.0,
        }

    def score_all(self, items: Sequence[Item], predictions: Sequence[Prediction]) -> list[dict[str, float]]:
        """As `score`, and each of two questions about a picture carries half of it, and half its success."""
        scores = super().score_all(items, predictions)
        pairs: dict[str, list[dict[str, float]]] = {}
        for item, score in zip(items, scores, strict=True):
            pairs.setdefault(item.group, []).append(score)
        for pair in pairs.values():
            if len(pair) == 2:
                both = all(score["right"] for score in pair)
                for score in pair:
                    score.update(pair=0.5, pair_right=0.5 * both)
        return scores

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item]:
        """Questions of the same subtask about other pictures, one about each."""
        return self._others[query.facts["subtask"]].draw(query, shots, rng)

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item]:
        """Yes in the place of no, and the other way round."""
        return exchange_yes_no(demonstrations)

    def _subtask(self, subtask: str) -> Iterator[Item]:
        folder = must_exist(self._folder / subtask, f"the subtask {subtask}", self.source)
        pictures = questions = folder
        if (folder / "images").exists() or (folder / "questions_answers_YN").exists():
            pictures = must_exist(folder / "images", f"the pictures of {subtask}", self.source)
            questions = must_exist(
                folder / "questions_answers_YN", f"the questions of {subtask}", self.source
            )
        files = sorted(questions.glob("*.txt"))
        if not files:
            raise DataError(f"{questions} has no .txt file: put the questions there, from {self.source}")
        for file in files:
            picture = self._picture(file, pictures)
            for number, (question, answer) in enumerate(_pair(file)):
                yield Item(
                    id=f"{subtask}/{file.stem}/{number}",
                    pictures=(picture,),
                    question=question,
                    answer=answer,
                    group=picture,
                    facts={"subtask": subtask},
                )

    def _picture(self, file: Path, folder: Path) -> str:
        """The key of the picture that the questions of a file are about."""
        named = [folder / f"{file.stem}{suffix}" for suffix in SUFFIXES]
        found = [path for path in named if path.exists()]
        if len(found) != 1:
            raise DataError(
                f"{file} is about one picture, but {len(found)} of {[path.name for path in named]} are in "
                f"{folder}: put the one there, from {self.source}"
            )
        return found[0].relative_to(self._folder).as_posix()


def _pair(file: Path) -> list[tuple[str, str]]:
    """Two questions with their answers."""
    lines = read_lines(file)
    if len(lines) != 2:
        raise DataError(f"{file} has {len(lines)} lines instead of the two questions about a picture")
    pairs = list[tuple[str, str]]()
    for line in lines:
        question, _, answer = line.partition("\t")
        if answer.lower() not in YES_NO or not question:
            raise DataError(f"{file}: {line!r} is no question with a tab and Yes or No behind it")
        pairs.append((question, answer.lower()))
    return pairs


def _metrics() -> Iterator[Metric]:
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        chance = len(subtasks) * (CHANCE + CHANCE_PLUS)
        yield Metric(name, _total([SUBTASKS.index(subtask) for subtask in subtasks]), chance=chance)
    for number, subtask in enumerate(SUBTASKS):
        yield Metric(subtask, _total([number]), chance=CHANCE + CHANCE_PLUS)
        yield Metric(f"{subtask}_acc", _accuracy(number), chance=CHANCE)
        yield Metric(f"{subtask}_acc_plus", _accuracy_plus(number), chance=CHANCE_PLUS)


def _accuracy(number: int) -> Measure:
    def of(columns: Columns, weights: Numbers) -> float:
        weights = weights * (columns["subtask"] == number)
        return float(weights @ columns["right"] / weights.sum())

    return of


def _accuracy_plus(number: int) -> Measure:
    def of(columns: Columns, weights: Numbers) -> float:
        weights = weights * (columns["subtask"] == number)
        return float(weights @ columns["pair_right"] / (weights @ columns["pair"]))

    return of


def _total(numbers: Sequence[int]) -> Measure:
    parts = [measure(number) for number in numbers for measure in (_accuracy, _accuracy_plus)]

    def of(columns: Columns, weights: Numbers) -> float:
        return sum(part(columns, weights) for part in parts)

    return of
