"""Variants of a recipe: fewer encoders, or other values. A search and an ablation train many of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import Field, JsonValue, ValidationError

from manyeyes.errors import PipelineError, RecipeError, did_you_mean
from manyeyes.recipe import Recipe, change_recipe, parse_overrides
from manyeyes.strict import StrictModel

AS_IS = "as-is"
# Each is a training of its own, and all of them travel in one parameter.
MAX_VARIANTS = 64
# Side by side: every pod more makes the one object larger in which Kubernetes keeps a run (kubeflow/sizes.py).
MAX_BATCHES = 8
_LABEL_CHARACTERS = 60


class Variant(StrictModel):
    """How one recipe is made from another; as text, it is an item of a pipeline's loop."""

    encoders: tuple[str, ...] | None = Field(default=None, description="Encoders to keep, in the recipe's order.")
    changes: dict[str, JsonValue] = Field(default={}, description="New values by dotted path.")

    def text(self) -> str:
        """Sorted, compact JSON; ``parse_variant`` reads it back."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True, separators=(",", ":"))

    @property
    def label(self) -> str:
        """A few characters for people: ``clip+convnext``, ``strategy=channel-concat``."""
        parts = ["+".join(self.encoders)] if self.encoders else []
        parts += [f"{_short_path(path)}={_short_value(value)}" for path, value in self.changes.items()]
        return ", ".join(parts) or AS_IS

    @property
    def key(self) -> str:
        """The label as a part of file and step names; different variants have different keys."""
        plain = re.sub(r"[^A-Za-z0-9._=+-]+", "-", self.label).strip("-")
        if len(plain) <= _LABEL_CHARACTERS and plain == self.label.replace(", ", "-"):
            return plain
        return f"{plain[:_LABEL_CHARACTERS]}-{hashlib.sha256(self.text().encode()).hexdigest()[:6]}"

    def apply(self, recipe: Recipe) -> Recipe:
        """The variant of ``recipe``.

        Raises:
            RecipeError: It is no recipe: an unknown encoder or field, or a wrong value.
        """
        kept = recipe if self.encoders is None else keep_encoders(recipe, self.encoders)
        return change_recipe(kept, self.changes)


def parse_variant(text: str) -> Variant:
    """Read ``Variant.text`` back.

    Raises:
        PipelineError: Not such a text.
    """
    try:
        return Variant.model_validate_json(text)
    except ValidationError as error:
        raise PipelineError(
            f"variant is {text!r}",
            'JSON with "encoders" or "changes"',
            'For instance: {"encoders": ["clip", "convnext"]}',
        ) from error


def in_batches(variants: Sequence[Variant]) -> list[str]:
    """Texts of variants, one a line, for at most ``MAX_BATCHES`` steps; each trains its own one after another.

    Neighbours in a grid are about as large as each other, so they go to different batches.
    """
    texts = [variant.text() for variant in variants]
    return ["\n".join(texts[first::MAX_BATCHES]) for first in range(min(MAX_BATCHES, len(texts)))]


def parse_batch(text: str) -> list[Variant]:
    """Read one of ``in_batches`` back.

    Raises:
        PipelineError: Not such a text.
    """
    return [parse_variant(line) for line in text.split("\n")]


def batch_key(text: str) -> str:
    """What tells a batch of variants apart in a step's name: the first one's key, and how many more there are."""
    batch = parse_batch(text)
    more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
    return f"{batch[0].key}{more}"


def keep_encoders(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with some of its encoders only, in the recipe's order; whatever names the others is left out.

    Args:
        recipe: With all encoders.
        names: Those to keep.

    Raises:
        RecipeError: An unknown name, none at all, or what is left is no recipe.
    """
    known = [encoder.name for encoder in recipe.model.encoders]
    for name in names:
        if name not in known:
            raise RecipeError(
                f'encoder is "{name}"', f"the recipe has {', '.join(known)}", did_you_mean(name, known) or "Name one."
            )
    if len(set(names)) != len(names) or not names:
        raise RecipeError(f"encoders are {list(names)}", "one name at least, each once", "Fix the list.")
    changes: dict[str, Any] = {
        "model.encoders": [
            encoder.model_dump(mode="json") for encoder in recipe.model.encoders if encoder.name in names
        ]
    }
    if recipe.model.layout is not None:
        changes["model.layout.whole"] = [name for name in recipe.model.layout.whole if name in names]
    left_out = {f"encoders.{name}" for name in known if name not in names}
    for stage_name, stage in recipe.present_stages():
        rates = {group: rate for group, rate in stage.train.items() if group not in left_out}
        chosen = None if stage.encoders is None else [name for name in stage.encoders if name in names]
        if not rates or chosen == []:
            # It trained nothing but encoders that are gone.
            changes[f"stages.{stage_name}"] = None
            continue
        changes[f"stages.{stage_name}"] = stage.model_dump(mode="json") | {"train": rates, "encoders": chosen}
    return change_recipe(recipe, changes)


def balance_grid(text: str, *, stage: str) -> str:
    """The grid of an ablation that changes a stage's draw.

    Args:
        text: One ``field=[value, value, ...]`` of a draw a line, for instance ``cap=[150000, 250000]``.
        stage: Whose draw.

    Raises:
        RecipeError: As for ``read_grid``.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    grid = "\n".join(f"stages.{stage}.draw.{line}" for line in lines)
    read_grid(grid, field="balance_draws", example="cap=[150000, 250000]")
    return grid


def read_grid(
    text: str, *, field: str = "ablate_grid", example: str = "model.fusion.strategy=[channel-concat, sequence-append]"
) -> list[Variant]:
    """Every combination of the values in a grid, the last line's values changing fastest.

    Args:
        text: One ``path=[value, value, ...]`` a line; values are YAML, ``as-is`` stands for the recipe's own.
        field: What messages call it.
        example: One of its lines.

    Raises:
        RecipeError: A line that is no list of values, a path twice, or no or too many combinations.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    axes: dict[str, list[Any]] = {}
    for line in lines:
        ((path, values),) = parse_overrides([line]).items()
        if not isinstance(values, list) or not values:
            raise RecipeError(
                f'{field} has "{line}"',
                "a list of the values to compare",
                f"Write {path}=[a, b]; what is the same for all belongs to recipe_overrides.",
            )
        if path in axes:
            raise RecipeError(f'{field} has "{path}" twice', "each path once", "Put all values on one line.")
        axes[path] = values
    count = math.prod(len(values) for values in axes.values()) if axes else 0
    if not 2 <= count <= MAX_VARIANTS:
        raise RecipeError(
            f"{field} makes {count} variants",
            f"2 to {MAX_VARIANTS}",
            f"For instance: {example}",
        )
    variants = [
        Variant(changes={path: value for path, value in zip(axes, values, strict=True) if value != AS_IS})
        for values in itertools.product(*axes.values())
    ]
    if len({variant.text() for variant in variants}) < len(variants):
        raise RecipeError(f"{field} makes the same variant twice", "different values", "Remove the repeated value.")
    return variants


def _short_path(path: str) -> str:
    """The last two parts of a path where the last alone may say too little."""
    return ".".join(path.split(".")[-2:])


def _short_value(value: Any) -> str:
    if isinstance(value, str):
        return value
    shown: str = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
    return shown if len(shown) <= _LABEL_CHARACTERS else f"{shown[: _LABEL_CHARACTERS - 1]}…"
