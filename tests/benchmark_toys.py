"""Benchmarks made for tests: a mean, an F1 and a score of pairs, with answers to them."""

from __future__ import annotations

from collections.abc import Sequence

from manyeyes.evaluation.benchmarks import BenchmarkRow, Graded
from manyeyes.evaluation.benchmarks.benchmark import mean_percent


def f1(graded: Sequence[Graded], variant: str) -> dict[str, float]:
    """F1 of "yes"; the facet ``gold`` has the right answer."""
    hits = sum(item.parsed == "yes" == item.facets["gold"] for item in graded)
    wrong = sum(item.parsed != item.facets["gold"] for item in graded)
    return {"score": 100 * 2 * hits / (2 * hits + wrong)}


def pairs(graded: Sequence[Graded], variant: str) -> dict[str, float]:
    """Percent of units with every item right."""
    units: dict[str, list[float]] = {}
    for item in graded:
        units.setdefault(item.facets["unit"], []).append(item.score)
    return {"score": 100 * sum(min(scores) for scores in units.values()) / len(units)}


def make_row(name: str = "toy", **changes: object) -> BenchmarkRow:
    """A benchmark whose rows have ``question`` and ``answer``; right is what equals the answer."""
    fields: dict[str, object] = {
        "name": name,
        "title": f"Toy {name}",
        "hub_id": "",
        "split": "test",
        "columns": {},
        "licence": "CC0-1.0",
        "variants": ("official",),
        "default_variant": "official",
        "default_reason": "there is one",
        "cluster": lambda row: str(row["cluster"]),
        "prompt": lambda row, _: str(row["question"]),
        "max_new_tokens": 4,
        "grade": lambda row, text, _: Graded(str(row["id"]), str(row["cluster"]), text, float(text == row["answer"])),
        "aggregate": mean_percent,
        "scorer": "toy 1",
    }
    return BenchmarkRow(**{**fields, **changes})  # type: ignore[arg-type]


def make_graded(scores: Sequence[float], clusters: Sequence[object], **facets: Sequence[str]) -> list[Graded]:
    """Items with these scores; ``parsed`` says yes or no where there is a facet ``gold``."""
    graded = []
    for place, (score, cluster) in enumerate(zip(scores, clusters, strict=True)):
        mine = {name: values[place] for name, values in facets.items()}
        said = None
        if "gold" in mine:
            said = mine["gold"] if score == 1 else {"yes": "no", "no": "yes"}[mine["gold"]]
        graded.append(Graded(str(place), str(cluster), said, float(score), mine))
    return graded
