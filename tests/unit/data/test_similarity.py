from __future__ import annotations

import numpy as np
import pytest

from mmicl_core.config.corpus import NeighbourConfig
from mmicl_core.data.similarity import (
    Weights,
    choose_intervals,
    choose_nearest,
    choose_released_intervals,
    class_similarity,
    rank_block,
)
from mmicl_core.errors import ConfigError

PAPER = Weights(text_text=0.5, image_text=0.8, image_image=0.5)


def directions(concepts: int, width: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(concepts, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def names(concepts: int) -> list[str]:
    return [f"concept-{number}" for number in range(concepts)]


def on_one_side(concepts: int) -> np.ndarray:
    return np.zeros(concepts, bool)


def falling(concepts: int) -> np.ndarray:
    """One row that is most similar to itself, then to 1, 2, 3, ..."""
    return np.linspace(1, 0, concepts, dtype=np.float32)[None]


@pytest.mark.parametrize("weights", [PAPER, Weights(1.0, 0.0, 0.25), Weights(0.0, 0.3, 0.0)])
def test_class_similarity_is_the_weighted_sum_of_cosines(weights):
    images, texts = directions(9, seed=1), directions(9, seed=2)
    found = class_similarity(images[3:6], texts[3:6], images, texts, weights)
    for row in range(3):
        for other in range(9):
            image, text = images[3 + row].astype(float), texts[3 + row].astype(float)
            wanted = (
                weights.text_text * text @ texts[other]
                + weights.image_text * (image @ texts[other] + text @ images[other])
                + weights.image_image * image @ images[other]
            )
            assert found[row, other] == pytest.approx(wanted, abs=1e-6)


def test_class_similarity_weighs_as_the_released_code():
    config = NeighbourConfig(by="similarity", preset="released")
    assert Weights.of(config) == (0.5, 0.8, 0.5)
    same = np.array([[1.0, 0.0]], np.float32)
    across = np.array([[0.0, 1.0]], np.float32)
    assert class_similarity(same, same, same, same, Weights.of(config)).item() == pytest.approx(2.6)
    assert class_similarity(same, across, same, across, Weights.of(config)).item() == pytest.approx(1.0)
    assert class_similarity(same, across, across, same, Weights.of(config)).item() == pytest.approx(1.6)


def test_class_similarity_of_pictures_alone_needs_no_names_and_of_names_no_pictures():
    images, texts = directions(5, 8, seed=1), directions(5, 6, seed=2)
    both = class_similarity(images, texts, images, texts, Weights(0.5, 0.0, 0.25))
    by_image = class_similarity(images, None, images, None, Weights(0.0, 0.0, 0.25))
    by_text = class_similarity(None, texts, None, texts, Weights(0.5, 0.0, 0.0))
    np.testing.assert_allclose(both, by_image + by_text, atol=1e-6)


def test_class_similarity_does_not_depend_on_how_concepts_are_cut(monkeypatch):
    images, texts = directions(50, 64, seed=1), directions(50, 64, seed=2)
    whole = class_similarity(images, texts, images, texts, PAPER)
    monkeypatch.setattr("mmicl_core.data.similarity.CONCEPTS_AT_ONCE", 7)
    cut = [
        class_similarity(images[n : n + 3], texts[n : n + 3], images, texts, PAPER) for n in range(0, 50, 3)
    ]
    np.testing.assert_array_equal(np.concatenate(cut), whole)


@pytest.mark.parametrize(
    ("given", "weights", "message"),
    [
        ({"images": None}, PAPER, r"image_image \(0.5\) compares pictures, but .* none: set it to 0"),
        ({"texts": None}, PAPER, r"text_text \(0.5\) compares names, but .* none: set it to 0"),
        ({"texts": None}, Weights(0.0, 0.8, 0.5), r"image_text \(0.8\) .* 16 and 0 wide: set it to 0"),
        ({"texts": directions(5, 6)}, PAPER, r"image_text \(0.8\) .* 16 and 6 wide: set it to 0"),
        ({}, Weights(0.0, 0.0, 0.0), "all three weights of neighbours are 0"),
    ],
)
def test_weight_that_counts_what_there_is_not_is_refused(given, weights, message):
    vectors = {"images": directions(5), "texts": directions(5)} | given
    images, texts = vectors["images"], vectors["texts"]
    with pytest.raises(ConfigError, match=message):
        class_similarity(images, texts, images, texts, weights)


def test_nearest_are_those_of_a_full_sort():
    similarity = np.random.default_rng(0).normal(size=(12, 40)).astype(np.float32)
    for row, found in zip(range(12), choose_nearest(similarity, range(12), on_one_side(40), 10), strict=True):
        ranked = sorted((n for n in range(40) if n != row), key=lambda other: -similarity[row, other])
        assert found.tolist() == ranked[:10]


def test_nearest_of_equals_are_those_of_the_lowest_numbers():
    similarity = np.zeros((1, 30), np.float32)
    similarity[0, 20] = 1
    assert choose_nearest(similarity, [3], on_one_side(30), 6)[0].tolist() == [20, 0, 1, 2, 4, 5]


def test_concept_that_resembles_another_more_than_itself_is_not_its_own_neighbour():
    similarity = np.array([[0.1, 0.9, 0.5]], np.float32)
    assert choose_nearest(similarity, [0], on_one_side(3), 5)[0].tolist() == [1, 2]


@pytest.mark.parametrize("choice", ["nearest", "intervals", "released_intervals"])
def test_neighbours_are_of_the_side_of_their_concept(choice):
    images, texts = directions(60, seed=1), directions(60, seed=2)
    held_out = np.arange(60) % 3 == 0
    config = NeighbourConfig(by="similarity", choice=choice, count=7)
    chosen, similar = rank_block(range(60), images, texts, held_out, names(60), config)
    whole = class_similarity(images, texts, images, texts, PAPER)
    for row, (numbers, values) in enumerate(zip(chosen, similar, strict=True)):
        assert len(numbers) >= 6
        assert (held_out[numbers] == held_out[row]).all()
        assert row not in numbers
        assert len(set(numbers.tolist())) == len(numbers)
        assert sorted(values, reverse=True) == values.tolist() == whole[row, numbers].tolist()


@pytest.mark.parametrize("choice", ["nearest", "intervals", "released_intervals"])
def test_neighbours_do_not_depend_on_how_rows_are_cut(choice):
    images, texts = directions(60, seed=1), directions(60, seed=2)
    config = NeighbourConfig(by="similarity", choice=choice, count=9)

    def rank(rows: range) -> list[list[int]]:
        chosen, _ = rank_block(rows, images, texts, np.arange(60) < 20, names(60), config)
        return [numbers.tolist() for numbers in chosen]

    cut = [numbers for start in range(0, 60, 7) for numbers in rank(range(start, min(start + 7, 60)))]
    assert cut == rank(range(60))


def test_intervals_of_the_paper_give_one_concept_each_from_the_nearest_on():
    found = choose_intervals(falling(1001), [0], on_one_side(1001), 100, names(1001), 0)[0]
    # 1,000 others in 100 intervals of 10.
    assert [(number - 1) // 10 for number in found.tolist()] == list(range(100))
    assert len({(number - 1) % 10 for number in found.tolist()}) > 5


def test_intervals_that_do_not_come_out_even_differ_by_one_and_miss_nobody():
    drawn = {
        (place, number)
        for seed in range(300)
        for place, number in enumerate(
            choose_intervals(falling(24), [0], on_one_side(24), 10, names(24), seed)[0].tolist()
        )
    }
    assert sorted(number for _, number in drawn) == list(range(1, 24))
    assert {sum(place == each for place, _ in drawn) for each in range(10)} == {2, 3}


def test_intervals_of_fewer_others_than_intervals_give_all_others():
    found = choose_intervals(falling(5), [0], on_one_side(5), 100, names(5), 0)[0]
    assert found.tolist() == [1, 2, 3, 4]


def test_draw_from_intervals_depends_on_seed_and_concept_alone():
    similarity = np.tile(falling(500), (2, 1))
    ids = names(500)
    draw = choose_intervals(similarity, [7, 8], on_one_side(500), 20, ids, 0)
    again = choose_intervals(similarity[:1], [8], on_one_side(500), 20, ids, 0)
    assert draw[1].tolist() == again[0].tolist()
    assert draw[1].tolist() != choose_intervals(similarity[:1], [8], on_one_side(500), 20, ids, 1)[0].tolist()
    ids[8] = "another concept"
    assert draw[1].tolist() != choose_intervals(similarity[:1], [8], on_one_side(500), 20, ids, 0)[0].tolist()


def test_released_intervals_of_900_concepts_are_36_of_25_of_which_the_first_is_the_concept_itself():
    drawn: list[set[int]] = [set() for _ in range(36)]
    for seed in range(400):
        found = choose_released_intervals(falling(900), [0], on_one_side(900), 36, names(900), seed)[0]
        assert len(found) == 36
        for numbers, number in zip(drawn, found.tolist(), strict=True):
            numbers.add(number)
    for place, numbers in enumerate(drawn):
        assert numbers == set(range(max(1, 25 * place), 25 * place + 25))


@pytest.mark.parametrize(
    ("concepts", "neighbours"), [(1, 0), (2, 1), (36, 35), (37, 19), (73, 25), (100, 34)]
)
def test_released_intervals_count_the_short_one_at_the_end_too(concepts, neighbours):
    found = choose_released_intervals(falling(concepts), [0], on_one_side(concepts), 36, names(concepts), 0)[
        0
    ]
    assert len(set(found.tolist())) == len(found) == neighbours
    assert 0 not in found


@pytest.mark.parametrize("choice", ["nearest", "intervals", "released_intervals"])
def test_concept_that_is_alone_on_its_side_has_no_neighbours(choice):
    config = NeighbourConfig(by="similarity", choice=choice, count=9)
    held_out = np.arange(12) == 4
    chosen, similar = rank_block(range(4, 6), directions(12), directions(12), held_out, names(12), config)
    assert chosen[0].tolist() == similar[0].tolist() == []
    assert len(chosen[1]) >= 5


@pytest.mark.parametrize(("preset", "count"), [("paper", 100), ("released", 36)])
def test_preset_gives_the_number_of_neighbours_of_its_source(preset, count):
    config = NeighbourConfig(by="similarity", preset=preset)
    vectors = directions(900)
    chosen, _ = rank_block(range(3), vectors, vectors, on_one_side(900), names(900), config)
    assert {len(numbers) for numbers in chosen} == {count}
