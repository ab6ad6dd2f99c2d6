"""What every test needs before torch is loaded."""

import os
from pathlib import Path

import pytest

# Sums are cut by thread: results that are compared bit for bit, also with another process, need one number of threads.
# It also lets several test processes share a machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def own_keep_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes with replaced parts must not be kept in the user's cache folder."""
    made: list[Path] = []

    def keep_dir() -> Path:
        given = os.environ.get("MANYEYES_CACHE")
        if not given and not made:
            made.append(tmp_path_factory.mktemp("kept"))
        return Path(given) if given else made[0]

    monkeypatch.setattr("manyeyes.harness.kept.keep_dir", keep_dir)
