"""LLaVA's instruction data (arXiv:2304.08485): JSON of pictures with conversations; Vision-Flan's too.

A file is an array of items (`.json`) or has one a line (`.jsonl`), either also in gzip:

| field | meaning |
|---|---|
| `id` | string or number, by which the picture's key ends; the number of the item if it is absent |
| `image` | path of the picture below `corpus.images` |
| `conversations` | turns of `human` and `gpt` in turn, as `from` and `value` |
| `task_name` | the task, in Vision-Flan; `reader.fields.task` names the field |

`<image>` says in the first question where the picture stands; it is taken out, because a picture comes before
its question here, and an item without it is about its picture all the same. The answer is the pair's text
where there is one turn; a conversation has none.

Ids repeat: LLaVA's own mixtures give the same one to several conversations about a picture. An item that says
what another one with its id said is a repetition; one that says something else is a sample, and its key ends
in its number too.

Hazard: a file is one piece of work, because nobody can tell where the items of an array begin without
reading those before. What is large should come as several files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mmicl_core.config.corpus import LlavaConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers.base import Row, Unit, skip, usable
from mmicl_core.data.readers.fields import UnusableError
from mmicl_core.data.readers.json_records import Fault, is_text, read_json_array, read_json_lines
from mmicl_core.data.readers.picture_files import find_picture
from mmicl_core.data.readers.units import find_units
from mmicl_core.data.storage import Location

__all__ = ["LlavaReader"]

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
PLACEHOLDER = "<image>"
SPEAKERS = ("human", "gpt")
DIGEST_BYTES = 16


class LlavaReader:
    """Reads LLaVA's JSON; a unit is a file.

    Args:
        location: the JSON files.
        config: what the fields are called.
        images: the folder of the pictures.
    """

    def __init__(self, location: Location, config: LlavaConfig, images: Location) -> None:
        self._location, self._config, self._images = location, config, images

    def units(self) -> list[Unit]:
        """The files, in name order.

        Raises:
            DataError: there is none, or two differ only in their suffix.
        """
        return find_units(self._location, "LLaVA's data", SUFFIXES)

    def read(self, unit: Unit) -> Iterator[Row]:
        """One row for each item."""
        is_array = unit.path.lower().removesuffix(".gz").endswith(".json")
        records = read_json_array if is_array else read_json_lines
        keys, said = set[str](), set[bytes]()
        for number, item in records(self._location, unit.path):
            key = f"{unit.key}/{number}" if number >= 0 else unit.path
            if isinstance(item, Fault):
                yield item.row(key)
                continue
            try:
                key = f"{unit.key}/{_id(item, number)}"
                columns = self._columns(item)
                digest = _digest(key, columns)
                place = f"{key}#{number}" if key in keys else key
                if digest in said or place in keys:
                    raise UnusableError(reasons.REPEATED_KEY, f"item {number} repeats an item before it")
                keys.add(place)
                said.add(digest)
                row = usable(place, **columns)
            except UnusableError as fault:
                row = skip(key, fault.reason, fault.detail)
            yield row

    def _columns(self, item: Mapping[str, Any]) -> dict[str, Any]:
        task = item.get(self._config.fields.task)
        if task is not None and not is_text(task):
            raise UnusableError(reasons.INCOMPLETE_METADATA, f"{self._config.fields.task} is not a string")
        path = _path(item.get("image"))
        turns = _turns(item.get("conversations"))
        text = turns[0]["answer"] if len(turns) == 1 else None
        return {"image": find_picture(self._images, path), "turns": turns, "text": text, "task": task}


def _id(item: Any, number: int) -> str | int:
    if not isinstance(item, dict):
        raise UnusableError(reasons.INCOMPLETE_METADATA, f"an item is a {type(item).__name__}, not an object")
    name = item.get("id")
    if name is None or name == "":
        return number
    if type(name) is not int and not is_text(name):
        raise UnusableError(reasons.INCOMPLETE_METADATA, "id is neither a string nor a whole number")
    return name


def _path(image: Any) -> str:
    """The path of an item's only picture."""
    paths = image if isinstance(image, list) else [image]
    if len(paths) > 1:
        raise UnusableError(reasons.SEVERAL_PICTURES, f"image names {len(paths)}")
    if not paths or paths[0] is None or paths[0] == "":
        raise UnusableError(reasons.NO_PICTURE, "image names none")
    if not is_text(paths[0]):
        raise UnusableError(reasons.INCOMPLETE_METADATA, "image is not a path")
    return paths[0]


def _turns(conversations: Any) -> list[dict[str, str]]:
    """Questions with their answers."""
    if not isinstance(conversations, list) or not conversations:
        raise UnusableError(reasons.INCOMPLETE_METADATA, "conversations is not a list of turns")
    said = [_said(turn, number) for number, turn in enumerate(conversations)]
    if len(said) % 2:
        raise UnusableError(reasons.INCOMPLETE_METADATA, f"turn {len(said) - 1} has no answer")
    return [
        {"question": question, "answer": answer}
        for question, answer in zip(said[::2], said[1::2], strict=True)
    ]


def _said(turn: Any, number: int) -> str:
    """What is said in a turn of a conversation, which are numbered from 0."""
    speaker, words = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if speaker != SPEAKERS[number % 2]:
        told = f"turn {number} is not from {SPEAKERS[number % 2]}"
        raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    if not is_text(words):
        raise UnusableError(reasons.INCOMPLETE_METADATA, f"the value of turn {number} is not a string")
    if number == 0:
        words = words.replace(PLACEHOLDER, "", 1)
    if PLACEHOLDER in words:
        raise UnusableError(reasons.INCOMPLETE_METADATA, f"turn {number} has one {PLACEHOLDER} too many")
    if not words.strip():
        raise UnusableError(reasons.INCOMPLETE_METADATA, f"turn {number} says nothing")
    return words.strip()


def _digest(key: str, columns: Mapping[str, Any]) -> bytes:
    """What two items with the same digest have in common: all that is known of them."""
    return hashlib.blake2b(json.dumps([key, columns]).encode(), digest_size=DIGEST_BYTES).digest()
