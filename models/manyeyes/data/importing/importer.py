"""Import a source into a snapshot: plan, share units out among processes, put their shards together, report.

What is done is kept in the cache until the end; stopped, the same command goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from manyeyes import __version__
from manyeyes.children import FAILED, describe_end, start_child, unpickle_error
from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.importing.import_report import ImportReport, draw_samples, render_import
from manyeyes.data.importing.kinds import choose_converter, guess_kind, list_data_files
from manyeyes.data.importing.places import open_place
from manyeyes.data.importing.reading import IdIndex, ImportUnit, require_columns
from manyeyes.data.importing.work import UNIT_IMAGES, UNIT_QUARANTINE, ImportJob, UnitSummary, UnitWorker
from manyeyes.data.quarantine import QUARANTINE_FILE
from manyeyes.data.sources_table import NOT_STATED, SOURCES
from manyeyes.errors import DataError, LockedError, ProcessLostError, did_you_mean
from manyeyes.storage import cache_dir, check_out, file_lock, link_or_copy, new_folder, storage_errors, write_file

ITEMS_PER_UNIT = 10_000
IMPORT_FILE, IMPORT_PAGE, IMPORT_NOTE = "import.json", "import.html", "import.md"
# Units of another version are not gone on with.
_FORMAT = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_IN_FLIGHT = 2
_END_S = 5.0


def import_data(
    url: str,
    out: Path,
    *,
    images: str = "",
    kind: str = "",
    source: str = "",
    name: str = "",
    split: str = "train",
    licence: str = "",
    answer_format: bool = False,
    processes: int = 1,
    items_per_unit: int = ITEMS_PER_UNIT,
    on_progress: Callable[[str, float], None] = lambda _sentence, _done: None,
) -> ImportReport:
    """Write the data set ``<name>-<split>`` into a snapshot folder.

    Every item becomes a record, or a line of ``quarantine.jsonl`` with its reason. The same source and options give the
    same bytes, whatever the number of processes. Memory holds one item a process, and 8 bytes for every item and image.

    Args:
        url: A file, a folder, or ``s3://``.
        out: The snapshot's folder; made when missing. ``out/<name>`` is replaced, the rest stays.
        images: What names of images are relative to; where the data files are when left out.
        kind: A key of ``KINDS``; guessed when left out.
        source: A key of ``SOURCES``, whose columns and turns are then expected.
        name: Of the data set and in front of ids; ``source``, or the file's or folder's name, when left out.
        split: Of the data set; the one that is read where the source has several.
        licence: SPDX name; what ``SOURCES`` says, or "not stated", when left out.
        answer_format: Put Cambrian-1's sentences about the form of the answer behind questions.
        processes: Which import side by side.
        items_per_unit: About how many items one process takes at a time.
        on_progress: Called with a sentence and the share that is done.

    Raises:
        DataError: Nothing there, a kind that cannot be told, a column that is missing, or a source that is broken.
        LockedError: Another process imports into the same place.
        StorageError: No space or no permission.
        ProcessLostError: A process ended before its time.
    """
    name = name or source or _name_of(url)
    for what, text in (("name", name), ("split", split)):
        if not _NAME.fullmatch(text) or (what == "split" and "." in text):
            raise DataError(f'{what} is "{text}"', "lower-case letters, digits and hyphens", f"Say: --{what} my-data")
    if source and source not in SOURCES:
        raise DataError(
            f'source is "{source}"',
            f"one of {', '.join(SOURCES)}",
            did_you_mean(source, SOURCES) or "See: manyeyes data sources",
        )
    check_out(out)
    row = SOURCES[source] if source else None
    place, file = open_place(url)
    kind = kind or guess_kind(place, file)
    # Not in the snapshot's folder: whatever lies there is part of it.
    place_of_work = hashlib.sha256(f"{out.resolve()} {name}".encode(errors="surrogateescape")).hexdigest()[:16]
    work = cache_dir() / "imports" / place_of_work
    job = ImportJob(
        kind=kind,
        url=place.url,
        names=list_data_files(kind, place, file, split=split, pattern=row.files if row else ""),
        images=images or place.url,
        name=name,
        source=source,
        answer_format=answer_format,
        split=split,
        items_per_unit=items_per_unit,
        work=work,
    )
    open_place(job.images)
    with file_lock(work.with_suffix(".lock"), taken=lambda owner: _taken(out / name, owner)), storage_errors(work):
        _check_first_item(job)
        units = _plan(job, on_progress)
        summaries = _run_units(job, units, processes=processes, on_progress=on_progress)
        on_progress("putting the shards together", 1.0)
        with new_folder(out / name) as folder:
            report = _put_together(job, folder, summaries, title=row.title if row else "")
        licence = licence or (row.licence if row else NOT_STATED)
        write_snapshot_manifest(out, provenance={f"{name}-{split}": Provenance(licence, _origin(job, report))})
        shutil.rmtree(work)
    return report


def _name_of(url: str) -> str:
    stem = re.sub(r"(\.(jsonl?|ndjson|parquet|arrow|tar|tgz|gz))+$", "", Path(url).resolve().name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", stem).strip("-.")


def _taken(folder: Path, owner: str) -> LockedError:
    return LockedError(
        f"process {owner} imports into {folder}", "one import into a place at a time", "Wait for it, or stop it."
    )


def _check_first_item(job: ImportJob) -> None:
    """Before hours of work: the columns that a source's row names, or some that are known."""
    if job.kind in ("folder", "coco"):
        return
    columns = job.reader().columns()
    if job.source:
        require_columns(columns, SOURCES[job.source].columns, source=job.source)
    elif columns:
        choose_converter(columns, job.kind)


def _plan(job: ImportJob, on_progress: Callable[[str, float], None]) -> list[ImportUnit]:
    """The units, from the work folder where it is of the same source and options, else anew."""
    key, file = _key(job), job.work / "plan.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["key"] == key:
            return [ImportUnit(**unit) for unit in known["units"]]
    shutil.rmtree(job.work, ignore_errors=True)
    job.work.mkdir(parents=True)
    ids = IdIndex()
    units = []
    for unit in job.reader().plan(ids):
        units.append(unit)
        on_progress(f"{len(ids):,} items found", 0.0)
    if not units:
        raise DataError(f"{job.url} has no items", "at least one sample", "Check the path and --kind.")
    np.save(job.work / "repeated.npy", ids.repeated())
    write_file(file, json.dumps({"key": key, "units": [asdict(unit) for unit in units]}))
    return units


def _key(job: ImportJob) -> str:
    place, _ = open_place(job.url)
    stamps = [place.stamp(name) for name in job.names]
    facts = [_FORMAT, __version__, {**asdict(replace(job, work=Path())), "work": ""}, stamps]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _run_units(
    job: ImportJob, units: Sequence[ImportUnit], *, processes: int, on_progress: Callable[[str, float], None]
) -> list[UnitSummary]:
    done: dict[int, UnitSummary] = {}
    total = sum(unit.items for unit in units)
    items = 0
    for number, summary in _results(job, units, processes=min(processes, len(units))):
        done[number] = summary
        items += summary.items
        if summary.items != units[number].items:
            raise DataError(
                f"unit {number} had {units[number].items} items and has {summary.items}: the source was changed",
                "a source that stays as it is",
                "Run it again; it begins anew.",
            )
        on_progress(f"{items:,} of {total:,} items", items / max(1, total))
    return [done[number] for number in range(len(units))]


def _results(job: ImportJob, units: Sequence[ImportUnit], *, processes: int) -> Iterator[tuple[int, UnitSummary]]:
    if processes <= 1:
        worker = UnitWorker(job)
        for number, unit in enumerate(units):
            yield number, worker.run(number, unit)
        return
    todo = deque(enumerate(units))
    with _children(job, processes) as children:
        in_flight = dict.fromkeys(children, 0)
        while True:
            # One is imported while the next one already lies there; each gets one before any gets two.
            while todo and in_flight[free := min(children, key=lambda known: in_flight[known])] < _IN_FLIGHT:
                in_flight[free] += 1
                with contextlib.suppress(OSError):  # it is gone, which its end says
                    free.send(todo.popleft())
            busy = [connection for connection, count in in_flight.items() if count]
            if not busy:
                return
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                in_flight[ready] -= 1
                yield _receive(ready, children[ready])


@contextmanager
def _children(job: ImportJob, processes: int) -> Iterator[dict[Connection, subprocess.Popen[bytes]]]:
    started = {}
    try:
        for _ in range(processes):
            process, connection = start_child("manyeyes.data.importing.process", environment={})
            started[connection] = process
            connection.send(job)
        yield started
    except BaseException:
        for process in started.values():
            process.kill()
        raise
    finally:
        for connection, process in started.items():
            connection.close()
            try:
                process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _receive(connection: Connection, process: subprocess.Popen[bytes]) -> tuple[int, UnitSummary]:
    try:
        message = connection.recv()
    except (EOFError, OSError) as error:
        process.kill()
        raise ProcessLostError(
            f"an importing process {describe_end(process.wait())}",
            "a process that stays until it is done",
            "Run the same command again: it goes on where it stopped; with fewer --processes where memory is short.",
        ) from error
    if message[0] == FAILED:
        raise unpickle_error(*message[1:], where="an importing process")
    _, number, summary = message
    return number, summary


def _put_together(job: ImportJob, folder: Path, summaries: Sequence[UnitSummary], *, title: str) -> ImportReport:
    shards = 0
    hashes = [np.zeros(0, np.uint64)]
    with (folder / QUARANTINE_FILE).open("wb") as quarantine:
        for number in range(len(summaries)):
            unit = job.unit_folder(number)
            for shard in sorted(unit.glob("*.parquet")):
                # A second name, not a move: killed here, nothing has to be done again.
                link_or_copy(shard, folder / f"{job.split}-{shards:05d}.parquet")
                shards += 1
            quarantine.write((unit / UNIT_QUARANTINE).read_bytes())
            hashes.append(np.load(unit / UNIT_IMAGES))
    counted: dict[str, Counter[str]] = {what: Counter() for what in ("reasons", "repairs", "sources")}
    for summary in summaries:
        for what, counter in counted.items():
            counter.update(getattr(summary, what))
    report = ImportReport(
        dataset=f"{job.name}-{job.split}",
        kind=job.kind,
        title=title,
        files=[name.rpartition("/")[2] for name in job.names[:20]],
        items=sum(summary.items for summary in summaries),
        kept=sum(summary.kept for summary in summaries),
        images=sum(summary.images for summary in summaries),
        distinct_images=len(np.unique(np.concatenate(hashes))),
        text_only=sum(summary.text_only for summary in summaries),
        shards=shards,
        **{what: dict(sorted(counter.items())) for what, counter in counted.items()},
    )
    if not report.kept:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in report.reasons.items())
        raise DataError(
            f"none of {report.items:,} items can be kept: {reasons}",
            "at least one sample",
            f"Look at {job.unit_folder(0) / UNIT_QUARANTINE}; names of images are relative to --images.",
        )
    write_file(folder / IMPORT_FILE, report.model_dump_json(indent=2) + "\n")
    write_file(folder / IMPORT_NOTE, report.as_markdown())
    samples, left_out = draw_samples(folder)
    write_file(folder / IMPORT_PAGE, render_import(report, samples=samples, left_out=left_out))
    return report


def _origin(job: ImportJob, report: ImportReport) -> str:
    what = f"{SOURCES[job.source].title} from " if job.source else ""
    files = ", ".join(report.files[:3]) or Path(job.url).name
    more = f" and {len(job.names) - 3} more" if len(job.names) > 3 else ""
    return f"{what}{files}{more} ({job.kind}); {report.quarantined:,} of {report.items:,} items left out"
