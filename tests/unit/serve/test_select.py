"""The demonstrations of a pack that are nearest to pictures, and pictures as vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.bank import Bank, Demonstration, Pack, UnknownPackError
from mmicl_core.bank.encoding import encode
from mmicl_core.bank.entries import digest_arrays
from mmicl_core.errors import BankError, DataError
from pipelines.serve.compressor import Compressor
from pipelines.serve.contracts import Fusion, PackReference
from pipelines.serve.errors import RequestError
from tests.fakes import draw_picture, encode_picture
from tests.unit.serve.compressing import AIM, VISUAL_TOKENS, demonstrations, make, model, together

__all__ = ["make", "model"]


def picture(seed: int) -> bytes:
    return encode_picture(draw_picture(seed))


def embed(compressor: Compressor, pictures: Sequence[bytes]) -> np.ndarray:
    return np.array(asyncio.run(compressor.embed(pictures)).vectors)


def select(
    compressor: Compressor, shown: list[Demonstration], pictures: Sequence[bytes], count: int
) -> Fusion:
    async def run() -> Fusion:
        entry = await compressor.register(AIM, "ann", shown)
        return await compressor.select(AIM, PackReference("ann", entry.id), pictures, count)

    return asyncio.run(run())


def numbers(compressor: Compressor, shown: list[Demonstration], fusion: Fusion) -> list[int]:
    """Which demonstrations a fusion holds."""
    fused = [array.tobytes() for array in asyncio.run(compressor.fuse(AIM, "ann", shown)).fused]
    return [fused.index(array.tobytes()) for array in fusion.fused]


def test_nearest_demonstrations_are_chosen_and_the_nearest_is_last(make):
    compressor, shown = make(), demonstrations(6)
    vectors = embed(compressor, [one.images[0] for one in shown])
    for query in (picture(2), picture(40), picture(41)):
        cosines = vectors @ embed(compressor, [query])[0]
        fusion = select(compressor, shown, [query], 3)
        assert numbers(compressor, shown, fusion) == np.argsort(cosines)[-3:].tolist()
        assert fusion.tokens_fused == tuple(map(len, fusion.fused))
    assert numbers(compressor, shown, select(compressor, shown, [picture(2)], 1)) == [2]


def test_several_pictures_of_a_question_are_looked_for_together(make):
    compressor, shown = make(), demonstrations(6)
    vectors = embed(compressor, [one.images[0] for one in shown])
    query = embed(compressor, [picture(1), picture(4)]).mean(0)
    fusion = select(compressor, shown, [picture(1), picture(4)], 6)
    assert numbers(compressor, shown, fusion) == np.argsort(vectors @ query).tolist()


def test_of_equally_near_demonstrations_the_earlier_counts_as_nearer(make):
    names = ("bako", "bakobako", "bakobakobako")
    shown = [Demonstration((picture(0),), "This is", name) for name in names]
    compressor = make()
    assert numbers(compressor, shown, select(compressor, shown, [picture(7)], 2)) == [1, 0]


def test_selection_costs_what_its_demonstrations_cost_and_nothing_is_read(make):
    fusion = select(make(), demonstrations(4), [picture(0)], 2)
    assert fusion.known == 2
    assert all(
        full == fused + VISUAL_TOKENS
        for full, fused in zip(fusion.tokens_full, fusion.tokens_fused, strict=True)
    )


def test_equal_selections_have_one_name(make):
    compressor, shown = make(), demonstrations(4)
    first, again, other = (select(compressor, shown, [picture(seed)], 2) for seed in (0, 0, 3))
    assert first.name == again.name != other.name


@pytest.mark.parametrize(
    ("shown", "pictures", "count", "reason"),
    [
        (
            demonstrations(2),
            [picture(0)],
            3,
            "3 demonstrations are to be selected of the 2 .* ask for 1 to 2",
        ),
        (demonstrations(2), [picture(0)], 0, "0 demonstrations"),
        (demonstrations(2), [], 1, "the question has no pictures"),
        ([*demonstrations(1), Demonstration((), "This is", "bako")], [picture(0)], 1, "without pictures"),
    ],
)
def test_selection_that_is_impossible_is_refused(make, shown, pictures, count, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        select(make(), shown, pictures, count)
    assert caught.value.param == "demo_pack.select"


def test_selection_from_an_unknown_pack_is_refused(make):
    with pytest.raises(UnknownPackError):
        asyncio.run(make().select(AIM, PackReference("ann", "pack-" + "0" * 32), [picture(0)], 1))


def test_vectors_have_length_1_and_equal_pictures_have_equal_ones(make):
    found = asyncio.run(make().embed([picture(0), picture(1), picture(0)]))
    vectors = np.array(found.vectors)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert found.vectors[0] == found.vectors[2] != found.vectors[1]
    assert found.tokens == 3 * VISUAL_TOKENS


def test_vector_of_a_picture_does_not_depend_on_others(make):
    compressor = make(**together(5))
    beside = asyncio.run(compressor.embed([picture(seed) for seed in range(5)])).vectors
    alone = [asyncio.run(make().embed([picture(seed)])).vectors[0] for seed in range(5)]
    assert list(beside) == alone


def test_picture_that_cannot_be_read_is_refused_by_its_number(make):
    with pytest.raises(DataError, match="^picture 2 of 2: the bytes are not a readable picture"):
        asyncio.run(make().embed([picture(0), b"GIF89a"]))


@pytest.mark.parametrize(
    "change", [lambda vectors: vectors[:, 1:], lambda vectors: vectors * 1e30, lambda vectors: vectors * 0]
)
def test_selection_by_vectors_that_no_model_made_is_refused(make, change):
    compressor, shown = make(), demonstrations(2)
    bank = Bank(Path(compressor._config.bank))

    async def run() -> Fusion:
        entry = await compressor.register(AIM, "ann", shown)
        pack = bank.load("ann", entry.id)
        vectors = np.ascontiguousarray(change(pack.vectors))
        forged = replace(entry, id="pack-" + "0" * 32, digest=digest_arrays(pack.fused, vectors))
        bank.take_in("ann", encode(Pack(forged, pack.fused, vectors)), [entry.maker])
        return await compressor.select(AIM, PackReference("ann", forged.id), [picture(1)], 1)

    with pytest.raises(BankError, match="has vectors of"):
        asyncio.run(run())
