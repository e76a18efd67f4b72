"""An evaluation as one page: does this checkpoint learn in context, and how is that known?

The verdict stands on top. Below it, for each task, accuracy over shots and the controls, which say whether it
is the demonstrations that are learned from; then what compression costs and saves, examples, all comparisons,
and what it takes to do it again. The page needs nothing else.

Hazard: names, questions and answers are hostile input; all of them are shown by `text` or drawn as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mmicl_core.data.images import PictureError
from mmicl_core.evaluation.card_tables import (
    Told,
    at_a_glance,
    comparisons_table,
    compression_table,
    controls_table,
    curves_of,
    measure_of,
    shots_of,
    values_table,
)
from mmicl_core.evaluation.charts import (
    Control,
    Mark,
    Series,
    compression_chart,
    controls_chart,
    shots_chart,
)
from mmicl_core.evaluation.pages import facts_table, picture, render_page, text, thumbnail

__all__ = ["mark_of", "render_card", "series_of"]

MOST_PIXELS = 50_000_000
VERDICTS = {
    True: ("yes", "\u2713", "Learns in context"),
    False: ("no", "\u2717", "Does not learn in context"),
    None: ("open", "?", "Cannot be told whether it learns in context"),
}
STYLE = """
.verdict{font-size:1.25rem;line-height:1.4;padding:.7rem 1rem;border:2px solid;border-left-width:.7rem}
.verdict{border-radius:6px;margin:.8rem 0}
.verdict.yes{border-color:#1a7f37;background:#eef8f0}
.verdict.no{border-color:#b42318;background:#fdf1f0}
.verdict.open{border-color:#536072;background:#f4f6f8}
h3{font-size:1rem;margin:1.6rem 0 .3rem}
.wide{overflow-x:auto;margin:.6rem 0}
.wide table{font-size:.9rem}
.wide td,.wide th{padding-right:1.1rem}
.wide .told{display:inline-block;min-width:9rem}
@media(max-width:40rem){.wide .told{min-width:5rem}}
.wide td.number,.wide th.number{text-align:right;white-space:nowrap}
article{border-top:1px solid #dde3ea;padding:.6rem 0}
article p{margin:.2rem 0 .5rem}
figure{width:7.4rem;padding:.4rem;box-sizing:border-box}
figure img,.empty{display:block;margin:0 auto .3rem;max-width:100%;height:5rem;object-fit:contain}
.empty{line-height:5rem;background:#f1f4f7;color:#536072;font-size:.8rem}
figcaption{font-size:.8rem;line-height:1.35}
figcaption>*{display:block}
figure.query{border:2px solid #1c2430;width:11rem}
.answer{font-weight:600}
@media print{body{margin:0;max-width:none}article,.plot,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""


def render_card(card: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page as HTML, pictures inside.

    Args:
        card: `title`; `verdict` with `learns` (None: cannot be told) and `why`; `tasks`, each with its
            `curves`, `controls`, `comparisons` and `examples`; `compression`; `facts`. Scores are not scaled;
            each task has a `scale` to show them by. Only where there are any: `left_out`, reasons with their
            counts, of a task; `first_shots` and `best_of_each` of a comparison at two numbers of shots.
        pictures: encoded, by the keys that examples name. One that is missing, or cannot be decoded, leaves
            an empty frame.
    """
    small = _Thumbnails(pictures)
    parts = [f"<h1>{text(card['title'])}</h1>", _verdict(card["verdict"])]
    parts += at_a_glance(card["tasks"])
    for task in card["tasks"]:
        parts += _task(task)
    parts += _compression(card["compression"], card["tasks"])
    parts += _examples(card["tasks"], small)
    parts += comparisons_table(card["tasks"])
    if card["facts"]:
        parts += ["<h2>What it takes to do it again</h2>", facts_table(card["facts"])]
    return render_page(card["title"], parts, STYLE)


class _Thumbnails:
    """Pictures as they are shown, each made once."""

    def __init__(self, pictures: Mapping[str, bytes]) -> None:
        self._pictures = pictures
        self._shown: dict[str, str] = {}

    def show(self, key: str) -> str:
        if key not in self._shown:
            self._shown[key] = self._make(key)
        return self._shown[key]

    def _make(self, key: str) -> str:
        if key not in self._pictures:
            return f"<div class=empty title='{escape(key)}'>no picture</div>"
        try:
            return picture(thumbnail(self._pictures[key], MOST_PIXELS))
        except PictureError as error:
            return f"<div class=empty title='{escape(str(error))}'>no picture</div>"


def _verdict(verdict: Told) -> str:
    kind, sign, words = VERDICTS[verdict["learns"]]
    return f"<p class='verdict {kind}'><b>{sign} {words}:</b> {text(verdict['why'])}</p>"


def _task(task: Told) -> Iterator[str]:
    measure, curves = measure_of(task), curves_of(task)
    yield f"<h2>{text(task['label'])}</h2>"
    yield f"<p class=lead>{text(task['metric'])} of {task['queries']:,} questions.</p>"
    for reason, count in task.get("left_out", {}).items():
        yield f"<p class=soft>Left out: {text(reason)} ({count:,}).</p>"
    if curves:
        title = f"{task['label']}: {task['metric']} over shots"
        yield _plot(shots_chart(title, [series_of(curve, task["scale"]) for curve in curves], measure))
        several = any(len(point["seeds"]) > 1 for curve in curves for point in curve["points"])
        ticks = " Small ticks to the left of them: single seeds." if several else ""
        yield f"<p class=soft>Bars: 95 % intervals.{ticks}</p>"
        yield from _notes(curves)
        yield values_table(task, curves)
    if task["controls"]:
        yield "<h3>Is it the demonstrations that it learns from?</h3>"
        controls = _grouped(task["controls"])
        drawn = [_control(control, task["scale"]) for control in controls]
        yield _plot(controls_chart(f"{task['label']}: controls", drawn, measure))
        yield controls_table(controls, task)


def series_of(curve: Told, scale: float) -> Series:
    """A curve over shots."""
    return Series(curve["model"], [mark_of(point, point["shots"], scale) for point in curve["points"]])


def mark_of(told: Told, place: float, scale: float) -> Mark:
    """A value with its bounds, where it belongs in a chart."""
    value, low, high = (told[name] * scale for name in ("value", "low", "high"))
    seeds = [one * scale for one in told.get("seeds", ())]
    # A single seed is the value itself.
    return Mark(place, value, low, high, label=str(told["shots"]), seeds=seeds if len(seeds) > 1 else ())


def _notes(curves: Sequence[Told]) -> Iterator[str]:
    notes = {
        (point["shots"], point["note"]): None
        for curve in curves
        for point in curve["points"]
        if point["note"]
    }
    for shots, note in notes:
        yield f"<p class=soft>{shots_of(shots)}: {text(note)}</p>"


def _grouped(controls: Sequence[Told]) -> list[Told]:
    """Controls of one model and one number of shots together, in the order in which these come."""
    groups = list(dict.fromkeys((control["model"], control["shots"]) for control in controls))
    return sorted(controls, key=lambda control: groups.index((control["model"], control["shots"])))


def _control(control: Told, scale: float) -> Control:
    names = ("value", "low", "high", "unchanged", "difference", "difference_low", "difference_high")
    return Control(
        group=f"{shots_of(control['shots'])}, {control['model']}",
        label=control["label"],
        expected=control["expected"],
        met=control["met"],
        **{name: control[name] * scale for name in names},
    )


def _compression(measured: Sequence[Told], tasks: Sequence[Told]) -> Iterator[str]:
    for task in tasks:
        rows = [row for row in measured if row["task"] == task["label"]]
        if rows:
            yield f"<h2>Compression against {text(task['metric'])}: {text(task['label'])}</h2>"
            yield from _compression_chart(rows, task)
            yield compression_table(rows, task)


def _compression_chart(rows: Sequence[Told], task: Told) -> Iterator[str]:
    marks: dict[str, list[Mark]] = {}
    for row in rows:
        if row["prompt_tokens"] and row["value"] is not None:
            mark = mark_of(row, row["prompt_tokens"], task["scale"])
            marks.setdefault(row["model"], []).append(mark)
    if marks:
        title = f"{task['label']}: {task['metric']} over tokens of the prompt"
        series = [Series(model, found) for model, found in marks.items()]
        yield _plot(compression_chart(title, series, measure_of(task)))


def _examples(tasks: Sequence[Told], small: _Thumbnails) -> Iterator[str]:
    for task in tasks:
        if task["examples"]:
            yield f"<h2>Examples: {text(task['label'])}</h2>"
            yield from (_example(example, small) for example in task["examples"])


def _example(example: Told, small: _Thumbnails) -> str:
    shown, query = example["demonstrations"], example["query"]
    questions = {turn["question"] for turn in (*shown, query)}
    common = questions.pop() if len(questions) == 1 else None
    kind, right = ("right", "\u2713 right") if example["right"] else ("wrong", "\u2717 wrong")
    asked = "" if common is None else f"; asked: {text(common)}"
    figures = [_figure(turn, small, common, text(turn["answer"], "answer")) for turn in shown]
    said = text(example["answer"], f"answer {kind}") if example["answer"] else "<span>(nothing)</span>"
    answer = f"<span>answer:</span>{said}<span>expected:</span>{text(example['expected'], 'answer')}"
    figures.append(_figure(query, small, common, answer, "query"))
    about = f"{shots_of(len(shown))}, {text(example['model'])}{asked}"
    return (
        f"<article><p><b class={kind}>{right}</b>, {about}</p>"
        f"<div class=row>{''.join(figures)}</div></article>"
    )


def _figure(turn: Told, small: _Thumbnails, common: str | None, answer: str, kind: str = "shown") -> str:
    pictures = "".join(map(small.show, turn["pictures"]))
    question = text(turn["question"], "soft") if common is None else ""
    return f"<figure class={kind}>{pictures}<figcaption>{question}{answer}</figcaption></figure>"


def _plot(chart: str) -> str:
    return f"<div class=plot>{chart}</div>"
