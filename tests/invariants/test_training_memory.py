"""What processes take while they train is what the estimate says, as ``python -m bench.memory`` measures it larger."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.memory import MOST_OFF, be_process, estimate, make
from tests.ports import free_port
from tests.training_ranks import run_ranks

# Parameters of malloc.h: from how many bytes on memory is the system's again once it is freed.
M_MMAP_THRESHOLD, AT_LEAST = -3, 2**20


def train(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    """Be one of the processes; writes what it took."""
    size = kwargs["processes"]
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    os.environ["MASTER_PORT"] = str(port)
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, AT_LEAST) == 1
    peaks = be_process(kwargs["folder"], size, port=kwargs["port"])
    (kwargs["folder"] / f"peaks-{size}-{rank}.json").write_text(json.dumps(peaks), encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for peaks")
def test_one_process_and_each_of_two_take_the_memory_that_the_estimate_says(tmp_path: Path) -> None:
    make(tmp_path, layers=10, width=512)
    for size in (1, 2):
        parameters, expected = estimate(tmp_path, size)
        run_ranks(size, train, {"folder": tmp_path, "processes": size, "port": free_port()})
        for rank in range(size):
            found = json.loads((tmp_path / f"peaks-{size}-{rank}.json").read_text(encoding="utf-8"))
            base, loaded, trained = found
            assert trained - base == pytest.approx(expected, rel=MOST_OFF)
            # Of a model in parts, no process ever reads the whole.
            assert loaded - base < 4 * parameters / size + 50e6
