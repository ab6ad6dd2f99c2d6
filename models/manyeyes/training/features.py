"""Features of encoders that do not train: made once an image, kept in files, read again.

Where a stage says ``keep_features``, and where such a trial is scored, a frozen encoder sees each image by itself (on
a CPU; a GPU computes those of a batch together). What it makes of one then depends on nothing else: not on the batch,
which some encoders' last bits depend on, nor on what is kept. So whether a feature is read or made, and whoever made
it, the stage's result is the same, bit for bit; what is kept is decided anew by each process from sizes and times.

Files lie in ``<work folder>/features/<key>``, where the key stands for the encoder's weights, the pixels that it is
given, precision and device. Each holds features of many images under the sha256 of the image's file, with a checksum
of each. Several processes write and read at the same time: a file has its name only when it is whole, and nobody
changes it. One that is damaged is deleted, and its features are made again. What was used longest ago is deleted where
``MANYEYES_FEATURES_GB`` is reached.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manyeyes.encoders import Encoder
from manyeyes.errors import PipelineError, StorageError
from manyeyes.fusion.fusion import InjectingFusion
from manyeyes.model import ManyEyesForConditionalGeneration
from manyeyes.processor import SHARED, ManyEyesProcessor
from manyeyes.storage import file_lock, sync, write_file
from manyeyes.strict import StrictModel

LIMIT = "MANYEYES_FEATURES_GB"
DEFAULT_GB = 20.0
_GIGABYTE = 2**30
_SUFFIX = ".safetensors"
_SUMS = "crc32"
# What is written at a time: large, so that a million images are not a million files; soon, so that other processes
# need not make what was made, and a killed one loses little.
_FILE_BYTES = 64 * 2**20
_FILE_S = 5.0
_LOOK_AGAIN_S = 1.0
_TRIAL_BYTES = 4 * 2**20
# Writing what this process does not read again is worth a tenth of what making it took: for runs to come.
_FOR_LATER = 0.1
_DEAD_S = 3600.0
_MEASURED: dict[str, tuple[int, float]] = {}  # by key of the features: a trial is planned for training and for scoring


class FeatureWarning(UserWarning):
    """Features cannot be read or kept; they are made instead."""


class EncoderFeatures(StrictModel):
    """What became of an encoder's features in a stage."""

    encoder: str = Field(description="Its name in the recipe.")
    kept: bool = Field(description="Whether features are kept and read; else they are made each time.")
    why: str = Field(description="What was decided, from which figures.")
    made: int = Field(default=0, description="Times that the encoder ran on an image in the last attempt.")
    read: int = Field(default=0, description="Times that an image's features were there already.")


@dataclass(frozen=True)
class FrozenImage:
    """An image of a batch, for the encoders that do not train.

    Attributes:
        digest: sha256 of its file.
        found: Kept features ``[tiles, C, h, w]`` by encoder.
        pixels: ``[tiles, 3, size, size]`` for the encoders that must run, by the name of the pixels.
    """

    digest: str
    found: dict[str, Tensor]
    pixels: dict[str, Tensor]


# --- files ---------------------------------------------------------------------------------------------------------


def features_limit() -> int:
    """Bytes that kept features may take, from ``MANYEYES_FEATURES_GB``; 0 where none are kept.

    A pod without a volume for ``MANYEYES_WORKDIR`` keeps none by default: they would fill its node and go with it.

    Raises:
        PipelineError: The variable is no number of at least 0.
    """
    given = os.environ.get(LIMIT)
    if not given:
        lasts = "KUBERNETES_SERVICE_HOST" not in os.environ or "MANYEYES_WORKDIR" in os.environ
        return int(DEFAULT_GB * _GIGABYTE) if lasts else 0
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise PipelineError(f'{LIMIT} is "{given}"', "a number of gigabytes of at least 0", "Correct or unset it.")
    return int(limit * _GIGABYTE)


class FeatureFiles:
    """Features of one encoder, by image.

    Args:
        folder: Of all encoders.
        key: Of this one.
        most_bytes: Of all encoders together.
    """

    def __init__(self, folder: Path, key: str, *, most_bytes: int) -> None:
        self._folder = folder
        self._key = key
        self._own = folder / key[:32]
        self._most_bytes = most_bytes
        self._open: dict[Path, _File] = {}
        self._index: dict[str, _File] = {}
        self._made: dict[str, Tensor] = {}
        self._made_bytes = 0
        self._looked = -math.inf
        self._written = time.monotonic()
        self._closed = False
        self._told: set[str] = set()

    def __reduce__(self) -> tuple[object, ...]:
        """Another process opens the files itself; what is not written yet it does not see."""
        return _open_files, (self._folder, self._key, self._most_bytes)

    def __len__(self) -> int:
        """How many images' features there are."""
        self._look()
        return len(self._index) + len(self._made)

    def find(self, digest: str) -> Tensor | None:
        """An image's features ``[tiles, C, h, w]``; None where they must be made. Not to be written into."""
        if digest in self._made:
            return self._made[digest]
        if digest not in self._index:
            self._look()
        file = self._index.get(digest)
        if file is None:
            return None
        try:
            return file.read(digest)
        except (SafetensorError, ValueError, OSError) as error:
            self._say(f"{file.path} is damaged ({error}): it is deleted, and its features are made again")
            self._forget(file)
            with suppress(OSError):
                file.path.unlink(missing_ok=True)
            return None

    def keep(self, digest: str, features: Tensor) -> None:
        """Keep an image's features; they are written with others, ``write`` at the latest."""
        if self._closed:
            return
        own = features.detach().to("cpu").contiguous().clone()
        self._made[digest] = own
        self._made_bytes += own.nbytes
        if self._made_bytes >= _FILE_BYTES or time.monotonic() - self._written >= _FILE_S:
            self.write()

    def write(self) -> None:
        """Write what was kept since the last time, but for what others have written meanwhile."""
        self._written = time.monotonic()
        self._looked = -math.inf
        self._look()
        new = {digest: features for digest, features in self._made.items() if digest not in self._index}
        if new:
            sums = {digest: _checksum(features) for digest, features in new.items()}
            data = safetensors.torch.save(new, metadata={_SUMS: json.dumps(sums)})
            path = self._own / f"{uuid.uuid4().hex}{_SUFFIX}"
            try:
                _make_room(self._folder, len(data), most_bytes=self._most_bytes)
                # Not flushed: what a power failure cuts is found damaged.
                write_file(path, data, flush=False)
            except (OSError, StorageError) as error:
                self._closed = True
                reason = error.found if isinstance(error, StorageError) else str(error)
                self._say(f"no more features are kept ({reason})")
            else:
                self._looked = -math.inf
                self._look()
        self._made, self._made_bytes = {}, 0

    def _look(self) -> None:
        """Open what is new; at most once a second, since a stage asks for thousands that are not there."""
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN_S:
            return
        self._looked = now
        try:
            there = {path for path in self._own.iterdir() if path.suffix == _SUFFIX and path.name[0] != "."}
        except OSError:
            there = set()
        for path in self._open.keys() - there:
            self._forget(self._open[path])
        for path in sorted(there - self._open.keys()):
            try:
                file = _File(path)
                # Used now: that of it which was used longest ago goes first.
                with suppress(OSError):
                    os.utime(path)
            except FileNotFoundError:
                continue
            except (SafetensorError, ValueError, OSError) as error:
                self._say(f"{path} is damaged ({error}): it is deleted, and its features are made again")
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                continue
            self._open[path] = file
            for digest in file.sums:
                self._index.setdefault(digest, file)

    def _forget(self, file: _File) -> None:
        self._open.pop(file.path, None)
        self._index = {digest: own for digest, own in self._index.items() if own is not file}

    def _say(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(what, FeatureWarning, stacklevel=2)


def _open_files(folder: Path, key: str, most_bytes: int) -> FeatureFiles:
    return FeatureFiles(folder, key, most_bytes=most_bytes)


class _File:
    """One file of features; what is read is a view of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = safe_open(path, framework="pt")
        self.sums: dict[str, int] = json.loads((self._content.metadata() or {}).get(_SUMS, "{}"))
        if set(self.sums) != set(self._content.keys()):
            raise ValueError("its checksums are of other images")
        self._checked: set[str] = set()

    def read(self, digest: str) -> Tensor:
        features: Tensor = self._content.get_tensor(digest)
        if digest not in self._checked:
            if _checksum(features) != self.sums[digest]:
                raise ValueError(f"checksum of {digest[:12]}")
            self._checked.add(digest)
        return features


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _make_room(folder: Path, size: int, *, most_bytes: int) -> None:
    """Delete what was used longest ago, until so many bytes more may be written.

    Raises:
        StorageError: They may not: the bound, or the end of the disk, which is left to checkpoints.
    """
    with file_lock(folder / "lock"):
        found = []
        for path in folder.glob("*/*"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                if path.name[0] == "." and time.time() - facts.st_mtime > _DEAD_S:  # by a process that was killed
                    path.unlink()
                    continue
                found.append((facts.st_mtime_ns, facts.st_size, path))
        taken = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, path in sorted(found):
            if taken + size <= most_bytes:
                break
            # Whoever has it open goes on reading it.
            path.unlink(missing_ok=True)
            taken -= bytes_
    if size > most_bytes or _free(folder) < size:
        raise StorageError(f"{folder} has no room", f"{size / 1e6:,.0f} MB", f"Free some space, or raise {LIMIT}.")


def _free(folder: Path) -> int:
    disk = shutil.disk_usage(folder)
    return int(disk.free - max(disk.total // 20, _GIGABYTE))


def _taken(folder: Path) -> int:
    sizes = []
    for path in folder.glob("*/*"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def features_key(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    name: str,
    *,
    precision: str,
    device: torch.device,
    code_digest: str,
) -> str:
    """sha256 over all that an encoder's features of an image depend on.

    Args:
        model: Its weights as they are.
        processor: As batches are made with.
        name: The encoder's.
        precision: Of the stage.
        device: That it runs on.
        code_digest: Of the code.
    """
    entry = next(entry for entry in model.config.encoders if entry.name == name)
    shared = model.config.shared_pixels
    layout = processor.layout
    facts: dict[str, object] = {
        "encoder": entry.model_dump(mode="json", exclude={"name"}),
        "pixels": processor.transforms[SHARED if shared else name],
        "shared": shared and shared.model_dump(mode="json"),
        "layout": layout and {**layout, "whole": name in layout.get("whole", ())},
        "precision": precision,
        "device": device.type,
        "code": code_digest,
        "torch": torch.__version__,
    }
    if device.type == "cpu":
        # Some encoders' last bits depend on these.
        facts |= {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    hasher = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor_name, tensor in sorted(model.encoders[name].state_dict().items()):
        hasher.update(f"\n{tensor_name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(_bytes_of(tensor))
    return hasher.hexdigest()


# --- what pays -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureCosts:
    """What making and keeping an encoder's features takes.

    Attributes:
        images: Of the stage, each counted once.
        kept: Of those, how many are kept already.
        uses: How often the stage shows each.
        bytes: Of an image's features.
        make_s: Seconds to make them.
        move_s: Seconds to write, or to read, them.
    """

    images: int
    kept: int
    uses: float
    bytes: int
    make_s: float
    move_s: float

    @property
    def saved_s(self) -> float:
        """Seconds that keeping saves the stage; below 0 where it costs."""
        new = max(0, self.images - self.kept)
        return self.images * self.uses * (self.make_s - self.move_s) - new * (self.make_s + self.move_s)

    @property
    def pays(self) -> bool:
        """Whether keeping pays, here or in runs to come."""
        return self.saved_s > 0 or self.move_s <= _FOR_LATER * self.make_s

    @property
    def new_bytes(self) -> int:
        """Of what would be written."""
        return max(0, self.images - self.kept) * self.bytes

    def __str__(self) -> str:
        return (
            f"{self.images:,} images of {self.bytes / 1e3:,.1f} kB, each seen {self.uses:.3g} times, {self.kept:,} "
            f"kept already; {1e3 * self.make_s:,.2f} ms to make one, {1e3 * self.move_s:,.2f} to write or read it"
        )


def plan_features(costs: Mapping[str, FeatureCosts], *, room: int) -> list[EncoderFeatures]:
    """Which encoders' features are kept: those that save most for a byte, as far as there is room for the whole set.

    Args:
        costs: By encoder.
        room: Bytes that may be written.
    """
    plans: dict[str, EncoderFeatures] = {}
    order = sorted(costs, key=lambda name: -costs[name].make_s / max(1, costs[name].bytes))
    for name in order:
        cost = costs[name]
        if not cost.pays:
            plans[name] = EncoderFeatures(encoder=name, kept=False, why=f"keeping does not pay: {cost}")
        elif cost.new_bytes > room:
            needed = f"{cost.new_bytes / 1e9:,.2f} GB are needed, there is room for {max(0, room) / 1e9:,.2f}"
            plans[name] = EncoderFeatures(encoder=name, kept=False, why=f"{needed} ({LIMIT}): {cost}")
        else:
            room -= cost.new_bytes
            plans[name] = EncoderFeatures(encoder=name, kept=True, why=f"keeping pays: {cost}")
    return [plans[name] for name in costs]


def _move_seconds(folder: Path) -> float:
    """Seconds to write a byte to the disk of a folder; reading is no slower."""
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".trial-{uuid.uuid4().hex}"
    started = time.perf_counter()
    try:
        trial.write_bytes(bytes(_TRIAL_BYTES))
        sync(trial)
    finally:
        trial.unlink(missing_ok=True)
    return (time.perf_counter() - started) / _TRIAL_BYTES


# --- what a stage uses ---------------------------------------------------------------------------------------------


class FrozenReader:
    """Finds kept features while batches are built, in this process or in a worker.

    Args:
        names: Encoders that do not train.
        live: Names of the pixels that encoders which train are given.
        shared: Whether all encoders' pixels are made from one tensor.
        files: Kept features, of those whose features are kept.
    """

    def __init__(
        self, names: Sequence[str], live: Sequence[str], *, shared: bool, files: Mapping[str, FeatureFiles]
    ) -> None:
        self.names = tuple(names)
        self.live = tuple(live)
        self._shared = shared
        self._files = dict(files)

    def find(self, digest: str) -> dict[str, Tensor]:
        """What is kept of an image, by encoder."""
        found = {name: files.find(digest) for name, files in self._files.items()}
        return {name: features for name, features in found.items() if features is not None}

    def show(self, data: bytes, processor: ManyEyesProcessor) -> FrozenImage:
        """An image file for the encoders that do not train; pixels are made only for those of which nothing is kept."""
        # Of the bytes themselves: what is kept outlives the data set that says what they are.
        digest = hashlib.sha256(data).hexdigest()
        found = self.find(digest)
        missing = [name for name in self.names if name not in found]
        cut = [processor.cut_image(data, names=[SHARED] if self._shared else missing)] if missing else []
        return FrozenImage(digest, found, processor.normalize_images(cut) if cut else {})


class FrozenFeatures:
    """Gives batches the features of encoders that do not train.

    Args:
        model: Its frozen encoders are run.
        reader: What batches are built with.
        files: Kept features by encoder.
        plans: What was decided for each.
        device: That the model is on.
        precision: Of the stage.
    """

    def __init__(
        self,
        model: ManyEyesForConditionalGeneration,
        reader: FrozenReader,
        *,
        files: Mapping[str, FeatureFiles],
        plans: Sequence[EncoderFeatures],
        device: torch.device,
        precision: str,
    ) -> None:
        self._model = model
        self.reader = reader
        self._files = dict(files)
        self._plans = list(plans)
        self._device = device
        self._precision = precision
        self._counts: Counter[tuple[str, str]] = Counter()

    def complete(self, images: Sequence[FrozenImage]) -> dict[str, Tensor]:
        """Features of a batch's images, made where they were not found.

        Args:
            images: Of the batch, in order.

        Returns:
            Per frozen encoder ``[I, C_k, h_k, w_k]``, with tiles one a tile.
        """
        made: dict[tuple[str, str], Tensor] = {}
        for image in images:
            self._counts.update(("read", name) for name in image.found)
        for names, group in self._to_make(images).items():
            # An image that stands twice in a batch, or that was made since the batch was built, is made once.
            new = {image.digest: image for image in group}
            for part in [[image] for image in new.values()] if self._device.type == "cpu" else [list(new.values())]:
                for name, features in self._make(names, part).items():
                    made |= {(name, image.digest): own for image, own in zip(part, features, strict=True)}
        maps = {}
        for name in self.reader.names:
            parts = [image.found[name] if name in image.found else made[name, image.digest] for image in images]
            joined = torch.cat([part.to(self._device) for part in parts])
            # One layout in memory, as transformers leave it, wherever a map comes from: sums are in another order in
            # another layout, and last bits are others.
            maps[name] = torch.empty_like(joined, memory_format=torch.channels_last).copy_(joined)
        return maps

    def _to_make(self, images: Sequence[FrozenImage]) -> dict[tuple[str, ...], list[FrozenImage]]:
        """Images by the encoders that must run on them."""
        groups: dict[tuple[str, ...], list[FrozenImage]] = {}
        for image in images:
            missing = []
            for name in self.reader.names:
                if name in image.found:
                    continue
                known = self._files[name].find(image.digest) if name in self._files else None
                if known is None:
                    missing.append(name)
                else:
                    image.found[name] = known
                    self._counts["read", name] += 1
            if missing:
                groups.setdefault(tuple(missing), []).append(image)
        return groups

    def _make(self, names: Sequence[str], images: Sequence[FrozenImage]) -> dict[str, list[Tensor]]:
        pixels = {
            name: torch.cat([image.pixels[name] for image in images]).to(self._device)
            for name in ((SHARED,) if self._model.shared_pixels else names)
        }
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            maps = self._model.encoder_features(pixels, names=names)
        made = {}
        for name, features in maps.items():
            # The model may cut each tile that it is given into more of them.
            tiles = [len(image.pixels[SHARED if SHARED in pixels else name]) for image in images]
            made[name] = list(features.split([len(features) * own // sum(tiles) for own in tiles]))
            for image, own in zip(images, made[name], strict=True):
                self._counts["made", name] += 1
                if name in self._files:
                    self._files[name].keep(image.digest, own)
        return made

    def reports(self) -> list[EncoderFeatures]:
        """What became of each encoder's features, in this process."""
        return [
            plan.model_copy(update={what: self._counts[what, plan.encoder] for what in ("made", "read")})
            for plan in self._plans
        ]

    def write(self) -> None:
        """Write what was made and is not written yet."""
        for files in self._files.values():
            files.write()


def frozen_features(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    *,
    precision: str,
    folder: Path,
    images: int,
    uses: float,
    device: torch.device,
    code_digest: str,
    tell: bool,
) -> FrozenFeatures | None:
    """What a stage or an evaluation that keeps features uses, with what pays on this machine.

    Args:
        model: With exactly what trains requiring gradients.
        processor: Batches are made with it.
        precision: In which encoders run.
        folder: For kept features.
        images: To come, each counted once.
        uses: How often each is shown.
        device: That the model is on.
        code_digest: Of the code.
        tell: Whether to write what was decided to the log.

    Returns:
        None where there is no encoder whose features can be made apart from the rest.
    """
    names = _frozen_encoders(model)
    if not names:
        if tell:
            _log("keep_features: no encoder's features can be made apart from what trains")
        return None
    most_bytes, costs, files = features_limit(), {}, {}
    if most_bytes:
        move_s = _move_seconds(folder)
        for name in names:
            key = features_key(model, processor, name, precision=precision, device=device, code_digest=code_digest)
            files[name] = FeatureFiles(folder, key, most_bytes=most_bytes)
            if key not in _MEASURED:
                _MEASURED[key] = _measure(model, processor, name, device=device, precision=precision)
            size, make_s = _MEASURED[key]
            costs[name] = FeatureCosts(
                images=images,
                kept=min(images, len(files[name])),
                uses=uses,
                bytes=size,
                make_s=make_s,
                move_s=move_s * size,
            )
        # What others keep goes first; of this stage's own, what is kept already stays.
        own = sum(cost.kept * cost.bytes for cost in costs.values())
        plans = plan_features(costs, room=min(most_bytes - own, _free(folder) + _taken(folder) - own))
    else:
        plans = [EncoderFeatures(encoder=name, kept=False, why=f"{LIMIT} is 0") for name in names]
    files = {plan.encoder: files[plan.encoder] for plan in plans if plan.kept}
    if tell:
        for plan in plans:
            _log(f"features of {plan.encoder} are {'kept' if plan.kept else 'made each time'}: {plan.why}")
    shared = model.shared_pixels is not None
    trained = [name for name in model.encoders if name not in names]
    live = [SHARED] if shared and trained else trained
    reader = FrozenReader(names, live, shared=shared, files=files)
    return FrozenFeatures(model, reader, files=files, plans=plans, device=device, precision=precision)


def _frozen_encoders(model: ManyEyesForConditionalGeneration) -> list[str]:
    if isinstance(model.fusion, InjectingFusion):
        return []
    return [
        name
        for name, encoder in model.encoders.items()
        # What is frozen outside the language model's layers no process holds a part of.
        if not any(parameter.requires_grad for parameter in encoder.parameters())
    ]


def _measure(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    name: str,
    *,
    device: torch.device,
    precision: str,
) -> tuple[int, float]:
    """Bytes of an image's features, and seconds to make them."""
    encoder = model.encoders[name]
    assert isinstance(encoder, Encoder)
    pixels_name = SHARED if model.shared_pixels else name
    blank = np.full((encoder.image_size, encoder.image_size, 3), 127, np.uint8)
    pixels = {key: values.to(device) for key, values in processor.pixel_values([blank], names=(pixels_name,)).items()}
    seconds, size = math.inf, 0
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = model.encoder_features(pixels, names=[name])[name].cpu()
        seconds, size = min(seconds, time.perf_counter() - started), features.nbytes
    return size, seconds


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")
