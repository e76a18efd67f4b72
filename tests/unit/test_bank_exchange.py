from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
from safetensors.numpy import load, save

from mmicl_core.bank import Bank, OtherMakerError, UnknownPackError, pack_id
from mmicl_core.errors import BankError
from tests.banks import CAT, CUP, MAKER, TENANT, files_below, known, numbers, put

OTHER = MAKER | {"adapter": "projection-b"}


@pytest.fixture
def exported(tmp_path):
    bank = Bank(tmp_path / "origin")
    return bank.export(TENANT, put(bank).id)


@pytest.fixture
def bank(tmp_path):
    return Bank(tmp_path / "bank")


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def about_of(data: bytes) -> dict:
    return json.loads(header_of(data)["__metadata__"]["pack"])


def sealed(arrays, about: dict) -> bytes:
    """As somebody writes it who knows how."""
    digest = hashlib.sha256()
    names = [*sorted((name for name in arrays if name != "vectors"), key=str), "vectors"]
    for array in (arrays[name] for name in names if name in arrays):
        digest.update(b"".join(size.to_bytes(8, "big") for size in (array.ndim, *array.shape)))
        digest.update(array.tobytes())
    text = json.dumps({"digest": digest.hexdigest()} | about)
    return save(arrays, metadata={"pack": text, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def forged(data: bytes, **changes) -> bytes:
    about = {key: value for key, value in about_of(data).items() if key != "digest"}
    return sealed(load(data), about | changes)


def with_arrays(data: bytes, change) -> bytes:
    arrays, about = load(data), about_of(data)
    del about["digest"]
    change(arrays, about)
    return sealed(arrays, about)


def with_header(data: bytes, header: bytes) -> bytes:
    start = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + start :]


def test_exported_pack_is_the_same_pack_where_it_is_taken_in(tmp_path, bank, exported):
    origin = Bank(tmp_path / "origin")
    entry = bank.take_in("bob", exported, [OTHER, MAKER])
    assert entry == origin.packs(TENANT)[0] == bank.describe("bob", entry.id) == bank.packs("bob")[0]
    taken, given = bank.load("bob", entry.id, MAKER), origin.load(TENANT, entry.id)
    for found, wanted in zip((*taken.fused, taken.vectors), (*given.fused, given.vectors), strict=True):
        np.testing.assert_array_equal(found, wanted)
    # And it can travel on.
    assert Bank(tmp_path / "third").take_in("eve", bank.export("bob", entry.id), [MAKER]) == entry
    assert bank.packs(TENANT) == []


def test_pack_taken_in_twice_is_one_pack(tmp_path, bank, exported):
    first = bank.take_in("bob", exported, [MAKER])
    (file,) = files_below(tmp_path / "bank")
    before = file.stat()
    assert bank.take_in("bob", exported, [MAKER]) == first
    assert (file.stat().st_ino, files_below(tmp_path / "bank")) == (before.st_ino, [file])


def test_forged_pack_is_known_as_imported_and_gives_way_to_what_is_made_here(bank, exported):
    def poison(arrays, about):
        arrays["0"] = numbers(6, 8, seed=9)

    entry = bank.take_in("bob", with_arrays(exported, poison), [MAKER])
    assert entry.imported and bank.describe("bob", entry.id).imported
    assert entry.id == pack_id(MAKER, [CAT, CUP])
    made = put(bank, tenant="bob")
    assert made.id == entry.id and made.digest == about_of(exported)["digest"] != entry.digest
    assert not bank.describe("bob", made.id).imported
    np.testing.assert_array_equal(bank.load("bob", made.id).fused[0], known(6, 0).fused)


def test_pack_of_the_same_id_and_other_tokens_is_refused_and_the_first_stays(bank, exported):
    made = bank.put_pack("bob", "nano@aim", MAKER, [CAT, CUP], [known(6, 7), known(4, 8)])
    with pytest.raises(BankError, match=f"there is a pack {made.id} already, with other fused .*: delete it"):
        bank.take_in("bob", exported, [MAKER])
    assert bank.describe("bob", made.id) == made
    bank.delete("bob", made.id)
    assert bank.take_in("bob", exported, [MAKER]).digest != made.digest


def test_pack_of_a_foreign_maker_is_refused_by_what_differs(tmp_path, bank, exported):
    with pytest.raises(OtherMakerError, match="made for adapter projection-a, the server runs projection-b"):
        bank.take_in("bob", exported, [MAKER | {"backbone": "b", "template": "t"}, OTHER])
    with pytest.raises(OtherMakerError, match="no model that is served makes packs"):
        bank.take_in("bob", exported, [])
    with pytest.raises(OtherMakerError, match="made for quantised 4 bits, the server runs none"):
        bank.take_in("bob", forged(exported, maker=MAKER | {"quantised": "4 bits"}), [MAKER])
    assert not (tmp_path / "bank").exists()


ABOUT_FORGERIES = [
    {"format": 2},
    {"format": "3"},
    {"id": "pack-" + "0" * 31},
    {"id": "../" * 5 + "pack-" + "0" * 32},
    {"id": "pack-" + "0" * 32 + "\n"},
    {"id": "0" * 64},
    {"id": 7},
    {"model": "x" * 201},
    {"model": "<b>\n\x1b[31m"},
    {"created": -1},
    {"created": 10**12},
    {"created": float("inf")},
    {"created": "now"},
    {"tokens_full": [1]},
    {"tokens_full": [1, -1]},
    {"tokens_full": [1, 1.5]},
    {"tokens_full": [1, 10**400]},
    {"tokens_full": [True, True]},
    {"tokens_full": [], "tokens_fused": []},
    {"tokens_fused": [6, 5]},
    {"tokens_fused": [4, 6]},
    {"tokens_fused": [6, 0]},
    {"digest": "0" * 64},
    {"digest": None},
    {"maker": [["adapter", "projection-a"]]},
    {"maker": None},
    {"maker": {"adapter": 1}},
    {"imported": "no"},
    {"more": 1},
]


@pytest.mark.parametrize("changes", ABOUT_FORGERIES, ids=str)
def test_forged_description_is_refused(tmp_path, bank, exported, changes):
    assert bank.take_in("bob", forged(exported), [MAKER])
    with pytest.raises(BankError, match=r"export (the pack again|a pack)") as refusal:
        bank.take_in("eve", forged(exported, **changes), [MAKER])
    assert not isinstance(refusal.value, UnknownPackError)
    assert bank.packs("eve") == [] and len(files_below(tmp_path / "bank")) == 1


ARRAY_FORGERIES = {
    "no array": lambda arrays, about: arrays.clear(),
    "one missing": lambda arrays, about: arrays.pop("1"),
    "one too many": lambda arrays, about: arrays.update({"2": numbers(4, 8)}),
    "other name": lambda arrays, about: arrays.update({"../1": arrays.pop("1")}),
    "float16": lambda arrays, about: arrays.update({"1": numbers(4, 8).astype(np.float16)}),
    "float64": lambda arrays, about: arrays.update({"1": numbers(4, 8).astype(np.float64)}),
    "numbers for tokens": lambda arrays, about: arrays.update({"1": np.ones((4, 8), np.int32)}),
    "other widths": lambda arrays, about: arrays.update({"1": numbers(4, 9)}),
    "three axes": lambda arrays, about: arrays.update({"1": numbers(4, 8, 1)}),
    "one axis": lambda arrays, about: arrays.update({"1": numbers(4)}),
    "no width": lambda arrays, about: arrays.update({"0": numbers(6, 0), "1": numbers(4, 0)}),
    "not a number": lambda arrays, about: arrays.update({"1": np.full((4, 8), np.nan, np.float32)}),
    "endless": lambda arrays, about: arrays.update({"1": np.full((4, 8), -np.inf, np.float32)}),
    "vectors missing": lambda arrays, about: arrays.update({"vectors": numbers(1, 3)}),
    "vectors endless": lambda arrays, about: arrays.update({"vectors": np.full((2, 3), np.inf, np.float32)}),
}


@pytest.mark.parametrize("change", ARRAY_FORGERIES.values(), ids=ARRAY_FORGERIES.keys())
def test_forged_arrays_are_refused(tmp_path, bank, exported, change):
    with pytest.raises(BankError, match=r"the file is damaged \(.+\): export the pack again"):
        bank.take_in("bob", with_arrays(exported, change), [MAKER])
    assert not (tmp_path / "bank").exists()


def twice(data: bytes) -> bytes:
    """One array described twice, of which the last description counts."""
    header = json.dumps(header_of(data)).encode()
    other = json.dumps({"1": header_of(data)["1"] | {"shape": [8, 4]}}).encode()
    return with_header(data, header[:-1] + b", " + other[1:])


@pytest.mark.parametrize("key", ["width", "vector_width"])
@pytest.mark.parametrize("width", ["9", "-8", "", "8.0", "8" * 1000])
def test_arrays_of_a_width_that_is_not_their_makers_are_refused(bank, exported, key, width):
    right = MAKER | {"width": "8", "vector_width": "3"}
    assert bank.take_in("bob", forged(exported, maker=right), [MAKER, right])
    with pytest.raises(BankError, match=rf"arrays of {key} ., and its maker's are of"):
        bank.take_in("eve", forged(exported, maker=right | {key: width}), [right | {key: width}])


HEADERS = {
    "nothing": lambda data: b"",
    "short": lambda data: data[:5],
    "text": lambda data: b"hello, this is no pack",
    "pickle": lambda data: b"\x80\x04\x95" + data,
    "long header": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "longest header": lambda data: b"\xff" * 8 + data[8:],
    "no JSON": lambda data: with_header(data, b"x" * 64),
    "no UTF-8": lambda data: with_header(data, b'{"__metadata__": {"pack": "\xff"}}'),
    "half a surrogate": lambda data: with_header(data, b'{"__metadata__": {"pack": "\\ud800"}}'),
    "deep": lambda data: with_header(data, b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep inside": lambda data: with_header(
        data, json.dumps({"__metadata__": {"pack": "[" * 10**5}}).encode()
    ),
    "a list": lambda data: with_header(data, b"[]"),
    "no metadata": lambda data: with_header(data, b"{}"),
    "no entry": lambda data: save(load(data), metadata={"other": "x"}),
    "cut": lambda data: data[:-4],
    "more": lambda data: data + bytes(4),
    "twice": twice,
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_file_that_is_no_pack_is_refused(tmp_path, bank, exported, change):
    with pytest.raises(BankError, match=r"the file is damaged \(.+\): export the pack again"):
        bank.take_in("bob", change(exported), [MAKER])
    assert not (tmp_path / "bank").exists()


def test_places_of_arrays_that_lie_on_each_other_are_refused(bank, exported):
    header = header_of(exported)
    header["0"]["data_offsets"], header["1"]["data_offsets"] = [0, 192], [64, 192]
    with pytest.raises(BankError, match="damaged"):
        bank.take_in("bob", with_header(exported, json.dumps(header).encode()), [MAKER])


def test_thousands_of_broken_files_are_refused_as_such(bank, exported):
    rng = random.Random(0)
    for _ in range(3000):
        data = bytearray(exported)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            bank.take_in("bob", bytes(data), [MAKER])
        except BankError:
            continue
        assert bank.packs("bob")[0].digest == about_of(exported)["digest"]
