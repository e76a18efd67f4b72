from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from scipy.stats import chisquare

from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.data.pool import Pool
from tests.unit.data.draws import config_of, draw_rows, mixed_pool, pictures_of, reasons_of


def _config(**settings: Any) -> EpisodeConfig:
    part = settings.pop("part", "train")
    return config_of(2, {"type": "interleaved", **settings}, part=part)


def _page(name: str, texts: str, **more: Any) -> list[dict[str, Any]]:
    """A document of a pair for each letter; `.` is a picture without a text."""
    return [
        {"group": name, "picture": f"{name}{place}", "position": 3 * place, "concept": None, **more}
        | {"text": None if letter == "." else f"{name}: {letter}"}
        for place, letter in enumerate(texts)
    ]


def _pool(folder: Path, config: EpisodeConfig, *pages: list[dict[str, Any]]) -> Pool:
    return mixed_pool(folder, config, documents=[row for page in pages for row in page])


def test_target_stands_last_and_the_pairs_right_before_it_in_their_order(tmp_path: Path) -> None:
    config = _config(max_demonstrations=3, question="What?")
    targets = Counter[str]()
    for episode in draw_rows(_pool(tmp_path, config, _page("p", "abcdefg")), config, 1000):
        places = [int(picture[1:]) for picture in pictures_of(episode)]
        target = places[-1]
        assert places == list(range(max(0, target - 3), target + 1))
        assert [turn["answer"] for turn in episode["turns"]] == [f"p: {'abcdefg'[place]}" for place in places]
        assert {turn["question"] for turn in episode["turns"]} == {"What?"}
        assert [turn["scored"] for turn in episode["turns"]] == [False] * (len(places) - 1) + [True]
        assert episode["shots_of_both_classes"] == len(places) - 1
        assert episode["answer"] == episode["turns"][-1]["answer"]
        targets[target] += 1
    assert set(targets) == {1, 2, 3, 4, 5, 6}
    assert chisquare(list(targets.values())).pvalue > 1e-3


def test_documents_are_drawn_equally_often_whatever_their_length(tmp_path: Path) -> None:
    config = _config()
    pool = _pool(tmp_path, config, _page("short", "ab"), _page("long", "abcdefghijkl"), _page("one", "a"))
    drawn = Counter(pictures_of(episode)[0][:4] for episode in draw_rows(pool, config, 1000))
    assert set(drawn) == {"shor", "long"}
    assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_pictures_without_a_text_are_passed_over(tmp_path: Path) -> None:
    config = _config()
    for episode in draw_rows(_pool(tmp_path, config, _page("p", "a.b..c")), config):
        assert pictures_of(episode) in (["p0", "p2"], ["p0", "p2", "p5"])


def test_documents_without_two_texts_are_a_reason(tmp_path: Path) -> None:
    config = _config()
    reasons = reasons_of(_pool(tmp_path, config, _page("p", "a..")), config)
    assert reasons == {"interleaved: document with fewer than two texts"}
    reasons = reasons_of(_pool(tmp_path / "other", config, _page("p", "a")), config)
    assert reasons == {"interleaved: no document has two pictures"}


def test_picture_like_the_target_never_stands_before_it(tmp_path: Path) -> None:
    page = _page("p", "abcdef")
    # The last but one looks like the first.
    page[4]["perceptual_hash"] = page[0]["perceptual_hash"] = 5
    near, far = _config(max_demonstrations=8), _config(max_demonstrations=3)
    targets = {pictures_of(row)[-1] for row in draw_rows(_pool(tmp_path / "near", near, page), near)}
    assert targets == {"p1", "p2", "p3", "p5"}
    # Three demonstrations do not reach back to it.
    targets = {pictures_of(row)[-1] for row in draw_rows(_pool(tmp_path / "far", far, page), far)}
    assert targets == {"p1", "p2", "p3", "p4", "p5"}


def test_document_of_look_alikes_is_a_reason(tmp_path: Path) -> None:
    config = _config()
    pool = _pool(tmp_path, config, _page("p", "abc", perceptual_hash=5))
    assert reasons_of(pool, config) == {"interleaved: too few pictures unlike the one asked about"}


def test_held_out_document_keeps_its_order_over_pictures_kept_back(tmp_path: Path) -> None:
    page = _page("p", "abcd", held_out=True)
    page[1]["kept_back"] = True
    config = _config(part="held_out_concepts")
    longest = max((pictures_of(row) for row in draw_rows(_pool(tmp_path, config, page), config)), key=len)
    assert longest == ["p0", "p1", "p2", "p3"]
    config = _config()
    assert reasons_of(_pool(tmp_path / "train", config, page), config) == {
        "interleaved: no document has two pictures"
    }
