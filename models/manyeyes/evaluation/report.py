"""``report.html`` and ``report.md``: what a scorecard means, with the images behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from manyeyes.evaluation.benchmarks import Benchmark
from manyeyes.evaluation.looking import looking_html, looking_markdown
from manyeyes.evaluation.outcomes import Outcome
from manyeyes.evaluation.page import markdown_table, page, table
from manyeyes.evaluation.picture import image_tag
from manyeyes.evaluation.scorecard import BenchmarkScore, Interval, Scorecard

_SAMPLES = 6
_QUESTIONS_A_SAMPLE = 5
_MISTAKES = 10
_GROUP_COLUMNS = ["group", "average %", "95%", "benchmarks, % of the maximum", "missing"]
_KIND = {"torch": "checkpoint in PyTorch", "bundle": "ONNX bundle"}


def render_html(scorecard: Scorecard, outcomes: Sequence[Outcome], benchmarks: Sequence[Benchmark]) -> str:
    """The whole report as one HTML file without scripts or references.

    Args:
        scorecard: The figures.
        outcomes: Every item's answer.
        benchmarks: For images and titles, in any order.
    """
    title = f"{scorecard.recipe}: {_KIND[scorecard.model.kind]}"
    benchmarks = [benchmark for benchmark in benchmarks if benchmark.row.name in scorecard.benchmarks]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">Model <code>{escape(scorecard.model.digest[:16])}</code>, data '
        f"<code>{escape(scorecard.data_md5[:16])}</code>. All intervals are at 95% and clustered by image.</p>",
    ]
    if len(benchmarks) > 1:
        parts.append(_overview(scorecard, benchmarks))
        parts.append(_groups_html(scorecard))
    parts += [f"<p>{escape(name)} is not scored: {escape(reason)}.</p>" for name, reason in scorecard.skipped.items()]
    if benchmarks:
        parts.append(looking_html(scorecard))
    for benchmark in benchmarks:
        name = benchmark.row.name
        mine = [outcome for outcome in outcomes if outcome.benchmark == name]
        parts.append(_benchmark_html(scorecard.benchmarks[name], mine, benchmark))
    parts.append(_fine_print(scorecard))
    return page(title, "\n".join(parts))


def render_markdown(scorecard: Scorecard, outcomes: Sequence[Outcome], benchmarks: Sequence[Benchmark]) -> str:
    """The figures as Markdown, for a terminal or the Kubeflow UI.

    Args:
        scorecard: The figures.
        outcomes: Every item's answer.
        benchmarks: For titles.
    """
    lines = [f"# {scorecard.recipe}: {_KIND[scorecard.model.kind]}", ""]
    lines += [f"{name} is not scored: {reason}.\n" for name, reason in scorecard.skipped.items()]
    benchmarks = [benchmark for benchmark in benchmarks if benchmark.row.name in scorecard.benchmarks]
    rows = _group_rows(scorecard)
    if rows:
        lines += ["## Cambrian-1's groups", "", markdown_table(_GROUP_COLUMNS, rows), ""]
    for benchmark in benchmarks:
        name = benchmark.row.name
        score = scorecard.benchmarks[name]
        rows = [["all", str(score.n), *_figures(score.score, score.ci95, score.image_off, score.image_off_ci95)]]
        for answer_type, part in score.by_type.items():
            figures = _figures(part.score, part.ci95, part.image_off, part.image_off_ci95)
            rows.append([answer_type, str(part.n), *figures])
        mine = [outcome for outcome in outcomes if outcome.benchmark == name]
        lines += [
            f"## {benchmark.row.title}",
            "",
            _sentence(score),
            "",
            markdown_table(["answers", "questions", "score (%)", "95%", "image off (%)", "95%"], rows),
            "",
        ]
        mistakes = _mistakes(mine)
        if mistakes:
            frequent = [[right, wrong, str(count)] for (right, wrong), count in mistakes]
            lines += [
                "Most frequent mistakes:",
                "",
                markdown_table(["right answer", "model's answer", "times"], frequent),
                "",
            ]
    if benchmarks:
        lines.append(looking_markdown(scorecard))
    return "\n".join(lines)


def _overview(scorecard: Scorecard, benchmarks: Sequence[Benchmark]) -> str:
    """One row a benchmark, and the mean over them."""
    rows = []
    for benchmark in benchmarks:
        score = scorecard.benchmarks[benchmark.row.name]
        rows.append(
            [
                escape(benchmark.row.title),
                f"{score.n:,}",
                f"{score.score:.2f}",
                _span(score.ci95),
                f"{score.image_off:.2f}",
                f"{score.image_adds:+.2f}",
                _span(score.image_adds_ci95),
                f"{score.parse_failures:,}",
            ]
        )
    scores = scorecard.benchmarks.values()
    mean = sum(100 * score.score / score.maximum for score in scores) / len(scores)
    mean_off = sum(100 * score.image_off / score.maximum for score in scores) / len(scores)
    rows.append(["Mean", "", f"{mean:.2f}", "", f"{mean_off:.2f}", f"{mean - mean_off:+.2f}", "", ""])
    header = ["", "questions", "score %", "95%", "no image %", "image adds", "95%", "not understood"]
    return f"<h2>{len(benchmarks)} benchmarks</h2>{table(header, rows, numbers=[1, 2, 4, 5, 7])}"


def _groups_html(scorecard: Scorecard) -> str:
    rows = [[escape(cell) for cell in row] for row in _group_rows(scorecard)]
    if not rows:
        return ""
    return f"<h2>Cambrian-1's groups</h2>{table(_GROUP_COLUMNS, rows, numbers=[1])}"


def _group_rows(scorecard: Scorecard) -> list[list[str]]:
    return [
        [
            name,
            "" if group.score is None else f"{group.score:.2f}",
            "" if group.ci95 is None else _span(group.ci95),
            ", ".join(f"{benchmark} {percent:.2f}" for benchmark, percent in group.parts.items()),
            ", ".join(group.missing),
        ]
        for name, group in scorecard.groups.items()
    ]


def _figures(score: float, ci95: Interval, image_off: float, image_off_ci95: Interval) -> list[str]:
    return [f"{score:.2f}", _span(ci95), f"{image_off:.2f}", _span(image_off_ci95)]


def _span(interval: Interval) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _sentence(score: BenchmarkScore) -> str:
    asked = (
        f"{score.n:,} questions on {score.images:,} images"
        if score.n == score.n_total
        else f"{score.n:,} of {score.n_total:,} questions, on {score.images:,} images; the judge gave no verdict on "
        f"{score.unjudged:,}"
        if score.unjudged
        else f"only the first {score.n:,} of {score.n_total:,} questions, on {score.images:,} images"
    )
    right = "% right" if score.unit == "percent" else f"{_mark(score)} {_right(score)}"
    ceiling = ""
    if score.question_only_ceiling is not None:
        ceiling = f" The question alone allows at most {score.question_only_ceiling:.2f}%."
    return (
        f"{score.score:.2f}{right} ({_span(score.ci95)}) on {asked}; {score.image_off:.2f}{_mark(score)} without the "
        f"image.{ceiling}"
    )


def _mark(score: BenchmarkScore) -> str:
    """What stands behind a figure in the benchmark's unit."""
    return "" if score.unit == "points" else "%"


def _right(score: BenchmarkScore) -> str:
    if score.unit == "relative":
        return "of what the reference answers get"
    return "right" if score.unit == "percent" else f"of {score.maximum:g} points"


def _benchmark_html(score: BenchmarkScore, outcomes: Sequence[Outcome], benchmark: Benchmark) -> str:
    tiles = [
        (f"{score.score:.2f}{_mark(score)}", f"{_right(score)}, with the image", _span(score.ci95)),
        (f"{score.image_off:.2f}{_mark(score)}", f"{_right(score)}, image removed", _span(score.image_off_ci95)),
        (f"{score.image_adds:+.2f}", "points from the image", _span(score.image_adds_ci95)),
        (f"{score.parse_failures:,}", "answers not understood", f"of {score.n:,} questions"),
    ]
    tile_html = "".join(
        f'<div class="tile"><b>{figure}</b>{what}<span>{detail}</span></div>' for figure, what, detail in tiles
    )
    return "\n".join(
        [
            f"<h2>{escape(benchmark.row.title)}</h2>",
            f"<p>{escape(_sentence(score))}</p>",
            f'<div class="tiles">{tile_html}</div>',
            "<h2>By type of answer</h2>",
            _bars(score),
            _mistakes_html(outcomes),
            _samples_html(outcomes, benchmark),
        ]
    )


def _bars(score: BenchmarkScore) -> str:
    scale = 100 / score.maximum
    ends, ends_off = ((low * scale, high * scale) for low, high in (score.ci95, score.image_off_ci95))
    rows = [_bar_pair(f"all ({score.n:,})", score.score * scale, ends, score.image_off * scale, ends_off, score)]
    rows += [
        _bar_pair(f"{name} ({part.n:,})", part.score, part.ci95, part.image_off, part.image_off_ci95, None)
        for name, part in score.by_type.items()
    ]
    key = (
        '<div class="key"><span><i class="on"></i>with the image</span><span><i class="off"></i>image removed</span>'
        '<span><i class="dash"></i>best possible from the question alone</span><span>whiskers: 95%</span></div>'
    )
    return f'{key}<div class="bars">{"".join(rows)}</div>'


def _bar_pair(
    label: str, on: float, on_ci: Interval, off: float, off_ci: Interval, ceiling_of: BenchmarkScore | None
) -> str:
    ceiling = ""
    if ceiling_of is not None and ceiling_of.question_only_ceiling is not None:
        ceiling = f'<div class="mark" style="left:{ceiling_of.question_only_ceiling:.2f}%"></div>'
    return (
        f'<div class="group">{escape(label)}</div>{_bar("on", on, on_ci, "")}<div>{on:.2f}%</div>'
        f'<div class="group next"></div>{_bar("off next", off, off_ci, ceiling)}<div class="next">{off:.2f}%</div>'
    )


def _bar(kind: str, value: float, interval: Interval, extra: str) -> str:
    low, high = interval
    fill, _, place = kind.partition(" ")
    return (
        f'<div class="track {place}" title="{value:.2f}% ({_span(interval)})">'
        f'<div class="fill {fill}" style="width:{value:.2f}%">'
        f'</div><div class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>{extra}</div>'
    )


def _mistakes(outcomes: Sequence[Outcome]) -> list[tuple[tuple[str, str], int]]:
    wrong = Counter(
        (outcome.reference, outcome.prediction.strip() or "(nothing)") for outcome in outcomes if outcome.correct < 1
    )
    return sorted(wrong.items(), key=lambda entry: (-entry[1], entry[0]))[:_MISTAKES]


def _mistakes_html(outcomes: Sequence[Outcome]) -> str:
    mistakes = _mistakes(outcomes)
    total = sum(outcome.correct < 1 for outcome in outcomes)
    if not mistakes:
        return "<h2>Mistakes</h2><p>None: every answer is right.</p>"
    rows = [[escape(right), escape(wrong), f"{count:,}"] for (right, wrong), count in mistakes]
    shown = table(["right answer", "model's answer", "times"], rows, numbers=[2])
    return f"<h2>Most frequent mistakes</h2><p>{total:,} answers are wrong.</p>{shown}"


def _samples_html(outcomes: Sequence[Outcome], benchmark: Benchmark) -> str:
    by_image: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.image_sha256:
            by_image.setdefault(outcome.image_sha256, []).append(outcome)
    records = {item.image_sha256s[0]: item.record for item in benchmark.items if item.image_sha256s}

    def wrong(image: str) -> int:
        return sum(outcome.correct < 1 for outcome in by_image[image])

    def gained(image: str) -> float:
        return sum(outcome.correct - outcome.correct_image_off for outcome in by_image[image])

    worst = [image for image in sorted(by_image, key=lambda image: (-wrong(image), image)) if wrong(image)]
    best = [image for image in sorted(by_image, key=lambda image: (-gained(image), image)) if not wrong(image)]
    parts = []
    if worst:
        cards = "".join(_sample(image, by_image[image], records, benchmark) for image in worst[:_SAMPLES])
        parts.append(
            f"<h2>Worst images</h2><p>{len(worst):,} of {len(by_image):,} images have a wrong answer; these have most. "
            f'"Without" is the answer with the image removed.</p><div class="samples">{cards}</div>'
        )
    if best:
        cards = "".join(_sample(image, by_image[image], records, benchmark) for image in best[:_SAMPLES])
        parts.append(
            "<h2>Best images</h2><p>Every answer is right, and the image makes the most difference.</p>"
            f'<div class="samples">{cards}</div>'
        )
    return "\n".join(parts)


def _sample(image: str, outcomes: Sequence[Outcome], records: dict[str, int], benchmark: Benchmark) -> str:
    data = benchmark.read_images(records[image])[0]
    # Wrong answers first, then those that are right only with the image.
    ordered = sorted(outcomes, key=lambda outcome: (outcome.correct, outcome.correct_image_off))
    lines = "".join(_answer(outcome) for outcome in ordered[:_QUESTIONS_A_SAMPLE])
    left = len(ordered) - _QUESTIONS_A_SAMPLE
    more = f'<li class="quiet">and {left} more</li>' if left > 0 else ""
    return f'<div class="sample">{image_tag(data, alt=outcomes[0].id.partition("#")[0])}<ul>{lines}{more}</ul></div>'


def _answer(outcome: Outcome) -> str:
    said = escape(outcome.prediction.strip() or "(nothing)")
    without = escape(outcome.prediction_image_off.strip() or "(nothing)")
    if outcome.correct >= 1:
        verdict = f'<span class="good">{said} ✓</span>'
    else:
        verdict = f'<span class="bad">{said} ✗</span> right: {escape(outcome.reference)}'
    return f'<li>{escape(outcome.question)}<br>{verdict} <span class="quiet">· without: {without}</span></li>'


def _fine_print(scorecard: Scorecard) -> str:
    rows = [
        ["model", f"<code>{escape(scorecard.model.digest)}</code>"],
        ["recipe", f"{escape(scorecard.recipe)} <code>{escape(scorecard.recipe_digest)}</code>"],
        ["data", f"<code>{escape(scorecard.data_md5)}</code>"],
        ["code", f"<code>{escape(scorecard.code_digest)}</code>"],
    ]
    if scorecard.judge is not None:
        rows.append(["judge", escape(scorecard.judge.in_words())])
    for name, score in scorecard.benchmarks.items():
        rows += [
            [f"{escape(name)}: questions", f"<code>{escape(score.benchmark_digest)}</code>"],
            [f"{escape(name)}: prompt", f"<code>{escape(score.prompt_digest)}</code>"],
            [f"{escape(name)}: scored as", escape(score.variant)],
            *([[f"{escape(name)}: judge", escape(score.judge)]] if score.judge else []),
            [f"{escape(name)}: longest answer", f"{score.max_new_tokens} tokens, greedy"],
            [f"{escape(name)}: blind guessing", f"{score.chance:.2f}%"],
            [f"{escape(name)}: speed", f"{score.questions_per_s:,.0f} questions/s with the image"],
        ]
    return f"<details><summary>Digests and settings</summary>{table(['what', 'value'], rows)}</details>"
