"""Small records, snapshots and remotes for the tests of manyeyes.data."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import ImageFile, Record, Turn, read_image_file
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import Snapshot, open_folder


def make_image(number: int = 0, *, size: tuple[int, int] = (8, 6)) -> ImageFile:
    buffer = io.BytesIO()
    colour = (number % 256, number // 256 % 256, 90)
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return read_image_file(buffer.getvalue(), path=f"{number}.png")


def make_record(number: int = 0, *, pairs: int = 2, num_images: int = 1, prefix: str = "toy") -> Record:
    turns: list[Turn] = []
    for pair in range(pairs):
        placeholders = "<image>\n" * num_images if pair == 0 else ""
        turns += [Turn("human", f"{placeholders}question {pair} of {number}?"), Turn("gpt", f"answer {pair}")]
    images = tuple(make_image(1000 * image + number) for image in range(num_images))
    return Record(id=f"{prefix}/{number}", source="toy", images=images, turns=tuple(turns))


def make_snapshot(folder: Path, splits: Mapping[str, Sequence[Record]], *, rows_per_shard: int = 1000) -> Snapshot:
    """Each split becomes the data set ``toy-<split>``."""
    for split, records in splits.items():
        write_shards(records, folder / "toy", split, rows_per_shard=rows_per_shard)
    write_snapshot_manifest(
        folder, provenance={f"toy-{split}": Provenance("CC0-1.0", "made for a test") for split in splits}
    )
    return open_folder(folder)


def lay_out_remote(folder: Path) -> tuple[str, dict[str, bytes]]:
    """The md5 of a folder and the objects of its DVC remote by key, made from DVC's documented layout alone."""
    objects: dict[str, bytes] = {}
    listing = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        if path.is_file():
            data = path.read_bytes()
            md5 = hashlib.md5(data).hexdigest()
            objects[f"files/md5/{md5[:2]}/{md5[2:]}"] = data
            listing.append({"md5": md5, "relpath": path.relative_to(folder).as_posix()})
    data = json.dumps(listing, sort_keys=True).encode()
    md5 = hashlib.md5(data).hexdigest()
    objects[f"files/md5/{md5[:2]}/{md5[2:]}.dir"] = data
    return md5, objects


def write_remote(folder: Path, objects: Mapping[str, bytes]) -> str:
    for key, data in objects.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    return str(folder)
