"""Results of an evaluation as Markdown with plots: the page to commit beside `results.json`.

For each task a table of models by shots with what each of them costs, in a sentence how each compares with
the first, the controls, and plots over shots and over memory; below all of them how each model came about.
Everything is read from the results, so a page can be drawn again from a file that was committed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mmicl_core.evaluation.card import mark_of, series_of
from mmicl_core.evaluation.card_tables import (
    DASH,
    Told,
    curves_of,
    difference_told,
    interval_told,
    measure_of,
    number_told,
    probability_told,
    shots_of,
)
from mmicl_core.evaluation.charts import Mark, Series, compression_chart, shots_chart

__all__ = ["PLOTS", "ResultsPage", "render_results"]

PLOTS = "plots"
"""Folder of the plots, beside the page."""
SIGNIFICANT = 0.05
MEBIBYTE = 2**20
SIGNS = {True: "\u2713", False: "\u2717", None: "?"}
COMMIT = re.compile(r"([0-9a-f]{10})[0-9a-f]+(-dirty)?")

INTRODUCTION = """Scores stand with their 95 % intervals over questions. Of a model that was trained from
several seeds they are means over all of them, \u00b1 the standard deviation between seeds. All models are
asked the same questions behind the same demonstrations."""
COSTS = ("trained parameters", "prompt tokens", "first token", "training", "recipe", "commit")
COUNTS = "A p below {least:.2g} counts: 5 % over all of these comparisons (Bonferroni)."
BEST = "The best number of shots is chosen by these same answers."
CONTROLS = """With {shots}; in brackets the difference from the prompts as they are. The head says what a
control does to a model that learns from its demonstrations: \u2713 it does, \u2717 it does not, ? these
questions cannot tell."""


@dataclass(frozen=True)
class ResultsPage:
    """A page, and what it shows."""

    markdown: str
    plots: Mapping[str, str]
    """SVG by file name in the folder `PLOTS`."""


def render_results(results: Told) -> ResultsPage:
    """The page of what `results.json` holds: `tasks`, `models`, `compression`, `facts`."""
    plots: dict[str, str] = {}
    lines = [f"# {_escaped(', '.join(task['label'] for task in results['tasks']))}", "", INTRODUCTION, ""]
    for number, task in enumerate(results["tasks"], 1):
        drawn = dict(_plots(task, results, f"{number}-{_slug(task['label'])}"))
        plots |= drawn
        lines += [*_task(task, results, list(drawn)), ""]
    lines += ["## Models", "", *_models(results["models"]), "", "## What it takes to do it again", ""]
    facts = [(_escaped(name), _escaped(fact)) for name, fact in results["facts"].items()]
    lines += _table(("", ""), facts, numbers=False)
    return ResultsPage("\n".join(lines) + "\n", plots)


def _task(task: Told, results: Told, plots: Sequence[str]) -> Iterator[str]:
    measure, label = measure_of(task), _escaped(task["label"])
    chance = "" if measure.chance is None else f"; chance {measure.tell(measure.chance)}"
    yield f"## {label}"
    yield ""
    yield f"{_escaped(measure.name)} of {task['queries']:,} questions{chance}."
    for reason, count in task["left_out"].items():
        yield f"Left out: {_escaped(reason)} ({count:,})."
    yield ""
    yield from _scores(task, results)
    findings = list(_findings(task))
    if findings:
        yield ""
        yield from findings
    if task["controls"]:
        yield ""
        yield from _controls(task)
    for name in plots:
        yield ""
        yield f"![{label}]({PLOTS}/{name})"


def _scores(task: Told, results: Told) -> Iterator[str]:
    curves = curves_of(task)
    shots = sorted({point["shots"] for curve in curves for point in curve["points"]})
    about = {model["name"]: model for model in results["models"]}
    rows = []
    for curve in curves:
        values = {point["shots"]: _score(point, task) for point in curve["points"]}
        costs = _costs(about[curve["model"]], curve, task, results)
        rows.append([_escaped(curve["model"]), *(values.get(count, DASH) for count in shots), *costs])
    yield from _table(("model", *map(shots_of, shots), *COSTS), rows)
    yield ""
    yield f"Prompt tokens and time to the first token: with {shots_of(shots[-1])}, read anew each time."


def _score(point: Told, task: Told) -> str:
    told = interval_told(point, task)
    if point["deviation"] is None:
        return told
    return f"{told} \u00b1 {measure_of(task).tell(point['deviation'] * task['scale'])}"


def _costs(model: Told, curve: Told, task: Told, results: Told) -> list[str]:
    last, training = max(curve["points"], key=lambda point: point["shots"]), model["training"] or {}
    timed = (
        row["ttft_ms"]
        for row in results["compression"]
        if (row["task"], row["model"], row["shots"]) == (task["label"], model["name"], last["shots"])
    )
    return [
        number_told(training.get("trained_parameters"), "{:,}"),
        number_told(last["prompt_tokens"], "{:,.0f}"),
        number_told(next(timed, None), "{:,.0f} ms"),
        _duration([seconds for seconds in training.get("seconds", ()) if seconds is not None]),
        DASH if model["recipe"] is None else _escaped(model["recipe"]),
        _commits(model, results["facts"]),
    ]


def _duration(seconds: Sequence[float]) -> str:
    """Of one training, on average."""
    if not seconds:
        return DASH
    mean = fmean(seconds)
    return f"{mean:.0f} s" if mean < 100 else f"{mean / 60:.0f} min"


def _commits(model: Told, facts: Told) -> str:
    """The code that trained it, or, where nothing is trained or known, the code that asked."""
    codes = [code for code in (model["training"] or {}).get("code", ()) if code is not None]
    return ", ".join(map(_commit, dict.fromkeys(codes or [facts["code"]])))


def _commit(code: str) -> str:
    return COMMIT.sub(lambda found: found[1] + (" with changes" if found[2] else ""), _escaped(code))


def _findings(task: Told) -> Iterator[str]:
    """How each model compares with the first, with the most shots and, where that is another number, with the
    best of each."""
    found = [one for one in task["comparisons"] if one["first"] != one["second"]]
    most = max((one["shots"] for one in found if not one["best_of_each"]), default=0)
    at_most = [one for one in found if not one["best_of_each"] and one["shots"] == most]
    best = {one["second"]: one for one in found if one["best_of_each"] and _elsewhere(one, most)}
    if not at_most:
        return
    least = SIGNIFICANT / (len(at_most) + len(best))
    for one in at_most:
        told = f"{_finding(one, least)} with {shots_of(most)}: {_evidence(one, task)}"
        if other := best.get(one["second"]):
            shots = f"{other['shots']} and {other['first_shots']}"
            told += f". Each at its best number of shots, {shots}: {_evidence(other, task)}"
        yield f"- {told}."
    yield ""
    yield COUNTS.format(least=least)
    if best:
        yield BEST


def _elsewhere(found: Told, shots: int) -> bool:
    return (found["first_shots"], found["shots"]) != (shots, shots)


def _finding(found: Told, least: float) -> str:
    first, second = (_escaped(found[name]) for name in ("first", "second"))
    verb = "beats" if found["difference"] > 0 else "loses to"
    return f"**{second}** {verb if found['p_value'] < least else 'cannot be told from'} {first}"


def _evidence(found: Told, task: Told) -> str:
    return f"{difference_told(found, task)}, p {probability_told(found['p_value'])}"


def _controls(task: Told) -> Iterator[str]:
    controls = task["controls"]
    labels = {one["control"]: one["label"] for one in controls}
    found = {
        (one["model"], one["control"]): f"{measure_of(task).tell(one['value'] * task['scale'])} "
        f"({difference_told(one, task, 'difference_')}) {SIGNS[one['met']]}"
        for one in controls
    }
    rows = [
        [_escaped(model), *(found.get((model, control), DASH) for control in labels)]
        for model in dict.fromkeys(one["model"] for one in controls)
    ]
    directions = {one["control"]: one["expected"] for one in controls}
    heads = [f"{label} ({directions[control]})" for control, label in labels.items()]
    yield from _table(("model", *heads), rows)
    yield ""
    yield CONTROLS.format(shots=shots_of(controls[0]["shots"]))


def _plots(task: Told, results: Told, name: str) -> Iterator[tuple[str, str]]:
    """SVG by file name, of the models around each backbone by themselves."""
    around = {model["name"]: _short(model["backbone"]) for model in results["models"]}
    curves, costs = curves_of(task), [row for row in results["compression"] if row["task"] == task["label"]]
    backbones = dict.fromkeys(around[curve["model"]] for curve in curves)
    for backbone in backbones:
        own = [name for name, other in around.items() if other == backbone]
        title, file = task["label"], name
        if len(backbones) > 1:
            title, file = f"{title}, {backbone}", f"{name}-{_slug(backbone)}"
        shown = [series_of(curve, task["scale"]) for curve in curves if curve["model"] in own]
        if _spans(shown):
            chart = shots_chart(f"{title}: {task['metric']} over shots", shown, measure_of(task))
            yield f"{file}-shots.svg", chart
        measured = list(_memory(costs, own, task))
        if _spans(measured):
            heading = f"{title}: {task['metric']} over memory of the prompt"
            what = ("MiB", "keys and values")
            yield f"{file}-memory.svg", compression_chart(heading, measured, measure_of(task), *what)


def _spans(series: Sequence[Series]) -> bool:
    """Whether there is more than one place, without which a chart says no more than the table."""
    return len({mark.place for line in series for mark in line.marks}) > 1


def _memory(costs: Sequence[Told], models: Sequence[str], task: Told) -> Iterator[Series]:
    for model in models:
        marks: list[Mark] = [
            mark_of(row, row["kv_bytes"] / MEBIBYTE, task["scale"])
            for row in costs
            if row["model"] == model and row["kv_bytes"] and row["value"] is not None
        ]
        if marks:
            yield Series(model, marks)


def _short(backbone: str | None) -> str:
    """What people call a model: the end of its path."""
    return re.split(r"[/:]", backbone.rstrip("/"))[-1] if backbone else "a server"


def _models(models: Sequence[Told]) -> list[str]:
    heads = ("model", "around", "method", "recipe", "set otherwise", "seeds", "steps")
    return _table(heads, [_model(model) for model in models], numbers=False)


def _model(model: Told) -> list[str]:
    training = model["training"] or {}
    steps = dict.fromkeys(step for step in training.get("steps", ()) if step is not None)
    settings = (f"{name} {_plain(value)}" for name, value in model["settings"].items())
    told = (
        model["name"],
        model["backbone"] or model["endpoint"],
        training.get("method"),
        model["recipe"],
        ", ".join(settings),
        ", ".join(map(str, model["train_seeds"])),
        ", ".join(f"{step:,}" for step in steps),
    )
    return [_escaped(words) if words else DASH for words in told]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_plain(below)}" for name, below in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """A table of cells that are Markdown.

    Args:
        numbers: whether all columns but the first hold some, which stand right.
    """
    lines = [heads, ["---", *["---:" if numbers else "---"] * (len(heads) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _escaped(words: str) -> str:
    """Words of a recipe or a data set on one line, none of them taken for Markdown."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(words.split()))
