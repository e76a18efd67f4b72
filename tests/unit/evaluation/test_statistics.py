from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from mmicl_core.errors import DataError
from mmicl_core.evaluation.metrics import wilson_interval
from mmicl_core.evaluation.statistics import compare, interval_of, over_seeds
from mmicl_core.evaluation.tasks.base import Columns, Metric, Numbers, mean_of

RIGHT = Metric("accuracy", mean_of("right"))
SCORE = Metric("score", mean_of("score"))


def f1(columns: Columns, weights: Numbers) -> float:
    both = (weights * columns["right"] * columns["truth"]).sum()
    return float(2 * both / (weights * (columns["right"] + columns["truth"])).sum())


def recall(columns: Columns, weights: Numbers) -> float:
    return float((weights * columns["right"] * columns["truth"]).sum() / (weights * columns["truth"]).sum())


def alone(count: int) -> list[str]:
    return [""] * count


def right(ones: int, count: int) -> Columns:
    return {"right": (np.arange(count) < ones).astype(float)}


def score(*values: float) -> Columns:
    return {"score": np.array(values, dtype=float)}


def pairs(both: int, gained: int, lost: int, neither: int) -> tuple[Columns, Columns]:
    """Two systems on the same items, by how many each has right."""
    first = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    second = [1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither
    return {"right": np.array(first)}, {"right": np.array(second)}


@pytest.mark.parametrize(("ones", "count"), [(15, 20), (0, 7), (7, 7), (1, 1), (0, 1)])
def test_share_over_items_without_groups_has_the_bounds_of_wilson(ones: int, count: int) -> None:
    columns = {"length": np.arange(count) + 2.0} | dict(right(ones, count))
    found = interval_of(RIGHT, columns, alone(count), seed=0)
    assert found.value == ones / count
    assert (found.low, found.high) == wilson_interval(ones, count)
    own_groups = [f"picture {number}" for number in range(count)]
    assert interval_of(RIGHT, columns, own_groups, seed=1) == found


def test_metric_of_zeros_and_ones_that_is_no_mean_of_them_is_bootstrapped() -> None:
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(2, size=60).astype(float) for name in ("right", "truth")}
    found = interval_of(Metric("F1", f1), columns, alone(60), seed=0)
    assert found != interval_of(Metric("F1", f1), columns, alone(60), seed=1)
    assert found.low < found.value < found.high


def test_mean_of_subtasks_is_no_share_although_its_value_is_one() -> None:
    def of(columns: Columns, weights: Numbers) -> float:
        halves = [slice(0, 20), slice(20, 40)]
        return float(np.mean([np.average(columns["right"][half], weights=weights[half]) for half in halves]))

    columns = {"right": np.random.default_rng(0).integers(2, size=40).astype(float)}
    found = interval_of(Metric("by subtask", of), columns, alone(40), seed=0)
    assert found.value == columns["right"].mean()
    assert (found.low, found.high) != wilson_interval(int(columns["right"].sum()), 40)


def test_interval_agrees_with_the_percentile_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=80)
    found = interval_of(SCORE, {"score": values}, alone(80), seed=0, draws=4000, confidence=0.9)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, confidence_level=0.9, method="percentile", rng=2
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.015)


def test_interval_of_two_groups_runs_over_their_means() -> None:
    # Both groups are drawn with probability 1/2, one of them twice with 1/4 each.
    found = interval_of(SCORE, score(1, 1, 1, 4), ["a", "a", "a", "b"], seed=0)
    assert (found.value, found.low, found.high) == (1.75, 1.0, 4.0)


def test_groups_widen_the_interval_where_their_items_are_alike() -> None:
    columns = {"right": np.repeat(np.random.default_rng(3).integers(2, size=100), 4).astype(float)}
    alike = interval_of(RIGHT, columns, [str(item // 4) for item in range(400)], seed=0)
    apart = interval_of(RIGHT, columns, alone(400), seed=0)
    # Four copies of an item tell no more than one: the square root of 4 times as wide.
    assert (alike.high - alike.low) / (apart.high - apart.low) == pytest.approx(2, rel=0.1)


def test_share_that_is_whole_in_all_groups_is_not_told_as_certain() -> None:
    found = interval_of(RIGHT, right(12, 12), [str(item // 2) for item in range(12)], seed=0)
    assert (found.value, found.low, found.high) == (1.0, *wilson_interval(6, 6))


def test_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for seed in range(300):
        effects = rng.normal(size=30)
        values = np.repeat(effects, 3) + rng.normal(size=90)
        found = interval_of(SCORE, {"score": values}, [str(item // 3) for item in range(90)], seed, draws=200)
        held += found.low <= 0 <= found.high
    # 95 % less what percentiles of 30 groups are known to be short of; standard error 1.3 %.
    assert 0.90 <= held / 300 <= 0.98


def test_draws_without_a_class_are_no_part_of_the_bounds() -> None:
    columns = {"right": np.array([1.0, 0, 1, 0, 1, 1]), "truth": np.array([1.0, 1, 0, 0, 0, 0])}
    found = interval_of(Metric("recall", recall), columns, alone(6), seed=0)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_metric_that_these_answers_do_not_define_is_refused_by_its_name() -> None:
    columns = {"right": np.ones(3), "truth": np.zeros(3)}
    with pytest.raises(DataError, match="recall is nan over 3 answers"):
        interval_of(Metric("recall", recall), columns, alone(3), seed=0)
    with pytest.raises(DataError, match="recall is nan over 3 answers"):
        compare(Metric("recall", recall), columns, columns, alone(3), seed=0)


def test_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    rng = np.random.default_rng(5)
    one, other = ({"score": rng.normal(size=50)} for _ in range(2))
    assert interval_of(SCORE, one, alone(50), 7) == interval_of(SCORE, one, alone(50), 7)
    assert interval_of(SCORE, one, alone(50), 7) != interval_of(SCORE, one, alone(50), 8)
    assert compare(SCORE, one, other, alone(50), 7) == compare(SCORE, one, other, alone(50), 7)
    assert compare(SCORE, one, other, alone(50), 7) != compare(SCORE, one, other, alone(50), 8)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    # 2 (1 + 15 + 105 + 455) / 2^15; 2 / 2^5; and what cannot exceed 1.
    [(12, 3, 1152 / 32768), (3, 12, 1152 / 32768), (5, 0, 2 / 32), (4, 4, 1.0), (1, 0, 1.0)],
)
def test_comparison_of_shares_is_the_exact_test_of_mcnemar(gained: int, lost: int, p_value: float) -> None:
    found = compare(RIGHT, *pairs(30, gained, lost, 30), alone(60 + gained + lost), seed=0, draws=200)
    assert found.p_value == pytest.approx(p_value)
    assert found.difference == pytest.approx((gained - lost) / (60 + gained + lost))
    assert found.method == f"exact McNemar test, {gained} gained, {lost} lost"
    assert found.low <= found.difference <= found.high


def test_pairing_narrows_the_difference_to_the_noise_of_items_that_differ() -> None:
    first, second = pairs(500, 30, 10, 460)
    found = compare(RIGHT, first, second, alone(1000), seed=0, draws=4000)
    # Of 1000 paired differences: variance (40 - 20^2 / 1000) / 1000.
    error = math.sqrt((0.04 - 0.02**2) / 1000)
    assert (found.low, found.high) == pytest.approx((0.02 - 1.96 * error, 0.02 + 1.96 * error), abs=0.0015)
    assert found.smallest_difference == pytest.approx(2.8016 * error, rel=0.05)


def test_systems_with_the_same_answers_differ_by_no_more_than_their_number_allows() -> None:
    found = compare(RIGHT, *pairs(20, 0, 0, 20), alone(40), seed=0)
    # Tango's score interval without a pair that differs: z^2 / (n + z^2).
    bound = 1.959964**2 / (40 + 1.959964**2)
    assert (found.difference, found.low, found.high) == pytest.approx((0, -bound, bound))
    assert found.p_value == 1
    assert found.smallest_difference == pytest.approx(2.8016 * math.sqrt(bound * (1 - bound) / 40), rel=1e-4)


def test_system_that_gains_every_item_is_not_told_as_certain_to() -> None:
    found = compare(RIGHT, *pairs(0, 10, 0, 0), alone(10), seed=0)
    assert (found.difference, found.high) == (1, 1)
    assert found.low == pytest.approx((10 - 1.959964**2) / (10 + 1.959964**2))
    assert found.p_value == pytest.approx(2 / 2**10)


def test_difference_of_few_groups_is_tested_by_all_exchanges() -> None:
    gains = np.array([0.3, -0.1, 0.4, 0.2, 0.25, -0.05, 0.15, 0.5])
    first = np.random.default_rng(6).normal(size=8)
    found = compare(SCORE, {"score": first}, {"score": first + gains}, alone(8), seed=0, draws=50)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    extreme = np.abs(signs @ gains) >= abs(gains.sum()) - 1e-9
    assert found.p_value == pytest.approx(extreme.mean())
    assert found.method == "exact permutation test over 8 groups"


def test_groups_whose_answers_are_equal_leave_few_to_exchange() -> None:
    first = np.zeros(500)
    second = first + np.array([1.0] * 6 + [0.0] * 494)
    found = compare(SCORE, {"score": first}, {"score": second}, alone(500), seed=0, draws=50)
    assert found.p_value == 2 / 2**6


def test_difference_of_many_groups_agrees_with_the_permutation_test_of_scipy() -> None:
    rng = np.random.default_rng(7)
    first = rng.normal(size=60)
    second = first + rng.normal(0.2, 1, size=60)
    found = compare(SCORE, {"score": first}, {"score": second}, alone(60), seed=0)
    expected = stats.permutation_test(
        (second, first),
        lambda one, other: np.mean(one - other),
        permutation_type="samples",
        n_resamples=4000,
        rng=8,
    )
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.03)
    assert found.method == "permutation test over 60 groups, 2000 draws"


def test_grouped_shares_are_exchanged_by_whole_groups() -> None:
    # Three groups that gain both of their items: 2 of 8 exchanges are as extreme; six items would be 2 of 64.
    first, second = pairs(0, 6, 0, 0)
    found = compare(RIGHT, first, second, ["a", "a", "b", "b", "c", "c"], seed=0)
    assert found.p_value == 0.25
    assert found.method == "exact permutation test over 3 groups"


def test_metric_that_is_no_mean_is_compared_by_exchanges_too() -> None:
    rng = np.random.default_rng(9)
    truth = rng.integers(2, size=200).astype(float)
    poor = {"right": rng.integers(2, size=200).astype(float), "truth": truth}
    good = {"right": np.where(rng.random(200) < 0.9, truth, 1 - truth), "truth": truth}
    found = compare(Metric("F1", f1), poor, good, alone(200), seed=0, draws=500)
    assert found.p_value == 1 / 501
    assert 0 < found.low < found.difference < found.high


def test_no_test_calls_more_chance_a_difference_than_it_may() -> None:
    rng = np.random.default_rng(10)
    found = {"groups": 0, "items": 0}
    for seed in range(200):
        shared = np.repeat(rng.normal(size=20), 3)
        first, second = ({"score": shared + np.repeat(rng.normal(size=20), 3)} for _ in range(2))
        groups = [str(item // 3) for item in range(60)]
        found["groups"] += compare(SCORE, first, second, groups, seed, draws=100).p_value <= 0.05
        found["items"] += compare(SCORE, first, second, alone(60), seed, draws=100).p_value <= 0.05
    # Standard error 1.5 %. Items of a group, taken for independent, show what the groups are for.
    assert found["groups"] / 200 <= 0.09
    assert found["items"] / 200 > 0.15


def test_smallest_difference_is_found_in_four_of_five_samples() -> None:
    rng = np.random.default_rng(11)
    # The paired standard error of 100 differences with a deviation of 1.
    difference = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / 10
    told, significant = [], 0
    for seed in range(300):
        first = rng.normal(size=100)
        second = first + rng.normal(difference, 1, size=100)
        found = compare(SCORE, {"score": first}, {"score": second}, alone(100), seed, draws=150)
        told.append(found.smallest_difference or math.nan)
        significant += found.p_value <= 0.05
    assert np.mean(told) == pytest.approx(difference, rel=0.03)
    assert significant / 300 == pytest.approx(0.8, abs=0.06)


def test_one_group_has_neither_a_spread_nor_a_smallest_difference() -> None:
    found = interval_of(SCORE, score(1, 2), ["a", "a"], seed=0)
    assert found.value == found.low == found.high == 1.5
    compared = compare(SCORE, score(1, 2), score(3, 5), ["a", "a"], seed=0)
    assert compared.difference == compared.low == compared.high == 2.5
    assert compared.p_value == 1
    assert compared.smallest_difference is None


def test_equal_scores_show_no_smallest_difference() -> None:
    compared = compare(SCORE, score(1, 2, 0.3), score(1, 2, 0.3), alone(3), seed=0)
    assert (compared.difference, compared.low, compared.high, compared.p_value) == (0, 0, 0, 1)
    assert compared.smallest_difference is None


def test_seeds_are_summed_up_by_their_mean_and_the_deviation_of_the_sample() -> None:
    found = over_seeds([0.5, 0.7, 0.9])
    assert found.mean == pytest.approx(0.7)
    assert found.deviation == pytest.approx(0.2)
    assert over_seeds([0.5]).deviation is None
