from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmicl_core.data import reasons
from mmicl_core.data.fetch import Fetched
from mmicl_core.data.ingest import write_pairs
from mmicl_core.data.readers.base import Row, image_at, skip, usable
from mmicl_core.data.schema import PAIR, SKIPPED
from mmicl_core.data.storage import COPY, CORPUS, Location, PictureReader

HERE = image_at(CORPUS + "a.tar", member="x.png", offset=512, size=9)


class Loader:
    """Loads what its table holds, and counts how much it is asked for at once."""

    def __init__(self, found: dict[str, Fetched]) -> None:
        self._found, self.asked = found, list[int]()

    def fetch_many(self, urls: Sequence[str]) -> list[Fetched]:
        self.asked.append(len(urls))
        return [self._found[url] for url in urls]


def _rows() -> Iterator[Row]:
    yield usable("k/0", image=HERE, text="in place")
    yield skip("k/1", reasons.NO_TEXT, "neither text")
    yield usable("k/2", encoded=b"twelve bytes", text="copied")
    yield usable("k/3", load="http://a/3", text="loaded")
    yield usable("k/4", load="http://a/4", text="refused")
    yield usable("k/5", encoded=b"x" * 700, url="http://a/5", text="copied too")


def _write(
    folder: Path, rows_per_file: int = 100, loader: Any = None
) -> tuple[dict[str, int], dict[str, Any]]:
    return write_pairs(_rows(), "00007", folder, rows_per_file, loader)


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob(pattern)) for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def loader() -> Loader:
    found = {
        "http://a/3": Fetched("http://a/3", b"from afar", None, ""),
        "http://a/4": Fetched("http://a/4", None, reasons.OPTED_OUT, "noai"),
    }
    return Loader(found)


def test_counts_add_up_and_every_row_is_in_exactly_one_file(tmp_path: Path, loader: Loader) -> None:
    files, counts = _write(tmp_path, loader=loader)
    assert counts == {
        "read": 6,
        "kept": 4,
        "skipped": {reasons.NO_TEXT: 1, reasons.OPTED_OUT: 1},
    }
    kept, aside = _read(tmp_path, "pairs-*"), _read(tmp_path, "skipped-*")
    assert [row["picture"] for row in kept] == ["k/0", "k/2", "k/3", "k/5"]
    assert [(row["picture"], row["detail"]) for row in aside] == [("k/1", "neither text"), ("k/4", "noai")]
    assert files == {"pairs-00007-000.parquet": 4, "skipped-00007.parquet": 2, "copied-00007.tar": 3}
    assert pq.read_schema(tmp_path / "pairs-00007-000.parquet") == PAIR
    assert pq.read_schema(tmp_path / "skipped-00007.parquet") == SKIPPED


def test_what_has_no_place_of_its_own_is_copied_and_read_back_by_its_reference(
    tmp_path: Path, loader: Loader
) -> None:
    _write(tmp_path, loader=loader)
    reader = PictureReader({COPY: Location(str(tmp_path))})
    there, *copied = _read(tmp_path, "pairs-*")
    assert there["image"] == HERE
    assert [reader.read(row["image"]) for row in copied] == [b"twelve bytes", b"from afar", b"x" * 700]


def test_without_a_loader_a_picture_behind_a_url_is_left_out_and_says_why(tmp_path: Path) -> None:
    _, counts = _write(tmp_path)
    assert counts["skipped"] == {reasons.NO_TEXT: 1, reasons.URL_REFUSED: 2}
    assert {row["detail"] for row in _read(tmp_path, "skipped-*")} >= {"corpus.fetch.enabled is false"}


def test_files_hold_as_many_rows_as_asked_and_the_same_rows(tmp_path: Path, loader: Loader) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    _write(tmp_path / "one", loader=loader)
    files, _ = _write(tmp_path / "many", rows_per_file=3, loader=loader)
    assert [files[name] for name in sorted(files) if name.startswith("pairs")] == [3, 1]
    assert _read(tmp_path / "many", "pairs-*") == _read(tmp_path / "one", "pairs-*")


def test_pictures_are_loaded_a_bounded_number_at_a_time(tmp_path: Path) -> None:
    urls = [f"http://a/{number}" for number in range(100)]
    loader = Loader({url: Fetched(url, b"x", None, "") for url in urls})
    rows = (usable(f"k/{number}", load=url, text="t") for number, url in enumerate(urls))
    write_pairs(rows, "0", tmp_path, 1000, loader)
    assert sum(loader.asked) == 100 and max(loader.asked) <= 32


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, loader: Loader) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name, loader=loader)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
