"""Several processes that share one bank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.bank import Bank, FullBankError, PackEntry, UnknownPackError
from mmicl_core.bank.files import locked
from mmicl_core.errors import BankError
from tests.banks import CAT, CUP, MAKER, TENANT, files_below, known, put

PROCESSES = 4


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        yield pool


def everywhere(pool, work, *arguments) -> list:
    futures = [pool.submit(work, *arguments, number) for number in range(PROCESSES)]
    return [future.result() for future in futures]


def put_the_same(folder: Path, number: int) -> list[PackEntry]:
    bank, found = Bank(folder), []
    for round_ in range(20):
        # Every process made it a bit differently.
        made = [known(6, seed=100 * number + round_)]
        found.append(bank.put_pack(TENANT, f"nano@{number}", MAKER, [replace(CAT, answer=str(round_))], made))
    return found


def test_equal_packs_of_several_processes_are_one_pack_and_all_are_told_the_same(tmp_path, pool):
    told = everywhere(pool, put_the_same, tmp_path)
    assert told[0] == told[1] == told[2] == told[3]
    bank = Bank(tmp_path)
    assert sorted(bank.packs(TENANT), key=lambda entry: entry.id) == sorted(
        told[0], key=lambda entry: entry.id
    )
    assert all(bank.load(TENANT, entry.id).entry == entry for entry in told[0])
    assert len(files_below(tmp_path)) == 20


def put_many(folder: Path, number: int) -> int:
    bank, count = Bank(folder, max_packs=10), 0
    for answer in range(10):
        try:
            put(bank, replace(CAT, answer=f"{number} {answer}"))
            count += 1
        except FullBankError:
            continue
    return count


def test_bound_of_packs_holds_for_all_processes_together(tmp_path, pool):
    assert sum(everywhere(pool, put_many, tmp_path)) == 10
    assert len(Bank(tmp_path).packs(TENANT)) == 10


def put_read_and_delete(folder: Path, number: int) -> int:
    bank, seen = Bank(folder, memory_bytes=2**20), 0
    for step in range(100):
        demonstration = (CAT, CUP)[(step + number) % 2]
        entry = put(bank, demonstration)
        try:
            pack = bank.load(TENANT, entry.id, MAKER)
            np.testing.assert_array_equal(pack.fused[0], known(6, 0).fused)
            seen += len(bank.packs(TENANT)) > 0
            if step % 3 == number % 3:
                bank.delete(TENANT, entry.id)
        except UnknownPackError:
            # Another process deleted it.
            continue
    return seen


def test_packs_are_whole_or_absent_while_others_store_and_delete_them(tmp_path, pool):
    assert all(everywhere(pool, put_read_and_delete, tmp_path))
    assert len(files_below(tmp_path)) <= 2


def keep_many(folder: Path, bound: int, number: int) -> int:
    bank, most = Bank(folder, disk_bytes=bound), 0
    for step in range(100):
        bank.keep(TENANT, MAKER, replace(CAT, answer=f"{number % 2} {step}"), known(seed=step))
        found = bank.get(TENANT, MAKER, replace(CAT, answer=f"{number % 2} {step}"))
        assert found is None or np.array_equal(found.fused, known(seed=step).fused)
        if step % 10 == 0:
            with locked(folder / "demonstrations" / ".total"):
                most = max(most, bytes_below(folder))
    return most


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_below(folder))


def test_bound_of_demonstrations_holds_for_all_processes_together(tmp_path, pool):
    bound = 30_000
    assert max(everywhere(pool, keep_many, tmp_path, bound)) <= bound
    assert 0.6 * bound < bytes_below(tmp_path) <= bound


def put_until_killed(folder: Path) -> None:
    bank = Bank(folder, max_packs=10**6)
    (folder / "started").touch()
    for number in range(10**6):
        put(bank, replace(CAT, answer=str(number)))
        bank.keep(TENANT, MAKER, replace(CAT, answer=str(number)), known(seed=number))


def test_bank_of_a_killed_writer_holds_whole_packs_and_takes_more(tmp_path):
    process = get_context("spawn").Process(target=put_until_killed, args=(tmp_path,))
    process.start()
    try:
        while not (tmp_path / "started").exists() or len(files_below(tmp_path)) < 40:
            assert process.is_alive()
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    bank = Bank(tmp_path, max_packs=10**6)
    entries = bank.packs(TENANT)
    assert len(entries) >= 19
    for entry in entries:
        assert bank.load(TENANT, entry.id).entry == entry
    # The lock went with its holder.
    assert put(bank, CUP) in bank.packs(TENANT)
    bank.keep(TENANT, MAKER, CUP, known())
    assert bank.get(TENANT, MAKER, CUP) is not None


def test_reader_of_a_bank_that_cannot_be_written_sees_its_packs(tmp_path, monkeypatch):
    stored = put(Bank(tmp_path))
    Bank(tmp_path).keep(TENANT, MAKER, CAT, known())

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    for name in ("utime", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    bank = Bank(tmp_path, memory_bytes=2**20)
    assert bank.packs(TENANT) == [stored] and bank.load(TENANT, stored.id).entry == stored
    assert bank.get(TENANT, MAKER, CAT) is not None
    with pytest.raises(BankError, match="Read-only"):
        bank.delete(TENANT, stored.id)
