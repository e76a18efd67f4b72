"""The difficulty report of a dataset as charts, and how sure its shares are.

What is measured, and what it means, says `mmicl_core.data.difficulty`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmicl_core.evaluation.metrics import wilson_interval
from mmicl_core.evaluation.page_charts import Bar, bar_chart, column_chart
from mmicl_core.evaluation.pages import VERMILION, facts_table

__all__ = ["add_intervals", "render_difficulty"]

FALSE_NEGATIVES = {
    "caption": "its caption names the first",
    "sha256": "the same bytes",
    "perceptual_hash": "look-alikes",
    "any": "any of these",
}


def add_intervals(difficulty: Mapping[str, Any]) -> dict[str, Any]:
    """The same report, each kind of false negatives with its `share` and its `interval` of 95 %.

    Both are None where no episode could be compared.
    """
    kinds = {
        kind: counted | _share(counted["agreeing"], counted["episodes"])
        for kind, counted in difficulty["false_negatives"].items()
    }
    return {**difficulty, "false_negatives": kinds}


def render_difficulty(difficulty: Mapping[str, Any]) -> list[str]:
    """A section of a page.

    Args:
        difficulty: what `measure_difficulty` gave, after `add_intervals`.
    """
    parts = [f"<h2>How hard they are, by {difficulty['episodes']} 2-way episodes</h2>"]
    parts += _picture_similarity(difficulty["picture_similarity"])
    if difficulty["class_similarity"] is not None:
        histogram = difficulty["class_similarity"]
        parts.append(f"<p>Similarity of the two classes, {histogram['mean']:.3f} on average</p>")
        parts.append(_histogram("Similarity of the two classes", {"classes": histogram}, "cosine"))
    parts += _false_negatives(difficulty["false_negatives"])
    if difficulty["ranks"] is not None:
        parts += _ranks(difficulty["ranks"])
    return parts


def _share(agreeing: int, episodes: int) -> dict[str, Any]:
    if not episodes:
        return {"share": None, "interval": None}
    return {"share": agreeing / episodes, "interval": list(wilson_interval(agreeing, episodes))}


def _picture_similarity(similarity: Mapping[str, Any] | None) -> list[str]:
    if similarity is None:
        return ["<p>The corpus has no embedder, so pictures are not compared.</p>"]
    kinds = {kind: histogram for kind, histogram in similarity.items() if histogram is not None}
    if not kinds:
        return ["<p>No two demonstrations have an embedding, so pictures are not compared.</p>"]
    means = ", ".join(f"{kind} {histogram['mean']:.3f}" for kind, histogram in kinds.items())
    told = (
        f"Similarity of two demonstrations of one class (positive) or of both (negative); on average {means}"
    )
    return [f"<p>{told}</p>", _histogram("Similarity of two demonstrations", kinds, "cosine")]


def _histogram(title: str, kinds: Mapping[str, Mapping[str, Any]], under: str) -> str:
    edges = next(iter(kinds.values()))["edges"]
    shares = {
        kind: [count / sum(histogram["counts"]) for count in histogram["counts"]]
        for kind, histogram in kinds.items()
    }
    # What lies empty at both ends tells nothing.
    used = [place for place in range(len(edges) - 1) if any(heights[place] for heights in shares.values())]
    span = slice(used[0], used[-1] + 1)
    groups = [f"{edge:.3g}" for edge in edges[:-1]][span]
    series = {kind: heights[span] for kind, heights in shares.items()}
    return column_chart(title, groups, series, f"{under}, each column by its lower end")


def _false_negatives(kinds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    bars, examples = [], {}
    for kind, label in FALSE_NEGATIVES.items():
        counted = kinds[kind]
        if not counted["episodes"]:
            bars.append(Bar(label, 0.0, "nothing to compare", colour=VERMILION))
            continue
        low, high = counted["interval"]
        told = f"{_percent(counted['share'])} % [{_percent(low)}, {_percent(high)}] of {counted['episodes']}"
        bars.append(Bar(label, counted["share"], told, (low, high), VERMILION))
        if counted["examples"] and kind != "any":
            examples[label] = ", ".join(counted["examples"])
    told = "Episodes in which a picture of the second class may be one of the first, with 95 % intervals"
    parts = [f"<p>{told}</p>", bar_chart("False negatives", bars)]
    return [*parts, "<p>For example</p>", facts_table(examples)] if examples else parts


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def _ranks(ranks: Mapping[str, Any]) -> list[str]:
    groups = [str(first) if first == last else f"{first}-{last}" for first, last in ranks["bins"]]
    told = f"Ranks of the second class among the neighbours of the first, in {ranks['episodes']} episodes"
    if ranks["without_rank"]:
        told += f"; in {ranks['without_rank']} it is none of them"
    series = {kind: ranks[kind] for kind in ("observed", "expected")}
    return [f"<p>{told}</p>", column_chart("Ranks", groups, series, "rank, 1 is the nearest")]
