"""The training loop."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext

import torch
from pydantic import Field
from torch import Tensor, nn

from manyeyes.errors import ProcessLostError, RecipeError
from manyeyes.model import BranchBatch, ManyEyesForConditionalGeneration
from manyeyes.model.stored import Stored
from manyeyes.recipe import StageSpec
from manyeyes.strict import StrictModel
from manyeyes.training.ahead import BatchStream
from manyeyes.training.batches import Batch
from manyeyes.training.optimizer import schedule_factor, set_learning_rates
from manyeyes.training.processes import Processes
from manyeyes.training.running import HistoryPoint, RunningCheckpoints, RunningState, TokenCounts, noting_signals
from manyeyes.training.sharding import ShardedLoss, WholeLoss, clip_gradients
from manyeyes.training.throughput import ModelFlops, peak_memory, peak_of

HISTORY_POINTS = 100
PROGRESS_EVERY_S = 1.0
# A process that takes so many times as long as the others is named; over about the last ten steps.
FAR_SLOWER = 1.5
_KEPT_OF_BUSY = 0.9


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
    checkpoint_stall: float = Field(description="Share of it in which training waited for running checkpoints.")
    tokens_per_s: float = Field(description="Tokens a second in this attempt, without padding.")
    padding: float = Field(description="Share of padding in what the language model computed in this attempt.")
    supervised: float = Field(description="Share of supervised tokens among the real ones in this attempt.")
    mfu: float = Field(description="Model FLOPs utilisation in this attempt: share of what the devices can compute.")
    peak_memory_gb: float = Field(description="Memory at its highest in the process that takes most, 1e9 bytes.")
    eta_s: float = Field(description="Seconds until the last step at this speed.")
    seconds: float = Field(description="Seconds trained so far, over all attempts.")
    slow: str = Field(default="", description="Which process is far slower than the others; empty where none is.")


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
    checkpoints: RunningCheckpoints,
    flops: ModelFlops,
    seed: int,
    report: Callable[[int, HistoryPoint, float, str], None],
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
        checkpoints: The stage's running ones, of these parameters; closed here.
        flops: Of the model of ``loss_of``.
        seed: Of dropout and the like.
        report: Called about once a second with steps done, the current figures, seconds so far, and which process is
            slow.

    Returns:
        The state after the last step, and the step that this attempt began at.

    Raises:
        RecipeError: The loss is no longer a finite number.
        RecordError: A record cannot be used.
        ProcessLostError: A worker ended, or a process was told to end: the step that it was at is saved.
        CheckpointError: A running checkpoint is of another training.
        StorageError: No space for a running checkpoint, and no older one to go on from.
        KeyboardInterrupt: Ctrl-C; the step that it was at is saved. SIGTERM does what it would have done after that.
    """
    found = checkpoints.load()
    begin = done = found.step if found else 0
    history, losses = (list(found.history), list(found.losses)) if found else ([], [])
    first_loss, seconds_before = (found.first_loss, found.seconds) if found else (math.nan, 0.0)
    waited_before, stalled_before = (found.data_wait_s, found.checkpoint_stall_s) if found else (0.0, 0.0)
    tokens_before = found.tokens if found else TokenCounts()
    tokens = tokens_since_mark = TokenCounts()
    trained = list(parameters.values())
    started = reported = marked = time.monotonic()
    samples, samples_since_mark, waited_at_mark, stalled_at_mark = 0, 0, 0.0, 0.0
    every = max(1, steps // HISTORY_POINTS)
    busy = [0.0] * processes.size
    peak = peak_of(processes, stage.precision)

    def state() -> RunningState:
        return RunningState(
            step=done,
            seconds=seconds_before + time.monotonic() - started,
            data_wait_s=waited_before + stream.waited_s,
            checkpoint_stall_s=stalled_before + checkpoints.stall_s,
            tokens=tokens_before + tokens,
            first_loss=first_loss,
            losses=tuple(losses),
            history=tuple(history),
            notes=tuple(checkpoints.notes),
        )

    stream.go_to(begin)
    with noting_signals() as interruption, closing(checkpoints):
        for step in range(begin, steps):
            torch.manual_seed(_step_seed(seed, step, processes.rank))
            rate = set_learning_rates(optimizer, schedule_factor(stage.schedule, step=step, steps=steps))
            waited_s = stream.waited_s
            with _naming_what_filled_memory(stream, stage, step):
                share, total = processes.share(stream.next_step, count=lambda share: share.num_supervised)
                busy_s = stream.waited_s - waited_s
                began = time.monotonic()
                step_loss, num_tokens, num_places = torch.zeros(1, device=processes.device), 0, 0
                num_flops = 0.0
                parts_losses: list[Tensor] = []
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
                    parts_losses.append(loss.detach())
                    if batch is not None:
                        num_tokens, num_places = num_tokens + batch.num_tokens, num_places + batch.num_places
                        num_flops += flops.of(batch)
                    del batch, loss
                step_loss = step_loss.cpu()  # so that a GPU is done
                busy_s += time.monotonic() - began
                processes.sum_gradients(trained)
                norm = clip_gradients(trained, stage.max_grad_norm, processes)
            told = [float(num_tokens), float(num_places), num_flops, float(interruption.number is not None)]
            told += checkpoints.flags()
            for own in (busy_s, float(peak_memory(processes.device))):
                told += [own if rank == processes.rank else 0.0 for rank in range(processes.size)]
            summed = processes.sum(torch.cat([step_loss, torch.tensor(told)]))
            loss_value, real, places, all_flops, stop, *flags = summed.tolist()
            flags, by_rank = flags[: -2 * processes.size], flags[-2 * processes.size :]
            seconds_by_rank, memory_gb = by_rank[: processes.size], max(by_rank[processes.size :]) / 1e9
            busy = [_KEPT_OF_BUSY * old + new for old, new in zip(busy, seconds_by_rank, strict=True)]
            if not (math.isfinite(loss_value) and math.isfinite(norm)):
                raise RecipeError(
                    f"loss {loss_value} and gradient norm {norm} at step {step + 1}, "
                    f"with {_not_finite(stream, parts_losses, processes)}",
                    "finite numbers are needed",
                    "Lower the learning rates or raise schedule.warmup_ratio; where the same records are named again, "
                    "look at them and leave them out.",
                )
            with _naming_what_filled_memory(stream, stage, step):
                optimizer.step()
                optimizer.zero_grad()

            losses.append(loss_value)
            if step == 0:
                first_loss = loss_value
            num_new = min(stage.batch_size, num_samples - step * stage.batch_size)
            samples += num_new
            samples_since_mark += num_new
            new = TokenCounts(real=round(real), places=round(places), supervised=round(total), flops=all_flops)
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
                checkpoint_stall=checkpoints.stall_s / (now - started),
                tokens_per_s=tokens.real / (now - started),
                padding=tokens.padding,
                supervised=tokens.supervised_share,
                mfu=tokens.flops / peak / (now - started),
                peak_memory_gb=memory_gb,
            )
            if done % every == 0 or last:
                since = now - marked
                means = {
                    "loss": sum(losses) / len(losses),
                    "samples_per_s": samples_since_mark / since,
                    "data_wait": (stream.waited_s - waited_at_mark) / since,
                    "checkpoint_stall": (checkpoints.stall_s - stalled_at_mark) / since,
                    "tokens_per_s": tokens_since_mark.real / since,
                    "padding": tokens_since_mark.padding,
                    "supervised": tokens_since_mark.supervised_share,
                    "mfu": tokens_since_mark.flops / peak / since,
                }
                history.append(point.model_copy(update=means))
                losses, samples_since_mark, marked, tokens_since_mark = [], 0, now, TokenCounts()
                waited_at_mark, stalled_at_mark = stream.waited_s, checkpoints.stall_s
            if processes.is_main and (now - reported >= PROGRESS_EVERY_S or last):
                report(done, point, seconds_before + now - started, slow_process(busy))
                reported = now
            if stop:
                checkpoints.save_now(state())
                raise ProcessLostError(
                    f"training was told to end, at step {done:,} of {steps:,}",
                    "processes that train to the end",
                    "The same command goes on from here.",
                )
            if not last:
                checkpoints.follow(flags, state)
    return state(), begin


def slow_process(seconds: Sequence[float]) -> str:
    """Which process takes far longer than the others, in words; empty where none does.

    Args:
        seconds: That each was busy in the same steps, by rank.
    """
    if len(seconds) < 2:
        return ""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(own for rank, own in enumerate(seconds) if rank != slowest)
    if seconds[slowest] <= FAR_SLOWER * others:
        return ""
    times = seconds[slowest] / max(others, 1e-9)
    return f"process {slowest + 1} of {len(seconds)} takes {times:.1f} times as long as the others"


def _not_finite(stream: BatchStream, losses: Sequence[Tensor], processes: Processes) -> str:
    """The samples of the micro-batches whose loss is no finite number; of all, where it is the gradients alone."""
    parts = [part for part, loss in zip(stream.positions, losses, strict=False) if not bool(torch.isfinite(loss).all())]
    told = processes.tell(stream.name([place for part in parts for place in part]))
    if not any(told):
        told = processes.tell(stream.name([place for part in stream.positions for place in part]))
    return ", ".join(filter(None, told))


@contextmanager
def _naming_what_filled_memory(stream: BatchStream, stage: StageSpec, step: int) -> Iterator[None]:
    """Say at what memory ran out, and which fields of the recipe take less.

    Raises:
        RecipeError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        first = str(error).partition("\n")[0] or type(error).__name__
        raise RecipeError(
            f"out of memory at step {step + 1} ({first}); its longest samples here are {stream.longest()}",
            "memory for a micro-batch of them, beside weights, gradients and optimizer",
            f"In this stage, {_what_takes_less(stage)}.",
        ) from error


def _what_takes_less(stage: StageSpec) -> str:
    smaller = f"lower micro_batch_size ({stage.micro_batch_size or f'not set: all of {stage.batch_size}'})"
    if stage.packing is not None:
        smaller = f"lower packing.tokens ({stage.packing.tokens})"
    changes = [
        smaller,
        *(["set checkpoint_language_model"] if not stage.checkpoint_language_model else []),
        *(["set checkpoint_encoders"] if not stage.checkpoint_encoders else []),
        *(["set precision to bf16"] if stage.precision != "bf16" else []),
        *(["train adapters (lora)"] if stage.lora is None and "language_model" in stage.train else []),
    ]
    return ", or ".join([", ".join(changes[:-1]), changes[-1]] if len(changes) > 1 else changes)


def loss_function(
    model: ManyEyesForConditionalGeneration,
    stage: StageSpec,
    *,
    processes: Processes,
    sharded: bool,
    stored: Stored | None = None,
    flops: ModelFlops | None = None,
) -> WholeLoss | ShardedLoss:
    """What ``train`` computes.

    Args:
        model: Where it is sharded, its parameters become parts of tensors, in place; else it is moved to the device.
            In bf16, what is frozen of it is rounded until ``restore_frozen``.
        stage: Its precision.
        processes: Who takes part.
        sharded: Whether each process keeps a part alone.
        stored: What of a sharded model each process reads its part of.
        flops: Counts what images take.
    """

    def compute(batch: Batch) -> Tensor:
        return batch_loss(model, batch, device=processes.device, flops=flops)

    if sharded:
        return ShardedLoss(model, compute, processes=processes, precision=stage.precision, stored=stored or {})
    return WholeLoss(model, compute, processes=processes, precision=stage.precision)


def batch_loss(
    model: ManyEyesForConditionalGeneration, batch: Batch, *, device: torch.device, flops: ModelFlops | None = None
) -> Tensor:
    """Loss summed over the supervised tokens of a batch.

    Images run through the encoders once. Independent samples share the prefix that ends with their images; chained
    ones run as whole rows; packed ones as one row, whatever they are.
    """
    visual_tokens = None
    if batch.pixel_values or batch.features:
        with nullcontext() if flops is None else flops.seeing(batch):
            visual_tokens = model.encode_images(
                {name: pixels.to(device, non_blocking=True) for name, pixels in batch.pixel_values.items()},
                features=batch.features,
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
