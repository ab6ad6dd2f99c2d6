"""The training loop, and running checkpoints: what a killed stage needs to go on to the very same weights.

A stage's working folder holds ``lock`` (owned by the process that trains), ``step-<n>`` folders (the last two) and,
once the stage is complete, ``done`` with its result.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from manyeyes.errors import LockedError, RecipeError, StorageError
from manyeyes.model import BranchBatch, ManyEyesForConditionalGeneration
from manyeyes.recipe import StageSpec
from manyeyes.storage import file_lock, new_folder, storage_errors
from manyeyes.strict import StrictModel
from manyeyes.training.ahead import BatchStream
from manyeyes.training.batches import Batch
from manyeyes.training.optimizer import schedule_factor, set_learning_rates
from manyeyes.training.processes import Processes
from manyeyes.training.sharding import ShardedLoss, WholeLoss, clip_gradients, gather_tensor, part_of

KEPT = 2
_STATE, _PROGRESS = "state.safetensors", "progress.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class HistoryPoint(StrictModel):
    """What training looked like at a step."""

    step: int = Field(description="Optimizer steps done.")
    loss: float = Field(description="Mean loss since the point before, nats a supervised token.")
    learning_rate: float = Field(description="The highest of the groups' rates.")
    grad_norm: float = Field(description="Norm of the gradient at this step, before clipping.")
    samples_per_s: float = Field(description="Samples a second since the point before.")
    data_wait: float | None = Field(
        default=None, description="Share of the time since the point before in which training waited for data."
    )
    tokens_per_s: float | None = Field(
        default=None, description="Tokens of the language model a second since the point before, without padding."
    )
    padding: float | None = Field(
        default=None, description="Share of padding in what the language model computed since the point before."
    )
    supervised: float | None = Field(
        default=None, description="Share of supervised tokens among the real ones since the point before."
    )


class TokenCounts(StrictModel):
    """What went through the language model."""

    real: int = Field(default=0, description="Tokens, visual ones included.")
    places: int = Field(default=0, description="Those and padding.")
    supervised: int = Field(default=0, description="Tokens that the loss counts.")

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Both together."""
        return TokenCounts(
            real=self.real + other.real,
            places=self.places + other.places,
            supervised=self.supervised + other.supervised,
        )

    @property
    def padding(self) -> float:
        """Share of padding among the places."""
        return 1 - self.real / max(1, self.places)

    @property
    def supervised_share(self) -> float:
        """Share of supervised tokens among the real ones."""
        return self.supervised / max(1, self.real)


class RunningState(StrictModel):
    """``progress.json`` of a running checkpoint."""

    step: int = Field(description="Optimizer steps done.")
    seconds: float = Field(description="Seconds trained so far, over all attempts.")
    data_wait_s: float = Field(description="Seconds of those in which it waited for data.")
    tokens: TokenCounts = Field(description="What was trained on so far, over all attempts.")
    first_loss: float = Field(description="Loss of the first step, nats a supervised token.")
    history: tuple[HistoryPoint, ...] = Field(description="Points so far.")
    sha256: str = Field(description="Of the file with parameters and optimizer state, hexadecimal.")


@contextmanager
def stage_lock(folder: Path) -> Iterator[None]:
    """Own a stage's working folder; the system lets go when this process ends, however it ends.

    Raises:
        LockedError: Another process trains this stage.
        StorageError: No space or no permission.
    """

    def taken(owner: str) -> LockedError:
        return LockedError(
            f"process {owner} trains this stage in {folder}",
            "one process at a time",
            f"Wait for it, or stop it with: kill {owner}",
        )

    with file_lock(folder / "lock", taken=taken):
        with storage_errors(folder):
            for half_written in folder.glob(".*"):  # by an owner that was killed
                shutil.rmtree(half_written)
        yield


def save_running(
    folder: Path,
    *,
    step: int,
    seconds: float,
    data_wait_s: float,
    tokens: TokenCounts,
    first_loss: float,
    history: list[HistoryPoint],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> None:
    """Write a running checkpoint, then drop all but the last two.

    Args:
        folder: The stage's working folder.
        step: Optimizer steps done.
        seconds: Seconds trained so far.
        data_wait_s: Seconds of those in which it waited for data.
        tokens: What was trained on so far.
        first_loss: Loss of the first step.
        history: Points so far.
        parameters: Those that train, by name; the others come from the stage's inputs.
        optimizer: AdamW over them.
        processes: Whose parts they are. The main process writes; where there are parts, all call this.

    Raises:
        StorageError: No space. What was there before is untouched.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for kind, tensor in (("parameter", parameter), *((key, optimizer.state[parameter][key]) for key in _MOMENTS)):
            tensors[f"{kind}/{name}"] = gather_tensor(tensor, processes)
    if not processes.is_main:
        return
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with storage_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < 2 * len(data):
        raise StorageError(
            f"{folder} has {free / 1e6:.0f} MB free",
            f"{2 * len(data) / 1e6:.0f} MB are needed for a running checkpoint and the result",
            "Free some space or set MANYEYES_WORKDIR to another disk, then run the same command again.",
        )
    state = RunningState(
        step=step,
        seconds=seconds,
        data_wait_s=data_wait_s,
        tokens=tokens,
        first_loss=first_loss,
        history=tuple(history),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    with new_folder(folder / f"step-{step:08d}") as new:
        (new / _STATE).write_bytes(data)
        (new / _PROGRESS).write_text(state.model_dump_json(indent=2), encoding="utf-8")
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_running(
    folder: Path, *, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> RunningState | None:
    """Go back to the newest running checkpoint that is whole.

    Args:
        folder: The stage's working folder.
        parameters: Those that train; overwritten.
        optimizer: AdamW over them; its moments are overwritten.

    Returns:
        Where to go on; None when there is nothing to go on from.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        found = _read(checkpoint)
        if found is None:
            continue
        state, tensors = found
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(part_of(tensors[f"parameter/{name}"], parameter))
            optimizer.state[parameter] = {
                # AdamW counts steps per parameter, in a float32 tensor.
                "step": torch.tensor(float(state.step), device=parameter.device),
                **{moment: part_of(tensors[f"{moment}/{name}"], parameter) for moment in _MOMENTS},
            }
        return state
    return None


def drop_running(folder: Path) -> None:
    """Remove the running checkpoints of a stage that is complete."""
    for checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _read(checkpoint: Path) -> tuple[RunningState, dict[str, Tensor]] | None:
    try:
        state = RunningState.model_validate_json((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
        data = (checkpoint / _STATE).read_bytes()
    except (FileNotFoundError, ValidationError, json.JSONDecodeError):
        return None
    if hashlib.sha256(data).hexdigest() != state.sha256:
        return None
    return state, safetensors.torch.load(data)


HISTORY_POINTS = 100
PROGRESS_EVERY_S = 1.0


class Progress(StrictModel):
    """How far a stage is; for people and for MLflow."""

    stage: str = Field(description="prealign, pretrain or sft.")
    encoder: str | None = Field(description="The encoder that prealign trains.")
    step: int = Field(description="Optimizer steps done.")
    steps: int = Field(description="Optimizer steps of the stage.")
    loss: float = Field(description="Loss at this step, nats a supervised token.")
    learning_rate: float = Field(description="The highest of the groups' rates.")
    grad_norm: float = Field(description="Norm of the gradient, before clipping.")
    samples_per_s: float = Field(description="Samples a second in this attempt.")
    data_wait: float = Field(description="Share of this attempt's time in which training waited for data.")
    tokens_per_s: float = Field(description="Tokens a second in this attempt, without padding.")
    padding: float = Field(description="Share of padding in what the language model computed in this attempt.")
    supervised: float = Field(description="Share of supervised tokens among the real ones in this attempt.")
    eta_s: float = Field(description="Seconds until the last step at this speed.")
    seconds: float = Field(description="Seconds trained so far, over all attempts.")


def train(
    loss_of: WholeLoss | ShardedLoss,
    stream: BatchStream,
    stage: StageSpec,
    *,
    steps: int,
    num_samples: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    folder: Path,
    seed: int,
    report: Callable[[int, HistoryPoint, float, float], None],
) -> tuple[RunningState, int]:
    """Train the parameters of a stage, from its newest running checkpoint where there is one.

    Every step draws its batch and its random numbers from its own number alone, so a resumed run repeats an unbroken
    one bit for bit (on CPU, with the same number of threads).

    Args:
        loss_of: From ``loss_function``; its model is frozen but for ``parameters``.
        stream: This process's batches of each step.
        stage: Batch size, schedule and the like.
        steps: Optimizer steps.
        num_samples: Samples in all; the last step takes what is left.
        parameters: Those that train, by name.
        optimizer: Over them.
        processes: Who else takes part.
        folder: The stage's working folder, for running checkpoints.
        seed: Of dropout and the like.
        report: Called about once a second with steps done, the current figures, samples a second and seconds so far.

    Returns:
        The state after the last step (its sha256 is empty), and the step that this attempt began at.

    Raises:
        RecipeError: The loss is no longer a finite number.
        RecordError: A record cannot be used.
        ProcessLostError: A worker ended.
        StorageError: No space for a running checkpoint; the one before is untouched.
    """
    found = load_running(folder, parameters=parameters, optimizer=optimizer)
    begin = found.step if found else 0
    history = list(found.history) if found else []
    first_loss, seconds_before = (found.first_loss, found.seconds) if found else (math.nan, 0.0)
    waited_before, tokens_before = (found.data_wait_s, found.tokens) if found else (0.0, TokenCounts())
    tokens = tokens_since_mark = TokenCounts()
    trained = list(parameters.values())
    started = saved = reported = marked = time.monotonic()
    losses, samples, samples_since_mark, waited_at_mark = [], 0, 0, 0.0
    every = max(1, steps // HISTORY_POINTS)
    stream.go_to(begin)
    for step in range(begin, steps):
        torch.manual_seed(_step_seed(seed, step, processes.rank))
        rate = set_learning_rates(optimizer, schedule_factor(stage.schedule, step=step, steps=steps))
        share, total = processes.share(stream.next_step, count=lambda share: share.num_supervised)
        step_loss, num_tokens, num_places = torch.zeros(1, device=processes.device), 0, 0
        for batch, calls in loss_of.agree(share.batches):
            with (
                processes.computing_together(),
                torch.autocast(processes.device.type, torch.bfloat16, enabled=stage.precision == "bf16"),
            ):
                loss = loss_of(batch, calls) / max(1.0, total)
            if loss.requires_grad:  # not where only encoders train and no sample shows its image
                with processes.computing_together():
                    loss.backward()
            step_loss += loss.detach()
            if batch is not None:
                num_tokens, num_places = num_tokens + batch.num_tokens, num_places + batch.num_places
            del batch, loss
        processes.sum_gradients(trained)
        norm = clip_gradients(trained, stage.max_grad_norm, processes)
        due = processes.is_main and time.monotonic() - saved >= stage.checkpoint_every_s
        told = torch.tensor([float(num_tokens), float(num_places), float(due)])
        loss_value, *counts, due = processes.sum(torch.cat([step_loss.cpu(), told])).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            raise RecipeError(
                f"loss {loss_value} and gradient norm {norm} at step {step + 1}",
                "finite numbers are needed",
                "Lower the learning rates or raise schedule.warmup_ratio.",
            )
        optimizer.step()
        optimizer.zero_grad()

        losses.append(loss_value)
        if step == 0:
            first_loss = loss_value
        num_new = min(stage.batch_size, num_samples - step * stage.batch_size)
        samples += num_new
        samples_since_mark += num_new
        new = TokenCounts(real=round(counts[0]), places=round(counts[1]), supervised=round(total))
        tokens, tokens_since_mark = tokens + new, tokens_since_mark + new
        now = time.monotonic()
        done, last = step + 1, step + 1 == steps
        point = HistoryPoint(
            step=done,
            loss=loss_value,
            learning_rate=rate,
            grad_norm=norm,
            samples_per_s=samples / (now - started),
            data_wait=stream.waited_s / (now - started),
            tokens_per_s=tokens.real / (now - started),
            padding=tokens.padding,
            supervised=tokens.supervised_share,
        )
        if done % every == 0 or last:
            speed, waited = samples_since_mark / (now - marked), (stream.waited_s - waited_at_mark) / (now - marked)
            means = {
                "loss": sum(losses) / len(losses),
                "samples_per_s": speed,
                "data_wait": waited,
                "tokens_per_s": tokens_since_mark.real / (now - marked),
                "padding": tokens_since_mark.padding,
                "supervised": tokens_since_mark.supervised_share,
            }
            history.append(point.model_copy(update=means))
            losses, samples_since_mark, marked, waited_at_mark = [], 0, now, stream.waited_s
            tokens_since_mark = TokenCounts()
        if processes.is_main and (now - reported >= PROGRESS_EVERY_S or last):
            report(done, point, point.samples_per_s, seconds_before + now - started)
            reported = now
        if due and not last and not losses:
            save_running(
                folder,
                step=done,
                seconds=seconds_before + now - started,
                data_wait_s=waited_before + stream.waited_s,
                tokens=tokens_before + tokens,
                first_loss=first_loss,
                history=history,
                parameters=parameters,
                optimizer=optimizer,
                processes=processes,
            )
            saved = time.monotonic()
    seconds = seconds_before + time.monotonic() - started
    state = RunningState(
        step=steps,
        seconds=seconds,
        data_wait_s=waited_before + stream.waited_s,
        tokens=tokens_before + tokens,
        first_loss=first_loss,
        history=tuple(history),
        sha256="",
    )
    return state, begin


def loss_function(
    model: ManyEyesForConditionalGeneration, stage: StageSpec, *, processes: Processes, sharded: bool
) -> WholeLoss | ShardedLoss:
    """What ``train`` computes.

    Args:
        model: Where it is sharded, its parameters become parts of tensors, in place; else it is moved to the device.
        stage: Its precision.
        processes: Who takes part.
        sharded: Whether each process keeps a part alone.
    """

    def compute(batch: Batch) -> Tensor:
        return batch_loss(model, batch, device=processes.device)

    if sharded:
        return ShardedLoss(model, compute, processes=processes, precision=stage.precision)
    model.to(processes.device)
    return WholeLoss(compute)


def batch_loss(model: ManyEyesForConditionalGeneration, batch: Batch, *, device: torch.device) -> Tensor:
    """Loss summed over the supervised tokens of a batch.

    Images run through the encoders once. Independent samples share the prefix that ends with their images; chained
    ones run as whole rows; packed ones as one row, whatever they are.
    """
    visual_tokens = None
    if batch.pixel_values:
        visual_tokens = model.encode_images(
            {name: pixels.to(device, non_blocking=True) for name, pixels in batch.pixel_values.items()},
            **{name: tensor.to(device, non_blocking=True) for name, tensor in batch.size_inputs.items()},
        )
    losses: list[Tensor | None] = []
    if batch.packed is not None:
        row = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.packed.items()}
        spans = row["image_spans"]
        losses.append(
            model(
                input_ids=row["input_ids"],
                segments=batch.segments,
                visual_tokens=visual_tokens if len(spans) else None,
                image_spans=spans if len(spans) else None,
                labels=row["labels"],
                use_cache=False,
                num_items_in_batch=1,
            ).loss
        )
    if batch.prefixes is not None:
        prefixes = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.prefixes.items()}
        spans = prefixes["image_spans"]
        cache = model.prefill_prefix(
            prefixes["input_ids"],
            prefixes["attention_mask"],
            visual_tokens=visual_tokens if len(spans) else None,
            image_spans=spans if len(spans) else None,
        )
        for bucket in batch.branches:
            branches = {name: tensor.to(device, non_blocking=True) for name, tensor in bucket.items()}
            losses.append(model.forward_branches(BranchBatch(cache, prefixes["attention_mask"], **branches)).loss)
    if batch.chains is not None:
        chains = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.chains.items()}
        spans = chains["image_spans"]
        losses.append(
            model(
                input_ids=chains["input_ids"],
                attention_mask=chains["attention_mask"],
                visual_tokens=visual_tokens if len(spans) else None,
                image_spans=spans if len(spans) else None,
                labels=chains["labels"],
                use_cache=False,
                num_items_in_batch=1,
            ).loss
        )
    return torch.stack([loss for loss in losses if loss is not None]).sum()


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:7], "big")
