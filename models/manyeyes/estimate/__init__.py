"""What a recipe needs before anything is spent on it: parameters, visual tokens, memory, disk and FLOPs.

Everything comes from the recipe and the language model's ``config.json`` alone: the model is built on the meta device
(``manyeyes.estimate.skeleton``), and one sample is run through it there (``manyeyes.estimate.dry_run``). Those two load
torch; this file does not, so that a kept estimate is shown at once.

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

from typing import Any

from pydantic import Field

from manyeyes.strict import StrictModel

GB = 1e9


class ParameterCounts(StrictModel):
    """Parameters of the whole model, each once."""

    encoders: dict[str, int] = Field(description="By encoder name.")
    fusion: int = Field(description="From the encoders' features to visual tokens, re-injection left out.")
    projector: int = Field(description="With the learned newline, where there is one.")
    language_model: int
    reinjection: int = Field(description="Blocks between the layers of the language model.")
    total: int


class StageMemory(StrictModel):
    """Where the memory of one stage goes, on each device, in GB (1e9 bytes)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    micro_batch: int = Field(description="Samples a forward pass.")
    tokens: int = Field(description="Tokens of the longest sample, visual ones included.")


class DiskNeed(StrictModel):
    """Disk space of a run, in GB (1e9 bytes)."""

    running: float = Field(description="Two running checkpoints of the stage that trains most.")
    checkpoints: float = Field(description="Results of all stages, in the working folder and as outputs of the steps.")
    bundle: float = Field(description="The ONNX bundle.")
    total: float


class RecipeEstimate(StrictModel):
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
        weights=(4 * parameters + (2 * trained if bf16 else 0)) / GB,
        gradients=4 * trained / GB,
        optimizer=8 * trained / GB,
        activations=saved_bytes * micro_batch * (0.5 if bf16 else 1.0) / GB,
        micro_batch=micro_batch,
        tokens=tokens,
    )


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
