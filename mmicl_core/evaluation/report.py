"""A finished run as a page that needs nothing else: the episode asked, the bars, the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mmicl_core.evaluation.page_charts import Bar, bar_chart
from mmicl_core.evaluation.pages import facts_table, picture, render_page

__all__ = ["CONDITION_LABELS", "ShownEpisode", "accuracy_table", "render_report"]

CONDITION_LABELS = {
    "zero_shot": "no demonstrations",
    "full": "full demonstrations",
    "adapted": "fused, adapter just trained",
    "shipped": "fused, shipped adapter",
    "swapped": "full, the two names swapped",
}

STYLE = "figure img{width:72px;height:72px}"
CHANCE = (0.5, "chance, 0.500: one of the two names, at random")


@dataclass(frozen=True)
class ShownEpisode:
    """The episode that was asked over HTTP: encoded pictures with their names, and the query's."""

    demonstrations: Sequence[tuple[bytes, str]]
    query: bytes
    answer: str
    expected: str
    right: bool


def accuracy_table(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, accuracy and interval of every condition that was measured, for print."""
    rows = []
    for condition, label in CONDITION_LABELS.items():
        if condition in evaluation:
            score = evaluation[condition]
            interval = f"{score['low']:.3f} .. {score['high']:.3f}"
            rows.append((label, f"{score['accuracy']:.3f}", interval))
    return rows


def render_report(report: Mapping[str, Any], episode: ShownEpisode) -> str:
    """The page as HTML, pictures inside."""
    evaluation, tokens = report["evaluation"], report["tokens"]
    shots = evaluation["shots"]
    prompt = {kind: shots * tokens[f"demonstration_{kind}"] for kind in ("full", "adapted")}
    ratio = tokens["demonstration_full"] / tokens["demonstration_adapted"]
    bars = [
        _accuracy_bar(CONDITION_LABELS[name], evaluation[name])
        for name in CONDITION_LABELS
        if name in evaluation
    ]
    parts = [
        "<h1>Learning new names from demonstrations</h1>",
        f"<p class=lead>{evaluation['queries']} questions about held-out concepts, {shots} demonstrations "
        "of two look-alike concepts, names made up for each episode.</p>",
        "<h2>The episode that the server was asked about</h2>",
        _episode(episode),
        "<h2>Accuracy, with its 95 % interval</h2>",
        bar_chart("Accuracy", bars, CHANCE),
        f"<h2>Prompt tokens of the {shots} demonstrations: {ratio:.1f} times fewer</h2>",
        bar_chart("Prompt tokens of the demonstrations", _token_bars(prompt)),
        "<h2>The run</h2>",
        facts_table(_facts(report)),
    ]
    return render_page("mmicl quickstart", parts, STYLE)


def _episode(episode: ShownEpisode) -> str:
    shown = "".join(
        f"<figure>{picture(data)}<figcaption>{escape(name)}</figcaption></figure>"
        for data, name in episode.demonstrations
    )
    verdict = "right" if episode.right else "wrong"
    answer = f"<span class={verdict}>{escape(episode.answer) or '(nothing)'}</span>"
    query = (
        f"<figure class=query>{picture(episode.query)}<figcaption>answer: {answer}<br>"
        f"expected: {escape(episode.expected)}</figcaption></figure>"
    )
    return f"<div class=row>{shown}{query}</div>"


def _accuracy_bar(label: str, score: Mapping[str, float]) -> Bar:
    accuracy, low, high = (score[name] for name in ("accuracy", "low", "high"))
    return Bar(label, accuracy, f"{accuracy:.3f} [{low:.3f}, {high:.3f}]", (low, high))


def _token_bars(prompt: Mapping[str, float]) -> list[Bar]:
    most = max(prompt.values())
    labels = {"full": "full demonstrations", "adapted": "fused demonstrations"}
    return [Bar(labels[kind], tokens / most, f"{tokens:.0f}") for kind, tokens in prompt.items()]


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    corpus, episodes, train, serve = (report[key] for key in ("corpus", "episodes", "train", "serve"))
    partition, skipped = train["partition"], sum(episodes["skipped_by_reason"].values())
    return {
        "corpus": f"{corpus['images']} pictures of {corpus['concepts']} concepts, "
        f"{corpus['held_out_concepts']} of them held out",
        "training episodes": f"{episodes['built']} built, {skipped} skipped",
        "training": f"{train['steps']} steps on {train['world_size']} workers, ZeRO stage "
        f"{train['zero_stage']}; loss {train['loss_first']:.3f} to {train['loss_last']:.3f}",
        "partition": f"{partition['parameter']}: {partition['shard_elements']} of "
        f"{partition['full_elements']} elements on each worker",
        "time to first token": f"{serve['ttft_ms_full']:.0f} ms with full demonstrations, "
        f"{serve['ttft_ms_pack']:.0f} ms with the pack",
        "seconds": ", ".join(f"{step} {seconds:.0f}" for step, seconds in report["seconds"].items()),
    }
