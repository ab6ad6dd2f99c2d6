"""The tables of a report, once for HTML and Markdown, so that they cannot differ.

Benchmarks by what the image adds, beside what guessing gets, say whether the model looks: a benchmark
on which little is gained by the image measures the language model; one on which a model with a grey or a wrong image
does as well as with the right one, too.

Source: Cambrian-1, arXiv:2406.16860, sorts benchmarks so.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.report.comparison import GROUP_TITLES, SYSTEM_TITLES
from manyeyes.evaluation.report.contents import Cell, ComparisonRow, Example, Report
from manyeyes.evaluation.scorecard import BenchmarkScore, ConditionScore, Scorecard
from manyeyes.pages import NONE, Bar, Mark, Table, Text, short_count, span, two_decimals

CONDITION_TITLES = {
    "image-on": "with the image",
    "image-off": "without",
    "grey": "grey image",
    "other-image": "another's image",
}
NOTHING = "(nothing)"


def unit_mark(score: BenchmarkScore) -> str:
    """What stands behind a two_decimals in the benchmark's unit."""
    return "" if score.unit == "points" else "%"


def meaning(score: BenchmarkScore) -> str:
    """What a two_decimals in the benchmark's unit says."""
    if score.unit == "relative":
        return "of what the reference answers get"
    return "right" if score.unit == "percent" else f"of {score.maximum:g} points"


def verdict(score: float) -> str:
    """A tick, a cross, or the share of right."""
    return "✓" if score >= 1 else "✗" if score <= 0 else f"({score:.2f})"


def cost_table(report: Report) -> Table | None:
    """Size and cost of the model; ``None`` where they are unknown."""
    facts = report.scorecard.model.facts
    if facts is None:
        return None
    rows: list[list[str | Text]] = [["parameters", f"{facts.parameters:,}"]]
    rows += [[f"of {name.replace('_', ' ')}", f"{count:,}"] for name, count in facts.parts.items()]
    rows += [
        ["encoders", ", ".join(facts.encoders)],
        ["visual tokens an image", f"{facts.visual_tokens:,}"],
        [
            f"FLOPs of a sample (forward; one image and {facts.text_tokens:,} tokens of text)",
            Text(short_count(facts.flops_per_sample), f"{facts.flops_per_sample:,}"),
        ],
    ]
    return Table(("what", "value"), rows, numbers=(1,))


def variants_table(report: Report) -> Table | None:
    """The variants of a bundle; ``None`` where it has no other."""
    if not report.variants:
        return None
    titles = [report.details[name].title for name in report.scorecard.benchmarks]
    header = ["variant", "precision", "MB", *(part for title in titles for part in (title, "difference"))]
    rows: list[list[str | Text]] = []
    for row in report.variants:
        cells: list[str | Text] = [row.name, row.precision, f"{row.bytes / 1e6:,.1f}"]
        for name in report.scorecard.benchmarks:
            found = row.scores[name]
            cells.append(Text(two_decimals(found.score), span(found.ci95)))
            own = row is report.variants[0]
            cells.append("" if own else Text(f"{found.difference:+.2f}", span(found.difference_ci95, signed=True)))
        rows.append(cells)
    return Table(tuple(header), rows, numbers=tuple(range(2, len(header))))


def comparison_table(report: Report) -> Table:
    """This model, the champion and published ones; benchmarks, groups, size and speed."""
    comparison = report.comparison
    header = [
        "model",
        *(column.title for column in comparison.columns.values()),
        *(f"{column.title} (group)" for column in comparison.groups.values()),
        "visual tokens",
        "parameters",
        "FLOPs a sample",
        "questions/s",
    ]
    rows: list[list[str | Text]] = []
    for row in comparison.rows:
        rows.append(
            [
                Text(row.name, _origin(row)),
                *(_cell(row.cells.get(name)) for name in comparison.columns),
                *(_cell(row.groups.get(name)) for name in comparison.groups),
                NONE if row.visual_tokens is None else f"{row.visual_tokens:,}",
                short_count(row.parameters),
                short_count(row.flops_per_sample),
                two_decimals(row.questions_per_s),
            ]
        )
    strong = frozenset(place for place, row in enumerate(comparison.rows) if row.kind != "published")
    return Table(tuple(header), rows, numbers=tuple(range(1, len(header))), strong=strong)


def sources_sentence(report: Report) -> str:
    """Where published scores come from; empty without any."""
    places = dict.fromkeys(cell.source for row in report.comparison.rows for cell in row.cells.values() if cell.source)
    return f"Published in {'; '.join(places)}." if places else ""


def trade_off_table(report: Report) -> Table | None:
    """Score against cost, numbered as in the plots; ``None`` with fewer than two models."""
    if report.trade_off is None:
        return None
    rows: list[list[str | Text]] = [
        [
            str(number),
            point.name,
            two_decimals(point.score),
            f"{point.visual_tokens:,}",
            short_count(point.flops_per_sample),
        ]
        for number, point in enumerate(report.trade_off.points, start=1)
    ]
    strong = frozenset(place for place, point in enumerate(report.trade_off.points) if point.kind != "published")
    header = ("", "model", "mean %", "visual tokens", "FLOPs a sample")
    return Table(header, rows, numbers=(0, 2, 3, 4), strong=strong)


def groups_table(report: Report) -> Table | None:
    """Cambrian-1's groups of this model; ``None`` with too few benchmarks."""
    groups = report.scorecard.groups
    if not groups:
        return None
    rows: list[list[str | Text]] = [
        [
            GROUP_TITLES.get(name, name),
            two_decimals(group.score),
            "" if group.ci95 is None else span(group.ci95),
            ", ".join(f"{benchmark} {percent:.2f}" for benchmark, percent in group.parts.items()),
            ", ".join(group.missing),
        ]
        for name, group in groups.items()
    ]
    header = ("group", "average %", "95%", "benchmarks, % of the maximum", "missing")
    return Table(header, rows, numbers=(1,), stacked=True)


def overview_table(report: Report) -> Table:
    """One row a benchmark, and the mean over them."""
    card = report.scorecard
    rows: list[list[str | Text]] = [
        [
            report.details[name].title,
            f"{score.n:,}",
            Text(two_decimals(score.score), span(score.ci95)),
            Text(two_decimals(score.image_off), span(score.image_off_ci95)),
            Text(f"{score.image_adds:+.2f}", span(score.image_adds_ci95, signed=True)),
            f"{score.parse_failures:,}",
        ]
        for name, score in card.benchmarks.items()
    ]
    scores = list(card.benchmarks.values())
    mean = sum(100 * score.score / score.maximum for score in scores) / len(scores)
    mean_off = sum(100 * score.image_off / score.maximum for score in scores) / len(scores)
    rows.append(
        ["Mean, % of the maximum", "", two_decimals(mean), two_decimals(mean_off), f"{mean - mean_off:+.2f}", ""]
    )
    header = ("", "questions", "score", "no image", "image adds", "not understood")
    return Table(header, rows, numbers=(1, 2, 3, 4, 5), strong=frozenset({len(rows) - 1}))


def conditions_table(score: BenchmarkScore) -> Table:
    """A benchmark's two_decimals under every condition."""
    rows: list[list[str | Text]] = [
        ["with the image", Text(two_decimals(score.score), span(score.ci95)), "", f"{score.parse_failures:,}"]
    ]
    off = ConditionScore(
        score=score.image_off,
        ci95=score.image_off_ci95,
        image_adds=score.image_adds,
        image_adds_ci95=score.image_adds_ci95,
        parse_failures=score.parse_failures_image_off,
    )
    for name, shown in {"image-off": off, **score.conditions}.items():
        rows.append(
            [
                CONDITION_TITLES.get(name, name),
                Text(two_decimals(shown.score), span(shown.ci95)),
                Text(f"{shown.image_adds:+.2f}", span(shown.image_adds_ci95, signed=True)),
                f"{shown.parse_failures:,}",
            ]
        )
    unit = unit_mark(score) or " points"
    header = ("shown", f"score ({unit.strip()})", "the image adds", "not understood")
    return Table(header, rows, numbers=(1, 2, 3))


def types_table(score: BenchmarkScore) -> Table:
    """A benchmark by type of answer."""
    rows: list[list[str | Text]] = [
        [
            name,
            f"{part.n:,}",
            two_decimals(part.score),
            span(part.ci95),
            two_decimals(part.image_off),
            span(part.image_off_ci95),
            two_decimals(part.chance),
        ]
        for name, part in score.by_type.items()
    ]
    header = ("answers", "questions", "score (%)", "95%", "image off (%)", "95%", "guessing (%)")
    return Table(header, rows, numbers=(1, 2, 4, 6))


def sub_scores_table(score: BenchmarkScore) -> Table | None:
    """A benchmark's sub-scores; ``None`` without any."""
    if not score.scores:
        return None
    rows: list[list[str | Text]] = [
        [
            name,
            two_decimals(value),
            span(score.scores_ci95[name]) if name in score.scores_ci95 else "",
            two_decimals(score.scores_image_off.get(name)),
        ]
        for name, value in score.scores.items()
    ]
    return Table(("sub-score", "with the image", "95%", "without"), rows, numbers=(1, 3))


def mistakes_table(report: Report, name: str) -> Table:
    """The most frequent wrong answers."""
    rows: list[list[str | Text]] = [
        [mistake.reference, mistake.prediction or NOTHING, f"{mistake.times:,}"]
        for mistake in report.details[name].mistakes
    ]
    return Table(("right answer", "model's answer", "times"), rows, numbers=(2,), stacked=True)


def unread_table(report: Report, name: str) -> Table:
    """Texts that nothing could be read from."""
    rows: list[list[str | Text]] = [
        [unread.item, unread.question, unread.prediction or NOTHING] for unread in report.details[name].unread
    ]
    return Table(("item", "question", "what the model wrote"), rows, stacked=True)


# Shown in a benchmark's own section; all others are settings, so that a new field is never left out.
_SHOWN = frozenset(
    {"score", "ci95", "scores", "scores_ci95", "scores_image_off", "image_off", "image_off_ci95", "image_adds"}
    | {"image_adds_ci95", "parse_failures", "parse_failures_image_off", "conditions", "by_type"}
)


def settings_table(report: Report) -> Table:
    """Digests, settings and whatever else a scorecard says."""
    card = report.scorecard
    rows: list[list[str | Text]] = [
        ["model", card.model.digest],
        ["recipe", f"{card.recipe} {card.recipe_digest}"],
        ["data", card.data_md5],
        ["code", card.code_digest],
        ["longest answer", f"{card.max_new_tokens:,} tokens" if card.max_new_tokens else "each benchmark's own"],
        ["decoding", "greedy, fp32"],
    ]
    if card.judge is not None:
        rows.append(["judge", f"{card.judge.in_words()}, at {card.judge.endpoint}"])
    for name, score in card.benchmarks.items():
        rows.append([f"{name}: data set", report.details[name].dataset])
        rows.append([f"{name}: prompts", report.details[name].prompts])
        rows += [[f"{name}: {key.replace('_', ' ')}", text] for key, text in _leaves(score) if text]
    return Table(("what", "value"), rows, code=(1,))


def _leaves(score: BenchmarkScore) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key in type(score).model_fields:
        value = getattr(score, key)
        if key not in _SHOWN:
            found += _in_words(key, value)
    return found


def _in_words(key: str, value: object) -> list[tuple[str, str]]:
    if isinstance(value, BaseModel):
        return [leaf for name in type(value).model_fields for leaf in _in_words(f"{key} {name}", getattr(value, name))]
    if isinstance(value, dict):
        return [leaf for name, part in value.items() for leaf in _in_words(f"{key} {name}", part)]
    if isinstance(value, float):
        return [(key, f"{value:,.2f}")]
    if isinstance(value, int) and not isinstance(value, bool):
        return [(key, f"{value:,}")]
    return [] if value is None else [(key, str(value))]


def machines_table(report: Report) -> Table:
    """Machines and versions."""
    rows: list[list[str | Text]] = []
    for run in report.reproduction.runs:
        machine = run.machine
        memory = "" if machine.memory_gb is None else f", {machine.memory_gb:,.2f} GB of memory"
        gpus = f"; {', '.join(machine.accelerators)}" if machine.accelerators else "; no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        rows += [
            ["benchmarks", ", ".join(run.benchmarks)],
            ["machine", f"{machine.processor}, {machine.cores:,} cores{memory}{gpus}; {machine.system}"],
            ["versions", versions],
            ["finished (UTC)", run.finished],
        ]
    return Table(("what", "value"), rows)


def examples_table(examples: Sequence[Example]) -> Table:
    """Questions on a few images, and every answer to them."""
    conditions = [name for name in CONDITION_TITLES if any(name in answer.answers for answer in examples[0].answers)]
    rows: list[list[str | Text]] = []
    for example in examples:
        image = example.item.partition("#")[0]
        for answer in example.answers:
            said = [
                f"{answer.answers[name] or NOTHING} {verdict(answer.scores[name])}" if name in answer.answers else ""
                for name in conditions
            ]
            rows.append([image, answer.question, answer.reference, *said])
        if example.left_out:
            rows.append([image, f"and {example.left_out:,} more", *[""] * (1 + len(conditions))])
    return Table(("image", "question", "right", *(CONDITION_TITLES[name] for name in conditions)), rows)


def _cell(cell: Cell | None) -> str | Text:
    if cell is None:
        return NONE
    return Text(two_decimals(cell.score), "" if cell.ci95 is None else span(cell.ci95), tuple(cell.notes))


def _origin(row: ComparisonRow) -> str:
    known: Sequence[str] = [SYSTEM_TITLES.get(row.system, ""), row.language_model]
    return ", ".join(part for part in known if part)


_OTHER = "other-image"
_HEADER = (
    "benchmark",
    "with image",
    "no image",
    "grey image",
    "another's image",
    "guessing",
    "image adds",
    "95%",
)
NOTE = (
    "Image adds: the score with the image minus the score without, in points; 95% paired, clustered by image. "
    "Guessing: what blind guessing gets on an item on average; scores of pairs or categories are no means of items."
)
MARKS = {
    "off": ("no image", "○", "quiet"),
    "grey": ("grey image", "■", "quiet"),
    _OTHER: ("another item's image", "▲", "bad"),
    "on": ("with the image", "●", "on"),
}
"""By what is shown: in words, sign and colour; the last one is drawn on top."""


def by_image(scorecard: Scorecard) -> dict[str, BenchmarkScore]:
    """The benchmarks, the one to which the image adds most first; by percent of the maximum."""
    ranked = sorted(scorecard.benchmarks.items(), key=lambda entry: -entry[1].image_adds / entry[1].maximum)
    return dict(ranked)


def looking_sentence(scorecard: Scorecard) -> str:
    """Which benchmarks do not need the image."""
    blind = [
        name
        for name, score in by_image(scorecard).items()
        if any(
            low <= 0 for low in [score.image_adds_ci95[0], *(c.image_adds_ci95[0] for c in score.conditions.values())]
        )
    ]
    if not blind:
        return "On every benchmark the right image adds to the score, whatever takes its place."
    return f"Not shown to need the right image (an interval of what it adds reaches 0): {', '.join(blind)}."


def looking_table(scorecard: Scorecard, *, titles: bool) -> Table:
    """The figures, sorted by what the image adds, under the benchmarks' titles or their names."""
    rows = [
        [
            _title(name) if titles else name,
            f"{score.score:.2f}",
            f"{score.image_off:.2f}",
            *(
                f"{score.conditions[shown].score:.2f}" if shown in score.conditions else "not asked"
                for shown in ("grey", _OTHER)
            ),
            f"{score.chance:.2f}%",
            f"{score.image_adds:+.2f}",
            span(score.image_adds_ci95, signed=True),
        ]
        for name, score in by_image(scorecard).items()
    ]
    return Table(_HEADER, rows, numbers=(1, 2, 3, 4, 5, 6))


def looking_bars(scorecard: Scorecard) -> list[Bar]:
    """The same as marks on a line for each benchmark."""
    bars = []
    for name, score in by_image(scorecard).items():
        values = {condition: shown.score for condition, shown in score.conditions.items()}
        values |= {"off": score.image_off, "on": score.score}
        marks = [
            Mark(values[key], kind, f"{what}: {values[key]:.2f}", sign)
            for key, (what, sign, kind) in MARKS.items()
            if key in values
        ]
        low, high = sorted((score.image_off, score.score))
        bars.append(
            Bar(
                _title(name),
                f"{score.image_adds:+.2f}",
                joined=(low, high),
                # Guessing is in percent, whatever the benchmark's unit.
                dashed=score.chance * score.maximum / 100,
                marks=marks,
                title=f"guessing: {score.chance:.2f}",
                scale=(0.0, score.maximum),
            )
        )
    return bars


def _title(name: str) -> str:
    return BENCHMARKS[name].title if name in BENCHMARKS else name
