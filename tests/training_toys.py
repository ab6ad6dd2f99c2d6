"""A recipe, a snapshot and a stage runner that train in seconds."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image, ImageDraw

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import Record, Turn, read_image_file
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.recipe import Recipe, StageName
from manyeyes.training import running
from manyeyes.training.stage import StageReport, run_stage
from tests.model_toys import write_language_model

COLOURS = ("red", "green", "blue")


def toy_record(number: int) -> Record:
    colour = COLOURS[number % 3]
    picture = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(picture).rectangle((4, 4, 20 + number % 8, 24), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    asked = COLOURS[number % 2]
    turns = (
        Turn("human", "<image>\nwhat colour is it?"),
        Turn("gpt", colour),
        Turn("human", f"is there a {asked} shape?"),
        Turn("gpt", "yes" if asked == colour else "no"),
    )
    return Record(f"toy/{number}", "toy", (read_image_file(buffer.getvalue(), path=f"{number}.png"),), turns)


def toy_snapshot(folder: Path, *, count: int = 12) -> Snapshot:
    """A data set ``toy-train`` and a language model in ``pretrained/lm``."""
    write_shards([toy_record(number) for number in range(count)], folder / "toy", "train", rows_per_shard=100)
    write_language_model(folder / "pretrained" / "lm")
    made = Provenance("CC0-1.0", "made for a test")
    write_snapshot_manifest(folder, provenance={"toy-train": made, "lm": made})
    return open_folder(folder)


def toy_recipe(**stage_changes: Any) -> Recipe:
    """Two small encoders, all three stages of three steps; ``stage_changes`` go to every stage."""
    part = {"dataset": "toy-train", "turns": "independent", "image_dropout": 0.2}
    stage = {"mixture": [part], "epochs": 1, "batch_size": 4, "checkpoint_every_s": 0.1, **stage_changes}
    return Recipe.model_validate(
        {
            "name": "toy",
            "model": {
                "encoders": [
                    {"name": "left", "encoder": "vit-tiny-p16-64", "image_size": 32},
                    {"name": "right", "encoder": "vit-tiny-p16-64", "image_size": 32},
                ],
                "fusion": {"grid": 2},
                "language_model": {"source": "snapshot:pretrained/lm", "max_length": 128},
                "chat": {"system": ""},
            },
            "stages": {
                "prealign": {"train": {"encoders": 1e-3, "projector": 1e-3}, **stage},
                "pretrain": {"train": {"projector": 1e-3}, **stage},
                "sft": {"train": {"encoders": 1e-4, "projector": 1e-3, "language_model": 1e-3}, **stage},
            },
            "evaluation": {"benchmarks": ["easy-vqa"]},
            "gate": [{"rule": "validation"}],
            "registry": {"model": "toy"},
        }
    )


def run_toy_stage(
    stage: StageName, *, recipe: Recipe, snapshot: Path, inputs: Path, out: Path, work_dir: Path, **more: Any
) -> StageReport:
    """Run a stage on one thread; earlier stages' results are taken from ``inputs/<stage or encoder>``."""
    torch.set_num_threads(1)
    if stage == "prealign":
        more = {"encoder": "left", **more}
    if stage == "pretrain":
        more = {"encoder_checkpoints": {name: inputs / name for name in ("left",)}, **more}
    if stage == "sft":
        more = {"checkpoint": inputs / "pretrain", **more}
    return run_stage(
        recipe, stage, snapshot=open_folder(snapshot), code_digest="code", out=out, work_dir=work_dir, **more
    )


class _AtOnce:
    """A thread that has done everything as soon as it is told."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            function(*arguments)
            future.set_result(None)
        except Exception as error:  # noqa: BLE001 (as a thread's)
            future.set_exception(error)
        return future

    def shutdown(self) -> None:
        pass


@contextmanager
def every_step_saved() -> Iterator[None]:
    """Running checkpoints as often as the recipe says, each whole before the next step begins."""
    with patch.object(running, "ThreadPoolExecutor", _AtOnce), patch.object(running, "MOST_STALL", float("inf")):
        yield
