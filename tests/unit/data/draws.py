"""A small corpus of cats, cups and a lone sun in six styles, and how tests draw episodes from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.episodes import draw, render
from mmicl_core.data.neighbours import NEIGHBOURS, Neighbours
from mmicl_core.data.pool import Catalogues, Embed, Pool, open_pool
from tests.fakes import HELD_OUT_STYLE, TINY_STYLES, write_catalogue

CATS = [f"cat-{number}" for number in range(6)]
CUPS = [f"cup-{number}" for number in range(6)]
LONER = "sun"
STYLES = [*TINY_STYLES, "clay", "wool"]
HELD_OUT_CONCEPTS = {"cat-0", "cat-1", "cup-0", "cup-1"}
DRAWS = 150


def concept_rows() -> list[dict[str, Any]]:
    """CATALOGUED rows by concept; four concepts are held out, and one style of all of them."""
    return [
        {
            "group": concept,
            "picture": f"{concept}__{style}",
            "keywords": [concept.partition("-")[0], "thing", concept],
            "category": "animals" if concept in CATS else "objects",
            "subcategory": concept.partition("-")[0],
            "style": style,
            "held_out": concept in HELD_OUT_CONCEPTS,
            "kept_back": style == HELD_OUT_STYLE,
        }
        for concept in (*CATS, *CUPS, LONER)
        for style in STYLES
    ]


def near_concepts(catalogue: Catalogue) -> Neighbours:
    """Every concept's neighbours are those of its kind and side, by number; the sun's are the cups."""
    held_out = dict(zip(catalogue.ids, catalogue.held_out.tolist(), strict=True))
    lists = {}
    for concept in catalogue.ids:
        kind = CATS if concept in CATS else CUPS
        lists[concept] = [
            other
            for other in kind
            if other != concept and other in held_out and held_out[other] == held_out[concept]
        ]
    return neighbours_of(catalogue, lists)


def neighbours_of(catalogue: Catalogue, lists: Mapping[str, Sequence[str]]) -> Neighbours:
    """Neighbours by id, nearest first; the similarity falls by 1/8 from 1 with every rank."""
    number = {concept: group for group, concept in enumerate(catalogue.ids)}
    rows = [
        {
            "group": group,
            "neighbours": [number[other] for other in lists.get(concept, ())],
            "similarity": [1 - rank / 8 for rank in range(len(lists.get(concept, ())))],
        }
        for group, concept in enumerate(catalogue.ids)
    ]
    return Neighbours(pa.Table.from_pylist(rows, schema=NEIGHBOURS))


def config_of(shots: int = 6, *tasks: Mapping[str, Any], **settings: Any) -> EpisodeConfig:
    """A single stage of `shots` demonstrations of both classes."""
    stages = (
        ShotStage(
            episodes=100_000,
            min_shots_of_both_classes=shots,
            max_shots_of_both_classes=shots,
            odd_shots=shots % 2 == 1,
        ),
    )
    given: dict[str, Any] = {"stages": stages} | ({"tasks": tasks} if tasks else {})
    return EpisodeConfig(**(given | settings))


def concept_pool(
    folder: Path,
    config: EpisodeConfig,
    rows: Iterable[Mapping[str, Any]] | None = None,
    lists: Mapping[str, Sequence[str]] | None = None,
    **how: Any,
) -> Pool:
    """A pool of a catalogue by concept, with the neighbours of `lists` or those of `near_concepts`."""
    catalogue = write_catalogue(folder, concept_rows() if rows is None else rows, **how)
    neighbours = near_concepts(catalogue) if lists is None else neighbours_of(catalogue, lists)
    return open_pool(Catalogues(concept=catalogue), neighbours, config)


def mixed_pool(
    folder: Path,
    config: EpisodeConfig,
    *,
    documents: Iterable[Mapping[str, Any]] | None = None,
    tasks: Iterable[Mapping[str, Any]] | None = None,
    embed: Embed | None = None,
) -> Pool:
    """A pool of catalogues by document and by task."""
    catalogues = Catalogues(
        document=None if documents is None else write_catalogue(folder / "documents", documents),
        task=None if tasks is None else write_catalogue(folder / "tasks", tasks),
    )
    return open_pool(catalogues, None, config, embed)


def draw_rows(pool: Pool, config: EpisodeConfig, count: int = DRAWS) -> list[dict[str, Any]]:
    """EPISODE rows of the first `count` episodes that can be drawn."""
    drawn = [draw(number, pool, config) for number in range(count)]
    rows: list[dict[str, Any]] = render(
        [plan for plan in drawn if not isinstance(plan, str)], pool
    ).to_pylist()
    return rows


def reasons_of(pool: Pool, config: EpisodeConfig, count: int = 50) -> set[str | None]:
    """Why the first `count` episodes cannot be drawn; None stands for those that can."""
    drawn = [draw(number, pool, config) for number in range(count)]
    return {plan if isinstance(plan, str) else None for plan in drawn}


def pictures_of(episode: Mapping[str, Any]) -> list[str]:
    """The keys of the pictures of an EPISODE row, the query's last."""
    return [turn["picture"] for turn in episode["turns"]]


def concept_of(picture: str) -> str:
    """What a picture of the small corpus shows."""
    return picture.partition("__")[0]


def style_of(picture: str) -> str:
    """How a picture of the small corpus is drawn."""
    return picture.partition("__")[2]
