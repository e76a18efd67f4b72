from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.bank import Bank, Demonstration, Known
from mmicl_core.bank.entries import demonstration_key
from mmicl_core.bank.memory import Recent
from tests.banks import CAT, CUP, MAKER, PAIR, TENANT, files_below, known, numbers

MIB = 2**20


def numbered(number: int) -> Demonstration:
    return replace(CAT, answer=str(number))


def keep(bank: Bank, *numbers: int) -> None:
    for number in numbers:
        bank.keep(TENANT, MAKER, numbered(number), known(seed=number))


def held(bank: Bank, count: int) -> list[int]:
    return [number for number in range(count) if bank.get(TENANT, MAKER, numbered(number)) is not None]


def grow_old(folder: Path) -> None:
    """What was used until now was used a minute ago."""
    for path in files_below(folder):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 60 * 10**9))


def file_bytes(tmp_path: Path) -> int:
    bank = Bank(tmp_path / "measured")
    keep(bank, 0)
    return files_below(tmp_path / "measured")[0].stat().st_size


def assert_same(found: Known | None, wanted: Known) -> None:
    assert found is not None and found.tokens_full == wanted.tokens_full
    np.testing.assert_array_equal(found.fused, wanted.fused)
    assert (found.vector is None) == (wanted.vector is None)
    if wanted.vector is not None:
        np.testing.assert_array_equal(found.vector, wanted.vector)


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("memory", [0, MIB])
def test_demonstration_is_known_again_here_and_after_a_restart(tmp_path, memory, vector):
    bank, wanted = Bank(tmp_path, memory_bytes=memory), known(vector=vector)
    assert bank.get(TENANT, MAKER, PAIR) is None
    bank.keep(TENANT, MAKER, PAIR, wanted)
    assert_same(bank.get(TENANT, MAKER, PAIR), wanted)
    assert_same(Bank(tmp_path, memory_bytes=memory).get(TENANT, MAKER, PAIR), wanted)


@pytest.mark.parametrize(
    "other",
    [
        ("bob", MAKER, PAIR),
        (TENANT, MAKER | {"adapter": "projection-b"}, PAIR),
        (TENANT, MAKER, replace(PAIR, images=PAIR.images[::-1])),
        (TENANT, MAKER, replace(PAIR, question="Alik", answer="e?no")),
        (TENANT + "x", MAKER, replace(PAIR)),
    ],
)
def test_demonstration_of_another_tenant_maker_or_content_is_not_known(tmp_path, other):
    bank = Bank(tmp_path, memory_bytes=MIB)
    bank.keep(TENANT, MAKER, PAIR, known())
    for each in (bank, Bank(tmp_path)):
        assert each.get(*other) is None
    bank.keep(*other, known(seed=5))
    assert_same(bank.get(TENANT, MAKER, PAIR), known())


def test_demonstration_that_was_kept_is_no_pack(tmp_path):
    bank = Bank(tmp_path)
    bank.keep(TENANT, MAKER, CAT, known())
    assert bank.packs(TENANT) == []


def test_damaged_demonstration_is_unknown_told_and_kept_anew(tmp_path, caplog):
    bank = Bank(tmp_path)
    keep(bank, 0, 1)
    first, second = files_below(tmp_path)
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    assert held(bank, 2) == [] and caplog.text.count("damaged") == 2
    assert files_below(tmp_path) == []
    keep(bank, 0, 1)
    assert held(bank, 2) == [0, 1]


def test_demonstration_under_the_name_of_another_is_damaged(tmp_path):
    bank = Bank(tmp_path)
    bank.keep(TENANT, MAKER, CAT, known())
    (cat,) = files_below(tmp_path)
    bank.keep(TENANT, MAKER, CUP, known(seed=1))
    (cup,) = set(files_below(tmp_path)) - {cat}
    cup.write_bytes(cat.read_bytes())
    assert bank.get(TENANT, MAKER, CUP) is None


def test_files_never_take_more_than_their_bound(tmp_path):
    size = file_bytes(tmp_path)
    bound = 20 * size
    bank = Bank(tmp_path / "bank", disk_bytes=bound)
    for number in range(100):
        keep(bank, number)
        assert sum(path.stat().st_size for path in files_below(tmp_path / "bank")) <= bound
    # A search makes room for an eighth.
    assert len(held(bank, 100)) >= 17 and held(bank, 100)[-1] == 99


def test_files_not_used_for_longest_go_first(tmp_path):
    bank = Bank(tmp_path / "bank", disk_bytes=8 * file_bytes(tmp_path))
    keep(bank, *range(8))
    grow_old(tmp_path / "bank")
    assert_same(bank.get(TENANT, MAKER, numbered(0)), known(seed=0))
    keep(bank, 8, 9)
    left = held(bank, 10)
    assert {0, 8, 9} <= set(left) and 1 not in left


def test_files_go_in_the_order_of_their_last_use(tmp_path):
    bank = Bank(tmp_path / "bank", disk_bytes=16 * file_bytes(tmp_path))
    keep(bank, *range(16))
    order = [number * 5 % 16 for number in range(16)]
    for second, number in enumerate(order):
        (path,) = tmp_path.rglob(f"bank/**/{demonstration_key(TENANT, MAKER, numbered(number))}.*")
        os.utime(path, (second, second))
    keep(bank, 16, 17)
    assert held(bank, 18) == sorted({*range(18)} - set(order[:3]))


def test_use_in_memory_keeps_the_file_too(tmp_path):
    size = file_bytes(tmp_path)
    bank = Bank(tmp_path / "bank", disk_bytes=8 * size, memory_bytes=MIB)
    keep(bank, *range(8))
    grow_old(tmp_path / "bank")
    bank.get(TENANT, MAKER, numbered(0))
    keep(bank, 8, 9)
    other = Bank(tmp_path / "bank")
    assert 0 in held(other, 10) and 1 not in held(other, 10)


def test_folder_is_not_searched_for_every_demonstration(tmp_path, monkeypatch):
    bank = Bank(tmp_path / "bank", disk_bytes=32 * file_bytes(tmp_path))
    searches = []
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: searches.append(path) or glob(path, pattern))
    keep(bank, *range(32))
    assert len(searches) == 1
    keep(bank, *range(32, 64))
    assert len(searches) <= 10


@pytest.mark.parametrize("content", ["", "many", "-5", None])
def test_total_that_is_lost_is_counted_anew(tmp_path, content):
    size = file_bytes(tmp_path)
    bank = Bank(tmp_path / "bank", disk_bytes=8 * size)
    keep(bank, *range(8))
    total = tmp_path / "bank" / "demonstrations" / ".total"
    total.unlink() if content is None else total.write_text(content)
    keep(bank, *range(8, 16))
    assert sum(path.stat().st_size for path in files_below(tmp_path / "bank")) <= 8 * size


def test_what_is_too_large_for_the_disk_is_kept_in_memory_alone(tmp_path):
    for bound in (0, 100):
        bank = Bank(tmp_path, disk_bytes=bound, memory_bytes=MIB)
        bank.keep(TENANT, MAKER, CAT, known())
        assert_same(bank.get(TENANT, MAKER, CAT), known())
        assert files_below(tmp_path) == []
        assert Bank(tmp_path).get(TENANT, MAKER, CAT) is None


def test_memory_alone_is_bounded_and_keeps_what_was_used_last(tmp_path):
    bank = Bank(tmp_path, disk_bytes=0, memory_bytes=3 * (6 * 8 * 4 + 3 * 4 + 1024))
    keep(bank, 0, 1, 2)
    bank.get(TENANT, MAKER, numbered(0))
    keep(bank, 3)
    assert held(bank, 4) == [0, 2, 3]


def test_array_cut_from_a_batch_does_not_keep_the_batch(tmp_path):
    bank, batch = Bank(tmp_path, memory_bytes=MIB), numbers(100, 6, 8)
    bank.keep(TENANT, MAKER, CAT, Known(batch[3], 31, batch[3, 0]))
    found = bank.get(TENANT, MAKER, CAT)
    assert found is not None and found.vector is not None
    assert found.fused.base is None and found.vector.base is None


def test_disk_that_refuses_is_told_and_the_demonstration_stays_in_memory(tmp_path, monkeypatch, caplog):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bank = Bank(tmp_path, memory_bytes=MIB)
    monkeypatch.setattr(Path, "replace", full)
    bank.keep(TENANT, MAKER, CAT, known())
    assert f"demonstrations cannot be kept in {tmp_path}" in caplog.text and "No space left" in caplog.text
    assert_same(bank.get(TENANT, MAKER, CAT), known())
    assert files_below(tmp_path) == []


def test_folder_that_cannot_be_read_is_told_and_nothing_is_known(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    bank = Bank(tmp_path / "file")
    assert bank.get(TENANT, MAKER, CAT) is None
    bank.keep(TENANT, MAKER, CAT, known())
    assert "cannot be read" in caplog.text and "cannot be kept" in caplog.text


def test_many_threads_keep_and_get_at_once(tmp_path):
    size = file_bytes(tmp_path)
    bank = Bank(tmp_path / "bank", disk_bytes=20 * size, memory_bytes=20 * 2048)

    def work(thread: int) -> int:
        hits = 0
        for step in range(60):
            number = (thread * 7 + step) % 40
            found = bank.get(TENANT, MAKER, numbered(number))
            if found is None:
                keep(bank, number)
            else:
                assert_same(found, known(seed=number))
                hits += 1
        return hits

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 0
    assert sum(path.stat().st_size for path in files_below(tmp_path / "bank")) <= 20 * size


def test_recent_values_are_bounded_by_weight_and_the_one_used_last_stays():
    recent = Recent[str, int](10)
    for key, weight in (("a", 4), ("b", 4), ("c", 11), ("d", 2)):
        recent.put(key, weight, weight)
    assert recent.get("c") is None and recent.get("a") == 4 and (recent.weight, len(recent)) == (10, 3)
    recent.put("e", 6, 6)
    assert [key for key in "abcde" if recent.get(key) is not None] == ["a", "e"]
    # A heavier value in its place counts once; one that is too heavy leaves nothing behind.
    recent.put("a", 1, 1)
    assert recent.weight == 7
    recent.put("a", 99, 99)
    recent.drop("e")
    recent.drop("never there")
    assert (recent.weight, len(recent)) == (0, 0)
