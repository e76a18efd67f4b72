"""OBELICS (arXiv:2306.16527): web documents as parallel lists of texts and pictures, in Parquet.

| column | meaning |
|---|---|
| `texts` | list of strings, null where a picture stands |
| `images` | list as long, null where a text stands: URLs, as published, or the encoded pictures |
| `general_metadata` | JSON of an object whose `url` is where the document was |
| `metadata` | JSON of a list as long, with `src`, the URL of a picture, where a picture stands |

A picture is a pair with the text that follows it, up to the next picture; the text before the first picture
goes in front of the first pair's. Of pictures with nothing between them only the last one is a pair, and of
those that no text follows, none: the others are pictures without a matching text. Both null is an empty
place, as removed pictures leave it.

The corpus marks where one piece of a page ends and another begins by a paragraph
END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED (appendix A.1.2), which is no text to learn from; each piece is a
document of its own here, and text in one without pictures belongs to none.

Every picture is one row, in order; a document that has none, or whose form is another, is one row.

Hazard: a broken page ends its row group. That is one row, whose detail tells after how many documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmicl_core.data import reasons
from mmicl_core.data.readers.base import Row, Unit, skip, usable
from mmicl_core.data.readers.fields import UnusableError
from mmicl_core.data.readers.json_records import is_text
from mmicl_core.data.readers.row_groups import BREAKS, UNREADABLE, find_row_groups, iter_rows
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError

__all__ = ["ObelicsReader"]

BREAK = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
BETWEEN_TEXTS = "\n\n"
DOCUMENTS_AT_ONCE = 8


class ObelicsReader:
    """Reads OBELICS; a unit is a row group of a file.

    Args:
        location: the Parquet files.
    """

    def __init__(self, location: Location) -> None:
        self._location = location

    def units(self) -> list[Unit]:
        """The row groups, file by file in name order; a file that cannot be read is one unit.

        Raises:
            DataError: there is no Parquet file, or one lacks a column or has it with another type.
        """
        return find_row_groups(self._location, "OBELICS", _check_columns)

    def read(self, unit: Unit) -> Iterator[Row]:
        """The pictures of all documents of a row group; documents are numbered through their file, from 0."""
        given = 0
        try:
            for number, cells in iter_rows(self._location, unit, _columns_to_read, DOCUMENTS_AT_ONCE):
                yield from _read_document(f"{unit.key}/{number}", cells)
                given += 1
        except BREAKS as error:
            where = "" if unit.part == UNREADABLE else f" after {given} documents of row group {unit.part}"
            yield skip(unit.path, reasons.BROKEN_FILE, f"{unit.path} breaks{where}: {error}")


def _check_columns(path: str, schema: Any) -> None:
    for name, fits, wanted in (
        ("texts", _is_string, "a list of strings"),
        ("images", _is_picture, "a list of URLs, of binaries, or of structs with bytes"),
    ):
        if name not in schema.names:
            raise DataError(
                f"{path} has the columns {', '.join(schema.names)} and no {name!r}: OBELICS has both texts "
                "and images; choose another reader"
            )
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not fits(kind.value_type):
            raise DataError(f"{path}: the column {name!r} is {kind}, and OBELICS has {wanted} there")


def _is_string(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_picture(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_string(kind) or _is_binary(kind)


def _columns_to_read(schema: Any) -> list[str]:
    wanted = ["texts", "images", "general_metadata"]
    if not _is_string(schema.field("images").type.value_type):
        # Only here does it tell what is not known yet: the URL of a picture.
        wanted.append("metadata")
    return [name for name in wanted if name in schema.names]


def _read_document(key: str, cells: Mapping[str, Any]) -> Iterator[Row]:
    try:
        document = {name: cell.as_py() for name, cell in cells.items()}
        texts, images = _slots(document)
        source = _parse(document, "general_metadata", dict).get("url")
        about = _parse(document, "metadata", list) or [None] * len(images)
        if len(about) != len(images):
            told = f"metadata has {len(about)} entries for {len(images)} places"
            raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    except UnusableError as fault:
        yield skip(key, fault.reason, fault.detail)
        return
    except UnicodeDecodeError:
        yield skip(key, reasons.BROKEN_METADATA, "a text is not UTF-8")
        return
    pairs = _match(key, texts, images)
    for number, image in enumerate(images):
        if image is None:
            continue
        if number in pairs:
            columns = pairs[number] | {"source": source if is_text(source) else None}
            yield _row(f"{key}/{number}", image, about[number], columns)
        else:
            yield skip(
                f"{key}/{number}", reasons.UNMATCHED_PICTURE, "no text follows before the next picture"
            )


def _slots(document: Mapping[str, Any]) -> tuple[list[str | None], list[Any]]:
    texts, images = document["texts"], document["images"]
    if texts is None or images is None:
        raise UnusableError(reasons.INCOMPLETE_METADATA, "texts or images is null")
    if len(texts) != len(images):
        told = f"there are {len(texts)} texts for {len(images)} images"
        raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            told = f"place {number} holds both a text and a picture"
            raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    if all(image is None for image in images):
        raise UnusableError(reasons.NO_PICTURE, f"none of {len(images)} places holds one")
    return texts, images


def _parse(document: Mapping[str, Any], name: str, kind: type) -> Any:
    """What the JSON in a column holds; something empty where there is no column or no value."""
    text = document.get(name)
    if text is None:
        return kind()
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UnusableError(reasons.BROKEN_METADATA, f"{name} is not JSON: {type(error).__name__}") from error
    if not isinstance(value, kind):
        told = f"{name} holds a {type(value).__name__} instead of a {kind.__name__}"
        raise UnusableError(reasons.INCOMPLETE_METADATA, told)
    return value


def _match(key: str, texts: Sequence[str | None], images: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """Document, position and text of the pictures that have a text, by their places."""
    pieces: list[list[int | str]] = [[]]
    for place, (text, image) in enumerate(zip(texts, images, strict=True)):
        if image is not None:
            pieces[-1].append(place)
        elif text is not None:
            first, *others = (part.strip() for part in text.split(BREAK))
            pieces[-1].append(first)
            pieces += [[other] for other in others]
    told = {}
    documents = [pairs for pairs in map(_pairs, pieces) if pairs]
    for number, pairs in enumerate(documents):
        document = f"{key}+{number}" if number else key
        for position, (place, text) in enumerate(pairs):
            told[place] = {"document": document, "position": position, "text": text}
    return told


def _pairs(piece: Sequence[int | str]) -> list[tuple[int, str]]:
    """The pictures, by place, of a piece of a page that have a text, with their texts."""
    pairs: list[tuple[int, list[str]]] = []
    leading: list[str] = []
    for slot in piece:
        if isinstance(slot, int):
            if pairs and not pairs[-1][1]:
                pairs.pop()
            pairs.append((slot, []))
        elif slot:
            (pairs[-1][1] if pairs else leading).append(slot)
    if pairs:
        pairs[0][1][:0] = leading
    return [(place, BETWEEN_TEXTS.join(texts)) for place, texts in pairs if texts]


def _row(picture: str, image: Any, about: Any, columns: Mapping[str, Any]) -> Row:
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is None or data == "":
        return skip(picture, reasons.NO_PICTURE, "the picture's place is empty")
    if isinstance(data, str):
        return usable(picture, load=data, **columns)
    url = about.get("src") if isinstance(about, dict) else None
    return usable(picture, encoded=data, url=url if is_text(url) else None, **columns)
