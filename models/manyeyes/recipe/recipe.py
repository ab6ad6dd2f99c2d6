"""A whole recipe, and its parts that have one field each in it.

Also the judge, and one value of a recipe by its dotted path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from manyeyes.errors import RecipeError, did_you_mean
from manyeyes.recipe.gate_rules import GateRule
from manyeyes.recipe.model import (
    MAX_BATCH,
    MAX_COUNT,
    PART,
    STAGE_NAMES,
    ModelSpec,
    StageName,
    StageSpec,
    StagesSpec,
    Strict,
)
from manyeyes.recipe.service import ServiceSpec

DEFAULT_VARIANT = "default"
"""The variant of a bundle that is loaded where none is named."""

API_KEY = "MANYEYES_JUDGE_KEY"
"""Environment variable that holds the key, unless ``key_from`` names another."""


class JudgeSpec(ServiceSpec):
    """A judge behind an OpenAI-compatible endpoint; the key comes from the environment and is never written."""

    key_from: str = Field(default=API_KEY, min_length=1, description="Environment variable that holds the key.")
    max_unjudged: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="Share of items without a verdict up to which a score of the others is given; none by default.",
    )


# A longer index is past the end of any list.
_INDEX_DIGITS = 9


def apply_override(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set one value of a tree of mappings and lists.

    Args:
        tree: Changed in place; mappings that are missing on the way are made.
        path: Dotted; list items by index.
        value: The new value.

    Raises:
        RecipeError: The path goes below a plain value, or past the end of a list.
    """
    node: Any = tree
    keys = path.split(".")
    # Group names such as encoders.vit hold a dot: everything after "train" is one key.
    if "train" in keys[:-1]:
        at = keys.index("train")
        keys = [*keys[: at + 1], ".".join(keys[at + 1 :])]
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not (key.isascii() and key.isdigit()) or int(key[:_INDEX_DIGITS]) >= len(node):
                needed = f"an index from 0 to {len(node) - 1}" if node else "a list with something in it"
                raise RecipeError(
                    f'override "{path}" has "{key}" at a list of {len(node)}', needed, "Replace the list as a whole."
                )
            if last:
                node[int(key)] = value
                return
            child = node[int(key)]
        elif last:
            node[key] = value
            return
        else:
            child = node.get(key)
            if child is None:
                child = node[key] = {}
        if not isinstance(child, dict | list):
            raise RecipeError(
                f'override "{path}" goes below "{key}", which is {child!r}', "a field with fields", "Shorten the path."
            )
        node = child


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
    max_items: int | None = Field(default=None, gt=0, le=MAX_COUNT, description="First N items only; for trials.")
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


class GraphPrecision(Strict):
    """The precision of each graph's weights; inputs and outputs are fp32 in all of them."""

    vision: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    embed: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    decoder: Literal["fp32", "fp16", "int8", "int4"] = "fp32"


class ExportSpec(Strict):
    """The ONNX bundle."""

    precision: Literal["fp32"] | GraphPrecision = Field(
        default="fp32", description="fp32 for every graph, or one precision a graph: vision, embed, decoder."
    )
    variants: Mapping[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,31}$")], GraphPrecision] = Field(
        default={}, description="More variants of the same bundle, by name; graphs of equal precision are one file."
    )
    opset: int = Field(default=20, ge=18, le=30)
    parity_items: int = Field(
        default=200, gt=0, le=MAX_COUNT, description="Questions on which bundle and torch are compared."
    )

    @field_validator("variants")
    @classmethod
    def _default_is_precision(cls, value: Mapping[str, GraphPrecision]) -> Mapping[str, GraphPrecision]:
        if DEFAULT_VARIANT in value:
            raise ValueError(f'"{DEFAULT_VARIANT}" is what `precision` says; choose another name')
        return value

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``variants`` where there are none, so that digests of published recipes stay."""
        tree: dict[str, Any] = handler(self)
        if not tree.get("variants"):
            tree.pop("variants", None)
        return tree

    def precisions(self) -> dict[str, GraphPrecision]:
        """Of every variant by its name, that of ``precision`` first."""
        main = GraphPrecision() if isinstance(self.precision, str) else self.precision
        return {DEFAULT_VARIANT: main, **self.variants}


class RegistrySpec(Strict):
    """Where the model is registered, and what a version that passed the gate still needs to become champion."""

    model: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    promotion: Literal["automatic", "approval"] = Field(
        default="automatic", description="automatic: the gate promotes; approval: it waits until persons approve it."
    )
    approvals: int = Field(default=1, ge=1, le=2, description="Persons who must approve.")
    four_eyes: bool = Field(default=False, description="None of them may be who registered the version.")

    @model_validator(mode="after")
    def _approvals_need_approval(self) -> RegistrySpec:
        if self.promotion == "automatic" and (self.approvals != 1 or self.four_eyes):
            raise ValueError(
                "approvals and four_eyes are asked for, and promotion is automatic; needed is promotion: approval"
            )
        return self


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
        self.check_stages()
        below = [name for name, precision in self.export.precisions().items() if precision != GraphPrecision()]
        if below and not any(rule.rule == "precision" for rule in self.gate):
            raise ValueError(
                f"export has {', '.join(below)} below fp32, and no gate rule judges that: add one, for instance "
                "{rule: precision, margin: -1}"
            )
        for rule in self.gate:
            benchmark = getattr(rule, "benchmark", None)
            if benchmark is not None and benchmark not in self.evaluation.benchmarks:
                raise ValueError(
                    f'gate rule "{rule.rule}" names benchmark "{benchmark}"; evaluation.benchmarks lacks it'
                )
        return self

    def check_stages(self) -> None:
        """Check what stages say of the model.

        Raises:
            ValueError: A stage names a group or an encoder that the model lacks, or changes the model to none.
        """
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

    def present_stages(self) -> list[tuple[StageName, StageSpec]]:
        """The stages that this recipe has, in order."""
        stages = ((name, getattr(self.stages, name)) for name in STAGE_NAMES)
        return [(name, stage) for name, stage in stages if stage is not None]

    def stage_model(self, stage: StageName) -> ModelSpec:
        """The model as a stage trains it: ``model`` with the stage's own changes."""
        spec: StageSpec | None = getattr(self.stages, stage)
        if spec is None:
            raise KeyError(stage)
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
        """Sorted, compact JSON of every field; ``parse_recipe`` reads it back.

        Of a part of a recipe: without the fields that have their defaults, so that a new one changes nothing.
        """
        tree = self.model_dump(mode="json", exclude_defaults=PART in self.__dict__)
        return json.dumps(tree, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """sha256 of ``canonical_json``, hexadecimal."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()
