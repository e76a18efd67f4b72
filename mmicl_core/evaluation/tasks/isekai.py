"""ISEKAI: which of two things is it, where one of them, or both, do not exist?

By Tai et al. (arXiv:2308.07891, section 4), asked and scored as in the released code of link-context learning
(LCL), which `LinkContextTask` is for all data sets of theirs.

| what | which |
|---|---|
| `ISEKAI-10.json` | the split `ten`: one query a line, JSON lines for all the name of the file |
| `ISEKAI-pair.json` | the split `pair`, alike |
| pictures | at the paths that the lines give, below the folder |

| field | meaning |
|---|---|
| `image_name` | the query |
| `positive_list`, `negative_list` | pictures of two classes, of which the first are shown |
| `positive_promt`, `negative_promt` | what the classes are called |
| `label_name` | what the query is called, which is one of these two |
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from mmicl_core.config.evaluation_tasks import IsekaiConfig
from mmicl_core.data.readers.json_records import is_text
from mmicl_core.data.wordings import WORDINGS
from mmicl_core.errors import DataError
from mmicl_core.evaluation.metrics import names_as_released, names_only
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
from mmicl_core.evaluation.tasks.json_lines import Record, read_items

__all__ = ["IsekaiTask", "LinkContextTask", "read_paths"]

FILES = {"ten": "ISEKAI-10.json", "pair": "ISEKAI-pair.json"}
WORDING = WORDINGS["released"]
QUESTION = WORDING.asked_prefix + WORDING.asked_questions[0]


class LinkContextTask(Task):
    """Two classes and a picture of one of them, with LCL's demonstrations, words and score.

    The demonstrations are the first pictures of both classes, as many of each, in random order; of an odd
    number, one more of either. Their number counts both classes, as in the paper; the released code counts
    one. A picture is not shown where it is asked about, which the released code does not rule out.

    LCL cuts an answer at 1,024 tokens. A sentence that names a class is far shorter than the number here, and
    a model that does not stop would spend all its time on what nobody reads.
    """

    metrics: Sequence[Metric] = (
        Metric("accuracy", mean_of("right"), chance=0.5),
        Metric("accuracy as released", mean_of("right_as_released"), chance=0.5),
        Metric("named the other class", mean_of("other")),
    )
    max_new_tokens: int = 64
    needs_its_own: bool = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def query(
        self, key: str, picture: str, names: tuple[str, str], shown: tuple[Sequence[str], Sequence[str]]
    ) -> Item:
        """A question.

        Args:
            key: its id.
            picture: what is asked about, and the group of the question.
            names: of its class and of the other one.
            shown: pictures of its class and of the other one, in the order in which they are taken.
        """
        facts = {"name": names[0], "other": names[1], "shown": dict(zip(names, shown, strict=True))}
        answer = WORDING.asked_answer.format(name=names[0])
        return Item(key, (picture,), QUESTION, answer, group=picture, facts=facts)

    def questions(self, queries: Sequence[Item]) -> Questions:
        """All queries; there is no pool, as each has demonstrations of its own.

        Raises:
            DataError: a picture is missing.
        """
        used = dict.fromkeys(
            picture
            for query in queries
            for pictures in (query.pictures, *query.facts["shown"].values())
            for picture in pictures
        )
        for picture in used:
            must_exist(self._folder / picture, "the picture", self.source)
        return Questions(queries, (), FolderPictures(self._folder))

    def opening(self, style: Style, shots: int) -> str:
        """What LCL says before its first demonstration, and not where there is none."""
        return WORDING.opening if shots else ""

    def demonstrations(self, query: Item, shots: int, rng: random.Random) -> list[Item]:
        """The first pictures of both classes, shuffled."""
        names = [query.facts["name"], query.facts["other"]]
        rng.shuffle(names)
        shown = list[tuple[str, str]]()
        for place, name in enumerate(names):
            pictures, count = _apart_from(query, name), (shots + 1 - place) // 2
            if count > len(pictures):
                raise DataError(
                    f"{self.name} question {query.id} has {len(pictures)} pictures of {name!r} to show, but "
                    f"{shots} demonstrations take {count}: lower evaluate.shots"
                )
            shown += [(picture, name) for picture in pictures[:count]]
        rng.shuffle(shown)
        return [
            Item(
                picture,
                (picture,),
                WORDING.shown_question,
                WORDING.shown_answer.format(name=name),
                facts={"name": name},
            )
            for picture, name in shown
        ]

    def score(self, item: Item, prediction: Prediction) -> dict[str, float]:
        """Whether the right name was said alone, by both ways to tell, or the other one."""
        said, name, other = prediction.text, item.facts["name"], item.facts["other"]
        return {
            "right": float(names_only(said, name, other)),
            "right_as_released": float(names_as_released(said, name, other)),
            "other": float(names_only(said, other, name)),
        }

    def exchanged(self, query: Item, demonstrations: Sequence[Item]) -> list[Item]:
        """Each class under the other's name."""
        name, other = query.facts["name"], query.facts["other"]
        turned = {name: other, other: name}
        return [
            replace(item, answer=WORDING.shown_answer.format(name=turned[item.facts["name"]]))
            for item in demonstrations
        ]

    def counterpart(self, query: Item, demonstrations: Sequence[Item]) -> tuple[Item, list[Item]] | None:
        """A picture of the other class, the first that is not shown, behind the same demonstrations."""
        name, other = query.facts["name"], query.facts["other"]
        seen = {item.pictures for item in demonstrations}
        left = [picture for picture in _apart_from(query, other) if (picture,) not in seen]
        if not left:
            return None
        asked = replace(
            query,
            pictures=(left[0],),
            answer=WORDING.asked_answer.format(name=other),
            facts={**query.facts, "name": other, "other": name},
        )
        return asked, list(demonstrations)


class IsekaiTask(LinkContextTask):
    """Novel concepts against real ones (`ten`) or against each other (`pair`)."""

    name: ClassVar[str] = "isekai"
    source: ClassVar[str] = (
        "ISEKAI (Tai et al., arXiv:2308.07891), data sets ISEKAI-10 and ISEKAI-pair of "
        "https://huggingface.co/ISEKAI-Portal"
    )

    def __init__(self, config: IsekaiConfig) -> None:
        super().__init__(Path(config.folder))
        self._file = FILES[config.split]

    def load(self) -> Questions:
        """One query for each line of the split's file."""
        return self.questions(read_items(self._folder / self._file, self.source, self._query_of))

    def _query_of(self, record: Record) -> Item:
        names = record.text("positive_promt"), record.text("negative_promt")
        shown = read_paths(record, "positive_list"), read_paths(record, "negative_list")
        label = record.text("label_name")
        positive, negative = (_plain(name) for name in names)
        if positive == negative:
            raise record.wrong(
                f"positive_promt and negative_promt are both {names[0]!r}: two names are needed"
            )
        if _plain(label) == negative:
            names, shown = names[::-1], shown[::-1]
        elif _plain(label) != positive:
            raise record.wrong(
                f"label_name is {label!r} instead of {names[0]!r} or {names[1]!r}, which its demonstrations "
                "are called: no answer could be right"
            )
        return self.query(str(record.number), record.text("image_name"), names, shown)


def read_paths(record: Record, name: str) -> tuple[str, ...]:
    """The paths of pictures in a field.

    Raises:
        DataError: it is absent, empty, or something else.
    """
    paths = record.fields.get(name)
    if not isinstance(paths, list) or not paths or not all(is_text(path) and path for path in paths):
        found = f"is {str(paths)[:80]}" if name in record.fields else "is absent"
        raise record.wrong(f"{name} {found} instead of a list of the paths of pictures")
    return tuple(paths)


def _plain(name: str) -> str:
    return name.strip().lower()


def _apart_from(query: Item, name: str) -> list[str]:
    """Pictures of a class that may be shown, or asked about in the query's place."""
    shown: Mapping[str, Sequence[str]] = query.facts["shown"]
    return [picture for picture in shown[name] if picture not in query.pictures]
