"""Which benchmarks measure the same thing: correlations and principal components over many models' scores.

Source: Cambrian-1, arXiv:2406.16860, finds its four groups of benchmarks so, over 23 models.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.cluster import hierarchy

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.scorecard import read_scorecard
from manyeyes.strict import StrictModel

FEWEST_MODELS = 3
CORRELATION_FILE = "correlation.json"
_NEEDED = "CSV with a column of models and one a benchmark, JSON {model: {benchmark: score}}, or a scorecard"

Table = Mapping[str, Mapping[str, float]]
"""Scores by model and benchmark."""


class BenchmarkCorrelation(StrictModel):
    """``correlation.json``: how benchmarks go together over models."""

    models: tuple[str, ...] = Field(description="Those of the table.")
    models_in_components: tuple[str, ...] = Field(description="Those that have every benchmark.")
    benchmarks: tuple[str, ...] = Field(description="Group by group.")
    groups: dict[str, int] = Field(description="Number of each benchmark's group, from 0, by average linkage.")
    correlation: tuple[tuple[float | None, ...], ...] = Field(
        description="Pearson's r of two benchmarks over the models that have both, in the order of benchmarks; null "
        "where they are fewer than three or all alike."
    )
    explained: tuple[float, ...] = Field(description="Share of the variance of each principal component.")
    loadings: dict[str, tuple[float, float]] = Field(
        description="Correlation of each benchmark with the first two components."
    )


@dataclass(frozen=True)
class _Components:
    explained: tuple[float, ...]
    loadings: NDArray[np.float64]


def read_scores(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Scores by model and benchmark, from any number of files.

    Args:
        paths: CSV (first column the model; empty where a score is missing), JSON ``{model: {benchmark: score}}``, or
            scorecards (a model each, named by its folder, scores as percent of the maximum).

    Raises:
        EvaluationError: A file is missing or none of these, or a model is there twice.
    """
    scores: dict[str, dict[str, float]] = {}
    for path in paths:
        for model, row in _read(path).items():
            if model in scores:
                raise EvaluationError(f'model "{model}" is there twice', "each model once", f"Look into {path}.")
            scores[model] = row
    return scores


def correlate(scores: Table, *, groups: int = 4) -> BenchmarkCorrelation:
    """Correlations between benchmarks, their groups and principal components.

    Correlations take every model that has both benchmarks; components those that have all, each benchmark scaled to
    variance 1. Groups join what correlates most on average until N are left.

    Args:
        scores: By model and benchmark.
        groups: How many; as many as benchmarks at most.

    Raises:
        EvaluationError: Fewer than three models, or two benchmarks, or a benchmark on which all models score alike.
    """
    models = list(scores)
    names = list(dict.fromkeys(benchmark for row in scores.values() for benchmark in row))
    table = np.array([[scores[model].get(name, math.nan) for name in names] for model in models], dtype=np.float64)
    if len(models) < FEWEST_MODELS or len(names) < 2:
        raise EvaluationError(
            f"{len(models)} models and {len(names)} benchmarks",
            f"at least {FEWEST_MODELS} models and two benchmarks",
            "Add models; a correlation over few says little.",
        )
    complete: NDArray[np.bool_] = np.asarray(~np.isnan(table).any(axis=1))
    if complete.sum() < FEWEST_MODELS:
        raise EvaluationError(
            f"{complete.sum()} of {len(models)} models have every benchmark",
            f"at least {FEWEST_MODELS}",
            "Leave out the benchmark that most models lack.",
        )
    for name, column in zip(names, table[complete].T, strict=True):
        if np.ptp(column) == 0:
            raise EvaluationError(
                f"all models score {column[0]:g} on {name}", "scores that differ", f"Leave {name} out."
            )
    matrix = _pairwise(table)
    numbers = _link(matrix, min(groups, len(names)))
    components = _components(table[complete])
    # Groups in the order of their first benchmark, benchmarks inside as given.
    order = sorted(range(len(names)), key=lambda place: (numbers[place], place))
    return BenchmarkCorrelation(
        models=tuple(models),
        models_in_components=tuple(model for model, whole in zip(models, complete.tolist(), strict=True) if whole),
        benchmarks=tuple(names[place] for place in order),
        groups={names[place]: numbers[place] for place in order},
        correlation=tuple(tuple(_known(float(matrix[a, b])) for b in order) for a in order),
        explained=components.explained,
        loadings={names[place]: (float(components.loadings[place, 0]), _second(components, place)) for place in order},
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _second(components: _Components, place: int) -> float:
    return float(components.loadings[place, 1]) if components.loadings.shape[1] > 1 else 0.0


def _read(path: Path) -> dict[str, dict[str, float]]:
    if path.is_dir():
        path = path / "scorecard.json" if (path / "scorecard.json").is_file() else path / "scorecard" / "scorecard.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read ({error})", _NEEDED, "Check the path.") from error
    try:
        return _read_json(path, text) if path.suffix == ".json" else _read_csv(text)
    except ValueError as error:
        raise EvaluationError(f"{path} is no table of scores ({error})", _NEEDED, "Fix the file.") from error


def _read_json(path: Path, text: str) -> dict[str, dict[str, float]]:
    data = json.loads(text)
    if isinstance(data, dict) and "format_version" in data:
        card = read_scorecard(path)
        name = path.parent.parent.name if path.parent.name == "scorecard" else path.parent.name
        return {name: {key: 100 * score.score / score.maximum for key, score in card.benchmarks.items()}}
    if not isinstance(data, dict) or not all(isinstance(row, dict) for row in data.values()):
        raise ValueError("no object of objects")
    return {
        str(model): {name: _number(score) for name, score in row.items() if score is not None}
        for model, row in data.items()
    }


def _read_csv(text: str) -> dict[str, dict[str, float]]:
    header, *lines = csv.reader(io.StringIO(text))
    rows: dict[str, dict[str, float]] = {}
    for line in lines:
        if not line:
            continue
        if len(line) != len(header) or line[0] in rows:
            raise ValueError(f'row "{line[0]}" has {len(line)} cells for {len(header)} columns, or is there twice')
        rows[line[0]] = {name: _number(cell) for name, cell in zip(header[1:], line[1:], strict=True) if cell.strip()}
    return rows


def _number(value: object) -> float:
    if not isinstance(value, int | float | str) or isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(f"{value!r} is no score")
    return float(value)


def _pairwise(table: NDArray[np.float64]) -> NDArray[np.float64]:
    count = table.shape[1]
    matrix = np.eye(count)
    for a in range(count):
        for b in range(a):
            both = ~np.isnan(table[:, [a, b]]).any(axis=1)
            x, y = table[both, a], table[both, b]
            known = both.sum() >= FEWEST_MODELS and np.ptp(x) > 0 and np.ptp(y) > 0
            matrix[a, b] = matrix[b, a] = np.corrcoef(x, y)[0, 1] if known else math.nan
    return matrix


def _link(matrix: NDArray[np.float64], groups: int) -> list[int]:
    """Average linkage on 1 - r; an unknown r counts as 0. Numbers follow the first benchmark of each group."""
    apart = 1 - np.nan_to_num(matrix, nan=0.0)[np.triu_indices(len(matrix), k=1)]
    labels = hierarchy.cut_tree(hierarchy.linkage(apart, method="average"), n_clusters=groups)[:, 0]
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]


def _components(table: NDArray[np.float64]) -> _Components:
    """Principal components of the correlation matrix; the sign makes the loadings of each sum to a positive figure."""
    scaled = (table - table.mean(axis=0)) / table.std(axis=0)
    _, sizes, directions = np.linalg.svd(scaled, full_matrices=False)
    kept = sizes > 1e-9 * sizes[0]
    loadings = directions[kept].T * sizes[kept] / math.sqrt(len(table))
    loadings *= np.where(loadings.sum(axis=0) < 0, -1.0, 1.0)
    shares = np.square(sizes[kept]) / np.square(sizes).sum()
    return _Components(tuple(float(share) for share in shares), loadings)
