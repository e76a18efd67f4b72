from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.data.splits import Split
from mmicl_core.errors import DataError


def test_split_trains_on_neither_a_held_out_concept_nor_the_held_out_style(tmp_path: Path) -> None:
    split = _load(tmp_path, {"held_out_concepts": ["cat"], "held_out_style": "ink"})
    seen = [split.trains_on(concept, style) for concept in ("cat", "cup") for style in ("ink", "oil")]
    assert seen == [False, False, False, True]


def test_corpus_without_a_split_is_told_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'"held_out_concepts": \[...\]'):
        Split.load(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"held_out_style": "ink"},
        {"held_out_concepts": ["cat"]},
        # A bare word is a sequence of letters: none of them is a concept, and nothing would be held out.
        {"held_out_concepts": "cat", "held_out_style": "ink"},
        {"held_out_concepts": ["cat"], "held_out_style": None},
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
        Split.load(tmp_path)


def _load(folder: Path, split: Any) -> Split:
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")
    return Split.load(folder)


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
