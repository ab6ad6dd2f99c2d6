"""What a recipe needs before anything is spent on it: parameters, visual tokens, memory, disk and FLOPs.

Everything comes from the recipe and the language model's ``config.json`` alone: the model is built on the meta device,
and one sample is run through it there (``manyeyes.estimate.dry_run``).

The formulas, with N the parameters of the stage's model, n those that train, b the micro-batch and A the bytes that one
sample keeps for its backward pass in fp32::

    weights     4 N             fp32; bf16 runs under autocast, which keeps a bf16 copy of what trains: + 2 n
    gradients   4 n
    optimizer   8 n             AdamW: two moments in fp32
    activations A b             of samples as long as the recipe admits; bf16: half of it
    running     2 x 12 n        on disk: trained weights and moments; the old one goes when the new one is whole
    checkpoint  4 N             on disk, twice a stage: in the working folder and as the step's output
    bundle      4 N             on disk

What the runtime itself takes (a CUDA context, the allocator's slack, NCCL's buffers) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from transformers.configuration_utils import PreTrainedConfig

from manyeyes.estimate.dry_run import ImageShape, count_sample, image_shape
from manyeyes.language_model import language_model_config as language_model_config
from manyeyes.model import ManyEyesForConditionalGeneration, build_skeleton
from manyeyes.recipe import Recipe, StageName, StageSpec
from manyeyes.training.lora import adapters_alone, add_adapters, merge_adapters
from manyeyes.training.optimizer import ParameterGroups, freeze_others, learning_rates, split_groups

# A question and its answer beside the image, as FLOPs of a sample count them: conversations of LLaVA's instruction data
# have some hundred tokens, captions some dozens. Ours, not published.
TEXT_TOKENS, SUPERVISED_TOKENS = 128, 64

_GB = 1e9


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ParameterCounts(_Strict):
    """Parameters of the whole model, each once."""

    encoders: dict[str, int] = Field(description="By encoder name.")
    fusion: int = Field(description="From the encoders' features to visual tokens, re-injection left out.")
    projector: int = Field(description="With the learned newline, where there is one.")
    language_model: int
    reinjection: int = Field(description="Blocks between the layers of the language model.")
    total: int


class StageMemory(_Strict):
    """Where the memory of one stage goes, on each device, in GB (1e9 bytes)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    micro_batch: int = Field(description="Samples a forward pass.")
    tokens: int = Field(description="Tokens of the longest sample, visual ones included.")


class DiskNeed(_Strict):
    """Disk space of a run, in GB (1e9 bytes)."""

    running: float = Field(description="Two running checkpoints of the stage that trains most.")
    checkpoints: float = Field(description="Results of all stages, in the working folder and as outputs of the steps.")
    bundle: float = Field(description="The ONNX bundle.")
    total: float


class RecipeEstimate(_Strict):
    """What a recipe needs."""

    parameters: ParameterCounts
    visual_tokens: int = Field(description="Of one image in the sequence; with tiles, of the largest image.")
    channels: int = Field(description="Width of a visual token before the projector.")
    memory_gb: dict[str, float] = Field(description="Peak of each device by stage, 1e9 bytes; prealign: of its worst.")
    memory_parts_gb: dict[str, StageMemory] = Field(description="The same by what it is for.")
    disk_gb: DiskNeed
    flops_per_sample: dict[str, float] = Field(
        description="Forward and backward of one image with text_tokens, by stage; prealign: of all its encoders."
    )
    text_tokens: int = Field(description="Tokens of text in that sample.")


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


def stage_memory(
    *, parameters: int, trained: int, saved_bytes: int, micro_batch: int, tokens: int, bf16: bool
) -> StageMemory:
    """The formulas in the head of this module.

    Args:
        parameters: Of the stage's model.
        trained: Those of them that train.
        saved_bytes: What one sample keeps for its backward pass, in fp32.
        micro_batch: Samples a forward pass.
        tokens: Of such a sample.
        bf16: Whether the stage runs in bf16.
    """
    return StageMemory(
        weights=(4 * parameters + (2 * trained if bf16 else 0)) / _GB,
        gradients=4 * trained / _GB,
        optimizer=8 * trained / _GB,
        activations=saved_bytes * micro_batch * (0.5 if bf16 else 1.0) / _GB,
        micro_batch=micro_batch,
        tokens=tokens,
    )


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
    running = 2 * 12 * max(trained.values(), default=0) / _GB
    checkpoints = 2 * 4 * total * len(stages) / _GB
    bundle = 4 * total / _GB
    return DiskNeed(
        running=_round(running),
        checkpoints=_round(checkpoints),
        bundle=_round(bundle),
        total=_round(running + checkpoints + bundle),
    )


def _round(value: float) -> float:
    return round(value, 6)


def as_rows(found: RecipeEstimate) -> list[tuple[str, Any]]:
    """Names and values for tables of people."""
    parameters = found.parameters
    rows: list[tuple[str, Any]] = [("parameters", parameters.total)]
    rows += [(f"parameters of encoder {name}", count) for name, count in parameters.encoders.items()]
    rows += [
        (f"parameters of {name.replace('_', ' ')}", getattr(parameters, name))
        for name in ("fusion", "projector", "language_model", "reinjection")
    ]
    rows += [("visual tokens an image", found.visual_tokens), ("channels of a visual token", found.channels)]
    for name, memory in found.memory_gb.items():
        parts = found.memory_parts_gb[name]
        rows.append(
            (
                f"memory of {name}, each device",
                f"{memory:,.2f} GB: weights {parts.weights:,.2f}, gradients {parts.gradients:,.2f}, optimizer "
                f"{parts.optimizer:,.2f}, activations {parts.activations:,.2f} (micro-batch {parts.micro_batch} of "
                f"{parts.tokens:,} tokens)",
            )
        )
        flops = found.flops_per_sample[name]
        rows.append((f"FLOPs of a sample in {name}", f"{flops:.3e} (an image and {found.text_tokens} tokens of text)"))
    disk = found.disk_gb
    rows.append(
        (
            "disk",
            f"{disk.total:,.2f} GB: running checkpoints {disk.running:,.2f}, results {disk.checkpoints:,.2f}, bundle "
            f"{disk.bundle:,.2f}",
        )
    )
    return rows
