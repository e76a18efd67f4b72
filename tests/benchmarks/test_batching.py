"""How much faster answers grow together than one at a time, by one generator of nano behind Ray Serve.

    make bench

Prints tokens a second of 16 clients that are answered 16 at a time, and of the same where one is answered at
a time, and their ratio.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.asked import BASE, CLIENTS, QUERIES, Episode, episodes, served, side_by_side

LONG_ANSWER = 64


@pytest.mark.bench
@pytest.mark.alone
@pytest.mark.xfail(
    strict=True, reason="2.3 to 2.6: answers are 24 tokens long, behind a picture and HTTP each"
)
def test_answers_grow_three_times_as_fast_together_as_one_at_a_time(
    ray_cluster: None, tmp_path: Path
) -> None:
    bodies = [_long(one) for one in episodes(QUERIES, tmp_path)]

    def tokens_a_second(rows: int) -> float:
        with served(tmp_path / str(rows), rows=rows) as address:
            side_by_side(address, bodies[:CLIENTS], CLIENTS)
            answers, seconds = side_by_side(address, bodies, CLIENTS)
            tokens = sum(one.usage["completion_tokens"] for one in answers)
            print(
                json.dumps(
                    {"answers at a time": rows, "tokens of an answer": round(tokens / len(answers), 1)}
                )
            )
            return float(tokens / seconds)

    together, one_at_a_time = tokens_a_second(CLIENTS), tokens_a_second(1)
    told = {"together": round(together), "one at a time": round(one_at_a_time)}
    print(json.dumps({"tokens a second of 16 clients": told, "ratio": round(together / one_at_a_time, 2)}))
    assert together >= 3 * one_at_a_time


def _long(one: Episode) -> dict[str, Any]:
    picture = one.query["content"][0]
    asked = {"type": "text", "text": "Describe the picture."}
    message = {"role": "user", "content": [picture, asked]}
    return {"model": BASE, "messages": [message], "max_tokens": LONG_ANSWER, "stream": True}
