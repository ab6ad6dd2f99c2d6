"""``python -m bench.validation``: ``data validate`` and ``data curate`` over 10,000 and 100,000 records (``--sizes``).

Each size is measured in processes of their own: validated from nothing, again after one shard in ten changed, and
curated by the recipe ``clean``. Seconds are those of the processor; memory is the peak of the resident set, libraries
included. A run fails where the profile of what changed is not that of a whole reading byte for byte, where a shard that
did not change is read, where a record is lost, or where memory at the largest size is more than half again what it is
at the smallest.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.loader import peak_mb

SIZES = (10_000, 100_000)
SHARDS = 10
IMAGES = 1_000
BAD_OF = 1_000  # one record in so many has no answer
MOST_GROWTH = 1.5
DATASET = "records-train"


def make_images(number: int) -> list[bytes]:
    """Small pictures, all different."""
    from PIL import Image

    files = []
    for place in range(number):
        buffer = io.BytesIO()
        Image.effect_mandelbrot((96, 72), (-2, -1.2, 1 + place / number, 1.2), 30).convert("RGB").save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def make_snapshot(folder: Path, size: int, *, images: list[bytes], changed: int = 0, shards: int = SHARDS) -> None:
    """Records of about 250 characters.

    Args:
        folder: To write.
        size: Records.
        images: What they are about, in turn.
        changed: How many of the shards, from the last on, have other words in their second record.
        shards: Into how many they are written.
    """
    from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
    from manyeyes.data.records import Record, Turn, read_image_file
    from manyeyes.data.shards import write_shards

    files = [read_image_file(data, path=f"{number}.jpg") for number, data in enumerate(images)]
    rows = size // shards

    def records() -> Iterator[Record]:
        for number in range(size):
            other = number % rows == 1 and number // rows >= shards - changed  # the first one has no answer
            answer = f"{number}{', or so' if other else ''}: " + "a long answer, " * 15
            turns = (Turn("human", f"<image>\nwhat is number {number % 1000}?"), Turn("gpt", answer))
            yield Record(
                f"records/{number}",
                f"source-{number % 7}",
                (files[number % len(files)],),
                turns if number % BAD_OF else turns[:1],
            )

    write_shards(records(), folder / "records", "train", rows_per_shard=rows)
    write_snapshot_manifest(folder, provenance={DATASET: Provenance("CC0-1.0", "made for a benchmark")})


def measure(task: str, folder: Path, cache: Path, out: Path) -> dict[str, object]:
    """One task in this process."""
    os.environ["MANYEYES_CACHE"] = str(cache)
    import great_expectations  # noqa: F401 (what imports take is not the snapshot's)

    from manyeyes.data import profile
    from manyeyes.data.curation.curate import curate, open_inputs
    from manyeyes.data.curation.recipe import load_curation_recipe
    from manyeyes.data.snapshot import open_folder
    from manyeyes.data.validation import validate_snapshot

    read: list[str] = []
    original = profile._read_groups

    def watched(path: Path) -> object:
        read.append(path.name)
        return original(path)

    profile._read_groups = watched  # type: ignore[assignment]
    before, started = peak_mb(), time.process_time()
    if task == "curate":
        recipe = load_curation_recipe("clean")
        rows = curate(recipe, open_inputs(recipe, snapshot=str(folder)), out, cache_dir=cache).samples
        bad = -1
    else:
        report = validate_snapshot(
            open_folder(folder),
            datasets=[DATASET],
            eval_datasets=[],
            suite="conversations",
            out_dir=out,
            cache_dir=cache / "profiles",
        )
        rows, bad = report.rows, report.quarantined
    return {
        "task": task,
        "records": rows,
        "bad": bad,
        "cpu_s": time.process_time() - started,
        "peak_mb": peak_mb(),
        "growth_mb": peak_mb() - before,
        "shards_read": len(read),
    }


def in_own_process(*arguments: object) -> dict[str, object]:
    """What a measurement in a fresh process found."""
    command = [sys.executable, "-m", "bench.validation", "--measure", *map(str, arguments)]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def measure_size(folder: Path, size: int, images: list[bytes]) -> list[dict[str, object]]:
    """All tasks at one size."""
    for name, changed in (("first", 0), ("second", 1)):
        make_snapshot(folder / name, size, images=images, changed=changed)
    cache = folder / "cache"
    rows = [
        in_own_process("validate", folder / "first", cache, folder / "1"),
        in_own_process("validate again", folder / "second", cache, folder / "2"),
        in_own_process("validate all", folder / "second", folder / "other", folder / "3"),
        in_own_process("curate", folder / "first", cache, folder / "4"),
    ]
    digests = {hashlib.sha256((folder / out / "profile.parquet").read_bytes()).hexdigest() for out in "23"}
    for row in rows:
        row["whole"] = row["records"] == size and row["bad"] in (-1, size // BAD_OF) and len(digests) == 1
    return rows


def main() -> int:
    """Print the figures and write them; exit 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        task, *folders = arguments.measure
        print(json.dumps(measure(task, *map(Path, folders))))
        return 0
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            rows += measure_size(Path(temporary), size, make_images(IMAGES))
    peaks = {
        task: [float(str(row["peak_mb"])) for row in rows if row["task"] == task] for task in ("validate", "curate")
    }
    kept = {
        "no record lost, and the profile of what changed is the whole one": all(row["whole"] for row in rows),
        "only shards that changed are read": all(row["shards_read"] == 1 for row in rows if "again" in str(row)),
        **{f"{task} is flat": found[-1] <= MOST_GROWTH * found[0] for task, found in peaks.items()},
    }
    result = {"kept": kept, "cores": os.cpu_count(), "load": round(os.getloadavg()[1], 1), "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (arguments.out / "validation.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
