"""Keeps what a model answered, so that no input is asked twice: in another benchmark or condition, or after a kill.

A model is greedy, so equal inputs have equal answers. An answer is kept under a digest of everything that it depends
on. Files only grow: a process has one of its own, and adds a batch's answers to it as soon as they are there. Neither
locks nor a database are needed, which a shared volume may not offer (diskcache is SQLite, which must not lie on NFS); a
line that a kill cut off is left out.

::

    answers/<model>/<process>.open.jsonl    grows
    answers/<model>/<process>.jsonl         was closed; several of them become one

A cache saves work and decides nothing: a full disk, a broken file or a folder that may not be written costs time and
gets one warning, and the evaluation goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from uuid import uuid4

from manyeyes.errors import EvaluationError, StorageError
from manyeyes.storage import write_file

GIGABYTE = 1 << 30


class CacheWarning(UserWarning):
    """A cache cannot be read or written; what it would have saved is done again."""


def read_limit(variable: str, default_gb: float) -> int:
    """Most bytes that a cache may take.

    Args:
        variable: Environment variable in gigabytes (2^30 bytes); 0 switches the cache off.
        default_gb: Where it is not set.

    Raises:
        EvaluationError: Not a number of at least 0.
    """
    given = os.environ.get(variable)
    if not given:
        return int(default_gb * GIGABYTE)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < float("inf"):
        raise EvaluationError(
            f"{variable} is {given!r}", "gigabytes, 0 or more", f"Set it to a number, for instance {default_gb:g}."
        )
    return int(gigabytes * GIGABYTE)


class Complaint:
    """Warns once, however often something goes wrong.

    Args:
        what: Names the cache, for instance ``the cache of answers``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = False

    def say(self, problem: str, path: Path) -> None:
        """Warn, unless that was done before.

        Args:
            problem: What went wrong.
            path: Where.
        """
        if self._said:
            return
        self._said = True
        warnings.warn(
            f"{self._what}: {problem} ({path}). The evaluation goes on; what is not in the cache is done again.",
            CacheWarning,
            stacklevel=3,
        )


def cached_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of change, bytes and path of every file; those that another process removes meanwhile are left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue
            yield facts.st_mtime, facts.st_size, path


def touch(path: Path) -> None:
    """Note that a file or folder was used now: its time of change says so, few file systems keep that of reading.

    Where only reading is allowed, nothing is noted.
    """
    with contextlib.suppress(OSError):
        os.utime(path)


ANSWER_LIMIT = "MANYEYES_ANSWER_CACHE_GB"
DEFAULT_ANSWER_GB = 1.0

_OPEN = ".open.jsonl"
_CLOSED = ".jsonl"
_MANY = 8
"""From this many closed files on, they become one."""

_DEAD_S = 24 * 3600.0
"""A file that did not grow for so long belongs to a process that was killed."""

_SYNC_S = 1.0
"""A kill of the process loses nothing that was written; a failure of the machine loses so much at most."""


@dataclass(frozen=True)
class AnswerKeys:
    """Digests of inputs, under which answers are kept.

    Attributes:
        kind: ``torch`` or ``bundle``.
        model_digest: Of the checkpoint or the bundle: weights, processor, tokenizer.
        code_digest: Of the code that answers.
        data_md5: Of the snapshot.
        chat: The recipe's chat template and system text.
    """

    kind: str
    model_digest: str
    code_digest: str
    data_md5: str
    chat: Mapping[str, Any]

    def of(self, prompt: str, *, images: Sequence[str], options: Sequence[str], max_new_tokens: int) -> str:
        """sha256 over all that the answer to a prompt depends on.

        Args:
            prompt: As the model reads it, but for the chat template.
            images: sha256 of each image file that is shown, in order.
            options: What the answer is chosen from; empty where it is written.
            max_new_tokens: Longest answer.
        """
        parts = {
            "format": 1,
            "kind": self.kind,
            "model": self.model_digest,
            "code": self.code_digest,
            "data": self.data_md5,
            "chat": self.chat,
            "prompt": prompt,
            "images": list(images),
            "options": list(options),
            # A choice is not written, so its length is no part of it.
            "max_new_tokens": None if options else max_new_tokens,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """Answers of one model by digest of the input; use it in a ``with`` statement.

    Args:
        folder: Of all models.
        model_digest: Whose answers.
        kind: ``torch`` or ``bundle``.
        most_bytes: All models together; the answers of models that were not asked for longest go first. 0 for no cache.
    """

    def __init__(self, folder: Path, *, model_digest: str, kind: str, most_bytes: int) -> None:
        self._folder = folder
        self._own = folder / f"{kind}-{hashlib.sha256(model_digest.encode()).hexdigest()[:32]}"
        self._most_bytes = most_bytes
        self._answers: dict[str, str] = {}
        self._read_to: dict[str, int] = {}
        self._file: IO[bytes] | None = None
        self._path = self._own / f"{uuid4().hex}{_OPEN}"
        self._synced = 0.0
        self._broken = Complaint("the cache of answers")
        self._refused = Complaint("the cache of answers")
        self._closed = most_bytes == 0

    def __enter__(self) -> AnswerCache:
        """Read what is there."""
        self.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close this process's file; put closed ones together and keep to the bound."""
        self.close()

    def __len__(self) -> int:
        """How many answers are known."""
        return len(self._answers)

    def find(self, key: str) -> str | None:
        """The answer to an input, or ``None`` where it must be asked."""
        return self._answers.get(key)

    def add(self, answers: Mapping[str, str]) -> None:
        """Keep answers, and write them before returning.

        Args:
            answers: Text by key.
        """
        self._answers |= answers
        if self._closed:
            return
        lines = b"".join(_line(key, text) for key, text in answers.items())
        try:
            if self._file is None:
                self._own.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("xb", buffering=0)
            _write_all(self._file, lines)
            if time.monotonic() - self._synced > _SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            self._refuse(error, self._path)

    def refresh(self) -> None:
        """Read what other processes added."""
        if self._most_bytes == 0:
            return
        try:
            touch(self._own)
            for path in self._files():
                if path != self._path:
                    self._read(path)
        except OSError as error:
            self._broken.say(f"it cannot be read, {error.strerror}", self._own)

    def close(self) -> None:
        """Close this process's file; put closed ones together and keep to the bound."""
        try:
            if self._file is not None:
                file, self._file = self._file, None
                with file:
                    os.fsync(file.fileno())
                self._path.rename(self._path.with_name(self._path.name.removesuffix(_OPEN) + _CLOSED))
            if not self._closed:
                self._closed = True
                self._compact()
                self._keep_to_bound()
        except (OSError, StorageError) as error:
            self._refuse(error, self._path)

    def _files(self) -> list[Path]:
        return sorted(self._own.glob(f"*{_CLOSED}"))

    def _read(self, path: Path) -> None:
        """Take what a file has grown by; a last line without an end is not whole yet, or never will be."""
        start = self._read_to.get(path.name, 0)
        try:
            with path.open("rb") as file:
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            return
        end = content.rfind(b"\n") + 1
        self._read_to[path.name] = start + end
        lines = content[:end].split(b"\n")[:-1]
        found = [answer for answer in map(_parse, lines) if answer is not None]
        if len(found) < len(lines):
            self._broken.say(f"{len(lines) - len(found)} of {len(lines)} lines are damaged", path)
        self._answers.update(found)

    def _compact(self) -> None:
        """Make one file of many. Each process removes only what it has put into its own, so nothing is lost."""
        now = time.time()
        closed = [
            path
            for changed, _, path in cached_files(self._own)
            if path.name.endswith(_CLOSED) and (not path.name.endswith(_OPEN) or now - changed > _DEAD_S)
        ]
        if len(closed) < _MANY:
            return
        together: dict[str, str] = {}
        put_together = []
        for path in closed:
            try:
                lines = path.read_bytes().split(b"\n")
            except FileNotFoundError:
                # Another process has just put it into a file of its own.
                continue
            together.update(answer for answer in map(_parse, lines) if answer is not None)
            put_together.append(path)
        write_file(self._own / f"{uuid4().hex}{_CLOSED}", b"".join(_line(*answer) for answer in together.items()))
        for path in put_together:
            path.unlink(missing_ok=True)

    def _keep_to_bound(self) -> None:
        files = sorted(cached_files(self._folder))
        total = sum(size for _, size, _ in files)
        # A model is as old as the last evaluation that asked for it, this one's is the youngest.
        asked = {path.parent: 0.0 for _, _, path in files}
        for model in asked:
            with contextlib.suppress(FileNotFoundError):
                asked[model] = model.stat().st_mtime
        asked[self._own] = math.inf
        for _, size, path in sorted(files, key=lambda file: (asked[file[2].parent], file[0])):
            if total <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _refuse(self, error: OSError | StorageError, path: Path) -> None:
        self._closed = True
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self._refused.say(f"no more is written, {reason}", path)


def open_answers(folder: Path, *, model_digest: str, kind: str) -> AnswerCache:
    """The cache of answers, with the bound that the environment gives.

    Args:
        folder: Of all models.
        model_digest: Whose answers.
        kind: ``torch`` or ``bundle``.

    Raises:
        EvaluationError: ``MANYEYES_ANSWER_CACHE_GB`` is no number of at least 0.
    """
    most_bytes = read_limit(ANSWER_LIMIT, DEFAULT_ANSWER_GB)
    return AnswerCache(folder, model_digest=model_digest, kind=kind, most_bytes=most_bytes)


def _line(key: str, text: str) -> bytes:
    content = json.dumps([key, text]).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _parse(line: bytes) -> tuple[str, str] | None:
    checksum, _, content = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(content):
        return None
    key, text = json.loads(content)
    return key, text


def _write_all(file: IO[bytes], content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
