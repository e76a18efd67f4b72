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
from mmicl_core.evaluation.charts import (
    Control,
    Mark,
    Series,
    compression_chart,
    controls_chart,
    shots_chart,
)
from mmicl_core.evaluation.drawing import Measure
from mmicl_core.evaluation.pages import facts_table, picture, render_page, text, thumbnail

__all__ = ["render_card"]

Told = Mapping[str, Any]

MOST_PIXELS = 50_000_000
MINUS, DASH = "\u2212", "\u2013"
VERDICTS = {
    True: ("yes", "\u2713", "Learns in context"),
    False: ("no", "\u2717", "Does not learn in context"),
    None: ("open", "?", "Cannot be told whether it learns in context"),
}
EXPECTED = {"falls": "falls", "stays": "stays", "chance": "falls to chance"}
MET = {True: ("right", "\u2713 yes"), False: ("wrong", "\u2717 no"), None: ("soft", "? cannot be told")}
STYLE = """
.verdict{font-size:1.25rem;line-height:1.4;padding:.7rem 1rem;border:2px solid;border-left-width:.7rem}
.verdict{border-radius:6px;margin:.8rem 0}
.verdict.yes{border-color:#1a7f37;background:#eef8f0}
.verdict.no{border-color:#b42318;background:#fdf1f0}
.verdict.open{border-color:#536072;background:#f4f6f8}
h3{font-size:1rem;margin:1.6rem 0 .3rem}
.plot svg{display:block;width:100%;height:auto;max-width:40rem}
.wide{overflow-x:auto;margin:.6rem 0}
.wide table{font-size:.9rem}
.wide td,.wide th{padding-right:1.1rem}
.wide .told{display:inline-block;min-width:9rem}
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
            each task has a `scale` to show them by.
        pictures: encoded, by the keys that examples name. One that is missing, or cannot be decoded, leaves
            an empty frame.
    """
    small = _Thumbnails(pictures)
    parts = [f"<h1>{text(card['title'])}</h1>", _verdict(card["verdict"])]
    parts += _at_a_glance(card["tasks"])
    for task in card["tasks"]:
        parts += _task(task)
    parts += _compression(card["compression"], card["tasks"])
    parts += _examples(card["tasks"], small)
    parts += _comparisons(card["tasks"])
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


def _at_a_glance(tasks: Sequence[Told]) -> Iterator[str]:
    """Of several tasks the ends of all curves; of one, its chart says it."""
    rows = []
    for task in tasks:
        for curve in _drawable(task):
            points = sorted(curve["points"], key=lambda point: point["shots"])
            ends = [f"{_shots(point['shots'])}: {_stacked(point, task)}" for point in (points[0], points[-1])]
            met = _counted([control for control in task["controls"] if control["model"] == curve["model"]])
            rows.append([text(task["label"]), text(curve["model"]), *ends, _chance(task), met])
    if not rows:
        yield "<p class=lead>No task was measured.</p>"
    if len(tasks) > 1 and rows:
        heads = ("task", "model", "fewest shots", "most shots", "chance", "controls as expected")
        yield _table(heads, rows, (2, 3, 4))


def _chance(task: Told) -> str:
    measure = _measure(task)
    return DASH if measure.chance is None else measure.tell(measure.chance)


def _counted(controls: Sequence[Told]) -> str:
    if not controls:
        return "none made"
    met = [control["met"] for control in controls]
    unknown = f", {met.count(None)} cannot be told" if None in met else ""
    return f"{met.count(True)} of {len(met)}{unknown}"


def _task(task: Told) -> Iterator[str]:
    measure, curves = _measure(task), _drawable(task)
    yield f"<h2>{text(task['label'])}</h2>"
    yield f"<p class=lead>{text(task['metric'])} of {task['queries']:,} questions.</p>"
    if curves:
        title = f"{task['label']}: {task['metric']} over shots"
        yield _plot(shots_chart(title, [_series(curve, task["scale"]) for curve in curves], measure))
        several = any(len(point["seeds"]) > 1 for curve in curves for point in curve["points"])
        ticks = " Small ticks to the left of them: single seeds." if several else ""
        yield f"<p class=soft>Bars: 95 % intervals.{ticks}</p>"
        yield from _notes(curves)
        yield _values(task, curves)
    if task["controls"]:
        yield "<h3>Is it the demonstrations that it learns from?</h3>"
        controls = _grouped(task["controls"])
        drawn = [_control(control, task["scale"]) for control in controls]
        yield _plot(controls_chart(f"{task['label']}: controls", drawn, measure))
        yield _control_table(controls, task)


def _drawable(task: Told) -> list[Told]:
    return [curve for curve in task["curves"] if curve["points"]]


def _series(curve: Told, scale: float) -> Series:
    return Series(curve["model"], [_mark(point, point["shots"], scale) for point in curve["points"]])


def _mark(told: Told, place: float, scale: float) -> Mark:
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
        yield f"<p class=soft>{_shots(shots)}: {text(note)}</p>"


def _values(task: Told, curves: Sequence[Told]) -> str:
    shots = sorted({point["shots"] for curve in curves for point in curve["points"]})
    rows = []
    for curve in curves:
        values = {point["shots"]: _stacked(point, task) for point in curve["points"]}
        rows.append([text(curve["model"]), *(values.get(count, DASH) for count in shots)])
    return _table(("model", *map(_shots, shots)), rows, range(1, len(shots) + 1))


def _grouped(controls: Sequence[Told]) -> list[Told]:
    """Controls of one model and one number of shots together, in the order in which these come."""
    groups = list(dict.fromkeys((control["model"], control["shots"]) for control in controls))
    return sorted(controls, key=lambda control: groups.index((control["model"], control["shots"])))


def _control(control: Told, scale: float) -> Control:
    names = ("value", "low", "high", "unchanged", "difference", "difference_low", "difference_high")
    return Control(
        group=f"{_shots(control['shots'])}, {control['model']}",
        label=control["label"],
        expected=control["expected"],
        met=control["met"],
        **{name: control[name] * scale for name in names},
    )


def _control_table(controls: Sequence[Told], task: Told) -> str:
    rows = []
    for control in controls:
        kind, met = MET[control["met"]]
        asked = [text(control["model"]), text(control["label"]), str(control["shots"])]
        found = [_difference(control, task, "difference_"), EXPECTED[control["expected"]]]
        rows.append([*asked, *found, f"<span class={kind}>{met}</span>"])
    return _table(("model", "control", "shots", "difference", "expected", "met"), rows, (2, 3))


def _compression(measured: Sequence[Told], tasks: Sequence[Told]) -> Iterator[str]:
    for task in tasks:
        rows = [row for row in measured if row["task"] == task["task"]]
        if rows:
            yield f"<h2>Compression against {text(task['metric'])}: {text(task['label'])}</h2>"
            yield from _compression_chart(rows, task)
            yield _compression_table(rows, task)


def _compression_chart(rows: Sequence[Told], task: Told) -> Iterator[str]:
    marks: dict[str, list[Mark]] = {}
    for row in rows:
        if row["prompt_tokens"] and row["value"] is not None:
            mark = _mark(row, row["prompt_tokens"], task["scale"])
            marks.setdefault(row["model"], []).append(mark)
    if marks:
        title = f"{task['label']}: {task['metric']} over tokens of the prompt"
        series = [Series(model, found) for model, found in marks.items()]
        yield _plot(compression_chart(title, series, _measure(task)))


def _compression_table(rows: Sequence[Told], task: Told) -> str:
    heads = ("model", "shots", task["metric"], "prompt tokens", "KV cache, MiB", "first token, ms")
    told = [
        [
            text(row["model"]),
            str(row["shots"]),
            DASH if row["value"] is None else _interval(row, task),
            _number(row["prompt_tokens"], "{:,.0f}"),
            _number(row["kv_bytes"], "{:,.1f}", 1 / 2**20),
            _number(row["ttft_ms"], "{:,.0f}"),
            _number(row["tokens_per_second"], "{:,.1f}"),
        ]
        for row in rows
    ]
    return _table((*heads, "tokens per second"), told, range(1, 7))


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return DASH if value is None else form.format(value * factor)


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
    return (
        f"<article><p><b class={kind}>{right}</b>, {_shots(len(shown))}, {text(example['model'])}{asked}</p>"
        f"<div class=row>{''.join(figures)}</div></article>"
    )


def _figure(turn: Told, small: _Thumbnails, common: str | None, answer: str, kind: str = "shown") -> str:
    pictures = "".join(map(small.show, turn["pictures"]))
    question = text(turn["question"], "soft") if common is None else ""
    return f"<figure class={kind}>{pictures}<figcaption>{question}{answer}</figcaption></figure>"


def _comparisons(tasks: Sequence[Told]) -> Iterator[str]:
    rows = [
        [
            text(task["label"]),
            text(found["first"]) + text(f"\u2192 {found['second']}"),
            str(found["shots"]),
            _difference(found, task),
            "&lt; 0.001" if found["p_value"] < 0.001 else f"{found['p_value']:.3f}",
            _smallest(found, task),
            text(found["method"]),
        ]
        for task in tasks
        for found in task["comparisons"]
    ]
    if rows:
        yield "<h2>All comparisons</h2>"
        yield (
            "<p class=soft>Differences are the second minus the first on the same questions, with 95 % "
            f"intervals. Each p-value stands for itself: of {len(rows)} comparisons, those below "
            f"{0.05 / len(rows):.2g} are significant at 5 % among all (Bonferroni). Smallest: the true "
            "difference that as many questions would show with a power of 80 %.</p>"
        )
        heads = ("task", "first \u2192 second", "shots", "difference", "p", "smallest", "test")
        yield _table(heads, rows, (2, 3, 4, 5))


def _smallest(found: Told, task: Told) -> str:
    least = found["smallest_difference"]
    return DASH if least is None else _measure(task).tell(least * task["scale"])


def _measure(task: Told) -> Measure:
    scale = task["scale"]
    name = task["metric"] if scale == 1 else f"{task['metric']} \u00d7 {scale:g}"
    # A share that is not scaled says little with one digit.
    digits = 1 if scale >= 10 else 3
    return Measure(name, None if task["chance"] is None else task["chance"] * scale, digits)


def _interval(told: Told, task: Told) -> str:
    return _measure(task).tell_interval(*(told[name] * task["scale"] for name in ("value", "low", "high")))


def _stacked(told: Told, task: Told) -> str:
    value, bounds = _interval(told, task).split(" ", 1)
    return f"{value}<br><span class=soft>{bounds}</span>"


def _difference(told: Told, task: Told, bounds: str = "") -> str:
    """A difference with its bounds, each with its sign."""
    digits = _measure(task).digits
    value, low, high = (
        f"{told[name] * task['scale']:+.{digits}f}".replace("-", MINUS)
        for name in ("difference", f"{bounds}low", f"{bounds}high")
    )
    return f"{value} [{low}, {high}]"


def _shots(count: int) -> str:
    return f"{count} shot" + "s" * (count != 1)


def _plot(chart: str) -> str:
    return f"<div class=plot>{chart}</div>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table of cells that are HTML.

    Args:
        numbers: columns of numbers, which stand right. Before them stand names, each told once for the rows
            that share it.
    """
    kinds = [" class=number" if place in numbers else "" for place in range(len(heads))]
    first = "".join(f"<th{kind}>{escape(head)}</th>" for kind, head in zip(kinds, heads, strict=True))
    body = []
    for number, row in enumerate(rows):
        body.append("<tr>")
        for place, (kind, cell) in enumerate(zip(kinds, row, strict=True)):
            span = _span(rows, number, place) if place < numbers[0] else 1
            body.append(f"<td{kind} rowspan={span}>{cell}</td>" if span else "")
        body.append("</tr>")
    return f"<div class=wide><table><tr>{first}</tr>{''.join(body)}</table></div>"


def _span(rows: Sequence[Sequence[str]], number: int, place: int) -> int:
    """How many rows share a name and all names before it; 0 where a row above tells it."""
    names = [list(row[: place + 1]) for row in rows]
    if number and names[number - 1] == names[number]:
        return 0
    others = (other for other in range(number, len(rows)) if names[other] != names[number])
    return next(others, len(rows)) - number
