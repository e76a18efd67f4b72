"""How much faster answers grow together than one at a time, by one generator of nano behind Ray Serve.

    make bench

Records tokens a second of 16 clients that are answered 16 at a time, and of the same where one is answered at
a time, and their ratio: for descriptions of pictures, which nano ends after some 24 tokens, and for answers
of 128. Reading a picture and a prompt takes as long as some tokens of an answer and is done for each
question: the shorter the answers, the less is won.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.asked import BASE, CLIENTS, QUERIES, Episode, episodes, served, side_by_side
from tests.benchmarks.records import Figures

Bodies = list[dict[str, Any]]
SHORT, LONG = "descriptions", "answers of 128 tokens"


@pytest.mark.bench
@pytest.mark.alone
def test_answers_grow_three_times_as_fast_together_as_one_at_a_time(
    ray_cluster: None, tmp_path: Path, figures: Figures
) -> None:
    shown = episodes(QUERIES, tmp_path)
    asked = {
        SHORT: [_described(one, max_tokens=64) for one in shown],
        LONG: [_described(one, max_tokens=128, ignore_eos=True) for one in shown],
    }
    together, one_at_a_time = (_tokens_a_second(asked, rows, tmp_path, figures) for rows in (CLIENTS, 1))
    for name in asked:
        figures.absolute(f"{name}, together", together[name], "tokens a second")
        figures.absolute(f"{name}, one at a time", one_at_a_time[name], "tokens a second")
        figures.ratio(f"{name}, together over one at a time", together[name] / one_at_a_time[name])
    assert together[SHORT] >= 2 * one_at_a_time[SHORT]
    assert together[LONG] >= 3 * one_at_a_time[LONG]


def _tokens_a_second(
    asked: Mapping[str, Bodies], rows: int, folder: Path, figures: Figures
) -> dict[str, float]:
    found = dict[str, float]()
    with served(folder / str(rows), rows=rows) as address:
        for name, bodies in asked.items():
            side_by_side(address, bodies[:CLIENTS], CLIENTS)
            answers, seconds = side_by_side(address, bodies, CLIENTS)
            tokens = sum(one.usage["completion_tokens"] for one in answers)
            figures.absolute(f"{name}, an answer of {rows} at a time", tokens / len(answers), "tokens")
            found[name] = tokens / seconds
    return found


def _described(one: Episode, **more: Any) -> dict[str, Any]:
    picture = one.query["content"][0]
    words = {"type": "text", "text": "Describe the picture."}
    message = {"role": "user", "content": [picture, words]}
    return {"model": BASE, "messages": [message], "stream": True} | more
