"""``python -m bench.importing``: 20,000 to 1,000,000 samples of a JSON list become a data set, on two processes.

Each size is imported by a process of its own. Seconds are by the clock; memory is the peak of the resident set of the
process that plans, and of the larger one of those that import. One process imports 20,000 too: the bytes must be the
same. A run fails where they differ, where a sample is lost, where a process takes 2 GiB, or where memory at a
million is more than half again what it is at 20,000.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.loader import peak_mb

SIZES = (20_000, 100_000, 1_000_000)  # the first is of two units, so two processes share it
IMAGES = 1_000
# Of each hundred: an image that is missing, a mark at the end of its turn, a text without an image.
MISSING, MOVED, TEXT = 3, 5, 7
MOST_MB = 2048
MOST_GROWTH = 1.5


def make_source(folder: Path, size: int) -> None:
    """A list in LLaVA's format, of about 600 bytes a sample."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        buffer = io.BytesIO()
        Image.effect_mandelbrot((96, 72), (-2, -1.2, 1 + number / IMAGES, 1.2), 30).convert("RGB").save(buffer, "JPEG")
        (folder / "images" / f"{number}.jpg").write_bytes(buffer.getvalue())
    with (folder / f"{size}.json").open("w", encoding="utf-8") as file:
        for number in range(size):
            kind = number % 100
            question = "what is it? <image>" if kind == MOVED else "<image>\nwhat is it?"
            turns = [
                {"from": "human", "value": question},
                {"from": "gpt", "value": f"{number}: " + "a long answer, " * 30},
            ]
            sample = {"id": number, "image": f"{number % IMAGES}.jpg", "conversations": turns}
            if kind == MISSING:
                sample["image"] = "gone.jpg"
            elif kind == TEXT:
                del sample["image"]
                turns[0]["value"] = "what is it?"
            file.write(("," if number else "[") + json.dumps(sample) + "\n")
        file.write("]")


def measure(folder: Path, size: int, processes: int) -> dict[str, object]:
    """Import one size, in this process and the ones that it starts."""
    from manyeyes.data.importing import import_data
    from manyeyes.data.snapshot import hash_folder

    os.environ["MANYEYES_CACHE"] = str(folder / "cache")
    out = folder / f"out-{size}-{processes}"
    started = time.perf_counter()
    report = import_data(
        str(folder / f"{size}.json"), out, images=str(folder / "images"), name="made", processes=processes
    )
    seconds = time.perf_counter() - started
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "samples": size,
        "processes": processes,
        "seconds": seconds,
        "cpu_s": own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime,
        "planning_peak_mb": peak_mb(),
        "importing_peak_mb": max(others.ru_maxrss / 1024, 0.0 if processes > 1 else peak_mb()),
        "whole": report.kept + report.reasons["image missing"] == size
        and report.reasons["image missing"] == size // 100,
        "md5": hash_folder(out),
    }


def main() -> int:
    """Print the figures and write them; exit 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("measure", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, size, processes = arguments.measure
        print(json.dumps(measure(Path(folder), int(size), int(processes))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in arguments.sizes:
            make_source(Path(temporary), size)
            for processes in (1, 2) if size == arguments.sizes[0] else (2,):
                command = [sys.executable, "-m", "bench.importing", temporary, str(size), str(processes)]
                rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    peaks = [max(row["planning_peak_mb"], row["importing_peak_mb"]) for row in rows if row["processes"] == 2]
    kept = {
        "the same bytes from one process and two": rows[0]["md5"] == rows[1]["md5"],
        "no sample lost": all(row["whole"] for row in rows),
        "below 2 GiB": max(peaks) < MOST_MB,
        "flat": peaks[-1] <= MOST_GROWTH * peaks[0],
    }
    result = {"kept": kept, "cores": os.cpu_count(), "load": round(os.getloadavg()[1], 1), "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (arguments.out / "importing.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
