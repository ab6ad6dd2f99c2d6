"""Images as texts: captions and boxes, from JSON Lines or from COCO's annotation files.

A line of JSON Lines: ``{"id": "1", "image": "a/1.jpg", "captions": ["A dog runs.", ...], "boxes": [{"category": "dog",
"box": [0.1, 0.2, 0.5, 0.9]}, ...]}``. A box is left, top, right and bottom, from 0 to 1, or in pixels where the line
has ``width`` and ``height``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from manyeyes.data.generation.dataset import UnusableItem
from manyeyes.data.generation.interview import RefusedError
from manyeyes.data.importing.places import FolderPlace
from manyeyes.data.importing.reading import DataFiles, IdIndex, ImportedItem
from manyeyes.data.importing.stored_items import CocoReader
from manyeyes.data.records import ImageFile, find_decoding_problem, read_image_file
from manyeyes.errors import DataError, RecordError
from manyeyes.storage import parse_json

_UNIT = 10_000
"""Items that are read at a time; all are joined on disk."""


@dataclass(frozen=True)
class PlacedObject:
    """Where something is.

    Attributes:
        category: What it is.
        corners: Left, top, right, bottom; 0 to 1 of the image's width and height.
    """

    category: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Description:
    """An image as a language model without eyes gets to know it.

    Attributes:
        id: Unique in its file.
        source: The file.
        image: Path below the folder of images.
        captions: A sentence each.
        boxes: Of what is in it.
    """

    id: str
    source: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[PlacedObject, ...]

    def as_text(self, *, boxes: bool) -> str:
        """One caption a line, then a blank line, then one box a line: ``dog: [0.100, 0.200, 0.500, 0.900]``.

        Args:
            boxes: Whether boxes are told.
        """
        text = "\n".join(self.captions)
        if not boxes or not self.boxes:
            return text
        places = [f"{box.category}: [{', '.join(f'{corner:.3f}' for corner in box.corners)}]" for box in self.boxes]
        return text + "\n\n" + "\n".join(places)


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of a file of JSON Lines, each with its name (``file:12``); a line that is none as its error.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                name = f"{path.name}:{number}"
                try:
                    yield name, parse_json(line.decode("utf-8-sig"))
                except ValueError as error:
                    yield name, error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror})", "a file of JSON Lines", "Check the path."
        ) from error


def read_descriptions(captions: Path, *, instances: Path | None = None) -> Iterator[Description | UnusableItem]:
    """Descriptions from JSON Lines (``.jsonl``), or from COCO's captions and, for boxes, its instances.

    Args:
        captions: The one or the other.
        instances: COCO's boxes.

    Raises:
        DataError: A file cannot be read, or is no file of COCO's.
    """
    if captions.suffix == ".jsonl":
        return _from_lines(captions)
    return _from_coco(captions, instances)


def _from_lines(path: Path) -> Iterator[Description | UnusableItem]:
    for name, line in read_lines(path):
        item_id = name
        try:
            if isinstance(line, ValueError):
                raise line
            item_id = str(line["id"])
            scale = (1.0, 1.0)
            if "width" in line and "height" in line:
                scale = float(line["width"]), float(line["height"])
            boxes = tuple(
                _box(str(box["category"]), [float(x) for x in box["box"]], scale) for box in line.get("boxes", ())
            )
            sentences = line["captions"]
            if not isinstance(sentences, list):
                raise ValueError("captions is no list")
            yield Description(item_id, path.name, str(line["image"]), _clean(sentences), boxes)
        except KeyError as error:
            yield UnusableItem(item_id, path.name, f"{name} has no {error.args[0]}; id, image and captions are needed")
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            yield UnusableItem(item_id, path.name, f"{name}: {error}; a description is needed")


def _from_coco(captions: Path, instances: Path | None) -> Iterator[Description | UnusableItem]:
    names = (captions.name,) if instances is None else (captions.name, str(instances.absolute()))
    items = 0
    with TemporaryDirectory(prefix="manyeyes-coco-") as work:
        reader = CocoReader(DataFiles(FolderPlace(captions.parent), names, Path(work), _UNIT, split=""))
        for unit in list(reader.plan(IdIndex())):
            for item in reader.read(unit):
                items += 1
                yield _from_coco_item(item, captions.name)
    if not items:
        raise DataError(
            f"{captions} has no images",
            "COCO's annotations",
            "Give captions_*.json first and instances_*.json as --instances, or JSON Lines that end in .jsonl.",
        )


def _from_coco_item(item: ImportedItem, source: str) -> Description | UnusableItem:
    item_id = str(item.id)
    if item.row is None:
        assert item.refused is not None
        return UnusableItem(item_id, source, f"image {item_id}: {item.refused.reason}")
    try:
        boxes = tuple(_box(name, corners, (1.0, 1.0)) for name, corners in item.row.get("boxes", ()))
        if not isinstance(item.row["image"], str):
            raise ValueError("it has no file_name")
    except (ValueError, TypeError) as error:
        return UnusableItem(item_id, source, f"image {item_id}: {error}")
    return Description(item_id, source, item.row["image"], _clean(item.row["captions"]), boxes)


def _box(category: str, corners: list[float], size: tuple[float, float]) -> PlacedObject:
    if len(corners) != 4:
        raise ValueError(f"a box has {len(corners)} numbers, not left, top, right and bottom")
    left, top, right, bottom = (value / size[place % 2] for place, value in enumerate(corners))
    # A pixel or two past the edge are common.
    if not (-0.01 <= left < right <= 1.01 and -0.01 <= top < bottom <= 1.01):
        raise ValueError(
            f"the box {json.dumps(corners)} of {category} is not inside its image of {size[0]:g} x {size[1]:g}"
        )
    return PlacedObject(category, (max(0.0, left), max(0.0, top), min(1.0, right), min(1.0, bottom)))


def _clean(sentences: list[Any]) -> tuple[str, ...]:
    return tuple(text for sentence in sentences if (text := " ".join(str(sentence).split())))


def load_image(root: Path, name: str) -> ImageFile:
    """An image below a folder, whole and decodable.

    Raises:
        RefusedError: It is not there, is elsewhere, or is no image.
    """
    place = root / name
    try:
        if not place.resolve().is_relative_to(root.resolve()):
            raise RefusedError(f"image {name} is outside of {root}; one inside is needed", step="image")
        image = read_image_file(place.read_bytes(), path=name)
    except OSError as error:
        raise RefusedError(
            f"image {name} cannot be read ({error.strerror}); a file below {root} is needed", step="image"
        ) from error
    except (RecordError, ValueError) as error:
        raise RefusedError(str(error), step="image") from error
    if (problem := find_decoding_problem([image])) is not None:
        raise RefusedError(str(problem), step="image")
    return image
