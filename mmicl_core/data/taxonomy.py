"""Neighbours without a model: concepts of the same place in the corpus's own taxonomy.

A concept's neighbours are those of its subcategory (of its category, where it is alone there), those that
share most keywords first. Similarity is the share of keywords in common.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from mmicl_core.errors import DataError

__all__ = ["rank_by_taxonomy"]


def rank_by_taxonomy(groups: pa.Table, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """For each GROUP row its neighbours among those of its side, nearest first, with their similarity.

    Raises:
        DataError: the corpus tells no categories.
    """
    concepts = groups.select(["group", "keywords", "category", "subcategory", "held_out"]).to_pylist()
    if concepts and all(concept["category"] is None for concept in concepts):
        raise DataError(
            "neighbours.by 'taxonomy' needs the category of a concept, and no picture of the corpus tells "
            "one: set neighbours.by to 'similarity' and name an embedder"
        )
    near: dict[Any, list[int]] = {}
    far: dict[Any, list[int]] = {}
    for number, concept in enumerate(concepts):
        side, category = concept["held_out"], concept["category"]
        near.setdefault((side, category, concept["subcategory"]), []).append(number)
        far.setdefault((side, category), []).append(number)
    words = [frozenset(concept["keywords"] or ()) for concept in concepts]
    neighbours, similarity = [], []
    for number, concept in enumerate(concepts):
        side, category = concept["held_out"], concept["category"]
        pool = near[side, category, concept["subcategory"]]
        pool = pool if len(pool) > 1 else far[side, category]
        ranked = sorted(
            (-_overlap(words[number], words[other]), concepts[other]["group"], other)
            for other in pool
            if other != number
        )[:count]
        neighbours.append([other for _, _, other in ranked])
        similarity.append([-overlap for overlap, _, _ in ranked])
    return neighbours, similarity


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 0.0
