"""How hard the 2-way episodes of a dataset are, told by a bounded sample of them.

    similarity         of two demonstrations of one class, of two of both classes, and of the classes
    false negatives    episodes in which a picture of the second class may well show the first
    ranks              how often neighbours come up, against p_j = (K + 1 - j) / (1 + 2 + ... + K)

Negatives are drawn by rank as in link-context learning (arXiv:2308.07891, section 3.2), which does not ask
how many of them are false. Of the two classes of an episode the first is the positive one and the other,
its neighbour, the negative one, whichever the query is of.

Hazard: these are estimates. A caption may name what its picture does not show, and most captions do not name
all that theirs does. Ranks differ from p_j where neighbours have too few pictures, and where
`hard_negative_share` is below 1: a concept drawn at random may be a neighbour by chance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.neighbours import Neighbours, draw_weights
from mmicl_core.errors import DataError

__all__ = ["FALSE_NEGATIVES", "measure_difficulty"]

FALSE_NEGATIVES = ("caption", "sha256", "perceptual_hash", "any")
"""How a picture of the negative class can agree with the positive one, and in any of these ways."""

READ_COLUMNS = ("id", "concepts", "rank", "similarity", "turns")
SIMILARITY_BINS = 40
RANK_BINS = 10
MOST_EXAMPLES = 3
EPISODES_EMBEDDED_AT_ONCE = 32
BETWEEN_WORDS = re.compile(r"[\W_]+")

Embed = Callable[[Sequence[int]], np.ndarray[Any, Any]]
Counts = np.ndarray[Any, np.dtype[np.float64]]


class _Episode(NamedTuple):
    """An episode with its classes and pictures as numbers of the catalogue."""

    id: str
    first: int
    rank: int | None
    pictures: list[int]
    """In the order of the prompt, the query's last."""
    negative: list[bool]
    """For each picture, whether it is one of the second class."""


def measure_difficulty(
    episodes: pa.Table,
    catalogue: Catalogue,
    neighbours: Neighbours | None,
    near_duplicate_bits: int,
    embed: Embed | None = None,
) -> dict[str, Any]:
    """Measure 2-way episodes; the result is plain values.

    Args:
        episodes: EPISODE rows of `two_way` episodes; see `mmicl_core.data.sampling`.
        catalogue: of the concepts that they were drawn from.
        near_duplicate_bits: pictures look alike whose perceptual hashes, of 64 bits, differ in so many or
            fewer.
        embed: numbers of pictures in the catalogue -> (N, E), zeros for what has no embedding; None where
            the corpus has none.

    Returns:
        `episodes`: how many there are. `class_similarity`, and `picture_similarity` of `positive` and
        `negative` pairs of demonstrations: histograms (`edges`, `counts`, `mean`), or None where there is
        nothing to count. `false_negatives`: for each of `FALSE_NEGATIVES` the `episodes` that could agree,
        how many do (`agreeing`), and the ids of a few. `ranks`: `bins` with the `observed` and `expected`
        share of each, or None where no negative is a neighbour.

    Raises:
        DataError: the episodes were drawn from another catalogue.
    """
    numbered = _number(episodes.select(list(READ_COLUMNS)), catalogue)
    similarity = episodes.column("similarity").drop_null().to_numpy().astype(np.float64)
    return {
        "episodes": len(numbered),
        "class_similarity": _histogram(similarity, _range(similarity)),
        "picture_similarity": None if embed is None else _picture_similarity(numbered, embed),
        "false_negatives": _false_negatives(numbered, catalogue, near_duplicate_bits),
        "ranks": None if neighbours is None else _ranks(numbered, neighbours),
    }


def _number(episodes: pa.Table, catalogue: Catalogue) -> list[_Episode]:
    rows = episodes.to_pylist()
    shown = [(turn["concept"], turn["picture"]) for row in rows for turn in row["turns"]]
    pictures = iter(_find_pictures(shown, catalogue))
    groups = _find_groups({concept for row in rows for concept in row["concepts"]}, catalogue)
    return [
        _Episode(
            row["id"],
            groups[row["concepts"][0]],
            row["rank"],
            [next(pictures) for _ in row["turns"]],
            [turn["concept"] != row["concepts"][0] for turn in row["turns"]],
        )
        for row in rows
    ]


def _find_groups(concepts: set[str], catalogue: Catalogue) -> dict[str, int]:
    names = sorted(concepts)
    known = catalogue.groups.column("group").combine_chunks()
    groups = pc.index_in(pa.array(names, pa.string()), value_set=known).to_pylist()
    if None in groups:
        raise DataError(
            f"the episodes are about {names[groups.index(None)]!r}, which the catalogue does not have: they "
            "were drawn from another one"
        )
    return dict(zip(names, groups, strict=True))


def _find_pictures(shown: Sequence[tuple[str, str]], catalogue: Catalogue) -> list[int]:
    """The numbers of pictures, each given by its concept and its key."""
    keys, found = catalogue.scan("picture"), dict[tuple[str, str], int]()
    of_concepts = dict[str, set[str]]()
    for concept, picture in shown:
        of_concepts.setdefault(concept, set()).add(picture)
    for concept, group in _find_groups(set(of_concepts), catalogue).items():
        first, wanted = int(catalogue.first[group]), sorted(of_concepts[concept])
        here = keys.slice(first, int(catalogue.total[group])).combine_chunks()
        places = pc.index_in(pa.array(wanted, pa.string()), value_set=here).to_pylist()
        if None in places:
            raise DataError(
                f"the episodes show {wanted[places.index(None)]!r} as a picture of {concept!r}, which the "
                "catalogue does not have: they were drawn from another one"
            )
        found |= {(concept, key): first + place for key, place in zip(wanted, places, strict=True)}
    return [found[one] for one in shown]


def _picture_similarity(episodes: Sequence[_Episode], embed: Embed) -> dict[str, Any]:
    alike, unlike = list[Counts](), list[Counts]()
    for start in range(0, len(episodes), EPISODES_EMBEDDED_AT_ONCE):
        some = episodes[start : start + EPISODES_EMBEDDED_AT_ONCE]
        vectors = np.asarray(embed([number for one in some for number in one.pictures]), dtype=np.float64)
        ends = np.cumsum([len(one.pictures) for one in some])
        # The query is no demonstration.
        for one, of_one in zip(some, np.split(vectors, ends[:-1]), strict=True):
            same, other = _pair_cosines(of_one[:-1], np.array(one.negative[:-1]))
            alike.append(same)
            unlike.append(other)
    pairs = {"positive": np.concatenate([[], *alike]), "negative": np.concatenate([[], *unlike])}
    return {kind: _histogram(cosines, (-1.0, 1.0)) for kind, cosines in pairs.items()}


def _pair_cosines(vectors: Counts, negative: np.ndarray[Any, Any]) -> tuple[Counts, Counts]:
    """Cosines of the pairs of one class, and of those of both; what has no embedding is in none."""
    lengths = np.linalg.norm(vectors, axis=1)
    there = lengths > 0
    vectors, negative = vectors[there] / lengths[there, None], negative[there]
    one, other = np.triu_indices(len(vectors), k=1)
    cosines = np.clip(np.sum(vectors[one] * vectors[other], axis=1), -1, 1)
    same = negative[one] == negative[other]
    return cosines[same], cosines[~same]


def _range(values: Counts) -> tuple[float, float]:
    """Round ends for the bins of similarities that may be sums of several."""
    return (
        (float(np.floor(min(values.min(), 0))), float(np.ceil(max(values.max(), 1))))
        if len(values)
        else (0, 1)
    )


def _histogram(values: Counts, ends: tuple[float, float]) -> dict[str, Any] | None:
    if not len(values):
        return None
    counts, edges = np.histogram(values, SIMILARITY_BINS, ends)
    return {"edges": edges.round(6).tolist(), "counts": counts.tolist(), "mean": float(values.mean())}


def _false_negatives(episodes: Sequence[_Episode], catalogue: Catalogue, bits: int) -> dict[str, Any]:
    negatives = [
        [number for number, negative in zip(one.pictures, one.negative, strict=True) if negative]
        for one in episodes
    ]
    captions = iter(catalogue.take(list(chain(*negatives)), ["text"]).column("text").to_pylist())
    tally = {kind: {"episodes": 0, "agreeing": 0, "examples": []} for kind in FALSE_NEGATIVES}
    for one, numbers in zip(episodes, negatives, strict=True):
        positives = [number for number in one.pictures if number not in numbers]
        told = {"caption": _names(catalogue.names[one.first], [next(captions) for _ in numbers])}
        told |= _look_alike(positives, numbers, catalogue, bits)
        told["any"] = any(told.values())
        for kind, agrees in told.items():
            _add(tally[kind], one.id, agrees)
    return tally


def _add(tally: dict[str, Any], episode: str, agrees: bool | None) -> None:
    tally["episodes"] += agrees is not None
    tally["agreeing"] += bool(agrees)
    if agrees and len(tally["examples"]) < MOST_EXAMPLES:
        tally["examples"].append(episode)


def _names(concept: str | None, captions: Sequence[str | None]) -> bool | None:
    """Whether a caption holds the words of a concept in a row; None where there is nothing to compare."""
    words = [re.escape(word) for word in BETWEEN_WORDS.split(concept or "") if word]
    texts = [caption for caption in captions if caption]
    if not words or not texts:
        return None
    pattern = re.compile(rf"(?<![^\W_]){BETWEEN_WORDS.pattern.join(words)}(?![^\W_])", re.IGNORECASE)
    return any(pattern.search(text) for text in texts)


def _look_alike(
    positives: Sequence[int], negatives: Sequence[int], catalogue: Catalogue, bits: int
) -> dict[str, bool | None]:
    ours, theirs = (list(map(catalogue.fingerprint, numbers)) for numbers in (positives, negatives))
    digests = {digest for digest, _ in ours}
    return {
        "sha256": any(digest in digests for digest, _ in theirs),
        "perceptual_hash": any((mine ^ yours).bit_count() <= bits for _, mine in ours for _, yours in theirs),
    }


def _ranks(episodes: Sequence[_Episode], neighbours: Neighbours) -> dict[str, Any] | None:
    ranked = [one for one in episodes if one.rank is not None]
    if not ranked:
        return None
    sizes = Counter(len(neighbours.of(one.first)[0]) for one in ranked)
    most = max(sizes)
    observed = np.bincount([one.rank for one in ranked if one.rank is not None], minlength=most + 1)[1:]
    assert len(observed) == most, "a rank is beyond the neighbours that the episodes were drawn from"
    expected = np.zeros(most)
    for size, count in sizes.items():
        weights = np.array(draw_weights(size), dtype=np.float64)
        expected[:size] += count * weights / weights.sum()
    bins = np.array_split(np.arange(most), min(RANK_BINS, most))
    return {
        "episodes": len(ranked),
        "without_rank": len(episodes) - len(ranked),
        "bins": [[int(ranks[0]) + 1, int(ranks[-1]) + 1] for ranks in bins],
        "observed": [float(observed[ranks].sum()) / len(ranked) for ranks in bins],
        "expected": [float(expected[ranks].sum()) / len(ranked) for ranks in bins],
    }
