"""A recipe's model on the meta device: its parameters, and what each stage keeps and computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.encoders.weights import meta_device
from manyeyes.estimate import (
    GB,
    DiskNeed,
    ParameterCounts,
    RecipeEstimate,
    StageMemory,
    stage_memory,
)
from manyeyes.estimate.dry_run import ImageShape, count_forward, count_sample, image_shape
from manyeyes.model import ManyEyesForConditionalGeneration, build_skeleton
from manyeyes.model.language_model import language_model_config
from manyeyes.recipe import Recipe, StageName, StageSpec
from manyeyes.runtime.bundle_contents import ModelFacts
from manyeyes.training.optimizer import (
    ParameterGroups,
    adapters_alone,
    add_adapters,
    freeze_others,
    learning_rates,
    merge_adapters,
    split_groups,
)

# A question and its answer beside the image, as FLOPs of a sample count them: conversations of LLaVA's instruction data
# have some hundred tokens, captions some dozens. Ours, not published.
TEXT_TOKENS, SUPERVISED_TOKENS = 128, 64


def estimate(recipe: Recipe, *, snapshot_path: Path | None = None) -> RecipeEstimate:
    """Work out what a recipe needs, offline.

    Args:
        recipe: The recipe.
        snapshot_path: Folder of the data snapshot, where the language model's source is ``snapshot:``; a folder with
            that model's ``config.json`` alone is enough.

    Raises:
        RecipeError: The recipe names something that there is not, or parts that cannot be combined.
        ShapeError: Parts do not fit together.
        SourceError: The language model's ``config.json`` cannot be had.
    """
    text_config = language_model_config(recipe.model.language_model.source, snapshot_path=snapshot_path)
    model = build_skeleton(recipe.model, text_config=text_config)
    shape = image_shape(model)
    stages = {}
    for name, spec in recipe.present_stages():
        own = model if not spec.model else build_skeleton(recipe.stage_model(name), text_config=text_config)
        stages[name] = _stage(recipe, name, spec, own, shape if own is model else image_shape(own), text_config)
    parameters = count_parameters(model)
    disk = _disk(recipe, parameters.total, {name: stage.trained for name, stage in stages.items()})
    return RecipeEstimate(
        parameters=parameters,
        visual_tokens=shape.tokens,
        channels=model.fusion.channels,
        memory_gb={name: _round(stage.total_gb) for name, stage in stages.items()},
        memory_parts_gb={name: stage.memory for name, stage in stages.items()},
        disk_gb=disk,
        flops_per_sample={name: float(stage.flops) for name, stage in stages.items()},
        text_tokens=_text_tokens(recipe.model.language_model.max_length, shape.tokens),
    )


class _Stage(BaseModel):
    memory: StageMemory
    flops: int
    trained: int

    @property
    def total_gb(self) -> float:
        parts = self.memory
        return parts.weights + parts.gradients + parts.optimizer + parts.activations


def _stage(
    recipe: Recipe,
    name: StageName,
    spec: StageSpec,
    model: ManyEyesForConditionalGeneration,
    shape: ImageShape,
    text_config: PreTrainedConfig,
) -> _Stage:
    max_length = recipe.stage_model(name).language_model.max_length
    if name != "prealign":
        return _count_stage(spec, model, shape, max_length)
    branches = []
    for encoder in recipe.prealigned_encoders():
        alone = build_skeleton(recipe.stage_model(name), text_config=text_config, encoders=[encoder])
        branches.append(_count_stage(spec, alone, image_shape(alone), max_length))
    largest = max(branches, key=lambda branch: branch.total_gb)
    return largest.model_copy(update={"flops": sum(branch.flops for branch in branches)})


def _count_stage(
    spec: StageSpec, model: ManyEyesForConditionalGeneration, shape: ImageShape, max_length: int
) -> _Stage:
    groups: ParameterGroups = model.parameter_groups()
    if spec.lora is not None:
        add_adapters(model.requires_grad_(False), spec.lora, seed=0)
        groups = adapters_alone(model.parameter_groups())
    groups = split_groups(groups, spec.train)
    rates = learning_rates(spec.train, groups)
    trained = sum(parameter.numel() for parameter in freeze_others(groups, rates).values())
    model.train()
    for group in groups:
        if group not in rates:
            model.get_submodule(group).eval()
    longest = max(max_length - shape.tokens, 1)
    text = _text_tokens(max_length, shape.tokens)
    counts = count_sample(model, shape, text_tokens=text, longest_text=longest, supervised=SUPERVISED_TOKENS)
    micro_batch = spec.micro_batch_size or spec.batch_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    merge_adapters(model)
    memory = stage_memory(
        parameters=parameters,
        trained=trained,
        saved_bytes=counts.saved_bytes,
        micro_batch=micro_batch,
        tokens=shape.tokens + longest,
        bf16=spec.precision == "bf16",
    )
    return _Stage(memory=memory, flops=counts.flops, trained=trained)


def _text_tokens(max_length: int, visual_tokens: int) -> int:
    return max(1, min(TEXT_TOKENS, max_length - visual_tokens))


def count_parameters(model: ManyEyesForConditionalGeneration) -> ParameterCounts:
    """The parameters of a model's parts, each once; on the meta device as well as elsewhere."""
    groups = {
        group: sum(parameter.numel() for _, parameter in members) for group, members in model.parameter_groups().items()
    }
    reinjection = 0 if model.reinjection is None else sum(p.numel() for p in model.reinjection.parameters())
    return ParameterCounts(
        encoders={name: groups[f"encoders.{name}"] for name in model.encoders},
        fusion=groups["fusion"] - reinjection,
        projector=groups["projector"],
        language_model=groups["language_model"],
        reinjection=reinjection,
        total=sum(groups.values()),
    )


def _disk(recipe: Recipe, total: int, trained: Mapping[str, int]) -> DiskNeed:
    stages = [name for name, _ in recipe.present_stages() if name != "prealign"]
    running = 2 * 12 * max(trained.values(), default=0) / GB
    checkpoints = 2 * 4 * total * len(stages) / GB
    bundle = 4 * total / GB
    return DiskNeed(
        running=_round(running),
        checkpoints=_round(checkpoints),
        bundle=_round(bundle),
        total=_round(running + checkpoints + bundle),
    )


def _round(value: float) -> float:
    return round(value, 6)


def count_model(config: PreTrainedConfig) -> ModelFacts:
    """What a model is in figures, by its configuration: counting needs no weights.

    Args:
        config: Of a ``ManyEyesForConditionalGeneration``; left as it is.
    """
    with meta_device():
        model = ManyEyesForConditionalGeneration(copy.deepcopy(config)).eval()
    counts = count_parameters(model)
    shape = image_shape(model)
    parts = {f"encoders.{name}": count for name, count in counts.encoders.items()} | {
        "fusion": counts.fusion,
        "projector": counts.projector,
        "language_model": counts.language_model,
        "reinjection": counts.reinjection,
    }
    return ModelFacts(
        parameters=counts.total,
        parts={name: count for name, count in parts.items() if count},
        encoders=list(counts.encoders),
        visual_tokens=shape.tokens,
        flops_per_sample=count_forward(model, shape, text_tokens=TEXT_TOKENS),
        text_tokens=TEXT_TOKENS,
    )


def count_checkpoint(checkpoint: Path) -> ModelFacts:
    """Count the model of a checkpoint's folder; its weights are not read."""
    return count_model(AutoConfig.from_pretrained(checkpoint))
