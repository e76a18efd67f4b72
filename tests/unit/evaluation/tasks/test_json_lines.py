from __future__ import annotations

from pathlib import Path

import pytest

from mmicl_core.errors import DataError
from mmicl_core.evaluation.tasks.base import Item
from mmicl_core.evaluation.tasks.json_lines import Record, read_items


def _item(record: Record) -> Item:
    label = record.one_of("label", {0: "no", 1: "yes"})
    return Item(str(record.integer("id")), (), record.text("text", "old_text"), label)


def _write(folder: Path, content: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text(content)
    return path


def test_lines_become_items_in_their_order_and_blank_ones_none(tmp_path: Path) -> None:
    path = _write(tmp_path, '{"id": 2, "label": 1, "text": "a"}\n\n{"id": 1, "label": 0, "old_text": "b"}')
    items = read_items(path, "there", _item)
    assert [(item.id, item.question, item.answer) for item in items] == [("2", "a", "yes"), ("1", "b", "no")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1: "),
        ("[1]", "line 1: it is a list instead of an object"),
        ('{"id": 2, "text": "a"}', "line 1: there is no label"),
        ('{"id": 2, "label": 1}', "line 1: there is no text"),
        ('{"id": 2, "label": true, "text": "a"}', "line 1: label is True instead of one of [0, 1]"),
        ('{"id": 2, "label": 1.0, "text": "a"}', "line 1: label is 1.0 instead of"),
        ('{"id": 2, "label": [1], "text": "a"}', "line 1: label is [1] instead of"),
        ('{"id": "2", "label": 1, "text": "a"}', "line 1: id is '2' instead of a whole number"),
        ('{"id": true, "label": 1, "text": "a"}', "line 1: id is True instead of"),
        ('{"id": 2, "label": 1, "text": " "}', "line 1: text is ' ' instead of a text"),
        ('{"id": 2, "label": 1, "text": 3}', "line 1: text is 3 instead of a text"),
        ('{"id": 1, "label": 1, "text": "a"}', "line 1: its id 1 is that of line 0"),
    ],
)
def test_faulty_line_is_an_error_with_the_file_and_its_number(tmp_path: Path, line: str, told: str) -> None:
    path = _write(tmp_path, '{"id": 1, "label": 1, "text": "a"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_items(path, "there", _item)
    assert str(path) in str(caught.value) and told in str(caught.value)


def test_missing_and_empty_files_are_errors_that_say_where_to_take_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl is missing: put .* there, from there"):
        read_items(tmp_path / "data.jsonl", "there", _item)
    with pytest.raises(DataError, match="is empty: .* from there"):
        read_items(_write(tmp_path, "\n"), "there", _item)
