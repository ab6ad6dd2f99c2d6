"""Which bundle answers: one of a folder, or the one that an alias of the registry names now.

When the alias moves, the new bundle is fetched, loaded and asked beside the old one, and takes over between two
requests; what the old one has begun, it finishes. A bundle that cannot be fetched, loaded or asked is refused and the
old one stays.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from manyeyes.errors import ManyEyesError
from manyeyes.runtime.bundle import Bundle
from manyeyes.runtime.engine import Chat, Engine

LOG = logging.getLogger("manyeyes.serving")
_SMOKE_TOKENS = 4
_KEPT = 2  # bundles on this disk: the one that answers and the one before it


class BundleSource(Protocol):
    """Where bundles come from."""

    @property
    def name(self) -> str:
        """Of the model."""

    def find(self) -> str:
        """Which version is to answer now."""

    def admit(self, version: str) -> None:
        """Raise why a version may not be served yet; asked anew each time, as that may change."""

    def fetch(self, version: str) -> Path:
        """Folder of a version's bundle on this machine."""

    def forget(self, kept: Sequence[str]) -> None:
        """Delete what was fetched of other versions."""


@dataclass(frozen=True)
class FolderSource:
    """One bundle that stays."""

    folder: Path
    name: str
    verify_key: Path | None = None

    def find(self) -> str:
        """Always the same."""
        return "folder"

    def admit(self, version: str) -> None:
        """There is no other."""

    def fetch(self, version: str) -> Path:
        """The folder itself, once its signature is the one that is asked for."""
        del version
        from manyeyes.registry.signing import verify_signature, wanted_key

        key = wanted_key(self.verify_key)
        if key is not None:
            verify_signature(self.folder, key=key)
        return self.folder

    def forget(self, kept: Sequence[str]) -> None:
        """Nothing was fetched."""


class RegistrySource:
    """A registered model's alias.

    Args:
        reference: ``NAME``, ``NAME@ALIAS`` or ``NAME/VERSION``.
        kept: Folder for bundles that were fetched.
        require_approved: Refuse a version that nobody approved.
        variant: Fetch this variant alone; everything when left out.
        verify_key: Refuse a version without this public key's signature; that of ``MANYEYES_VERIFY_KEY`` by default.

    Raises:
        RegistryError: No reference to a model.
    """

    def __init__(
        self,
        reference: str,
        *,
        kept: Path,
        require_approved: bool = False,
        variant: str | None = None,
        verify_key: Path | None = None,
    ) -> None:
        from manyeyes.registry.references import parse_model_reference
        from manyeyes.registry.signing import wanted_key

        self._reference = parse_model_reference(reference)
        self._kept = kept
        self._require_approved = require_approved
        self._variant = variant
        self._verify_key = wanted_key(verify_key)
        self.name = self._reference.name

    def find(self) -> str:
        """Number of the version."""
        from manyeyes.registry.references import find_version
        from manyeyes.registry.tracking import connect

        return str(find_version(connect(), self._reference).version)

    def admit(self, version: str) -> None:
        """Approved and signed, where that is asked for: both may be done after an alias moved."""
        from manyeyes.registry.approval import check_approved
        from manyeyes.registry.pull import check_signed
        from manyeyes.registry.references import ModelReference, find_version
        from manyeyes.registry.tracking import connect

        if self._require_approved:
            check_approved(connect(), self.name, int(version))
        if self._verify_key is not None:
            check_signed(find_version(connect(), ModelReference(self.name, None, int(version))), key=self._verify_key)

    def fetch(self, version: str) -> Path:
        """Pull the version, checksums and all."""
        from manyeyes.registry.pull import pull

        return pull(
            f"{self.name}/{version}",
            out_dir=self._kept / "-".join(filter(None, (self.name, version, self._variant))),
            require_approved=self._require_approved,
            variant=self._variant,
            verify_key=self._verify_key,
        )

    def forget(self, kept: Sequence[str]) -> None:
        """Delete the folders of other versions of this model; where only one is kept, the newest other one stays."""
        variant = f"-{re.escape(self._variant)}" if self._variant else ""
        mine = re.compile(rf"{re.escape(self.name)}-([0-9]+){variant}")
        found = {match[1]: folder for folder in self._kept.glob("*") if (match := mine.fullmatch(folder.name))}
        others = sorted((name for name in found if name not in kept), key=lambda name: found[name].stat().st_mtime)
        for version in others[: len(others) - (len(kept) < _KEPT)]:
            shutil.rmtree(found[version], ignore_errors=True)


@dataclass
class Served:
    """A bundle that answers.

    Attributes:
        version: As its source calls it.
        engine: Answers.
        users: Requests that have it in hand.
        idle: Set while there are none.
    """

    version: str
    engine: Engine
    users: int = 0
    idle: threading.Event = field(default_factory=threading.Event)

    @property
    def digest(self) -> str:
        """Of the bundle."""
        return str(self.engine.bundle.manifest["digest"])

    @property
    def variant(self) -> str:
        """Of the bundle."""
        return self.engine.bundle.variant


class Host:
    """The bundle that answers, and the change to another.

    Args:
        source: Where bundles come from.
        load: Makes an engine of a bundle's folder.

    Raises:
        ManyEyesError: The first bundle cannot be had, loaded or asked.
    """

    def __init__(self, source: BundleSource, load: Callable[[Path], Engine]) -> None:
        self.name = source.name
        self.changes = self.refusals = 0
        self._source, self._load = source, load
        self._lock = threading.Lock()
        self._refused = self._awaited = ""
        self._ended = threading.Event()
        self._follower: threading.Thread | None = None
        self.served = self._open(source.find())
        source.forget([self.served.version])

    @contextmanager
    def use(self) -> Iterator[Served]:
        """The bundle that answers now; it is not closed before it is given back."""
        with self._lock:
            served = self.served
            served.users += 1
            served.idle.clear()
        try:
            yield served
        finally:
            with self._lock:
                served.users -= 1
                if served.users == 0:
                    served.idle.set()

    def follow(self, *, every_s: float) -> None:
        """Look for another version from now on, in a thread."""
        self._follower = threading.Thread(target=self._follow, args=(every_s,), name="manyeyes-alias", daemon=True)
        self._follower.start()

    def look(self) -> None:
        """Take over what the source names now, if that is another version and a good one.

        Raises:
            ManyEyesError: The source does not say.
        """
        version = self._source.find()
        if version in (self.served.version, self._refused):
            return
        try:
            self._source.admit(version)
        except ManyEyesError as error:
            if version != self._awaited:
                self._awaited = version
                self.refusals += 1
                LOG.error("%s: version %s must wait, %s stays: %s", self.name, version, self.served.version, error)
            return
        LOG.info("%s: version %s is there, loading it beside %s", self.name, version, self.served.version)
        try:
            new = self._open(version)
        except ManyEyesError as error:
            if not error.retry:
                self._refused = version
            self.refusals += 1
            self._source.forget([self.served.version])
            LOG.error("%s: version %s is refused, %s stays: %s", self.name, version, self.served.version, error)
            return
        with self._lock:
            old, self.served = self.served, new
        self.changes += 1
        self._refused = self._awaited = ""
        LOG.info("%s: version %s answers now", self.name, version)
        old.idle.wait()
        old.engine.close()
        self._source.forget([version, old.version])

    def close(self, *, timeout_s: float = 0.0) -> None:
        """Stop following, and close the engine."""
        self._ended.set()
        self.served.engine.close(timeout_s=timeout_s)

    def _follow(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            try:
                self.look()
            except ManyEyesError as error:
                LOG.warning("%s: cannot see which version is the one (%s)", self.name, error)

    def _open(self, version: str) -> Served:
        engine = self._load(self._source.fetch(version))
        try:
            engine.answer(Chat.ask("What is shown?", images=_grey_square(), max_new_tokens=_SMOKE_TOKENS))
        except ManyEyesError:
            engine.close()
            raise
        served = Served(version, engine)
        served.idle.set()
        return served


def _grey_square() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def open_bundle(
    folder: Path, *, threads: int | None, max_tokens: int | None, cache_bytes: int, variant: str | None = None
) -> Engine:
    """An engine on a bundle's folder.

    Raises:
        BundleError: As ``load_bundle``.
    """
    from manyeyes.runtime.bundle import load_bundle

    bundle: Bundle = load_bundle(folder, threads=threads, variant=variant)
    return Engine(bundle, max_tokens=max_tokens, cache_bytes=cache_bytes)
