"""``report.json``, ``report.html`` and ``report.md``: what a scorecard means, with the images behind it.

The page and the Markdown are rendered from the JSON's contents and the images alone, so that they cannot differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from manyeyes.evaluation.benchmarks import Benchmark
from manyeyes.evaluation.outcomes import Outcome
from manyeyes.evaluation.report import tables as report_tables
from manyeyes.evaluation.report.comparison import NO_CHAMPION, SYSTEM_TITLES, Champion, compare_scorecard, weigh_cost
from manyeyes.evaluation.report.contents import (
    BenchmarkDetails,
    Example,
    ExampleAnswer,
    Mistake,
    Report,
    Reproduction,
    Unread,
    describe_reproduction,
    read_report,
)
from manyeyes.evaluation.scorecard import BenchmarkScore, Interval, Scorecard
from manyeyes.pages import Bar, Drawing, Mark, Point, make_picture, render, scatter, short_count, span, two_decimals
from manyeyes.recipe import Recipe
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER, TOKENIZER_TEMPLATE, get_chat_template, render_turns
from manyeyes.runtime.preprocess import decode_image
from manyeyes.storage import write_file

__all__ = ["NO_CHAMPION", "Champion", "Report", "build_report", "read_report", "write_report"]

SIGNS = {"llava": "●", "eagle": "▲", "cambrian": "■", "mini-gemini": "◆"}
_DRAWN_LAST = {"published": 0, "champion": 1, "this": 2}


def render_html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The whole report as one HTML file without scripts or references.

    Args:
        report: What it says.
        pictures: Image files by sha256, for the examples; those that are missing are named instead.

    Raises:
        RecordError: A picture cannot be decoded.
    """
    return render(
        "report.html",
        title=report.title,
        report=report,
        card=report.scorecard,
        tables=report_tables,
        pictures={sha256: make_picture(decode_image(data)) for sha256, data in pictures.items()},
        score_bars=_score_bars(report),
        systems={
            row.system: (SIGNS[row.system], SYSTEM_TITLES[row.system]) for row in report.comparison.rows if row.system
        },
        trade_off_plots=_trade_off_plots(report),
        type_bars=_type_bars,
    )


def render_markdown(report: Report) -> str:
    """The whole report as Markdown, pictures left out."""
    return render(
        "report.md",
        report=report,
        card=report.scorecard,
        tables=report_tables,
    )


def _score_bars(report: Report) -> list[Bar]:
    """Every model's score on each benchmark, this model's with its interval; one line a benchmark."""
    comparison = report.comparison
    bars = []
    for name, column in comparison.columns.items():
        ours = comparison.rows[0].cells[name]
        marks = [
            Mark(
                cell.score,
                row.system if row.kind == "published" else row.kind,
                f"{row.name}: {two_decimals(cell.score)}" + ("" if cell.ci95 is None else f" ({span(cell.ci95)})"),
                SIGNS[row.system] if row.kind == "published" else "",
            )
            for row in sorted(comparison.rows, key=lambda row: _DRAWN_LAST[row.kind])
            if (cell := row.cells.get(name)) is not None
        ]
        bars.append(
            Bar(column.title, two_decimals(ours.score), interval=ours.ci95, marks=marks, scale=(0.0, column.maximum))
        )
    return bars


def _trade_off_plots(report: Report) -> list[Drawing]:
    """Score against visual tokens and, where two models have them, against FLOPs."""
    if report.trade_off is None:
        return []
    numbered = list(enumerate(report.trade_off.points, start=1))
    costs: list[tuple[str, list[int | None]]] = [
        ("visual tokens of an image", [point.visual_tokens for _, point in numbered]),
        ("FLOPs of a sample", [point.flops_per_sample for _, point in numbered]),
    ]
    plots = []
    for label, values in costs:
        points = [
            Point(
                cost,
                point.score,
                str(number),
                f"{point.name}: {two_decimals(point.score)}, {short_count(cost)}",
                point.system if point.kind == "published" else point.kind,
                SIGNS[point.system] if point.kind == "published" else "",
            )
            for (number, point), cost in zip(numbered, values, strict=True)
            if cost is not None
        ]
        if len(points) >= 2:
            ticks = {x: short_count(x) for x in sorted({point.x for point in points})}
            plots.append(scatter(points, x_label=label, logarithmic=True, ticks=ticks))
    return plots


def _type_bars(score: BenchmarkScore) -> list[Bar]:
    """With and without the image: all questions, and each type of answer where there are several."""
    scale = 100 / score.maximum
    ends, ends_off = ((low * scale, high * scale) for low, high in (score.ci95, score.image_off_ci95))
    bars = _pair(f"all ({score.n:,})", score.score * scale, ends, score.image_off * scale, ends_off, score)
    if len(score.by_type) > 1:
        for name, part in score.by_type.items():
            bars += _pair(f"{name} ({part.n:,})", part.score, part.ci95, part.image_off, part.image_off_ci95, None)
    return bars


def _pair(
    label: str, on: float, on_ci: Interval, off: float, off_ci: Interval, ceiling_of: BenchmarkScore | None
) -> list[Bar]:
    ceiling = None if ceiling_of is None else ceiling_of.question_only_ceiling
    return [
        Bar(label, f"{on:.2f}%", on, "on", on_ci, title=f"{on:.2f}% ({span(on_ci)})"),
        Bar("", f"{off:.2f}%", off, "off", off_ci, dashed=ceiling, title=f"{off:.2f}% ({span(off_ci)})"),
    ]


_SAMPLES = 6
_QUESTIONS_A_SAMPLE = 5
_MISTAKES = 10
_UNREAD = 20
_LONGEST_TEXT = 400
KINDS = {"torch": "checkpoint in PyTorch", "bundle": "ONNX bundle"}


def build_report(
    scorecard: Scorecard,
    outcomes: Sequence[Outcome],
    benchmarks: Sequence[Benchmark],
    *,
    recipe: Recipe | None = None,
    champion: Champion = NO_CHAMPION,
    reproduction: Reproduction | None = None,
) -> Report:
    """Gather everything.

    Args:
        scorecard: The figures.
        outcomes: Every item's answer.
        benchmarks: For titles and prompts; those without a score are left out.
        recipe: What was asked, for the chat template and for whoever repeats it.
        champion: What the registry has.
        reproduction: Where other processes answered; this one did when left out.
    """
    by_name = {benchmark.row.name: benchmark for benchmark in benchmarks}
    scored = {name: by_name[name] for name in scorecard.benchmarks if name in by_name}
    answers: dict[str, list[Outcome]] = {name: [] for name in scored}
    for outcome in outcomes:
        if outcome.benchmark in answers:
            answers[outcome.benchmark].append(outcome)
    comparison = compare_scorecard(
        scorecard, prompts={name: benchmark.style for name, benchmark in scored.items()}, champion=champion
    )
    return Report(
        title=f"{scorecard.recipe}: {KINDS[scorecard.model.kind]}",
        scorecard=scorecard,
        comparison=comparison,
        trade_off=weigh_cost(comparison),
        details={name: _details(benchmark, answers[name], recipe) for name, benchmark in scored.items()},
        reproduction=reproduction
        or describe_reproduction(
            scorecard.model.kind, benchmarks=list(scored), recipe=recipe, data_md5=scorecard.data_md5
        ),
    )


def read_pictures(report: Report, benchmarks: Sequence[Benchmark]) -> dict[str, bytes]:
    """The image files that a report's examples show, by sha256."""
    pictures: dict[str, bytes] = {}
    for benchmark in benchmarks:
        details = report.details.get(benchmark.row.name)
        if details is None:
            continue
        wanted = {example.image_sha256 for example in (*details.worst, *details.best)}
        records = {item.image_sha256s[0]: item.record for item in benchmark.items if item.image_sha256s}
        for sha256 in sorted(wanted & set(records)):
            pictures[sha256] = benchmark.read_images(records[sha256])[0]
    return pictures


def _details(benchmark: Benchmark, outcomes: Sequence[Outcome], recipe: Recipe | None) -> BenchmarkDetails:
    row = benchmark.row
    by_image: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.image_sha256:
            by_image.setdefault(outcome.image_sha256, []).append(outcome)
    wrong = {image: sum(outcome.correct < 1 for outcome in members) for image, members in by_image.items()}
    gained = {
        image: sum(outcome.correct - outcome.correct_image_off for outcome in members)
        for image, members in by_image.items()
    }
    worst = [image for image in sorted(by_image, key=lambda image: (-wrong[image], image)) if wrong[image]]
    best = [image for image in sorted(by_image, key=lambda image: (-gained[image], image)) if not wrong[image]]
    prompt, whole = _read_prompt(benchmark, recipe)
    return BenchmarkDetails(
        title=row.title,
        metric=row.metric,
        dataset=f"{row.hub_id}, {row.config}, {row.split}" if row.hub_id else row.dataset,
        prompts=benchmark.style,
        prompt=prompt,
        prompt_is_whole=whole,
        images=len(by_image),
        images_with_mistakes=len(worst),
        wrong=sum(outcome.correct < 1 for outcome in outcomes),
        mistakes=_mistakes(outcomes),
        unread=[
            Unread(
                item=outcome.id, question=_shorten(outcome.question), prediction=_shorten(outcome.prediction.strip())
            )
            for outcome in [outcome for outcome in outcomes if outcome.parsed is None][:_UNREAD]
        ],
        worst=[_example(by_image[image]) for image in worst[:_SAMPLES]],
        best=[_example(by_image[image]) for image in best[:_SAMPLES]],
    )


def _read_prompt(benchmark: Benchmark, recipe: Recipe | None) -> tuple[str, bool]:
    item = benchmark.items[0]
    asked = f"{IMAGE_PLACEHOLDER}\n" * len(item.image_sha256s) + item.prompt
    if recipe is None or recipe.model.chat.template == TOKENIZER_TEMPLATE:
        return asked, False
    chat = recipe.model.chat
    template = get_chat_template(chat.template)
    return render_turns(template, [("human", asked)], system=chat.system, generation_prompt=True), True


def _mistakes(outcomes: Sequence[Outcome]) -> list[Mistake]:
    wrong = Counter(
        (_shorten(outcome.reference), _shorten(outcome.prediction.strip()))
        for outcome in outcomes
        if outcome.correct < 1
    )
    frequent = sorted(wrong.items(), key=lambda entry: (-entry[1], entry[0]))[:_MISTAKES]
    return [Mistake(reference=right, prediction=said, times=times) for (right, said), times in frequent]


def _example(outcomes: Sequence[Outcome]) -> Example:
    # Wrong answers first, then those that are right only with the image.
    ordered = sorted(outcomes, key=lambda outcome: (outcome.correct, outcome.correct_image_off))
    shown = ordered[:_QUESTIONS_A_SAMPLE]
    return Example(
        item=outcomes[0].id,
        image_sha256=outcomes[0].image_sha256,
        answers=[_answer(outcome) for outcome in shown],
        left_out=len(ordered) - len(shown),
    )


def _answer(outcome: Outcome) -> ExampleAnswer:
    said: Mapping[str, tuple[str | None, float | None]] = {
        "image-on": (outcome.prediction, outcome.correct),
        "image-off": (outcome.prediction_image_off, outcome.correct_image_off),
        "grey": (outcome.prediction_grey, outcome.correct_grey),
        "other-image": (outcome.prediction_other_image, outcome.correct_other_image),
    }
    return ExampleAnswer(
        question=_shorten(outcome.question),
        reference=_shorten(outcome.reference),
        answers={condition: _shorten(text.strip()) for condition, (text, _) in said.items() if text is not None},
        scores={condition: round(score, 4) for condition, (_, score) in said.items() if score is not None},
    )


def _shorten(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}… ({len(text):,} characters)"


def write_report(folder: Path, report: Report, benchmarks: Sequence[Benchmark]) -> None:
    """Write the three files into a folder; ``benchmarks`` have the images of the examples.

    Raises:
        RecordError: An image of an example cannot be decoded.
        StorageError: No space, or no permission.
    """
    write_file(folder / "report.html", render_html(report, read_pictures(report, benchmarks)))
    write_file(folder / "report.md", render_markdown(report))
    write_file(folder / "report.json", report.model_dump_json(indent=2) + "\n")
