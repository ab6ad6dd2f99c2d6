"""``scorecard.json``: what a model scored, with everything needed to compare it with another model's.

Its head is what all files of an evaluation have in common: the score of a benchmark, and how they are read back.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import Unit
from manyeyes.evaluation.benchmarks.items import MultipleChoice
from manyeyes.runtime.bundle_contents import ModelFacts
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel
from manyeyes.web.chat_client import ServiceUse

Interval = tuple[float, float]
Checked = TypeVar("Checked", bound=BaseModel)


class Asked(NamedTuple):
    """What was asked for a score: two scores compare only where it is equal.

    Attributes:
        digest: Over the scorer and the questions.
        n_total: Questions that the benchmark has.
        multiple_choice: How options were chosen.
    """

    digest: str
    n_total: int
    multiple_choice: MultipleChoice


class ScoredBenchmark(StrictModel):
    """A benchmark's score, whoever answered: in a scorecard, or of a file of answers."""

    n: int = Field(gt=0, description="Items that are scored.")
    variant: str = Field(default="official", description="Whose scoring: official, lmms, vlmevalkit or cambrian.")
    unit: Unit = Field(
        default="percent",
        description="Of score and its differences and intervals; relative: percent of what the reference answers get.",
    )
    score: float = Field(ge=0, description="The benchmark's figure; in unit.")
    ci95: Interval = Field(description="95% interval of score, clustered by image or document; in unit.")
    scores: dict[str, float] = Field(default={}, description="Sub-scores by name, each in its own unit.")
    scores_ci95: dict[str, Interval] = Field(
        default={}, description="95% interval of each of scores, clustered, in its own unit; not widened for several."
    )
    parse_failures: int = Field(ge=0, description="Answers that nothing could be read from.")

    @property
    @abstractmethod
    def asked(self) -> Asked:
        """What was asked for it."""


def read_checked(path: Path, model: type[Checked], *, what: str, needed: str, do: str) -> Checked:
    """Read one of an evaluation's JSON files.

    Args:
        path: The file.
        model: What it holds.
        what: Its name in a message, with an article.
        needed: Said where there is no file.
        do: Said where there is no file.

    Raises:
        EvaluationError: Missing, or something else.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise EvaluationError(f"no file {path}", needed, do) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(
            f"{path} is not {what} ({place}: {first['msg']})",
            "what `manyeyes evaluate` writes",
            "Evaluate the model again.",
        ) from error


ModelKind = Literal["torch", "bundle"]


class ScoredModel(StrictModel):
    """Which model was scored."""

    digest: str = Field(description="Digest of the checkpoint (torch) or of the bundle.")
    kind: ModelKind = Field(description="torch: the checkpoint in PyTorch. bundle: the ONNX bundle.")
    facts: ModelFacts | None = Field(
        default=None, description="Its size and cost; null where a bundle of an older export does not say."
    )


class TypeScore(StrictModel):
    """One answer type of a benchmark."""

    n: int = Field(gt=0, description="Questions of this type.")
    score: float = Field(ge=0, le=100, description="Mean of the items' scores; percent.")
    ci95: Interval = Field(description="95% interval of score, clustered by image; percent.")
    image_off: float = Field(ge=0, le=100, description="Percent with the image removed.")
    image_off_ci95: Interval = Field(description="95% interval of image_off, clustered by image; percent.")
    chance: float = Field(ge=0, le=100, description="What blind guessing gets; percent.")


class ConditionScore(StrictModel):
    """One benchmark with something else in the image's place."""

    score: float = Field(ge=0, description="The benchmark's figure; in the benchmark's unit.")
    ci95: Interval = Field(description="95% interval of score, clustered by image; in the benchmark's unit.")
    image_adds: float = Field(description="The score with the image minus this one; points.")
    image_adds_ci95: Interval = Field(description="95% interval of image_adds, paired, clustered by image; points.")
    parse_failures: int = Field(ge=0, description="Answers that none could be read from.")


class ImageCacheUse(StrictModel):
    """Where the visual tokens of the images that were shown came from; an image counts once a batch."""

    encoded: int = Field(ge=0, description="Ran through the encoders.")
    from_memory: int = Field(ge=0, description="Had been encoded by the same process.")
    from_disk: int = Field(ge=0, description="Were in the cache on disk.")


class BenchmarkScore(ScoredBenchmark):
    """One benchmark, asked with the image and with what may take its place."""

    n_total: int = Field(gt=0, description="Questions that the benchmark has; n is lower when the recipe cuts it.")
    unjudged: int = Field(default=0, ge=0, description="Questions that the judge gave no verdict on; not in n.")
    images: int = Field(gt=0, description="Distinct images: the clusters of the intervals.")
    judge: str = Field(default="", description="Language model that judged and what it was asked; empty for rules.")
    maximum: float = Field(default=100, gt=0, description="The best score there is; in unit.")
    scores_image_off: dict[str, float] = Field(default={}, description="scores with the image removed.")
    image_off: float = Field(ge=0, description="The benchmark's figure with the image removed; in unit.")
    image_off_ci95: Interval = Field(description="95% interval of image_off, clustered by image; in unit.")
    image_adds: float = Field(description="score minus image_off; points.")
    image_adds_ci95: Interval = Field(description="95% interval of image_adds, paired, clustered by image; points.")
    question_only_ceiling: float | None = Field(
        ge=0,
        le=100,
        description="What the best answer per question text gets on these items; percent. Image off cannot honestly "
        "be above it. null where an item has several right answers or shades of right.",
    )
    chance: float = Field(ge=0, le=100, description="What blind guessing gets on these items; percent.")
    parse_failures_image_off: int = Field(ge=0, description="parse_failures with the image removed.")
    conditions: dict[str, ConditionScore] = Field(
        default={}, description="By what took the image's place: grey, other-image."
    )
    by_type: dict[str, TypeScore] = Field(description="By answer type.")
    benchmark_digest: str = Field(
        description="sha256 over scorer, item ids, image sha256s, prompts and references; scores compare only where "
        "it is equal."
    )
    multiple_choice: MultipleChoice = Field(
        default="generate",
        description="generate: answers were written. prefill: they were chosen, the option with the likeliest first "
        "token after one prefill; another protocol, in which no answer is unreadable.",
    )
    chosen: int = Field(default=0, ge=0, description="Questions of n that had options to choose from; 0 for generate.")
    max_new_tokens: int = Field(default=16, gt=0, description="Longest written answer; tokens.")
    prompt_digest: str = Field(description="sha256 over the benchmark's prompt and the recipe's chat template.")
    from_cache: int = Field(
        default=0,
        ge=0,
        description="Questions, of all conditions, that were not asked: an earlier run, another benchmark or another "
        "condition had answered the same input. Equal inputs under one condition count once.",
    )
    image_cache: ImageCacheUse | None = Field(
        default=None, description="Images shown, all conditions; null where none was, or without a cache."
    )
    seconds: float = Field(ge=0, description="Time spent answering in this run, all conditions; seconds.")
    questions_per_s: float | None = Field(
        ge=0, description="Questions that were asked in this run, a second, with the image; null where none was."
    )

    @property
    def asked(self) -> Asked:
        """What was asked for it."""
        return Asked(self.benchmark_digest, self.n_total, self.multiple_choice)

    @property
    def mark(self) -> str:
        """What stands behind a figure in ``unit``."""
        return " points" if self.unit == "points" else "%"

    @model_validator(mode="after")
    def _is_possible(self) -> BenchmarkScore:
        for name, value in (("score", self.score), ("image_off", self.image_off)):
            if self.unit != "relative" and value > self.maximum:
                raise ValueError(f"{name} {value} is above the maximum, {self.maximum}")
        return self

    @model_validator(mode="after")
    def _intervals_hold(self) -> BenchmarkScore:
        if self.n + self.unjudged > self.n_total or sum(score.n for score in self.by_type.values()) != self.n:
            raise ValueError(f"n is {self.n}, n_total {self.n_total}; by_type must add up to n")
        if not self.ci95[0] <= self.score <= self.ci95[1]:
            raise ValueError(f"score {self.score} is outside its interval {self.ci95}")
        return self


class GroupAverage(StrictModel):
    """The average of one of Cambrian-1's groups of four benchmarks."""

    score: float | None = Field(ge=0, le=100, description="Mean percent of the maximum; null where one is missing.")
    ci95: Interval | None = Field(description="95% interval of score, by cluster bootstrap; percent.")
    parts: dict[str, float] = Field(description="Percent of its maximum, by benchmark.")
    missing: list[str] = Field(description="Benchmarks of the group without a score.")


class Scorecard(StrictModel):
    """The JSON result of a benchmark evaluation, with confidence intervals."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    model: ScoredModel = Field(description="Which model was scored.")
    recipe: str = Field(description="Name of the recipe.")
    recipe_digest: str = Field(description="sha256 of what the evaluation was given of the recipe.")
    data_md5: str = Field(description="md5 of the snapshot.")
    code_digest: str = Field(description="Digest of the library's code, or of the image.")
    max_new_tokens: int | None = Field(
        gt=0, description="Longest answer that the recipe allows; tokens. null: each benchmark's own."
    )
    benchmarks: dict[str, BenchmarkScore] = Field(description="By benchmark.")
    skipped: dict[str, str] = Field(
        default={}, description="Benchmarks without a score, and why: no judge, or no verdict on too many items."
    )

    judge: ServiceUse | None = Field(default=None, description="Who judged, and what it took; null without a judge.")
    groups: dict[str, GroupAverage] = Field(
        default={}, description="Cambrian-1's groups of which two benchmarks or more are scored, by name."
    )

    unfinished: list[str] = Field(
        default=[],
        description="Benchmarks that were still to come: only in scorecard-unfinished.json, which the evaluation "
        "writes after each benchmark and removes at its end.",
    )

    @model_validator(mode="after")
    def _holds_something(self) -> Scorecard:
        if not self.benchmarks and not self.skipped:
            raise ValueError("no benchmark is scored, and none is skipped")
        return self

    def metrics(self) -> dict[str, float]:
        """Plain figures for MLflow and Kubeflow, for instance ``easy-vqa.score``."""
        metrics: dict[str, float] = {}
        for name, score in self.benchmarks.items():
            metrics[f"{name}.score"] = score.score
            metrics[f"{name}.ci95_low"], metrics[f"{name}.ci95_high"] = score.ci95
            metrics[f"{name}.image_off"] = score.image_off
            metrics[f"{name}.image_adds"] = score.image_adds
            for condition, part in score.conditions.items():
                metrics[f"{name}.{condition}"] = part.score
            metrics[f"{name}.parse_failures"] = float(score.parse_failures)
            metrics[f"{name}.from_cache"] = float(score.from_cache)
            if score.questions_per_s is not None:
                metrics[f"{name}.questions_per_s"] = score.questions_per_s
            for answer_type, type_score in score.by_type.items():
                # MLflow takes no more than letters, digits, "_-. :/" in a metric's name.
                metrics[f"{name}.{answer_type.replace('/', '-')}.score"] = type_score.score
        return metrics


def write_scorecard(scorecard: Scorecard, path: Path) -> None:
    """Write ``scorecard.json``; whole or not at all.

    Raises:
        StorageError: No space, or no permission.
    """
    write_file(path, scorecard.model_dump_json(indent=2) + "\n")


def read_scorecard(path: Path) -> Scorecard:
    """Read and check ``scorecard.json``.

    Raises:
        EvaluationError: Missing, or not a scorecard.
    """
    return read_checked(path, Scorecard, what="a scorecard", needed="a scorecard", do="Run the evaluate step first.")
