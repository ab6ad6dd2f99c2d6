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
    write_line,
    write_recipe_text,
)
from manyeyes.recipe.model import (
    STAGE_NAMES,
    ChatSpec,
    EncoderSpec,
    FusionSpec,
    LanguageModelSpec,
    LayoutSpec,
    LoraSpec,
    MixturePart,
    ModelSpec,
    PackingSpec,
    ProjectorSpec,
    ReinjectionSpec,
    Schedule,
    SharedSpec,
    StageName,
    StageSpec,
    StagesSpec,
)
from manyeyes.recipe.recipe import (
    ContaminationSpec,
    DataSpec,
    EvaluationSpec,
    ExportSpec,
    JudgeSpec,
    Recipe,
    RegistrySpec,
)

__all__ = [
    "STAGE_NAMES",
    "ChatSpec",
    "ContaminationSpec",
    "DataSpec",
    "EncoderSpec",
    "EvaluationSpec",
    "ExportSpec",
    "FusionSpec",
    "JudgeSpec",
    "LanguageModelSpec",
    "LayoutSpec",
    "LoraSpec",
    "MixturePart",
    "ModelSpec",
    "PackingSpec",
    "ProjectorSpec",
    "Recipe",
    "RegistrySpec",
    "ReinjectionSpec",
    "Schedule",
    "SharedSpec",
    "StageName",
    "StageSpec",
    "StagesSpec",
    "change_recipe",
    "list_recipes",
    "load_recipe",
    "parse_overrides",
    "parse_recipe",
    "read_recipe_text",
    "write_line",
    "write_recipe_text",
]
