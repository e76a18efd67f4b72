from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmicl_core.data.inverted_file import FILES, InvertedFile
from mmicl_core.data.similarity import Weights, choose_nearest, class_similarity
from mmicl_core.errors import DataError

PAPER = Weights(text_text=0.5, image_text=0.8, image_image=0.5)
CONCEPTS = 3000
COUNT = 50


def normalised(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def build(images: np.ndarray, texts: np.ndarray, held_out: np.ndarray) -> InvertedFile:
    return InvertedFile.build(images, texts, held_out, PAPER, seed=0)


@pytest.fixture(scope="module")
def concepts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures and names of kinds of kinds of things, and a tenth held out."""
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(6, 32))
    fine = rough[rng.integers(0, 6, 60)] + 0.7 * rng.normal(size=(60, 32))
    own = fine[rng.integers(0, 60, CONCEPTS)] + 0.5 * rng.normal(size=(CONCEPTS, 32))
    images, texts = (normalised(own + 0.25 * rng.normal(size=own.shape)) for _ in range(2))
    return images, texts, rng.random(CONCEPTS) < 0.1


@pytest.fixture(scope="module")
def inverted(concepts) -> InvertedFile:
    return build(*concepts)


def test_search_finds_nine_of_ten_of_the_nearest_concepts(concepts, inverted):
    images, texts, held_out = concepts
    rows = range(0, CONCEPTS, 10)
    found, _ = inverted.search(rows, images, texts, held_out, PAPER, COUNT)
    similarity = class_similarity(images[::10], texts[::10], images, texts, PAPER)
    nearest = choose_nearest(similarity, rows, held_out, COUNT)
    shares = [len(np.intersect1d(*both)) / COUNT for both in zip(found, nearest, strict=True)]
    assert np.mean(shares) >= 0.9
    # Were all lists looked through, it would be no inverted file.
    assert np.mean(shares) < 1


def test_found_concepts_are_sorted_by_their_exact_similarity_and_of_the_same_side(concepts, inverted):
    images, texts, held_out = concepts
    rows = range(0, CONCEPTS, 100)
    found, similar = inverted.search(rows, images, texts, held_out, PAPER, COUNT)
    exact = class_similarity(images[::100], texts[::100], images, texts, PAPER)
    for row, numbers, values, wanted in zip(rows, found, similar, exact, strict=True):
        assert len(set(numbers.tolist())) == COUNT
        assert row not in numbers
        assert (held_out[numbers] == held_out[row]).all()
        assert values.tolist() == wanted[numbers].tolist() == sorted(values, reverse=True)


def test_search_does_not_depend_on_how_rows_are_cut(concepts, inverted):
    whole, _ = inverted.search(range(60), *concepts, PAPER, COUNT)
    cut = []
    for start in range(0, 60, 7):
        cut += inverted.search(range(start, min(start + 7, 60)), *concepts, PAPER, COUNT)[0]
    assert [numbers.tolist() for numbers in cut] == [numbers.tolist() for numbers in whole]


def test_inverted_file_read_from_disk_finds_what_the_one_that_was_saved_finds(tmp_path, concepts, inverted):
    inverted.save(tmp_path)
    found, _ = InvertedFile.open(tmp_path).search(range(40), *concepts, PAPER, COUNT)
    wanted, _ = inverted.search(range(40), *concepts, PAPER, COUNT)
    assert [numbers.tolist() for numbers in found] == [numbers.tolist() for numbers in wanted]


def test_inverted_file_of_one_seed_is_the_same_byte_for_byte(tmp_path, concepts, monkeypatch):
    # So few that the lists are found from a sample, as among very many concepts.
    monkeypatch.setattr("mmicl_core.data.inverted_file.KEYS_OF_A_LIST", 4)
    files = []
    for number, one in enumerate((build(*concepts), build(*concepts))):
        folder = tmp_path / str(number)
        folder.mkdir()
        one.save(folder)
        files.append([(folder / name).read_bytes() for name in FILES])
    assert files[0] == files[1]


def test_row_whose_lists_hold_too_few_is_compared_with_all(concepts):
    images, texts, held_out = concepts
    small = build(images, texts, held_out)
    count = int((~held_out).sum()) - 10
    row = int(np.flatnonzero(~held_out)[0])
    found, _ = small.search([row], images, texts, held_out, PAPER, count)
    similarity = class_similarity(images[[row]], texts[[row]], images, texts, PAPER)
    assert found[0].tolist() == choose_nearest(similarity, [row], held_out, count)[0].tolist()


@pytest.mark.parametrize("total", [1, 2, 5])
def test_handful_of_concepts_is_searched_completely(total):
    vectors = normalised(np.random.default_rng(0).normal(size=(total, 8)))
    one_side = np.zeros(total, bool)
    found, _ = build(vectors, vectors, one_side).search(range(total), vectors, vectors, one_side, PAPER, 10)
    assert [sorted([row, *numbers.tolist()]) for row, numbers in enumerate(found)] == [
        list(range(total))
    ] * total


def test_search_by_pictures_alone_needs_no_names(concepts):
    images, _, held_out = concepts
    weights = Weights(0.0, 0.0, 1.0)
    inverted = InvertedFile.build(images, None, held_out, weights, seed=0)
    _, similar = inverted.search([5], images, None, held_out, weights, 3)
    cosines = np.delete(images @ images[5], 5)[np.delete(held_out, 5) == held_out[5]]
    assert similar[0][0] == pytest.approx(cosines.max(), abs=1e-6)


@pytest.mark.parametrize("content", [None, b"", b"no index"])
def test_damaged_inverted_file_is_refused(tmp_path: Path, content):
    if content is not None:
        (tmp_path / FILES[0]).write_bytes(content)
    with pytest.raises(DataError, match="holds no inverted file" if content is None else "is damaged"):
        InvertedFile.open(tmp_path)
