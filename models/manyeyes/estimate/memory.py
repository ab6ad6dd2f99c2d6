"""Memory of each GPU that trains, and which GPUs a stage fits on: formulas over ``StageFacts``, without torch.

With f the frozen parameters of the stage's model, t those that train, b the micro-batch, and one process a GPU::

    weights     4 f + 4 t          bf16: + 2 (f + t), autocast's copies; frozen linear layers and convolutions 2 in all
    gradients   4 t
    optimizer   8 t                AdamW: two moments in fp32
    activations b A                what the code keeps for its backward pass, counted on the meta device
    working     b A_l / 2 + logits a layer's gradients while it runs backward; logits, made in chunks
    runtime     2 GB               the CUDA context, NCCL's buffers, cuBLAS's workspace

Where N processes each hold a part (``sharding`` of the stage), with w bytes a number, 2 for bf16, weights, gradients
and optimizer are (w f + 4 t) / N, 4 t / N and 8 t / N. What is not in the language model's layers (r, of which q
trains) is whole in each where it is frozen, and no part of this f; what trains of it is gathered for the whole of a
micro-batch, two layers of l at a time, and the largest message of gradients is summed in fp32. Blocks of encoders that
train are layers like those of the language model::

    gathered    w (r + 2 l) + w q + 4 max(q, l)

Where layers are computed again, A is each layer's input, what its attention gave, and one layer's inside. With
adapters the language model's own weights are frozen; where its linear layers are held in 4 bits, each of their numbers
takes 0.516 bytes in place of those of a weight, and one layer at a time is converted to compute. A GPU of 80 GB has
80e9 bytes here; it really has 7% more, which is what the allocator may lose. Samples are as long as the recipe admits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from manyeyes.recipe import StageName, StageSpec
from manyeyes.strict import StrictModel

GB = 1e9
GPU_SIZES_GB = (80, 48, 24)
# Of one node, then nodes of eight.
COUNTS = (1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 64)
ONE_NODE = 8

RUNTIME_BYTES = 2 * 10**9
# manyeyes.model.branches.LOGITS_AT_ONCE, which cannot be imported without torch; a test holds them equal.
LOGITS_AT_ONCE = 2**25
# Logits in bf16 and fp32, their softmax, and the gradients of the first two.
_BYTES_A_LOGIT = 16
# Measured on a Llama (docs/recipes.md): under autocast the residual stream is fp32.
_AUTOCAST = 1.25
# Of an adapted layer: every linear layer's input is kept again, after its dropout, and in fp32.
_ADAPTED = 1.5
_ADAPTER_RANK = 64
# NF4: half a byte, a byte for each block of 64, and 4 for each 256 of those (QLoRA, arXiv:2305.14314, section 3).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


class StageFacts(StrictModel):
    """Of a stage, what its memory follows from. Bytes are those that one sample of the greatest length keeps."""

    encoder: str | None = Field(description="The encoder that prealign trains alone.")
    parameters: dict[str, int] = Field(description="Of encoders, fusion, projector and language_model.")
    trained: dict[str, int] = Field(description="Those of them that train, adapters under language_model.")
    matrices: dict[str, int] = Field(description="Those of linear layers and convolutions, whether they train or not.")
    frozen_matrices: dict[str, int] = Field(description="Those of these that do not train.")
    layers: int = Field(description="Of the language model.")
    layers_parameters: int = Field(description="Of all its layers, adapters left out.")
    layer_parameters: int = Field(description="Of its largest layer.")
    blocks_parameters: int = Field(default=0, description="Of encoders that train, in blocks gathered one by one.")
    block_parameters: int = Field(default=0, description="Of the largest of these blocks.")
    linear_widths: int = Field(
        description="Inputs and outputs of its layers' linear layers, added up: parameters of adapters of rank 1."
    )
    linear_parameters: int = Field(description="Of those linear layers, adapters left out.")
    vocabulary: int = Field(description="Rows of its head.")
    image_bytes: int = Field(description="Kept by encoders, fusion and projector.")
    layers_bytes: int = Field(description="Kept by all layers of the language model.")
    layer_bytes: int = Field(description="Kept by the one that keeps most.")
    inputs_bytes: int = Field(description="Of the inputs of all layers.")
    attention_bytes: int = Field(description="Of the outputs of attention in all layers.")
    other_bytes: int = Field(description="Kept around the layers.")
    tokens: int = Field(description="Of that sample, visual ones included.")
    text_tokens: int = Field(description="Those of them that are text.")
    flops: int = Field(description="Forward and backward of a sample of text_tokens tokens beside its image.")


class StageMemory(StrictModel):
    """Where the memory of one stage goes, on each device, in GB (1e9 bytes)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float = Field(default=0.0, description="A layer's gradients, logits, and what the runtime takes.")
    micro_batch: int = Field(description="Samples a forward pass.")
    tokens: int = Field(description="Tokens of the longest sample, visual ones included.")

    @property
    def total(self) -> float:
        """All of it."""
        return self.fixed + self.activations

    @property
    def fixed(self) -> float:
        """What no micro-batch changes much."""
        return self.weights + self.gradients + self.optimizer + self.working


@dataclass(frozen=True)
class Way:
    """How a stage is trained, as far as its memory is concerned.

    Attributes:
        devices: Processes, one a device.
        micro_batch: Samples a forward pass on each.
        recompute: Layers of the language model are computed again in the backward pass.
        rank: Of adapters in place of the language model; None without.
        device_gb: What each device has, which decides whether processes hold parts; infinite where it is not known.
        quantized: The layers that have adapters are held in 4 bits.
    """

    devices: int
    micro_batch: int
    recompute: bool
    rank: int | None = None
    device_gb: float = math.inf
    quantized: bool = False


class Fit(StrictModel):
    """Devices that a stage fits on."""

    devices: int = Field(description="How many.")
    device_gb: int = Field(description="Memory of each, GB.")
    memory_gb: float = Field(description="What the stage takes of it.")
    change: str = Field(description="What has to be changed in the recipe for it; empty for nothing.")

    def __str__(self) -> str:
        changed = f" ({self.change})" if self.change else ""
        return f"{self.devices} x {self.device_gb} GB{changed}"


def way_of(spec: StageSpec, devices: int, device_gb: float = math.inf) -> Way:
    """How a recipe trains a stage on so many devices, of a known size or any."""
    share = -(-spec.batch_size // devices)
    return Way(
        devices=devices,
        micro_batch=min(spec.micro_batch_size or spec.batch_size, share),
        recompute=spec.checkpoint_language_model and not _keeps_prefixes(spec),
        rank=spec.lora.rank if spec.lora else None,
        device_gb=device_gb,
        quantized=spec.quantized,
    )


def stage_memory(facts: StageFacts, spec: StageSpec, way: Way) -> StageMemory:
    """The formulas in the head of this module."""
    bf16 = spec.precision == "bf16"
    trained, frozen = dict(facts.trained), dict(facts.frozen_matrices)
    adapters_added = way.rank is not None and spec.lora is None
    total = sum(facts.parameters.values())
    if adapters_added:
        trained["language_model"] = (way.rank or 0) * facts.linear_widths
        frozen["language_model"] = facts.matrices["language_model"]
        total += trained["language_model"]
    t, matrices = sum(trained.values()), sum(frozen.values())
    held = facts.linear_parameters if way.quantized else 0
    weights = (6 if bf16 else 4) * (total - held) + NF4_BYTES * held
    if bf16:
        weights -= 4 * (matrices - held)
    layer_bytes = facts.layer_bytes * (_ADAPTED if adapters_added else 1.0)
    layers_bytes = facts.layers_bytes * (_ADAPTED if adapters_added else 1.0)
    if way.recompute:
        layers_bytes = facts.inputs_bytes + facts.attention_bytes + layer_bytes
    samples = images = float(way.micro_batch)
    if spec.packing is not None:
        # Rows of so many tokens, as if of samples of the greatest length; short ones bring more images.
        samples = max(1.0, spec.packing.tokens / facts.tokens)
        images = spec.packing.images or samples * facts.tokens / max(1, facts.tokens - facts.text_tokens)
    kept = images * facts.image_bytes + samples * (layers_bytes + facts.other_bytes)
    if bf16:
        kept *= _AUTOCAST
    logits = _BYTES_A_LOGIT * min(LOGITS_AT_ONCE, samples * facts.text_tokens * facts.vocabulary)
    working = samples * layer_bytes / 2 + logits + RUNTIME_BYTES
    parts = 1
    if way.quantized:
        working += (2 if bf16 else 4) * facts.layer_parameters
    elif spec.shards(
        processes=way.devices,
        parameters=total,
        trained=t,
        frozen_matrices=matrices,
        memory_bytes=way.device_gb * GB,
    ):
        parts, width = way.devices, 2 if bf16 else 4
        frozen_layers = 0 if _trains_layers(facts, trained) else facts.layers_parameters
        weights = 4.0 * t + width * frozen_layers
        working += _gathered(facts, trained, total, width=width)
    return StageMemory(
        weights=weights / parts / GB,
        gradients=4 * t / parts / GB,
        optimizer=8 * t / parts / GB,
        activations=kept / GB,
        working=working / GB,
        micro_batch=way.micro_batch,
        tokens=facts.tokens,
    )


def _gathered(facts: StageFacts, trained: Mapping[str, int], total: int, *, width: int) -> float:
    """Bytes of what a process that holds a part has besides, while it computes."""
    in_layers = min(trained.get("language_model", 0), facts.layers_parameters)
    outside = total - facts.layers_parameters - facts.blocks_parameters
    outside_trained = sum(trained.values()) - in_layers - facts.blocks_parameters
    layer_trained = facts.layer_parameters if _trains_layers(facts, trained) else 0
    most = max(outside_trained, layer_trained, facts.block_parameters)
    return width * (outside + 2 * max(facts.layer_parameters, facts.block_parameters) + most) + 4 * most


def _trains_layers(facts: StageFacts, trained: Mapping[str, int]) -> bool:
    return trained.get("language_model", 0) >= facts.layers_parameters


def worst_memory(branches: Iterable[StageFacts], spec: StageSpec, way: Way) -> StageMemory:
    """Of the stage, or of the encoder that takes most where each is prealigned alone."""
    return max((stage_memory(facts, spec, way) for facts in branches), key=lambda memory: memory.total)


def changes(spec: StageSpec, way: Way) -> Iterator[tuple[str, Way]]:
    """What can be changed in a recipe so that it takes less, the nearest first.

    Returns:
        In words and as a way to train; adapters only where the language model trains.
    """
    at_once = way.micro_batch if spec.packing is None else 1
    while at_once > 1:
        at_once //= 2
        yield f"micro-batch {at_once}", _with(way, micro_batch=at_once)
    if not way.recompute and not _keeps_prefixes(spec):
        yield "recompute", _with(way, recompute=True)
        yield "recompute, micro-batch 1", _with(way, recompute=True, micro_batch=1)
    if "language_model" in spec.train and not way.quantized:
        adapted = _with(way, recompute=not _keeps_prefixes(spec), micro_batch=1, rank=way.rank or _ADAPTER_RANK)
        if way.rank is None:
            yield "LoRA", adapted
        yield "QLoRA", _with(adapted, quantized=True)


def nearest_change(
    stage: StageName, branches: Sequence[StageFacts], spec: StageSpec, way: Way, capacity_gb: float, *, more: bool
) -> str:
    """What makes a stage fit: another field of the recipe, or more devices."""
    ways: list[str] = []
    for change, other in changes(spec, way):
        if worst_memory(branches, spec, other).total <= capacity_gb:
            fields = [f"micro_batch_size={other.micro_batch}"] if other.micro_batch < way.micro_batch else []
            fields += ["checkpoint_language_model=true"] if other.recompute and not way.recompute else []
            if change == "QLoRA" and way.rank is not None:
                fields.append("lora.quantize=nf4")
            elif change in ("LoRA", "QLoRA"):
                held = ", quantize: nf4" if other.quantized else ""
                fields.append(f"lora={{rank: {other.rank}, alpha: 16{held}}}")
            ways.append(" ".join(f'--set "stages.{stage}.{field}"' for field in fields))
            break
    counts = [count for count in COUNTS if more and way.devices < count <= spec.batch_size]
    ways_of = ((count, way_of(spec, count, way.device_gb)) for count in counts)
    fits = (count for count, other in ways_of if worst_memory(branches, spec, other).total <= capacity_gb)
    ways += [f"{count} devices of this size" for count in fits][:1]
    return f"It fits with {', or with '.join(ways)}." if ways else "Use larger devices, or train fewer parts."


def _keeps_prefixes(spec: StageSpec) -> bool:
    """Whether questions share the keys and values of their prefix.

    Each keeps a copy of them, which computing again does not spare; what it does spare there is not counted.
    """
    return spec.packing is None and any(part.turns == "independent" for part in spec.mixture)


def _with(way: Way, **changed: float | bool) -> Way:
    return replace(way, **changed)  # type: ignore[arg-type]


def find_fits(branches: Iterable[StageFacts], spec: StageSpec) -> list[Fit]:
    """For each size of GPU the fewest that the stage fits on as the recipe says.

    Where that is more than a node, and a change makes it fit on a node or less, the nearest change is offered as well.
    """
    branches = list(branches)
    found = []
    for size in GPU_SIZES_GB:
        as_is = next(_on(branches, spec, size, COUNTS, ""), None)
        changed = None
        if as_is is None or as_is.devices > ONE_NODE:
            nodes = [count for count in COUNTS if count <= ONE_NODE]
            names = dict.fromkeys(name for count in nodes for name, _ in changes(spec, way_of(spec, count)))
            # The nearest change decides, and then the number.
            changed = next((fit for name in names for fit in _on(branches, spec, size, nodes, name)), None)
        # Several nodes of smaller GPUs are worth a line only where nothing else will do.
        if as_is is not None and (changed is None or size == GPU_SIZES_GB[0]):
            found.append(as_is)
        found += [changed] if changed is not None else []
    return found


def _on(branches: list[StageFacts], spec: StageSpec, size_gb: int, counts: Iterable[int], change: str) -> Iterator[Fit]:
    for count in counts:
        if count > spec.batch_size:
            return
        way = way_of(spec, count, size_gb)
        if change:
            found = dict(changes(spec, way)).get(change)
            if found is None:
                continue
            way = found
        total = worst_memory(branches, spec, way).total
        if total <= size_gb:
            yield Fit(devices=count, device_gb=size_gb, memory_gb=round(total, 3), change=change)
