"""Pythons that have lmms-eval or what VLMEvalKit's scorers import, beside the one that runs the bench."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PACKAGES = ("lmms-eval==0.7.3", "decord==0.6.0", "evaluate==0.4.6", "loguru==0.7.3", "pytz")
"""lmms-eval, and what its ``llava_hf`` imports that this Python has not; its metadata asks for far more."""


SCORER_PACKAGES = ("Levenshtein", "lxml", "portalocker", "rapidfuzz", "sacrebleu", "tenacity")
"""What its scoring functions import besides."""

VLMEVALKIT = "https://github.com/open-compass/VLMEvalKit"
VLMEVALKIT_COMMIT = "e8e78f05f3080fe28154f2130321f17951c3be94"
"""August 18, 2026. Its packages on PyPI are older than the rule for letters of June 17, 2026, so its source it is."""

VLMEVALKIT_PACKAGES = ("sty", "validators")
"""What its scoring functions import that this Python has not."""


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
    imports = ("lmms_eval.models.simple.llava_hf", *further)
    return make_python(folder, "lmms-eval", packages=(*PACKAGES, *further), imports=imports)


def make_vlmevalkit_python(folder: Path) -> tuple[Path | None, str]:
    """Make a virtual environment for VLMEvalKit's scorers in the same way.

    Args:
        folder: Of the environment.

    Returns:
        As ``make_peer_python``.
    """
    return make_python(folder, "VLMEvalKit", packages=VLMEVALKIT_PACKAGES, imports=VLMEVALKIT_PACKAGES)


def get_vlmevalkit(folder: Path) -> tuple[Path | None, str]:
    """Get VLMEvalKit's source at ``VLMEVALKIT_COMMIT``, or find what was got before.

    Args:
        folder: Of the source.

    Returns:
        The folder, or ``None`` where the source cannot be had; and what was done, or why not.
    """
    git = ["git", "-C", str(folder)]
    if not (folder / "vlmeval").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        for command in (
            [*git, "init", "--quiet"],
            [*git, "fetch", "--quiet", "--depth", "1", VLMEVALKIT, VLMEVALKIT_COMMIT],
            [*git, "checkout", "--quiet", "FETCH_HEAD", "--", "vlmeval"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return (
                    None,
                    f"VLMEvalKit is left out; its source cannot be had: {_last_line(done.stderr, 'git failed')}",
                )
    return folder, f"VLMEvalKit: {VLMEVALKIT_COMMIT[:9]} in {folder}"


def make_python(
    folder: Path, peer: str, *, packages: tuple[str, ...], imports: tuple[str, ...]
) -> tuple[Path | None, str]:
    """Make a virtual environment that has some packages over this Python's own.

    Args:
        folder: Of the environment.
        peer: For people: what it is for.
        packages: To install, without what they require.
        imports: Modules that must be there then.

    Returns:
        As ``make_peer_python``.
    """
    python = folder / "bin" / "python"
    if python.is_file() and _has_them(python, imports):
        return python, f"{peer}: the environment made before, {folder}"
    venv.create(folder, with_pip=True, clear=True)
    own = Path(sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"])
    # Searched after the environment's own packages.
    (own / "host.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not _has_them(python, imports):
        last = _last_line(done.stderr, f"{imports[0]} cannot be imported")
        return None, f"{peer} is left out; it could not be installed: {last}"
    return python, f"{peer}: pip install --no-deps {' '.join(packages)} into {folder}, over {sys.prefix}"


def _last_line(text: str, otherwise: str) -> str:
    return (text.strip().splitlines() or [otherwise])[-1]


def _has_them(python: Path, imports: tuple[str, ...]) -> bool:
    probe = [str(python), "-c", f"import {', '.join(imports)}"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0
