from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest

from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.evaluation.cells import Layout, lay_out
from mmicl_core.evaluation.controls import BLANK, CONTROLS, Shown
from mmicl_core.evaluation.metrics import wilson_interval
from mmicl_core.evaluation.summary import Scored, judge, summarise
from mmicl_core.evaluation.tasks.base import Columns, Item, Metric, Numbers, Prediction
from mmicl_core.evaluation.tasks.corpus import TwoWayTask

Model = Callable[[Shown], str]
CLASSES = ("cat", "cup")
MANY = 600
ALL_CONTROLS = tuple(CONTROLS)


class NoPictures:
    """What a picture shows is in its key."""

    def read(self, key: str) -> bytes:
        raise AssertionError(f"{key} was read")


def _row(number: int, shots: int, only: str | None = None) -> dict[str, Any]:
    """A question with as many demonstrations of two classes, all as often asked for and as often last."""
    asked = only or CLASSES[number % 2]
    last = CLASSES[number // 2 % 2]
    names = {"cat": f"bako{number}", "cup": f"mute{number}"}
    order = [one for _ in range(shots // 2) for one in sorted(CLASSES, key=last.__eq__)]
    turns = [
        {"picture": f"{one}/{number}/{place}", "question": "This is", "answer": names[one], "concept": one}
        for place, one in enumerate([*order, asked])
    ]
    (other,) = (name for one, name in names.items() if one != asked)
    return {"id": f"1-{number}", "turns": turns, "names": [*names.values()], "other": other}


class Grouped(TwoWayTask):
    """Two questions are one draw."""

    def _query(self, row: Mapping[str, Any]) -> Item:
        query = super()._query(row)
        return replace(query, group=str(int(query.id[2:]) // 2))


def _layout(
    queries: int,
    controls: Sequence[Any] = (),
    shots: tuple[int, ...] = (0, 4),
    only: str | None = None,
    task: type[TwoWayTask] = TwoWayTask,
) -> Layout:
    rows = [_row(number, max(shots), only) for number in range(queries)]
    config = EvaluateConfig(shots=shots, controls=tuple(controls), queries=queries)
    return lay_out(task(rows, NoPictures()), config)


def _sees(item: Item) -> str | None:
    """What a picture shows; nothing where it is blank."""
    (key,) = item.pictures
    return None if key.startswith(BLANK) else key.partition("/")[0]


def _number(shown: Shown) -> int:
    return int(shown.query.id[2:])


def _name_of(shown: Shown, what: str | None) -> str:
    """What the last demonstration of a class is called."""
    return next((item.answer for item in shown.demonstrations[::-1] if _sees(item) == what), "nothing")


def _learns(shown: Shown) -> str:
    return _name_of(shown, _sees(shown.query))


def _never_looks(shown: Shown) -> str:
    return f"a {_sees(shown.query)}"


def _needs_only_the_form(shown: Shown) -> str:
    """Knows the answer by itself, but says it as it was shown how."""
    right = {"cat": "bako", "cup": "mute"}[_sees(shown.query) or "cat"]
    return f"{right}{_number(shown)}" if shown.demonstrations else "I do not know"


def _mostly_needs_only_the_form(shown: Shown) -> str:
    """The same, but for three of a hundred, which it learns."""
    return _learns(shown) if _number(shown) % 100 < 3 else _needs_only_the_form(shown)


def _copies_the_last(shown: Shown) -> str:
    return shown.demonstrations[-1].answer if shown.demonstrations else ""


def _always_says_bako(shown: Shown) -> str:
    return f"bako{_number(shown)}" if shown.demonstrations else ""


def _always_names_the_cat(shown: Shown) -> str:
    return _name_of(shown, "cat")


def _scored(layout: Layout, *models: Model) -> dict[tuple[int, Any], Scored]:
    """The worth of a model's answers, one for each seed, by cell."""
    return {
        (cell.shots, cell.control): Scored(
            cell,
            tuple(
                tuple(layout.task.score(one.query, Prediction(model(one))) for one in cell.shown)
                for model in models
            ),
            prompt_tokens=10.0 * cell.shots,
        )
        for cell in layout.cells
    }


def _summary(layout: Layout, **models: Model | Sequence[Model]) -> dict[str, Any]:
    scores = {
        (name, *cell): scored
        for name, seeds in models.items()
        for cell, scored in _scored(layout, *([seeds] if callable(seeds) else seeds)).items()
    }
    return summarise(layout, scores, "two-way", 1)


def _of_points(summary: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    (curve,) = (one for one in summary["curves"] if one["model"] == name)
    points: list[dict[str, Any]] = curve["points"]
    return points


def _controls(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["control"]: one for one in summary["controls"]}


def _verdict(model: Model, controls: Sequence[Any], queries: int = MANY, only: str | None = None) -> Any:
    summary = _summary(_layout(queries, controls, only=only), asked=model)
    return judge(summary, "asked")["learns"]


def _fails_some(model: Model, *fails: int) -> Model:
    return lambda shown: "nothing" if _number(shown) in fails else model(shown)


def test_curve_has_a_point_for_each_number_of_shots_with_its_bounds() -> None:
    summary = _summary(_layout(40, shots=(0, 2, 4)), asked=_fails_some(_learns, *range(10)))
    zero, two, four = _of_points(summary, "asked")
    assert [point["shots"] for point in (zero, two, four)] == [0, 2, 4]
    assert [point["value"] for point in (zero, two, four)] == [0.0, 0.75, 0.75]
    assert (four["low"], four["high"]) == wilson_interval(30, 40)
    assert (four["seeds"], four["deviation"]) == ([], None)
    assert four["metrics"] == {"accuracy": 0.75, "named the other class": 0.0}
    assert (four["prompt_tokens"], four["note"]) == (40.0, None)
    named = {"task": "two_way", "label": "two-way", "metric": "accuracy", "scale": 100.0, "chance": 0.5}
    assert named.items() <= summary.items()
    assert (summary["queries"], summary["left_out"]) == (40, {})


def test_summary_is_made_of_plain_values() -> None:
    layout = _layout(12, ALL_CONTROLS)
    summary = _summary(layout, one=_learns, other=[_learns, _copies_the_last])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_model_that_learns_is_judged_to_learn() -> None:
    layout = _layout(60, ALL_CONTROLS)
    summary = _summary(layout, asked=_learns)
    verdict = judge(summary, "asked")
    assert verdict["learns"] is True, verdict
    assert "4 demonstrations change the accuracy of asked by +100.0" in verdict["why"]
    found = _controls(summary)
    assert set(found) == set(ALL_CONTROLS)
    assert all(one["met"] for one in found.values())
    assert {name for name, one in found.items() if one["expected"] == "stays"} == {"reversed", "query_rule"}
    assert (found["swapped"]["value"], found["swapped"]["unchanged"]) == (0.0, 1.0)
    assert found["swapped"]["difference"] == -1.0
    assert found["query_rule"]["difference"] == 0.0


@pytest.mark.parametrize("controls", [(), ("swapped",), ALL_CONTROLS])
def test_model_that_never_looks_at_its_demonstrations_is_judged_not_to_learn(controls: Any) -> None:
    assert _verdict(_never_looks, controls, queries=60) is False


@pytest.mark.parametrize("control", ["shuffled", "swapped", "blank", "other"])
@pytest.mark.parametrize("model", [_needs_only_the_form, _mostly_needs_only_the_form])
def test_model_that_takes_no_more_than_the_form_from_demonstrations_is_judged_not_to_learn(
    control: str, model: Model
) -> None:
    summary = _summary(_layout(MANY, (control,)), asked=model)
    verdict = judge(summary, "asked")
    assert verdict["learns"] is False, verdict
    assert f"does not fall with {summary['controls'][0]['label']}" in verdict["why"]


@pytest.mark.parametrize("control", ["shuffled", "swapped", "blank"])
def test_model_that_copies_the_last_answer_is_judged_not_to_learn(control: str) -> None:
    assert _verdict(_copies_the_last, (control,)) is False


def test_model_that_copies_the_last_answer_is_not_judged_to_learn_by_a_few_questions() -> None:
    for queries in (8, 40, 200):
        assert _verdict(_copies_the_last, ("swapped",), queries) is not True


def test_demonstrations_of_another_query_do_not_tell_a_copied_answer_from_a_learnt_one() -> None:
    assert [_verdict(model, ("other",)) for model in (_copies_the_last, _learns)] == [None, None]


@pytest.mark.parametrize("model", [_always_says_bako, _always_names_the_cat])
def test_model_that_always_names_one_class_is_judged_not_to_learn(model: Model) -> None:
    assert _verdict(model, ("swapped",)) is False


def test_model_that_always_names_the_class_that_is_asked_for_is_caught_by_the_query_of_the_other() -> None:
    summary = _summary(_layout(60, ("swapped", "query_rule"), only="cat"), asked=_always_names_the_cat)
    found = _controls(summary)
    assert (found["swapped"]["met"], found["query_rule"]["met"]) == (True, False)
    assert found["query_rule"]["difference"] == -1.0
    verdict = judge(summary, "asked")
    assert verdict["learns"] is False, verdict
    assert CONTROLS["query_rule"] in verdict["why"]


def test_model_that_needs_the_demonstration_that_is_asked_about_for_a_few_questions_learns() -> None:
    def learns(shown: Shown) -> str:
        return "" if len(shown.demonstrations) == 3 and _number(shown) % 100 < 12 else _learns(shown)

    summary = _summary(_layout(200, ("swapped", "query_rule")), asked=learns)
    assert _controls(summary)["query_rule"]["difference"] == pytest.approx(-0.12)
    verdict = judge(summary, "asked")
    assert verdict["learns"] is True, verdict


@pytest.mark.parametrize("queries", [1, 2, 3, 5])
def test_few_questions_cannot_tell_whether_a_model_learns(queries: int) -> None:
    summary = _summary(_layout(queries, ("swapped", "blank")), asked=_learns)
    assert [one["met"] for one in summary["controls"]] == [None, None]
    verdict = judge(summary, "asked")
    assert (verdict["learns"], "too few questions to tell" in verdict["why"]) == (None, True)


def test_verdict_needs_questions_with_and_without_demonstrations_and_a_control() -> None:
    without = judge(_summary(_layout(60, shots=(0,)), asked=_learns), "asked")
    assert (without["learns"], "with and without demonstrations" in without["why"]) == (None, True)
    never_zero = judge(_summary(_layout(60, ("swapped",), shots=(2, 4)), asked=_learns), "asked")
    assert never_zero["learns"] is None
    uncontrolled = judge(_summary(_layout(60), asked=_learns), "asked")
    assert (uncontrolled["learns"], "no control" in uncontrolled["why"]) == (None, True)


def test_verdict_is_about_the_model_that_is_named() -> None:
    summary = _summary(_layout(60, ("swapped",)), full=_learns, adapted=_never_looks)
    assert [judge(summary, name)["learns"] for name in ("full", "adapted")] == [True, False]


def test_verdict_is_about_the_most_demonstrations() -> None:
    def needs_four(shown: Shown) -> str:
        return _learns(shown) if len(shown.demonstrations) >= 4 else ""

    verdict = judge(_summary(_layout(60, ("swapped",), shots=(0, 2, 4)), asked=needs_four), "asked")
    assert (verdict["learns"], verdict["why"].startswith("4 demonstrations")) == (True, True)


def test_score_that_falls_by_less_than_the_margin_has_not_fallen() -> None:
    (control,) = _summary(_layout(MANY, ("swapped",)), asked=_mostly_needs_only_the_form)["controls"]
    assert control["difference"] == pytest.approx(-0.03)
    assert control["difference_high"] < 0
    assert control["met"] is False


def test_control_of_too_few_questions_is_neither_met_nor_broken() -> None:
    summary = _summary(_layout(4, ("swapped", "reversed")), asked=_copies_the_last)
    assert [one["met"] for one in summary["controls"]] == [None, None]


def test_scores_over_seeds_are_means_with_their_spread() -> None:
    seeds = [_fails_some(_learns, *range(count)) for count in (0, 10, 30)]
    summary = _summary(_layout(100, ("swapped",)), asked=seeds)
    zero, four = _of_points(summary, "asked")
    assert four["seeds"] == [1.0, 0.9, 0.7]
    assert four["value"] == pytest.approx(mean([1.0, 0.9, 0.7]))
    assert four["deviation"] == pytest.approx(stdev([1.0, 0.9, 0.7]))
    assert four["low"] < four["value"] < four["high"]
    assert (zero["value"], zero["deviation"]) == (0.0, 0.0)
    (control,) = summary["controls"]
    assert (control["queries"], control["value"]) == (100, 0.0)
    assert control["unchanged"] == pytest.approx(four["value"])


def test_answers_of_all_seeds_to_a_question_are_drawn_together() -> None:
    model = _fails_some(_learns, *range(25))
    one, three = (_of_points(_summary(_layout(100), asked=[model] * seeds), "asked")[1] for seeds in (1, 3))
    assert three["value"] == one["value"]
    # As answers of their own, three times as many would make bounds that are 1.7 times as narrow.
    assert three["high"] - three["low"] == pytest.approx(one["high"] - one["low"], rel=0.1)


def test_seeds_that_are_all_right_have_the_bounds_of_their_questions() -> None:
    point = _of_points(_summary(_layout(30), asked=[_learns] * 3), "asked")[1]
    assert (point["low"], point["high"]) == wilson_interval(30, 30)


def _share_in_order(columns: Columns, weights: Numbers) -> float:
    """The area under the ROC curve, which depends on how answers of several seeds compare."""
    yes = columns["label"] == 1
    above = columns["score"][yes][:, None] > columns["score"][~yes]
    return float(np.average(above, weights=weights[yes][:, None] * weights[~yes]))


def _in_order(layout: Layout, *scales: float) -> dict[tuple[str, int, Any], Scored]:
    """Answers of which each seed orders nearly all, each on a scale of its own."""
    layout.task.metrics = (Metric("share in order", _share_in_order),)
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    seeds = [start + labels + rng.normal(scale=0.4, size=60) for start in scales]
    statistics = tuple(
        tuple({"label": label, "score": score} for label, score in zip(labels, scores, strict=True))
        for scores in seeds
    )
    name = f"of {len(scales)}"
    return {(name, cell.shots, cell.control): Scored(cell, statistics) for cell in layout.cells}


def test_score_over_seeds_lies_within_its_bounds_whatever_the_metric() -> None:
    layout = _layout(60)
    point = _of_points(summarise(layout, _in_order(layout, 0, 3, 6), "two-way", 1), "of 3")[1]
    assert point["value"] > 0.9
    assert point["low"] <= point["value"] <= point["high"]


def test_comparison_is_of_the_scores_that_are_shown_whatever_the_metric() -> None:
    layout = _layout(60)
    scores = _in_order(layout, 0) | _in_order(layout, 0, 3, 6)
    summary = summarise(layout, scores, "two-way", 1)
    values = [_of_points(summary, name)[1]["value"] for name in ("of 1", "of 3")]
    compared = [one for one in summary["comparisons"] if (one["first"], one["second"]) == ("of 1", "of 3")]
    assert len(compared) == 3
    for one in compared:
        assert one["difference"] == pytest.approx(values[1] - values[0])


def test_models_are_compared_with_themselves_without_demonstrations_and_with_the_first() -> None:
    summary = _summary(_layout(20, ("swapped",), shots=(0, 2, 4)), one=_learns, other=_never_looks)
    told = [
        (one["first"], one["first_shots"], one["second"], one["shots"], one["best_of_each"])
        for one in summary["comparisons"]
    ]
    assert told == [
        *(("one", 0, "one", shots, False) for shots in (2, 4)),
        *(("other", 0, "other", shots, False) for shots in (2, 4)),
        *(("one", shots, "other", shots, False) for shots in (0, 2, 4)),
        # The fewest demonstrations of those that are as good.
        ("one", 2, "other", 0, True),
    ]


def test_comparison_is_paired_on_the_same_questions() -> None:
    first = _fails_some(_learns, *range(10))
    same, apart = (_fails_some(_learns, *fails) for fails in (range(8), range(20, 28)))
    summary = _summary(_layout(60), first=first, same=same, apart=apart)
    by_name = {
        one["second"]: one
        for one in summary["comparisons"]
        if one["first"] == "first" and one["shots"] == 4 and not one["best_of_each"]
    }
    assert by_name["same"]["method"] == "exact McNemar test, 2 gained, 0 lost"
    assert by_name["apart"]["method"] == "exact McNemar test, 10 gained, 8 lost"
    for one in (by_name["same"], by_name["apart"]):
        assert one["difference"] == pytest.approx(2 / 60)
    width = {name: one["high"] - one["low"] for name, one in by_name.items() if name != "first"}
    assert width["same"] < width["apart"] / 2


def test_questions_of_a_group_are_drawn_and_exchanged_together() -> None:
    summary = _summary(_layout(40, ("swapped",), task=Grouped), asked=_learns)
    methods = {one["method"] for one in summary["comparisons"]}
    assert methods == {"permutation test over 20 groups, 2000 draws"}
    point = _of_points(summary, "asked")[1]
    assert (point["low"], point["high"]) == wilson_interval(20, 20)


@pytest.mark.parametrize(("seeds", "of_other"), [(1, 3), (3, 1), (3, 3), (2, 3)])
def test_models_of_several_seeds_are_compared_by_their_means(seeds: int, of_other: int) -> None:
    one = [_fails_some(_learns, *range(3 * seed)) for seed in range(seeds)]
    other = [_fails_some(_learns, *range(10 + 4 * seed)) for seed in range(of_other)]
    summary = _summary(_layout(40), one=one, other=other)
    (compared,) = (
        told
        for told in summary["comparisons"]
        if (told["first"], told["second"], told["shots"]) == ("one", "other", 4) and not told["best_of_each"]
    )
    values = [_of_points(summary, name)[1]["value"] for name in ("one", "other")]
    assert compared["difference"] == pytest.approx(values[1] - values[0])
    assert compared["low"] <= compared["difference"] <= compared["high"] < 0
    assert compared["p_value"] < 0.05


class OnlyCatsTurn(TwoWayTask):
    """Only questions about cats have a counterpart."""

    def counterpart(self, query: Item, demonstrations: Sequence[Item]) -> tuple[Item, list[Item]] | None:
        return super().counterpart(query, demonstrations) if _sees(query) == "cat" else None


def test_control_that_applies_to_some_questions_is_compared_on_those() -> None:
    # Wrong about every cup, so that all it gets right is among the questions that the control has.
    model = _fails_some(_learns, *range(1, 40, 2))
    layout = _layout(40, ("query_rule",), task=OnlyCatsTurn)
    summary = _summary(layout, asked=model)
    (control,) = summary["controls"]
    assert summary["left_out"] == {"query_rule does not apply": 20}
    assert (control["queries"], control["value"], control["unchanged"]) == (20, 1.0, 1.0)
    assert (control["difference"], control["p_value"]) == (0.0, 1.0)
    assert _of_points(summary, "asked")[1]["value"] == 0.5
