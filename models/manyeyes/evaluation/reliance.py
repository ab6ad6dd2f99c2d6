"""How much a model relies on each of its encoders: scores with one encoder's features zeroed or another image's.

Zeros take away what the encoder says, and leave the model with an input that it was not trained on; another image's
features are such as it knows, and wrong. An encoder that can be lost both ways without loss adds nothing here; that the
score falls says that the model, as it was trained, uses it, and not that a model trained without it would be worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering.conditions import plan_questions
from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer
from manyeyes.evaluation.benchmarks import Benchmark, Graded, MultipleChoice, load_benchmarks
from manyeyes.evaluation.benchmarks.benchmark import Unit
from manyeyes.evaluation.scorecard import Interval
from manyeyes.evaluation.statistics.significance import PairedTest, compare_scores, holm, score_interval
from manyeyes.pages import Table, render, span
from manyeyes.recipe import Recipe
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel

How = Literal["zeroed", "shuffled"]
HOWS: tuple[How, ...] = ("zeroed", "shuffled")
RELIANCE_FILE = "reliance.json"


class EncoderReliance(StrictModel):
    """One encoder, disturbed in one way."""

    encoder: str = Field(description="Its name in the recipe.")
    how: How = Field(description="zeroed: all features 0. shuffled: the features of another image.")
    score: float = Field(description="The benchmark's figure; in its unit.")
    loss: float = Field(description="What is lost against the undisturbed model; in the unit.")
    loss_ci95: Interval = Field(description="95% interval of loss, paired, clustered by image.")
    p: float = Field(ge=0, le=1, description="Probability of such a difference were there none; two-sided.")
    p_holm: float = Field(ge=0, le=1, description="The same, corrected for the number of rows (Holm).")


class BenchmarkReliance(StrictModel):
    """One benchmark."""

    title: str = Field(description="For people.")
    unit: Unit = Field(description="Of the scores.")
    n: int = Field(gt=0, description="Questions.")
    images: int = Field(gt=0, description="Images or documents: the clusters of the intervals.")
    score: float = Field(description="Undisturbed.")
    ci95: Interval = Field(description="Its 95% interval.")
    multiple_choice: MultipleChoice = Field(
        default="generate", description="generate: answers were written. prefill: those with options were chosen."
    )
    encoders: tuple[EncoderReliance, ...] = Field(description="Each encoder, zeroed and shuffled.")


class RelianceReport(StrictModel):
    """``reliance.json``: what a model loses with each encoder."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    model_digest: str = Field(description="Of the checkpoint.")
    recipe: str = Field(description="Name of the recipe.")
    data_md5: str = Field(description="md5 of the snapshot.")
    benchmarks: dict[str, BenchmarkReliance] = Field(min_length=1, description="By benchmark.")
    skipped: tuple[str, ...] = Field(default=(), description="Benchmarks that a language model judges; not asked.")


def zero_encoder(encoder: str) -> Callable[[dict[str, Tensor], Sequence[int]], dict[str, Tensor]]:
    """A disturbance that makes one encoder's features 0."""

    def disturb(features: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:  # noqa: ARG001
        return {**features, encoder: torch.zeros_like(features[encoder])}

    return disturb


class ShuffleEncoder:
    """A disturbance that gives each image one encoder's features of the image before it.

    The first of several images has the last one's. Where there is one alone, it has those of the call before.

    Args:
        encoder: Its name.
    """

    def __init__(self, encoder: str) -> None:
        self._encoder = encoder
        self._before: Tensor | None = None

    def __call__(self, features: dict[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        """Features of the same shapes.

        Args:
            features: ``[rows, C, h, w]`` by encoder.
            rows: How many rows each image has; with tiles one a tile.

        Raises:
            EvaluationError: The first call has a single image.
        """
        own = features[self._encoder]
        # Pixels that come whole are cut inside the model: then every image has as many rows more.
        blocks = list(own.split([count * len(own) // sum(rows) for count in rows]))
        before = blocks[-1] if len(blocks) > 1 else self._before
        if before is None:
            raise EvaluationError(
                "one image alone has no other's features", "two images a batch", "Raise evaluation.batch_size."
            )
        self._before = blocks[-1]
        shifted = []
        for block in blocks:
            repeats = -(-len(block) // len(before))
            shifted.append(before.repeat(repeats, 1, 1, 1)[: len(block)])
            before = block
        return {**features, self._encoder: torch.cat(shifted)}


def measure_reliance(
    answerer: TorchAnswerer,
    recipe: Recipe,
    *,
    snapshot: Snapshot,
    model_digest: str,
    on_progress: Callable[[str], None] | None = None,
) -> RelianceReport:
    """Score a model as it is and with each encoder disturbed.

    Args:
        answerer: The model.
        recipe: Says which benchmarks and how many items.
        snapshot: Has the benchmarks' data sets.
        model_digest: Of the checkpoint behind ``answerer``.
        on_progress: Called with a sentence before each run.

    Raises:
        EvaluationError: Unknown benchmark, none that rules can score, or a single image.
        SnapshotError: A data set is missing or broken.
    """
    names = list(answerer.model.encoder_sizes)
    found: dict[str, BenchmarkReliance] = {}
    benchmarks = load_benchmarks(recipe.evaluation, snapshot=snapshot)
    asked = [benchmark for benchmark in benchmarks if not benchmark.row.judged]
    if not asked:
        raise EvaluationError(
            f"all of {', '.join(recipe.evaluation.benchmarks)} are judged by a language model",
            "a benchmark that rules can score",
            "Name one: --set evaluation.benchmarks='[easy-vqa]'",
        )
    for benchmark in asked:
        graded: dict[tuple[str, How] | None, list[Graded]] = {}
        for run in (None, *((name, how) for name in names for how in HOWS)):
            if on_progress is not None:
                on_progress(f"{benchmark.row.name}: " + ("as it is" if run is None else f"{run[0]} {run[1]}"))
            answerer.disturb = None if run is None else _disturbance(*run)
            try:
                graded[run] = _grade(benchmark, answerer, recipe)
            finally:
                answerer.disturb = None
        found[benchmark.row.name] = _reliance(benchmark, graded)
    return RelianceReport(
        model_digest=model_digest,
        recipe=recipe.name,
        data_md5=snapshot.md5,
        benchmarks=found,
        skipped=tuple(benchmark.row.name for benchmark in benchmarks if benchmark.row.judged),
    )


def write_reliance(report: RelianceReport, folder: Path) -> None:
    """Write ``reliance.json``, ``reliance.html`` and ``reliance.md``.

    Raises:
        StorageError: No space, or no permission.
    """
    write_file(folder / "reliance.html", render_reliance(report))
    write_file(folder / "reliance.md", render_reliance_text(report))
    write_file(folder / RELIANCE_FILE, report.model_dump_json(indent=2) + "\n")


_HEADER = ("encoder", "features", "score", "lost", "95%", "p, Holm")
_NOTE = (
    "Lost: the model's own score minus the score with that encoder's features zeroed, or taken from another image; 95% "
    "paired, clustered by image. It shows what this model uses, not what a model trained without the encoder would do."
)


def render_reliance(report: RelianceReport) -> str:
    """The page."""
    return _render("reliance.html", report)


def render_reliance_text(report: RelianceReport) -> str:
    """The tables as Markdown."""
    return _render("reliance.md", report)


def _render(template: str, report: RelianceReport) -> str:
    return render(
        template,
        title=f"{report.recipe}: what each encoder is for",
        report=report,
        note=_NOTE,
        benchmarks=[(each.title, _sentence(each), _table(each)) for each in report.benchmarks.values()],
    )


def _sentence(benchmark: BenchmarkReliance) -> str:
    low, high = benchmark.ci95
    chosen = " Answers were chosen from options after one prefill, not written."
    return f"Undisturbed {benchmark.score:.2f} ({low:.2f} to {high:.2f}) on {benchmark.n:,} questions." + (
        "" if benchmark.multiple_choice == "generate" else chosen
    )


def _table(benchmark: BenchmarkReliance) -> Table:
    rows = [
        [
            row.encoder,
            row.how,
            f"{row.score:.2f}",
            f"{row.loss:+.2f}",
            span(row.loss_ci95, signed=True),
            f"{row.p_holm:.4f}",
        ]
        for row in benchmark.encoders
    ]
    return Table(_HEADER, rows, numbers=(2, 3, 5))


def _disturbance(encoder: str, how: How) -> Callable[[dict[str, Tensor], Sequence[int]], dict[str, Tensor]]:
    return zero_encoder(encoder) if how == "zeroed" else ShuffleEncoder(encoder)


def _grade(benchmark: Benchmark, answerer: TorchAnswerer, recipe: Recipe) -> list[Graded]:
    predictions: dict[str, str] = {}
    tokens = recipe.evaluation.max_new_tokens or benchmark.row.max_new_tokens
    for groups, questions in plan_questions(benchmark, "image-on").batches(batch_size=recipe.evaluation.batch_size):
        answers = [answer for group in answerer.answer_groups(groups, max_new_tokens=tokens) for answer in group]
        for answer, question in zip(answers, questions, strict=True):
            predictions |= {item.id: answer.text for item in question.items}
    return [benchmark.row.grade(item.row, predictions[item.id], benchmark.variant) for item in benchmark.items]


def _reliance(benchmark: Benchmark, graded: dict[tuple[str, How] | None, list[Graded]]) -> BenchmarkReliance:
    row, variant = benchmark.row, benchmark.variant
    own = graded[None]
    tests: dict[tuple[str, How], PairedTest] = {
        run: compare_scores(row, disturbed, own, variant) for run, disturbed in graded.items() if run is not None
    }
    corrected = holm([test.p for test in tests.values()])
    score = row.aggregate(own, variant)["score"]
    low, high = score_interval(row, own, variant)
    return BenchmarkReliance(
        title=row.title,
        unit=row.unit,
        n=len(own),
        images=len({item.cluster for item in own}),
        score=round(score, 4),
        ci95=(round(low, 4), round(high, 4)),
        multiple_choice=benchmark.multiple_choice,
        encoders=tuple(
            EncoderReliance(
                encoder=encoder,
                how=how,
                score=round(score - test.difference, 4),
                loss=round(test.difference, 4),
                loss_ci95=(round(test.low, 4), round(test.high, 4)),
                p=test.p,
                p_holm=p_holm,
            )
            for ((encoder, how), test), p_holm in zip(tests.items(), corrected, strict=True)
        ),
    )
