"""``manyeyes run`` killed with kill -9 in two stages, and started again: the weights of a run that never was.

``bench.kills`` kills training in every stage, twenty times.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from manyeyes.harness.events import EventReader
from tests.pipelines.checkout import Checkout, is_alive

STAGES = ["prealign_encoder[vit]", "sft"]
# Enough steps that these stages can be killed in the middle of its training.
LONGER = [
    *("--set", "stages.prealign.max_steps=40", "--set", "stages.prealign.epochs=14"),
    *("--set", "stages.sft.max_steps=40", "--set", "stages.sft.epochs=14"),
    *("--set", "stages.prealign.checkpoint_every_s=0.2", "--set", "stages.sft.checkpoint_every_s=0.2"),
]
# As on a machine of two cores and more.
TWO_PROCESSES = {"MANYEYES_PROCESSES": "2"}

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1500)]


def processes_in(folder: Path) -> set[int]:
    """Processes whose working directory is ``folder``."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_alive(int(entry.name)):
            try:
                if (entry / "cwd").resolve() == folder.resolve():
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


def kill_in(stage: str, checkout: Checkout) -> None:
    """Start the run, kill the command in the middle of ``stage``, and see that nothing goes on."""
    with checkout.start("run", "--recipe", "toy.yaml", *LONGER, **TWO_PROCESSES) as process:
        kill_during(stage, process, checkout)
    see_the_end(checkout)


def see_the_end(checkout: Checkout) -> None:
    """Nothing goes on for long after its run was killed."""
    deadline = time.monotonic() + 30
    while processes_in(checkout.path) and time.monotonic() < deadline:
        time.sleep(0.1)
    orphans = processes_in(checkout.path)
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert not orphans, "a process went on after its run was killed"


def kill_during(stage: str, process: subprocess.Popen[str], checkout: Checkout) -> None:
    """Wait for a training step of ``stage``, then kill -9 the command."""
    latest, seen, deadline = checkout.path / "runs" / "latest", None, time.monotonic() + 400
    before = latest.resolve() if latest.exists() else None
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{stage} did not begin"
        time.sleep(0.1)
        if not latest.exists() or latest.resolve() == before:
            continue
        seen = seen or EventReader(latest.resolve())
        if any(event.step == stage and event.figure.startswith("step ") for event in seen.read_new()):
            break
    time.sleep(0.5)
    process.kill()


def train(checkout: Checkout) -> tuple[str, int | None]:
    """Run until sft has ended: its checkpoint's digest, and the step that it went on from."""
    with checkout.start("run", "--recipe", "toy.yaml", *LONGER, **TWO_PROCESSES) as process:
        deadline = time.monotonic() + 600
        while True:
            found = [
                report
                for path in (checkout.path / "runs" / "work").glob("*/done/stage.json")
                if (report := json.loads(path.read_text(encoding="utf-8")))["stage"] == "sft"
            ]
            if found:
                break
            assert process.poll() is None, process.communicate()[0] + checkout.log()[-4000:]
            assert time.monotonic() < deadline, "sft did not end"
            time.sleep(0.2)
        process.kill()  # what follows trains nothing
    see_the_end(checkout)
    (sft,) = found
    return sft["checkpoint_digest"], sft["resumed_from_step"]


def test_run_killed_in_two_stages_equals_one_that_never_was(toy_checkout: Checkout, tmp_path: Path) -> None:
    killed = Checkout(tmp_path / "killed", toy_checkout.library, toy_checkout.environment)
    shutil.copytree(toy_checkout.path, killed.path, ignore=shutil.ignore_patterns("runs"))
    for stage in STAGES:
        kill_in(stage, killed)
    found, resumed = train(killed)
    expected, never = train(toy_checkout)
    assert found == expected
    assert resumed is not None
    assert never is None
