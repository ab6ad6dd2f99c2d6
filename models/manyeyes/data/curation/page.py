"""``<name>-curation.html``: what went in and out, the tail curve, lengths and sizes, and samples to look at."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from manyeyes.data.curation.recipe import CurationRecipe
from manyeyes.data.curation.report import CuratedExample, CuratedSource, CurationReport, Distribution
from manyeyes.data.records import Record
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.data.validation_report import show_image
from manyeyes.errors import RecordError
from manyeyes.pages import Bar, Curve, Drawing, Mark, Table, Text, draw_curves, render

CAPS = (150_000, 250_000, 350_000, 450_000)
"""Those that Cambrian-1 compared: 350k was best, 250k to 350k about as good (arXiv:2406.16860, figure 9)."""
_TITLES = {
    "question": "Characters of the longest question",
    "answers": "Characters of all answers",
    "pairs": "Questions a sample",
    "longer side": "Longest side in pixels (0: text alone)",
}
_SHOWN_SOURCES = 60


def render_curation(report: CurationReport, *, snapshots: Sequence[Snapshot]) -> str:
    """Render the page.

    Args:
        report: What was drawn.
        snapshots: One for each input; where the samples to look at are.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    records = _read_examples(report.examples, snapshots)
    shown = [(example, records.get((example.dataset, example.row))) for example in report.examples]
    return render(
        "curation.html",
        title=f"Curation: {report.recipe.name}",
        report=report,
        categories=_categories(report),
        sources=_sources(report.sources[:_SHOWN_SOURCES]),
        more_sources=max(0, len(report.sources) - _SHOWN_SOURCES),
        reasons=Table(
            ("left out for", "samples"), [[name, f"{count:,}"] for name, count in report.reasons.items()], numbers=(1,)
        ),
        tail=_tail(report),
        caps=_caps(report),
        charts={_TITLES.get(name, name): _histogram(row) for name, row in report.distributions.items()},
        drawn=[pair for pair in shown if pair[0].reason == "drawn"],
        left_out=[pair for pair in shown if pair[0].reason != "drawn"],
        show=lambda record: show_image(record.images[0].data),
        unknown=_unknown(report.recipe, report.sources),
    )


def _categories(report: CurationReport) -> list[Bar]:
    bars = []
    for name, before, after, share, wanted in report.categories():
        whole = 100 * before / max(report.samples, 1)
        bars += [
            Bar(name, f"{before:,}", whole, "off", title=f"{name}: {whole:.2f}% of the inputs"),
            Bar(
                "",
                f"{after:,}",
                share,
                marks=() if wanted is None else (Mark(wanted, "this", f"wanted: {wanted:.2f}%"),),
                title=f"{name}: {share:.2f}% of what is drawn",
            ),
        ]
    return bars


def _sources(rows: Sequence[CuratedSource]) -> Table:
    return Table(
        ("source", "category", "samples", "fit", "drawn", "kept", "left out for", "prompt"),
        [
            [
                Text(row.name, kind="strong"),
                row.category,
                *(f"{count:,}" for count in (row.samples, row.fit, row.drawn)),
                f"{100 * row.drawn / row.samples:.1f}%",
                Text(", ".join(f"{name} {count:,}" for name, count in row.left_out.items()), kind="quiet"),
                Text(row.prompt or "", kind="quiet"),
            ]
            for row in rows
        ],
        numbers=(2, 3, 4, 5),
        stacked=True,
    )


def _tail(report: CurationReport) -> Drawing:
    """Cumulative samples from the smallest source to the largest, as they are and under the cap."""
    sizes = sorted(row.fit for row in report.sources)
    curves = [Curve("as they are", _cumulate(sizes), "off")]
    if report.recipe.cap is not None:
        capped = sorted(min(row.fit, _cap_of(report.recipe, row, report.recipe.cap)) for row in report.sources)
        curves.append(Curve(f"at most {report.recipe.cap:,} each", _cumulate(capped)))
    return draw_curves(curves, x_label="sources, from the smallest", y_label="samples of so many sources together")


def _cumulate(sizes: Sequence[int]) -> list[tuple[float, float]]:
    points, total = [(0.0, 0.0)], 0
    for number, size in enumerate(sizes, start=1):
        total += size
        points.append((float(number), float(total)))
    return points


def _caps(report: CurationReport) -> Table:
    largest = max((row.fit for row in report.sources), default=0)
    chosen = {report.recipe.cap} if report.recipe.cap else set()
    # Round fractions of the largest where the paper's caps would cut nothing.
    tried = CAPS if largest > CAPS[0] else tuple(max(1, round(largest * share)) for share in (0.1, 0.25, 0.5, 0.75))
    rows = []
    for cap in sorted({*tried, *chosen}):
        left = [min(row.fit, _cap_of(report.recipe, row, cap)) for row in report.sources]
        cut = sum(row.fit > size for row, size in zip(report.sources, left, strict=True))
        rows.append([f"{cap:,}", f"{sum(left):,}", f"{cut}", "this recipe" if cap in chosen else ""])
    return Table(("cap t", "samples", "sources it cuts", ""), rows, numbers=(0, 1, 2))


def _cap_of(recipe: CurationRecipe, row: CuratedSource, cap: int) -> int:
    return recipe.source(row.name).cap or cap


def _histogram(row: Distribution) -> list[Bar]:
    """Shares before and after, bin by bin; empty bins at both ends are left out."""
    totals = [max(sum(counts), 1) for counts in (row.before, row.after)]
    used = [place for place, count in enumerate(row.before) if count]
    bars = []
    for place in range(min(used, default=0), max(used, default=-1) + 1):
        name = f"to {row.ends[place]:,}" if place < len(row.ends) else f"over {row.ends[-1]:,}"
        before, after = (
            100 * counts[place] / total for counts, total in zip((row.before, row.after), totals, strict=True)
        )
        bars += [
            Bar(name, f"{before:.1f}%", before, "off", title=f"{row.before[place]:,} of the inputs"),
            Bar("", f"{after:.1f}%", after, title=f"{row.after[place]:,} of what is drawn"),
        ]
    return bars


def _unknown(recipe: CurationRecipe, sources: Sequence[CuratedSource]) -> list[str]:
    """What the recipe says of sources that no sample has."""
    return [pattern for pattern in recipe.sources if not any(fnmatch.fnmatchcase(row.name, pattern) for row in sources)]


def _read_examples(
    examples: Sequence[CuratedExample], snapshots: Sequence[Snapshot]
) -> Mapping[tuple[str, int], Record]:
    readers: dict[str, RecordReader] = {}
    records: dict[tuple[str, int], Record] = {}
    for example in examples:
        if example.dataset not in readers:
            owner = next(each for each in snapshots if example.dataset in each.manifest.datasets)
            readers[example.dataset] = RecordReader(
                owner.shard_paths(example.dataset), cached_groups=1, source=owner.on_demand([example.dataset])
            )
        try:
            records[example.dataset, example.row] = readers[example.dataset].read(example.row)
        except RecordError:
            continue  # its card says why it cannot be read
    return records
