"""Two models on the same questions: which is better, how sure that is, and on which items they part.

Every figure is the second model minus the first, paired by item and clustered by image or document.

What a model answered and scored is read from an evaluation's folder or from one of ``manyeyes score``: both have
figures with a digest of what was asked, and every item's outcome; that is all that comparing needs.

The pages are here too: ``compare.html`` and its Markdown, and ``correlation.html``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS, find_benchmark
from manyeyes.evaluation.benchmarks.benchmark import CheckedRow, Unit
from manyeyes.evaluation.benchmarks.items import RowReader
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, read_outcomes
from manyeyes.evaluation.score import ITEMS_FILE, SCORE_FILE, ScoreReport, read_json_lines
from manyeyes.evaluation.scorecard import Interval, ScoredBenchmark, read_scorecard
from manyeyes.evaluation.statistics.correlation import BenchmarkCorrelation
from manyeyes.evaluation.statistics.significance import POWER, PairedTest, average_difference, compare_scores, holm
from manyeyes.pages import Bar, Mark, Picture, Point, Table, Text, make_picture, render, scatter, span
from manyeyes.runtime.preprocess import decode_image
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel

ANSWERS = "answers"
"""Kind of a model that is known by its answers alone."""


@dataclass(frozen=True)
class Results:
    """What was found of one model.

    Attributes:
        name: As the user named it.
        digest: Of the checkpoint or the bundle; of the answers where nothing else is known.
        kind: ``torch``, ``bundle`` or ``answers``.
        recipe: Its name; empty for answers.
        data_md5: Of the snapshot; empty for answers.
        scores: By benchmark.
        items: Every item's answer.
    """

    name: str
    digest: str
    kind: str
    recipe: str
    data_md5: str
    scores: Mapping[str, ScoredBenchmark]
    items: OutcomeFile


def read_results(path: Path, *, name: str = "", scorecard: str = "scorecard.json") -> Results:
    """Read a model's results.

    Args:
        path: A folder with a scorecard and ``items.parquet`` in it or in its folder ``scorecard``, or the scorecard;
            or a folder of ``manyeyes score``.
        name: For reports; the path when empty.
        scorecard: File name of the scorecard in a folder.

    Raises:
        EvaluationError: A file is missing or broken, or two do not belong together.
    """
    file = path
    if path.is_dir():
        file = path / scorecard
        if not file.is_file() and (path / "scorecard" / scorecard).is_file():
            file = path / "scorecard" / scorecard
        if not file.is_file() and ((path / SCORE_FILE).is_file() or (path / ITEMS_FILE).is_file()):
            return _read_scored_answers(path, name or str(path))
    card = read_scorecard(file)
    items = read_outcomes(file.parent / "items.parquet")
    digests = {benchmark: score.benchmark_digest for benchmark, score in card.benchmarks.items()}
    if items.model_digest != card.model.digest or dict(items.benchmark_digests) != digests:
        raise EvaluationError(
            f"{file.parent / 'items.parquet'} is of another evaluation than {file.name}",
            "the two files of one evaluation",
            "Evaluate the model again.",
        )
    return Results(
        name=name or str(path),
        digest=card.model.digest,
        kind=card.model.kind,
        recipe=card.recipe,
        data_md5=card.data_md5,
        scores=card.benchmarks,
        items=items,
    )


def _read_scored_answers(folder: Path, name: str) -> Results:
    path = folder / SCORE_FILE
    try:
        report = ScoreReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({error})", "what `manyeyes score` writes", "Score the answers again."
        ) from error
    lines = read_json_lines(folder / ITEMS_FILE, needed="every item's outcome")
    if len(lines) != report.n or not report.references_digest:
        raise EvaluationError(
            f"{folder} has {len(lines):,} items in {ITEMS_FILE} and {report.n:,} in {SCORE_FILE}",
            "the two files of one `manyeyes score`",
            "Score the answers again.",
        )
    answers = json.dumps([[line.get("id"), line.get("prediction")] for line in lines])
    digest = hashlib.sha256(answers.encode()).hexdigest()
    digests = {report.benchmark: report.references_digest}
    return Results(
        name=name,
        digest=digest,
        kind=ANSWERS,
        recipe="",
        data_md5="",
        scores={report.benchmark: report},
        items=OutcomeFile(digest, ANSWERS, digests, [_outcome(report.benchmark, line, folder) for line in lines]),
    )


def _outcome(benchmark: str, line: Mapping[str, Any], folder: Path) -> Outcome:
    try:
        return Outcome(
            benchmark=benchmark,
            id=line["id"],
            image_sha256="",
            question=line["question"],
            answer_type="",
            reference=line["reference"],
            prediction=line["prediction"] or "",
            parsed=line["parsed"],
            correct=line["score"],
            # Nothing was asked without the image, and comparing does not look at it.
            prediction_image_off="",
            parsed_image_off=None,
            correct_image_off=0.0,
            cluster_id=line["cluster"],
            facets=json.dumps(line["facets"], sort_keys=True),
        )
    except KeyError as error:
        raise EvaluationError(
            f"{folder / ITEMS_FILE} lacks {error} of an item",
            "what `manyeyes score` writes",
            "Score the answers again.",
        ) from error


LEVEL = 0.05
COMPARE_FILE = "compare.json"

Verdict = Literal["better", "worse", "not shown"]


class ComparedModel(StrictModel):
    """One side of a comparison."""

    name: str = Field(description="As given: a folder, or a registered model.")
    digest: str = Field(description="Of the checkpoint or the bundle; of the answers of a folder of `manyeyes score`.")
    kind: str = Field(description="torch, bundle or answers.")
    recipe: str = Field(description="Name of the recipe; empty for answers.")


class ComparedBenchmark(StrictModel):
    """One benchmark, the second model against the first."""

    title: str = Field(description="For people.")
    variant: str = Field(description="Whose scoring.")
    unit: Unit = Field(description="Of the scores, the difference and what is detectable.")
    n: int = Field(gt=0, description="Items that both answered.")
    clusters: int = Field(gt=0, description="Images or documents.")
    first: float = Field(description="The first model's score.")
    first_ci95: Interval = Field(description="Its 95% interval.")
    second: float = Field(description="The second model's score.")
    second_ci95: Interval = Field(description="Its 95% interval.")
    difference: float = Field(description="Second minus first.")
    ci95: Interval = Field(description="95% interval of difference, paired and clustered; not widened for several.")
    p: float = Field(ge=0, le=1, description="Probability of such a difference between equals; two-sided.")
    p_holm: float = Field(ge=0, le=1, description="The same, corrected for the number of benchmarks (Holm).")
    verdict: Verdict = Field(description="Of the second model, at p_holm below 0.05.")
    detectable: float | None = Field(
        description=f"Difference that this benchmark shows {POWER:.0%} of the time at the 5% level, uncorrected; null "
        "where the two never differ."
    )
    only_first: int = Field(ge=0, description="Items on which the first scores higher.")
    only_second: int = Field(ge=0, description="Items on which the second scores higher.")
    both: int = Field(ge=0, description="Items on which they score the same, above 0.")
    neither: int = Field(ge=0, description="Items on which both score 0.")


class AverageDifference(StrictModel):
    """The mean over the compared benchmarks, each as percent of its maximum."""

    difference: float = Field(description="Second minus first; points.")
    ci95: Interval = Field(description="Its 95% interval; benchmarks taken for independent.")
    p: float = Field(ge=0, le=1, description="Probability of such a difference between equals; two-sided.")
    detectable: float | None = Field(description="As for a benchmark; points.")


class ModelComparison(StrictModel):
    """``compare.json``: two models on the same questions."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    first: ComparedModel = Field(description="What the second is compared with.")
    second: ComparedModel = Field(description="The second model.")
    data_md5: str = Field(description="md5 of the first one's snapshot; empty for answers.")
    average: AverageDifference = Field(description="Over all benchmarks below.")
    benchmarks: dict[str, ComparedBenchmark] = Field(min_length=1, description="By benchmark.")
    not_compared: dict[str, str] = Field(description="Benchmarks that were left out, and why.")


def compare_results(first: Results, second: Results) -> ModelComparison:
    """Compare two models on every benchmark that asked both the same.

    Args:
        first: What the second is compared with.
        second: The other model.

    Raises:
        EvaluationError: No benchmark asked both the same.
    """
    if (first.kind == ANSWERS) != (second.kind == ANSWERS):
        raise EvaluationError(
            f"one of {first.name} and {second.name} is of `manyeyes score`, the other of an evaluation",
            "two of one kind, since only these are known to have been asked the same",
            "Score both models' answers with `manyeyes score` and the same references.",
        )
    names, not_compared = _common(first, second)
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in not_compared.items())
        raise EvaluationError(
            f"{first.name} and {second.name} have no benchmark to compare ({reasons})",
            "one benchmark that asked both the same questions",
            "Evaluate both on the same snapshot with the same settings, or score both with the same references.",
        )
    pairs = {name: paired_outcomes(first.items, second.items, name) for name in names}
    tests: dict[str, PairedTest] = {}
    for name, outcomes in pairs.items():
        ours, theirs = ([outcome.graded for outcome in side] for side in zip(*outcomes, strict=True))
        tests[name] = compare_scores(BENCHMARKS[name], ours, theirs, first.scores[name].variant)
    corrected = dict(zip(names, holm([tests[name].p for name in names]), strict=True))
    average = average_difference([(BENCHMARKS[name], tests[name]) for name in names])
    return ModelComparison(
        first=_model(first),
        second=_model(second),
        data_md5=first.data_md5,
        average=AverageDifference(
            difference=_rounded(average.difference),
            ci95=(_rounded(average.low), _rounded(average.high)),
            p=average.p,
            detectable=None if average.detectable is None else _rounded(average.detectable),
        ),
        benchmarks={
            name: _compared(
                name,
                first.scores[name],
                second.scores[name],
                tests[name],
                corrected[name],
                pairs[name],
            )
            for name in names
        },
        not_compared=not_compared,
    )


def paired_outcomes(first: OutcomeFile, second: OutcomeFile, benchmark: str) -> list[tuple[Outcome, Outcome]]:
    """Both models' outcomes of each item of a benchmark, in the first one's order.

    Raises:
        EvaluationError: They have not the same items.
    """
    theirs = {outcome.id: outcome for outcome in second.of(benchmark)}
    ours = first.of(benchmark)
    if {outcome.id for outcome in ours} != set(theirs):
        raise EvaluationError(
            f"{benchmark} has {len(ours)} items against {len(theirs)}, not the same ones",
            "the same items in both",
            "Evaluate both models again.",
        )
    return [(outcome, theirs[outcome.id]) for outcome in ours]


def write_comparison(comparison: ModelComparison, path: Path) -> None:
    """Write ``compare.json``; whole or not at all.

    Raises:
        StorageError: No space, or no permission.
    """
    write_file(path, comparison.model_dump_json(indent=2) + "\n")


def _common(first: Results, second: Results) -> tuple[list[str], dict[str, str]]:
    names: list[str] = []
    left_out: dict[str, str] = {}
    for name, score in first.scores.items():
        other = second.scores.get(name)
        if other is None:
            left_out[name] = "only the first was asked"
        elif name not in BENCHMARKS:
            left_out[name] = "no such benchmark in this version"
        elif score.variant != other.variant:
            left_out[name] = f"scored as {score.variant} and as {other.variant}"
        elif score.asked.multiple_choice != other.asked.multiple_choice:
            said = {"generate": "written", "prefill": "chosen after one prefill"}
            first_said, second_said = (said[side.asked.multiple_choice] for side in (score, other))
            left_out[name] = f"answers are {first_said} and {second_said}"
        elif score.asked.digest != other.asked.digest:
            counts = (f"{side.n:,} of {side.asked.n_total:,}" for side in (score, other))
            left_out[name] = f"other questions ({'; '.join(counts)})"
        else:
            names.append(name)
    left_out |= {name: "only the second was asked" for name in second.scores if name not in first.scores}
    return names, left_out


def _compared(
    name: str,
    first: ScoredBenchmark,
    second: ScoredBenchmark,
    test: PairedTest,
    p_holm: float,
    outcomes: Sequence[tuple[Outcome, Outcome]],
) -> ComparedBenchmark:
    row = BENCHMARKS[name]
    gains = [theirs.correct - ours.correct for ours, theirs in outcomes]
    verdict: Verdict = "not shown" if p_holm >= LEVEL else "better" if test.difference > 0 else "worse"
    return ComparedBenchmark(
        title=row.title,
        variant=first.variant,
        unit=row.unit,
        n=len(outcomes),
        clusters=test.clusters,
        first=first.score,
        first_ci95=first.ci95,
        second=second.score,
        second_ci95=second.ci95,
        difference=_rounded(test.difference),
        ci95=(_rounded(test.low), _rounded(test.high)),
        p=test.p,
        p_holm=p_holm,
        verdict=verdict,
        detectable=None if test.detectable is None else _rounded(test.detectable),
        only_first=sum(gain < 0 for gain in gains),
        only_second=sum(gain > 0 for gain in gains),
        both=sum(ours.correct == theirs.correct > 0 for ours, theirs in outcomes),
        neither=sum(ours.correct == theirs.correct == 0 for ours, theirs in outcomes),
    )


def _model(results: Results) -> ComparedModel:
    return ComparedModel(name=results.name, digest=results.digest, kind=results.kind, recipe=results.recipe)


def _rounded(value: float) -> float:
    return round(value, 4)


def read_compared_images(snapshot: Snapshot, wanted: Mapping[str, Collection[str]]) -> dict[tuple[str, str], bytes]:
    """Image files by benchmark and sha256; those that the snapshot lacks are left out.

    A data set is read until all of its images are found.

    Args:
        snapshot: Has the benchmarks' data sets.
        wanted: sha256s by benchmark.

    Raises:
        SnapshotError: The snapshot lacks a data set.
        EvaluationError: A column is missing.
    """
    found: dict[tuple[str, str], bytes] = {}
    for name, sha256s in wanted.items():
        left = set(sha256s)
        row = find_benchmark(name)
        rows = RowReader(snapshot.shards(row.dataset), columns=row.columns, name=name) if left else ()
        for number, parquet_row in enumerate(rows):
            asked = row.unfold(parquet_row)[0]
            for data in row.images(CheckedRow(asked, row.columns, f"{name} row {number}")):
                sha256 = hashlib.sha256(data).hexdigest()
                if sha256 in left:
                    left.remove(sha256)
                    found[name, sha256] = data
            if not left:
                break
    return found


EXAMPLES = 12

ReadImage = Callable[[str, str], bytes | None]
"""(benchmark, sha256 of the image) to the file; ``None`` where it is not at hand."""

_HEADER = ("benchmark", "questions", "first", "second", "difference", "95%", "p", "p, Holm", "second is", "detects")
_IN_WORDS: Mapping[Verdict, str] = {"better": "better", "worse": "worse", "not shown": "not shown to differ"}
_KINDS: Mapping[Verdict, str] = {"better": "good", "worse": "bad", "not shown": "quiet"}
_NOTE = (
    "Difference: second minus first on the same questions, with a paired 95% interval over images. p: how often equals "
    "would differ as much or more; Holm's correction holds the chance of any false alarm on this page at 5%. Detects: "
    "the difference that a benchmark would show in four of five cases; a smaller one may be there unseen. The interval "
    "covers which questions were asked, not how another training seed would have come out."
)


def render_comparison(
    comparison: ModelComparison,
    first: Results,
    second: Results,
    *,
    read_image: ReadImage,
    images_missing: str = "",
    examples: int = EXAMPLES,
) -> str:
    """The whole page as one HTML file without scripts or references.

    Args:
        comparison: The figures.
        first: For its answers.
        second: For its answers.
        read_image: Gives the pictures.
        images_missing: Why there are none, for people; empty where there are.
        examples: Most items of each kind and benchmark.
    """

    def show(benchmark: str, sha256: str) -> Picture | None:
        data = read_image(benchmark, sha256) if sha256 else None
        return None if data is None else make_picture(decode_image(data))

    pairs = {name: paired_outcomes(first.items, second.items, name) for name in comparison.benchmarks}
    return render(
        "compare.html",
        **_shown(comparison, titles=True),
        strips=_strips(comparison),
        images_missing=images_missing,
        pairs={
            name: [_choose(outcomes, sign=sign, examples=examples) for sign in (1, -1)]
            for name, outcomes in pairs.items()
        },
        show=show,
    )


def render_comparison_text(comparison: ModelComparison) -> str:
    """The figures as Markdown."""
    return render("compare.md", **_shown(comparison, titles=False))


def _shown(comparison: ModelComparison, *, titles: bool) -> dict[str, object]:
    return {
        "title": f"{comparison.second.name} against {comparison.first.name}",
        "comparison": comparison,
        "sentence": _sentence(comparison),
        "figures": _table(comparison, titles=titles),
        "note": _NOTE,
    }


def images_to_show(
    first: Results, second: Results, benchmarks: Sequence[str], *, examples: int = EXAMPLES
) -> dict[str, set[str]]:
    """The sha256 of every image that the page shows, by benchmark."""
    wanted: dict[str, set[str]] = {}
    for name in benchmarks:
        outcomes = paired_outcomes(first.items, second.items, name)
        chosen = _choose(outcomes, sign=1, examples=examples) + _choose(outcomes, sign=-1, examples=examples)
        wanted[name] = {ours.image_sha256 for ours, _ in chosen if ours.image_sha256}
    return wanted


def _sentence(comparison: ModelComparison) -> str:
    verdicts = [compared.verdict for compared in comparison.benchmarks.values()]
    average = comparison.average
    mean = f"{average.difference:+.2f} points ({span(average.ci95, signed=True)}; p {_p(average.p)})"
    if len(verdicts) == 1:
        (compared,) = comparison.benchmarks.values()
        asked = f"{compared.n:,} questions on {compared.clusters:,} images"
        return f"The second is {_IN_WORDS[compared.verdict]}: {compared.difference:+.2f} {_unit(compared)} on {asked}."
    return (
        f"Of {len(verdicts)} benchmarks the second is better on {verdicts.count('better')}, worse on "
        f"{verdicts.count('worse')} and not shown to differ on {verdicts.count('not shown')}. Mean over benchmarks, "
        f"each as percent of its maximum: {mean}."
    )


def _table(comparison: ModelComparison, *, titles: bool) -> Table:
    rows: list[list[str | Text]] = [
        [
            compared.title if titles else name,
            f"{compared.n:,}",
            f"{compared.first:.2f}",
            f"{compared.second:.2f}",
            f"{compared.difference:+.2f}",
            span(compared.ci95, signed=True),
            _p(compared.p),
            _p(compared.p_holm),
            Text(_IN_WORDS[compared.verdict], kind=_KINDS[compared.verdict]),
            "" if compared.detectable is None else f"{compared.detectable:.2f}",
        ]
        for name, compared in comparison.benchmarks.items()
    ]
    return Table(_HEADER, rows, numbers=(1, 2, 3, 4, 6, 7, 9))


def _strips(comparison: ModelComparison) -> list[Bar]:
    """A dot and its interval for each benchmark around no difference; as percent of the maximum."""
    scales = {name: 100 / BENCHMARKS[name].maximum for name in comparison.benchmarks}
    ends = [abs(end) * scales[name] for name, compared in comparison.benchmarks.items() for end in compared.ci95]
    reach = max(ends, default=0) * 1.05 or 1.0
    bars = []
    for name, compared in comparison.benchmarks.items():
        difference, low, high = (scales[name] * value for value in (compared.difference, *compared.ci95))
        kind = "off" if compared.verdict == "not shown" else _KINDS[compared.verdict]
        bars.append(
            Bar(
                compared.title,
                f"{difference:+.2f}",
                interval=(low, high),
                dashed=0.0,
                marks=[Mark(difference, kind)],
                title=f"{difference:+.2f} ({span((low, high))})",
                scale=(-reach, reach),
            )
        )
    return sorted(bars, key=lambda bar: -bar.marks[0].at)


def _choose(outcomes: Sequence[tuple[Outcome, Outcome]], *, sign: int, examples: int) -> list[tuple[Outcome, Outcome]]:
    """The items with the largest gain of one side, evenly over the benchmark where they are alike."""
    gaining = [pair for pair in outcomes if sign * (pair[1].correct - pair[0].correct) > 0]
    largest = max((abs(pair[1].correct - pair[0].correct) for pair in gaining), default=0.0)
    best = [pair for pair in gaining if abs(pair[1].correct - pair[0].correct) == largest]
    if len(best) >= examples:
        return [best[place * len(best) // examples] for place in range(examples)]
    rest = [pair for pair in gaining if pair not in best]
    rest.sort(key=lambda pair: -abs(pair[1].correct - pair[0].correct))
    return (best + rest)[:examples]


def _unit(compared: ComparedBenchmark) -> str:
    return "points" if compared.unit == "percent" else "points of the benchmark's own"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


_NUM_COLOURS = 8


def render_correlation(found: BenchmarkCorrelation) -> str:
    """The page as one HTML file without scripts or references."""
    kinds = {name: f"group-{group % _NUM_COLOURS}" for name, group in found.groups.items()}
    groups = []
    for number in sorted(set(found.groups.values())):
        members = [name for name, group in found.groups.items() if group == number]
        known = {BENCHMARKS[name].cambrian_group or "" for name in members if name in BENCHMARKS} - {""}
        groups.append((kinds[members[0]], ", ".join(members), ", ".join(sorted(known))))
    points = [Point(x, y, name, name, kinds[name]) for name, (x, y) in found.loadings.items()]
    return render(
        "correlation.html",
        title=f"How {len(found.benchmarks)} benchmarks go together over {len(found.models)} models",
        found=found,
        shares=[f"{100 * share:.0f}%" for share in found.explained[:2]],
        groups=groups,
        plot=scatter(points, x_label="first component", y_label="second component", width=600, height=560),
        matrix=[(name, kinds[name], row) for name, row in zip(found.benchmarks, found.correlation, strict=True)],
    )
