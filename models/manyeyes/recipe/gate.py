"""What a version must do to be promoted: ``gate`` in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from manyeyes.recipe.strict import MAX_COUNT, Strict

# Beyond the maximum of any benchmark.
_MAX_POINTS = 1e6


class FloorRule(Strict):
    """The score is at least so much."""

    rule: Literal["floor"]
    benchmark: str
    at_least: float = Field(ge=0, le=_MAX_POINTS, description="Points of the benchmark's own figure.")


class NonInferiorityRule(Strict):
    """The lower end of challenger minus champion (paired, clustered by image, 95%) is above a margin."""

    rule: Literal["non-inferiority"]
    benchmark: str
    margin: float = Field(
        ge=-_MAX_POINTS, le=0, description="Points of the benchmark's own figure (MME: of 2,000); 0 or below."
    )


class ImageAddsRule(Strict):
    """The score with the image is so many points above the score without."""

    rule: Literal["image-adds"]
    benchmark: str
    at_least: float = Field(ge=0, le=_MAX_POINTS, description="Points of the benchmark's own figure.")


class ParityRule(Strict):
    """The bundle answers as torch does."""

    rule: Literal["parity"]
    token_match: float = Field(default=1.0, ge=0, le=1)
    max_abs_logit: float = Field(default=1e-3, gt=0, le=1e6)
    max_score_difference: float = Field(
        default=0.1,
        ge=0,
        le=100,
        description="Points between torch's and bundle's score, each as percent of its maximum.",
    )


class ValidationRule(Strict):
    """The data passed validation."""

    rule: Literal["validation"]


class ContaminationRule(Strict):
    """No more than so many training images are also in an evaluation set: exact sha256, and near duplicates."""

    rule: Literal["contamination"]
    max_images: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="Exact duplicates, and near ones that training does not leave out."
    )
    max_texts: int | None = Field(
        default=None,
        ge=0,
        le=MAX_COUNT,
        description="Samples with a text of an evaluation set that training does not leave out; null does not judge.",
    )


GateRule = Annotated[
    FloorRule | NonInferiorityRule | ImageAddsRule | ParityRule | ValidationRule | ContaminationRule,
    Field(discriminator="rule"),
]

# Every rule by the name that a recipe writes; the union above is the one list of them.
GATE_RULES: dict[str, type[Strict]] = {
    get_args(rule.model_fields["rule"].annotation)[0]: rule for rule in get_args(get_args(GateRule)[0])
}
