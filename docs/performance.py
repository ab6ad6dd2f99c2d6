"""Put the ratios that ``make bench`` left in ``bench/results/`` into docs/performance.md, and draw them.

Run ``make docs`` after ``make bench``; a test compares. Prints the page and writes docs/performance.svg.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_suffix(".md")
PICTURE = Path(__file__).with_suffix(".svg")
RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
BEGIN, END = "<!-- made by docs/performance.py: begin -->\n", "<!-- made by docs/performance.py: end -->"
HEADS = ("what: theirs / ours", "ratio (quartiles)", "goal", "rounds", "equal, in the same run")


def read_results() -> list[dict[str, Any]]:
    """Every result with a ratio, by the name of its file."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if "ratio_median" in result]


def evidence(equal: dict[str, Any]) -> str:
    """What was compared, in words."""
    words = {name: each for name, each in equal.items() if name != "equal"}
    told = ", ".join(
        f"{name.replace('_', ' ')} {each if isinstance(each, str) else f'{each:.3g}'}" for name, each in words.items()
    )
    return f"{'yes' if equal['equal'] else '**no**'}: {told}"


def render(results: list[dict[str, Any]]) -> str:
    """The page with its table."""
    rows = [f"| {' | '.join(HEADS)} |", f"|{' --- |' * len(HEADS)}"]
    for each in results:
        low, high = each["ratio_iqr"]
        goal = f"{each['goal']:g}, {'met' if each['ratio_median'] >= each['goal'] else 'missed'}"
        ratio = f"{each['ratio_median']:.2f} ({low:.2f} to {high:.2f})"
        rows.append(f"| {each['name']} | {ratio} | {goal} | {each['rounds']} | {evidence(each['equal'])} |")
    table = BEGIN + "\n".join(rows) + "\n" + END
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), flags=re.DOTALL)
    return pattern.sub(lambda _: table, PAGE.read_text(encoding="utf-8"))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A bar a ratio, its quartiles, and a mark where its goal is."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "manyeyes", "svg.fonttype": "none", "font.size": 9})
    figure = Figure(figsize=(9, 0.55 * len(results) + 0.9), layout="constrained")
    axes = figure.subplots()
    places = range(len(results))
    medians = [each["ratio_median"] for each in results]
    beyond = [
        [median - each["ratio_iqr"][0] for median, each in zip(medians, results, strict=True)],
        [each["ratio_iqr"][1] - median for median, each in zip(medians, results, strict=True)],
    ]
    colours = ["#2f7d5b" if each["ratio_median"] >= each["goal"] else "#b45f3c" for each in results]
    axes.barh(places, medians, xerr=beyond, color=colours, height=0.55, error_kw={"elinewidth": 1})
    axes.scatter([each["goal"] for each in results], places, marker="|", s=260, color="black", label="goal", zorder=3)
    axes.axvline(1, color="grey", linewidth=1, linestyle="dashed")
    axes.set_yticks(places, [each["name"].split(":")[0] for each in results])
    axes.invert_yaxis()
    axes.set_xlabel("theirs / ours")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    measured = read_results()
    draw(measured, PICTURE)
    sys.stdout.write(render(measured))
