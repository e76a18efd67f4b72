from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.data.splits import Split, share_of
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError


def test_split_holds_out_the_concepts_that_it_names_and_no_others(tmp_path: Path) -> None:
    split = _load(tmp_path, {"held_out_concepts": ["cat"], "held_out_style": "ink"})
    assert [split.holds_out(concept) for concept in ("cat", "cup")] == [True, False]
    assert split.held_out_style == "ink"
    assert _load(tmp_path, {"held_out_concepts": ["cat"]}).held_out_style is None


def test_corpus_without_a_split_holds_out_the_share_that_is_asked_for(tmp_path: Path) -> None:
    concepts = [f"concept {number}" for number in range(4000)]
    nothing = Split.load(Location(str(tmp_path)))
    assert not any(map(nothing.holds_out, concepts))
    split = Split.load(Location(str(tmp_path)), 0.25, seed=3)
    held_out = {concept for concept in concepts if split.holds_out(concept)}
    # Four sigma of 4,000 draws are 0.027.
    assert len(held_out) / len(concepts) == pytest.approx(0.25, abs=0.027)
    again = Split.load(Location(str(tmp_path)), 0.25, seed=3)
    assert held_out == {concept for concept in concepts if again.holds_out(concept)}
    other = Split.load(Location(str(tmp_path)), 0.25, seed=4)
    assert held_out != {concept for concept in concepts if other.holds_out(concept)}
    assert all(0 <= share_of(concept, 3) < 1 for concept in concepts)


def test_share_beside_a_split_that_names_its_concepts_is_refused(tmp_path: Path) -> None:
    _load(tmp_path, {"held_out_concepts": ["cat"]})
    with pytest.raises(DataError, match=r"held_out_share \(0.1\)"):
        Split.load(Location(str(tmp_path)), 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"held_out_style": "ink"},
        # A bare word is a sequence of letters: none of them is a concept, and nothing would be held out.
        {"held_out_concepts": "cat", "held_out_style": "ink"},
        {"held_out_concepts": ["cat"], "held_out_style": 1},
        {"held_out_concepts": [1], "held_out_style": "ink"},
        ["cat"],
    ],
)
def test_split_of_another_form_is_refused_by_name(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split\.json is not a split"):
        _load(tmp_path, wrong)


def test_split_that_is_not_json_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"split\.json is not a split"):
        Split.load(Location(str(tmp_path)))


def _load(folder: Path, split: Any) -> Split:
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")
    return Split.load(Location(str(folder)))


@pytest.mark.parametrize(
    ("concepts", "styles", "named"),
    [({"cup"}, {"ink"}, "concept 'cat'"), ({"cat", "cup"}, {"oil"}, "style 'ink'")],
)
def test_split_that_holds_out_what_the_corpus_lacks_is_refused_by_name(
    concepts: set[str], styles: set[str], named: str, tmp_path: Path
) -> None:
    split = _load(tmp_path, {"held_out_concepts": ["cat"], "held_out_style": "ink"})
    # With both there it says nothing.
    split.check(concepts | {"cat"}, styles | {"ink"})
    with pytest.raises(DataError, match=named):
        split.check(concepts, styles)
