"""How alike two concepts are, and which others a concept is contrasted with (arXiv:2308.07891, section 3.2).

    S = text_text TT + image_text (IT + TI) + image_image II

of cosine similarities between the names (T) and the mean pictures (I) of two concepts, as the paper's code
weighs them. S is an inner product behind a linear map: with the key f = [image; text] of one concept and the
question q = [image_image image + image_text text; image_text image + text_text text] of the other, S = q . f.

Shapes: C concepts, R of them as rows, E wide, L2-normalised or all zeros. Pictures may be None where all of
their weights are 0, and so may names.

Neighbours are of the same side: both held out, or neither. A concept is never its own neighbour, although
another one can be more similar to it than it is to itself. Similarities are summed in 64 bits and rounded to
32: the last bits of shorter sums depend on how many rows are compared at once, and would decide close ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np

from mmicl_core.config.corpus import NeighbourConfig
from mmicl_core.errors import ConfigError

__all__ = [
    "Numbers",
    "Sides",
    "Vectors",
    "Weights",
    "as_keys",
    "as_questions",
    "choose_intervals",
    "choose_nearest",
    "choose_released_intervals",
    "class_similarity",
    "rank_block",
]

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int32]]
Sides = np.ndarray[Any, np.dtype[np.bool_]]

CONCEPTS_AT_ONCE = 4096


class Weights(NamedTuple):
    """What each kind of similarity counts."""

    text_text: float
    image_text: float
    image_image: float

    @classmethod
    def of(cls, config: NeighbourConfig) -> Self:
        """As configured."""
        return cls(config.text_text, config.image_text, config.image_image)


def class_similarity(
    rows_image: Vectors | None,
    rows_text: Vectors | None,
    all_image: Vectors | None,
    all_text: Vectors | None,
    weights: Weights,
) -> Vectors:
    """Similarities of some concepts with all, (R, C).

    Args:
        rows_image, rows_text: (R, E) of the concepts compared.
        all_image, all_text: (C, E) of those that they are compared with.

    Raises:
        ConfigError: a weight counts what there is not, or compares pictures with names across two spaces.
    """
    questions = as_questions(rows_image, rows_text, weights)
    blocks = [np.zeros((len(questions), 0), np.float32)]
    total = len(next(vectors for vectors in (all_image, all_text) if vectors is not None))
    for start in range(0, total, CONCEPTS_AT_ONCE):
        part = slice(start, start + CONCEPTS_AT_ONCE)
        keys = as_keys(_take(all_image, part), _take(all_text, part), weights)
        blocks.append((questions @ keys.T).astype(np.float32))
    return np.concatenate(blocks, axis=1)


def as_keys(images: Vectors | None, texts: Vectors | None, weights: Weights) -> Doubles:
    """f of each concept, (C, E'), where E' adds up the widths of what has a weight.

    Raises:
        ConfigError: as `class_similarity`.
    """
    _check(images, texts, weights)
    across = weights.image_text
    return _beside(
        images if weights.image_image or across else None, texts if weights.text_text or across else None
    )


def as_questions(images: Vectors | None, texts: Vectors | None, weights: Weights) -> Doubles:
    """q of each concept, (R, E').

    Raises:
        ConfigError: as `class_similarity`.
    """
    _check(images, texts, weights)
    if weights.image_text:
        assert images is not None
        assert texts is not None
        image, text = images.astype(np.float64), texts.astype(np.float64)
        return _beside(
            weights.image_image * image + weights.image_text * text,
            weights.image_text * image + weights.text_text * text,
        )
    return _beside(
        weights.image_image * images.astype(np.float64)
        if images is not None and weights.image_image
        else None,
        weights.text_text * texts.astype(np.float64) if texts is not None and weights.text_text else None,
    )


def choose_nearest(similarity: Vectors, rows: Sequence[int], held_out: Sides, count: int) -> list[Numbers]:
    """The `count` most similar others of each row, nearest first; of equals, the lower number first.

    Args:
        similarity: (R, C).
        rows: the number of the concept of each row.
        held_out: (C,), the side of each concept; only those of the row's own side are chosen.
    """
    chosen = []
    for similar, row in zip(similarity, rows, strict=True):
        others = _others(row, held_out)
        values = similar[others]
        if len(others) > count:
            least = np.partition(values, len(values) - count)[len(values) - count]
            # With all that are as near as the last one, so that the lower numbers can come first.
            others = others[values >= least]
        chosen.append(_sorted(similar, others)[:count])
    return chosen


def choose_intervals(
    similarity: Vectors, rows: Sequence[int], held_out: Sides, count: int, ids: Sequence[str], seed: int
) -> list[Numbers]:
    """One other of each of `count` intervals of the others, sorted by similarity, as the paper has it.

    Intervals are as even as can be; of fewer than `count` others, all are chosen. The draw depends on the
    seed and the concept's id alone.

    Args:
        similarity, rows, held_out: as for `choose_nearest`.
        ids: (C,), the ids of all concepts.
    """
    chosen = []
    for similar, row in zip(similarity, rows, strict=True):
        ranked = _sorted(similar, _others(row, held_out))
        edges = [piece * len(ranked) // count for piece in range(count + 1)]
        chosen.append(_draw(ranked, edges, f"{seed}/{ids[row]}"))
    return chosen


def choose_released_intervals(
    similarity: Vectors, rows: Sequence[int], held_out: Sides, count: int, ids: Sequence[str], seed: int
) -> list[Numbers]:
    """One other of each interval as the paper's code cuts them.

    An interval is ceil(C / count) of the sorted concepts of the row's side. The concept itself is the first
    of all and is not chosen: of 900 concepts in 36 intervals the first has 24, each other one 25. Where C is
    no multiple of the width, the last one is short, and there may be fewer than `count`.

    Args: as for `choose_intervals`.
    """
    chosen = []
    for similar, row in zip(similarity, rows, strict=True):
        ranked = _sorted(similar, _others(row, held_out))
        total = len(ranked) + 1
        width = -(-total // count)
        # Edges count the concept itself, which is not in `ranked`.
        edges = [max(edge - 1, 0) for edge in [*range(0, total, width), total]]
        chosen.append(_draw(ranked, edges, f"{seed}/{ids[row]}"))
    return chosen


def rank_block(
    rows: range,
    images: Vectors | None,
    texts: Vectors | None,
    held_out: Sides,
    ids: Sequence[str],
    config: NeighbourConfig,
) -> tuple[list[Numbers], list[Vectors]]:
    """The neighbours of some concepts, nearest first, and their similarities; compared with all concepts.

    Args:
        images, texts: (C, E) of all concepts.
        held_out, ids: (C,), side and id of all concepts.

    Raises:
        ConfigError: as `class_similarity`.
    """
    block = slice(rows.start, rows.stop)
    similarity = class_similarity(
        _take(images, block), _take(texts, block), images, texts, Weights.of(config)
    )
    if config.choice == "nearest":
        chosen = choose_nearest(similarity, rows, held_out, config.count)
    else:
        choose = choose_intervals if config.choice == "intervals" else choose_released_intervals
        chosen = choose(similarity, rows, held_out, config.count, ids, config.seed)
    return chosen, [similar[numbers] for similar, numbers in zip(similarity, chosen, strict=True)]


def _check(images: Vectors | None, texts: Vectors | None, weights: Weights) -> None:
    if not any(weights):
        raise ConfigError("all three weights of neighbours are 0, so that all concepts are alike: set one")
    for name, weight, vectors, what in (
        ("text_text", weights.text_text, texts, "names"),
        ("image_image", weights.image_image, images, "pictures"),
    ):
        if weight and vectors is None:
            raise ConfigError(
                f"neighbours.{name} ({weight}) compares {what}, but the embedder embeds none: set it to 0"
            )
    if weights.image_text:
        widths = [0 if vectors is None else vectors.shape[1] for vectors in (images, texts)]
        if widths[0] != widths[1] or not widths[0]:
            raise ConfigError(
                f"neighbours.image_text ({weights.image_text}) compares pictures with names, which are "
                f"{widths[0]} and {widths[1]} wide: set it to 0, or embed with a dual_encoder"
            )


def _beside(images: Any, texts: Any) -> Doubles:
    return np.concatenate([part for part in (images, texts) if part is not None], axis=1, dtype=np.float64)


def _take(vectors: Vectors | None, part: slice) -> Vectors | None:
    return None if vectors is None else vectors[part]


def _others(row: int, held_out: Sides) -> Any:
    """The numbers of the concepts of the row's side but itself, ascending."""
    numbers = np.flatnonzero(held_out == held_out[row])
    return numbers[numbers != row]


def _sorted(similar: Vectors, others: Any) -> Numbers:
    ranked: Numbers = others[np.argsort(-similar[others], kind="stable")].astype(np.int32)
    return ranked


def _draw(ranked: Numbers, edges: Sequence[int], name: str) -> Numbers:
    """One of each interval between two edges that is not empty."""
    rng = random.Random(name)
    return ranked[[rng.randrange(low, high) for low, high in pairwise(edges) if low < high]]
