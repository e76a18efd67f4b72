from __future__ import annotations

import base64
from typing import Any

import pytest

from mmicl_core.evaluation.preview import (
    PreviewedEpisode,
    ShownPicture,
    render_corpus_preview,
    render_episodes_preview,
)
from tests.unit.evaluation.markup import parse, told

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(1)'>\"</style>"
COUNTS = {
    "read": 10,
    "kept": {"reading": 8, "looking": 7},
    "reasons": [
        {"stage": "reading", "reason": "no picture", "count": 2},
        {"stage": "looking", "reason": "corrupt picture", "count": 1},
    ],
}


def _shown(words: str, small: bytes | None = b"RIFF") -> ShownPicture:
    return ShownPicture(small, words, words, words, words)


def _row(**columns: Any) -> dict[str, Any]:
    shown = [("cat", "bako"), ("dog", "mute"), ("cat", "bako")]
    row = {
        "id": "0-7",
        "task": "two_way",
        "shots_of_both_classes": 2,
        "concepts": ["cat", "dog"],
        "names": ["bako", "mute"],
        "rank": 3,
        "similarity": 0.25,
        "turns": [
            {"picture": f"p{n}", "concept": concept, "question": "This is", "answer": name}
            for n, (concept, name) in enumerate(shown)
        ],
        "answer": "bako",
        "other": "mute",
    }
    return row | columns


def _episodes(row: dict[str, Any], difficulty: Any = None, small: tuple[bytes | None, ...] = ()) -> str:
    pictures = small or tuple(b"RIFF%d" % n for n in range(len(row["turns"])))
    episode = PreviewedEpisode(row, pictures, ["a cat", "a dog"][: len(row["concepts"])])
    return render_episodes_preview({"built": 1, "skipped_by_reason": {}}, [episode], difficulty)


def _hostile_pages() -> list[str]:
    turn = {"picture": HOSTILE, "concept": HOSTILE, "question": HOSTILE, "answer": HOSTILE}
    row = _row(id=HOSTILE, names=[HOSTILE] * 2, turns=[turn, turn | {"picture": None}, turn], other=HOSTILE)
    episode = PreviewedEpisode(row, [b"RIFF"] * 3, [HOSTILE] * 2)
    counts = COUNTS | {"reasons": [{"stage": "reading", "reason": HOSTILE, "count": 1}]}
    return [
        render_corpus_preview(HOSTILE, counts, [_shown(HOSTILE)], [_shown(HOSTILE)]),
        render_episodes_preview({"built": 1, "skipped_by_reason": {HOSTILE: 1}}, [episode], None),
    ]


@pytest.mark.parametrize("page", _hostile_pages(), ids=["corpus", "episodes"])
def test_markup_in_captions_names_and_keys_is_shown_and_not_obeyed(page: str) -> None:
    elements = parse(page)
    assert HOSTILE in told(page)
    assert "script" not in {element for element, _ in elements}
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert sum(element == "style" for element, _ in elements) == 1
    links = [
        value for _, attributes in elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert links and all((link or "").startswith("data:image/webp;base64,") for link in links)


def test_corpus_page_shows_each_picture_with_what_is_known_of_it_and_an_empty_frame_where_none_is() -> None:
    sampled = [
        ShownPicture(b"RIFF1", "shard/1", "cat", "a cat asleep", "9 x 9 PNG, MIT"),
        ShownPicture(None, "shard/2", "dog", "", "5 x 5 PNG"),
    ]
    left_out = [ShownPicture(b"RIFF3", "shard/3", "rare concept", "group owl", "grouping")]
    page = render_corpus_preview("corpus", COUNTS, sampled, left_out)
    shown = told(page)
    for words in ("a cat asleep", "9 x 9 PNG, MIT", "shard/2", "no picture", "rare concept", "group owl"):
        assert words in shown
    assert sum(element == "img" for element, _ in parse(page)) == 2
    assert "left out" not in told(render_corpus_preview("corpus", COUNTS, sampled, []))


def test_corpus_page_tells_what_became_of_all_samples() -> None:
    shown = told(render_corpus_preview("corpus", COUNTS, [], []))
    for line in ("kept in reading", "8 (80 %)", "no picture", "2 (20 %)", "kept in looking", "1 (10 %)"):
        assert line in shown
    # Every reason stands behind the stage that gave it.
    places = [shown.index(line) for line in ("kept in reading", "2 (20 %)", "kept in looking", "1 (10 %)")]
    assert places == sorted(places)


def test_episode_is_shown_in_the_order_of_its_prompt_with_the_query_last() -> None:
    page = _episodes(_row())
    pictures = [attributes["src"] or "" for element, attributes in parse(page) if element == "img"]
    shown = [base64.b64decode(source.partition(",")[2]) for source in pictures]
    assert shown == [b"RIFF0", b"RIFF1", b"RIFF2"]
    kinds = [
        (attributes["class"] or "").split() for element, attributes in parse(page) if element == "figure"
    ]
    assert kinds == [["first"], ["second"], ["first", "query"]]
    lines = [line for line in told(page).splitlines() if line.strip()]
    assert lines[-6:] == ["bako", "mute", "This is", "bako", "the query, not ", "mute"]


def test_episode_tells_its_id_true_names_rank_and_similarity() -> None:
    shown = told(_episodes(_row()))
    for words in ("0-7", "a cat", "a dog", "neighbour 3, similarity 0.250", "2 demonstrations"):
        assert words in shown
    assert "neighbour" not in told(_episodes(_row(rank=None, similarity=None)))


def test_turn_without_a_picture_is_words_alone_and_an_unreadable_one_an_empty_frame() -> None:
    turns = [
        {"picture": "p", "concept": None, "question": "What is it?", "answer": "A boat."},
        {"picture": None, "concept": None, "question": "Where?", "answer": "At sea."},
    ]
    row = _row(task="instruction", concepts=[], names=[], rank=None, turns=turns, other="")
    page = _episodes(row, small=(None, None))
    figures = [attributes["class"] or "" for element, attributes in parse(page) if element == "figure"]
    assert ["talk" in kinds for kinds in figures] == [False, True]
    shown = told(page)
    assert shown.count("no picture") == 1
    assert "Where?" in shown and "At sea." in shown and "against" not in shown


def test_numbers_that_could_not_be_drawn_are_listed() -> None:
    counts = {"built": 0, "skipped_by_reason": {"two_way: no neighbour": 12}}
    shown = told(render_episodes_preview(counts, [], None))
    assert "two_way: no neighbour" in shown and "12" in shown
