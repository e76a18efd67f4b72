from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.corpus import FieldNames, LlavaConfig
from mmicl_core.data import reasons
from mmicl_core.data.readers.base import Row
from mmicl_core.data.readers.llava import LlavaReader
from mmicl_core.data.storage import IMAGES, Location, PictureReader
from mmicl_core.errors import DataError
from tests.readers import read_all, reasons_of

PICTURE = "coco/train2017/000000033471.jpg"

# The form of the released items, with fields that nobody reads.
PUBLISHED = {
    "id": "000000033471",
    "image": PICTURE,
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colours of the bus?", "extra": None},
        {"from": "gpt", "value": "White and red. 🚌"},
        {"from": "human", "value": "Is it “moving”?"},
        {"from": "gpt", "value": "It is parked."},
    ],
    "model": "",
}


def _item(**changes: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    return {"id": "x", "image": PICTURE, "conversations": said} | changes


def _talk(*words: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(words)]


def _reader(folder: Path, content: bytes, name: str = "mix.json") -> LlavaReader:
    """A reader of one file; in the folder of its pictures there is one."""
    corpus, images = folder / "corpus", folder / "images"
    corpus.mkdir(exist_ok=True)
    (images / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    (images / PICTURE).write_bytes(b"a picture")
    (folder / "secret.jpg").write_bytes(b"secret")
    (corpus / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return LlavaReader(Location(str(corpus)), LlavaConfig(), Location(str(images)))


def _read(folder: Path, *items: Any) -> list[Row]:
    return read_all(_reader(folder, json.dumps(items).encode()))


def test_llava_item_as_published_becomes_turns_without_the_placeholder(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, PUBLISHED)
    assert row.pair["picture"] == "mix/000000033471"
    assert row.pair["turns"] == [
        {"question": "What are the colours of the bus?", "answer": "White and red. 🚌"},
        {"question": "Is it “moving”?", "answer": "It is parked."},
    ]
    assert (row.pair["text"], row.pair["task"]) == (None, None)
    with_bytes = PictureReader({IMAGES: Location(str(tmp_path / "images"))})
    assert with_bytes.read(row.pair["image"]) == b"a picture"
    with_bytes.close()


def test_llava_single_answer_is_the_text_of_the_pair(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, _item())
    assert row.pair["text"] == "A cat."


@pytest.mark.parametrize(
    "value",
    ["<image>\nWhat?", "What?\n<image>", "<image> What?", "What?<image>", "\n<image>\nWhat?\n", "What?"],
)
def test_llava_placeholder_is_taken_out_wherever_it_stands(value: str, tmp_path: Path) -> None:
    (row,) = _read(tmp_path, _item(conversations=_talk(value, "A cat.")))
    assert row.pair["turns"] == [{"question": "What?", "answer": "A cat."}]


def test_llava_task_is_what_the_named_field_says_and_never_guessed(tmp_path: Path) -> None:
    items = [
        _item(id=1, task_name="Cars+car_brand"),
        _item(id=2, task_name=None),
        _item(id=3, kind="captions"),
    ]
    reader = _reader(tmp_path, json.dumps(items).encode())
    assert [row.pair["task"] for row in read_all(reader)] == ["Cars+car_brand", None, None]
    config = LlavaConfig(fields=FieldNames(task="kind"))
    reader = LlavaReader(Location(str(tmp_path / "corpus")), config, Location(str(tmp_path / "images")))
    assert [row.pair["task"] for row in read_all(reader)] == [None, None, "captions"]


UNFIT: dict[str, tuple[Any, str]] = {
    "no object": ([1], reasons.INCOMPLETE_METADATA),
    "null": (None, reasons.INCOMPLETE_METADATA),
    "a list for an id": (_item(id=["a"]), reasons.INCOMPLETE_METADATA),
    "a truth value for an id": (_item(id=True), reasons.INCOMPLETE_METADATA),
    "half a character for an id": (_item(id="\udc00"), reasons.INCOMPLETE_METADATA),
    "null for the picture": (_item(image=None), reasons.NO_PICTURE),
    "an empty picture": (_item(image=""), reasons.NO_PICTURE),
    "an empty list of pictures": (_item(image=[]), reasons.NO_PICTURE),
    "two pictures": (_item(image=[PICTURE, PICTURE]), reasons.SEVERAL_PICTURES),
    "a number for the picture": (_item(image=5), reasons.INCOMPLETE_METADATA),
    "half a character in the picture": (_item(image="\ud83d.jpg"), reasons.INCOMPLETE_METADATA),
    "a picture that is not there": (_item(image="coco/none.jpg"), reasons.MISSING_FILE),
    "a folder for a picture": (_item(image="coco"), reasons.MISSING_FILE),
    "a url for a picture": (_item(image="http://example.com/a.jpg"), reasons.MISSING_FILE),
    "a path up": (_item(image="../secret.jpg"), reasons.FORGED_PATH),
    "a path up from a folder": (_item(image="coco/../../secret.jpg"), reasons.FORGED_PATH),
    "a path far up": (_item(image="../../../../../../etc/passwd"), reasons.FORGED_PATH),
    "an absolute path": (_item(image="/etc/passwd"), reasons.FORGED_PATH),
    "a path up with backslashes": (_item(image="..\\secret.jpg"), reasons.FORGED_PATH),
    "a path that ends early": (_item(image=f"{PICTURE}\0.png"), reasons.FORGED_PATH),
    "a number for the task": (_item(task_name=5), reasons.INCOMPLETE_METADATA),
    "null for the conversation": (_item(conversations=None), reasons.INCOMPLETE_METADATA),
    "an empty conversation": (_item(conversations=[]), reasons.INCOMPLETE_METADATA),
    "text for the conversation": (_item(conversations="human"), reasons.INCOMPLETE_METADATA),
    "null for a turn": (_item(conversations=[None, None]), reasons.INCOMPLETE_METADATA),
    "no answer": (_item(conversations=_talk("a", "b", "c")), reasons.INCOMPLETE_METADATA),
    "an answer first": (_item(conversations=_talk("a", "b", "c")[1:]), reasons.INCOMPLETE_METADATA),
    "two answers": (
        _item(conversations=[*_talk("a", "b"), *_talk("c", "d")[1:]]),
        reasons.INCOMPLETE_METADATA,
    ),
    "another speaker": (
        _item(conversations=[{"from": "system", "value": "a"}, *_talk("a")]),
        reasons.INCOMPLETE_METADATA,
    ),
    "null for words": (_item(conversations=_talk("a", None)), reasons.INCOMPLETE_METADATA),
    "half a character": (_item(conversations=_talk("a", "\ud83d")), reasons.INCOMPLETE_METADATA),
    "no words": (_item(conversations=_talk("a", " \n")), reasons.INCOMPLETE_METADATA),
    "nothing but the placeholder": (
        _item(conversations=_talk("<image>\n", "b")),
        reasons.INCOMPLETE_METADATA,
    ),
    "two placeholders": (_item(conversations=_talk("<image><image>a", "b")), reasons.INCOMPLETE_METADATA),
    "a placeholder in an answer": (_item(conversations=_talk("a", "<image>")), reasons.INCOMPLETE_METADATA),
    "a placeholder later": (
        _item(conversations=_talk("<image>a", "b", "<image>c", "d")),
        reasons.INCOMPLETE_METADATA,
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_llava_item_of_another_form_is_one_row_and_its_neighbours_stay(what: str, tmp_path: Path) -> None:
    item, reason = UNFIT[what]
    rows = _read(tmp_path, _item(id="a"), item, _item(id="z"))
    assert [row.skipped for row in rows] == [None, reason, None]
    assert [rows[0].pair["picture"], rows[2].pair["picture"]] == ["mix/a", "mix/z"]
    assert len(rows[1].detail) < 200


def test_llava_item_without_a_picture_is_told(tmp_path: Path) -> None:
    text_only = _item()
    del text_only["image"]
    assert reasons_of(_read(tmp_path, text_only)) == [("mix/x", reasons.NO_PICTURE)]


def test_llava_list_of_one_picture_is_that_picture(tmp_path: Path) -> None:
    (row,) = _read(tmp_path, _item(image=[PICTURE]))
    assert row.pair["image"]["path"] == IMAGES + PICTURE


def test_llava_item_without_an_id_is_named_by_its_number(tmp_path: Path) -> None:
    nameless = _item()
    del nameless["id"]
    rows = _read(tmp_path, nameless, nameless, _item(id=None), _item(id=""), _item(id=17))
    assert reasons_of(rows) == [(f"mix/{name}", None) for name in (0, 1, 2, 3, 17)]


def test_llava_id_of_two_conversations_names_both_and_a_repetition_is_told(tmp_path: Path) -> None:
    other = _item(conversations=_talk("Where is it?", "Here."))
    rows = _read(
        tmp_path, _item(), other, _item(), other, _item(id="x#5"), _item(conversations=_talk("a", "b"))
    )
    assert reasons_of(rows) == [
        ("mix/x", None),
        ("mix/x#1", None),
        ("mix/x", reasons.REPEATED_KEY),
        ("mix/x", reasons.REPEATED_KEY),
        ("mix/x#5", None),
        # Its own key is taken.
        ("mix/x", reasons.REPEATED_KEY),
    ]


def test_llava_array_cut_anywhere_keeps_every_item_before_the_cut(tmp_path: Path) -> None:
    items = [_item(id=number, note="ä") for number in range(6)]
    content = json.dumps(items, ensure_ascii=False).encode()
    ends = [len(json.dumps(items[: number + 1], ensure_ascii=False).encode()) - 1 for number in range(6)]
    for cut in range(0, len(content), 13):
        *before, last = read_all(_reader(tmp_path, content[:cut]))
        assert reasons_of(before) == [
            (f"mix/{number}", None) for number in range(sum(e <= cut for e in ends))
        ]
        assert reasons_of([last]) == [("mix.json", reasons.BROKEN_FILE)], cut


def test_llava_broken_item_ends_an_array_and_the_items_before_it_stand(tmp_path: Path) -> None:
    good = json.dumps(_item()).encode()
    for broken in (b'{"id": nope}', b"[" * 200_000, b'{"id": "\xff"}', b"9" * 5000, b'{"id": 1} {"id": 2}'):
        rows = read_all(_reader(tmp_path, b"[" + good + b", " + broken + b", " + good + b"]"))
        assert reasons_of(rows)[0] == ("mix/x", None)
        assert reasons_of(rows)[-1] == ("mix.json", reasons.BROKEN_FILE)


@pytest.mark.parametrize("content", [b"", b"  \n", b'{"id": "x"}', b'"text"', b"5", b"\xff", b"]", b"<html>"])
def test_llava_file_that_is_no_array_is_one_row(content: bytes, tmp_path: Path) -> None:
    assert reasons_of(read_all(_reader(tmp_path, content))) == [("mix.json", reasons.BROKEN_FILE)]


def test_llava_empty_array_has_no_rows(tmp_path: Path) -> None:
    assert read_all(_reader(tmp_path, b" [ ] ")) == []


def test_llava_broken_line_costs_that_line_alone(tmp_path: Path) -> None:
    lines = [
        json.dumps(_item(id="a")),
        json.dumps(_item())[:50],
        "",
        "[" * 200_000,
        json.dumps(_item(id="z")),
    ]
    rows = read_all(_reader(tmp_path, "\n".join(lines).encode(), "mix.jsonl"))
    assert reasons_of(rows) == [
        ("mix/a", None),
        ("mix/1", reasons.BROKEN_METADATA),
        ("mix/3", reasons.BROKEN_METADATA),
        ("mix/z", None),
    ]


@pytest.mark.parametrize("name", ["mix.jsonl", "mix.json.gz", "mix.jsonl.gz"])
def test_llava_file_reads_the_same_in_each_of_its_forms(name: str, tmp_path: Path) -> None:
    items: Sequence[Any] = [PUBLISHED, _item(id=None), _item(image=None), 5]
    whole = _read(tmp_path / "array", *items) if (tmp_path / "array").mkdir() is None else []
    lines = "".join(json.dumps(item) + "\n" for item in items)
    content = lines if "jsonl" in name else json.dumps(items)
    assert read_all(_reader(tmp_path, content.encode(), name)) == whole


def test_llava_files_are_found_in_name_order_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    reader = _reader(tmp_path, b"[]")
    for name in ("b.jsonl", "a.json.gz", "c.txt"):
        (tmp_path / "corpus" / name).write_bytes(b"")
    assert [unit.path for unit in reader.units()] == ["a.json.gz", "b.jsonl", "mix.json"]
    (tmp_path / "corpus" / "b.json").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.json and b\.jsonl"):
        reader.units()
