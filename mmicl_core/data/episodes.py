"""2-way episodes with hard negatives (link-context learning, arXiv:2308.07891, section 3.2).

An episode takes a concept and a neighbour of it, gives both a made-up name, shows S pictures of each
in random order and asks about one more. An episode is a pure function of (seed, number), so it is the
same whoever draws it, and how many draw.

The query's picture is never among the demonstrations, which the released code of the paper allows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmicl_core.config.data import EpisodeConfig, Part
from mmicl_core.data.names import made_up_names
from mmicl_core.data.neighbours import Concept, draw_weights, rank_neighbours
from mmicl_core.data.splits import Split

__all__ = ["NAME_QUESTION", "DESCRIBE_QUESTION", "Pool", "build_pool", "draw_episode"]

NAME_QUESTION = "Name it:"
DESCRIBE_QUESTION = "Describe it:"
KEYWORDS_IN_A_DESCRIPTION = 3


@dataclass(frozen=True)
class Pool:
    """The concepts of one part of a corpus and the pictures that may show or ask about them."""

    concepts: Mapping[str, Concept]
    shown: Mapping[str, tuple[str, ...]]
    """Keys of the pictures that may be demonstrations."""
    asked: Mapping[str, tuple[str, ...]]
    """Keys of the pictures that may be queries; the same ones, or those of the held-out style."""
    neighbours: Mapping[str, list[str]]

    @cached_property
    def most_shots(self) -> dict[str, int]:
        """How many pictures of each concept can be shown so that another one is left to ask about."""
        return {
            concept: min(len(shown), len({*shown, *self.asked[concept]}) - 1) if self.asked[concept] else 0
            for concept, shown in self.shown.items()
        }

    def can_show(self, concept: str, shots: int) -> bool:
        """Whether the concept has `shots` pictures to show and another one to ask about."""
        return shots <= self.most_shots[concept]


def build_pool(pairs: Iterable[Mapping[str, Any]], split: Split, part: Part, neighbours: int) -> Pool:
    """Gather the pictures of one part from PAIR rows (the image column is not needed)."""
    trained_on = part in ("train", "known_concepts")
    in_held_out_style = part in ("known_concepts", "held_out_style")
    concepts: dict[str, Concept] = {}
    shown: dict[str, list[str]] = {}
    asked: dict[str, list[str]] = {}
    for pair in pairs:
        concept, style = pair["concept"], pair["style"]
        if (concept in split.held_out_concepts) == trained_on:
            continue
        if concept not in concepts:
            keywords = frozenset(pair["keywords"])
            concepts[concept] = Concept(
                concept, pair["name"], keywords, pair["category"], pair["subcategory"]
            )
            shown[concept], asked[concept] = [], []
        if style != split.held_out_style:
            shown[concept].append(pair["picture"])
        if (style == split.held_out_style) == in_held_out_style:
            asked[concept].append(pair["picture"])
    ordered = dict(sorted(concepts.items()))
    return Pool(
        concepts=ordered,
        shown={concept: tuple(sorted(shown[concept])) for concept in ordered},
        asked={concept: tuple(sorted(asked[concept])) for concept in ordered},
        neighbours=rank_neighbours(ordered, neighbours),
    )


def draw_episode(number: int, pool: Pool, config: EpisodeConfig) -> dict[str, Any] | str:
    """Draw episode `number`: an EPISODE row, or the reason why it cannot be had."""
    rng = random.Random(f"{config.seed}/{number}")
    shots = _shots(number, config)
    if rng.random() < config.caption_share:
        return _caption_episode(number, shots, pool, rng)
    able = [concept for concept in pool.concepts if pool.can_show(concept, shots)]
    if len(able) < 2:
        return f"fewer than two concepts have {shots + 1} pictures"
    anchor = rng.choice(able)
    hard = rng.random() < config.hard_negative_share
    candidates = [concept for concept in pool.neighbours[anchor] if pool.can_show(concept, shots)]
    if hard and not candidates:
        return f"no neighbour has {shots + 1} pictures"
    if hard:
        negative = rng.choices(candidates, draw_weights(len(candidates)))[0]
    else:
        negative = rng.choice([concept for concept in able if concept != anchor])
    return _link_episode(number, shots, (anchor, negative), pool, config, rng)


def _shots(number: int, config: EpisodeConfig) -> int:
    first = 0
    for stage in config.stages:
        if number < first + stage.episodes:
            row = (number - first) // config.same_shots_in_a_row
            rng = random.Random(f"{config.seed}/shots/{first}/{row}")
            return rng.randint(stage.min_shots, stage.max_shots)
        first += stage.episodes
    raise AssertionError(f"episode {number} is beyond the {first} of all stages")


def _link_episode(
    number: int,
    shots: int,
    classes: tuple[str, str],
    pool: Pool,
    config: EpisodeConfig,
    rng: random.Random,
) -> dict[str, Any]:
    names = made_up_names(rng)
    right = rng.randrange(2)
    query = rng.choice(pool.asked[classes[right]])
    shown = []
    for concept, name in zip(classes, names, strict=True):
        pictures = [picture for picture in pool.shown[concept] if picture != query]
        shown += [(picture, name) for picture in rng.sample(pictures, shots)]
    rng.shuffle(shown)
    question = rng.choice(config.questions)
    turns, met = [], set[str]()
    for picture, name in shown:
        scored = config.answers_scored == "dense" and name in met
        turns.append({"picture": picture, "question": question, "answer": name, "scored": scored})
        met.add(name)
    turns.append({"picture": query, "question": question, "answer": names[right], "scored": True})
    return {
        "episode": number,
        "task": "link",
        "shots": shots,
        "concepts": list(classes),
        "names": names,
        "turns": turns,
        "answer": names[right],
        "other": names[1 - right],
    }


def _caption_episode(number: int, shots: int, pool: Pool, rng: random.Random) -> dict[str, Any] | str:
    """As many pictures as a link episode has, each asked for its true name or for a description."""
    turns = []
    shown = [concept for concept in pool.concepts if pool.shown[concept]]
    if not shown:
        return "no concept has a picture"
    for _ in range(2 * shots + 1):
        concept = pool.concepts[rng.choice(shown)]
        picture = rng.choice(pool.shown[concept.concept])
        question = rng.choice((NAME_QUESTION, DESCRIBE_QUESTION))
        answer = concept.name
        if question == DESCRIBE_QUESTION:
            kind = concept.subcategory.replace("-", " ")
            words = sorted(concept.keywords)
            words = rng.sample(words, min(KEYWORDS_IN_A_DESCRIPTION, len(words)))
            answer = ", ".join([f"{concept.name} ({kind})", *words])
        turns.append({"picture": picture, "question": question, "answer": answer, "scored": True})
    return {
        "episode": number,
        "task": "caption",
        "shots": shots,
        "concepts": [],
        "names": [],
        "turns": turns,
        "answer": turns[-1]["answer"],
        "other": "",
    }
