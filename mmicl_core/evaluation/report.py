"""A finished run as a page that needs nothing else: the episode asked, the bars, the tokens."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["CONDITION_LABELS", "ShownEpisode", "accuracy_table", "render_report"]

CONDITION_LABELS = {
    "zero_shot": "no demonstrations",
    "full": "full demonstrations",
    "fused": "fused, aggregator just trained",
    "fused_shipped": "fused, shipped aggregator",
    "swapped": "full, the two names swapped",
}

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2430;
background:#fff}h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
p.lead{color:#536072;margin-top:0}.row{display:flex;flex-wrap:wrap;gap:.6rem}
figure{margin:0;text-align:center;border:1px solid #dde3ea;border-radius:8px;padding:.5rem .7rem}
figure img{width:72px;height:72px}figcaption{font-size:.9rem}figure.query{border:2px solid #2a6fdb}
table{border-collapse:collapse}td,th{padding:.25rem .9rem .25rem 0;text-align:left;font-variant-numeric:
tabular-nums}th{font-weight:600;border-bottom:1px solid #dde3ea}.right{color:#1a7f37}.wrong{color:#b42318}
svg text{font:13px system-ui,sans-serif;fill:#1c2430}svg .soft{fill:#536072}
"""

BAR_PIXELS, ROW_PIXELS, LABEL_PIXELS = 420, 34, 240


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
    shots = evaluation["shots_per_class"]
    prompt = {kind: 2 * shots * tokens[f"demonstration_{kind}"] for kind in ("full", "fused")}
    ratio = tokens["demonstration_full"] / tokens["demonstration_fused"]
    bars = [
        (CONDITION_LABELS[name], evaluation[name]["accuracy"], evaluation[name])
        for name in CONDITION_LABELS
        if name in evaluation
    ]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>mmicl quickstart</title>",
        f"<meta name=viewport content='width=device-width,initial-scale=1'><style>{STYLE}</style>",
        "<h1>Learning new names from demonstrations</h1>",
        f"<p class=lead>{evaluation['queries']} questions about held-out concepts, {shots} demonstrations "
        "of each of two look-alike concepts, names made up for each episode.</p>",
        "<h2>The episode that the server was asked about</h2>",
        _episode(episode),
        "<h2>Accuracy, with its 95 % interval</h2>",
        _accuracy_bars(bars),
        f"<h2>Prompt tokens of the {2 * shots} demonstrations: {ratio:.1f} times fewer</h2>",
        _token_bars(prompt),
        "<h2>The run</h2>",
        _facts(report),
        "</html>",
    ]
    return "\n".join(parts)


def _picture(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "webp"
    return f"<img alt='' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"


def _episode(episode: ShownEpisode) -> str:
    shown = "".join(
        f"<figure>{_picture(data)}<figcaption>{escape(name)}</figcaption></figure>"
        for data, name in episode.demonstrations
    )
    verdict = "right" if episode.right else "wrong"
    answer = f"<span class={verdict}>{escape(episode.answer) or '(nothing)'}</span>"
    query = (
        f"<figure class=query>{_picture(episode.query)}<figcaption>answer: {answer}<br>"
        f"expected: {escape(episode.expected)}</figcaption></figure>"
    )
    return f"<div class=row>{shown}{query}</div>"


def _accuracy_bars(bars: Sequence[tuple[str, float, Mapping[str, float]]]) -> str:
    rows = []
    for number, (label, accuracy, interval) in enumerate(bars):
        top = number * ROW_PIXELS
        low, high = (LABEL_PIXELS + BAR_PIXELS * interval[end] for end in ("low", "high"))
        rows.append(
            f"<text x=0 y={top + 21}>{escape(label)}</text>"
            f"<rect x={LABEL_PIXELS} y={top + 8} width={BAR_PIXELS * accuracy:.1f} height=18 fill='#2a6fdb'/>"
            f"<line x1={low:.1f} x2={high:.1f} y1={top + 17} y2={top + 17} stroke='#1c2430' stroke-width=2 />"
            f"<text x={max(high, LABEL_PIXELS) + 8:.1f} y={top + 21}>{accuracy:.3f}</text>"
        )
    half, bottom = LABEL_PIXELS + BAR_PIXELS / 2, len(bars) * ROW_PIXELS
    rows.append(
        f"<line x1={half} x2={half} y1=0 y2={bottom} stroke='#8a95a5' stroke-dasharray='4 4'/>"
        f"<text class=soft x={half} y={bottom + 15} text-anchor=middle>one of the two names, at random</text>"
    )
    return (
        f"<svg width=100% viewBox='0 0 {LABEL_PIXELS + BAR_PIXELS + 70} {bottom + 22}'>{''.join(rows)}</svg>"
    )


def _token_bars(prompt: Mapping[str, float]) -> str:
    most = max(prompt.values())
    rows = []
    for number, (kind, tokens) in enumerate(prompt.items()):
        top, length = number * ROW_PIXELS, BAR_PIXELS * tokens / most
        rows.append(
            f"<text x=0 y={top + 21}>{kind} demonstrations</text>"
            f"<rect x={LABEL_PIXELS} y={top + 8} width={length:.1f} height=18 fill='#2a6fdb'/>"
            f"<text x={LABEL_PIXELS + length + 8:.1f} y={top + 21}>{tokens:.0f}</text>"
        )
    height = len(prompt) * ROW_PIXELS
    return f"<svg width=100% viewBox='0 0 {LABEL_PIXELS + BAR_PIXELS + 70} {height}'>{''.join(rows)}</svg>"


def _facts(report: Mapping[str, Any]) -> str:
    corpus, episodes, train, serve = (report[key] for key in ("corpus", "episodes", "train", "serve"))
    partition, skipped = train["partition"], sum(episodes["skipped_by_reason"].values())
    facts = {
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
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items())
    return f"<table>{rows}</table>"
