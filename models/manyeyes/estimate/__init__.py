"""What a recipe needs before anything is spent on it: parameters, visual tokens, memory, disk and FLOPs.

Everything comes from the recipe and the language model's ``config.json`` alone: the model is built on the meta device
(``manyeyes.estimate.skeleton``), and one sample is run through it there (``manyeyes.estimate.dry_run``). Those two load
torch; this file does not, so that a kept estimate is shown at once.

In two halves: ``RecipeFacts`` hold what has to be counted on the model, which depends on few fields of a recipe.
Memory, disk and the GPUs that a stage fits on follow from them by formulas: those of ``manyeyes.estimate.memory``, and
of disk, with N the parameters of the model and t those that train::

    running     3 x 12 t        on disk: trained weights and moments; two are kept while a third is written
    checkpoint  4 N             on disk, twice a stage: in the working folder and as the step's output
    bundle      4 N             on disk; a table that is the head too stands in two graphs

Below fp32 a number of a matrix or a convolution takes 2 bytes (fp16), 1 (int8) or 0.625 (int4: a scale of 4 bytes for
each 32), one of a norm 4; fp16 is 2 for all. A graph that several variants have counts once; one that has to be rounded
is written in fp32 first.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from manyeyes.estimate.memory import GB, Fit, StageFacts, StageMemory, find_fits, way_of, worst_memory
from manyeyes.recipe import Recipe
from manyeyes.runtime.bundle_contents import GraphName, Precision
from manyeyes.strict import StrictModel

SHIPPED = Path(__file__).with_name("published.json")


class ParameterCounts(StrictModel):
    """Parameters of the whole model, each once."""

    encoders: dict[str, int] = Field(description="By encoder name.")
    fusion: int = Field(description="From the encoders' features to visual tokens, re-injection left out.")
    projector: int = Field(description="With the learned newline, where there is one.")
    language_model: int
    reinjection: int = Field(description="Blocks between the layers of the language model.")
    total: int


class GraphFacts(StrictModel):
    """Numbers in a graph of the bundle."""

    parameters: int = Field(description="All of them.")
    matrices: int = Field(description="Those of linear layers, convolutions and tables, which int8 and int4 round.")


class RecipeFacts(StrictModel):
    """What has to be counted on a recipe's model."""

    parameters: ParameterCounts
    visual_tokens: int = Field(description="Of one image in the sequence; with tiles, of the largest image.")
    channels: int = Field(description="Width of a visual token before the projector.")
    text_tokens: int = Field(description="Tokens of text in the sample whose operations are counted.")
    stages: dict[str, tuple[StageFacts, ...]] = Field(description="By stage; prealign has one an encoder.")
    graphs: dict[GraphName, GraphFacts] = Field(description="Of the bundle.")

    @property
    def flops_per_sample(self) -> dict[str, float]:
        """Forward and backward, by stage; floating-point operations."""
        return {name: float(sum(branch.flops for branch in found)) for name, found in self.stages.items()}


class DiskNeed(StrictModel):
    """Disk space of a run, in GB (1e9 bytes)."""

    running: float = Field(description="Three running checkpoints of the stage that trains most.")
    checkpoints: float = Field(description="Results of all stages, in the working folder and as outputs of the steps.")
    bundle: float = Field(
        description="The ONNX bundle, all variants, and the largest graph that lies there for a while."
    )
    variants: dict[str, float] = Field(
        default={}, description="Graphs of each variant, those that it shares with others too; empty for one variant."
    )
    total: float


class RecipeEstimate(StrictModel):
    """What a recipe needs."""

    parameters: ParameterCounts
    visual_tokens: int = Field(description="Of one image in the sequence; with tiles, of the largest image.")
    channels: int = Field(description="Width of a visual token before the projector.")
    memory_gb: dict[str, float] = Field(
        description="Peak by stage where one process trains it, 1e9 bytes; prealign: of its worst."
    )
    memory_parts_gb: dict[str, StageMemory] = Field(description="The same by what it is for.")
    fits: dict[str, list[Fit]] = Field(description="By stage: the fewest GPUs of 80, 48 and 24 GB that it fits on.")
    disk_gb: DiskNeed
    flops_per_sample: dict[str, float] = Field(
        description="Forward and backward of one image with text_tokens, by stage; prealign: of all its encoders."
    )
    text_tokens: int = Field(description="Tokens of text in that sample.")


def needs(recipe: Recipe, facts: RecipeFacts) -> RecipeEstimate:
    """What a recipe needs, from what was counted on its model."""
    memory, fits = {}, {}
    for name, spec in recipe.present_stages():
        memory[name] = worst_memory(facts.stages[name], spec, way_of(spec, 1))
        fits[name] = find_fits(facts.stages[name], spec)
    return RecipeEstimate(
        parameters=facts.parameters,
        visual_tokens=facts.visual_tokens,
        channels=facts.channels,
        memory_gb={name: _round(parts.total) for name, parts in memory.items()},
        memory_parts_gb=memory,
        fits=fits,
        disk_gb=_disk(recipe, facts),
        flops_per_sample=facts.flops_per_sample,
        text_tokens=facts.text_tokens,
    )


def counted_fields(recipe: Recipe) -> str:
    """The fields of a recipe that its facts depend on, as JSON: no rates, batch sizes or data sets."""
    fields = ("encoders", "precision", "checkpoint_encoders", "model", "lora")
    stages = {
        name: {
            "train": sorted(spec.train),
            **spec.model_dump(mode="json", include=set(fields), exclude_defaults=True),
        }
        for name, spec in recipe.present_stages()
    }
    model = recipe.model.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"model": model, "stages": stages}, sort_keys=True)


def facts_key(fields: str, config_digest: str) -> str:
    """Under what the facts of a recipe are shipped.

    Args:
        fields: From ``counted_fields``.
        config_digest: sha256 of the language model's ``config.json``.
    """
    return hashlib.sha256(json.dumps([fields, config_digest]).encode()).hexdigest()


def shipped_facts(key: str) -> RecipeFacts | None:
    """What was counted for a published recipe; None for others.

    ``docs/recipes.py`` makes the file, and the tests count again.
    """
    found = _shipped().get(key)
    return None if found is None else RecipeFacts.model_validate(found)


@cache
def _shipped() -> dict[str, Any]:
    shipped: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return shipped


_BYTES: dict[Precision, float] = {"fp32": 4, "fp16": 2, "int8": 1, "int4": 0.5 + 4 / 32}


def _graph_bytes(facts: GraphFacts, precision: Precision) -> float:
    rest = _BYTES["fp16" if precision == "fp16" else "fp32"]
    return _BYTES[precision] * facts.matrices + rest * (facts.parameters - facts.matrices)


def _bundle_bytes(recipe: Recipe, facts: RecipeFacts) -> tuple[float, dict[str, float]]:
    """The most that the bundle takes while it is written, and the graphs of each variant."""
    precisions = recipe.export.precisions()
    asked: dict[GraphName, set[Precision]] = {
        graph: {getattr(precision, graph) for precision in precisions.values()} for graph in facts.graphs
    }
    kept = sum(_graph_bytes(facts.graphs[graph], each) for graph, wanted in asked.items() for each in wanted)
    rounded = [graph for graph, wanted in asked.items() if wanted & {"int8", "int4"} and "fp32" not in wanted]
    passing = max((_graph_bytes(facts.graphs[graph], "fp32") for graph in rounded), default=0.0)
    variants = {
        name: sum(_graph_bytes(found, getattr(precision, graph)) for graph, found in facts.graphs.items())
        for name, precision in precisions.items()
    }
    return kept + passing, variants


def _disk(recipe: Recipe, facts: RecipeFacts) -> DiskNeed:
    stages = [name for name in facts.stages if name != "prealign"]
    trained = [sum(branch.trained.values()) for found in facts.stages.values() for branch in found]
    running = 3 * 12 * max(trained, default=0) / GB
    checkpoints = 2 * 4 * facts.parameters.total * len(stages) / GB
    written, variants = _bundle_bytes(recipe, facts)
    bundle = written / GB
    return DiskNeed(
        running=_round(running),
        checkpoints=_round(checkpoints),
        bundle=_round(bundle),
        variants={name: _round(size / GB) for name, size in variants.items()} if len(variants) > 1 else {},
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
                f"memory of {name}, one process",
                f"{memory:,.2f} GB: weights {parts.weights:,.2f}, gradients {parts.gradients:,.2f}, optimizer "
                f"{parts.optimizer:,.2f}, activations {parts.activations:,.2f}, working {parts.working:,.2f} "
                f"(micro-batch {parts.micro_batch} of {parts.tokens:,} tokens)",
            )
        )
        rows.append((f"{name} fits on", ", ".join(map(str, found.fits[name])) or "no number of GPUs up to 64"))
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
    if disk.variants:
        rows.append(
            ("graphs of a variant", ", ".join(f"{name} {size:,.3f} GB" for name, size in disk.variants.items()))
        )
    return rows
