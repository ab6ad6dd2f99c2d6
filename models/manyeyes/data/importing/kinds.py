"""``KINDS``: the formats that are imported, and how one is told from another."""

from __future__ import annotations

import fnmatch
import itertools
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass

from manyeyes.data.importing.json_files import JsonLinesReader, JsonListReader
from manyeyes.data.importing.places import IMAGE_SUFFIXES, Place
from manyeyes.data.importing.reading import MakeReader
from manyeyes.data.importing.stored_items import CocoReader, ImageFolderReader, list_coco_files
from manyeyes.data.importing.tables import ArrowReader, ParquetReader, list_saved_files
from manyeyes.data.importing.tars import TarReader
from manyeyes.data.source_items import Row, SourceItem, read_caption, read_captions, read_cauldron, read_conversation
from manyeyes.errors import DataError, did_you_mean

_TAR = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
# Of a folder: enough to see what is in it.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class ImportKind:
    """One format.

    Attributes:
        title: What it is, in words.
        suffixes: Of its data files, in lower case.
        reader: Makes its reader.
    """

    title: str
    suffixes: tuple[str, ...]
    reader: MakeReader


KINDS: dict[str, ImportKind] = {
    "json": ImportKind("a JSON list: LLaVA, Mini-Gemini, ShareGPT4V, Eagle", (".json",), JsonListReader),
    "jsonl": ImportKind("JSON Lines: Cambrian-1", (".jsonl", ".ndjson"), JsonLinesReader),
    "parquet": ImportKind("Parquet with the hub's image struct", (".parquet",), ParquetReader),
    "arrow": ImportKind("a folder that datasets saved (save_to_disk)", (".arrow",), ArrowReader),
    "webdataset": ImportKind("tar files of WebDataset", (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz"), TarReader),
    "folder": ImportKind("images with captions beside them or in metadata.jsonl or .csv", (), ImageFolderReader),
    "coco": ImportKind("COCO's captions and boxes", (".json",), CocoReader),
}


def guess_kind(place: Place, name: str) -> str:
    """Tell the kind of what somebody named.

    Args:
        place: Where it is.
        name: Of a file; empty for the folder itself.

    Raises:
        DataError: It cannot be told; the message names the kinds.
    """
    names = [name] if name else list(itertools.islice(place.walk(), _LOOKED_AT))
    found = {kind for kind in (_kind_of_file(place, known) for known in names) if kind}
    if name or not {"dataset_dict.json", "state.json"} & set(names):
        # Beside images, JSON may be anything; beside data, images are what it names.
        for kinds in ({"parquet"}, {"arrow"}, {"webdataset"}, {"coco"}, {"jsonl"}, {"json"}, {"folder"}):
            if found == kinds or (found - {"folder"} == kinds and "metadata" not in found):
                return next(iter(kinds))
        if "folder" in found:
            return "folder"
    elif "arrow" in found or any(known.endswith(".arrow") for known in names):
        return "arrow"
    lines = "; ".join(f"{kind} ({known.title})" for kind, known in KINDS.items())
    what = f"{len(found)} kinds ({', '.join(sorted(found))})" if found else "nothing that is known"
    raise DataError(
        f"what {posixpath.join(place.url, name)} is cannot be told: it holds {what}",
        f"one of {lines}",
        "Say it: --kind KIND, or name one file.",
    )


def _kind_of_file(place: Place, name: str) -> str:
    lower = name.lower()
    if posixpath.basename(lower) in ("metadata.jsonl", "metadata.csv"):
        return "metadata"
    if lower.endswith((".json", ".jsonl", ".ndjson")):
        if posixpath.basename(lower) in ("dataset_info.json", "state.json", "dataset_dict.json"):
            return ""
        return _kind_of_json(place, name)
    if _TAR.search(lower):
        return "webdataset"
    suffix = posixpath.splitext(lower)[1]
    if suffix in IMAGE_SUFFIXES:
        return "folder"
    return {".parquet": "parquet", ".arrow": "arrow"}.get(suffix, "")


def _kind_of_json(place: Place, name: str) -> str:
    with place.open(name) as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        return "json"
    if re.match(rb'\{\s*"(info|images|annotations|licenses|categories|type)"', head):
        return "coco"
    return "jsonl"


def list_data_files(kind: str, place: Place, name: str, *, split: str, pattern: str = "") -> tuple[str, ...]:
    """The data files of what somebody named, in the order in which they are read.

    Args:
        kind: A key of ``KINDS``.
        place: Where they are.
        name: The one file that was named; empty for the folder.
        split: Which one is read, where file names tell splits apart.
        pattern: Glob of the files of a known source; those that fit are read, all where none fits.

    Raises:
        DataError: No file of that kind.
    """
    if kind not in KINDS:
        raise DataError(f'kind is "{kind}"', f"one of {', '.join(KINDS)}", did_you_mean(kind, KINDS) or "See --help.")
    if kind == "folder":
        return ()
    if kind == "coco":
        if name:
            found = re.fullmatch(r"(?:captions|instances)_(.+)\.json", name)
            others = [f"{what}_{found[1]}.json" for what in ("captions", "instances")] if found else [name]
            there = [other for other in others if place.has(other)]
            return list_coco_files(there, source=place.url) if found else (name,)
        return list_coco_files(place.walk(), source=place.url)
    if name:
        return (name,)
    if kind == "arrow" and (place.find("state.json") is not None or place.find("dataset_dict.json") is not None):
        return list_saved_files(place, split=split)
    names = [known for known in place.walk() if known.lower().endswith(KINDS[kind].suffixes)]
    names = [known for known in names if fnmatch.fnmatch(known, pattern)] or names
    if kind in ("parquet", "arrow"):
        names = [known for known in names if _is_of_split(known, split)] or names
    if kind == "webdataset":
        names.sort()
    if not names:
        raise DataError(
            f"{place.url} has no file of kind {kind}", f"files ending in {', '.join(KINDS[kind].suffixes)}", "Name one."
        )
    return tuple(names)


def _is_of_split(name: str, split: str) -> bool:
    return posixpath.basename(name).startswith(split) or f"/{split}/" in f"/{name}"


def choose_converter(columns: list[str], kind: str) -> Callable[[Row], SourceItem]:
    """How items of a source without a row in ``SOURCES`` become turns, by their columns.

    Raises:
        DataError: The columns are none that are known; the message names them.
    """
    if kind == "coco":
        return read_captions
    if kind in ("folder", "webdataset"):
        return read_conversation_or_caption
    if {"conversations", "messages"} & set(columns):
        return read_conversation
    if {"images", "texts"} <= set(columns):
        return read_cauldron
    if {"caption", "text"} & set(columns) and {"image", "images"} & set(columns):
        return read_caption
    raise DataError(
        f"its items have {', '.join(columns) or 'no columns'}",
        "conversations or messages; images and texts; or image and caption",
        "Name the published set that it is: --source NAME (see: manyeyes data sources).",
    )


def read_conversation_or_caption(row: Row) -> SourceItem:
    """LLaVA's conversations where a row has them, else its caption."""
    return read_conversation(row) if "conversations" in row else read_caption(row)
