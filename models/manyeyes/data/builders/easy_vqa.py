"""easy-VQA: 4,000 training and 1,000 test images of one coloured shape each, with 48,248 questions.

Published by Victor Zhou as the PyPI package ``easy-vqa`` (MIT), from which the files are taken as they are. All
questions of an image become one record, in their published order, ``<image>`` in front of the first.

``easy-vqa-val`` holds 200 of the training images: those whose sha256 of ``easy-vqa-val/<number>`` is lowest. The draw
depends on nothing else, so it is the same everywhere and for ever; hyperparameters are chosen on these, never on the
test set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import PLACEHOLDER, Record, Turn, check_record, read_image_file
from manyeyes.data.shards import ShardWriter
from manyeyes.errors import SourceError
from manyeyes.storage import new_folder

NUM_VALIDATION_IMAGES = 200
# Two shards for the training set: small enough to look at, more than one so that nothing relies on there being one.
_ROWS_PER_SHARD = 2000
_LICENCE = "MIT"
_SOURCE = "PyPI easy-vqa 1.0 (Victor Zhou); questions of an image joined in one record"


def build_easy_vqa(out: Path) -> None:
    """Write ``easy-vqa-train``, ``easy-vqa-val`` and ``easy-vqa-test`` into a snapshot folder.

    The same package gives the same bytes.

    Args:
        out: The snapshot's folder; made when missing. ``out/easy-vqa`` is replaced, the rest stays.

    Raises:
        SourceError: The package is not installed, or not the version that is known.
        StorageError: No space or no permission.
    """
    package = _open_package()
    with new_folder(out / "easy-vqa") as folder:
        _write(folder, package=package)
    held_out = f"; the {NUM_VALIDATION_IMAGES} training images with the lowest sha256 of easy-vqa-val/<number>"
    others = f"; all training images but the {NUM_VALIDATION_IMAGES} of easy-vqa-val"
    write_snapshot_manifest(
        out,
        provenance={
            "easy-vqa-train": Provenance(_LICENCE, _SOURCE + others),
            "easy-vqa-val": Provenance(_LICENCE, _SOURCE + held_out),
            "easy-vqa-test": Provenance(_LICENCE, _SOURCE),
        },
    )


def draw_validation_images(numbers: set[int]) -> set[int]:
    """Draw the training images that are held out.

    Args:
        numbers: Of all training images.
    """
    return set(sorted(numbers, key=lambda number: _sha256(f"easy-vqa-val/{number}"))[:NUM_VALIDATION_IMAGES])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open_package() -> Traversable:
    try:
        version = metadata.version("easy-vqa")
    except metadata.PackageNotFoundError as error:
        raise SourceError("easy-vqa is not installed", "easy-vqa 1.0", "pip install easy-vqa==1.0") from error
    if version != "1.0":
        raise SourceError(f"easy-vqa {version} is installed", "easy-vqa 1.0", "pip install easy-vqa==1.0")
    return resources.files("easy_vqa")


def _write(folder: Path, *, package: Traversable) -> None:
    for split in ("train", "test"):
        records = list(_read_records(package / "data" / split, split=split))
        held_out = draw_validation_images({_number(record) for record in records}) if split == "train" else set()
        for name, chosen in (
            (split, [record for record in records if _number(record) not in held_out]),
            ("val", [record for record in records if _number(record) in held_out]),
        ):
            with ShardWriter(folder, name, rows_per_shard=_ROWS_PER_SHARD) as writer:
                for record in chosen:
                    writer.write(record)
    licence = metadata.distribution("easy-vqa").read_text("LICENSE")
    if licence is None:
        raise SourceError("easy-vqa has no LICENSE", "its licence", "pip install --force-reinstall easy-vqa==1.0")
    (folder / "LICENSE").write_text(licence, encoding="utf-8", newline="\n")


def _number(record: Record) -> int:
    return int(record.id.rpartition("/")[2])


def _read_records(split_folder: Traversable, *, split: str) -> Iterator[Record]:
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((split_folder / "questions.json").read_text(encoding="utf-8")):
        questions.setdefault(number, []).append((question, answer))
    for number, pairs in sorted(questions.items()):
        name = f"{number}.png"
        image = read_image_file((split_folder / "images" / name).read_bytes(), path=name)
        turns: list[Turn] = []
        for question, answer in pairs:
            prefix = "" if turns else f"{PLACEHOLDER}\n"
            turns += [Turn("human", prefix + question), Turn("gpt", answer)]
        record = Record(id=f"easy-vqa/{split}/{number}", source="easy-vqa", images=(image,), turns=tuple(turns))
        check_record(record)
        yield record
