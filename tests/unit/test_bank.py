from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.bank import Bank, Demonstration, UnknownPackError
from mmicl_core.errors import BankError

CAT = Demonstration((b"picture of a cat",), "This is", "bako")
CUP = Demonstration((b"picture of a cup",), "This is", "mute")
PAIR = Demonstration((b"picture of a cat", b"picture of a cup"), "Alike?", "no")
MODEL = {"backbone": "model-a", "template": "template-a", "adapter": "projection-a"}
TOKENS_FULL = (31, 29)


def open_bank(folder: Path, **other: str) -> Bank:
    return Bank(folder, **MODEL | other)


def fused_tokens() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(tokens, 8)).astype(np.float32) for tokens in (6, 4)]


def test_pack_read_by_another_process_is_the_pack_that_was_stored(tmp_path):
    stored = open_bank(tmp_path).put([CAT, CUP], fused_tokens(), TOKENS_FULL)
    bank = open_bank(tmp_path)
    pack = bank.load(stored.id)
    assert pack.entry == bank.describe(stored.id) == stored
    assert (stored.tokens_full, stored.tokens_fused) == ((31, 29), (6, 4))
    for found, wanted in zip(pack.fused, fused_tokens(), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_pack_stored_twice_has_one_id_and_one_file(tmp_path):
    bank = open_bank(tmp_path)
    first = bank.put([CAT, CUP], fused_tokens(), TOKENS_FULL)
    assert bank.put([CAT, CUP], fused_tokens(), TOKENS_FULL) == first
    assert [path.stem for path in tmp_path.iterdir()] == [first.id]


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
    ],
)
def test_pack_id_differs_for_any_other_content(tmp_path, other):
    bank = open_bank(tmp_path)
    assert bank.name(other) != bank.name([CAT, CUP])


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
def test_pack_id_differs_for_another_number_or_order_of_pictures(tmp_path, other):
    bank = open_bank(tmp_path)
    assert bank.name([PAIR]) == open_bank(tmp_path).name([replace(PAIR)])
    assert bank.name([other]) != bank.name([PAIR])
    assert bank.name([other, CAT]) != bank.name([PAIR, CAT])


@pytest.mark.parametrize(
    "model", [{"backbone": "model-b"}, {"template": "template-b"}, {"adapter": "projection-b"}]
)
def test_pack_made_for_another_model_is_refused_by_name_and_by_content(tmp_path, model):
    stored = open_bank(tmp_path).put([CAT, CUP], fused_tokens(), TOKENS_FULL)
    other = open_bank(tmp_path, **model)
    (key, name) = next(iter(model.items()))
    with pytest.raises(BankError, match=rf"made for {key} \w+-a, the server runs {name}: register"):
        other.load(stored.id)
    with pytest.raises(BankError, match=key):
        other.describe(stored.id)
    assert other.name([CAT, CUP]) != stored.id


@pytest.mark.parametrize("pack_id", ["pack-" + "0" * 32, "", "../outside/pack", "pack-" + "0" * 31 + "/"])
def test_id_that_the_bank_does_not_hold_is_unknown(tmp_path, pack_id):
    with pytest.raises(UnknownPackError):
        open_bank(tmp_path).load(pack_id)


def test_id_that_is_a_path_reaches_no_file_outside_of_the_bank(tmp_path):
    stored = open_bank(tmp_path / "outside").put([CAT], fused_tokens()[:1], [31])
    with pytest.raises(UnknownPackError, match="is not the id of a pack"):
        open_bank(tmp_path / "bank").load(f"../outside/{stored.id}")


def damage_end(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [damage_end, lambda data: data[:-10], lambda data: b"", lambda data: b"{}" * 9]
)
def test_damaged_pack_is_refused_and_mended_by_storing_it_again(tmp_path, damage):
    bank = open_bank(tmp_path)
    stored = bank.put([CAT, CUP], fused_tokens(), TOKENS_FULL)
    file = tmp_path / f"{stored.id}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BankError, match="damaged"):
        bank.load(stored.id)
    bank.put([CAT, CUP], fused_tokens(), TOKENS_FULL)
    assert bank.load(stored.id).entry == stored


def test_fused_tokens_that_are_not_finite_are_not_stored(tmp_path):
    broken = fused_tokens()
    broken[1][2, 3] = np.inf
    with pytest.raises(BankError, match="demonstration 1 are not finite"):
        open_bank(tmp_path).put([CAT, CUP], broken, TOKENS_FULL)
    assert list(tmp_path.iterdir()) == []


def test_pack_of_no_demonstrations_is_not_stored(tmp_path):
    with pytest.raises(BankError, match="no demonstrations"):
        open_bank(tmp_path).put([], [], [])
