"""The card of an evaluation in a real browser, made from scores as an evaluation makes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from playwright.sync_api import Browser

from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.evaluation.answering import Cost
from mmicl_core.evaluation.cells import Cell, Layout, lay_out
from mmicl_core.evaluation.controls import BLANK, CONTROLS, Shown
from mmicl_core.evaluation.summary import Scored, summarise
from mmicl_core.evaluation.tasks.base import Item, Prediction
from mmicl_core.evaluation.tasks.corpus import TwoWayTask
from pipelines.cards import compression_row, examples, write_card
from tests.browser import PHONE, SCREEN, chromium, cut_texts, overlapping_texts, too_wide, watched
from tests.fakes import draw_picture, encode_picture

QUERIES, SHOTS = 60, (0, 2, 8)
CLASSES = {"cat": "bako", "cup": "mute"}
LABEL = "two_way held_out_concepts"
LONG = "checkpoints/lcl-2026-05-11T08-13-55/step-00012000/adapter-of-the-last-run"
# It runs where it is taken for markup, closes what it may stand in, and asks an address.
HOSTILE = (
    "<script>document.title='run'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='run'\">"
    "'\" onmouseover=document.title='run' x='</style></svg></title>--><svg onload=document.title='run'>"
)

Words = Callable[[str], str]
"""Of a word, what stands in its place."""
Model = Callable[[Shown], str]


class _Drawn:
    """A picture for each key, whatever that is."""

    def read(self, key: str) -> bytes:
        return encode_picture(draw_picture(sum(key.encode())))


def _row(number: int, words: Words) -> dict[str, Any]:
    names = {one: words(f"{name}{number}") for one, name in CLASSES.items()}
    first, second = sorted(CLASSES, reverse=number % 4 < 2)
    order = [*[first, second] * (SHOTS[-1] // 2), [*CLASSES][number % 2]]
    turns = [
        {"picture": f"{one}/{number}/{place}", "question": words("This is"), "answer": names[one]}
        | {"concept": words(one)}
        for place, one in enumerate(order)
    ]
    (other,) = (name for one, name in names.items() if one != order[-1])
    return {"id": f"1-{number}", "turns": turns, "names": [*names.values()], "other": other}


def _sees(item: Item) -> str:
    """What a picture shows; nothing where it is blank."""
    (key,) = item.pictures
    return "" if key.startswith(BLANK) else key.partition("/")[0]


def _learns(shown: Shown) -> str:
    """One question of five it does not understand."""
    wanted = _sees(shown.query) if int(shown.query.id[2:]) % 5 else ""
    return next((one.answer for one in shown.demonstrations if _sees(one) == wanted), "a picture")


def _copies(shown: Shown) -> str:
    return shown.demonstrations[-1].answer if shown.demonstrations else ""


def _scored(layout: Layout, cell: Cell, *seeds: Model) -> Scored:
    said = ([model(one) for one in cell.shown] for model in seeds)
    score = layout.task.score
    statistics = (
        tuple(score(one.query, Prediction(answer)) for one, answer in zip(cell.shown, answers, strict=True))
        for answers in said
    )
    return Scored(cell, tuple(statistics), prompt_tokens=90.0 * cell.shots)


def _costs(summary: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for size, curve in zip((90, 30, 30), summary["curves"], strict=True):
        for point in curve["points"]:
            cost = Cost(40 + size * point["shots"], 2**20 * (1 + point["shots"]), 58.4, 21.0)
            yield compression_row(summary["label"], curve["model"], point, [cost])


def _results(words: Words) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What `results.json` would hold, and the pictures of its examples."""
    task = TwoWayTask([_row(number, words) for number in range(QUERIES)], _Drawn())
    layout = lay_out(task, EvaluateConfig(shots=SHOTS, controls=tuple(CONTROLS), queries=QUERIES))
    models = {words("full"): (_copies,), words("aim"): (_learns, _copies), words(LONG): (_learns,)}
    scores = {
        (name, cell.shots, cell.control): _scored(layout, cell, *seeds)
        for name, seeds in models.items()
        for cell in layout.cells
    }
    summary = summarise(layout, scores, words(LABEL), 1)
    (most,) = (cell for cell in layout.cells if (cell.shots, cell.control) == (SHOTS[-1], None))
    said = [_learns(shown) for shown in most.shown]
    right = [answer == shown.query.answer for answer, shown in zip(said, most.shown, strict=True)]
    chosen = list(examples(most, words(LONG), said, right))
    results = {
        "tasks": [summary | {"examples": chosen, "left_out": {words("swapped does not apply"): 3}}],
        "models": [{"name": name} for name in models],
        "compression": list(_costs(summary)),
        "facts": {"data fingerprint": "0123456789ab"},
    }
    turns = [turn for example in chosen for turn in (*example["demonstrations"], example["query"])]
    return results, {key: _Drawn().read(key) for turn in turns for key in turn["pictures"]}


WORDS: Mapping[str, Words] = {"plain": str, "hostile": partial(str.__add__, HOSTILE)}


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where each card is."""
    made = {}
    for kind, words in WORDS.items():
        folder = tmp_path_factory.mktemp(kind)
        write_card(folder, *_results(words))
        made[kind] = (folder / "card.html").as_uri()
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize("size", [SCREEN, PHONE])
@pytest.mark.parametrize("kind", WORDS)
def test_card_is_drawn_whole_whatever_it_is_called_and_however_narrow_the_window_is(
    browser: Browser, cards: dict[str, str], kind: str, size: tuple[int, int]
) -> None:
    with watched(browser, cards[kind], size) as seen:
        charts = seen.page.locator("svg")
        boxes = [chart.bounding_box() for chart in charts.all()]
        assert len(boxes) == 3
        assert all(box is not None and box["width"] > 300 and box["height"] > 100 for box in boxes)
        assert too_wide(seen.page) == []
        assert overlapping_texts(seen.page) == []
        assert cut_texts(seen.page) == []
        pictures = seen.page.locator("img").all()
        assert len(pictures) == 4 * (SHOTS[-1] + 1)
        assert all(picture.evaluate("one => one.complete && one.naturalWidth > 0") for picture in pictures)
        assert seen.errors == []


@pytest.mark.parametrize("size", [SCREEN, PHONE])
def test_verdict_is_seen_without_scrolling(
    browser: Browser, cards: dict[str, str], size: tuple[int, int]
) -> None:
    with watched(browser, cards["plain"], size) as seen:
        box = seen.page.locator(".verdict").bounding_box()
        assert box is not None and box["width"] > 300 and box["height"] > 20
        assert min(box["x"], box["y"]) >= 0
        assert box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1]
        assert "Learns in context" in seen.page.locator(".verdict").inner_text()


@pytest.mark.parametrize("kind", WORDS)
def test_card_asks_for_nothing_and_runs_nothing(browser: Browser, cards: dict[str, str], kind: str) -> None:
    with watched(browser, cards[kind]) as seen:
        assert seen.page.inner_text("h1") == f"{WORDS[kind](LONG)}: {WORDS[kind](LABEL)}"
        assert len(seen.page.locator("svg").all()) == 3
        for pointed_at in (*seen.page.locator("svg").all(), *seen.page.locator("figure").all()):
            pointed_at.hover()
        assert seen.page.title() == seen.page.inner_text("h1")
        assert seen.requests == [cards[kind]]
        assert seen.errors == []


def test_card_can_be_printed(browser: Browser, cards: dict[str, str]) -> None:
    with watched(browser, cards["plain"]) as seen:
        printed = seen.page.pdf(format="A4")
    assert printed.startswith(b"%PDF-") and len(printed) > 20_000
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
