"""Runs one training stage of a recipe, from its inputs to its result, through any number of kills."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor, nn

from manyeyes.data.mixture import Mixture
from manyeyes.data.snapshot import Snapshot
from manyeyes.encoders import Encoder, load_encoder_weights
from manyeyes.errors import CheckpointError, RecipeError
from manyeyes.model import (
    ManyEyesForConditionalGeneration,
    ManyEyesProcessor,
    build_model,
    checkpoint_digest,
    load_checkpoint,
    match_checkpoint,
    save_checkpoint,
)
from manyeyes.model.checkpoint import gather_checkpoint, load_empty_checkpoint, load_noted_checkpoint
from manyeyes.model.language_model import compile_layers, recompute_layers
from manyeyes.model.stored import Stored
from manyeyes.recipe import Recipe, StageName, StageSpec
from manyeyes.recipe.partial import one_encoder
from manyeyes.sources import pin_recipe
from manyeyes.storage import cache_dir, hash_file, link_or_copy, new_folder
from manyeyes.strict import StrictModel
from manyeyes.training.adapters import (
    adapter_modules,
    adapters_alone,
    add_adapters,
    merge_adapters,
    quantize_layers,
    save_adapter,
)
from manyeyes.training.ahead import Plan, batch_stream, micro_batches
from manyeyes.training.batches import BatchBuilder, processor_of_stage, stage_seed
from manyeyes.training.features import EncoderFeatures, frozen_features
from manyeyes.training.loop import Progress, loss_function, train
from manyeyes.training.optimizer import ParameterGroups, build_optimizer, freeze_others, learning_rates, split_groups
from manyeyes.training.packing import packed_micro_batches
from manyeyes.training.processes import Processes, training_processes
from manyeyes.training.running import HistoryPoint, RunningCheckpoints, TokenCounts, drop_running, stage_lock
from manyeyes.training.sharding import gather_tensor, make_whole, parts_of, shards
from manyeyes.training.throughput import ModelFlops, peak_of

# How often it saves, and what is held in which memory, do not change what it learns.
_NOT_LEARNED = ("checkpoint_every_s", "checkpoint_encoders", "checkpoint_language_model", "sharding")
ENCODER_WEIGHTS, ENCODER_FACTS, STAGE_REPORT = "encoder.safetensors", "encoder.json", "stage.json"
ADAPTER = "adapter"
FEATURES = "features"
# More than workers are ever ahead of training, in steps.
PLANS_KEPT = 64


class StageReport(StrictModel):
    """``stage.json``: what a stage did."""

    stage: StageName = Field(description="prealign, pretrain or sft.")
    encoder: str | None = Field(description="The encoder that prealign trained; null for other stages.")
    stage_digest: str = Field(description="sha256 over everything that determines the result, hexadecimal.")
    steps: int = Field(description="Optimizer steps.")
    samples: int = Field(description="Samples seen, each epoch counted.")
    seconds: float = Field(description="Seconds of training over all attempts, loading and saving left out.")
    data_wait_s: float | None = Field(default=None, description="Seconds of those in which training waited for data.")
    checkpoint_stall_s: float | None = Field(
        default=None, description="Seconds of those in which training waited for running checkpoints."
    )
    tokens: TokenCounts | None = Field(default=None, description="What went through the language model.")
    mfu: float | None = Field(
        default=None, description="Model FLOPs utilisation: share of what the devices can compute in those seconds."
    )
    peak_memory_gb: float | None = Field(
        default=None, description="Memory at its highest in the last attempt, in the process that took most, 1e9 bytes."
    )
    resumed_from_step: int | None = Field(description="Step that the last attempt went on from; null if unbroken.")
    notes: tuple[str, ...] = Field(default=(), description="What went wrong with running checkpoints on the way.")
    features: tuple[EncoderFeatures, ...] | None = Field(
        default=None, description="What became of frozen encoders' features, with keep_features; of the first process."
    )
    first_loss: float = Field(description="Loss of the first step, nats a supervised token.")
    final_loss: float = Field(description="Mean loss of the last point of the history, nats a supervised token.")
    checkpoint_digest: str = Field(description="Digest of the checkpoint, or of the encoder that prealign made.")
    adapter_sha256: str | None = Field(
        default=None,
        description="Of adapter/adapter_model.safetensors, hexadecimal; null where the stage trained no adapters.",
    )
    trainable_parameters: dict[str, int] = Field(description="Trained parameters by group.")
    history: tuple[HistoryPoint, ...] = Field(description="At most about a hundred points.")


class EncoderFacts(StrictModel):
    """``encoder.json`` beside a prealigned encoder's ``encoder.safetensors``."""

    name: str = Field(description="Its name in the recipe.")
    encoder: str = Field(description="Row of ENCODERS.")
    image_size: int = Field(description="Pixels a side.")
    sha256: str = Field(description="Of encoder.safetensors, hexadecimal.")


def run_stage(
    recipe: Recipe,
    stage: StageName,
    *,
    snapshot: Snapshot,
    code_digest: str,
    out: Path,
    work_dir: Path,
    encoder: str | None = None,
    encoder_checkpoints: Mapping[str, Path] | None = None,
    checkpoint: Path | None = None,
    quarantine: frozenset[str] = frozenset(),
    data_workers: int = 0,
    on_progress: Callable[[Progress], None] | None = None,
) -> StageReport:
    """Run a stage, or go on with it where a killed run left off, or hand out the result of a finished one.

    Args:
        recipe: What the model is and how the stage trains it.
        stage: ``prealign`` trains one encoder with a projector of its own; ``pretrain`` and ``sft`` the whole model.
        snapshot: Training data and pretrained parts.
        code_digest: Of the code; another code trains anew.
        out: Folder to write. ``prealign``: ``encoder.safetensors`` and ``encoder.json``; else a checkpoint. Both with
            ``stage.json``; a checkpoint of a stage with ``lora`` also with its adapters alone, in ``adapter``.
        work_dir: Where running checkpoints live, under the stage's digest.
        encoder: For ``prealign``, the encoder's name in the recipe.
        encoder_checkpoints: Results of ``prealign`` by encoder name; used where the model is built.
        checkpoint: Result of the stage before. The model is built from the recipe when left out.
        quarantine: Rows to leave out, as ``manyeyes.data.quarantine.row_name`` writes them.
        data_workers: Processes that build batches ahead of each training process; the result does not depend on them.
        on_progress: Called about once a second, and after the last step, by the main process.

    Returns:
        What ``stage.json`` says.

    Raises:
        RecipeError: The recipe lacks the stage or the encoder, or the loss is no longer finite.
        CheckpointError: An input checkpoint is missing, incomplete, or of another encoder or model than the recipe's.
        SourceError: Weights that the recipe names cannot be read, or are not those that the recipe was pinned with.
        LockedError: Another process trains this very stage.
        StorageError: No space for the result, or for the first running checkpoint; an older one is untouched.
        SnapshotError: A shard cannot be read.
        RecordError: A record cannot be used.
        ProcessLostError: A process that trains or builds batches ended, or was told to.
    """
    _stage_spec(recipe, stage, encoder)
    recipe = pin_recipe(recipe)
    if stage == "prealign":
        recipe = one_encoder(recipe, encoder or "")
    job = _Job(
        recipe=recipe,
        stage=stage,
        spec=_stage_spec(recipe, stage, encoder),
        snapshot=snapshot,
        encoder=encoder,
        encoder_checkpoints=dict(encoder_checkpoints or {}),
        checkpoint=checkpoint,
        quarantine=quarantine,
        code_digest=code_digest,
    )
    facts = job.facts()
    folder = work_dir / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    done = folder / "done"
    with training_processes() as processes, _owned(folder, processes):
        if not done.exists():
            _train_and_save(
                job, facts, folder, done, processes=processes, data_workers=data_workers, on_progress=on_progress
            )
        processes.wait()
        if processes.is_main:
            drop_running(folder)
            _copy(done, out)
        processes.wait()
        return read_stage_report(done)


def read_stage_report(path: Path) -> StageReport:
    """Read ``stage.json`` of a stage's result.

    Raises:
        CheckpointError: Missing or broken.
    """
    try:
        return StageReport.model_validate_json((path / STAGE_REPORT).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path / STAGE_REPORT} cannot be read ({error})", "the report of a stage", "Run the stage again."
        ) from error


def encoder_digest(path: Path) -> str:
    """Digest of a prealigned encoder: sha256 over its weights and facts.

    Args:
        path: Folder that ``prealign`` wrote.

    Raises:
        CheckpointError: Missing, incomplete or changed.
    """
    facts = _read_encoder_facts(path)
    return hashlib.sha256(facts.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class _Job:
    """Everything that determines a stage's result."""

    recipe: Recipe
    stage: StageName
    spec: StageSpec
    snapshot: Snapshot
    encoder: str | None
    encoder_checkpoints: Mapping[str, Path]
    checkpoint: Path | None
    quarantine: frozenset[str]
    code_digest: str

    @property
    def seed(self) -> int:
        return stage_seed(self.recipe, self.stage, self.encoder)

    def facts(self) -> dict[str, object]:
        inputs = {name: encoder_digest(path) for name, path in sorted(self.encoder_checkpoints.items())}
        return {
            "model": self.recipe.stage_model(self.stage).model_dump(mode="json"),
            "stage": self.stage,
            "spec": self.spec.model_dump(mode="json", exclude=set(_NOT_LEARNED)),
            "seed": self.seed,
            "encoder": self.encoder,
            "data_md5": self.snapshot.md5,
            "quarantine": sorted(self.quarantine),
            "code_digest": self.code_digest,
            "encoder_checkpoints": inputs,
            "checkpoint": checkpoint_digest(self.checkpoint) if self.checkpoint else None,
        }


def _stage_spec(recipe: Recipe, stage: StageName, encoder: str | None) -> StageSpec:
    spec: StageSpec | None = getattr(recipe.stages, stage)
    if spec is None:
        raise RecipeError(f'the recipe has no stage "{stage}"', "a recipe with that stage", f"Add stages.{stage}.")
    if stage != "prealign" and encoder is not None:
        raise RecipeError(
            f'stage "{stage}" with encoder "{encoder}"', "it trains the whole model", "Leave encoder out."
        )
    return spec


@contextmanager
def _owned(folder: Path, processes: Processes) -> Iterator[None]:
    with stage_lock(folder) if processes.is_main else nullcontext():
        processes.wait()
        yield


def _train_and_save(
    job: _Job,
    facts: Mapping[str, object],
    folder: Path,
    done: Path,
    *,
    processes: Processes,
    data_workers: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    spec = job.spec
    # Where each will hold a part, it reads that part alone, and the main process what cannot be read so.
    may_shard = processes.size > 1 and spec.sharding != "none" and not spec.quantized
    stored: Stored | None = {} if may_shard else None
    empty = may_shard and not processes.is_main
    model, processor = _build(job, empty=empty, stored=stored)
    groups, rates = _what_trains(job, model, device=processes.device)
    sharded = shards(model, spec, processes=processes)
    if (empty or stored) and not sharded:
        model, processor = _build(job)
        groups, rates = _what_trains(job, model, device=processes.device)
    model.train()
    for group in groups:
        if group not in rates:
            model.get_submodule(group).eval()
    for encoder in model.encoders.values():
        assert isinstance(encoder, Encoder)
        encoder.set_checkpointing(spec.checkpoint_encoders)
    if spec.checkpoint_language_model:
        recompute_layers(model.language_model)
    if spec.torch_compile and processes.device.type == "cuda":
        compile_layers(model.language_model)
    flops = ModelFlops(model)
    loss_of = loss_function(model, spec, processes=processes, sharded=sharded, stored=stored, flops=flops)
    stored = None
    groups = parts_of(model, groups)
    parameters = {name: parameter for group in rates for name, parameter in groups[group]}
    mixture = Mixture(spec.mixture, job.snapshot, seed=job.seed, quarantine=job.quarantine, drawn=_draw(job))
    num_samples = spec.epochs * len(mixture)
    steps = math.ceil(num_samples / spec.batch_size)
    if spec.max_steps is not None and spec.max_steps < steps:
        steps, num_samples = spec.max_steps, spec.max_steps * spec.batch_size
    if spec.max_samples is not None and spec.max_samples < num_samples:
        steps, num_samples = math.ceil(spec.max_samples / spec.batch_size), spec.max_samples

    def report(step: int, point: HistoryPoint, seconds: float, slow: str) -> None:
        if on_progress is not None:
            on_progress(
                Progress(
                    stage=job.stage,
                    encoder=job.encoder,
                    step=step,
                    steps=steps,
                    loss=point.loss,
                    learning_rate=point.learning_rate,
                    grad_norm=point.grad_norm,
                    samples_per_s=point.samples_per_s,
                    data_wait=point.data_wait or 0.0,
                    checkpoint_stall=point.checkpoint_stall or 0.0,
                    tokens_per_s=point.tokens_per_s or 0.0,
                    padding=point.padding or 0.0,
                    supervised=point.supervised or 0.0,
                    mfu=point.mfu or 0.0,
                    peak_memory_gb=point.peak_memory_gb or 0.0,
                    eta_s=(num_samples - min(num_samples, step * spec.batch_size)) / point.samples_per_s,
                    seconds=seconds,
                    slow=slow,
                )
            )

    shown = processor_of_stage(processor, spec)
    frozen = None
    if spec.keep_features:
        frozen = frozen_features(
            model,
            shown,
            precision=spec.precision,
            folder=folder.parent / FEATURES,
            images=round(min(len(mixture), num_samples) * _images_a_record(job)),
            uses=max(1.0, num_samples / len(mixture)),
            device=processes.device,
            code_digest=job.code_digest,
            tell=processes.is_main,
        )
    builder = BatchBuilder(
        mixture,
        shown,
        too_long=spec.too_long,
        packed=spec.packing is not None,
        frozen=None if frozen is None else frozen.reader,
    )
    shared = {
        "batch_size": spec.batch_size,
        "num_samples": num_samples,
        "rank": processes.rank,
        "num_ranks": processes.size,
    }
    plan: Plan = partial(micro_batches, micro_batch_size=spec.micro_batch_size, **shared)
    if spec.packing is not None:
        model.enable_packing(longest=processor.max_length)
        # Asked for twice: by what workers build ahead, and by training.
        plan = lru_cache(PLANS_KEPT)(
            partial(packed_micro_batches, measure=builder.measure, packing=spec.packing, **shared)
        )
    optimizer = build_optimizer(groups, rates, spec)
    pinned = processes.device.type == "cuda"
    with batch_stream(builder, plan, steps=steps, workers=data_workers, pinned=pinned, frozen=frozen) as stream:
        state, begin = train(
            loss_of,
            stream,
            spec,
            steps=steps,
            num_samples=num_samples,
            parameters=parameters,
            optimizer=optimizer,
            processes=processes,
            checkpoints=RunningCheckpoints(
                folder,
                facts=facts,
                parameters=parameters,
                optimizer=optimizer,
                processes=processes,
                every_s=spec.checkpoint_every_s,
            ),
            flops=flops,
            seed=job.seed,
            report=report,
        )
    model.eval()
    whole = partial(gather_tensor, processes=processes) if sharded else None
    if whole is None:
        model.to("cpu")
    elif spec.lora is not None:
        make_whole(adapter_modules(model))
    loss_of.restore_frozen()
    if not processes.is_main:
        if whole is not None:
            _take_part(model, job, whole)
        return
    with new_folder(done) as new:
        result, adapter = new / "result", None
        if spec.lora is not None and job.encoder is None:
            adapter = save_adapter(model, new / ADAPTER, base=_base(job))
        merge_adapters(model)
        if job.encoder is None:
            digest = save_checkpoint(model, processor, result, whole=whole)
        else:
            digest = _save_encoder(model, job, result, whole)
        for file in list(result.iterdir()):
            file.rename(new / file.name)
        result.rmdir()
        stage_report = StageReport(
            stage=job.stage,
            encoder=job.encoder,
            stage_digest=folder.name,
            steps=steps,
            samples=num_samples,
            seconds=state.seconds,
            data_wait_s=state.data_wait_s,
            checkpoint_stall_s=state.checkpoint_stall_s,
            tokens=state.tokens,
            mfu=state.tokens.flops / state.seconds / peak_of(processes, spec.precision),
            peak_memory_gb=state.history[-1].peak_memory_gb,
            features=None if frozen is None else tuple(frozen.reports()),
            resumed_from_step=begin or None,
            notes=state.notes,
            first_loss=state.first_loss,
            final_loss=state.history[-1].loss,
            checkpoint_digest=digest,
            adapter_sha256=adapter,
            trainable_parameters={group: sum(parameter.numel() for _, parameter in groups[group]) for group in rates},
            history=state.history,
        )
        (new / STAGE_REPORT).write_text(stage_report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _what_trains(
    job: _Job, model: ManyEyesForConditionalGeneration, *, device: torch.device
) -> tuple[dict[str, list[tuple[str, nn.Parameter]]], dict[str, float]]:
    """Parameters by group, and the learning rates of those that train; adapters are put in, and all else is frozen."""
    groups: ParameterGroups = model.parameter_groups()
    if job.spec.lora is not None:
        add_adapters(model.requires_grad_(False), job.spec.lora, seed=job.seed)
        groups = adapters_alone(model.parameter_groups())
    if job.spec.quantized:
        dtype = torch.bfloat16 if job.spec.precision == "bf16" else torch.float32
        quantize_layers(model, dtype=dtype, device=device)
    split = split_groups(groups, job.spec.train)
    rates = learning_rates(job.spec.train, split)
    freeze_others(split, rates)
    return split, rates


def _take_part(model: ManyEyesForConditionalGeneration, job: _Job, whole: Callable[[Tensor], Tensor]) -> None:
    """Give the main process what it writes."""
    merge_adapters(model)
    if job.encoder is None:
        gather_checkpoint(model, whole)
    else:
        for tensor in model.encoders[job.encoder].state_dict().values():
            whole(tensor)


def _draw(job: _Job) -> Mapping[str, NDArray[np.int64]] | None:
    """By data set the rows that the stage draws; None where it takes all."""
    if job.spec.draw is None:
        return None
    from manyeyes.data.curation.stage_draw import draw_of_stage, drawn_rows  # pandas, a second that few stages need

    datasets = [part.dataset for part in job.spec.mixture]
    return drawn_rows(
        draw_of_stage(job.spec.draw, datasets, job.snapshot, quarantine=job.quarantine, cache_dir=cache_dir())
    )


def _images_a_record(job: _Job) -> float:
    sets = [job.snapshot.manifest.datasets[part.dataset] for part in job.spec.mixture]
    return sum(own.images for own in sets) / max(1, sum(own.rows for own in sets))


def _build(
    job: _Job, *, empty: bool = False, stored: Stored | None = None
) -> tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]:
    spec = job.recipe.stage_model(job.stage)
    if job.checkpoint is not None:
        earlier = job.stage == "sft" and job.recipe.stages.pretrain is not None
        models = [*([job.recipe.stage_model("pretrain")] if earlier else []), job.recipe.model, spec]
        found = match_checkpoint(job.checkpoint, models, snapshot_path=job.snapshot.path)
        # As it was saved, unless the stages differ in what the model is.
        own = None if found == spec else spec
        if empty:
            return load_empty_checkpoint(job.checkpoint, spec=own, stored=stored)
        if stored is not None:
            return load_noted_checkpoint(job.checkpoint, spec=own, stored=stored)
        return load_checkpoint(job.checkpoint, spec=own)
    model, processor = build_model(
        spec,
        snapshot_path=job.snapshot.path,
        seed=job.seed,
        encoders=None if job.encoder is None else [job.encoder],
        empty=empty,
        stored=stored,
    )
    if not empty:
        for name, path in job.encoder_checkpoints.items():
            _load_encoder(model, name, path)
    return model, processor


def _base(job: _Job) -> tuple[str, str] | None:
    """Id and commit of the hub's language model that a stage adapts; None where it may be another by now."""
    source = job.recipe.model.language_model.source
    if not source.startswith("hub:"):
        return None
    if job.checkpoint is not None:
        if not (job.checkpoint / STAGE_REPORT).is_file():
            return None
        before = read_stage_report(job.checkpoint)
        groups = {name.partition(".")[0] for name in before.trainable_parameters}
        if before.stage != "pretrain" or "language_model" in groups:
            return None
    name, _, revision = source.removeprefix("hub:").partition("@")
    return name, revision


def _save_encoder(
    model: ManyEyesForConditionalGeneration, job: _Job, path: Path, whole: Callable[[Tensor], Tensor] | None
) -> str:
    assert job.encoder is not None
    entry = next(entry for entry in model.config.encoders if entry.name == job.encoder)
    state = model.encoders[job.encoder].state_dict()
    if whole is not None:
        state = {name: whole(tensor) for name, tensor in state.items()}
    with new_folder(path) as folder:
        data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
        facts = EncoderFacts(
            name=job.encoder,
            encoder=entry.encoder,
            image_size=entry.image_size,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        (folder / ENCODER_WEIGHTS).write_bytes(data)
        (folder / ENCODER_FACTS).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return encoder_digest(path)


def _load_encoder(model: ManyEyesForConditionalGeneration, name: str, path: Path) -> None:
    facts = _read_encoder_facts(path)
    entry = next((entry for entry in model.config.encoders if entry.name == name), None)
    found = (facts.name, facts.encoder, facts.image_size)
    if entry is None or found != (name, entry.encoder, entry.image_size):
        raise CheckpointError(
            f'{path} holds encoder "{facts.name}" ({facts.encoder}, {facts.image_size} pixels)',
            f'"{name}" of this recipe is needed',
            "Run prealign with this recipe.",
        )
    encoder = model.encoders[name]
    assert isinstance(encoder, Encoder)
    load_encoder_weights(encoder, facts.encoder, path / ENCODER_WEIGHTS)


def _read_encoder_facts(path: Path) -> EncoderFacts:
    try:
        facts = EncoderFacts.model_validate_json((path / ENCODER_FACTS).read_text(encoding="utf-8"))
        found = hash_file(path / ENCODER_WEIGHTS)
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path} is not a prealigned encoder ({error})", f"{ENCODER_FACTS} and {ENCODER_WEIGHTS}", "Run prealign."
        ) from error
    if found != facts.sha256:
        raise CheckpointError(
            f"{path / ENCODER_WEIGHTS} has sha256 {found}", f"{facts.sha256} in {ENCODER_FACTS}", "Run prealign again."
        )
    return facts


def _copy(source: Path, out: Path) -> None:
    with new_folder(out) as folder:
        for file in source.rglob("*"):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(file, target)
