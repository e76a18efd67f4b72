"""VL-ICL Bench (Zong et al., arXiv:2403.13164): tasks that take their demonstrations to be answered.

    open_mi                           which of two made-up names does a picture have?
    matching_mi                       two pictures: yes or no? The demonstrations show what is asked
    operator_induction                what is the result, with the operator that the demonstrations have?
    operator_induction_interleaved    the same, with a picture for each number
    clevr                             how many things have an attribute?
    textocr                           what is written in the red box?

| what | which |
|---|---|
| `<task>/query.json` | an array of queries: `image` (paths below the folder), `question`, `answer` |
| `<task>/support.json` | what demonstrations are drawn from, alike; not read for `open_mi` |
| `open_mi` | a query has `classes`, the names, and `support`, `images` by name |
| `operator_*` | a query has its `operator`; a support, one answer for each: sum, difference, product |
| `matching_mi` | a support is a pair of questions, `same` and `diff` |

Demonstrations come from the support at random. For `open_mi` and `matching_mi` the benchmark counts one shot
where two are shown, one of each answer in turn; here the number counts all. In `open_mi` two classes, in an
order that is drawn for the query, show their pictures in the order of the file.

The instruction at the head of a prompt is the benchmark's detailed one. What is said beside a picture is the
question alone, or with `Answer:` on a line of its own, as the benchmark asks OpenFlamingo.

Scores are those of the released code. It looks for a number in answers of the operator tasks, where it loses
a minus, and not in those of `clevr`, which have to be the number and nothing else; `accuracy of numbers`
takes the first number of an answer, with its sign. Hazard: in `matching_mi` whatever is not yes is no, even
an answer of nothing; a text with a full stop in it is cut there and cannot be right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from mmicl_core.config.evaluation_tasks import VlIclConfig
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

__all__ = ["VlIclTask", "first_sentence"]

OPERATORS = ("+", "-", "x")
"""In the order of a support's answers."""
MOST_EXAMPLES = 5
"""Pictures of a class in `open_mi`."""
Text = Annotated[str, Field(min_length=1)]
Number = int | Annotated[str, Field(pattern=r"^-?\d+$")]
YesNo = Annotated[str, Field(pattern=r"^(?i:yes|no)$")]


class _Asked(BaseModel):
    image: list[Text] = Field(min_length=1)
    question: Text


class _Read(_Asked):
    answer: Text


class _Counted(_Asked):
    answer: Number


class _Compared(_Asked):
    answer: YesNo


class _Pair(BaseModel):
    same: _Compared
    diff: _Compared


class _Operands(_Asked):
    answer: list[Number] = Field(min_length=len(OPERATORS), max_length=len(OPERATORS))


class _Calculated(_Counted):
    operator: Literal["+", "-", "x"]


class _Examples(BaseModel):
    images: list[Text] = Field(min_length=1)


class _Named(_Read):
    classes: list[Text]
    support: dict[str, _Examples]

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        if self.answer not in self.classes or len(set(self.classes)) < 2:
            raise ValueError(f"classes {self.classes} are not the answer {self.answer!r} and others")
        unseen = [name for name in self.classes if name not in self.support]
        if unseen:
            raise ValueError(f"support has no pictures of {unseen}, which are among classes")
        return self


@dataclass(frozen=True)
class _Kind:
    """What sets one task apart."""

    query: type[BaseModel]
    support: type[BaseModel] | None
    """None where queries bring their own; the same as `query` where any of it suits any query."""
    instruction: str
    chance: float | None = None
    """Of tasks with two answers."""


KINDS: Mapping[str, _Kind] = {
    "open_mi": _Kind(
        _Named,
        None,
        "Induce the concept from the in-context examples. Answer the question with a single word or phase.",
        chance=0.5,
    ),
    "matching_mi": _Kind(
        _Compared,
        _Pair,
        "According to the few-shot examples, induce what operation to do and determine the output for the "
        'two new images. Answer with "yes" or "no".',
        chance=0.5,
    ),
    "operator_induction": _Kind(
        _Calculated,
        _Operands,
        "The image contains two digit numbers and a ? representing the mathematical operator. Induce the "
        "mathematical operator (addition, multiplication, minus) according to the results of the in-context "
        "examples and calculate the result.",
    ),
    "operator_induction_interleaved": _Kind(
        _Calculated,
        _Operands,
        "There are two input images, each representing a single digit number. Induce the mathematical "
        "operator (addition, multiplication, minus) that is applied between the two images according to the "
        "results of the in-context examples. Calculate the result for the new query images.",
    ),
    "clevr": _Kind(
        _Counted,
        _Counted,
        "The image contains objects of different shapes, colors, sizes and materials. The question describes "
        "the attribute and its value. You need to find all objects within the image that satisfy the "
        "condition. You should induce what operation to use according to the results of the in-context "
        "examples and then calculate the result.",
    ),
    "textocr": _Kind(
        _Read,
        _Read,
        "An image will be provided where a red box is drawn around the text of interest. Answer with the "
        "text inside the red box. Ensure that the transcription is precise, reflecting the exact "
        "characters, including letters, numbers, symbols.",
    ),
}
"""The instructions are the benchmark's, slips included."""


class VlIclTask(Task):
    """One task of the benchmark."""

    name: ClassVar[str] = "vl_icl"
    source: ClassVar[str] = (
        "VL-ICL Bench (Zong et al., arXiv:2403.13164), https://huggingface.co/datasets/ys-zong/VL-ICL, "
        "unpacked by its unzip.sh"
    )
    max_new_tokens: int = 15

    def __init__(self, config: VlIclConfig) -> None:
        self._folder, self._task, self._kind = Path(config.folder), config.task, KINDS[config.task]
        self._pooled = self._kind.support is self._kind.query
        self.needs_its_own = not self._pooled
        self._numbers = issubclass(self._kind.query, _Counted)
        numbers = [Metric("accuracy of numbers", mean_of("right_number"))] if self._numbers else []
        if not self._kind.support:
            self.most_shots = 2 * MOST_EXAMPLES
        self.metrics = [Metric("accuracy", mean_of("right"), chance=self._kind.chance), *numbers]

    def load(self) -> Questions:
        """The queries, and a pool where demonstrations do not depend on the query."""
        records = self._read("query.json", self._kind.query)
        queries = [self._query(number, record) for number, record in enumerate(records)]
        support = [item for place in range(len(self._support)) for item in self._supporting(place, 0)]
        named = (pictures for query in queries for pictures in query.facts.get("support", {}).values())
        for picture in dict.fromkeys(chain(*(item.pictures for item in (*queries, *support)), *named)):
            must_exist(self._folder / picture, "the picture", self.source)
        return Questions(queries, support if self._pooled else (), FolderPictures(self._folder))

    def opening(self, style: Style, shots: int) -> str:
        """The benchmark's detailed instruction."""
        return f"{self._kind.instruction}\n"

    def words(self, item: Item, style: Style) -> str:
        """The question."""
        return item.question + "\nAnswer:" * (style == "open_flamingo")

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """By what the benchmark reads of an answer."""
        said = first_sentence(prediction.text).lower()
        if self._task == "matching_mi":
            return {"right": float(("yes" in said) == (item.answer.lower() == "yes"))}
        if not self._numbers:
            return {"right": float(said == item.answer.lower())}
        digits, number = re.search(r"\d+", said), re.search(r"-?\d+", said)
        found = said if self._task == "clevr" else digits and digits.group()
        return {
            "right": float(found == item.answer),
            "right_number": float(number is not None and int(number.group()) == int(item.answer)),
        }

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item] | None:
        """What the benchmark shows before a query; None where any of the pool will do."""
        if self._pooled:
            return None
        drawn = self._drawn(query, rng) if self._kind.support else self._examples(query, rng)
        shown = list(islice(drawn, shots))
        if len(shown) < shots:
            raise DataError(
                f"{self.name}: question {query.id} of {self._task} has {len(shown)} demonstrations, but "
                f"{shots} are asked for: lower evaluate.shots"
            )
        return shown

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item] | None:
        """The two classes under each other's names, or yes as no; other tasks have more than two answers."""
        if self._kind.chance is None:
            return None
        return [replace(item, answer=item.facts["other"]) for item in demonstrations]

    def counterpart(self, query: Item, demonstrations: Sequence[Item]) -> tuple[Item, list[Item]] | None:
        """A question with another answer that is not shown, behind the same demonstrations."""
        other = next((item.answer for item in demonstrations if item.answer != query.answer), None)
        if self._pooled or other is None:
            return None
        seen = {item.pictures for item in demonstrations}
        # Seeded by the query: one query always gets the same one, and different ones get different ones.
        drawn = self._drawn(query, random.Random(query.id))
        for item in drawn if self._kind.support else _of_class(query, other, query.answer):
            if item.answer != query.answer and item.pictures not in seen:
                return replace(query, pictures=item.pictures, answer=item.answer), list(demonstrations)
        return None

    def _query(self, number: int, record: Any) -> Item:
        facts: dict[str, Any] = {}
        if isinstance(record, _Named):
            facts["support"] = {name: tuple(record.support[name].images) for name in record.classes}
        if isinstance(record, _Calculated):
            facts["operator"] = OPERATORS.index(record.operator)
        return _item(str(number), record, record.answer, facts)

    def _examples(self, query: Item, rng: random.Random) -> Iterator[Item]:
        """Pictures of the query's class and of another one in turn."""
        other = rng.choice([name for name in query.facts["support"] if name != query.answer])
        names = [query.answer, other]
        rng.shuffle(names)
        for pair in zip(_of_class(query, *names), _of_class(query, *names[::-1]), strict=False):
            yield from pair

    def _drawn(self, query: Item, rng: random.Random) -> Iterator[Item]:
        """The support in random order, by the query's operator."""
        for place in rng.sample(range(len(self._support)), len(self._support)):
            yield from self._supporting(place, query.facts.get("operator", 0))

    def _supporting(self, place: int, operator: int) -> list[Item]:
        """What one record of the support shows."""
        record, key = self._support[place], f"support/{place}"
        if isinstance(record, _Pair):
            same, diff = record.same, record.diff
            return [
                _item(f"{key}/same", same, same.answer, {"other": diff.answer}),
                _item(f"{key}/diff", diff, diff.answer, {"other": same.answer}),
            ]
        answer = record.answer[operator] if isinstance(record, _Operands) else record.answer
        return [_item(key, record, answer, {})]

    @cached_property
    def _support(self) -> Sequence[Any]:
        return self._read("support.json", self._kind.support) if self._kind.support else ()

    def _read(self, file: str, layout: type[BaseModel]) -> list[BaseModel]:
        path = must_exist(self._folder / self._task / file, f"the file {file}", self.source)
        records = list[BaseModel]()
        for entry in read_entries(path, None):
            try:
                records.append(layout.model_validate(entry.fields, strict=True))
            except ValidationError as error:
                fault = error.errors(include_url=False)[0]
                told = fault["msg"].removeprefix("Value error, ")
                if fault["loc"]:
                    field = ".".join(str(part) for part in fault["loc"])
                    told = f"{field}: {told} (found {str(fault['input'])[:80]})"
                raise entry.wrong(f"{told}: take the file from {self.source}") from error
        return records


def first_sentence(answer: str) -> str:
    """What the benchmark reads of an answer: its first line, or, of a single line, all before a full stop."""
    answer = answer.strip()
    end = answer.find("\n")
    if end < 0:
        end = answer.find(".")
    return answer[:end] if end > 0 else answer


def _item(key: str, record: Any, answer: str | int, facts: Mapping[str, Any]) -> Item:
    pictures = tuple(record.image)
    return Item(key, pictures, record.question, str(answer), group=" ".join(pictures), facts=facts)


def _of_class(query: Item, name: str, other: str) -> list[Item]:
    """The pictures of a class as demonstrations, in the order of the file."""
    return [
        Item(picture, (picture,), "This is a", name, facts={"other": other})
        for picture in query.facts["support"][name]
    ]
