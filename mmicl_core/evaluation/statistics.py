"""How sure a score is, and whether two scores differ: bootstrap, McNemar's test, sign flips.

Whole groups are drawn and exchanged, because items of one group, such as two questions about one picture,
are not independent (Field and Welsh 2007). Two systems are compared on the same items: most of the noise is
in the items, and it cancels.

A metric is a share, the mean of a 0/1 statistic, if it equals the weighted mean of a column that holds
nothing but 0 and 1, under equal and under random weights: the metric itself is asked, so that no declaration
can be wrong. Shares have exact treatments where items stand alone, and bounds that stay honest where all
answers are alike and a bootstrap would claim certainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mmicl_core.errors import DataError
from mmicl_core.evaluation.metrics import wilson_interval
from mmicl_core.evaluation.tasks.base import Columns, Metric, Numbers

__all__ = ["Comparison", "Interval", "SeedSpread", "compare", "interval_of", "over_seeds"]

CONFIDENCE = 0.95
SIGNIFICANCE, POWER = 0.05, 0.8
# Up to so many groups that differ, all 2^12 exchanges are made, none is drawn.
MOST_EXACT = 12
# What sums of floats may differ by, relative to the metric.
ROUNDING = 1e-9

Clusters = NDArray[np.intp]


@dataclass(frozen=True)
class Interval:
    """A metric with its bounds, before scaling."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The second score minus the first, before scaling."""

    difference: float
    low: float
    """Bounds of the difference at 95 %."""
    high: float
    p_value: float
    """Two-sided, under no difference."""
    method: str
    """The test, in words."""
    smallest_difference: float | None
    """The smallest true difference that a sample like this would show; None where it says nothing about its
    own spread, such as one group, or two systems of which all statistics are equal."""


@dataclass(frozen=True)
class SeedSpread:
    """One number for each seed, summed up."""

    mean: float
    deviation: float | None
    """Of the sample (n - 1); None of one seed."""


def interval_of(
    metric: Metric,
    columns: Columns,
    groups: Sequence[str],
    seed: int,
    draws: int = 2000,
    confidence: float = CONFIDENCE,
) -> Interval:
    """A metric with bounds from the percentiles of a cluster bootstrap (Efron and Tibshirani 1993, ch. 13).

    A share over items without groups has Wilson's bounds instead, and so has a share that is 0 or 1, with a
    group as one trial. Draws that leave the metric undefined, such as an area under a curve without one of
    the classes, are no part of the percentiles. Of a single group, the bounds of any other metric are the
    value itself.

    Args:
        columns: statistics of n items.
        groups: of each item; empty stands for an item of its own.
        draws: how often groups are drawn, with replacement.

    Raises:
        DataError: the metric is not defined over these items.
    """
    clusters = _clusters(groups, columns)
    value, count = _value(metric, columns), _count(clusters)
    shares = _shares(metric, columns, clusters)
    if shares and (count == len(clusters) or _is_constant(columns[shares[0]])):
        return Interval(value, *wilson_interval(round(value * count), count, confidence))
    weights = _weights(clusters, np.random.default_rng(seed), draws)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.array([metric.of(columns, weight) for weight in weights])
    return Interval(value, *_percentiles(metric, drawn, confidence))


def compare(
    metric: Metric,
    first: Columns,
    second: Columns,
    groups: Sequence[str],
    seed: int,
    draws: int = 2000,
) -> Comparison:
    """What a metric gains from the first system to the second, on the same items.

    The bounds are percentiles of a bootstrap in which both systems have the same weights. The p-value of a
    share over items without groups is that of McNemar's exact test: a binomial test of the items that one
    system alone has right. Otherwise the two systems' statistics are exchanged in some groups (Noreen 1989),
    which for means flips the signs of differences: in all possible ways where at most 12 groups differ, else
    `draws` times at random, and then the observed way counts as one of them (Phipson and Smyth 2010).

    `smallest_difference` is (z(1 - 0.05 / 2) + z(0.8)) times the standard error of the difference, 2.80 of
    them: a true difference of this size is found significant at 5 %, two-sided, with a power of 80 % (Bloom
    1995, doi 10.1177/0193841X9501900504). The standard error is the deviation of the bootstrap's differences.

    Args:
        first: statistics of n items.
        second: statistics of the same items, in the same order, by the same names.
        groups: of each item; empty stands for an item of its own.

    Raises:
        DataError: the metric is not defined over these items.
    """
    assert first.keys() == second.keys()
    clusters = _clusters(groups, first)
    assert len(_clusters(groups, second)) == len(clusters)
    values = _value(metric, first), _value(metric, second)
    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.array(
            [
                metric.of(second, weight) - metric.of(first, weight)
                for weight in _weights(clusters, rng, draws)
            ]
        )
    bounds, error = _percentiles(metric, drawn, CONFIDENCE), _deviation(drawn)
    known = _shares(metric, second, clusters)
    shares = [name for name in _shares(metric, first, clusters) if name in known]
    if not shares:
        tested = _exchange(metric, (first, second), values, clusters, draws, rng)
        return Comparison(values[1] - values[0], *bounds, *tested, _smallest(error))
    gained = second[shares[0]] - first[shares[0]]
    if _is_constant(gained):
        bounds, error = _of_constant(gained[0], _count(clusters))
    if _count(clusters) == len(clusters):
        tested = _mcnemar(gained)
    else:
        tested = _exchange(metric, (first, second), values, clusters, draws, rng)
    return Comparison(values[1] - values[0], *bounds, *tested, _smallest(error))


def over_seeds(values: Sequence[float]) -> SeedSpread:
    """Mean and sample standard deviation of one number for each seed."""
    return SeedSpread(mean(values), stdev(values) if len(values) > 1 else None)


def _clusters(groups: Sequence[str], columns: Columns) -> Clusters:
    """The number of each item's group, ascending from 0 by first appearance."""
    assert len(groups) > 0
    assert all(len(column) == len(groups) for column in columns.values())
    numbers: dict[str | int, int] = {}
    return np.array([numbers.setdefault(group or place, len(numbers)) for place, group in enumerate(groups)])


def _count(clusters: Clusters) -> int:
    return int(clusters.max()) + 1


def _value(metric: Metric, columns: Columns) -> float:
    count = len(next(iter(columns.values())))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = metric.of(columns, np.ones(count))
    if not math.isfinite(value):
        raise DataError(
            f"{metric.name} is {value} over {count} answers: it is not defined over them; ask more queries, "
            "so that each class and each subtask is among them"
        )
    return value


def _shares(metric: Metric, columns: Columns, clusters: Clusters) -> list[str]:
    """The 0/1 columns whose weighted mean the metric is."""
    names = [name for name, column in columns.items() if np.isin(column, (0.0, 1.0)).all()]
    if not names:
        return []
    count = len(columns[names[0]])
    drawn = np.random.default_rng(0).uniform(0.5, 1.5, _count(clusters))
    for weights in (np.ones(count), drawn[clusters]):
        value = metric.of(columns, weights)
        names = [name for name in names if abs(np.average(columns[name], weights=weights) - value) < ROUNDING]
    return names


def _is_constant(column: Numbers) -> bool:
    return bool((column == column[0]).all())


def _weights(clusters: Clusters, rng: np.random.Generator, draws: int) -> Iterator[Numbers]:
    """How often each item's group is drawn: multinomial over groups, one draw in memory at a time."""
    count = _count(clusters)
    for _ in range(draws):
        # Counting indices is the multinomial distribution, many times faster than its own generator.
        yield np.bincount(rng.integers(count, size=count), minlength=count)[clusters].astype(np.float64)


def _percentiles(metric: Metric, drawn: Numbers, confidence: float) -> tuple[float, float]:
    defined = drawn[np.isfinite(drawn)]
    if not len(defined):
        raise DataError(
            f"{metric.name} is defined in none of {len(drawn)} draws of its groups: ask more queries"
        )
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _deviation(drawn: Numbers) -> float:
    defined = drawn[np.isfinite(drawn)]
    return float(defined.std(ddof=1)) if len(defined) > 1 else 0.0


def _smallest(error: float) -> float | None:
    normal = NormalDist()
    found = (normal.inv_cdf(1 - SIGNIFICANCE / 2) + normal.inv_cdf(POWER)) * error
    # Equal differences have a deviation of rounding, which is none.
    return found if found > ROUNDING else None


def _of_constant(gained: float, count: int) -> tuple[tuple[float, float], float]:
    """Bounds and standard error of a share's difference that is -1, 0 or 1 in all of `count` groups.

    As many groups as Wilson's bound allows at none of `count` may be otherwise. The bounds are what Tango's
    score interval (1998) comes to without a pair that differs, and with nothing but such pairs.
    """
    otherwise = wilson_interval(0, count, CONFIDENCE)[1]
    reach = 1 + abs(gained)
    bounds = max(-1.0, gained - reach * otherwise), min(1.0, gained + reach * otherwise)
    return bounds, reach * math.sqrt(otherwise * (1 - otherwise) / count)


def _mcnemar(gained: Numbers) -> tuple[float, str]:
    better, worse = int((gained > 0).sum()), int((gained < 0).sum())
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return float(p_value), f"exact McNemar test, {better} gained, {worse} lost"


def _exchange(
    metric: Metric,
    both: tuple[Columns, Columns],
    values: tuple[float, float],
    clusters: Clusters,
    draws: int,
    rng: np.random.Generator,
) -> tuple[float, str]:
    """How often exchanging two systems in some groups makes a difference as large as the observed one."""
    first, second = both
    # An exchange of equal statistics changes nothing.
    differing = np.unique(clusters[np.any([first[name] != second[name] for name in first], axis=0)])
    ways = 2 ** len(differing) if len(differing) <= MOST_EXACT else None
    least = abs(values[1] - values[0]) - ROUNDING * max(map(abs, values))
    ones, extreme = np.ones(len(clusters)), 0
    for exchange in _exchanges(len(differing), ways, draws, rng):
        exchanged = np.zeros(_count(clusters), dtype=bool)
        exchanged[differing] = exchange
        here = exchanged[clusters]
        one = {name: np.where(here, second[name], first[name]) for name in first}
        other = {name: np.where(here, first[name], second[name]) for name in first}
        extreme += bool(abs(metric.of(other, ones) - metric.of(one, ones)) >= least)
    told = f"permutation test over {_count(clusters)} groups"
    if ways is not None:
        return extreme / ways, f"exact {told}"
    return (extreme + 1) / (draws + 1), f"{told}, {draws} draws"


def _exchanges(
    count: int, ways: int | None, draws: int, rng: np.random.Generator
) -> Iterator[NDArray[np.bool_]]:
    """Which of `count` groups are exchanged: all `ways` to do so, else `draws` of them."""
    for way in range(draws if ways is None else ways):
        if ways is None:
            yield rng.integers(2, size=count).astype(bool)
        else:
            yield (way >> np.arange(count)) & 1 == 1
