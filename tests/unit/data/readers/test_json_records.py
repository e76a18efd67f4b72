from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.data import reasons
from mmicl_core.data.readers import json_records
from mmicl_core.data.readers.json_records import Fault, is_text, read_json_array, read_json_lines
from mmicl_core.data.storage import Location


def _value(rng: random.Random, depth: int = 0) -> Any:
    """A value of any JSON type, with what a reader could mistake for the end of an item."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind < 4:
        return rng.choice([None, True, -12, 3.5e-3, 10**12, ""])
    if kind < 6:
        return "".join(rng.choice('a"\\],[{}:\n\t é漢😀\u2028') for _ in range(rng.randrange(12)))
    if kind == 6:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{number}": _value(rng, depth + 1) for number in range(rng.randrange(4))}


def _read_array(folder: Path, content: bytes) -> list[tuple[int, Any]]:
    (folder / "a.json").write_bytes(content)
    return list(read_json_array(Location(str(folder)), "a.json"))


def _read_lines(folder: Path, content: bytes) -> list[tuple[int, Any]]:
    (folder / "a.jsonl").write_bytes(content)
    return list(read_json_lines(Location(str(folder)), "a.jsonl"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_json_array_gives_what_json_reads_wherever_chunks_end(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    for _ in range(60):
        values = [_value(rng) for _ in range(rng.randrange(6))]
        indent = rng.choice([None, 1])
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=indent)
        assert _read_array(tmp_path, f" {text}\n\n".encode()) == list(enumerate(values))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_json_lines_give_what_json_reads_wherever_chunks_end(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    for _ in range(60):
        values = [_value(rng) for _ in range(rng.randrange(6))]
        text = rng.choice(["\n", "\r\n"]).join(json.dumps(value, ensure_ascii=False) for value in values)
        assert _read_lines(tmp_path, text.encode()) == list(enumerate(values))


def test_json_lines_count_blank_lines_and_give_none_of_them(tmp_path: Path) -> None:
    assert _read_lines(tmp_path, b"\n1\n\n \t\n2\n\n") == [(1, 1), (4, 2)]


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert _read_lines(tmp_path, b'\xef\xbb\xbf{"a": 1}\n2') == [(0, {"a": 1}), (1, 2)]


def test_json_line_that_is_too_long_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "MOST_BYTES", 100)
    lines = [json.dumps("x" * length) for length in (10, 98, 99, 5000, 3)]
    found = _read_lines(tmp_path, "\n".join(lines).encode())
    assert [number for number, _ in found] == [0, 1, 2, 3, 4]
    assert [getattr(value, "reason", None) for _, value in found] == [
        None,
        None,
        reasons.BROKEN_METADATA,
        reasons.BROKEN_METADATA,
        None,
    ]


def test_json_line_that_never_ends_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "MOST_BYTES", 2**18)
    (tmp_path / "a.jsonl").write_bytes(b"1\n" + b"x" * 2**24)
    tracemalloc.start()
    found = list(read_json_lines(Location(str(tmp_path)), "a.jsonl"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[0] == (0, 1) and found[1][1].reason == reasons.BROKEN_METADATA
    assert peak < 4 * 2**20


@pytest.mark.parametrize("rest", [b"x", b" ]", b"\n[2]", b",", b"\xff"])
def test_json_array_with_something_behind_its_end_is_told(rest: bytes, tmp_path: Path) -> None:
    found = _read_array(tmp_path, b"[1]" + rest)
    assert found[0] == (0, 1)
    assert [(number, fault.reason) for number, fault in found[1:]] == [(-1, reasons.BROKEN_FILE)]


def test_json_array_item_that_never_ends_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "MOST_BYTES", 2**18)
    endless = b'["a", "' + b"x" * 2**24
    (tmp_path / "a.json").write_bytes(endless)
    tracemalloc.start()
    found = list(read_json_array(Location(str(tmp_path)), "a.json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[0] == (0, "a")
    assert [number for number, _ in found] == [0, -1] and "longer than 262144" in found[1][1].detail
    assert peak < 4 * 2**20


def test_json_array_of_any_length_takes_the_memory_of_a_chunk(tmp_path: Path) -> None:
    content = json.dumps([{"id": number, "said": "x" * 1000} for number in range(8000)]).encode()
    (tmp_path / "a.json").write_bytes(content)
    tracemalloc.start()
    count = sum(1 for _ in read_json_array(Location(str(tmp_path)), "a.json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000
    assert peak < len(content) / 4


def test_json_that_is_missing_is_a_fault_of_the_file(tmp_path: Path) -> None:
    for read in (read_json_array, read_json_lines):
        ((number, fault),) = read(Location(str(tmp_path)), "none.json")
        assert (number, fault.reason) == (-1, reasons.BROKEN_FILE)


def test_json_fault_becomes_a_row_with_its_reason() -> None:
    row = Fault(reasons.BROKEN_METADATA, "line 3").row("a/3")
    assert (row.pair["picture"], row.skipped, row.detail) == ("a/3", reasons.BROKEN_METADATA, "line 3")


@pytest.mark.parametrize(
    ("value", "told"), [("a 漢😀", True), ("", True), ("\ud83d", False), (b"a", False), (1, False)]
)
def test_text_is_a_string_that_utf8_can_hold(value: Any, told: bool) -> None:
    assert is_text(value) == told
