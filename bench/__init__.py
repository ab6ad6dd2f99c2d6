"""Side-by-side performance ratios: each doubles as an equality check and fails when results differ."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe(
    name: str,
    figures: Sequence[tuple[float, float]],
    *,
    goal: float,
    equal: Mapping[str, float | str | bool],
    packages: Sequence[str] = (),
    measured: str = "cpu_s_of_one_thread",
) -> dict[str, Any]:
    """One ratio, as its JSON file has it.

    Args:
        name: What is compared: theirs / ours.
        figures: Of both sides in each round, without the one that warms up.
        goal: The ratio that is wanted.
        equal: What was compared of the results, and under ``equal`` whether it is.
        packages: Whose versions count besides torch's and transformers'.
        measured: What the figures are.
    """
    ratios = [theirs / ours for theirs, ours in figures]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "name": name,
        "ratio_median": statistics.median(ratios),
        "ratio_iqr": [low, high],
        "goal": goal,
        "rounds": len(ratios),
        "equal": dict(equal),
        measured: [statistics.median(side) for side in zip(*figures, strict=True)],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[1], 1),
        "versions": {package: version(package) for package in ("torch", "transformers", *packages)},
    }


def write_result(result: Mapping[str, Any], path: Path) -> int:
    """Write and print a result; what the program exits with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return 0 if result["equal"]["equal"] else 1
