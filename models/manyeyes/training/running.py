"""Running checkpoints: what a killed stage needs to go on to the very same weights.

A stage's working folder holds ``lock`` (owned by the process that trains), ``step-<n>`` folders (the last two) and,
once the stage is complete, ``done`` with its result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from manyeyes.errors import LockedError, StorageError
from manyeyes.storage import file_lock, new_folder, storage_errors
from manyeyes.strict import StrictModel

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


class RunningState(StrictModel):
    """``progress.json`` of a running checkpoint."""

    step: int = Field(description="Optimizer steps done.")
    seconds: float = Field(description="Seconds trained so far, over all attempts.")
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
    first_loss: float,
    history: list[HistoryPoint],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a running checkpoint, then drop all but the last two.

    Args:
        folder: The stage's working folder.
        step: Optimizer steps done.
        seconds: Seconds trained so far.
        first_loss: Loss of the first step.
        history: Points so far.
        parameters: Those that train, by name; the others come from the stage's inputs.
        optimizer: AdamW over them.

    Raises:
        StorageError: No space. What was there before is untouched.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
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
                parameter.copy_(tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                # AdamW counts steps per parameter, in a float32 tensor.
                "step": torch.tensor(float(state.step), device=parameter.device),
                **{moment: tensors[f"{moment}/{name}"].to(parameter.device) for moment in _MOMENTS},
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
