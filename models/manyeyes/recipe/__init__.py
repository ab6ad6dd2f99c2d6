"""Recipes: named YAML files that say what a model is and how it is trained, judged and exported.

A recipe is data. ``load_recipe`` reads the YAML, follows one ``extends:`` parent, applies dotted overrides and
checks every field; ``Recipe.digest`` is stamped on every artifact.
"""

from manyeyes.recipe.loading import (
    change_recipe,
    list_recipes,
    load_recipe,
    parse_overrides,
    parse_recipe,
    read_recipe_text,
)
from manyeyes.recipe.model import (
    ChatSpec,
    EncoderSpec,
    FusionSpec,
    LanguageModelSpec,
    LayoutSpec,
    ModelSpec,
    ProjectorSpec,
    ReinjectionSpec,
    SharedSpec,
)
from manyeyes.recipe.recipe import (
    ContaminationRule,
    ContaminationSpec,
    DataSpec,
    EvaluationSpec,
    ExportSpec,
    FloorRule,
    GateRule,
    ImageAddsRule,
    JudgeSpec,
    NonInferiorityRule,
    ParityRule,
    Recipe,
    RegistrySpec,
    ValidationRule,
)
from manyeyes.recipe.stages import (
    STAGE_NAMES,
    LoraSpec,
    MixturePart,
    Schedule,
    StageName,
    StageSpec,
    StagesSpec,
)

__all__ = [
    "STAGE_NAMES",
    "ChatSpec",
    "ContaminationRule",
    "ContaminationSpec",
    "DataSpec",
    "EncoderSpec",
    "EvaluationSpec",
    "ExportSpec",
    "FloorRule",
    "FusionSpec",
    "GateRule",
    "ImageAddsRule",
    "JudgeSpec",
    "LanguageModelSpec",
    "LayoutSpec",
    "LoraSpec",
    "MixturePart",
    "ModelSpec",
    "NonInferiorityRule",
    "ParityRule",
    "ProjectorSpec",
    "Recipe",
    "RegistrySpec",
    "ReinjectionSpec",
    "Schedule",
    "SharedSpec",
    "StageName",
    "StageSpec",
    "StagesSpec",
    "ValidationRule",
    "change_recipe",
    "list_recipes",
    "load_recipe",
    "parse_overrides",
    "parse_recipe",
    "read_recipe_text",
]
