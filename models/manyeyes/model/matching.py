"""Whether a checkpoint is of the model that a recipe describes, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from manyeyes.model.configuration import ManyEyesConfig
from manyeyes.model.from_recipe import configure, image_transforms
from manyeyes.processor import ManyEyesProcessor
from manyeyes.recipe import ModelSpec

# Under these names every model family gives them. The vocabulary is left out: it belongs to the tokenizer, which a
# checkpoint brings along, and a published one may have grown it.
_LANGUAGE_MODEL = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
# What a recipe has no word for: a converted checkpoint's own sizes of an encoder.
_CHECKPOINTS_OWN = ("architecture",)


@dataclass(frozen=True)
class FieldDifference:
    """A field that a recipe and a checkpoint have otherwise.

    Attributes:
        field: Its path in the recipe.
        recipe: The recipe's value.
        checkpoint: The checkpoint's.
    """

    field: str
    recipe: object
    checkpoint: object

    def __str__(self) -> str:
        values = (json.dumps(value, default=str) for value in (self.recipe, self.checkpoint))
        return f"{self.field} is {' in the recipe and '.join(values)} in the checkpoint"


def find_differences(
    spec: ModelSpec,
    *,
    config: ManyEyesConfig,
    processor: ManyEyesProcessor,
    text_config: PreTrainedConfig | None,
) -> list[FieldDifference]:
    """Fields in which a checkpoint is another model than a recipe's; weights and the tokenizer are not looked at.

    Args:
        spec: What the recipe says.
        config: The checkpoint's.
        processor: The checkpoint's.
        text_config: Of the recipe's language model; None where that cannot be had, and is not compared.

    Raises:
        RecipeError: ``spec`` names something that there is not.
    """
    names = [entry.name for entry in spec.encoders]
    saved = [entry.name for entry in config.encoders]
    if names != saved:
        return [FieldDifference("model.encoders", names, saved)]
    wanted = configure(spec, spec.encoders, text_config=config.text_config, image_token_id=config.image_token_id)
    values, saved_values = wanted.to_dict(), config.to_dict()
    pairs: list[tuple[str, Any, Any]] = [
        *((f"model.encoders.{i}", own, saved_values["encoders"][i]) for i, own in enumerate(values["encoders"])),
        ("model.fusion", values["fusion"], saved_values["fusion"]),
        ("model.reinjection", values["reinjection"], saved_values["reinjection"]),
        ("model.layout", values["layout"], saved_values["layout"]),
        ("model.projector", _projector(values["projector"]), _projector(saved_values["projector"])),
        ("model.shared", values["shared_pixels"], saved_values["shared_pixels"]),
        ("model.chat.template", spec.chat.template, processor.template),
        ("model.chat.system", spec.chat.system, processor.system),
        ("model.language_model.max_length", spec.language_model.max_length, processor.max_length),
    ]
    transforms = image_transforms(spec, spec.encoders)
    if transforms.keys() == processor.transforms.keys():
        for name, transform in transforms.items():
            place = f"model.encoders.{names.index(name)}" if name in names else "model.shared"
            pairs.append((place, transform.as_dict(), processor.image_transforms[name].as_dict()))
    if text_config is not None:
        for name in _LANGUAGE_MODEL:
            ours, theirs = (getattr(found, name, None) for found in (text_config, config.text_config))
            pairs.append((f"model.language_model.source ({name})", ours, theirs))
    found = [difference for place, ours, theirs in pairs for difference in _differ(place, _plain(ours), _plain(theirs))]
    # An encoder's size is in its entry and in its transform.
    sized = {difference.field.removesuffix(".image_size") for difference in found if ".image_size" in difference.field}
    return [d for d in found if not (d.field.endswith(".size") and d.field.removesuffix(".size") in sized)]


def _projector(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "depth" or entry["kind"] == "mlp"}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _differ(place: str, recipe: Any, checkpoint: Any) -> Iterator[FieldDifference]:
    if isinstance(recipe, dict) and isinstance(checkpoint, dict):
        for key in dict.fromkeys([*recipe, *checkpoint]):
            if key not in _CHECKPOINTS_OWN:
                yield from _differ(f"{place}.{key}", recipe.get(key), checkpoint.get(key))
    elif recipe != checkpoint:
        yield FieldDifference(place, recipe, checkpoint)
