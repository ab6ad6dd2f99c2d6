"""What is needed to get an evaluation's figures again: command, recipe, machine and versions; no names of hosts."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import yaml

from manyeyes import __version__
from manyeyes.evaluation.report.contents import EvaluationRun, Machine, Reproduction
from manyeyes.recipe import Recipe

_LIBRARIES = {
    "torch": ("torch", "transformers", "timm", "tokenizers", "pillow", "numpy"),
    "bundle": ("onnxruntime-gpu", "onnxruntime", "tokenizers", "pillow", "numpy"),
}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


def describe_reproduction(
    kind: str, *, benchmarks: Sequence[str], recipe: Recipe | None, data_md5: str, argv: Sequence[str] | None = None
) -> Reproduction:
    """What this process knows.

    Args:
        kind: ``torch`` or ``bundle``.
        benchmarks: Those that it answered.
        recipe: What was asked; ``None`` where it is not at hand.
        data_md5: Of the snapshot.
        argv: Command line; this process's own when left out.
    """
    text = "" if recipe is None else yaml.safe_dump(json.loads(recipe.canonical_json()), sort_keys=False, width=100)
    return Reproduction(
        command=f"manyeyes evaluate MODEL --recipe recipe.yaml --data-md5 {data_md5}",
        started_as=_shorten_command(sys.argv if argv is None else argv),
        recipe=text,
        runs=[
            EvaluationRun(
                benchmarks=list(benchmarks),
                finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
                machine=describe_machine(),
                versions=list_versions(kind),
            )
        ],
    )


def merge_runs(runs: Sequence[EvaluationRun]) -> list[EvaluationRun]:
    """Runs of several reports; those of one machine and the same versions become one."""
    merged: dict[str, EvaluationRun] = {}
    for run in runs:
        key = json.dumps([run.machine.model_dump(), run.versions], sort_keys=True)
        before = merged.get(key)
        if before is not None:
            names = [*before.benchmarks, *(name for name in run.benchmarks if name not in before.benchmarks)]
            run = run.model_copy(update={"benchmarks": names, "finished": max(before.finished, run.finished)})
        merged[key] = run
    return list(merged.values())


def describe_machine() -> Machine:
    """This machine in words; neither its name nor any folder."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=_memory_gb(),
        accelerators=_accelerators(),
    )


def list_versions(kind: str) -> dict[str, str]:
    """Versions of python, of this library and of those that compute for a kind of model, as far as they are there."""
    versions = {"python": platform.python_version(), "manyeyes": __version__}
    for name in _LIBRARIES[kind]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return None


def _accelerators() -> list[str]:
    # The driver's own files, so that neither torch nor CUDA is needed to name a GPU.
    names = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            names.append(match[1])
    return names


def _shorten_command(argv: Sequence[str]) -> str:
    """A command line of this project without folders and addresses; empty for another program's."""
    if not argv or Path(argv[0]).name != "manyeyes":
        return ""
    return shlex.join(["manyeyes", *(_shorten(part) for part in argv[1:])])


def _shorten(part: str) -> str:
    option, sign, value = part.partition("=") if part.startswith("--") else ("", "", part)
    if _ADDRESS.match(value):
        value = f"{value.partition('://')[0]}://..."
    elif value.startswith(("/", "~", "../")) or ("/" in value and Path(value).exists()):
        value = Path(value).name
    return f"{option}{sign}{value}"
