"""A folder in which ``manyeyes run`` works, its commands and its DVC remote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from manyeyes.data.snapshot import hash_folder
from manyeyes.harness.events import SUMMARY_FILE, RunSummary
from manyeyes.storage import hash_file

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Checkout:
    """A folder in which ``manyeyes run`` works.

    Attributes:
        path: The folder.
        library: Parent of the package that runs there.
        environment: Of every command.
    """

    path: Path
    library: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command line in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "manyeyes.cli.main", *arguments],
            cwd=self.path,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a command line to its end: exit code and output."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=540)
        return process.returncode, output

    def summary(self) -> RunSummary:
        """Of the latest run."""
        return RunSummary.model_validate_json(
            (self.path / "runs" / "latest" / SUMMARY_FILE).read_text(encoding="utf-8")
        )

    def log(self) -> str:
        """``pipeline.log`` of the latest run."""
        return (self.path / "runs" / "latest" / "pipeline.log").read_text(encoding="utf-8")


def make_checkout(path: Path, *, library: Path = ROOT / "models", **environment: str) -> Checkout:
    path.mkdir()
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MANYEYES", "MLFLOW"))}
    return Checkout(
        path,
        library,
        {
            **inherited,
            "PYTHONPATH": os.pathsep.join([str(library), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def push(folder: Path, remote: Path) -> str:
    """What ``dvc push`` leaves in a remote; returns the folder's md5."""
    listing = []
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            md5 = hash_file(file, "md5")
            target = remote / "files" / "md5" / md5[:2] / md5[2:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            listing.append({"md5": md5, "relpath": file.relative_to(folder).as_posix()})
    md5 = hash_folder(folder)
    target = remote / "files" / "md5" / md5[:2] / f"{md5[2:]}.dir"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(sorted(listing, key=lambda entry: entry["relpath"]), sort_keys=True), encoding="utf-8")
    return md5


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
