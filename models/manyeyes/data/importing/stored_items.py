"""Kinds whose items lie in many places are joined on disk first, in SQLite, so that memory does not grow with them."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from manyeyes.data.importing.json_files import JsonWindow, find_json_lines, parse_item
from manyeyes.data.importing.places import IMAGE_SUFFIXES
from manyeyes.data.importing.reading import DataFiles, IdIndex, ImportedItem, ImportUnit, text_of_id
from manyeyes.data.source_items import ItemRefused
from manyeyes.errors import DataError

_CAPTION_FILES = (".txt", ".caption")
_METADATA = ("metadata.jsonl", "metadata.csv")
# Whose values are many; other lists of a COCO file are a few lines.
_COCO_LISTS = ("images", "annotations", "categories")


class _StoredReader(ABC):
    """Items as JSON in SQLite, numbered; a unit is a range of numbers."""

    def __init__(self, files: DataFiles) -> None:
        self._files = files
        self._path = files.work / "items.db"

    def columns(self) -> list[str]:
        """What the first item has."""
        return []

    def plan(self, ids: IdIndex) -> Iterator[ImportUnit]:
        """Join the items, then cut them into ranges."""
        self._path.unlink(missing_ok=True)
        with closing(sqlite3.connect(self._path)) as store:
            # A kill begins the index anew, so nothing of it needs to be safe.
            store.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE;")
            store.execute("CREATE TABLE items (number INTEGER PRIMARY KEY, row TEXT)")
            rows = ((number, json.dumps(self._noted(row, ids))) for number, row in enumerate(self._join(store)))
            store.executemany("INSERT INTO items VALUES (?, ?)", rows)
            store.commit()
        step = self._files.items_per_unit
        for first in range(0, len(ids), step):
            yield ImportUnit(first, min(step, len(ids) - first), {})

    def read(self, unit: ImportUnit) -> Iterator[ImportedItem]:
        """The items of a unit."""
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)) as store:
            wanted = (unit.first, unit.first + unit.items)
            for (text,) in store.execute(
                "SELECT row FROM items WHERE number >= ? AND number < ? ORDER BY number", wanted
            ):
                row = json.loads(text)
                problem = row.pop("problem", None)
                refused = ItemRefused(*problem) if problem else None
                yield ImportedItem(row.get("id"), self._completed(row) if refused is None else None, refused)

    @staticmethod
    def _noted(row: Mapping[str, Any], ids: IdIndex) -> Mapping[str, Any]:
        ids.add(row.get("id"))
        return row

    @abstractmethod
    def _join(self, store: sqlite3.Connection) -> Iterator[Mapping[str, Any]]:
        """The items, from tables made in the store."""

    @abstractmethod
    def _completed(self, row: dict[str, Any]) -> dict[str, Any]:
        """An item with what is not in the store."""


class ImageFolderReader(_StoredReader):
    """Images with captions beside them (``a.jpg``, ``a.txt``), or in ``metadata.jsonl`` or ``metadata.csv``.

    The metadata has ``file_name`` and ``caption``, ``text`` or ``conversations``, as the hub's image folders.
    """

    def _join(self, store: sqlite3.Connection) -> Iterator[Mapping[str, Any]]:
        # Names as JSON: SQLite takes no name that is not UTF-8.
        store.execute("CREATE TABLE named (name TEXT, place INTEGER PRIMARY KEY, row TEXT)")
        store.execute("CREATE TABLE found (name TEXT PRIMARY KEY) WITHOUT ROWID")
        for name in self._files.place.walk():
            if posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                store.execute("INSERT INTO found VALUES (?)", (json.dumps(name),))
            elif posixpath.basename(name) in _METADATA:
                store.executemany("INSERT INTO named (name, row) VALUES (?, ?)", self._metadata(name))
        store.execute("CREATE INDEX names ON named (name)")
        everything = (
            "SELECT name, place, row FROM named UNION ALL "
            "SELECT name, 0, NULL FROM found WHERE name NOT IN (SELECT name FROM named) ORDER BY 1, 2"
        )
        for name, _, text in store.execute(everything):
            row = json.loads(text) if text else {}
            found = json.loads(name)
            yield {**row, "id": row.get("id", found), "image": found}

    def _metadata(self, name: str) -> Iterator[tuple[str, str]]:
        folder = posixpath.dirname(name)
        for number, row in enumerate(self._metadata_rows(name), start=1):
            file_name = row.get("file_name")
            if not isinstance(file_name, str) or not file_name:
                problem = ("no file name", f"{name}, row {number}: it has no file_name; needed: the image's name")
                yield json.dumps(f"{name}#{number}"), json.dumps({"problem": problem})
            else:
                yield json.dumps(posixpath.normpath(posixpath.join(folder, file_name))), json.dumps(row)

    def _metadata_rows(self, name: str) -> Iterator[Mapping[str, Any]]:
        with self._files.place.open(name) as stream:
            if name.endswith(".csv"):
                with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
                    yield from csv.DictReader(text)
                return
            for _, raw in find_json_lines(stream, name=name):
                yield parse_item(raw).row or {}

    def _completed(self, row: dict[str, Any]) -> dict[str, Any]:
        if not {"caption", "text", "captions", "conversations"} & row.keys():
            stem = posixpath.splitext(row["image"])[0]
            for suffix in _CAPTION_FILES:
                found = self._files.place.find(stem + suffix)
                if found is not None:
                    return {**row, "caption": found.decode("utf-8-sig", errors="surrogateescape")}
        return row


class CocoReader(_StoredReader):
    """COCO's ``captions_*.json`` and ``instances_*.json``: one item an image, with its captions and boxes."""

    def _join(self, store: sqlite3.Connection) -> Iterator[Mapping[str, Any]]:
        store.execute("CREATE TABLE images (id TEXT, name TEXT, width REAL, height REAL)")
        store.execute("CREATE TABLE notes (image TEXT, caption TEXT, category TEXT, box TEXT)")
        categories: dict[str, str] = {}
        for number, name in enumerate(self._files.names):
            self._read_file(store, name, categories, images=number == 0)
        store.execute("CREATE INDEX images_by_id ON images (id)")
        store.execute("CREATE INDEX notes_by_image ON notes (image)")
        for image, name, width, height in store.execute("SELECT * FROM images ORDER BY rowid"):
            notes = store.execute("SELECT caption, category, box FROM notes WHERE image = ? ORDER BY rowid", (image,))
            yield _coco_item(image, json.loads(name), width, height, notes.fetchall(), categories)
        orphans = "SELECT DISTINCT image FROM notes WHERE image NOT IN (SELECT id FROM images) ORDER BY image"
        for (image,) in store.execute(orphans):
            problem = ("image missing", f'annotations name the image "{image}"; needed: it in the list of images')
            yield {"id": image, "problem": problem}

    def _completed(self, row: dict[str, Any]) -> dict[str, Any]:
        return row

    def _read_file(self, store: sqlite3.Connection, name: str, categories: dict[str, str], *, images: bool) -> None:
        for what, raw in self._lists(name):
            row = parse_item(raw.encode("latin-1")).row or {}
            if what == "categories":
                categories[str(row.get("id"))] = str(row.get("name"))
            elif what == "images" and images:
                facts = (str(row.get("id")), json.dumps(row.get("file_name")), row.get("width"), row.get("height"))
                store.execute("INSERT INTO images VALUES (?, ?, ?, ?)", facts)
            elif what == "annotations":
                caption = row.get("caption")
                note = (
                    str(row.get("image_id")),
                    json.dumps(caption) if caption is not None else None,
                    text_of_id(row.get("category_id")),
                    json.dumps(row.get("bbox")),
                )
                store.execute("INSERT INTO notes VALUES (?, ?, ?, ?)", note)

    def _lists(self, name: str) -> Iterator[tuple[str, str]]:
        with self._files.place.open(name) as stream:
            window = JsonWindow(stream, name=name)
            window.expect("{", "at the start of a COCO file")
            while window.peek() != "}":
                key = window.value()[0].strip('"')
                window.expect(":", "behind a key")
                if key in _COCO_LISTS:
                    window.expect("[", f'at the start of "{key}"')
                    yield from ((key, text) for _, text in window.items())
                else:
                    window.value()
                if window.peek() == ",":
                    window.expect(",", "between keys")


def _coco_item(
    image: str, name: Any, width: Any, height: Any, notes: Iterable[tuple[Any, ...]], categories: Mapping[str, str]
) -> dict[str, Any]:
    captions, boxes = [], []
    for caption, category, box in notes:
        if caption is not None:
            captions.append(json.loads(caption))
        elif category is not None:
            boxes.append((categories.get(category, category), json.loads(box)))
    item = {"id": image, "image": name, "captions": captions}
    if not boxes:
        return item
    try:
        return {**item, "boxes": [(label, _in_fractions(box, width, height)) for label, box in boxes]}
    except (TypeError, ValueError, ZeroDivisionError):
        problem = ("bad box", f"boxes of an image of {width} x {height}; needed: [x, y, width, height] in pixels")
        return {"id": image, "problem": problem}


def _in_fractions(box: Any, width: float, height: float) -> list[float]:
    x, y, box_width, box_height = box
    return [x / width, y / height, (x + box_width) / width, (y + box_height) / height]


def list_coco_files(names: Iterable[str], *, source: str) -> tuple[str, ...]:
    """The one set of COCO files among some names: captions first, then instances.

    Raises:
        DataError: None, or several.
    """
    sets: dict[str, dict[str, str]] = {}
    for name in names:
        found = re.fullmatch(r"(captions|instances)_(.+)\.json", posixpath.basename(name), re.IGNORECASE)
        if found:
            sets.setdefault(found[2], {})[found[1].lower()] = name
    if len(sets) != 1:
        raise DataError(
            f"{source} has {', '.join(sorted(sets)) or 'no'} COCO annotations",
            "captions_NAME.json, instances_NAME.json, or both, of one NAME",
            f"Name one file, for instance {source}/captions_{min(sets)}.json." if sets else "Name a file.",
        )
    (found_set,) = sets.values()
    return tuple(found_set[what] for what in ("captions", "instances") if what in found_set)
