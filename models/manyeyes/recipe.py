"""Recipes: named YAML files that say what a model is and how it is trained, judged and exported.

A recipe is data. ``load_recipe`` reads the YAML, follows one ``extends:`` parent, applies dotted overrides and
checks every field; ``Recipe.digest`` is stamped on every artifact.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyeyes.errors import RecipeError, did_you_mean

StageName = Literal["prealign", "pretrain", "sft"]
STAGE_NAMES: tuple[StageName, ...] = ("prealign", "pretrain", "sft")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderSpec(_Strict):
    """One vision encoder of the model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="Its name inside this model; keys of pixel tensors.")
    encoder: str = Field(description="A row of ENCODERS.")
    source: str = Field(default="scratch:", description="hub:, dir:, snapshot:, package: or scratch:.")
    image_size: int | None = Field(default=None, gt=0, description="Pixels a side; the row's own when left out.")


class FusionSpec(_Strict):
    """How several encoders' features become one set of visual tokens."""

    strategy: str = Field(default="channel-concat", description="A row of FUSIONS.")
    grid: int = Field(gt=0, description="Side of the visual token grid.")
    options: dict[str, Any] = Field(default={}, description="The strategy's own options: manyeyes fusions.")


class ProjectorSpec(_Strict):
    """From fused features to the language model's width."""

    kind: Literal["linear", "mlp", "identity", "pixel-unshuffle", "resampler", "c-abstractor"] = "mlp"
    depth: int = Field(default=2, ge=1, description="Linear layers of an mlp, GELU between them.")
    options: dict[str, Any] = Field(default={}, description="The kind's own options.")


class ReinjectionSpec(_Strict):
    """Lets the language model look at the image again: after layer start + k * stride, for k below count.

    Needs the fusion spatial-vision-aggregator, whose windows it looks at.
    """

    start: int = Field(default=0, ge=0, description="First decoder layer, from 0, after whose output it looks.")
    stride: int = Field(ge=1, description="Layers from one look to the next.")
    count: int | None = Field(default=None, ge=1, description="How often; as many as fit when left out.")


class LayoutSpec(_Strict):
    """How an image becomes tiles, and its tokens a sequence."""

    tiling: Literal["none", "anyres", "grid"] = Field(
        default="none",
        description="none: one tile. anyres: the whole image, then tiles of the grid that suits it best (LLaVA-1.6). "
        "grid: the whole image, then image_grid x image_grid tiles (Mini-Gemini HD).",
    )
    pinpoints: tuple[tuple[int, int], ...] = Field(
        default=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
        min_length=1,
        description="Columns and rows of the grids that anyres chooses from.",
    )
    image_grid: int = Field(default=2, ge=2, description="Tiles a side, for grid.")
    newline: bool = Field(default=False, description="A learned token ends each row of visual tokens.")
    unpad: bool = Field(default=False, description="Rows and columns that show nothing but padding are left out.")
    whole: tuple[str, ...] = Field(
        default=(), description="Encoders, by name, that see the whole image once, whatever the tiling."
    )

    @model_validator(mode="after")
    def _fits(self) -> LayoutSpec:
        if self.tiling == "grid" and (self.newline or self.unpad):
            raise ValueError("grid puts one tile's tokens after another's: it has no rows for newline or unpad")
        if self.whole and self.tiling != "grid":
            raise ValueError("whole belongs to tiling grid")
        return self


class LanguageModelSpec(_Strict):
    """Any Hugging Face causal language model."""

    source: str
    max_length: int = Field(default=2048, gt=0, description="Tokens, image tokens included.")


class ChatSpec(_Strict):
    """How turns become text."""

    template: str = Field(
        default="vicuna_v1", description="A row of CHAT_TEMPLATES, or tokenizer for the tokenizer's own."
    )
    system: str | None = Field(default=None, description="Replaces the template's own system text.")


class ModelSpec(_Strict):
    """What the model is."""

    encoders: tuple[EncoderSpec, ...] = Field(min_length=1)
    preprocess: Literal["independent", "shared"] = "independent"
    fusion: FusionSpec
    projector: ProjectorSpec = ProjectorSpec()
    reinjection: ReinjectionSpec | None = None
    layout: LayoutSpec | None = None
    language_model: LanguageModelSpec
    chat: ChatSpec = ChatSpec()

    @model_validator(mode="after")
    def _names_differ(self) -> ModelSpec:
        names = [encoder.name for encoder in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"encoder names must differ, found {names}")
        return self


class MixturePart(_Strict):
    """One data set of a mixture."""

    dataset: str = Field(description="A data set of the snapshot, for instance easy-vqa-train.")
    turns: Literal["independent", "chained"] = Field(
        default="chained",
        description="independent: each turn sees the image and itself alone. chained: turns follow each other, "
        "shuffled each epoch.",
    )
    image_dropout: float = Field(
        default=0.0, ge=0, le=1, description="Share of samples shown without their image, redrawn each epoch."
    )
    max_samples: int | None = Field(default=None, gt=0)
    questions: Literal["record", "brief"] = Field(
        default="record",
        description="record: as the records ask. brief: for captions, one of LLaVA's eleven ways to ask for a brief "
        "description, redrawn each epoch.",
    )


class Schedule(_Strict):
    """Learning rate over a stage."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)


class StageSpec(_Strict):
    """One training stage. A group that ``train`` does not name is frozen, bit for bit."""

    train: dict[str, float] = Field(
        min_length=1,
        description="Learning rate by group: encoders, encoders.<name>, fusion, projector, language_model.",
    )
    encoders: tuple[str, ...] | None = Field(default=None, description="prealign only: which encoders; all by default.")
    mixture: tuple[MixturePart, ...] = Field(min_length=1)
    epochs: int = Field(default=1, gt=0)
    max_steps: int | None = Field(default=None, gt=0, description="Stop after so many optimizer steps.")
    batch_size: int = Field(gt=0, description="Records (images) an optimizer step, over all processes.")
    micro_batch_size: int | None = Field(default=None, gt=0, description="Records a forward pass; batch_size if unset.")
    schedule: Schedule = Schedule()
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every_s: float = Field(default=30.0, gt=0, description="Seconds between running checkpoints.")


class StagesSpec(_Strict):
    """The stages, in order; a recipe may leave one out."""

    prealign: StageSpec | None = None
    pretrain: StageSpec | None = None
    sft: StageSpec | None = None


class DataSpec(_Strict):
    """How the snapshot is checked."""

    suite: str = Field(default="conversations", description="Great Expectations suite in manyeyes/data/suites.")
    eval_datasets: tuple[str, ...] = Field(default=(), description="Data sets that training data must not contain.")


class EvaluationSpec(_Strict):
    """What the model is judged on."""

    benchmarks: tuple[str, ...] = Field(min_length=1)
    max_new_tokens: int = Field(default=16, gt=0)
    batch_size: int = Field(default=32, gt=0, description="Images a batch.")
    max_items: int | None = Field(default=None, gt=0, description="First so many items only; for trials.")


class ExportSpec(_Strict):
    """The ONNX bundle."""

    precision: Literal["fp32"] = "fp32"
    opset: int = Field(default=20, ge=18)
    parity_items: int = Field(default=200, gt=0, description="Questions on which bundle and torch are compared.")


class FloorRule(_Strict):
    """The score is at least so much."""

    rule: Literal["floor"]
    benchmark: str
    at_least: float


class NonInferiorityRule(_Strict):
    """The lower end of challenger minus champion (paired, clustered by image, 95%) is above a margin."""

    rule: Literal["non-inferiority"]
    benchmark: str
    margin: float = Field(le=0, description="Points; 0 or below.")


class ImageAddsRule(_Strict):
    """The score with the image is so many points above the score without."""

    rule: Literal["image-adds"]
    benchmark: str
    at_least: float


class ParityRule(_Strict):
    """The bundle answers as torch does."""

    rule: Literal["parity"]
    token_match: float = Field(default=1.0, ge=0, le=1)
    max_abs_logit: float = Field(default=1e-3, gt=0)
    max_score_difference: float = Field(default=0.1, ge=0, description="Points between torch's and bundle's score.")


class ValidationRule(_Strict):
    """The data passed validation."""

    rule: Literal["validation"]


class ContaminationRule(_Strict):
    """No more than so many training images are also in an evaluation set (exact sha256)."""

    rule: Literal["contamination"]
    max_images: int = Field(default=0, ge=0)


GateRule = Annotated[
    FloorRule | NonInferiorityRule | ImageAddsRule | ParityRule | ValidationRule | ContaminationRule,
    Field(discriminator="rule"),
]


class RegistrySpec(_Strict):
    """Where the model is registered."""

    model: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Recipe(_Strict):
    """A whole recipe, every default filled in."""

    name: str
    description: str = ""
    seed: int = 0
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
                if group not in groups:
                    raise ValueError(
                        f'stages.{stage_name}.train names "{group}"; the groups are {", ".join(groups)}. '
                        f"{did_you_mean(group, groups)}"
                    )
            for name in stage.encoders or ():
                if name not in names:
                    raise ValueError(f'stages.{stage_name}.encoders names "{name}"; the encoders are {names}')
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


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    files = resources.files("manyeyes").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name_or_path: str, *, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        name_or_path: A shipped recipe's name, or the path of a YAML file.
        overrides: Values by dotted path, for instance ``{"stages.sft.epochs": 1}``; list items by index.

    Raises:
        RecipeError: No such recipe, not YAML, an unknown field, a wrong value, or an override that names nothing.
    """
    tree = _read_tree(name_or_path, seen=())
    for path, value in (overrides or {}).items():
        _apply_override(tree, path, value)
    return _check(tree, where=name_or_path)


def parse_recipe(text: str) -> Recipe:
    """Read a recipe back from ``Recipe.canonical_json``.

    Raises:
        RecipeError: Not a recipe.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"recipe text is not JSON ({error})", "the text that Recipe.canonical_json wrote", "Pass it on unchanged."
        ) from error
    return _check(tree, where="recipe")


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Turn ``["a.b=1", "c=[x]"]`` into ``{"a.b": 1, "c": ["x"]}``; values are YAML.

    Raises:
        RecipeError: An assignment without ``=``, or a value that is not YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path:
            raise RecipeError(f'override is "{assignment}"', "path=value", "For instance: --set stages.sft.epochs=1")
        try:
            overrides[path] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(
                f'value of override "{path}" is not YAML ({error})', "a YAML value", "Quote it."
            ) from error
    return overrides


def _read_tree(name_or_path: str, *, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f'recipe file is "{name_or_path}"', "no such file", "Check the path.")
        text = path.read_text()
    else:
        names = list_recipes()
        if name_or_path not in names:
            raise RecipeError(
                f'recipe is "{name_or_path}"',
                "no such recipe",
                f"{did_you_mean(name_or_path, names)}List them with: manyeyes recipe list",
            )
        text = resources.files("manyeyes").joinpath("recipes", f"{name_or_path}.yaml").read_text()
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{name_or_path} is not YAML ({error})", "a YAML mapping", "Mend the line named above."
        ) from error
    if not isinstance(tree, dict):
        raise RecipeError(
            f"{name_or_path} holds {type(tree).__name__}",
            "a mapping with name, model, stages, evaluation, gate and registry",
            "See one with: manyeyes recipe show tiny",
        )
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if seen:
        raise RecipeError(
            f'"{seen[-1]}" extends "{name_or_path}", which extends "{parent}"',
            "one parent at most",
            f'Let "{seen[-1]}" extend "{parent}" and copy the difference.',
        )
    base = _read_tree(str(parent), seen=(*seen, name_or_path))
    return _merge(base, tree)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # A stage's learning rates are one decision: naming them again replaces all of them.
        merged[key] = _merge(merged[key], value) if both and key != "train" else value
    return merged


def _apply_override(tree: dict[str, Any], path: str, value: Any) -> None:
    node: Any = tree
    keys = path.split(".")
    # Group names such as encoders.vit hold a dot: everything after "train" is one key.
    if "train" in keys[:-1]:
        at = keys.index("train")
        keys = [*keys[: at + 1], ".".join(keys[at + 1 :])]
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(
                    f'override "{path}" has "{key}" at a list of {len(node)}', f"an index from 0 to {len(node) - 1}", ""
                )
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
            continue
        if last:
            node[key] = value
            return
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict | list):
            raise RecipeError(f'override "{path}" goes below "{key}", which is {child!r}', "a field with fields", "")
        node = child


def _check(tree: dict[str, Any], *, where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where=where) from error


def _explain(error: ValidationError, *, where: str) -> RecipeError:
    problems = error.errors()
    first = problems[0]
    place = ".".join(str(part) for part in first["loc"]) or "recipe"
    more = f" ({len(problems) - 1} more of its fields are wrong too.)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        fields = _fields_at(first["loc"][:-1])
        name = str(first["loc"][-1])
        known = f"The fields there are {', '.join(fields)}." if fields else ""
        return RecipeError(f"{where}: {place}", "no such field", f"{did_you_mean(name, fields)}{known}{more}")
    if first["type"] == "missing":
        return RecipeError(f"{where}: {place} is missing", "this field has no default", f"Add it.{more}")
    message = str(first["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict) else f" is {first['input']!r}"
    return RecipeError(f"{where}: {place}{shown}", message, f"See a whole recipe with: manyeyes recipe show tiny{more}")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(model, "model_fields", {}).get(part)
        # A part that is no field is the tag of a gate rule.
        model = _GATE_RULES.get(part) if field is None else _model_inside(field.annotation)
    return sorted(getattr(model, "model_fields", {}))


_GATE_RULES: dict[str, type[BaseModel]] = {
    "floor": FloorRule,
    "non-inferiority": NonInferiorityRule,
    "image-adds": ImageAddsRule,
    "parity": ParityRule,
    "validation": ValidationRule,
    "contamination": ContaminationRule,
}


def _model_inside(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_inside(inner)
        if found is not None:
            return found
    return None
