"""One unit of an import: items become records in shards, or lines of the quarantine.

A unit is a folder that appears when it is whole, so a kill costs no more than the units that were under way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from manyeyes.data.importing.kinds import KINDS, choose_converter
from manyeyes.data.importing.places import Place, open_place, read_named_image
from manyeyes.data.importing.reading import DataFiles, ImportedItem, ImportUnit, ItemReader, text_of_id
from manyeyes.data.importing.repairs import repair_turns
from manyeyes.data.quarantine import QuarantinedSample
from manyeyes.data.records import (
    ImageFile,
    Record,
    Turn,
    find_drawing_problem,
    find_encoding_problem,
    find_id_problem,
    find_placeholder_problem,
    find_role_problem,
    read_image_file,
)
from manyeyes.data.shards import ShardWriter
from manyeyes.data.source_items import ItemRefused, SourceItem
from manyeyes.data.sources_table import SOURCES, add_answer_format, choose_sentence, find_source
from manyeyes.errors import RecordError
from manyeyes.runtime.preprocess import decode_image
from manyeyes.storage import new_folder
from manyeyes.strict import StrictModel

UNIT_FILE, UNIT_QUARANTINE, UNIT_IMAGES = "unit.json", "quarantine.jsonl", "images.npy"
_SHARDS = "part"
# Sources of more names than a mixture has are counted together, so that counts stay small.
_MOST_SOURCES = 1000
_OTHERS = "(others)"


class UnitSummary(StrictModel):
    """``unit.json``: what became of a unit's items."""

    items: int
    kept: int
    images: int
    text_only: int
    reasons: dict[str, int]
    repairs: dict[str, int]
    sources: dict[str, int]


@dataclass(frozen=True)
class ImportJob:
    """Everything that a process needs to import a unit.

    Attributes:
        kind: A key of ``KINDS``.
        url: Of the place with the data files.
        names: Of the data files.
        images: Of the images' root.
        name: Of the data set, in front of ids.
        source: A key of ``SOURCES``; empty for none.
        answer_format: Whether Cambrian-1's sentences are put behind questions.
        split: Which one is read.
        items_per_unit: About how many items a unit has.
        work: Where units and the index are.
    """

    kind: str
    url: str
    names: tuple[str, ...]
    images: str
    name: str
    source: str
    answer_format: bool
    split: str
    items_per_unit: int
    work: Path

    def reader(self) -> ItemReader:
        """The reader of its kind."""
        place, _ = open_place(self.url)
        return KINDS[self.kind].reader(DataFiles(place, self.names, self.work, self.items_per_unit, self.split))

    def unit_folder(self, number: int) -> Path:
        """Where a unit's results are once it is done."""
        return self.work / "units" / f"{number:06d}"


class UnitWorker:
    """Imports units of a job.

    Args:
        job: What is imported.
    """

    def __init__(self, job: ImportJob) -> None:
        self._job = job
        self._reader = job.reader()
        self._images: Place = open_place(job.images)[0]
        self._repeated = np.load(job.work / "repeated.npy", mmap_mode="r")

    @cached_property
    def _convert(self) -> Any:
        if self._job.source:
            return SOURCES[self._job.source].read
        return choose_converter(self._reader.columns(), self._job.kind)

    def run(self, number: int, unit: ImportUnit) -> UnitSummary:
        """Import one unit, unless it is there.

        Args:
            number: Of the unit.
            unit: Where its items are.

        Raises:
            StorageError: No space or no permission.
            DataError: The source changed or broke since it was planned.
        """
        folder = self._job.unit_folder(number)
        if (folder / UNIT_FILE).is_file():
            return UnitSummary.model_validate_json((folder / UNIT_FILE).read_bytes())
        first, last = np.searchsorted(self._repeated, [unit.first, unit.first + unit.items])
        repeated = frozenset(self._repeated[first:last].tolist())
        with new_folder(folder) as new:
            summary = self._write(new, unit, repeated)
            (new / UNIT_FILE).write_text(summary.model_dump_json(), encoding="utf-8")
        return summary

    def _write(self, folder: Path, unit: ImportUnit, repeated: frozenset[int]) -> UnitSummary:
        reasons: Counter[str] = Counter()
        repairs: Counter[str] = Counter()
        sources: Counter[str] = Counter()
        hashes: list[int] = []
        items = kept = text_only = 0
        with (
            ShardWriter(folder, _SHARDS) as writer,
            (folder / UNIT_QUARANTINE).open("w", encoding="utf-8", newline="\n") as quarantine,
        ):
            for place, item in enumerate(self._reader.read(unit), start=unit.first):
                items += 1
                own: Counter[str] = Counter()
                record_id = self._record_id(item, place, repeated=place in repeated, repairs=own)
                try:
                    record = self._make_record(item, record_id, own)
                except ItemRefused as refused:
                    reasons[refused.kind] += 1
                    line = QuarantinedSample(
                        dataset=f"{self._job.name}-{self._job.split}",
                        row=place,
                        id=_printable(record_id),
                        reason=_printable(f"{refused.kind}: {refused.reason}"),
                    )
                    quarantine.write(line.model_dump_json() + "\n")
                    continue
                writer.write(record)
                repairs.update(own)
                kept += 1
                text_only += not record.images
                hashes += [int(image.sha256[:16], 16) for image in record.images]
                known = record.source in sources or len(sources) < _MOST_SOURCES
                sources[record.source if known else _OTHERS] += 1
        np.save(folder / UNIT_IMAGES, np.array(hashes, np.uint64))
        return UnitSummary(
            items=items,
            kept=kept,
            images=len(hashes),
            text_only=text_only,
            reasons=dict(sorted(reasons.items())),
            repairs=dict(sorted(repairs.items())),
            sources=dict(sorted(sources.items())),
        )

    def _record_id(self, item: ImportedItem, place: int, *, repeated: bool, repairs: Counter[str]) -> str:
        text = text_of_id(item.id)
        if item.refused is None:
            if text is None:
                repairs["id made of the place in the source"] += 1
            elif not isinstance(item.id, str):
                repairs["id made a text"] += 1
            if repeated:
                repairs["repeated id made unique"] += 1
        text = str(place) if text is None else text
        # What looks like such an ending gets one too, so no two ids can meet.
        ending = f"~{place}" if repeated or re.search(r"~\d+$", text) else ""
        return f"{self._job.name}/{text}{ending}"

    def _make_record(self, item: ImportedItem, record_id: str, repairs: Counter[str]) -> Record:
        if item.refused is not None or item.row is None:
            raise item.refused or ItemRefused("not JSON", "it is empty")
        found: SourceItem = self._convert(item.row)
        record = Record(
            id=record_id,
            source=self._source_of(item),
            images=tuple(self._read_image(image, repairs) for image in found.images),
            turns=repair_turns(found, repairs),
        )
        if self._job.answer_format:
            record = self._with_answer_format(record, repairs)
        for kind, problem in _find_problems(record):
            if problem is not None:
                raise ItemRefused(kind, str(problem))
        return record

    def _source_of(self, item: ImportedItem) -> str:
        source = item.row.get("source") if item.row and not self._job.source else None
        if isinstance(source, str) and source.strip():
            return re.sub(r"\.jsonl?$", "", source.strip())
        return self._job.source or self._job.name

    def _read_image(self, image: Any, repairs: Counter[str]) -> ImageFile:
        if isinstance(image, dict) and image.get("bytes"):
            data, path = image["bytes"], image.get("path") or "image"
        elif isinstance(image, bytes):
            data, path = image, "image"
        else:
            path = image.get("path") if isinstance(image, dict) else image
            if not isinstance(path, str) or not path:
                raise ItemRefused(
                    "bad column", f"image is a {type(image).__name__}; needed: a file's name or its bytes"
                )
            data, respelled = read_named_image(self._images, path)
            if respelled:
                repairs["image found under another spelling"] += 1
        try:
            image_file = read_image_file(data, path=path)
            decode_image(data)
        except RecordError as error:
            raise ItemRefused("bad image", error.found) from error
        return image_file

    @staticmethod
    def _with_answer_format(record: Record, repairs: Counter[str]) -> Record:
        row = find_source(record.source)
        if row is None:
            return record
        turns = list(record.turns)
        for place, turn in enumerate(turns[:-1]):
            if turn.speaker == "human":
                sentence = choose_sentence(turns[place + 1].text, row.answer_format, row.letter_format)
                turns[place] = Turn("human", add_answer_format(turn.text, sentence))
        if tuple(turns) != record.turns:
            repairs["sentence about the answer added"] += 1
        return replace(record, turns=tuple(turns))


def _find_problems(record: Record) -> Iterator[tuple[str, Any]]:
    """What ``check_record`` asks, by kind, but for images, which were decoded and measured when they were read."""
    yield "no id", find_id_problem(record.id)
    yield "text is not UTF-8", find_encoding_problem(record)
    yield "bad turns", find_role_problem(record.turns)
    yield "image marks and images differ", find_placeholder_problem(record.turns, num_images=len(record.images))
    yield "bad drawing", find_drawing_problem(record.turns)


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
