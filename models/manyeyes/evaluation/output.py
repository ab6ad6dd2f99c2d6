"""What the files of an evaluation have in common: the score of a benchmark, and how they are read back."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks.benchmark import Unit
from manyeyes.evaluation.benchmarks.items import MultipleChoice
from manyeyes.strict import StrictModel

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
