"""``python -m bench.loader``: batches of 1,000, 100,000 and 1,000,000 records, with 0 to 2 workers.

Each figure comes from a process of its own. Memory is the peak of the resident set while a mixture is built and 10,000
samples are read along it, and its growth over what the imports take; records a second are by the clock from the second
step on, the median of three rounds that take turns. A run whose batches are not the same with every number of workers
fails, and one whose memory grows by more than a tenth from 100,000 records to a million; 1,000 do not fill a window.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench import RESULTS, describe, write_result

SIZES = (1_000, 100_000, 1_000_000)
WORKERS = (0, 1, 2)
SPEED_ROUNDS = 3
SHARD_ROWS = 100_000
READ = 10_000
BATCH = 32
STEPS = 60
MOST_GROWTH = 1.1
DATASET = "records-train"


def make_data(folder: Path, rows: int) -> None:
    """A snapshot of records with an image each; files of a large one are links to one shard."""
    from PIL import Image

    from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
    from manyeyes.data.records import ImageFile, Record, Turn
    from manyeyes.data.shards import write_shards

    buffer = io.BytesIO()
    Image.effect_mandelbrot((96, 72), (-2, -1.2, 1, 1.2), 60).convert("RGB").save(buffer, "JPEG")

    def record(number: int) -> Record:
        data = buffer.getvalue() + number.to_bytes(4, "big")  # behind the end: each file is another one
        image = ImageFile(data, "image.jpg", hashlib.sha256(data).hexdigest(), 96, 72)
        turns = (Turn("human", f"<image>\nwhat is number {number % 1000}?"), Turn("gpt", f"set {number % 7}"))
        return Record(f"records/{number}", "made", (image,), turns)

    shards = write_shards(
        map(record, range(min(rows, SHARD_ROWS))), folder / "records", "train", rows_per_shard=SHARD_ROWS
    )
    for number in range(1, rows // SHARD_ROWS):
        os.link(shards[0], shards[0].with_name(f"train-{number:05d}.parquet"))
    write_snapshot_manifest(folder, provenance={DATASET: Provenance("CC0-1.0", "made for a benchmark")})


def open_mixture(folder: Path):  # type: ignore[no-untyped-def]
    """The mixture that is measured."""
    from manyeyes.data.mixture import Mixture
    from manyeyes.data.snapshot import Snapshot, SnapshotManifest
    from manyeyes.recipe import MixturePart

    manifest = SnapshotManifest.model_validate_json((folder / "manifest.json").read_bytes())
    return Mixture([MixturePart(dataset=DATASET, turns="chained")], Snapshot(folder, "0" * 32, manifest), seed=1)


def peak_mb() -> float:
    """The largest resident set of this process so far."""
    if sys.platform == "linux":  # ``getrusage`` counts what the process that started this one had, too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def measure_memory(folder: Path) -> dict[str, object]:
    """Build a mixture and read along it."""
    import manyeyes.data.mixture  # noqa: F401 (what imports take is not the mixture's)

    before = peak_mb()
    mixture = open_mixture(folder)
    seen = hashlib.sha256()
    for position in range(READ):
        seen.update(mixture.sample(*divmod(position, len(mixture))).record.id.encode())
    return {"peak_mb": peak_mb(), "growth_mb": peak_mb() - before, "order": seen.hexdigest()[:16]}


def measure_speed(folder: Path, workers: int, pretrained: Path) -> dict[str, object]:
    """Build batches, none of which is trained on."""
    import torch

    from manyeyes.model import build_processor
    from manyeyes.recipe import load_recipe
    from manyeyes.training.ahead import batch_stream, micro_batches
    from manyeyes.training.batches import BatchBuilder

    torch.set_num_threads(1)
    processor = build_processor(load_recipe("tiny").model, snapshot_path=pretrained)
    plan = partial(
        micro_batches, batch_size=BATCH, micro_batch_size=None, num_samples=BATCH * STEPS, rank=0, num_ranks=1
    )
    seen, started = hashlib.sha256(), 0.0
    with batch_stream(BatchBuilder(open_mixture(folder), processor), plan, steps=STEPS, workers=workers) as stream:
        stream.go_to(0)
        for step in range(STEPS):
            if step == 1:
                started = time.perf_counter()
            for batch in stream.next_step().batches:
                assert batch.chains is not None
                for tensor in (*batch.chains.values(), *batch.pixel_values.values()):
                    seen.update(tensor.numpy().tobytes())
    speed = BATCH * (STEPS - 1) / (time.perf_counter() - started)
    return {"records_per_s": speed, "batches": seen.hexdigest()[:16]}


def in_own_process(*arguments: object) -> dict[str, object]:
    """What a measurement in a fresh process found."""
    command = [sys.executable, "-m", "bench.loader", *map(str, arguments)]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> int:
    """Print two tables and write the figures; exit 1 if batches differ or memory grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("measure", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, *rest = arguments.measure
        found = measure_speed(Path(folder), int(rest[0]), Path(rest[1])) if rest else measure_memory(Path(folder))
        print(json.dumps(found))
        return 0

    from manyeyes.data.snapshot import open_snapshot, read_default_remote, read_dvc_file

    root = Path(__file__).resolve().parents[1]
    remote, md5 = str(root / read_default_remote(root)), read_dvc_file(root / "data.dvc").md5
    pretrained = open_snapshot(md5=md5, remote=remote, cache_dir=root / "runs" / "cache").path
    rows: list[dict[str, object]] = []
    peaks: dict[int, list[float]] = {}
    equal = True
    with tempfile.TemporaryDirectory() as temporary:
        for size in SIZES:
            folder = Path(temporary) / str(size)
            make_data(folder, size)
            peaks[size] = []
            speeds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
            batches, orders = set(), set()
            for number in range(arguments.rounds):
                memory = in_own_process(folder)
                peaks[size].append(float(str(memory["peak_mb"])))
                orders.add(memory["order"])
                for workers in WORKERS if number < SPEED_ROUNDS else ():
                    found = in_own_process(folder, workers, pretrained)
                    speeds[workers].append(float(str(found["records_per_s"])))
                    batches.add(found["batches"])
            equal = equal and len(batches) == len(orders) == 1
            rows.append(
                {
                    "records": size,
                    "peak_mb": statistics.median(peaks[size]),
                    "growth_mb": memory["growth_mb"],
                    "records_per_s": {str(workers): statistics.median(found) for workers, found in speeds.items()},
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    small, large = SIZES[1], SIZES[-1]
    result = describe(
        f"loading, the memory that it takes: {small:,} records / {large:,}",
        list(zip(peaks[small], peaks[large], strict=True)),
        goal=round(1 / MOST_GROWTH, 2),
        equal={"batches_by_number_of_workers": "the same" if equal else "differ", "equal": equal},
        measured="peak_mb",
    )
    failed = write_result({**result, "rows": rows}, arguments.out / "loader.json")
    return failed or int(result["ratio_median"] < 1 / MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
