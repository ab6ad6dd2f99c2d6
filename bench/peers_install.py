"""A Python that has lmms-eval, beside the one that runs the bench."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PACKAGES = ("lmms-eval==0.7.3", "decord==0.6.0", "evaluate==0.4.6", "loguru==0.7.3", "pytz")
"""lmms-eval, and what its ``llava_hf`` imports that this Python has not; its metadata asks for far more."""


SCORER_PACKAGES = ("lxml", "portalocker", "sacrebleu", "tenacity")
"""What its scoring functions import besides."""


def make_peer_python(folder: Path, *, further: tuple[str, ...] = ()) -> tuple[Path | None, str]:
    """Make a virtual environment for lmms-eval, or find the one made before.

    It sees the packages of this Python, so that torch and transformers are the very same on all sides; nothing is
    installed into this one.

    Args:
        folder: Of the environment.
        further: Packages besides ``PACKAGES``.

    Returns:
        Its Python, or ``None`` where that cannot be made; and what was done, or why not.
    """
    python = folder / "bin" / "python"
    if python.is_file() and _has_it(python, further):
        return python, f"lmms-eval: the environment made before, {folder}"
    venv.create(folder, with_pip=True, clear=True)
    own = Path(sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"])
    # Searched after the environment's own packages.
    (own / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES, *further]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not _has_it(python, further):
        last = (done.stderr.strip().splitlines() or ["its llava_hf cannot be imported"])[-1]
        return None, f"lmms-eval is left out; it could not be installed: {last}"
    return python, f"lmms-eval: pip install --no-deps {' '.join(PACKAGES + further)} into {folder}, over {sys.prefix}"


def _has_it(python: Path, further: tuple[str, ...]) -> bool:
    probe = [str(python), "-c", ", ".join(["import lmms_eval.models.simple.llava_hf", *further])]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0
