from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from scipy.stats import chisquare

from mmicl_core.config.episodes import Part
from mmicl_core.data.sections import Section, shuffled
from tests.fakes import HELD_OUT_STYLE
from tests.unit.data.draws import HELD_OUT_CONCEPTS, concept_pool, concept_rows, config_of, mixed_pool

PARTS: tuple[Part, ...] = get_args(Part)


def _keys(section: Section, spans: Any) -> set[str]:
    numbers = [number for group in range(len(section.catalogue)) for number in spans(group)]
    return set(section.catalogue.column("picture", numbers))


@pytest.mark.parametrize("part", PARTS)
def test_section_of_concepts_holds_exactly_the_pictures_of_its_part(tmp_path: Path, part: Part) -> None:
    section = concept_pool(tmp_path, config_of(part=part), buckets=3).section("two_way")
    known = part in ("train", "known_concepts")
    rows = [row for row in concept_rows() if (row["group"] in HELD_OUT_CONCEPTS) != known]
    in_held_out_style = {row["picture"] for row in rows if row["style"] == HELD_OUT_STYLE}
    others = {row["picture"] for row in rows} - in_held_out_style
    assert _keys(section, section.shown) == others
    expected = in_held_out_style if part in ("known_concepts", "held_out_style") else others
    assert _keys(section, section.asked) == expected


def _mixed_rows() -> list[dict[str, Any]]:
    return [
        {
            "group": group,
            "picture": f"{group}-{number}",
            "kept_back": number > 2,
            "held_out": group == "apart",
        }
        for group in ("first", "second", "apart")
        for number in range(5)
    ]


@pytest.mark.parametrize("part", PARTS)
def test_documents_and_tasks_of_the_held_out_parts_are_all_that_training_does_not_have(
    tmp_path: Path, part: Part
) -> None:
    config = config_of(2, {"type": "interleaved"}, {"type": "instruction"}, part=part)
    pool = mixed_pool(tmp_path, config, documents=_mixed_rows(), tasks=_mixed_rows())
    trained = {row["picture"] for row in _mixed_rows() if not row["kept_back"] and not row["held_out"]}
    every = {row["picture"] for row in _mixed_rows()}
    for task in ("interleaved", "instruction"):
        section = pool.section(task)
        expected = trained if part == "train" else every - trained
        assert _keys(section, section.shown) == _keys(section, section.asked) == expected


@pytest.mark.parametrize("part", PARTS)
def test_able_groups_can_show_so_many_pictures_and_ask_about_another(tmp_path: Path, part: Part) -> None:
    rows = [
        {"group": f"{side}-{opened}-{kept}", "picture": f"{side}-{opened}-{kept}-{number}"}
        | {"held_out": side == "out", "kept_back": number >= opened}
        for side in ("in", "out")
        for opened in range(4)
        for kept in range(3)
        for number in range(opened + kept)
    ]
    section = concept_pool(tmp_path, config_of(part=part), rows, lists={}, buckets=3).section("two_way")
    for shots in range(5):
        able = section.able(shots)
        by_hand = [
            group
            for group in range(len(section.catalogue))
            if any(
                len(set(section.shown(group)) - {query}) >= shots and section.shown(group)[:1] or not shots
                for query in section.asked(group)
            )
        ]
        ids = [section.catalogue.ids[group] for group in by_hand]
        assert [section.catalogue.ids[group] for group in able.groups] == sorted(ids)
        assert np.flatnonzero(able.among).tolist() == by_hand
    showing = {section.catalogue.ids[group] for group in section.showing().groups}
    assert showing == {id for number, id in enumerate(section.catalogue.ids) if len(section.shown(number))}


def test_named_groups_are_those_with_more_than_blanks_for_a_name(tmp_path: Path) -> None:
    names = {"a": "cat", "b": "", "c": " ", "d": None, "e": "cup"}
    rows = [{"group": group, "picture": f"{group}1", "name": name} for group, name in names.items()]
    section = concept_pool(tmp_path, config_of(), rows, lists={}).section("caption")
    assert (
        section.able(0, named=True).groups.tolist() == section.showing(named=True).groups.tolist() == [0, 4]
    )
    assert len(section.able(0).groups) == 5


def test_group_is_drawn_as_often_as_it_has_pictures(tmp_path: Path) -> None:
    sizes = {"few": 1, "many": 6, "some": 3}
    rows = [{"group": g, "picture": f"{g}-{n}"} for g, size in sizes.items() for n in range(size)]
    section = mixed_pool(tmp_path, config_of(2, {"type": "instruction"}), tasks=rows).section("instruction")
    rng = random.Random(0)
    drawn = Counter(section.catalogue.ids[section.draw_by_pictures(rng) or 0] for _ in range(5000))
    assert chisquare([drawn[g] for g in sizes], [500 * size for size in sizes.values()]).pvalue > 1e-3


def test_shuffling_gives_every_picture_once_and_every_order_equally_often() -> None:
    rng = random.Random(0)
    assert sorted(shuffled(range(5, 200), rng)) == list(range(5, 200))
    orders = Counter(tuple(shuffled(np.array([4, 7, 9, 11]), rng)) for _ in range(12_000))
    assert len(orders) == 24
    assert chisquare(list(orders.values())).pvalue > 1e-3
    firsts = Counter(next(shuffled(range(10), rng)) for _ in range(5000))
    assert chisquare([firsts[number] for number in range(10)]).pvalue > 1e-3
