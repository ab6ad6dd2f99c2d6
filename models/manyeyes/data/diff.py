"""What two snapshots differ in: which samples came, went and changed, data set by data set.

Shards with the same sha256 hold the same samples and are not read. Of the others one batch of rows is in memory, and
the rows of both sides meet by id in a temporary database on disk: memory is the same for any number of samples.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from manyeyes.data.contamination.fingerprints import plain_rows
from manyeyes.data.quarantine import row_name
from manyeyes.data.snapshot import (
    DatasetEntry,
    PretrainedEntry,
    ShardEntry,
    Snapshot,
    open_folder,
    open_snapshot,
    parse_dvc_text,
    read_default_remote,
    read_snapshot_manifest,
)
from manyeyes.errors import SnapshotError
from manyeyes.storage import cache_dir
from manyeyes.strict import StrictModel

Progress = Callable[[str, float], None]
State = Literal["came", "went", "changed", "same"]

_BATCH = 1000
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
# By what a row of a benchmark's own columns is known, the first that it has; without one it is known by its contents.
_ID_COLUMNS = ("id", "question_id", "index", "idx", "pid")
# Their sha256 stands for them.
_NOT_READ = {"records": ("images",), "hub": ()}
_FIELD_NAMES = {"sha256": "images", "conversations": "turns"}
_DIGEST_BYTES = 8


class ChangedSample(StrictModel):
    """A sample that is in both snapshots, with other contents."""

    id: str = Field(description="Of the sample.")
    fields: tuple[str, ...] = Field(description="What changed of it: turns, images, source, ...")


class ManifestChange(StrictModel):
    """A field of the manifest."""

    before: str = Field(description="Its value there; empty where there was none.")
    after: str = Field(description="Its value here; empty where there is none.")


class DatasetDiff(StrictModel):
    """One data set in both snapshots."""

    state: State = Field(description="Whether the data set itself came, went, changed, or is the same.")
    rows_before: int = Field(ge=0, description="Samples there.")
    rows_after: int = Field(ge=0, description="Samples here.")
    came: int = Field(default=0, ge=0, description="Samples that are here alone.")
    went: int = Field(default=0, ge=0, description="Samples that are there alone.")
    changed: int = Field(default=0, ge=0, description="Samples of one id with other contents.")
    fields: dict[str, int] = Field(default={}, description="Of the changed samples, how many changed in what.")
    came_ids: tuple[str, ...] = Field(default=(), description="The first of them.")
    went_ids: tuple[str, ...] = Field(default=(), description="The first of them.")
    changed_samples: tuple[ChangedSample, ...] = Field(default=(), description="The first of them.")
    manifest: dict[str, ManifestChange] = Field(default={}, description="Licence, source or layout that changed.")
    shards_skipped: int = Field(default=0, ge=0, description="Shards of equal sha256, which were not read.")
    shards_read: int = Field(default=0, ge=0, description="Shards of either side that were read.")


class PretrainedDiff(StrictModel):
    """One pretrained part in both snapshots."""

    state: State = Field(description="Whether the part came, went, changed, or is the same.")
    files: tuple[str, ...] = Field(default=(), description="Files that came, went or changed.")
    manifest: dict[str, ManifestChange] = Field(default={}, description="Licence, path or command that changed.")


class SnapshotDiff(StrictModel):
    """What two snapshots differ in."""

    format_version: Literal[1] = Field(default=1, description="Version of this format.")
    before: str = Field(description="The first snapshot, as it was named.")
    after: str = Field(description="The second one.")
    datasets: dict[str, DatasetDiff] = Field(description="By name, of either snapshot.")
    pretrained: dict[str, PretrainedDiff] = Field(description="Pretrained parts by name.")

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        states = [each.state for each in self.datasets.values()] + [part.state for part in self.pretrained.values()]
        return set(states) <= {"same"}

    def as_text(self) -> str:
        """For a terminal: a table of the data sets, then the first ids and what the manifest says otherwise."""
        lines = [f"{self.before} -> {self.after}"]
        if self.is_same:
            return f"{lines[0]}\nno difference in {len(self.datasets)} data sets\n"
        header = ["data set", "", "before", "after", "came", "went", "changed", "in"]
        rows = [
            [
                *(name, each.state, f"{each.rows_before:,}", f"{each.rows_after:,}"),
                *(f"{sign}{count:,}" if count else "" for sign, count in zip("+-~", _counts(each), strict=True)),
                ", ".join(f"{field} {count:,}" for field, count in each.fields.items()),
            ]
            for name, each in self.datasets.items()
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        numbers = range(2, 7)
        for row in [header, *rows]:
            cells = [
                cell.rjust(width) if index in numbers else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        for name, each in self.datasets.items():
            said = [f"  {field}: {change.before!r} -> {change.after!r}" for field, change in each.manifest.items()]
            said += _first("+", each.came_ids, each.came) + _first("-", each.went_ids, each.went)
            changed = [f"{sample.id} ({', '.join(sample.fields)})" for sample in each.changed_samples]
            said += _first("~", changed, each.changed)
            lines += ["", name, *said] if said else []
        for name, part in self.pretrained.items():
            if part.state != "same":
                lines += ["", f"pretrained {name} {part.state}: {', '.join(part.files)}"]
                lines += [
                    f"  {field}: {change.before!r} -> {change.after!r}" for field, change in part.manifest.items()
                ]
        return "\n".join(lines) + "\n"


def open_version(reference: str, *, remote: str = "", hashed: bool = False) -> Snapshot:
    """A snapshot by name.

    Args:
        reference: A snapshot's folder, a ``.dvc`` file, one of a git revision (``data.dvc@HEAD~1``), or an md5.
        remote: Where it is, for all but a folder, as ``open_snapshot`` takes it; the checkout's default when empty.
        hashed: Whether a folder's md5 is asked for, for which every file is read that is not known; empty otherwise.

    Raises:
        SnapshotError: No such folder, file, revision or snapshot; or the remote does not answer (``retry``).
    """
    name, at, revision = reference.rpartition("@")
    file = Path(name if at else reference)
    if Path(reference).is_dir():
        if hashed:
            return open_folder(Path(reference))
        return Snapshot(path=Path(reference), md5="", manifest=read_snapshot_manifest(Path(reference)))
    if _MD5.fullmatch(reference):
        md5, checkout = reference, Path()
    elif file.suffix == ".dvc":
        text = _at_revision(file, revision) if at else _read(file)
        md5, checkout = parse_dvc_text(text, path=Path(reference)).md5, file.parent
    else:
        raise SnapshotError(
            f'snapshot is "{reference}"',
            "a snapshot's folder, a .dvc file, data.dvc@REVISION, or an md5",
            "Check the name; for instance: data.dvc@HEAD~1",
        )
    return open_snapshot(md5=md5, remote=remote or read_default_remote(checkout), cache_dir=cache_dir())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SnapshotError(
            f"{file} cannot be read ({error})", "the .dvc file of a snapshot", "Correct its path."
        ) from error


def _at_revision(file: Path, revision: str) -> str:
    git = shutil.which("git")
    if git is None:
        raise SnapshotError(f"{file}@{revision} needs git", "git on the PATH", "Install it, or give the md5.")
    shown = subprocess.run(
        [git, "-C", str(file.parent), "show", "--end-of-options", f"{revision}:./{file.name}"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if shown.returncode:
        said = shown.stderr.strip().splitlines() or ["git says nothing"]
        raise SnapshotError(
            f"{file}@{revision}: {said[0]}", "a revision that has the file", f"See: git log -- {file.name}"
        )
    return shown.stdout


def compare_snapshots(
    before: Snapshot,
    after: Snapshot,
    *,
    names: tuple[str, str] = ("before", "after"),
    most_ids: int = 10,
    progress: Progress | None = None,
) -> SnapshotDiff:
    """Find what came, went and changed.

    Args:
        before: The one.
        after: The other.
        names: What the report calls them.
        most_ids: Ids of each kind to name for each data set.
        progress: Called with a sentence and the share that is done.

    Raises:
        SnapshotError: A shard is missing or damaged.
    """
    report = progress or (lambda *_: None)
    ours, theirs = before.manifest.datasets, after.manifest.datasets
    found = {}
    every = sorted({*ours, *theirs})
    for number, name in enumerate(every):
        report(f"comparing {name}", number / len(every))
        found[name] = _compare_dataset(name, (before, after), most_ids=most_ids)
    parts = {
        name: _compare_part(before.manifest.pretrained.get(name), after.manifest.pretrained.get(name))
        for name in sorted({*before.manifest.pretrained, *after.manifest.pretrained})
    }
    return SnapshotDiff(before=names[0], after=names[1], datasets=found, pretrained=parts)


def _compare_dataset(name: str, snapshots: tuple[Snapshot, Snapshot], *, most_ids: int) -> DatasetDiff:
    ours, theirs = (snapshot.manifest.datasets.get(name) for snapshot in snapshots)
    if ours is None or theirs is None:
        snapshot, entry = (snapshots[0], ours) if ours else (snapshots[1], theirs)
        assert entry is not None
        ids = tuple(shown for _, shown, _ in islice(_read_rows(snapshot, name, entry.shards, ()), most_ids))
        if theirs is None:
            return DatasetDiff(state="went", rows_before=entry.rows, rows_after=0, went=entry.rows, went_ids=ids)
        return DatasetDiff(state="came", rows_before=0, rows_after=entry.rows, came=entry.rows, came_ids=ids)
    rest = _without_equal(ours.shards, theirs.shards)
    manifest = _changes(ours, theirs, ("licence", "source", "layout"))
    found = DatasetDiff(
        state="changed" if manifest else "same",
        rows_before=ours.rows,
        rows_after=theirs.rows,
        manifest=manifest,
        shards_skipped=len(ours.shards) - len(rest[0]),
        shards_read=len(rest[0]) + len(rest[1]),
    )
    if not any(rest):
        return found
    samples = _compare_rows(name, snapshots, rest, most_ids=most_ids)
    state: State = "changed" if manifest or any(samples[kind] for kind in ("came", "went", "changed")) else "same"
    return found.model_copy(update={**samples, "state": state})


def _compare_rows(
    name: str, snapshots: tuple[Snapshot, Snapshot], shards: tuple[list[ShardEntry], list[ShardEntry]], *, most_ids: int
) -> dict[str, Any]:
    """Counts and first ids of what came, went and changed."""
    columns = list(
        dict.fromkeys(
            column
            for snapshot, some in zip(snapshots, shards, strict=True)
            for path in _paths(snapshot, some)
            for column in _columns(path, snapshot.manifest.datasets[name])
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(Path(folder) / "rows.sqlite", isolation_level=None)
        try:
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;")
            for side, snapshot, some in zip(("ours", "theirs"), snapshots, shards, strict=True):
                database.execute("CREATE TABLE read (key TEXT, shown TEXT, fields BLOB)")
                database.executemany("INSERT INTO read VALUES (?, ?, ?)", _read_rows(snapshot, name, some, columns))
                # An id that comes twice is compared in the order of the rows.
                database.execute(
                    f"CREATE TABLE {side} (key TEXT, nth INTEGER, place INTEGER, shown TEXT, fields BLOB, "
                    "PRIMARY KEY (key, nth)) WITHOUT ROWID"
                )
                database.execute(
                    f"INSERT INTO {side} SELECT key, row_number() OVER (PARTITION BY key ORDER BY rowid), "
                    "rowid, shown, fields FROM read"
                )
                database.execute("DROP TABLE read")
            found: dict[str, Any] = {}
            for kind, here, there in (("came", "theirs", "ours"), ("went", "ours", "theirs")):
                alone = f"FROM {here} LEFT JOIN {there} AS other USING (key, nth) WHERE other.key IS NULL"
                (found[kind],) = database.execute(f"SELECT count(*) {alone}").fetchone()
                ids = database.execute(f"SELECT {here}.shown {alone} ORDER BY {here}.place LIMIT {most_ids}")
                found[f"{kind}_ids"] = tuple(shown for (shown,) in ids)
            changed = database.execute(
                "SELECT theirs.shown, ours.fields, theirs.fields FROM theirs JOIN ours USING (key, nth) "
                "WHERE ours.fields != theirs.fields ORDER BY theirs.place"
            )
            fields: Counter[str] = Counter()
            first: list[ChangedSample] = []
            found["changed"] = 0
            for shown, old, new in changed:
                differing = _differing(columns, old, new)
                fields.update(differing)
                found["changed"] += 1
                if len(first) < most_ids:
                    first.append(ChangedSample(id=shown, fields=differing))
            return {**found, "fields": dict(fields.most_common()), "changed_samples": tuple(first)}
        finally:
            database.close()


def _read_rows(
    snapshot: Snapshot, dataset: str, shards: Sequence[ShardEntry], columns: Sequence[str]
) -> Iterator[tuple[str, str, bytes]]:
    """Key, name and digests of some columns of every row."""
    entry = snapshot.manifest.datasets[dataset]
    firsts = dict(zip((shard.path for shard in entry.shards), _first_rows(entry), strict=True))
    for shard in shards:
        (path,) = _paths(snapshot, [shard])
        row = firsts[shard.path]
        own = _columns(path, entry)
        id_column = next((name for name in _ID_COLUMNS if name in own), None)
        with _reading(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH, columns=own if columns or not id_column else [id_column]):
                for values in plain_rows(batch):
                    digests = b"".join(_digest(values.get(column)) for column in columns)
                    known = "" if id_column is None else str(values[id_column] or "")
                    yield known or digests.hex(), known or row_name(dataset, row), digests
                    row += 1


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise SnapshotError(f"{path} cannot be read ({error})", "a whole Parquet file", "Get it again.") from error


def _digest(value: Any) -> bytes:
    # A column that a shard does not have is as one without a word in it.
    text = "" if value is None else repr(value) if not isinstance(value, str) else value
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def _differing(columns: Sequence[str], old: bytes, new: bytes) -> tuple[str, ...]:
    starts = range(0, len(old), _DIGEST_BYTES)
    names = (
        column
        for column, start in zip(columns, starts, strict=True)
        if old[start : start + _DIGEST_BYTES] != new[start : start + _DIGEST_BYTES]
    )
    return tuple(_FIELD_NAMES.get(name, name) for name in names)


def _columns(path: Path, entry: DatasetEntry) -> list[str]:
    with _reading(path):
        return [name for name in pq.read_schema(path).names if name not in _NOT_READ[entry.layout]]


def _paths(snapshot: Snapshot, shards: Sequence[ShardEntry]) -> list[Path]:
    paths = [shard.path for shard in shards]
    if snapshot.remote is not None:
        snapshot.remote.fetch(paths)
    return [snapshot.path / path for path in paths]


def _first_rows(entry: DatasetEntry) -> list[int]:
    firsts = [0]
    for shard in entry.shards:
        firsts.append(firsts[-1] + shard.rows)
    return firsts[:-1]


def _without_equal(
    ours: Sequence[ShardEntry], theirs: Sequence[ShardEntry]
) -> tuple[list[ShardEntry], list[ShardEntry]]:
    """Both without the shards that both have, each as often as both have it."""
    shared = Counter(shard.sha256 for shard in ours) & Counter(shard.sha256 for shard in theirs)

    def rest(shards: Sequence[ShardEntry]) -> list[ShardEntry]:
        left = Counter(shared)
        kept = []
        for shard in shards:
            if left[shard.sha256]:
                left[shard.sha256] -= 1
            else:
                kept.append(shard)
        return kept

    return rest(ours), rest(theirs)


def _compare_part(before: PretrainedEntry | None, after: PretrainedEntry | None) -> PretrainedDiff:
    ours, theirs = before.files if before else {}, after.files if after else {}
    files = tuple(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
    if before is None or after is None:
        return PretrainedDiff(state="went" if after is None else "came", files=files)
    manifest = _changes(before, after, ("licence", "path", "how"))
    return PretrainedDiff(state="changed" if files or manifest else "same", files=files, manifest=manifest)


def _changes(before: StrictModel, after: StrictModel, names: Sequence[str]) -> dict[str, ManifestChange]:
    pairs = ((name, getattr(before, name), getattr(after, name)) for name in names)
    return {name: ManifestChange(before=old, after=new) for name, old, new in pairs if old != new}


def _counts(dataset: DatasetDiff) -> tuple[int, int, int]:
    return dataset.came, dataset.went, dataset.changed


def _first(sign: str, shown: Sequence[str], count: int) -> list[str]:
    more = [f"  {sign} ... and {count - len(shown):,} more"] if count > len(shown) else []
    return [f"  {sign} {each}" for each in shown] + more
