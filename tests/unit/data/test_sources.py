from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.data.schema import PAIR
from mmicl_core.data.sources import find_shards, read_shard
from mmicl_core.errors import DataError
from tests.fakes import draw_picture, encode_picture, metadata, write_tar

TAR_BLOCK = 512

Member = tuple[str, bytes]


def _sample(key: str, number: int = 0, kind: str = "png") -> list[Member]:
    about = json.dumps(metadata("red-cat", "ink")).encode()
    picture = encode_picture(draw_picture(number), {"jpg": "JPEG"}.get(kind, kind.upper()))
    return [(f"{key}.json", about), (f"{key}.{kind}", picture)]


def _with(**changes: Any) -> bytes:
    return json.dumps(metadata("red-cat", "ink") | changes).encode()


def _read(folder: Path, members: Sequence[Member]) -> list[tuple[str, str | None]]:
    shard = write_tar(folder / "shard.tar", members)
    return [(row["picture"], row["skipped"]) for row in read_shard(shard)]


GOOD = encode_picture(draw_picture(1))
TRUNCATED_JPEG = encode_picture(draw_picture(2, side=256), "JPEG")[:-400]
BAD_SAMPLES: dict[str, tuple[list[Member], str]] = {
    "no picture": ([("bad.json", _with())], "no picture"),
    "picture of an unknown kind": ([("bad.json", _with()), ("bad.tiff", GOOD)], "no picture"),
    "no metadata": ([("bad.png", GOOD)], "no metadata"),
    "text for a picture": ([("bad.json", _with()), ("bad.png", b"not a picture")], "broken picture"),
    "truncated png": ([("bad.json", _with()), ("bad.png", GOOD[:-30])], "broken picture"),
    "truncated jpeg": ([("bad.json", _with()), ("bad.jpg", TRUNCATED_JPEG)], "broken picture"),
    "half a sentence of json": ([("bad.json", _with()[:40]), ("bad.png", GOOD)], "broken metadata"),
    "json that is not utf-8": ([("bad.json", b'{"name": "\xff"}'), ("bad.png", GOOD)], "broken metadata"),
    "json nested without end": ([("bad.json", b"[" * 100_000), ("bad.png", GOOD)], "broken metadata"),
    "a list": ([("bad.json", b"[]"), ("bad.png", GOOD)], "incomplete metadata"),
    "no licence": (
        [("bad.json", json.dumps({"concept": "red-cat"}).encode()), ("bad.png", GOOD)],
        "incomplete metadata",
    ),
    "a number for a concept": ([("bad.json", _with(concept=5)), ("bad.png", GOOD)], "incomplete metadata"),
    "no concept": ([("bad.json", _with(concept=None)), ("bad.png", GOOD)], "incomplete metadata"),
    "text for keywords": ([("bad.json", _with(keywords="cat")), ("bad.png", GOOD)], "incomplete metadata"),
    "numbers for keywords": ([("bad.json", _with(keywords=[1])), ("bad.png", GOOD)], "incomplete metadata"),
}


@pytest.mark.parametrize("what", BAD_SAMPLES)
def test_tar_reader_names_an_unusable_sample_and_keeps_its_neighbours(what: str, tmp_path: Path) -> None:
    bad, reason = BAD_SAMPLES[what]
    found = _read(tmp_path, [*_sample("a"), *bad, *_sample("z")])
    assert found == [("a", None), ("bad", reason), ("z", None)]


def test_tar_reader_gives_whole_pair_rows_with_the_bytes_of_the_file(tmp_path: Path) -> None:
    members = _sample("a", kind="webp")
    (row,) = read_shard(write_tar(tmp_path / "shard.tar.gz", members))
    assert set(row) == {*PAIR.names, "skipped"}
    assert row["image"] == members[1][1]
    assert {name: row[name] for name in metadata("", "")} == metadata("red-cat", "ink")


def test_tar_reader_reads_members_below_folders_by_their_own_names(tmp_path: Path) -> None:
    # `tar -C folder -c .` writes every member as `./name`, and folders may have dots in their names.
    members = [(f"./v1.0/{name}", data) for name, data in [*_sample("a"), *_sample("b", 1)]]
    assert [skipped for _, skipped in _read(tmp_path, members)] == [None, None]
    keys = [key for key, _ in _read(tmp_path, members)]
    assert len(set(keys)) == 2


def test_tar_reader_keeps_samples_of_one_name_in_two_folders_apart(tmp_path: Path) -> None:
    members = [(f"{folder}/{name}", data) for folder in ("x", "y") for name, data in _sample("a")]
    found = _read(tmp_path, members)
    assert [skipped for _, skipped in found] == [None, None]
    assert found[0][0] != found[1][0]


def test_tar_reader_counts_a_sample_that_repeats_the_key_before_it(tmp_path: Path) -> None:
    found = _read(tmp_path, [*_sample("a", 1), *_sample("a", 2), *_sample("b"), *_sample("a", 3)])
    assert found == [("a", None), ("a", "repeated key"), ("b", None), ("a", "repeated key")]


@pytest.mark.parametrize("compressed", [False, True])
def test_tar_reader_keeps_every_sample_before_the_place_where_a_shard_breaks(
    compressed: bool, tmp_path: Path
) -> None:
    whole = write_tar(tmp_path / "whole.tar", [m for n in range(6) for m in _sample(f"s{n}", n)])
    data = whole.read_bytes()
    ends = _ends_of_samples(data, 6)
    # Uneven steps, so that cuts fall into headers, pictures and padding alike.
    for cut in range(TAR_BLOCK, ends[-1], 333):
        torn = data[:cut]
        path = tmp_path / ("torn.tar.gz" if compressed else "torn.tar")
        path.write_bytes(gzip.compress(torn, 1) if compressed else torn)
        rows = [(row["picture"], row["skipped"]) for row in read_shard(path)]
        complete = sum(end <= cut for end in ends)
        assert [row for row in rows if row[1] is None] == [(f"s{n}", None) for n in range(complete)], cut
        assert rows[-1][1] is not None and rows[-1][1].startswith("broken shard"), cut


def test_tar_reader_says_so_when_a_gzip_stream_ends_early(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar.gz", [m for n in range(6) for m in _sample(f"s{n}", n)])
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(whole.read_bytes()[:-200])
    assert [row["skipped"] for row in read_shard(torn)][-1].startswith("broken shard")


def test_tar_reader_says_so_when_a_header_in_the_middle_is_broken(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "shard.tar", [m for n in range(4) for m in _sample(f"s{n}", n)])
    data = bytearray(shard.read_bytes())
    third_sample = -(-_ends_of_samples(bytes(data), 4)[1] // TAR_BLOCK) * TAR_BLOCK
    data[third_sample : third_sample + 100] = b"\xff" * 100
    shard.write_bytes(data)
    found = [(row["picture"], row["skipped"]) for row in read_shard(shard)]
    assert found[:2] == [("s0", None), ("s1", None)]
    assert len(found) == 3 and str(found[2][1]).startswith("broken shard")


def test_tar_reader_says_so_when_a_shard_is_no_archive_or_is_missing(tmp_path: Path) -> None:
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    for path in (empty, tmp_path / "missing.tar"):
        (row,) = read_shard(path)
        assert row["skipped"].startswith("broken shard")


def test_find_shards_gives_all_shards_in_name_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar.gz", "notes.txt", "split.json"):
        (tmp_path / name).write_bytes(b"")
    assert [shard.name for shard in find_shards(tmp_path)] == ["a.tar.gz", "b.tar"]


def test_find_shards_without_a_shard_tells_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        find_shards(tmp_path)
    with pytest.raises(DataError, match="mmicl corpus build open-emoji"):
        find_shards(tmp_path / "missing")


def _ends_of_samples(data: bytes, count: int) -> list[int]:
    """Where the content of each sample's last member ends in an archive of (json, png) samples."""
    ends, position = [], 0
    for _ in range(2 * count):
        size = int(data[position + 124 : position + 135], 8)
        ends.append(position + TAR_BLOCK + size)
        position += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
    return ends[1::2]
