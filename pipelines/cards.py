"""What an evaluation found, as a card, beside the results and every adapter that was asked, and as a page."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mmicl_core.data.files import write_atomic
from mmicl_core.evaluation.answering import Cost
from mmicl_core.evaluation.card import render_card
from mmicl_core.evaluation.cells import Cell
from mmicl_core.evaluation.controls import Shown
from mmicl_core.evaluation.results_page import PLOTS, render_results
from mmicl_core.evaluation.summary import judge

__all__ = ["CARD_FILES", "compression_row", "examples", "write_card", "write_page"]

log = logging.getLogger("mmicl")

CARD_FILES = ("card.json", "card.html")
PAGE = "results.md"
EXAMPLES_OF_A_KIND = 2


def write_card(folder: Path, results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
    """Write `card.json` and `card.html`.

    Args:
        results: what the evaluation found, its `tasks` with their `examples`.
        pictures: encoded, those that examples show.
    """
    about = results["models"][-1]["name"]
    verdict = judge(results["tasks"][0], about)
    card = {
        "title": f"{about}: {', '.join(task['label'] for task in results['tasks'])}",
        "verdict": verdict,
        "tasks": results["tasks"],
        "compression": results["compression"],
        "facts": results["facts"],
    }
    log.info("%s", verdict["why"])
    write_atomic(folder / "card.json", json.dumps(card, indent=1) + "\n")
    write_atomic(folder / "card.html", render_card(card, pictures))


def write_page(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.md` and its plots."""
    page = render_results(results)
    for name, plot in page.plots.items():
        write_atomic(folder / PLOTS / name, plot + "\n")
    write_atomic(folder / PAGE, page.markdown)


def examples(cell: Cell, model: str, said: Sequence[str], right: Sequence[bool]) -> Iterator[dict[str, Any]]:
    """The first answers that are right, and the first that are wrong."""
    for wanted in (True, False):
        places = [place for place, is_right in enumerate(right) if is_right == wanted]
        for place in places[:EXAMPLES_OF_A_KIND]:
            yield _example(cell.shown[place], model, said[place]) | {"right": wanted}


def _example(shown: Shown, model: str, answer: str) -> dict[str, Any]:
    query = shown.query
    return {
        "demonstrations": [
            {"pictures": list(item.pictures), "question": item.question, "answer": item.answer}
            for item in shown.demonstrations
        ],
        "query": {"pictures": list(query.pictures), "question": query.question},
        "model": model,
        "answer": answer,
        "expected": query.facts.get("name") or " / ".join(dict.fromkeys(query.references)) or query.answer,
    }


def compression_row(task: str, model: str, point: Mapping[str, Any], costs: Sequence[Cost]) -> dict[str, Any]:
    """Score and cost of a model at one number of shots."""

    def mean(name: str) -> float | None:
        known = [getattr(cost, name) for cost in costs if getattr(cost, name) is not None]
        return fmean(known) if known else None

    return {
        "task": task,
        "model": model,
        **{name: point[name] for name in ("shots", "value", "low", "high")},
        "prompt_tokens": mean("prompt_tokens"),
        "kv_bytes": mean("kv_bytes"),
        "ttft_ms": median(cost.ttft_ms for cost in costs),
        "tokens_per_second": mean("tokens_per_second"),
    }
