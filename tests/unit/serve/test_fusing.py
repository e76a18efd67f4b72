"""Demonstrations side by side get what each of them gets alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.assets import resolve
from mmicl_core.bank import Demonstration, Known
from mmicl_core.prompts import Turn
from pipelines.serve.fusing import Laid, lay_out, read_demonstrations, read_pictures, show, unit_mean
from pipelines.serve.loaded import Loaded, LoadedModels
from tests.fakes import draw_picture, encode_picture
from tests.unit.serve.compressing import AIM, MAX_PIXELS, demonstrations, model

__all__ = ["model"]


@pytest.fixture(scope="module")
def tiny(model: Path) -> Loaded:
    models = LoadedModels(model / "backbone", "nano")
    models.reload({"aim": str(model / "aim")})
    return models.get(AIM)


@pytest.fixture(scope="module")
def nano() -> Loaded:
    models = LoadedModels(resolve("embedded:nano"), "nano")
    models.reload({"aim": str(resolve("embedded:nano_aim"))})
    return models.get(AIM)


def varied(count: int) -> list[Demonstration]:
    """None, one or two pictures, and texts of many lengths."""
    rng = random.Random(0)
    pictures = [encode_picture(draw_picture(seed)) for seed in range(8)]
    return [
        Demonstration(
            tuple(rng.choices(pictures, k=rng.choice([0, 1, 1, 1, 2]))), "This is", "bako" * rng.randint(1, 9)
        )
        for _ in range(count)
    ]


def lay(loaded: Loaded, shown: list[Demonstration]) -> list[Laid]:
    return [lay_out(loaded, one, MAX_PIXELS) for one in shown]


def same(one: Known, other: Known) -> bool:
    assert (one.vector is None) == (other.vector is None)
    vectors = one.vector is None or other.vector is None or one.vector.tobytes() == other.vector.tobytes()
    return one.fused.tobytes() == other.fused.tobytes() and vectors


@pytest.mark.parametrize("name", ["tiny", "nano"])
@pytest.mark.parametrize("beside", [2, 3, 8, 16])
def test_fused_tokens_are_the_same_bytes_whoever_is_beside(name, beside, request):
    laid = lay(request.getfixturevalue(name), varied(40))
    alone = {one: read_demonstrations([one])[0] for one in laid}
    groups = defaultdict[Hashable, list[Laid]](list)
    for one in random.Random(beside).sample(laid, len(laid)):
        groups[one.shape].append(one)
    assert max(map(len, groups.values())) > beside / 2
    for group in groups.values():
        for start in range(0, len(group), beside):
            some = group[start : start + beside]
            found = read_demonstrations(some)
            assert all(same(known, alone[one]) for one, known in zip(some, found, strict=True))


def test_demonstrations_of_like_lengths_share_a_pass_those_of_others_do_not(tiny):
    one, near, far = lay(tiny, [Demonstration((), "This is", "bako" * count) for count in (1, 2, 30)])
    assert one.tokens_full < near.tokens_full
    assert one.shape == near.shape != far.shape


def test_fused_tokens_are_what_the_aggregator_makes_of_the_backbones_states(tiny):
    method, shown = tiny.method, demonstrations(3)
    for number, known in enumerate(read_demonstrations(lay(tiny, shown))):
        (prepared,) = method.backbone.prepare([draw_picture(number)])
        turn = Turn(("p",), shown[number].question, shown[number].answer)
        (state_TD,) = method.reader.read(method.reader.pack([turn], {"p": prepared}))
        # Sums in another order, without padding, differ in the last bits of float32.
        expected = method.aggregator(state_TD).numpy()
        np.testing.assert_allclose(known.fused, expected, rtol=1e-4, atol=1e-4)


def test_vectors_have_length_1_and_tell_pictures_apart(tiny):
    backbone = tiny.method.backbone
    pictures = [encode_picture(draw_picture(seed)) for seed in range(4)]
    vectors = read_pictures([show(backbone, picture, MAX_PIXELS) for picture in pictures])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert (np.stack(vectors) @ np.stack(vectors).T - np.eye(4)).max() < 1 - 1e-5


def test_vector_of_a_demonstration_is_that_of_its_pictures(tiny):
    backbone = tiny.method.backbone
    one, other = (encode_picture(draw_picture(seed)) for seed in range(2))
    (known,) = read_demonstrations(lay(tiny, [Demonstration((one, other), "This is", "bako")]))
    expected = unit_mean(read_pictures([show(backbone, picture, MAX_PIXELS) for picture in (one, other)]))
    np.testing.assert_array_equal(known.vector, expected)
