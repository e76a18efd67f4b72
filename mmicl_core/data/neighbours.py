"""Neighbour concepts: where hard negatives come from.

A concept's neighbours are those of its subcategory (of its category, where it is alone there), those
that share most keywords first. Unlike the CLIP ranking of link-context learning (arXiv:2308.07891,
section 3.2) this needs no model, so it is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Concept", "draw_weights", "rank_neighbours"]


@dataclass(frozen=True)
class Concept:
    """A concept of a corpus, without its pictures."""

    concept: str
    name: str
    keywords: frozenset[str]
    category: str
    subcategory: str


def rank_neighbours(concepts: Mapping[str, Concept], limit: int) -> dict[str, list[str]]:
    """For each concept its neighbours among the others, nearest first, `limit` at most."""
    by_subcategory: dict[str, list[Concept]] = {}
    by_category: dict[str, list[Concept]] = {}
    for concept in concepts.values():
        by_subcategory.setdefault(concept.subcategory, []).append(concept)
        by_category.setdefault(concept.category, []).append(concept)
    ranked = {}
    for name, concept in concepts.items():
        near = by_subcategory[concept.subcategory]
        pool = near if len(near) > 1 else by_category[concept.category]
        others = [other for other in pool if other.concept != name]
        others.sort(key=lambda other: (-_overlap(concept, other), other.concept))
        ranked[name] = [other.concept for other in others[:limit]]
    return ranked


def draw_weights(count: int) -> Sequence[int]:
    """Chances of the neighbours by rank, K, K - 1, ... 1: the paper's p_j = (101 - j) / 5050 at 100."""
    return range(count, 0, -1)


def _overlap(one: Concept, other: Concept) -> float:
    union = len(one.keywords | other.keywords)
    return len(one.keywords & other.keywords) / union if union else 0.0
