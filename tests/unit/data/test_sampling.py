from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.data.sampling import sample_episodes, sample_pictures, spread
from mmicl_core.data.schema import EPISODE
from tests.unit.data.described import write_described


@pytest.mark.parametrize(("count", "most"), [(3, 5), (5, 5), (100, 7), (10**9, 64)])
def test_spread_numbers_begin_at_zero_and_lie_evenly_up_to_the_end(count: int, most: int) -> None:
    numbers = spread(count, most)
    assert len(numbers) == min(count, most) and numbers[0] == 0
    gaps = [after - before for before, after in zip(numbers, [*numbers[1:], count], strict=True)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_spread_over_nothing_is_nothing() -> None:
    assert spread(0, 5) == spread(5, 0) == []


def _write_episodes(folder: Path, files: Sequence[Sequence[str]]) -> list[Path]:
    """Files of episodes, numbered through; each entry is the task of one."""
    number, paths = 0, []
    for place, tasks in enumerate(files):
        rows = [{"episode": number + n, "task": task} for n, task in enumerate(tasks)]
        number += len(tasks)
        paths.append(folder / f"episodes-{place:05d}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=EPISODE), paths[-1])
    return paths


def _numbers(table: pa.Table) -> list[int]:
    numbers: list[int] = table.column("episode").to_pylist()
    return numbers


def test_sample_of_episodes_is_spread_over_all_files(tmp_path: Path) -> None:
    files = _write_episodes(tmp_path, [["two_way"] * 300, ["two_way"] * 300, ["two_way"] * 10])
    assert _numbers(sample_episodes(files, 61)) == list(range(0, 610, 10))
    assert _numbers(sample_episodes(files, 10**6)) == list(range(610))


def test_sample_of_one_task_is_spread_over_its_episodes_alone(tmp_path: Path) -> None:
    mixed = ["two_way", "caption", "caption"]
    files = _write_episodes(tmp_path, [mixed * 100, ["caption"] * 50, mixed * 100])
    sample = sample_episodes(files, 20, "two_way")
    assert set(sample.column("task").to_pylist()) == {"two_way"}
    # Every tenth of 200, half of them in the first file.
    assert _numbers(sample) == [*range(0, 300, 30), *range(350, 650, 30)]
    assert sample_episodes(files, 20, "interleaved").num_rows == 0


def test_sample_of_many_files_reads_some_that_are_spread_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmicl_core.data.sampling.MOST_FILES", 3)
    files = _write_episodes(tmp_path, [["two_way"] * 10] * 9)
    unread = [file for place, file in enumerate(files) if place % 3]
    for file in unread:
        file.unlink()
    assert _numbers(sample_episodes(files, 6)) == [0, 5, 30, 35, 60, 65]


def _corpus(folder: Path, broken: Sequence[int] = ()) -> tuple[dict[str, Path], dict[str, int]]:
    """A hundred pictures, 60 and 40 to a file."""
    rows = [
        {
            "picture": f"p{number:03d}",
            "image": {"path": "corpus:a.tar", "member": "", "offset": number, "size": 1},
            "text": f"text {number}",
            "concept": f"c{number}",
            "width": number,
            "skipped": "corrupt picture" if number in broken else None,
        }
        for number in range(100)
    ]
    folders = write_described(folder, {"0": rows[:60], "1": rows[60:]})
    return folders, {"0": 60, "1": 40}


def test_sample_of_pictures_takes_one_of_each_stretch_and_all_that_is_known_of_it(tmp_path: Path) -> None:
    rows = sample_pictures(*_corpus(tmp_path), most=10, seed=0)
    numbers = [row["image"]["offset"] for row in rows]
    assert [number // 10 for number in numbers] == list(range(10))
    for row, number in zip(rows, numbers, strict=True):
        assert (row["picture"], row["text"]) == (f"p{number:03d}", f"text {number}")
        assert (row["width"], row["concept"]) == (number, f"c{number}")


def test_sample_of_pictures_is_the_same_for_a_seed_and_another_for_another(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path)
    assert sample_pictures(*corpus, most=10, seed=0) == sample_pictures(*corpus, most=10, seed=0)
    assert sample_pictures(*corpus, most=10, seed=0) != sample_pictures(*corpus, most=10, seed=1)


def test_sample_of_pictures_shows_none_that_cannot_be_used_and_none_twice(tmp_path: Path) -> None:
    usable = {5, 17, 99}
    corpus = _corpus(tmp_path, broken=[number for number in range(100) if number not in usable])
    shown = [row["image"]["offset"] for row in sample_pictures(*corpus, most=50, seed=0)]
    assert shown == sorted(usable)


def test_sample_of_a_corpus_without_a_usable_picture_is_empty(tmp_path: Path) -> None:
    assert sample_pictures(*_corpus(tmp_path, broken=range(100)), most=5, seed=0) == []
