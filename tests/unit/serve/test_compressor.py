"""The compressor as a plain object: what Ray Serve adds is tested in `integration`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mmicl_core.assets import resolve
from mmicl_core.bank import Bank, Demonstration, Fused, OtherMakerError, PackEntry, UnknownPackError
from mmicl_core.config.model import AimConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import BankError, CheckpointError, DataError
from mmicl_core.methods.aim import Aim
from pipelines.serve.compressor import Compressor
from pipelines.serve.contracts import Fusion, PackReference
from pipelines.serve.errors import RequestError, UnknownModelError
from tests.fakes import draw_picture, encode_picture, tiny_backbone
from tests.unit.serve.compressing import (
    AIM,
    VISUAL_TOKENS,
    Passes,
    demonstrations,
    make,
    model,
    passes,
    save_aim,
    together,
    user_config,
)

__all__ = ["make", "model", "passes"]

SOON = 10.0


def fuse(compressor: Compressor, shown: list[Demonstration], tenant: str = "ann") -> Fusion:
    return asyncio.run(compressor.fuse(AIM, tenant, shown))


def register(compressor: Compressor, shown: list[Demonstration], tenant: str = "ann") -> PackEntry:
    return asyncio.run(compressor.register(AIM, tenant, shown))


def arrays(fusion: Fusion) -> list[bytes]:
    assert isinstance(fusion.fused, tuple)
    return [array.tobytes() for array in fusion.fused]


def bank_of(tmp_path: Path) -> Bank:
    return Bank(tmp_path / "bank")


def test_fusion_tells_what_each_demonstration_costs_written_out_and_fused(make):
    pictures = tuple(encode_picture(draw_picture(seed)) for seed in range(2))
    shown = [Demonstration(pictures[:count], "This is", "bako") for count in (1, 2, 0)]
    fusion = fuse(make(), shown)
    assert fusion.tokens_full == (VISUAL_TOKENS + 6, 2 * VISUAL_TOKENS + 6, 6)
    assert fusion.tokens_fused == (6, 6, 6) == tuple(map(len, fusion.fused))


def test_pictures_and_their_order_decide_the_fused_tokens(make):
    one, other = (encode_picture(draw_picture(seed)) for seed in (0, 1))
    orders = [(one, other), (other, one), (one,), ()]
    found = fuse(make(), [Demonstration(images, "This is", "bako") for images in orders]).fused
    for number, array in enumerate(found):
        assert all(np.abs(array - other).max() > 1e-3 for other in found[:number])


def test_fused_tokens_are_the_same_bytes_whoever_asks_beside(make, tmp_path, passes):
    shown = [demonstrations(4, first) for first in (0, 4, 8)]
    apart = [arrays(fuse(make(bank=str(tmp_path / f"{number}")), one)) for number, one in enumerate(shown)]
    passes.sizes.clear()
    compressor = make(**together(12))

    async def run() -> list[Fusion]:
        return await asyncio.gather(
            *(compressor.fuse(AIM, tenant, one) for tenant, one in zip("abc", shown, strict=True))
        )

    assert [arrays(fusion) for fusion in asyncio.run(run())] == apart
    assert passes.sizes == [12]


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_fused_tokens_are_the_same_bytes_where_the_process_may_use_several_threads(tmp_path):
    # Threads split sums among them only in products as large as those of this model.
    found = []
    for number, settings in enumerate((together(8), {"batch_image_tokens": 1})):
        config = ServeConfig(bank=str(tmp_path / f"{number}"), **settings)
        compressor = Compressor(resolve("embedded:nano"), config)
        asyncio.run(compressor.reconfigure({"adapters": {"aim": {"folder": "embedded:nano_aim"}}}))
        pictures = [encode_picture(draw_picture(seed)) for seed in range(8)]
        found.append(arrays(fuse(compressor, [Demonstration((one,), "This is", "bako") for one in pictures])))
        compressor.close()
    assert found[0] == found[1]


def test_pass_reads_no_more_visual_tokens_than_it_may(make, passes):
    fuse(make(**together(4) | {"batch_wait_ms": 1000}), demonstrations(9))
    assert max(passes.sizes) == 4
    assert sum(passes.sizes) == 9


def test_demonstration_with_more_visual_tokens_than_a_pass_may_have_is_read_alone(make, passes):
    large = Demonstration(tuple(encode_picture(draw_picture(seed)) for seed in range(3)), "This is", "bako")
    fusion = fuse(make(batch_image_tokens=2 * VISUAL_TOKENS), [*demonstrations(1), large])
    assert passes.sizes == [1, 1]
    assert fusion.tokens_full[1] == 3 * VISUAL_TOKENS + 6


def test_name_of_a_fusion_is_that_of_its_fused_tokens(make):
    compressor, shown = make(), demonstrations(3)
    first, again = fuse(compressor, shown), fuse(compressor, shown, tenant="bob")
    assert first.name == again.name
    others = (shown[:2], [shown[1], shown[0], shown[2]], demonstrations(3, first=3))
    assert len({first.name, *(fuse(compressor, other).name for other in others)}) == 4


def test_fused_tokens_travel_as_what_put_makes_of_them(make):
    stored = list[tuple[Fused, ...]]()

    def put(fused: tuple[Fused, ...]) -> PackReference:
        stored.append(fused)
        return PackReference("ann", "stored")

    fusion = fuse(make(put=put), demonstrations(2))
    assert fusion.fused == PackReference("ann", "stored")
    assert tuple(map(len, stored[0])) == fusion.tokens_fused


def test_demonstrations_that_the_bank_has_are_not_read_again(make, passes):
    compressor = make()
    first = fuse(compressor, demonstrations(3))
    passes.refuse = lambda laid: True
    again = fuse(compressor, demonstrations(3)[::-1])
    restarted = fuse(make(), demonstrations(3))
    assert (first.known, again.known, restarted.known) == (0, 3, 3)
    assert arrays(again) == arrays(first)[::-1]
    assert arrays(restarted) == arrays(first)


def test_only_demonstrations_that_the_bank_lacks_are_read(make, passes):
    compressor = make()
    fuse(compressor, demonstrations(2))
    fusion = fuse(compressor, demonstrations(5))
    assert fusion.known == 2
    assert sum(passes.sizes) == 2 + 3


def test_what_one_tenant_has_is_not_known_to_another(make):
    compressor = make(bank_memory_bytes=1 << 20)
    fuse(compressor, demonstrations(2))
    assert fuse(compressor, demonstrations(2), tenant="bob").known == 0


def test_demonstration_that_is_wanted_twice_at_the_same_time_is_read_once(make, passes):
    compressor, (one, other) = make(**together(2)), demonstrations(2)

    async def run() -> list[Fusion]:
        asked = ([one, other, one], [other], [one])
        return await asyncio.gather(*(compressor.fuse(AIM, "ann", shown) for shown in asked))

    first, second, third = asyncio.run(run())
    assert passes.sizes == [2]
    assert arrays(first) == [*arrays(third), *arrays(second), *arrays(third)]


def test_demonstration_that_fails_in_a_pass_fails_its_request_alone(make, passes):
    compressor = make(**together(5))
    broken = Demonstration(demonstrations(1)[0].images, "This is", "bako" * 4)
    passes.refuse = lambda laid: laid.kept > 10

    async def run() -> list[Fusion | BaseException]:
        return await asyncio.gather(
            compressor.fuse(AIM, "ann", demonstrations(3)),
            compressor.fuse(AIM, "bob", [*demonstrations(1), broken]),
            return_exceptions=True,
        )

    good, bad = asyncio.run(run())
    assert passes.sizes[0] == 5
    assert isinstance(good, Fusion) and isinstance(bad, RuntimeError)
    assert arrays(good) == arrays(fuse(make(), demonstrations(3)))


class Gate:
    """Holds the first pass until it is opened."""

    def __init__(self, passes: Passes) -> None:
        self._reading, self._open = threading.Event(), threading.Event()
        passes.refuse = self._hold

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reading.wait, SOON)

    def open(self) -> None:
        self._open.set()

    def _hold(self, laid: object) -> bool:
        self._reading.set()
        assert self._open.wait(SOON)
        return False


def test_request_that_is_cancelled_takes_its_waiting_demonstrations_along(make, passes):
    compressor, gate = make(), Gate(passes)

    async def run() -> int:
        first = asyncio.ensure_future(compressor.fuse(AIM, "eve", demonstrations(1)))
        await gate.reached()
        leaving = asyncio.ensure_future(compressor.fuse(AIM, "ann", demonstrations(8)))
        staying = asyncio.ensure_future(compressor.fuse(AIM, "bob", demonstrations(2)))
        while len(compressor._batcher._queue) < 10:
            await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        gate.open()
        await asyncio.gather(first, staying)
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
    assert passes.sizes == [1, 2]


@pytest.mark.parametrize(
    ("image", "question", "reason"),
    [
        (b"no picture", "This is", "picture 1 of 1: the bytes are not a readable picture"),
        (encode_picture(draw_picture(0, side=101)), "This is", "picture 1 of 1: .* 101 x 101 pixels"),
        (encode_picture(draw_picture(0)), "This is <answer> bako </s>", "control token"),
        (encode_picture(draw_picture(0)), "This is " * 2100, "the model reads 2048: shorten its question"),
    ],
)
def test_demonstration_that_cannot_be_read_is_refused_by_its_number(make, tmp_path, image, question, reason):
    shown = [*demonstrations(1), Demonstration((image,), question, "bako")]
    with pytest.raises(DataError, match=f"^demonstration 2 of 2: .*{reason}"):
        register(make(), shown)
    assert bank_of(tmp_path).packs("ann") == []


def test_nothing_to_fuse_is_refused(make):
    with pytest.raises(DataError, match="no demonstrations"):
        fuse(make(), [])


def test_fused_tokens_that_are_not_finite_are_refused(make):
    compressor = make()
    compressor._models.get(AIM).method.aggregator.projection.bias.fill_(float("nan"))
    with pytest.raises(BankError, match="demonstration 1 of 1: .*not finite"):
        fuse(compressor, demonstrations(1))


def test_pack_holds_what_fusing_gives_and_a_vector_for_each_demonstration(make, tmp_path):
    compressor = make()
    entry, fusion = register(compressor, demonstrations(3)), fuse(compressor, demonstrations(3))
    pack = bank_of(tmp_path).load("ann", entry.id)
    assert [array.tobytes() for array in pack.fused] == arrays(fusion)
    assert (entry.tokens_full, entry.tokens_fused) == (fusion.tokens_full, fusion.tokens_fused)
    assert entry.model == AIM
    pictures = [one.images[0] for one in demonstrations(3)]
    np.testing.assert_array_equal(pack.vectors, asyncio.run(compressor.embed(pictures)).vectors)


def test_equal_pack_is_given_back_without_reading_anything(make, passes, monkeypatch):
    entry = register(make(), demonstrations(2))
    compressor = make()
    passes.refuse = lambda laid: True
    monkeypatch.setattr("pipelines.serve.compressor.lay_out", passes.refuse)
    assert register(compressor, demonstrations(2)) == entry


def test_damaged_pack_is_made_anew(make, tmp_path):
    compressor = make()
    entry = register(compressor, demonstrations(2))
    (file,) = (tmp_path / "bank" / "packs").rglob(f"{entry.id}.safetensors")
    data = file.read_bytes()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        file.write_bytes(damaged)
        assert register(make(), demonstrations(2)).digest == entry.digest
        assert bank_of(tmp_path).load("ann", entry.id).entry.digest == entry.digest


def test_pack_that_came_as_a_file_is_not_taken_for_what_it_says(make, tmp_path):
    compressor, bank = make(), bank_of(tmp_path)
    entry = register(compressor, demonstrations(2))
    bank.take_in("bob", bank.export("ann", entry.id), [entry.maker])
    assert bank.describe("bob", entry.id).imported
    assert not register(compressor, demonstrations(2), tenant="bob").imported


def test_packs_of_another_adapter_are_other_packs(make, model):
    compressor = make()
    entry = register(compressor, demonstrations(1))
    save_aim(model, "retrained", seed=1)
    asyncio.run(compressor.reconfigure(user_config(aim=model / "retrained")))
    other = register(compressor, demonstrations(1))
    assert other.id != entry.id and other.digest != entry.digest
    with pytest.raises(OtherMakerError):
        asyncio.run(compressor.select(AIM, PackReference("ann", entry.id), [], 1))


@pytest.mark.parametrize(("name", "able"), [("nano", AIM), ("nano@soft", AIM)])
def test_model_that_does_not_fuse_is_refused_and_those_that_do_are_named(make, name, able):
    with pytest.raises(RequestError, match=f"model '{name}' does not fuse .*{able}") as caught:
        asyncio.run(make().fuse(name, "ann", demonstrations(1)))
    assert caught.value.param == "model"


def test_model_that_is_not_served_is_refused(make):
    with pytest.raises(UnknownModelError, match="'nano@none' is not served"):
        asyncio.run(make().fuse("nano@none", "ann", demonstrations(1)))


def test_adapters_are_exchanged_while_requests_are_under_way(make, model, passes):
    compressor = make()
    save_aim(model, "newer", seed=2)
    before = arrays(fuse(compressor, demonstrations(1)))
    gate = Gate(passes)

    async def run() -> tuple[Fusion, Fusion]:
        under_way = asyncio.ensure_future(compressor.fuse(AIM, "bob", demonstrations(1)))
        await gate.reached()
        await asyncio.wait_for(compressor.reconfigure(user_config(aim=model / "newer")), SOON)
        gate.open()
        return await under_way, await compressor.fuse(AIM, "bob", demonstrations(1))

    old, new = asyncio.run(run())
    assert arrays(old) == before
    assert arrays(new) != before and new.known == 0


def test_event_loop_is_free_while_adapters_load(make, model, monkeypatch):
    compressor, free = make(), threading.Event()
    monkeypatch.setattr(compressor._models, "reload", lambda adapters: free.wait(SOON) or pytest.fail("held"))

    async def run() -> None:
        loading = asyncio.ensure_future(compressor.reconfigure(user_config(aim=model / "aim")))
        await asyncio.sleep(0.01)
        free.set()
        await loading

    asyncio.run(run())


def test_adapter_that_cannot_be_loaded_leaves_those_that_are(make, model, tmp_path):
    compressor = make()
    before = arrays(fuse(compressor, demonstrations(1)))
    Aim(tiny_backbone(seed=5), AimConfig()).save(tmp_path / "foreign", {})
    with pytest.raises(CheckpointError, match="is for backbone 'tiny-5'"):
        asyncio.run(compressor.reconfigure(user_config(aim=tmp_path / "foreign")))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        asyncio.run(compressor.reconfigure({"adapters": {"aim": {"folder": str(tmp_path / "none")}}}))
    assert arrays(fuse(compressor, demonstrations(1), tenant="bob")) == before


def test_adapter_that_is_left_out_is_served_no_longer(make, model):
    compressor = make()
    asyncio.run(compressor.reconfigure(user_config(soft=model / "soft")))
    with pytest.raises(UnknownModelError):
        fuse(compressor, demonstrations(1))
    with pytest.raises(RequestError, match="serve an AIM adapter"):
        asyncio.run(compressor.fuse("nano@soft", "ann", demonstrations(1)))


def test_healthy_compressor_says_so_and_a_closed_one_does_not(make):
    compressor = make()
    asyncio.run(compressor.check_health())
    fuse(compressor, demonstrations(1))
    compressor.close()
    with pytest.raises(RuntimeError):
        asyncio.run(compressor.check_health())


def test_pack_of_a_tenant_is_unknown_to_others(make):
    compressor = make()
    entry = register(compressor, demonstrations(1))
    with pytest.raises(UnknownPackError):
        asyncio.run(compressor.select(AIM, PackReference("bob", entry.id), [], 1))
