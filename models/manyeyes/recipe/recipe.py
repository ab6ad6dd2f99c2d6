"""A whole recipe, and its parts that have one field each in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from manyeyes.errors import did_you_mean
from manyeyes.recipe.gate import GateRule
from manyeyes.recipe.judge import JudgeSpec
from manyeyes.recipe.model import ModelSpec
from manyeyes.recipe.overrides import apply_override
from manyeyes.recipe.stages import STAGE_NAMES, StageName, StageSpec, StagesSpec
from manyeyes.recipe.strict import MAX_BATCH, MAX_COUNT, Strict


class ContaminationSpec(Strict):
    """How training data is compared with the evaluation sets: bytes, near duplicates, texts."""

    benchmarks: tuple[str, ...] = Field(
        default=(), description="Data sets of the snapshot to compare with besides eval_datasets, or Parquet files."
    )
    leave_out: bool = Field(default=True, description="Training leaves out what is found; false counts it only.")


class DataSpec(Strict):
    """How the snapshot is checked."""

    suite: str = Field(default="conversations", description="Great Expectations suite in manyeyes/data/suites.")
    eval_datasets: tuple[str, ...] = Field(
        default=(),
        description="Data sets that training data must not contain; those it is judged on, where the gate asks for it.",
    )
    contamination: ContaminationSpec = ContaminationSpec()


class EvaluationSpec(Strict):
    """What the model is judged on."""

    benchmarks: tuple[str, ...] = Field(min_length=1)
    max_new_tokens: int | None = Field(
        default=None, gt=0, le=1_000_000, description="Longest answer; each benchmark's own when left out."
    )
    batch_size: int = Field(default=32, gt=0, le=MAX_BATCH, description="Images a batch.")
    max_items: int | None = Field(default=None, gt=0, le=MAX_COUNT, description="First so many items only; for trials.")
    prompts: Literal["default", "llava", "cambrian", "eagle", "mini-gemini"] = Field(
        default="default", description="Whose paper's prompts."
    )
    variants: Mapping[str, str] = Field(
        default={}, description="By benchmark: whose scoring, where it is not the one that papers report."
    )
    multiple_choice: Literal["generate", "prefill"] = Field(
        default="generate",
        description="How a question with options is answered. generate: the model writes, and the answer is read from "
        "what it wrote, as the papers do. prefill: the option whose first token is the likeliest after one prefill; "
        "faster, and another protocol (likelihood), whose figures must not stand beside written ones: whoever reports "
        "one says which it is, as the scorecard does.",
    )
    conditions: tuple[Literal["grey", "other-image"], ...] = Field(
        default=("grey", "other-image"),
        description="What takes the image's place in further runs, besides nothing: a grey image, another item's.",
    )
    judge: JudgeSpec | None = Field(
        default=None, description="Judges free answers; benchmarks that need one are skipped by name without."
    )


class ExportSpec(Strict):
    """The ONNX bundle."""

    precision: Literal["fp32"] = "fp32"
    opset: int = Field(default=20, ge=18, le=30)
    parity_items: int = Field(
        default=200, gt=0, le=MAX_COUNT, description="Questions on which bundle and torch are compared."
    )


class RegistrySpec(Strict):
    """Where the model is registered."""

    model: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Recipe(Strict):
    """A whole recipe, every default filled in."""

    name: str = Field(min_length=1, max_length=200)
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelSpec
    data: DataSpec = DataSpec()
    stages: StagesSpec
    evaluation: EvaluationSpec
    export: ExportSpec = ExportSpec()
    gate: tuple[GateRule, ...] = Field(min_length=1)
    registry: RegistrySpec

    @model_validator(mode="after")
    def _references_exist(self) -> Recipe:
        names = [encoder.name for encoder in self.model.encoders]
        groups = ["encoders", *(f"encoders.{name}" for name in names), "fusion", "projector", "language_model"]
        for stage_name, stage in self.present_stages():
            for group in stage.train:
                # What parts a fusion has is known where it is built.
                if group not in groups and not group.startswith("fusion."):
                    raise ValueError(
                        f'stages.{stage_name}.train names "{group}"; the groups are {", ".join(groups)}. '
                        f"{did_you_mean(group, groups)}"
                    )
            for name in stage.encoders or ():
                if name not in names:
                    raise ValueError(f'stages.{stage_name}.encoders names "{name}"; the encoders are {names}')
            try:
                self.stage_model(stage_name)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"stages.{stage_name}.model changes model.{place}: {first['msg']}") from error
        for rule in self.gate:
            benchmark = getattr(rule, "benchmark", None)
            if benchmark is not None and benchmark not in self.evaluation.benchmarks:
                raise ValueError(
                    f'gate rule "{rule.rule}" names benchmark "{benchmark}"; evaluation.benchmarks lacks it'
                )
        return self

    def present_stages(self) -> list[tuple[StageName, StageSpec]]:
        """The stages that this recipe has, in order."""
        stages = ((name, getattr(self.stages, name)) for name in STAGE_NAMES)
        return [(name, stage) for name, stage in stages if stage is not None]

    def stage_model(self, stage: StageName) -> ModelSpec:
        """The model as a stage trains it: ``model`` with the stage's own changes."""
        spec = dict(self.present_stages())[stage]
        if not spec.model:
            return self.model
        tree = self.model.model_dump(mode="json")
        for path, value in spec.model.items():
            apply_override(tree, path, value)
        return ModelSpec.model_validate(tree)

    def prealigned_encoders(self) -> list[str]:
        """Names of the encoders that the prealign stage trains; empty without that stage."""
        stage = self.stages.prealign
        if stage is None:
            return []
        return list(stage.encoders or [encoder.name for encoder in self.model.encoders])

    def canonical_json(self) -> str:
        """Sorted, compact JSON of every field; ``parse_recipe`` reads it back."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """sha256 of ``canonical_json``, hexadecimal."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()
