"""True names and descriptions of pictures of any concepts, as many as a 2-way episode shows.

Mixed among 2-way episodes they keep what a model says of a picture by itself (the [mix] of link-context
learning, arXiv:2308.07891, which mixes in the tasks of its base model). A description is made of the place
of the concept in a taxonomy; where a corpus has none, it is the caption of the picture, or the name alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mmicl_core.config.episodes import CaptionConfig
from mmicl_core.data import reasons
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.plans import Plan, Slot
from mmicl_core.data.pool import Pool
from mmicl_core.data.sections import Able, Section

__all__ = ["DESCRIBE_QUESTION", "NAME_QUESTION", "plan_caption"]

NAME_QUESTION = "Name it:"
DESCRIBE_QUESTION = "Describe it:"
KEYWORDS_IN_A_DESCRIPTION = 3
# Of one concept after another a picture is drawn; those met before are drawn again so often.
TRIES_FOR_A_PICTURE = 16


def plan_caption(slot: Slot, task: CaptionConfig, pool: Pool, rng: random.Random) -> Plan | str:
    """Draw the query, then what stands before it, each of a concept drawn for it alone."""
    section = pool.section(task.type)
    asked, shown = section.able(0, named=True), section.showing(named=True)
    if not len(asked.groups) or not len(shown.groups):
        return reasons.NO_NAMED_CONCEPT
    concept = int(rng.choice(asked.groups))
    query = rng.choice(section.asked(concept))
    concepts = {query: concept}
    candidates = _candidates(slot.shots * TRIES_FOR_A_PICTURE, shown, section, concepts, rng)
    pictures = pool.guard(section, query).first(candidates, slot.shots)
    if pictures is None:
        return reasons.LOOK_ALIKES
    pictures.append(query)
    told = [_tell(section.catalogue, concepts[picture], picture, rng) for picture in pictures]
    questions, answers = zip(*told, strict=True)
    scored = [True] * len(told)
    return Plan(slot, task.type, pictures, questions, answers, scored, demonstrations=slot.shots)


def _candidates(
    count: int, shown: Able, section: Section, concepts: dict[int, int], rng: random.Random
) -> Iterator[int]:
    for _ in range(count):
        concept = int(rng.choice(shown.groups))
        picture = rng.choice(section.shown(concept))
        concepts[picture] = concept
        yield picture


def _tell(catalogue: Catalogue, concept: int, picture: int, rng: random.Random) -> tuple[str, str]:
    name = catalogue.names[concept]
    if rng.random() < 0.5:
        return NAME_QUESTION, name
    kind, keywords = (
        catalogue.groups.column(column)[concept].as_py() for column in ("subcategory", "keywords")
    )
    words = sorted(keywords or ())
    if not kind and not words:
        return DESCRIBE_QUESTION, catalogue.scan("text")[picture].as_py() or name
    words = rng.sample(words, min(KEYWORDS_IN_A_DESCRIPTION, len(words)))
    whole = f"{name} ({kind.replace('-', ' ')})" if kind else name
    return DESCRIBE_QUESTION, ", ".join([whole, *words])
