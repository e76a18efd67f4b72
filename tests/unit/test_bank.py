from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.bank import (
    Bank,
    Demonstration,
    FullBankError,
    Known,
    OtherMakerError,
    UnknownPackError,
    pack_id,
)
from mmicl_core.errors import BankError
from tests.banks import CAT, CUP, MAKER, PAIR, TENANT, files_below, known, numbers, pack_file, put


def test_pack_read_by_another_process_is_the_pack_that_was_stored(tmp_path):
    stored = put(Bank(tmp_path))
    pack = Bank(tmp_path).load(TENANT, stored.id, MAKER)
    assert pack.entry == Bank(tmp_path).describe(TENANT, stored.id) == stored
    assert (stored.tokens_full, stored.tokens_fused) == ((31, 29), (6, 4))
    assert (stored.model, stored.maker, stored.id) == ("nano@aim", MAKER, pack_id(MAKER, [CAT, CUP]))
    assert abs(stored.created - time.time()) < 60
    for found, wanted in zip(pack.fused, (known(6, 0), known(4, 1)), strict=True):
        np.testing.assert_array_equal(found, wanted.fused)
    np.testing.assert_array_equal(pack.vectors, np.stack([known(6, 0).vector, known(4, 1).vector]))


def test_pack_stored_twice_stays_with_its_time_and_its_tokens(tmp_path, monkeypatch):
    bank = Bank(tmp_path)
    first = put(bank)
    monkeypatch.setattr(time, "time", lambda: first.created + 1000)
    # The same demonstrations, read in another batch, may come out a bit different.
    again = bank.put_pack(TENANT, "nano@aim", MAKER, [CAT, CUP], [known(6, 7), known(4, 8)])
    assert again == first and [path.stem for path in files_below(tmp_path)] == [first.id]
    np.testing.assert_array_equal(bank.load(TENANT, first.id).fused[0], known(6, 0).fused)


def test_pack_without_vectors_has_none(tmp_path):
    bank = Bank(tmp_path)
    entry = bank.put_pack(TENANT, "nano@aim", MAKER, [CAT], [known(vector=False)])
    assert bank.load(TENANT, entry.id).vectors is None


@pytest.mark.parametrize("memory", [0, 2**20])
def test_arrays_are_those_of_the_bank_and_nobody_can_write_to_them(tmp_path, memory):
    bank, mine = Bank(tmp_path, memory_bytes=memory), known()
    bank.keep(TENANT, MAKER, CAT, mine)
    entry = bank.put_pack(TENANT, "nano@aim", MAKER, [CAT], [mine])
    mine.fused[:] = 0
    for _ in range(2):
        for found in (bank.load(TENANT, entry.id).fused[0], bank.get(TENANT, MAKER, CAT).fused):
            np.testing.assert_array_equal(found, known().fused)
            with pytest.raises(ValueError, match="read-only"):
                found[0] = 0


@pytest.mark.parametrize(
    "other",
    [
        [CUP, CAT],
        [CAT],
        [CAT, CUP, CUP],
        [replace(CAT, images=(b"another picture",)), CUP],
        [replace(CAT, images=()), CUP],
        [replace(CAT, images=CAT.images * 2), CUP],
        [replace(CAT, images=CAT.images + CUP.images), CUP],
        [replace(CAT, images=(), question="picture of a cat", answer="This isbako"), CUP],
        [replace(CAT, question="What is it?"), CUP],
        [replace(CAT, answer="bak"), CUP],
        [replace(CAT, question="This i", answer="sbako"), CUP],
        [replace(CAT, answer="\ud800"), CUP],
    ],
)
def test_pack_id_differs_for_any_other_content(other):
    assert pack_id(MAKER, other) != pack_id(MAKER, [CAT, CUP]) == pack_id(dict(MAKER), (CAT, CUP))


@pytest.mark.parametrize(
    "other",
    [
        replace(PAIR, images=PAIR.images[::-1]),
        replace(PAIR, images=PAIR.images[:1]),
        replace(PAIR, images=PAIR.images[1:]),
        replace(PAIR, images=(*PAIR.images, PAIR.images[1])),
        replace(PAIR, images=(b"".join(PAIR.images),)),
        replace(PAIR, images=(b"picture of a ca", b"tpicture of a cup")),
        # What would be a picture is a question, and the other way round.
        replace(PAIR, images=PAIR.images[:1], question="picture of a cup", answer="Alike?no"),
    ],
)
def test_pack_id_differs_for_another_number_or_order_of_pictures(other):
    assert pack_id(MAKER, [other]) != pack_id(MAKER, [PAIR])
    assert pack_id(MAKER, [other, CAT]) != pack_id(MAKER, [PAIR, CAT])


def test_pack_id_tells_two_demonstrations_from_one_that_holds_the_words_as_pictures():
    one = Demonstration((b"a", b"b", b"c"), "d", "e")
    assert pack_id(MAKER, [one]) != pack_id(
        MAKER, [Demonstration((b"a",), "b", "c"), Demonstration((), "d", "e")]
    )


@pytest.mark.parametrize("key", MAKER)
def test_pack_of_another_maker_is_refused_by_name_and_by_content(tmp_path, key):
    bank, other = Bank(tmp_path, memory_bytes=2**20), MAKER | {key: "else"}
    stored = put(bank)
    for _ in range(2):
        with pytest.raises(OtherMakerError, match=f"made for {key} {MAKER[key]}, the server runs else: regi"):
            bank.load(TENANT, stored.id, other)
        bank.load(TENANT, stored.id, MAKER)
    assert pack_id(other, [CAT, CUP]) != stored.id


BAD_IDS = [
    "pack-" + "0" * 32,
    "",
    "../outside/pack",
    "pack-" + "0" * 31 + "/",
    "pack-" + "A" * 32,
    "x\0",
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_IDS)
@pytest.mark.parametrize("method", ["describe", "load", "delete", "export"])
def test_id_that_the_bank_does_not_hold_is_unknown(tmp_path, method, name):
    with pytest.raises(UnknownPackError):
        getattr(Bank(tmp_path), method)(TENANT, name)


def test_id_that_is_a_path_reaches_no_file_outside_of_the_bank(tmp_path):
    stored = put(Bank(tmp_path))
    path = pack_file(tmp_path, stored.id)
    bank = Bank(tmp_path)
    with pytest.raises(UnknownPackError, match="is not the id of a pack"):
        bank.delete("bob", f"../{path.parent.name}/{stored.id}")
    assert path.is_file()


@pytest.mark.parametrize("tenant", ["bob", "", "ann ", "../ann", "ann\0", "An" + "n" * 999, "\ud800"])
def test_tenant_neither_sees_nor_deletes_the_pack_of_another(tmp_path, tenant):
    bank = Bank(tmp_path, memory_bytes=2**20)
    stored = put(bank)
    bank.load(TENANT, stored.id)
    for method in (bank.describe, bank.load, bank.delete, bank.export):
        with pytest.raises(UnknownPackError):
            method(tenant, stored.id)
    assert bank.packs(tenant) == []
    # Its own pack of the same content is another file, which takes nothing along when it goes.
    assert put(bank, tenant=tenant).id == stored.id
    bank.delete(tenant, stored.id)
    assert bank.packs(TENANT) == [stored] and bank.load(TENANT, stored.id).entry == stored
    assert TENANT not in str(pack_file(tmp_path, stored.id).relative_to(tmp_path))


def test_deleted_pack_is_gone_for_every_process_that_knew_it(tmp_path):
    bank, other = (Bank(tmp_path, memory_bytes=2**20) for _ in range(2))
    stored = put(bank)
    for each in (bank, other):
        each.load(TENANT, stored.id)
        each.describe(TENANT, stored.id)
    bank.delete(TENANT, stored.id)
    for each in (bank, other):
        assert each.packs(TENANT) == []
        with pytest.raises(UnknownPackError, match="register its demonstrations"):
            each.load(TENANT, stored.id)
    assert put(other) == bank.describe(TENANT, stored.id)


def test_description_follows_a_file_that_was_replaced(tmp_path):
    bank, other = Bank(tmp_path, memory_bytes=2**20), Bank(tmp_path)
    stored = put(bank)
    path = pack_file(tmp_path, stored.id)
    os.utime(path, ns=(0, 0))
    assert bank.describe(TENANT, stored.id) == bank.describe(TENANT, stored.id) == stored
    bank.load(TENANT, stored.id)
    other.delete(TENANT, stored.id)
    replaced = other.put_pack(TENANT, "nano@new", MAKER, [CAT, CUP], [known(6, 7), known(4, 8)])
    assert bank.describe(TENANT, stored.id) == replaced != stored
    np.testing.assert_array_equal(bank.load(TENANT, stored.id).fused[0], known(6, 7).fused)


def test_file_that_replaced_another_within_a_tick_of_the_clock_is_described(tmp_path):
    bank, other = Bank(tmp_path), Bank(tmp_path / "other")
    stored = put(bank)
    replaced = other.put_pack(TENANT, "nano@new", MAKER, [CAT, CUP], [known(6, 7), known(4, 8)])
    path, tick = pack_file(tmp_path / "packs", stored.id), time.time_ns() + 10**9
    os.utime(path, ns=(tick, tick))
    assert bank.describe(TENANT, stored.id) == stored
    path.write_bytes(pack_file(tmp_path / "other", stored.id).read_bytes())
    os.utime(path, ns=(tick, tick))
    assert bank.describe(TENANT, stored.id).digest == replaced.digest != stored.digest


def test_pack_that_was_made_anew_is_loaded_as_it_is_now(tmp_path):
    bank = Bank(tmp_path, memory_bytes=2**20)
    stored = put(bank, CAT)
    bank.load(TENANT, stored.id)
    bank.delete(TENANT, stored.id)
    anew = bank.put_pack(TENANT, "nano@new", MAKER, [CAT], [known()])
    assert anew.digest == stored.digest and bank.load(TENANT, stored.id).entry.model == "nano@new"


def test_file_that_stays_is_read_once_to_describe_it(tmp_path, monkeypatch):
    stored = put(Bank(tmp_path))
    os.utime(pack_file(tmp_path, stored.id), (1, 1))
    opened, bank, path_open = [], Bank(tmp_path), Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode: opened.append(path.stem) or path_open(path, *mode))
    for _ in range(3):
        assert bank.describe(TENANT, stored.id) == stored and bank.packs(TENANT) == [stored]
    assert opened == [stored.id]


def test_packs_are_listed_newest_first_over_a_restart(tmp_path, monkeypatch):
    created = []
    for second, demonstrations in enumerate([[CAT], [CUP], [PAIR]]):
        monkeypatch.setattr(time, "time", lambda second=second: 1e9 + second)
        created.append(put(Bank(tmp_path), *demonstrations))
    assert Bank(tmp_path).packs(TENANT) == created[::-1]
    assert [entry.created for entry in created] == [10**9, 10**9 + 1, 10**9 + 2]


def test_tenant_keeps_as_many_packs_as_it_may(tmp_path):
    bank = Bank(tmp_path, max_packs=2)
    put(bank, CAT)
    second = put(bank, CUP)
    with pytest.raises(FullBankError, match="2 packs are kept, and there is room for 2: delete some"):
        put(bank, PAIR)
    assert put(bank, CUP) == second and put(bank, PAIR, tenant="bob") in bank.packs("bob")
    with pytest.raises(FullBankError):
        bank.take_in(TENANT, bank.export("bob", pack_id(MAKER, [PAIR])), [MAKER])
    bank.delete(TENANT, second.id)
    assert put(bank, PAIR) in bank.packs(TENANT)


def damage_end(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [damage_end, lambda data: data[:-10], lambda data: b"", lambda data: b"{}" * 9, lambda data: data + b"x"],
)
def test_damaged_pack_is_refused_and_mended_by_storing_it_again(tmp_path, damage):
    bank = Bank(tmp_path, memory_bytes=2**20)
    stored = put(bank)
    file = pack_file(tmp_path, stored.id)
    file.write_bytes(damage(file.read_bytes()))
    for method in (bank.load, bank.export):
        with pytest.raises(BankError, match=r"damaged .*: register its demonstrations again"):
            method(TENANT, stored.id)
    with pytest.raises(BankError, match="damaged") if len(damage(b"0" * 99)) != 99 else nullcontext():
        # The header alone tells when a file is too short or too long.
        bank.describe(TENANT, stored.id)
    mended = put(bank)
    assert bank.load(TENANT, stored.id).entry == mended and mended.digest == stored.digest


def test_pack_with_any_byte_changed_is_refused(tmp_path):
    bank = Bank(tmp_path)
    stored = put(bank, CAT)
    file = pack_file(tmp_path, stored.id)
    data = file.read_bytes()
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        file.write_bytes(changed)
        try:
            # JSON takes another blank for a blank, and that is all.
            assert bank.load(TENANT, stored.id).entry == stored and chr(data[place]).isspace()
        except BankError:
            continue


def test_listing_leaves_out_a_damaged_pack_and_says_so(tmp_path, caplog):
    bank = Bank(tmp_path)
    good, bad = put(bank, CAT), put(bank, CUP)
    pack_file(tmp_path, bad.id).write_bytes(b"no pack")
    assert bank.packs(TENANT) == [good]
    assert f"pack {bad.id} is damaged" in caplog.text
    bank.delete(TENANT, bad.id)
    assert files_below(tmp_path) == [pack_file(tmp_path, good.id)]


def test_pack_under_the_name_of_another_is_damaged(tmp_path):
    bank = Bank(tmp_path)
    one, other = put(bank, CAT), put(bank, CUP)
    path = pack_file(tmp_path, other.id)
    path.write_bytes(pack_file(tmp_path, one.id).read_bytes())
    for method in (bank.describe, bank.load, bank.export):
        with pytest.raises(BankError, match=f"its file is that of {one.id}"):
            method(TENANT, other.id)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_fused_tokens_that_are_not_finite_are_not_stored(tmp_path, value):
    broken = known(4)
    broken.fused[2, 3] = value
    bank = Bank(tmp_path)
    with pytest.raises(BankError, match="demonstration 1 are not finite"):
        bank.put_pack(TENANT, "nano@aim", MAKER, [CAT, CUP], [known(), broken])
    with pytest.raises(BankError, match="a demonstration are not finite"):
        bank.keep(TENANT, MAKER, CAT, broken)
    assert list(tmp_path.iterdir()) == []


def test_pack_of_nothing_is_not_stored(tmp_path):
    bank = Bank(tmp_path)
    with pytest.raises(BankError, match="no demonstrations"):
        bank.put_pack(TENANT, "nano@aim", MAKER, [], [])
    with pytest.raises(BankError, match="demonstration 0 has no fused tokens"):
        bank.put_pack(TENANT, "nano@aim", MAKER, [CAT], [Known(numbers(0, 8), 25)])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_told_with_the_folder_and_leaves_no_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bank = Bank(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BankError, match=rf"bank in {tmp_path}.* cannot be used \(No space left.*free space"):
        put(bank)
    assert files_below(tmp_path) == [] and bank.packs(TENANT) == []


def test_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("no folder")
    bank = Bank(tmp_path / "file")
    for call in (
        lambda: put(bank),
        lambda: bank.load(TENANT, pack_id(MAKER, [CAT])),
        lambda: bank.packs(TENANT),
    ):
        with pytest.raises(BankError, match=f"bank in {tmp_path}/file.* cannot be used"):
            call()


def test_file_that_a_killed_writer_left_is_removed_when_it_is_old(tmp_path):
    bank = Bank(tmp_path)
    path = pack_file(tmp_path, put(bank).id)
    old, new = (path.with_name(f".{path.name}.{ending}") for ending in ("abandoned", "in-writing"))
    for left in (old, new):
        left.write_bytes(b"half of a pack")
    os.utime(old, (time.time() - 7200,) * 2)
    assert len(bank.packs(TENANT)) == 1
    assert files_below(tmp_path) == sorted([path, new])


def test_pack_in_memory_is_not_read_again_and_memory_is_bounded(tmp_path, monkeypatch):
    bank = Bank(tmp_path, memory_bytes=2 * (6 * 8 * 4 + 3 * 4 + 1024))
    ids = [put(bank, each).id for each in (CAT, CUP, PAIR)]
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.stem) or read_bytes(path))
    for place in (0, 0, 1, 0, 2, 0, 1):
        bank.load(TENANT, ids[place])
    assert reads == [ids[place] for place in (0, 1, 2, 1)]


def test_description_is_told_in_less_than_a_millisecond(tmp_path):
    stored = put(Bank(tmp_path))

    def seconds(bank):
        start = time.perf_counter()
        bank.describe(TENANT, stored.id)
        return time.perf_counter() - start

    # The fastest of many: other programs run on this machine too.
    assert min(seconds(Bank(tmp_path)) for _ in range(50)) < 1e-3


def test_bank_needs_no_torch():
    code = "import sys, mmicl_core.bank; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
