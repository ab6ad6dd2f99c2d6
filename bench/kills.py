"""``python -m bench.kills``: three stages on two processes, killed again and again, against a run never killed.

Each kill is ``kill -9`` of the whole process group at a random time of a training, one process of the two every other
time. The checkpoint digests of the last stage must be the same. Beside it stands what running checkpoints cost: the
share of the training time in which it waited for them, with one wanted every fifth of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PROCESSES = 2
EVERY_S = 0.2
MOST_STALL = 0.05
# What a stage is run by: a process of its own, so that it can be killed.
STAGE = """
import sys
from pathlib import Path
from manyeyes.data.snapshot import open_folder
from manyeyes.recipe import Recipe
from manyeyes.training.launch import launch_stage
folder, work, stage, processes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
inputs = {
    "prealign": {"encoder": "left"},
    "pretrain": {"encoder_checkpoints": {"left": work / "out-prealign"}},
    "sft": {"checkpoint": work / "out-pretrain"},
}
launch_stage(
    Recipe.model_validate_json((folder / "recipe.json").read_text(encoding="utf-8")),
    stage,
    processes=processes,
    threads=1,
    snapshot=open_folder(folder / "data"),
    code_digest="bench",
    out=work / f"out-{stage}",
    work_dir=work / "work",
    on_progress=lambda progress: (work / "at").write_text(f"{stage} {progress.step}", encoding="utf-8"),
    **inputs[stage],
)
"""
STAGES = ("prealign", "pretrain", "sft")


def make(folder: Path, *, epochs: int) -> None:
    """A snapshot and a recipe of three stages."""
    from tests.training_toys import toy_recipe, toy_snapshot

    toy_snapshot(folder / "data")
    recipe = toy_recipe(epochs=epochs, checkpoint_every_s=EVERY_S)
    (folder / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")


def start(folder: Path, work: Path, stage: str) -> subprocess.Popen[bytes]:
    """The process of a stage, with a group of its own."""
    command = [sys.executable, "-c", STAGE, str(folder), str(work), stage, str(PROCESSES)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


def run_killed(folder: Path, work: Path, *, kills: int, seed: int) -> int:
    """Run the stages and kill them so often, at random; the number of kills that met a training."""
    generator = random.Random(seed)
    shares = [kills // len(STAGES) + (number < kills % len(STAGES)) for number in range(len(STAGES))]
    done = 0
    for stage, left in zip(STAGES, shares, strict=True):
        while not (work / f"out-{stage}").exists():
            (work / "at").unlink(missing_ok=True)
            process = start(folder, work, stage)
            if left:
                while process.poll() is None and not (work / "at").exists():
                    time.sleep(0.02)
                time.sleep(generator.uniform(0, 1.5))
                if process.poll() is None:
                    victim = _rank(process.pid) if left % 2 else None
                    with suppress(ProcessLookupError):
                        if victim is None:
                            os.killpg(process.pid, signal.SIGKILL)
                        else:
                            os.kill(victim, signal.SIGKILL)
                    left, done = left - 1, done + 1
            process.wait()
    return done


def _rank(parent: int) -> int | None:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    found = [int(line) for line in listed.stdout.split()]
    return found[-1] if found else None


def reports(work: Path) -> list[dict[str, object]]:
    """What each stage says of itself."""
    return [json.loads((work / f"out-{stage}" / "stage.json").read_text(encoding="utf-8")) for stage in STAGES]


def main() -> int:
    """Print one line; exit 1 where the digests differ or training waited too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=300, help="Of each stage, of three steps each.")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, epochs=arguments.epochs)
        works = [folder / "never", folder / "killed"]
        for work in works:
            work.mkdir()
        run_killed(folder, works[0], kills=0, seed=0)
        began = time.monotonic()
        done = run_killed(folder, works[1], kills=arguments.kills, seed=arguments.seed)
        seconds = time.monotonic() - began
        never, killed = (reports(work) for work in works)
    equal = all(
        one["checkpoint_digest"] == other["checkpoint_digest"] for one, other in zip(never, killed, strict=True)
    )
    stalled, trained = (sum(float(str(each[key])) for each in never) for key in ("checkpoint_stall_s", "seconds"))
    stall = stalled / trained
    verdict = f"{'equal' if equal else 'DIFFERENT'}: {str(never[-1]['checkpoint_digest'])[:12]}"
    print(f"| {done} kills over {len(STAGES)} stages on {PROCESSES} processes, {seconds:,.0f} s | {verdict} ", end="")
    print(f"| waited {stall:.1%} of the time for running checkpoints, one wanted every {EVERY_S} s |")
    return 0 if equal and stall < MOST_STALL and done == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
