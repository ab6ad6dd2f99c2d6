"""Scores that papers and repositories print, to set beside a model's own: ``published.yaml``, checked.

They come without intervals, and often from another split, prompt or script than those here; each says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.benchmarks.benchmark import STYLES

_FILE = Path(__file__).with_name("published.yaml")

System = Literal["llava", "eagle", "cambrian", "mini-gemini"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedSource(_Strict):
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


class PublishedScores(_Strict):
    """Scores of one model from one source."""

    source: str = Field(description="Key of sources.")
    values: dict[str, float | dict[str, float]] = Field(
        description="By benchmark, in its row's unit; parts by name where the score is their mean."
    )
    remarks: dict[str, str] = Field(default={}, description="As the source's, for this model alone.")


class PublishedModel(_Strict):
    """One model and what is printed of it."""

    name: str = Field(description="As the source names it, without the organisation.")
    system: System = Field(description="Which of the four systems.")
    language_model: str = Field(default="", description="Empty where the source does not say.")
    visual_tokens: int | None = Field(default=None, gt=0, description="Of an image in the sequence; null: unknown.")
    parameters: int | None = Field(default=None, gt=0, description="Of the whole model; null: not counted.")
    flops_per_sample: int | None = Field(default=None, gt=0, description="As in ModelFacts; null: not counted.")
    counted: str = Field(default="", description="Recipe on which parameters and FLOPs were counted.")
    scores: tuple[PublishedScores, ...] = Field(min_length=1, description="The first source of a benchmark counts.")


class PublishedScore(_Strict):
    """One printed figure."""

    score: float = Field(ge=0, description="In the unit of the benchmark's row.")
    source: str = Field(description="Key of sources.")
    variant: str = Field(description="Whose scoring, as near as it can be told.")
    prompts: str = Field(description="Whose prompts.")
    remark: str = Field(description="Why it does not quite compare; empty: nothing known.")


class Published(_Strict):
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
