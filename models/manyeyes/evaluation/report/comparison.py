"""A model's scores beside the champion's and those that papers print.

Scores of one column may come from other splits, prompts and scripts. Nothing is left out for that, and nothing is mixed
in silence: each such cell has a note that says what differs.

Published scores are in ``published.yaml``. They come without intervals, and often from another split, prompt or script
than those here; each says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from manyeyes.evaluation.benchmarks import BENCHMARKS, find_benchmark
from manyeyes.evaluation.benchmarks.benchmark import STYLES
from manyeyes.evaluation.outcomes import GROUPS
from manyeyes.evaluation.report.contents import Cell, Column, Comparison, ComparisonRow, TradeOff, TradeOffPoint
from manyeyes.evaluation.scorecard import BenchmarkScore, Scorecard
from manyeyes.strict import StrictModel

_FILE = Path(__file__).with_name("published.yaml")

System = Literal["llava", "eagle", "cambrian", "mini-gemini"]


class PublishedSource(StrictModel):
    """Where scores are printed, and how they were made."""

    title: str = Field(description="What it is.")
    place: str = Field(description="Paper or repository.")
    prompts: str = Field(description="Whose prompts; one of the recipe's `evaluation.prompts`.")
    scored_as: dict[str, str] = Field(description="By benchmark: the variant whose rule is nearest to theirs.")
    remarks: dict[str, str] = Field(default={}, description="By benchmark: why the score does not quite compare.")

    @model_validator(mode="after")
    def _is_known(self) -> PublishedSource:
        if self.prompts not in STYLES:
            raise ValueError(f"prompts is {self.prompts}; there are {', '.join(STYLES)}")
        for name, variant in self.scored_as.items():
            if variant not in BENCHMARKS[name].variants:
                raise ValueError(f"{name} has no variant {variant}")
        if not set(self.remarks) <= set(self.scored_as):
            raise ValueError("remarks name a benchmark that scored_as leaves out")
        return self


class PublishedScores(StrictModel):
    """Scores of one model from one source."""

    source: str = Field(description="Key of sources.")
    values: dict[str, float | dict[str, float]] = Field(
        description="By benchmark, in its row's unit; parts by name where the score is their mean."
    )
    remarks: dict[str, str] = Field(default={}, description="As the source's, for this model alone.")


class PublishedModel(StrictModel):
    """One model and what is printed of it."""

    name: str = Field(description="As the source names it, without the organisation.")
    system: System = Field(description="Which of the four systems.")
    language_model: str = Field(default="", description="Empty where the source does not say.")
    visual_tokens: int | None = Field(default=None, gt=0, description="Of an image in the sequence; null: unknown.")
    parameters: int | None = Field(default=None, gt=0, description="Of the whole model; null: not counted.")
    flops_per_sample: int | None = Field(default=None, gt=0, description="As in ModelFacts; null: not counted.")
    counted: str = Field(default="", description="Recipe on which parameters and FLOPs were counted.")
    scores: tuple[PublishedScores, ...] = Field(min_length=1, description="The first source of a benchmark counts.")


class PublishedScore(StrictModel):
    """One printed figure."""

    score: float = Field(ge=0, description="In the unit of the benchmark's row.")
    source: str = Field(description="Key of sources.")
    variant: str = Field(description="Whose scoring, as near as it can be told.")
    prompts: str = Field(description="Whose prompts.")
    remark: str = Field(description="Why it does not quite compare; empty: nothing known.")


class Published(StrictModel):
    """All of ``published.yaml``."""

    sources: dict[str, PublishedSource]
    models: tuple[PublishedModel, ...]

    @model_validator(mode="after")
    def _holds_together(self) -> Published:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("two models have one name")
        for model in self.models:
            for scores in model.scores:
                known = self.sources[scores.source].scored_as
                for name, value in scores.values.items():
                    if name not in known:
                        raise ValueError(f"{model.name}: {scores.source} does not say how {name} is scored")
                    if BENCHMARKS[name].unit != "relative" and _mean(value) > BENCHMARKS[name].maximum:
                        raise ValueError(f"{model.name}: {name} is {value}, above the maximum")
        return self

    def scores_of(self, model: PublishedModel) -> Mapping[str, PublishedScore]:
        """What is printed of a model, by benchmark."""
        found: dict[str, PublishedScore] = {}
        for scores in model.scores:
            source = self.sources[scores.source]
            for name, value in scores.values.items():
                if name not in found:
                    found[name] = PublishedScore(
                        score=round(_mean(value), 4),
                        source=scores.source,
                        variant=source.scored_as[name],
                        prompts=source.prompts,
                        remark=scores.remarks.get(name) or source.remarks.get(name, ""),
                    )
        return found


def _mean(value: float | dict[str, float]) -> float:
    return value if isinstance(value, float) else sum(value.values()) / len(value)


@cache
def load_published() -> Published:
    """Read and check the file; once a process."""
    return Published.model_validate(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


GROUP_TITLES = {
    "general": "General",
    "knowledge": "Knowledge",
    "ocr-chart": "OCR & chart",
    "vision-centric": "Vision-centric",
}
SYSTEM_TITLES = {"llava": "LLaVA", "eagle": "Eagle", "cambrian": "Cambrian-1", "mini-gemini": "Mini-Gemini"}


@dataclass(frozen=True)
class Champion:
    """What a model is compared with.

    Attributes:
        name: For instance ``manyeyes-tiny version 3``; empty without one.
        scorecard: Of its bundle; ``None`` without one.
        reason: Why there is none; one sentence.
    """

    name: str = ""
    scorecard: Scorecard | None = None
    reason: str = "No champion was looked up."


NO_CHAMPION = Champion()


@dataclass
class _Notes:
    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def compare_scorecard(
    scorecard: Scorecard,
    *,
    prompts: Mapping[str, str],
    champion: Champion = NO_CHAMPION,
    published: Published | None = None,
) -> Comparison:
    """Put a scorecard beside others.

    Args:
        scorecard: The model's.
        prompts: By benchmark: whose prompts it was asked with.
        champion: What the registry has.
        published: What papers print; the package's own file when left out.
    """
    known = load_published() if published is None else published
    notes = _Notes()
    rows = [_own_row("this model", "this", scorecard, {name: [] for name in scorecard.benchmarks}, notes)]
    sentence = champion.reason
    if champion.scorecard is not None:
        if champion.scorecard.model.digest == scorecard.model.digest:
            sentence = f"This model is the champion: {champion.name}."
        else:
            sentence = f"The champion is {champion.name}; its scores are those of its ONNX bundle."
            differences = {
                name: _champion_notes(score, champion.scorecard.benchmarks[name], notes)
                for name, score in scorecard.benchmarks.items()
                if name in champion.scorecard.benchmarks
            }
            rows.append(_own_row(f"champion: {champion.name}", "champion", champion.scorecard, differences, notes))
    printed: set[str] = set()
    for model in known.models:
        scores = {name: one for name, one in known.scores_of(model).items() if name in scorecard.benchmarks}
        if scores:
            printed |= set(scores)
            rows.append(_published_row(model, scores, known, scorecard, prompts, notes))
    groups = [name for name in GROUPS if any(name in row.groups for row in rows)]
    return Comparison(
        columns={
            name: Column(title=find_benchmark(name).title, unit=score.unit, maximum=score.maximum)
            for name, score in scorecard.benchmarks.items()
        },
        groups={name: Column(title=GROUP_TITLES[name], unit="percent", maximum=100) for name in groups},
        rows=rows,
        notes=notes.texts,
        champion=sentence,
        unpublished=[name for name in scorecard.benchmarks if name not in printed],
    )


def mean_speed(scorecard: Scorecard) -> float | None:
    """Questions a second with the image over all benchmarks that were timed; ``None`` where none was."""
    timed = [(score.n, score.questions_per_s) for score in scorecard.benchmarks.values() if score.questions_per_s]
    if not timed:
        return None
    return round(sum(n for n, _ in timed) / sum(n / speed for n, speed in timed), 3)


def weigh_cost(comparison: Comparison) -> TradeOff | None:
    """Score against cost, on the benchmarks that lets most be shown: models times benchmarks.

    Only sets of benchmarks that some row has are tried. This model is always among the rows: it has all columns.

    Returns:
        ``None`` where fewer than two models have both a score and a known number of visual tokens.
    """
    known = [row for row in comparison.rows if row.visual_tokens is not None and row.cells]
    sets = dict.fromkeys(tuple(name for name in comparison.columns if name in row.cells) for row in known)
    best: tuple[int, int, tuple[str, ...], list[ComparisonRow]] = (0, 0, (), [])
    for names in sets:
        rows = [row for row in known if set(names) <= set(row.cells)]
        if len(rows) >= 2 and (len(rows) * len(names), len(names)) > best[:2]:
            best = (len(rows) * len(names), len(names), names, rows)
    names, rows = best[2:]
    if not rows:
        return None
    return TradeOff(
        benchmarks=list(names),
        points=[
            TradeOffPoint(
                name=row.name,
                kind=row.kind,
                system=row.system,
                score=round(
                    sum(100 * row.cells[name].score / comparison.columns[name].maximum for name in names) / len(names),
                    4,
                ),
                visual_tokens=row.visual_tokens,
                flops_per_sample=row.flops_per_sample,
            )
            for row in rows
            if row.visual_tokens is not None
        ],
    )


def _group_notes(group: str, cells: Mapping[str, Cell], notes: _Notes) -> list[int]:
    if any(cells[name].notes for name in GROUPS[group] if name in cells):
        return [notes.number("Group: what is said of its benchmarks in this row holds for their average.")]
    return []


def _own_row(
    name: str, kind: str, scorecard: Scorecard, differences: Mapping[str, list[int]], notes: _Notes
) -> ComparisonRow:
    facts = scorecard.model.facts
    cells = {
        benchmark: Cell(score=score.score, ci95=score.ci95, notes=differences[benchmark])
        for benchmark, score in scorecard.benchmarks.items()
        if benchmark in differences
    }
    return ComparisonRow(
        name=name,
        kind="this" if kind == "this" else "champion",
        visual_tokens=facts.visual_tokens if facts else None,
        parameters=facts.parameters if facts else None,
        flops_per_sample=facts.flops_per_sample if facts else None,
        questions_per_s=mean_speed(scorecard),
        cells=cells,
        groups={
            group: Cell(score=average.score, ci95=average.ci95, notes=_group_notes(group, cells, notes))
            for group, average in scorecard.groups.items()
            if average.score is not None
        },
    )


def _champion_notes(mine: BenchmarkScore, other: BenchmarkScore, notes: _Notes) -> list[int]:
    found = []
    if other.variant != mine.variant:
        found.append(f"Champion: scored as {other.variant}; this model as {mine.variant}.")
    if other.multiple_choice != mine.multiple_choice:
        found.append("Champion: answers were written in one case and chosen after one prefill in the other.")
    if other.prompt_digest != mine.prompt_digest:
        found.append("Champion: asked with another prompt or chat template.")
    elif other.benchmark_digest != mine.benchmark_digest:
        found.append("Champion: asked other questions.")
    if other.max_new_tokens != mine.max_new_tokens:
        found.append(f"Champion: answers of up to {other.max_new_tokens} tokens; here {mine.max_new_tokens}.")
    return sorted(notes.number(text) for text in found)


def _published_row(
    model: PublishedModel,
    scores: Mapping[str, PublishedScore],
    published: Published,
    scorecard: Scorecard,
    prompts: Mapping[str, str],
    notes: _Notes,
) -> ComparisonRow:
    cells = {}
    for name in scorecard.benchmarks:
        if name not in scores:
            continue
        printed, mine = scores[name], scorecard.benchmarks[name]
        differences = [] if not printed.remark else [f"{find_benchmark(name).title}: {printed.remark}"]
        if printed.variant != mine.variant:
            differences.append(f"Scored as {printed.variant} there, as {mine.variant} here.")
        if mine.multiple_choice != "generate":
            differences.append("Answers were written there, and chosen after one prefill here.")
        asked = prompts.get(name, "default")
        if printed.prompts != asked:
            differences.append(f"{SYSTEM_TITLES[printed.prompts]}'s prompts there; {_whose(asked)} here.")
        if mine.n < mine.n_total:
            differences.append("All questions there; some of them here.")
        cells[name] = Cell(
            score=printed.score,
            ci95=None,
            source=published.sources[printed.source].place,
            notes=sorted(notes.number(text) for text in differences),
        )
    groups = {}
    for group, names in GROUPS.items():
        if all(name in cells for name in names):
            mean = sum(100 * cells[name].score / scorecard.benchmarks[name].maximum for name in names) / len(names)
            groups[group] = Cell(score=round(mean, 4), ci95=None, notes=_group_notes(group, cells, notes))
    return ComparisonRow(
        name=model.name,
        kind="published",
        system=model.system,
        language_model=model.language_model,
        visual_tokens=model.visual_tokens,
        parameters=model.parameters,
        flops_per_sample=model.flops_per_sample,
        cells=cells,
        groups=groups,
    )


def _whose(style: str) -> str:
    return "the default ones" if style == "default" else f"{SYSTEM_TITLES[style]}'s"
