"""Intervals of scores that respect clusters: questions on one image are not independent of each other.

Every interval is two-sided at 95%. A mean has one in closed form (``clustered_mean``). The cluster bootstrap says how
much any other score would move had other images been asked: clusters (images, documents) are drawn with replacement,
all items of one together; the score is computed anew on each draw. It serves every score that is no plain mean: F1,
pairs, circular evaluation, sums over categories, averages over benchmarks. A mean is computed for all draws at once.
Any other score is computed by its own ``aggregate``; where that would take long and there are many clusters, by what
each kind of item adds to it, for all draws at once.

None of scipy, arch and statsmodels has a bootstrap over clusters of a score that is no mean; docs/certainty.md says how
often these intervals hold the truth.

Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 2.7 (what an item adds) and 3.8;
the wider percentiles for few clusters: Hesterberg, The American Statistician 69 (2015), 371-386, section 5.3.

Sub-scores (categories, skills, kinds of question, other figures on a benchmark's items) have intervals as well: one
that is a mean is the mean of some of its items, and gets a mean's interval. Any other is drawn anew with the clusters,
all of a benchmark's at once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import special

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import BenchmarkRow, Graded

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        n: Items.
        clusters: Images that the items belong to.
        mean: Percent for a score, points for a difference.
        low: Lower end of the 95% interval, same unit.
        high: Upper end of the 95% interval, same unit.
    """

    n: int
    clusters: int
    mean: float
    low: float
    high: float


def clustered_mean(outcomes: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of outcomes in [0, 1] with a Wilson interval whose sample size is the effective one.

    The clustered standard error gives the design effect; ``n`` divided by it is how many independent items would know
    as much. Wilson's interval at that size stays inside [0, 100] and keeps its width where every answer is right.
    Clusters never count for more than independent items; where all outcomes are equal, each cluster counts once.

    Args:
        outcomes: One figure in [0, 1] per item; 1 is right.
        clusters: The image of each item.

    Raises:
        EvaluationError: No items, or as many clusters as items are not given.

    Source:
        Clustered standard errors: Miller, arXiv:2411.00640. Effective sample size inside a score interval: Korn and
        Graubard, Survey Methodology 24 (1998), 193-201; Dean and Pagano, J. Surv. Stat. Methodol. 3 (2015), 484-503.
    """
    values, groups, count = _checked(outcomes, clusters)
    n = len(values)
    mean = float(values.mean())
    if count == 1:
        return Estimate(n=n, clusters=1, mean=100 * mean, low=0.0, high=100.0)
    variance = _clustered_variance(values, groups, count)
    effective = min(float(n), max(1.0, mean * (1 - mean) / variance)) if variance > 0 else float(count)
    t = student_quantile((1 + CONFIDENCE) / 2, count - 1)
    t2 = t * t / effective
    centre = (mean + t2 / 2) / (1 + t2)
    half = t / (1 + t2) * float(np.sqrt(mean * (1 - mean) / effective + t2 / (4 * effective)))
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return Estimate(n=n, clusters=count, mean=100 * mean, low=100 * min(low, mean), high=100 * max(high, mean))


def clustered_error(values: Sequence[float] | NDArray[np.float64], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose items are independent between clusters only; infinite for one cluster.

    Args:
        values: One figure per item.
        clusters: The image of each item.

    Raises:
        EvaluationError: No items, or lengths differ.

    Source:
        Miller, arXiv:2411.00640, section 2.2, with the small-sample factor G / (G - 1).
    """
    array, groups, count = _checked(values, clusters)
    return float(np.sqrt(_clustered_variance(array, groups, count))) if count > 1 else float("inf")


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t.

    Args:
        probability: In (0, 1).
        degrees: Degrees of freedom, at least 1.
    """
    return float(special.stdtrit(degrees, probability))


def _checked(
    values: Sequence[float] | NDArray[np.float64], clusters: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        raise EvaluationError("no items to score", "at least one", "Raise evaluation.max_items, or check the data set.")
    if len(clusters) != len(array):
        raise EvaluationError(
            f"{len(array)} outcomes and {len(clusters)} clusters", "one image per outcome", "Pass them in one order."
        )
    numbers: dict[Hashable, int] = {}
    groups = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
    return array, groups, len(numbers)


def _clustered_variance(values: NDArray[np.float64], groups: NDArray[np.int64], count: int) -> float:
    """Variance of the mean: squared residual sums per cluster, with the small-sample factor G / (G - 1)."""
    residual_sums = np.bincount(groups, weights=values - values.mean(), minlength=count)
    return float(count / (count - 1) * np.square(residual_sums).sum() / len(values) ** 2)


DRAWS = 1000
"""Enough for the ends of a 95% interval to move by about a twentieth of its width between seeds."""

_CELLS = 4_000_000
_REDRAWS = 100
_MANY_ITEMS, _MANY_CLUSTERS = 1000, 100
"""From this many items on, on this many clusters or more, what each kind of item adds takes the aggregate's place."""

Floats = NDArray[np.float64]
Aggregate = Callable[[Sequence[Graded], str], dict[str, float]]


def draw_counts(clusters: int, *, draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each cluster is in each draw.

    Args:
        clusters: How many there are.
        draws: How many draws.
        generator: Source of chance.

    Returns:
        ``[draws, clusters]``; each row sums to ``clusters``.
    """
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)


def percentile_interval(values: Floats, *, clusters: int) -> tuple[float, float]:
    """The 95% interval from a score's draws.

    Plain percentiles are too narrow for few clusters, as a standard error with ``G`` for ``G - 1`` and a normal
    quantile for Student's would be; the levels are widened by as much as that.

    Args:
        values: The score on each draw.
        clusters: How many were drawn from.
    """
    if clusters < 2:
        return -np.inf, np.inf
    t = student_quantile((1 + CONFIDENCE) / 2, clusters - 1) * np.sqrt(clusters / (clusters - 1))
    level = NormalDist().cdf(-float(t))
    low, high = np.quantile(values, [level, 1 - level])
    return float(low), float(high)


def standard_error(values: Floats, *, clusters: int) -> float:
    """The standard error from a score's draws, with the factor ``G / (G - 1)`` of few clusters."""
    return float(values.std() * np.sqrt(clusters / (clusters - 1))) if clusters > 1 else float("inf")


def seeded(name: str, seed: int) -> np.random.Generator:
    """A generator of its own for each benchmark, so that averages over benchmarks add up independent draws."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def score_draws(
    row: BenchmarkRow, graded: Sequence[Graded], variant: str, *, draws: int = DRAWS, seed: int = 0
) -> Floats:
    """A benchmark's score on each draw.

    Args:
        row: The benchmark.
        graded: Its items.
        variant: Whose scoring.
        draws: How many draws.
        seed: Of the draws.

    Returns:
        ``[draws]``, in the score's own unit.
    """
    clusters = Clusters(graded)
    generator = seeded(row.name, seed)
    if row.mean_scale is not None:
        return row.mean_scale * clusters.mean_draws(graded, draws=draws, generator=generator)
    return clusters.aggregate_draws(row.aggregate, [graded], variant, draws=draws, generator=generator)[:, 0]


def average_interval(
    parts: Sequence[tuple[BenchmarkRow, Sequence[Graded], str]], *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of the mean of several benchmarks' scores, each as percent of its maximum.

    Source:
        Cambrian-1 averages so: MME / 20, OCRBench / 10. Benchmarks are taken for independent of each other.

    Args:
        parts: Benchmark, its items and the variant.
        draws: How many draws.
        seed: Of the draws.

    Raises:
        EvaluationError: No parts.
    """
    if not parts:
        raise EvaluationError("no benchmarks to average", "at least one", "Score one first.")
    shares = [
        100 / row.maximum * score_draws(row, graded, variant, draws=draws, seed=seed) for row, graded, variant in parts
    ]
    fewest = min(len({item.cluster for item in graded}) for _, graded, _ in parts)
    return percentile_interval(np.mean(shares, axis=0), clusters=fewest)


class Clusters:
    """Items by what they are not independent of.

    Two clusters that hold parts of one unit (the images of a pair) are drawn as one.

    Args:
        graded: Items; several models' answers to them are resampled alike.

    Raises:
        EvaluationError: No items.
    """

    def __init__(self, graded: Sequence[Graded]) -> None:
        if not graded:
            raise EvaluationError("no items to score", "at least one", "Check the data set.")
        root: dict[str, str] = {}

        def find(name: str) -> str:
            root.setdefault(name, name)
            while root[name] != name:
                root[name] = root[root[name]]
                name = root[name]
            return name

        for item in graded:
            if "unit" in item.facets:
                root[find(f"u{item.facets['unit']}")] = find(f"c{item.cluster}")
        numbers: dict[str, int] = {}
        names = (find(f"c{item.cluster}") for item in graded)
        self.groups: NDArray[np.int64] = np.array([numbers.setdefault(name, len(numbers)) for name in names])
        self.count = len(numbers)

    def mean_draws(self, graded: Sequence[Graded], *, draws: int, generator: np.random.Generator) -> Floats:
        """The mean of the items' scores on each draw, ``[draws]``."""
        sums = np.bincount(self.groups, weights=[item.score for item in graded], minlength=self.count)
        sizes = np.bincount(self.groups, minlength=self.count)
        return np.concatenate(
            [counts @ sums / (counts @ sizes) for counts in self._counts(draws=draws, generator=generator)]
        )

    def aggregate_draws(
        self,
        aggregate: Aggregate,
        models: Sequence[Sequence[Graded]],
        variant: str,
        *,
        draws: int,
        generator: np.random.Generator,
    ) -> Floats:
        """The score of ``aggregate`` on each draw, for several models that answered the same items.

        A cluster that is drawn twice counts as two: the facet ``unit`` of a further copy is renamed. A draw that
        lacks a part without which there is no score (division by zero) is drawn again.

        Args:
            aggregate: Of the benchmark.
            models: Each model's items, in the order that this object was made of.
            variant: Whose scoring.
            draws: How many draws.
            generator: Source of chance.

        Returns:
            ``[draws, models]``.
        """
        if len(self.groups) >= _MANY_ITEMS and self.count >= _MANY_CLUSTERS:
            added = [self.influence(aggregate, graded, variant, most_kinds=draws // 2) for graded in models]
            if all(each is not None for each in added):
                scores = np.array([aggregate(graded, variant)["score"] for graded in models])
                matrix = np.stack([each for each in added if each is not None], axis=1)
                counted = [counts @ matrix for counts in self._counts(draws=draws, generator=generator)]
                return scores + np.concatenate(counted)
        samplers = [_Sampler(graded, self.groups, self.count) for graded in models]
        rows: list[list[float]] = []
        for counts in self._counts(draws=draws, generator=generator):
            rows += [self._aggregate(aggregate, samplers, variant, times, generator) for times in counts]
        return np.array(rows, dtype=np.float64)

    def sub_score_draws(
        self,
        aggregate: Aggregate,
        graded: Sequence[Graded],
        variant: str,
        names: Sequence[str],
        *,
        generator: np.random.Generator,
        draws: int = DRAWS,
    ) -> Floats:
        """Several figures of one aggregate on each draw.

        Args:
            aggregate: Of the benchmark.
            graded: Its items, those that this object was made of.
            variant: Whose scoring.
            names: The figures.
            generator: Source of chance.
            draws: How many draws.

        Returns:
            ``[draws, names]``; NaN where a draw lacks the figure's items.
        """
        if len(self.groups) >= _MANY_ITEMS and self.count >= _MANY_CLUSTERS:
            added = self.influences(aggregate, graded, variant, names, most_kinds=draws // 2)
            if added is not None:
                scores = aggregate(graded, variant)
                counted = [counts @ added for counts in self._counts(draws=draws, generator=generator)]
                return np.array([scores[name] for name in names]) + np.concatenate(counted)
        sampler = _Sampler(graded, self.groups, self.count)
        rows: list[list[float]] = []
        for counts in self._counts(draws=draws, generator=generator):
            for times in counts:
                try:
                    found = aggregate(sampler.sample(times), variant)
                except ZeroDivisionError:
                    found = {}
                rows.append([found.get(name, np.nan) for name in names])
        return np.array(rows, dtype=np.float64)

    def influence(
        self, aggregate: Aggregate, graded: Sequence[Graded], variant: str, *, most_kinds: int
    ) -> Floats | None:
        """What each cluster adds to a score, to first order: ``influences`` of ``score`` alone, ``[clusters]``."""
        added = self.influences(aggregate, graded, variant, ["score"], most_kinds=most_kinds)
        return None if added is None else added[:, 0]

    def influences(
        self, aggregate: Aggregate, graded: Sequence[Graded], variant: str, names: Sequence[str], *, most_kinds: int
    ) -> Floats | None:
        """What each cluster adds to several figures, to first order; the sum over clusters is 0.

        Units (or items without one) that an aggregate cannot tell apart are of one kind. One more and one less of
        each kind, halved, is what one of it adds.

        Args:
            aggregate: Of the benchmark.
            graded: Its items.
            variant: Whose scoring.
            names: The figures.
            most_kinds: Beyond N kinds it is not worth it.

        Returns:
            ``[clusters, names]``; ``None`` with more kinds, or where a kind cannot be missing or a figure is not
            additive. A figure of one unit alone, which cannot be missing, has 0.
        """
        units: dict[object, list[int]] = {}
        for place, item in enumerate(graded):
            units.setdefault(item.facets.get("unit", place), []).append(place)
        kinds: dict[object, list[list[int]]] = {}
        for places in units.values():
            kinds.setdefault(tuple(sorted(map(repr, (_kind(graded[place]) for place in places)))), []).append(places)
        if len(kinds) > most_kinds:
            return None
        aggregated = aggregate(graded, variant)
        scores = np.array([aggregated[name] for name in names])
        influence: Floats = np.zeros((self.count, len(names)))
        for alike in kinds.values():
            one = set(alike[0])
            more = [*graded, *(_copy(graded[place], 1) for place in alike[0])]
            less = [item for place, item in enumerate(graded) if place not in one]
            try:
                with_one, without_one = aggregate(more, variant), aggregate(less, variant)
            except ZeroDivisionError:
                return None
            gains = [(with_one[name] - without_one.get(name, with_one[name])) / 2 for name in names]
            np.add.at(influence, self.groups[[places[0] for places in alike]], gains)
        # A mean, a ratio or a sum of such does not change when every item is there twice: its parts add up to nothing.
        allowed = 0.02 * np.maximum(1.0, np.abs(scores)) + 0.1 * np.abs(influence).sum(axis=0)
        if (np.abs(influence.sum(axis=0)) > allowed).any():
            return None
        centred: Floats = influence - influence.mean(axis=0)
        return centred

    def _aggregate(
        self,
        aggregate: Aggregate,
        samplers: Sequence[_Sampler],
        variant: str,
        times: NDArray[np.int64],
        generator: np.random.Generator,
    ) -> list[float]:
        for _ in range(_REDRAWS):
            try:
                return [aggregate(sampler.sample(times), variant)["score"] for sampler in samplers]
            except ZeroDivisionError:
                times = draw_counts(self.count, draws=1, generator=generator)[0]
        raise EvaluationError(
            f"{_REDRAWS} draws of {self.count} clusters give no score",
            "enough items of every part of the benchmark",
            "Ask more items.",
        )

    def _counts(self, *, draws: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        at_once = max(1, _CELLS // self.count)
        for start in range(0, draws, at_once):
            yield draw_counts(self.count, draws=min(at_once, draws - start), generator=generator)


class _Sampler:
    """Makes the items of a draw; copies of a cluster are made once."""

    def __init__(self, graded: Sequence[Graded], groups: NDArray[np.int64], count: int) -> None:
        first: list[list[Graded]] = [[] for _ in range(count)]
        for item, group in zip(graded, groups.tolist(), strict=True):
            first[group].append(item)
        self._copies = [first]
        self._has_units = any("unit" in item.facets for item in graded)

    def sample(self, times: NDArray[np.int64]) -> list[Graded]:
        while len(self._copies) < times.max():
            number = len(self._copies)
            first = self._copies[0]
            self._copies.append(
                [[_copy(item, number) for item in group] for group in first] if self._has_units else first
            )
        items: list[Graded] = []
        for number in range(int(times.max())):
            copies = self._copies[number]
            for group in np.flatnonzero(times > number).tolist():
                items += copies[group]
        return items


def _kind(item: Graded) -> tuple[object, ...]:
    facets = sorted((name, value) for name, value in item.facets.items() if name != "unit")
    return item.parsed, item.score, tuple(facets)


def _copy(item: Graded, number: int) -> Graded:
    if "unit" not in item.facets:
        return item
    return replace(item, facets={**item.facets, "unit": f"{item.facets['unit']}~{number}"})


Interval = tuple[float, float]


def sub_score_intervals(row: BenchmarkRow, graded: Sequence[Graded], variant: str) -> dict[str, Interval]:
    """Lower and upper end of every sub-score of ``row.aggregate(graded, variant)``, by name.

    Intervals are not widened for being several.

    Args:
        row: The benchmark.
        graded: Its items.
        variant: Whose scoring.

    Returns:
        In each sub-score's own unit, which its interval never leaves.
    """
    scores = row.aggregate(graded, variant)
    names = [name for name in scores if name != "score"]
    if not names:
        return {}
    members = _members(row, graded, variant, names)
    intervals: dict[str, Interval] = {}
    if row.mean_scale is not None:
        for name in names:
            interval = _interval_of_mean(row, members[name], scores[name], len(graded))
            if interval is not None:
                intervals[name] = interval
    drawn = [name for name in names if name not in intervals]
    if drawn:
        clusters = Clusters(graded)
        draws = clusters.sub_score_draws(row.aggregate, graded, variant, drawn, generator=seeded(row.name, 0))
        right = row.aggregate([replace(item, score=1.0) for item in graded], variant)
        for column, name in enumerate(drawn):
            top = right.get(name, scores[name]) if row.unit == "points" else 100.0
            intervals[name] = _drawn_interval(row, draws[:, column], members[name], scores[name], top)
    return {name: intervals[name] for name in names}


def _members(
    row: BenchmarkRow, graded: Sequence[Graded], variant: str, names: Sequence[str]
) -> dict[str, Sequence[Graded]]:
    """The items of each sub-score: those that, on their own, still have it."""
    kinds: dict[object, list[Graded]] = {}
    for item in graded:
        kind = tuple(sorted((name, value) for name, value in item.facets.items() if name != "unit"))
        kinds.setdefault(kind, []).append(item)
    members: dict[str, list[Graded]] = {name: [] for name in names}
    for alike in kinds.values():
        # Where a figure needs more than one kind of item nothing is known of its parts, and all items count.
        alone = _aggregate(row, alike, variant) or dict.fromkeys(names, 0.0)
        for name in names:
            if name in alone:
                members[name] += alike
    return {name: items or graded for name, items in members.items()}


def _aggregate(row: BenchmarkRow, graded: Sequence[Graded], variant: str) -> Mapping[str, float] | None:
    try:
        return row.aggregate(graded, variant)
    except ZeroDivisionError:
        return None


def _interval_of_mean(row: BenchmarkRow, items: Sequence[Graded], value: float, n: int) -> Interval | None:
    """The interval of a mean of ``items``; ``None`` where the sub-score is none."""
    assert row.mean_scale is not None
    estimate = clustered_mean([item.score for item in items], [item.cluster for item in items])
    # Points of a whole (OCRBench) are worth their share of it.
    for scale in (row.mean_scale / 100, row.mean_scale / 100 * len(items) / n):
        if math.isclose(estimate.mean * scale, value, rel_tol=1e-9, abs_tol=1e-9):
            return min(estimate.low * scale, value), max(estimate.high * scale, value)
    return None


def _drawn_interval(row: BenchmarkRow, draws: Floats, items: Sequence[Graded], value: float, top: float) -> Interval:
    draws = draws[~np.isnan(draws)]
    clusters = [item.cluster for item in items]
    if row.unit != "relative" and (draws.size == 0 or np.ptp(draws) < 1e-9) and value in (0, top) and top > 0:
        # No draw differs from another; each cluster then counts as one item of a mean, so that doubt is left.
        estimate = clustered_mean([value / top] * len(items), clusters)
        return estimate.low * top / 100, estimate.high * top / 100
    low, high = percentile_interval(draws, clusters=len(set(clusters))) if draws.size else (-math.inf, math.inf)
    if row.unit == "relative" and math.isfinite(high):
        top = high
    return max(0.0, min(low, value)), max(value, min(high, top))
