"""``python -m bench.memory``: peak memory of 1, 2 and 4 processes that train all of 300 M parameters, and the estimate.

The estimate is of a GPU, and counts 2 GB for its runtime; in place of these a process on a CPU has its interpreter with
torch, this package and all that a stage loads once, which is measured in each after a small model's stage, and taken
off. What a process takes at most is asked of Linux: while the model is loaded, and anew from the first step on. One
record a process and step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "memory.json"
COUNTS = (1, 2, 4)
MOST_OFF = 0.15


def recipe_of(processes: int) -> Any:
    """Everything trains in fp32 for two steps; the second one has gradients and moments at once."""
    from manyeyes.recipe import Recipe
    from tests.training_toys import toy_recipe

    values = toy_recipe().model_dump(mode="json")
    values["model"]["language_model"]["max_length"] = 64
    values["stages"] = {
        "sft": {
            **values["stages"]["sft"],
            "mixture": [{"dataset": "toy-train", "turns": "chained"}],
            "batch_size": processes,
            "max_steps": 2,
            "checkpoint_every_s": 1e6,
            "sharding": "full",
        }
    }
    return Recipe.model_validate(values)


def make(folder: Path, *, layers: int, width: int = 1024) -> None:
    """A snapshot whose language model has so many layers, of 16.8 M; another, of a small one, is in ``small``."""
    from tests.model_toys import toy_config, write_language_model
    from tests.training_toys import toy_snapshot

    toy_snapshot(folder)
    toy_snapshot(folder / "small")
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    write_language_model(
        folder / "pretrained" / "lm",
        toy_config(0, **sizes, **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 16)),
    )


def estimate(folder: Path, processes: int) -> tuple[int, float]:
    """Parameters, and bytes of each process without the runtime's."""
    from manyeyes.estimate.memory import RUNTIME_BYTES, stage_memory, way_of
    from manyeyes.estimate.skeleton import count_facts

    recipe = recipe_of(processes)
    facts = count_facts(recipe, snapshot_path=folder)
    (stage,) = facts.stages["sft"]
    memory = stage_memory(stage, recipe.stages.sft, way_of(recipe.stages.sft, processes))
    return facts.parameters.total, memory.total * 1e9 - RUNTIME_BYTES


class _TrainedError(Exception):
    """All that is measured has happened."""


def be_process(folder: Path, processes: int, *, port: int) -> list[int]:
    """Train as one of the processes; what it had at first, and at most while it loaded and while it trained.

    Args:
        folder: What ``make`` wrote.
        processes: How many train.
        port: That they meet at the second time; the first one is in the environment.
    """
    from unittest.mock import patch

    import torch

    from manyeyes.data.snapshot import open_folder
    from manyeyes.training.loop import train
    from manyeyes.training.stage import run_stage

    torch.set_num_threads(1)
    peaks: list[int] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        peaks.append(_peak())
        train(*arguments, **more)
        peaks.append(_peak())
        raise _TrainedError

    with tempfile.TemporaryDirectory() as work:

        def run(snapshot: Path) -> None:
            run_stage(
                recipe_of(processes),
                "sft",
                snapshot=open_folder(snapshot),
                code_digest="bench",
                out=Path(work) / "out",
                work_dir=Path(work) if processes == 1 else folder / "work",
            )

        run(folder / "small")
        os.environ["MASTER_PORT"] = str(port)
        _peak()
        peaks.append(_bytes("VmRSS"))
        with patch("manyeyes.training.stage.train", watched), suppress(_TrainedError):
            run(folder)
    return peaks


def _peak() -> int:
    """Most bytes that this process has had since this was asked the last time."""
    found = _bytes("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return found


def _bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(folder: Path, processes: int) -> list[list[int]]:
    """What each process had at most."""
    from tests.ports import free_port

    shared = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # glibc's threshold would grow with what is freed, and keep up to a gigabyte of that.
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", "bench.memory", "--process", str(folder), str(processes), str(free_port())]
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main() -> int:
    """Print a line a number of processes; exit 1 where one is further off than 15%."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--process", nargs=3, metavar=("FOLDER", "PROCESSES", "PORT"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.process:
        given, processes, port = arguments.process
        print(json.dumps(be_process(Path(given), int(processes), port=int(port))))
        return 0
    runs: list[dict[str, Any]] = []
    parameters = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, layers=arguments.layers)
        for processes in COUNTS:
            parameters, expected = estimate(folder, processes)
            found = measure(folder, processes)
            own = [trained - base for base, _, trained in found]
            runs.append(
                {
                    "processes": processes,
                    "estimate_gb": expected / 1e9,
                    "trained_gb": [each / 1e9 for each in own],
                    "loaded_gb": [(loaded - base) / 1e9 for base, loaded, _ in found],
                    "interpreter_gb": [base / 1e9 for base, _, _ in found],
                    "off": max((each / expected - 1 for each in own), key=abs),
                }
            )
            spread = ", ".join(f"{each / 1e9:.2f}" for each in own)
            print(f"| {processes} | {expected / 1e9:.2f} GB | {spread} GB | {runs[-1]['off']:+.0%} |", flush=True)
    import torch

    record = {
        "name": "peak memory of a process against the estimate",
        "parameters": parameters,
        "goal": MOST_OFF,
        "runs": runs,
        "machine": f"{platform.machine()}, CPU, gloo, fp32",
        "versions": {"torch": torch.__version__},
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(abs(run["off"]) <= MOST_OFF for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
