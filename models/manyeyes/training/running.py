"""Running checkpoints: what a killed stage needs to go on to the very same weights; and signals that end it in order.

A stage's working folder holds ``lock`` (owned by the process that trains), ``step-<n>`` folders (the last two: the
newest, and one to fall back on where that is damaged) and, once the stage is complete, ``done`` with its result. A
``step-<n>`` has its name when it is whole::

    rank-00000-00.safetensors   parts of tensors, as process 0 wrote them; further files, further processes
    rank-00000.json             which part of which tensor is in which of its files, and their sha256
    manifest.json               where training was, what determines its result, and the sha256 of each process's list

A step waits only while its process copies its parts, which a thread then writes. Processes tell each other by numbers
that travel with every step's sum: that a checkpoint is due, that a part is written, that it could not be.

``torch.distributed.checkpoint`` was considered: it has no checksums, so it finds a damaged file while it overwrites the
parameters or not at all; what it writes has its final name from the start; and its metadata is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from manyeyes.errors import CheckpointError, LockedError, StorageError
from manyeyes.storage import file_lock, hash_file, storage_errors, sync, write_file
from manyeyes.strict import StrictModel
from manyeyes.training.processes import Processes

KEPT = 2
# However often the recipe wants them: the next one is put off until the last has cost no more of the time than this.
MOST_STALL = 0.05
_MANIFEST = "manifest.json"
_PARAMETER, _MOMENTS = "parameter", ("exp_avg", "exp_avg_sq")
_FILE_BYTES = 2**30
_CHUNK_BYTES = 2**24
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


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
    checkpoint_stall: float | None = Field(
        default=None, description="Share of that time in which it waited for a running checkpoint."
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
    mfu: float | None = Field(default=None, description="Model FLOPs utilisation since the point before.")
    peak_memory_gb: float | None = Field(
        default=None, description="Memory at its highest so far, in the process that takes most, 1e9 bytes."
    )


class TokenCounts(StrictModel):
    """What went through the language model."""

    real: int = Field(default=0, description="Tokens, visual ones included.")
    places: int = Field(default=0, description="Those and padding.")
    supervised: int = Field(default=0, description="Tokens that the loss counts.")
    flops: float = Field(default=0.0, description="Operations that the model needs for them and for their images.")

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Both together."""
        names = TokenCounts.model_fields
        return TokenCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def padding(self) -> float:
        """Share of padding among the places."""
        return 1 - self.real / max(1, self.places)

    @property
    def supervised_share(self) -> float:
        """Share of supervised tokens among the real ones."""
        return self.supervised / max(1, self.real)


class RunningState(StrictModel):
    """Where a stage is, beside its parameters and moments."""

    step: int = Field(description="Optimizer steps done.")
    seconds: float = Field(description="Seconds trained so far, over all attempts.")
    data_wait_s: float = Field(description="Seconds of those in which it waited for data.")
    checkpoint_stall_s: float = Field(description="Seconds of those in which it waited for running checkpoints.")
    tokens: TokenCounts = Field(description="What was trained on so far, over all attempts.")
    first_loss: float = Field(description="Loss of the first step, nats a supervised token.")
    losses: tuple[float, ...] = Field(description="Losses since the last point of the history.")
    history: tuple[HistoryPoint, ...] = Field(description="Points so far.")
    notes: tuple[str, ...] = Field(description="What went wrong with running checkpoints so far.")


class _Part(StrictModel):
    name: str = Field(description="Of the tensor: what of the parameter it is, a slash, the parameter's name.")
    file: str = Field(description="Where it is, under the same name.")
    offset: tuple[int, ...] = Field(description="Where the part begins in the tensor.")
    size: tuple[int, ...] = Field(description="Shape of the part.")
    shape: tuple[int, ...] = Field(description="Shape of the tensor.")


class _RankParts(StrictModel):
    """``rank-<n>.json``."""

    parts: tuple[_Part, ...] = Field(description="What this process wrote.")
    sha256: dict[str, str] = Field(description="Of its files, hexadecimal.")


class _Manifest(StrictModel):
    """``manifest.json`` of a running checkpoint."""

    state: RunningState = Field(description="Where the stage was.")
    facts: dict[str, Any] = Field(description="What determines the stage's result.")
    ranks: tuple[str, ...] = Field(description="sha256 of each process's list, hexadecimal.")
    sha256: str = Field(default="", description="Of this with nothing here, as JSON without spaces, hexadecimal.")

    def digest(self) -> str:
        return hashlib.sha256(self.model_copy(update={"sha256": ""}).model_dump_json().encode()).hexdigest()


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


def drop_running(folder: Path) -> None:
    """Remove the running checkpoints of a stage that is complete."""
    for checkpoint in (*_checkpoints(folder), *folder.glob(".step-*")):
        shutil.rmtree(checkpoint)


class RunningCheckpoints:
    """The running checkpoints of a stage, as one of its processes takes part in them.

    All of its processes call its methods at the same steps.

    Args:
        folder: The stage's working folder, which all processes see.
        facts: What determines the stage's result; a checkpoint of other facts is refused.
        parameters: Those that train, by name, whole or sharded as ``DTensor``; the others come from the inputs.
        optimizer: AdamW over them.
        processes: Who takes part.
        every_s: Seconds between two checkpoints.

    Attributes:
        stall_s: Seconds in which training waited for them in this attempt.
        notes: What went wrong, and what was done about it; earlier attempts included. The first process has them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        facts: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        every_s: float,
    ) -> None:
        self._folder = folder
        self._facts = json.loads(json.dumps(dict(facts)))
        self._parameters = parameters
        self._optimizer = optimizer
        self._processes = processes
        self._every_s = every_s
        self._saved = time.monotonic()
        self._last_stall_s = 0.0
        # What several processes are writing; it gets its name once all have.
        self._writing: RunningState | None = None
        self._job: Future[None] | None = None
        self._saved_step: int | None = None
        self._buffers: dict[str, Tensor] = {}
        self._abandoned = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="running-checkpoint")
        self.stall_s = 0.0
        self.notes: list[str] = []

    # --- going on ----------------------------------------------------------------------------------------------

    def load(self) -> RunningState | None:
        """Go back to the newest running checkpoint that is whole; parameters and moments are overwritten.

        Any number of processes may have written it.

        Returns:
            Where to go on; None when there is nothing to go on from.

        Raises:
            CheckpointError: It is of another stage, recipe, data or code.
        """
        found = [path.name for path in reversed(_checkpoints(self._folder))] if self._processes.is_main else []
        names: list[str] = self._processes.tell(found)[0]
        damaged: list[str] = []
        for name in names:
            checkpoint = self._folder / name
            problem, manifest, lists = self._examine(checkpoint)
            problems = [each for each in self._processes.tell(problem) if each]
            if problems:
                damaged.append(f"{checkpoint} is damaged ({problems[0]})")
                continue
            assert manifest is not None
            _refuse_others(checkpoint, manifest.facts, self._facts)
            self._read(checkpoint, lists, manifest.state.step)
            self.notes = list(manifest.state.notes)
            self._saved_step = manifest.state.step
            self._tell_damaged(damaged, f"training goes on from step {manifest.state.step}, the one before")
            return manifest.state
        self._tell_damaged(damaged, "training begins anew")
        return None

    def _examine(self, checkpoint: Path) -> tuple[str, _Manifest | None, list[_RankParts]]:
        """What is wrong with a checkpoint; of its files, this process looks at its share."""
        try:
            manifest = _Manifest.model_validate_json((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
            if manifest.digest() != manifest.sha256:
                return f"{_MANIFEST} is not what was written", None, []
            lists: list[_RankParts] = []
            for rank, expected in enumerate(manifest.ranks):
                text = (checkpoint / _list_name(rank)).read_bytes()
                if hashlib.sha256(text).hexdigest() != expected:
                    return f"{_list_name(rank)} is not what was written", None, []
                lists.append(_RankParts.model_validate_json(text))
            files = [pair for each in lists for pair in each.sha256.items()]
            for name, expected in files[self._processes.rank :: self._processes.size]:
                if hash_file(checkpoint / name) != expected:
                    return f"{name} is not what was written", None, []
        except OSError as error:
            return f"{Path(error.filename or checkpoint).name}: {error.strerror}", None, []
        except ValidationError as error:
            return f"a list of it is not what was written, {error.error_count()} errors", None, []
        return "", manifest, lists

    def _read(self, checkpoint: Path, lists: Sequence[_RankParts], step: int) -> None:
        for parameter in self._parameters.values():
            self._optimizer.state[parameter] = {
                # AdamW counts steps per parameter, in a float32 tensor.
                "step": torch.tensor(float(step), device=parameter.device),
                **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in _MOMENTS},
            }
        wanted = {name: _own_part(tensor) for name, tensor in self._tensors()}
        found = dict.fromkeys(wanted, 0)
        parts: dict[str, list[_Part]] = {}
        for part in (part for each in lists for part in each.parts):
            parts.setdefault(part.file, []).append(part)
        for file, inside in parts.items():
            with safe_open(checkpoint / file, framework="pt") as opened, torch.no_grad():
                for part in inside:
                    own = wanted.get(part.name)
                    if own is None or own.shape != part.shape:
                        continue
                    common = _common(own, part)
                    if common is None:
                        continue
                    there, here = common
                    whole = all(place == slice(0, size) for place, size in zip(there, part.size, strict=True))
                    values = opened.get_tensor(part.name) if whole else opened.get_slice(part.name)[there]
                    own.values[here].copy_(values)
                    found[part.name] += values.numel()
        short = [name for name, own in wanted.items() if found[name] < own.values.numel()]
        if short:
            # Its checksums are right, and so are the facts: the code that wrote it is another one.
            raise CheckpointError(
                f"{checkpoint} lacks {short[0]}" + (f" and {len(short) - 1} more" if len(short) > 1 else ""),
                "every parameter that trains, with its moments",
                f"Remove {checkpoint} to train from the beginning.",
            )

    def _tell_damaged(self, damaged: Sequence[str], then: str) -> None:
        if damaged and self._processes.is_main:
            self._note(f"Running checkpoint {', and '.join(damaged)}: {then}.")
            for text in damaged:
                shutil.rmtree(text.partition(" is damaged")[0], ignore_errors=True)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        _say(text)

    # --- saving ------------------------------------------------------------------------------------------------

    def flags(self) -> list[float]:
        """What goes along with a step's sum: a checkpoint is due, this process's part is written, or it failed."""
        ended = self._job is not None and self._job.done()
        failed = ended and self._job is not None and self._job.exception() is not None
        if ended and not failed and self._writing is None:  # it has its name
            self._job, ended = None, False
        pause = max(self._every_s, self._last_stall_s / MOST_STALL)
        due = self._processes.is_main and self._job is None and time.monotonic() - self._saved >= pause
        return [float(due), float(ended and not failed), float(failed)]

    def follow(self, sums: Sequence[float], state: Callable[[], RunningState]) -> None:
        """Do what the flags of all processes say.

        Args:
            sums: Of ``flags``, over all processes.
            state: Where training is, asked for where a checkpoint begins.

        Raises:
            StorageError: It cannot be written, and no older one is there to go on from.
        """
        due, written, failed = sums
        if failed:
            self._give_up()
        elif self._writing is not None and round(written) == self._processes.size:
            self._name_it()
        if due:
            self._begin(state())

    def save_now(self, state: RunningState) -> None:
        """Save this very step, and come back when it is saved, or is known not to be."""
        started = time.monotonic()
        self._settle()
        self._begin(state)
        self._settle()
        self.stall_s += time.monotonic() - started
        if self._processes.is_main and self._saved_step == state.step:
            _say(f"Step {state.step:,} is saved in {self._folder}: the same command goes on from there.")

    def close(self) -> None:
        """End what is being written."""
        self._abandoned.set()
        self._thread.shutdown()

    def _begin(self, state: RunningState) -> None:
        started = time.monotonic()
        parts = self._copy_own()
        if self._processes.size == 1:
            self._job = self._thread.submit(self._write_alone, state, parts)
        else:
            self._writing = state
            self._job = self._thread.submit(self._write, self._half(state), parts)
        self._saved = time.monotonic()
        self._last_stall_s = self._saved - started
        self.stall_s += self._last_stall_s

    def _copy_own(self) -> list[tuple[str, _Own]]:
        """This process's parts, in memory of the host that is kept for the next time."""
        tensors = [(name, tensor, _own_part(tensor)) for name, tensor in self._tensors()]
        replicated = [(name, own.values.nbytes) for name, tensor, own in tensors if not isinstance(tensor, DTensor)]
        writers = _share_out(replicated, self._processes.size)
        made = []
        for name, _, own in tensors:
            if (
                writers.get(name, self._processes.rank) != self._processes.rank
                or not own.first
                or not own.values.numel()
            ):
                continue
            if name not in self._buffers:
                buffer = torch.empty(own.values.shape, dtype=own.values.dtype)
                self._buffers[name] = buffer.pin_memory() if self._processes.device.type == "cuda" else buffer
            self._buffers[name].copy_(own.values)
            made.append((name, _Own(self._buffers[name], own.offset, own.shape)))
        return made

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield f"{_PARAMETER}/{name}", parameter.detach()
            for moment in _MOMENTS:
                yield f"{moment}/{name}", self._optimizer.state[parameter][moment]

    def _write_alone(self, state: RunningState, parts: Sequence[tuple[str, _Own]]) -> None:
        self._write(self._half(state), parts)
        self._finish(self._half(state), state)

    def _write(self, half: Path, parts: Sequence[tuple[str, _Own]]) -> None:
        """In the thread: this process's files and their list."""
        rank = self._processes.rank
        with storage_errors(half):
            half.mkdir(exist_ok=True)
            if self._processes.is_main:
                _check_space(half, 2 * sum(12 * math.prod(each.shape) for each in self._parameters.values()))
            listed, sha256 = [], {}
            for number, inside in enumerate(_in_files(parts)):
                file = f"rank-{rank:05d}-{number:02d}.safetensors"
                sha256[file] = _write_safetensors(
                    half / file, {name: own.values for name, own in inside}, abandoned=self._abandoned.is_set
                )
                listed += [
                    _Part(name=name, file=file, offset=own.offset, size=tuple(own.values.shape), shape=own.shape)
                    for name, own in inside
                ]
            write_file(half / _list_name(rank), _RankParts(parts=tuple(listed), sha256=sha256).model_dump_json())
            sync(half)

    def _name_it(self) -> None:
        """Every part is written: the first process makes it a checkpoint."""
        state, self._writing, self._job = self._writing, None, None
        assert state is not None
        if self._processes.is_main:
            self._job = self._thread.submit(self._finish, self._half(state), state)

    def _finish(self, half: Path, state: RunningState) -> None:
        """In the thread of the first process."""
        with storage_errors(half):
            ranks = [hash_file(half / _list_name(rank)) for rank in range(self._processes.size)]
            manifest = _Manifest(state=state, facts=self._facts, ranks=tuple(ranks))
            manifest = manifest.model_copy(update={"sha256": manifest.digest()})
            write_file(half / _MANIFEST, manifest.model_dump_json(indent=2))
            sync(half)
            named = self._folder / half.name.removeprefix(".")
            if named.exists():  # one that an earlier attempt wrote, and that this one did not begin at
                shutil.rmtree(named)
            half.replace(named)
            sync(self._folder)
            self._saved_step = state.step
            for old in _checkpoints(self._folder)[:-KEPT]:
                shutil.rmtree(old)

    def _settle(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            _ended(self._job)
            self.follow([0.0, *self._processes.sum(torch.tensor(self.flags()[1:])).tolist()], _no_state)
        _ended(self._job)
        failed = self._processes.sum(torch.tensor(self.flags()[2:])).item()
        if failed:
            self._give_up()

    def _give_up(self) -> None:
        """Something could not be written: drop this checkpoint in all processes."""
        self._abandoned.set()
        error = None if self._job is None else self._job.exception()
        if error is not None and not isinstance(error, StorageError | _AbandonedError):
            raise error
        own = [error.found, error.needed, error.do] if isinstance(error, StorageError) else None
        told = next(each for each in self._processes.tell(own) if each)
        self._abandoned.clear()
        self._writing, self._job, self._saved = None, None, time.monotonic()
        if not self._processes.is_main:
            return
        for half in self._folder.glob(".step-*"):
            shutil.rmtree(half, ignore_errors=True)
        if self._saved_step is None:
            raise error if isinstance(error, StorageError) else StorageError(*told)
        self._note(f"A running checkpoint could not be written ({told[0]}): the one before stays, training goes on.")

    def _half(self, state: RunningState) -> Path:
        return self._folder / f".step-{state.step:08d}"


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # whoever read it may be gone, too
        sys.stderr.write(f"{text}\n")


def _no_state() -> RunningState:
    raise AssertionError("nothing begins here")


def _ended(job: Future[None] | None) -> None:
    if job is not None:
        job.exception()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _list_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder.parent} has {free / 1e6:.0f} MB free",
            f"{needed / 1e6:.0f} MB are needed for a running checkpoint and the result",
            "Free some space or set MANYEYES_WORKDIR to another disk, then run the same command again.",
        )


# --- parts of tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Own:
    """This process's part of a tensor.

    Attributes:
        values: The part itself.
        offset: Where it begins in the tensor.
        shape: Of the tensor.
        first: Whether no process before this one has the same part.
    """

    values: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    first: bool = True


def _own_part(tensor: Tensor) -> _Own:
    if not isinstance(tensor, DTensor):
        return _Own(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    places = tensor.device_mesh.get_coordinate() or ()
    first = all(place == 0 for place, how in zip(places, tensor.placements, strict=True) if how.is_replicate())
    return _Own(tensor.to_local(), tuple(offset), tuple(tensor.shape), first)


def _share_out(sizes: Sequence[tuple[str, int]], ranks: int) -> dict[str, int]:
    """Who writes what all have, so that each writes about as much; the same in all processes."""
    loads = [0] * ranks
    writers = {}
    for name, size in sizes:
        writers[name] = min(range(ranks), key=loads.__getitem__)
        loads[writers[name]] += size
    return writers


def _common(own: _Own, part: _Part) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What this process's part and a written one have in common: where it is there, and where here."""
    there, here = [], []
    for begin, size, other, other_size in zip(own.offset, own.values.shape, part.offset, part.size, strict=True):
        start, stop = max(begin, other), min(begin + size, other + other_size)
        if start >= stop:
            return None
        there.append(slice(start - other, stop - other))
        here.append(slice(start - begin, stop - begin))
    return tuple(there), tuple(here)


# --- files ---------------------------------------------------------------------------------------------------------


class _AbandonedError(Exception):
    """Nobody wants any more what is being written."""


def _in_files(parts: Sequence[tuple[str, _Own]]) -> Iterator[list[tuple[str, _Own]]]:
    inside: list[tuple[str, _Own]] = []
    size = 0
    for name, own in parts:
        if inside and size + own.values.nbytes > _FILE_BYTES:
            yield inside
            inside, size = [], 0
        inside.append((name, own))
        size += own.values.nbytes
    if inside:
        yield inside


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, abandoned: Callable[[], bool]) -> str:
    """Write and flush a file piece by piece; its sha256.

    safetensors' own writer holds Python's lock while it writes, and so training up.
    """
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [end, end := end + tensor.nbytes]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (memoryview(struct.pack("<Q", len(text)) + text), *map(_bytes_of, tensors.values())):
            for start in range(0, len(piece), _CHUNK_BYTES):
                if abandoned():
                    raise _AbandonedError
                chunk = piece[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# --- what a checkpoint is of ---------------------------------------------------------------------------------------


def _refuse_others(checkpoint: Path, found: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other facts than the stage's, and name those that differ.

    Raises:
        CheckpointError: It is of another stage.
    """
    theirs, ours = _flat(found), _flat(needed)
    differing = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if differing:
        raise CheckpointError(
            f"{checkpoint} is of another training: "
            + "; ".join(f"{name} is {theirs.get(name, 'not set')}" for name in differing),
            "; ".join(f"{name} {ours.get(name, 'not set')}" for name in differing) + " needed",
            f"Remove {checkpoint} to train from the beginning, or go on with what it was trained with.",
        )


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {
            key: text for inner in value for key, text in _flat(value[inner], f"{name}.{inner}".lstrip(".")).items()
        }
    if isinstance(value, list) and value:
        return {key: text for place, own in enumerate(value) for key, text in _flat(own, f"{name}[{place}]").items()}
    return {name: json.dumps(value)}


# --- signals -------------------------------------------------------------------------------------------------------


@dataclass
class Interruption:
    """The signal that came.

    Attributes:
        number: SIGTERM or SIGINT; None as long as none came.
    """

    number: int | None = None


@contextmanager
def noting_signals(then: Callable[[], None] | None = None) -> Iterator[Interruption]:
    """Note SIGTERM and Ctrl-C in place of ending by them; they take effect when the block is left.

    A second Ctrl-C ends at once. In a thread, where Python handles no signals, nothing is noted.

    Args:
        then: Called when the first one comes.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if interruption.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        first, interruption.number = interruption.number is None, number
        if first and then is not None:
            then()

    heeded = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if interruption.number is not None:
            signal.raise_signal(interruption.number)
