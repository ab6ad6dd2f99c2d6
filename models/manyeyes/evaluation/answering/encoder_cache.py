"""Keeps what the encoders made of an image, so that no image runs through them twice.

The same picture stands in several benchmarks, several conditions show it (its own questions, another item's), and the
tasks of a pipeline and the processes of an evaluation ask the same model. What is kept are the visual tokens as the
language model takes them, by sha256 of the image file and by model: in memory, and behind it in files that all
processes share. Both are bounded; what was used longest ago goes first.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyeyes.errors import StorageError
from manyeyes.evaluation.answering.answer_cache import GIGABYTE, Complaint, cached_files, read_limit, touch
from manyeyes.runtime.vision import WINDOWS, ImageTokens
from manyeyes.storage import write_file

MEMORY_LIMIT = "MANYEYES_ENCODER_CACHE_MEMORY_GB"
DISK_LIMIT = "MANYEYES_ENCODER_CACHE_DISK_GB"
DEFAULT_MEMORY_GB = 2.0
DEFAULT_DISK_GB = 20.0

_TRIAL = 32
"""This many images are written before it is asked whether writing pays."""

_MOST_FILES = 100_000


@dataclass(frozen=True)
class ImageCounts:
    """Images that were shown, by where their visual tokens came from.

    Attributes:
        encoded: Ran through the encoders.
        from_memory: Were in memory.
        from_disk: Were on disk, from this process or another.
    """

    encoded: int = 0
    from_memory: int = 0
    from_disk: int = 0

    def __add__(self, other: ImageCounts) -> ImageCounts:
        """Both together."""
        return ImageCounts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __sub__(self, other: ImageCounts) -> ImageCounts:
        """What came since ``other`` was counted."""
        return ImageCounts(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(self)))


@dataclass(frozen=True)
class EncoderCacheSettings:
    """Where visual tokens are kept and how much of them.

    Attributes:
        key: Whatever the tokens depend on besides the image: kind and digest of the model, digest of the code.
        folder: For files that processes share; ``None`` for memory alone.
        memory_bytes: Most in memory, a process; 0 for none.
        disk_bytes: Most in files, all models together; 0 for none.
    """

    key: str
    folder: Path | None = None
    memory_bytes: int = int(DEFAULT_MEMORY_GB * GIGABYTE)
    disk_bytes: int = int(DEFAULT_DISK_GB * GIGABYTE)


@dataclass(frozen=True)
class FeatureSettings:
    """Where features of encoders that other models share are kept (``manyeyes.training.features``).

    Attributes:
        folder: Of all encoders.
        encoders: Names of those.
        images: That will be shown.
        code_digest: Of the code that evaluates.
    """

    folder: Path
    encoders: tuple[str, ...]
    images: int
    code_digest: str


def encoder_cache_settings(
    folder: Path | None, *, kind: str, model_digest: str, code_digest: str
) -> EncoderCacheSettings:
    """Settings with the bounds that the environment gives.

    Args:
        folder: For files that processes share; ``None`` for memory alone.
        kind: ``torch`` or ``bundle``.
        model_digest: Of the checkpoint or the bundle.
        code_digest: Of the code that evaluates.

    Raises:
        EvaluationError: ``MANYEYES_ENCODER_CACHE_MEMORY_GB`` or ``MANYEYES_ENCODER_CACHE_DISK_GB`` is no number of at
            least 0.
    """
    parts = "\n".join([kind, model_digest, code_digest])
    return EncoderCacheSettings(
        key=hashlib.sha256(parts.encode()).hexdigest(),
        folder=folder,
        memory_bytes=read_limit(MEMORY_LIMIT, DEFAULT_MEMORY_GB),
        disk_bytes=read_limit(DISK_LIMIT, DEFAULT_DISK_GB),
    )


class EncoderCache:
    """Visual tokens by image file.

    Args:
        settings: Where, and how much.

    Attributes:
        counts: Images so far, by where their tokens came from.
    """

    def __init__(self, settings: EncoderCacheSettings) -> None:
        self._settings = settings
        self._memory: OrderedDict[str, ImageTokens] = OrderedDict()
        self._memory_bytes = 0
        self._disk = None
        if settings.folder is not None and settings.disk_bytes > 0:
            self._disk = _TokenFiles(settings.folder, settings.key, most_bytes=settings.disk_bytes)
        self.counts = ImageCounts()

    def find(self, image: bytes) -> ImageTokens | None:
        """The tokens of an image file, or ``None`` where they must be made."""
        sha256 = hashlib.sha256(image).hexdigest()
        tokens = self._memory.get(sha256)
        if tokens is not None:
            self._memory.move_to_end(sha256)
            self.counts += ImageCounts(from_memory=1)
            return tokens
        tokens = None if self._disk is None else self._disk.read(sha256)
        if tokens is not None:
            self._remember(sha256, tokens)
            self.counts += ImageCounts(from_disk=1)
        return tokens

    def keep(self, image: bytes, tokens: ImageTokens, *, seconds: float) -> None:
        """Keep the tokens of an image that was encoded.

        Args:
            image: Its file.
            tokens: What the encoders, the fusion and the projector made of it.
            seconds: What that took; tokens whose making is quicker than writing them go to memory alone.
        """
        self.counts += ImageCounts(encoded=1)
        sha256 = hashlib.sha256(image).hexdigest()
        self._remember(sha256, tokens)
        if self._disk is not None:
            self._disk.write(sha256, tokens, seconds=seconds)

    def _remember(self, sha256: str, tokens: ImageTokens) -> None:
        size = _num_bytes(tokens)
        if size > self._settings.memory_bytes:
            return
        before = self._memory.pop(sha256, None)
        self._memory_bytes += size - (0 if before is None else _num_bytes(before))
        # Copied: an image's tokens may be a view of a whole batch, which would then stay in memory with them.
        windows = {name: values.copy() for name, values in tokens.windows.items()}
        self._memory[sha256] = ImageTokens(tokens.tokens.copy(), tokens.looks.copy(), windows)
        while self._memory_bytes > self._settings.memory_bytes:
            _, oldest = self._memory.popitem(last=False)
            self._memory_bytes -= _num_bytes(oldest)


class _TokenFiles:
    """One file an image; several processes write and remove them at the same time.

    Args:
        folder: Of all models.
        key: Of this one.
        most_bytes: All models together.
    """

    def __init__(self, folder: Path, key: str, *, most_bytes: int) -> None:
        self._folder = folder
        self._own = folder / key[:32]
        self._most_bytes = most_bytes
        # As of the last look at the folder; none yet.
        self._bytes = most_bytes
        self._files = 0
        # What this process wrote since then.
        self._since = 0
        self._encoding_s = self._writing_s = 0.0
        self._written = 0
        self._broken = Complaint("the cache of visual tokens")
        self._refused = Complaint("the cache of visual tokens")
        self._closed = False

    def read(self, sha256: str) -> ImageTokens | None:
        path = self._path(sha256)
        try:
            content = path.read_bytes()
            touch(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._broken.say(f"a file cannot be read, {error.strerror}", path)
            return None
        try:
            return _unpack(content)
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            self._broken.say(f"a file is damaged, {error}", path)
            path.unlink(missing_ok=True)
            return None

    def write(self, sha256: str, tokens: ImageTokens, *, seconds: float) -> None:
        if self._closed or not self._pays():
            return
        started = time.perf_counter()
        path = self._path(sha256)
        try:
            content = _pack(tokens)
            if not self._make_room(len(content)):
                return
            # Not flushed: a file that a power failure cuts is found damaged, and made again.
            write_file(path, content, flush=False)
        except (OSError, StorageError) as error:
            self._closed = True
            reason = error.strerror if isinstance(error, OSError) else error.found
            self._refused.say(f"no more is written, {reason}", path)
            return
        self._encoding_s += seconds
        self._writing_s += time.perf_counter() - started
        self._written += 1
        self._since += len(content)
        self._files += 1

    def _pays(self) -> bool:
        # Reading costs about what writing costs, so what is made in twice that time is better made again.
        return self._written < _TRIAL or 2 * self._writing_s < self._encoding_s

    def _make_room(self, size: int) -> bool:
        """Whether this many bytes may be written; removes what was used longest ago.

        The end of the disk is left to what matters more than a cache: checkpoints lie on the same one.
        """
        if size > self._most_bytes:
            return False
        # Others write too, so the folder is looked at again before this process has filled much of it.
        full = self._bytes + self._since + size > self._most_bytes or self._files >= _MOST_FILES
        if full or 16 * self._since > self._most_bytes:
            self._evict(size)
        self._folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self._folder)
        return disk.free >= size + max(disk.total // 20, GIGABYTE)

    def _evict(self, size: int) -> None:
        found = sorted(cached_files(self._folder))
        total, count = sum(bytes_ for _, bytes_, _ in found), len(found)
        if total + size > self._most_bytes or count >= _MOST_FILES:
            # A little more than is needed, so that not every image looks again.
            target_bytes, target_files = self._most_bytes * 15 // 16 - size, _MOST_FILES * 15 // 16
            for _, bytes_, path in found:
                if total <= max(target_bytes, 0) and count <= target_files:
                    break
                _remove(path)
                total, count = total - bytes_, count - 1
        self._bytes, self._files, self._since = total, count, 0

    def _path(self, sha256: str) -> Path:
        return self._own / sha256[:2] / f"{sha256}.npz"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # Another's file that may not be removed stays; the bound is looked at again with the next image.
        return


def _num_bytes(tokens: ImageTokens) -> int:
    return int(tokens.tokens.nbytes + tokens.looks.nbytes + sum(values.nbytes for values in tokens.windows.values()))


def _pack(tokens: ImageTokens) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, NDArray[np.generic]] = {"tokens": tokens.tokens, "looks": tokens.looks, **tokens.windows}
    # Not compressed: floats hardly shrink. The container keeps a checksum of every array.
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _unpack(content: bytes) -> ImageTokens:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        windows = {name: arrays[name] for name in WINDOWS if name in arrays}
        return ImageTokens(arrays["tokens"], arrays["looks"], windows)
