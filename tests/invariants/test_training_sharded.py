"""Processes that hold parts of a model, or the whole each, learn what one process learns."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from manyeyes.errors import ProcessLostError, SourceError
from manyeyes.model.language_model import load_language_model
from manyeyes.model.stored import TensorPlace
from manyeyes.recipe import Recipe, StageName
from manyeyes.training.loop import Progress, train
from manyeyes.training.stage import ADAPTER, StageReport, read_stage_report
from tests.invariants.test_layouts_training import recipe_of
from tests.ports import free_port
from tests.training_ranks import run_ranks
from tests.training_toys import run_toy_stage, toy_recipe, toy_snapshot

# Records without their image, questions that share a prefix, conversations: processes differ in what they compute.
MIXTURE = [
    {"dataset": "toy-train", "turns": "independent", "image_dropout": 0.4},
    {"dataset": "toy-train", "turns": "chained", "max_samples": 3},
]


@dataclass(frozen=True)
class Case:
    """A stage, and what its recipe says besides."""

    stage: StageName
    changes: Mapping[str, Any]
    model: str | None = None
    # Of losses; bf16 rounds what several processes sum in another order.
    near: float = 1e-5

    def recipe(self, sharding: str) -> Recipe:
        changes = {"checkpoint_every_s": 1e6, "max_steps": 2, **self.changes, "sharding": sharding}
        recipe = toy_recipe(mixture=MIXTURE) if self.model is None else recipe_of(self.model)
        values = recipe.model_dump(mode="json")
        values["stages"][self.stage] |= changes
        return Recipe.model_validate(values)


CASES = {
    "sft": Case("sft", {}),
    "pretrain": Case("pretrain", {"micro_batch_size": 1}),
    "prealign": Case("prealign", {}),
    "packed": Case("sft", {"packing": {"tokens": 96}}),
    "adapters": Case("sft", {"lora": {"rank": 2, "alpha": 4}, "checkpoint_language_model": True}),
    "4 bits": Case("sft", {"lora": {"rank": 2, "alpha": 4, "quantize": "nf4"}}),
    "bf16": Case("pretrain", {"precision": "bf16"}, near=1e-2),
    "kept features": Case("pretrain", {"keep_features": True}),
    "longer": Case("sft", {"max_steps": 4, "epochs": 2}),
    "looks again": Case("sft", {"batch_size": 4}, model="cambrian"),
}
read_stored = TensorPlace.read
# By processes: which case, and how they share the model; what is in 4 bits each holds whole.
RUNS = {
    2: [
        *((name, "full") for name in CASES if name not in ("4 bits", "longer")),
        *((name, "none") for name in ("sft", "adapters", "bf16", "4 bits")),
    ],
    4: [*((name, "full") for name in ("sft", "pretrain", "prealign", "adapters")), ("sft", "none")],
}


def train_case(
    folder: Path, name: str, sharding: str, processes: int, *, work: Path | None = None, **more: Any
) -> StageReport:
    case = CASES[name]
    given: dict[str, Any] = {"encoder_checkpoints": {}} if case.stage == "pretrain" else {}
    if case.stage == "sft":
        given = {"checkpoint": folder / "pretrain-none-1" if name == "packed" else None}
    return run_toy_stage(
        case.stage,
        recipe=case.recipe(sharding),
        snapshot=folder / "data",
        inputs=folder,
        out=folder / f"{name}-{sharding}-{processes}",
        work_dir=work or folder / f"work-{name}-{sharding}-{processes}",
        **given,
        **more,
    )


def train_in_part(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    """Train a case as one of several processes; where it is to stop, it is told so after its first step."""
    size, stops = kwargs["processes"], kwargs["stops"]
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    os.environ["MASTER_PORT"] = str(port)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def evict(_: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with patch("manyeyes.training.loop.PROGRESS_EVERY_S", 0), suppress(*([ProcessLostError] if stops else [])):
        more = {"on_progress": evict} if stops else {}
        train_case(kwargs["folder"], "longer", "full", size, work=kwargs["work"], **more)
        assert not stops


def digest_of(parameters: Mapping[str, torch.nn.Parameter]) -> str:
    """Of every bit; in all processes at once where they are parts."""
    digest = hashlib.sha256()
    for _, each in sorted(parameters.items()):
        whole = each.full_tensor() if isinstance(each, DTensor) else each
        digest.update(whole.detach().numpy().tobytes())
    return digest.hexdigest()


def train_as(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    """Train every case as one of several processes; writes what its parameters were."""
    size = kwargs["processes"]
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    kinds: list[str] = []
    starts: list[str] = []
    loaded: list[Path] = []
    read: list[int] = []
    wholes: list[weakref.ref[torch.Tensor]] = []
    cut: list[str] = []

    def watched(*args: Any, parameters: Mapping[str, torch.nn.Parameter], **more: Any) -> Any:
        kinds.append(" and ".join(sorted({type(parameter).__name__ for parameter in parameters.values()})))
        starts.append(digest_of(parameters))
        parts = [each for each in parameters.values() if isinstance(each, DTensor)]
        assert all(each.to_local().shape[0] <= -(-each.shape[0] // size) for each in parts)
        return train(*args, parameters=parameters, **more)

    def watched_shard(module: torch.nn.Module, **more: Any) -> Any:
        # What was cut into parts before is nowhere whole any more.
        assert not any(whole() is not None for whole in wholes)
        wholes.extend(weakref.ref(each) for each in module.parameters() if not isinstance(each, DTensor))
        cut.append(type(module).__name__)
        return fully_shard(module, **more)

    def watched_load(path: Path, *, pretrained: bool) -> Any:
        loaded.extend([path] if pretrained else [])
        return load_language_model(path, pretrained=pretrained)

    def watched_read(*args: Any) -> torch.Tensor:
        found = read_stored(*args)
        read.append(found.numel())
        return found

    with (
        patch("manyeyes.training.stage.train", watched),
        patch("manyeyes.model.checkpoint.load_language_model", watched_load),
        patch("manyeyes.training.sharding.fully_shard", watched_shard),
        patch.object(TensorPlace, "read", watched_read),
    ):
        for (name, sharding), meeting in kwargs["runs"]:
            os.environ["MASTER_PORT"] = str(meeting)
            train_case(kwargs["folder"], name, sharding, size)
            # What holds parts reads parts, whether of a language model or of a checkpoint.
            assert bool(loaded) == (sharding == "none" and name != "packed")
            assert bool(read) == (sharding == "full")
            if sharding == "full":
                blocks = {"sft": 10, "prealign": 5, "pretrain": 0}.get(name, cut.count("Block"))
                assert cut.count("Block") == blocks
            if name == "packed":
                assert sum(read) < 1.1 * kwargs["elements"] / size
            loaded.clear()
            read.clear()
            cut.clear()
            wholes.clear()
    found = json.dumps([kinds, starts])
    (kwargs["folder"] / f"kinds-{size}-{rank}.json").write_text(found, encoding="utf-8")


def train_on_damaged(rank: int, port: int, kwargs: dict[str, Any]) -> None:
    """Train where the second process's weights are cut off, and again where they are gone; writes the errors."""
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    folder, told = kwargs["folder"], []
    for kind, meeting in zip(("cut", "gone"), (port, kwargs["port"]), strict=True):
        os.environ["MASTER_PORT"] = str(meeting)
        with pytest.raises(SourceError) as caught:
            run_toy_stage(
                "pretrain",
                recipe=CASES["pretrain"].recipe("full"),
                snapshot=folder / ("whole", kind)[rank],
                inputs=folder,
                out=folder / "out",
                work_dir=folder / "work",
                encoder_checkpoints={},
            )
        told.append(str(caught.value))
    (folder / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def test_weights_that_one_process_cannot_read_end_all_with_that_error(tmp_path: Path) -> None:
    for kind in ("whole", "cut", "gone"):
        toy_snapshot(tmp_path / kind)
    file = Path("pretrained", "lm", "model.safetensors")
    (tmp_path / "gone" / file).unlink()
    (tmp_path / "cut" / file).write_bytes((tmp_path / "whole" / file).read_bytes()[:-64])
    run_ranks(2, train_on_damaged, {"folder": tmp_path, "port": free_port()})
    for rank in range(2):
        cut, gone = json.loads((tmp_path / f"told-{rank}.json").read_text(encoding="utf-8"))
        assert f"{tmp_path / 'cut' / file} cannot be read" in cut
        assert "other weights than the first one" in gone


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process."""
    folder = tmp_path_factory.mktemp("sharded")
    toy_snapshot(folder / "data")
    starts: dict[str, str] = {}

    def watched(*args: Any, parameters: Mapping[str, torch.nn.Parameter], **more: Any) -> Any:
        starts[name] = digest_of(parameters)
        return train(*args, parameters=parameters, **more)

    with patch("manyeyes.training.stage.train", watched):
        for name in CASES:
            train_case(folder, name, "none", 1)
    (folder / "starts.json").write_text(json.dumps(starts), encoding="utf-8")
    return folder


# Two processes show the same as four in half the time.
@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, one: Path) -> int:
    """So many processes, which have run every case of theirs."""
    size: int = request.param
    met = [(run, free_port()) for run in RUNS[size]]
    elements = sum(each.numel() for each in load_file(one / "pretrain-none-1" / "model.safetensors").values())
    run_ranks(size, train_as, {"folder": one, "processes": size, "runs": met, "elements": elements})
    return size


def test_parts_are_what_is_trained_and_begin_as_the_whole_does_bit_for_bit(several: int, one: Path) -> None:
    for rank in range(several):
        kinds, starts = json.loads((one / f"kinds-{several}-{rank}.json").read_text(encoding="utf-8"))
        assert kinds == [{"full": "DTensor", "none": "Parameter"}[sharding] for _, sharding in RUNS[several]]
        alone = json.loads((one / "starts.json").read_text(encoding="utf-8"))
        assert starts == [alone[name] for name, _ in RUNS[several]]


def test_several_processes_have_the_losses_of_one(several: int, one: Path) -> None:
    for name, sharding in RUNS[several]:
        expected, found = (
            read_stage_report(one / folder).history for folder in (f"{name}-none-1", f"{name}-{sharding}-{several}")
        )
        assert len(expected) == 2
        near = CASES[name].near
        assert [point.loss for point in found] == pytest.approx([point.loss for point in expected], rel=near), name
        assert found[0].grad_norm == pytest.approx(expected[0].grad_norm, rel=10 * near if near > 1e-5 else near), name


def test_bf16_has_the_losses_of_fp32_nearly_and_leaves_frozen_parts_as_they_were(several: int, one: Path) -> None:
    for run in [("none", 1), *((sharding, several) for name, sharding in RUNS[several] if name == "bf16")]:
        folder = one / "bf16-{}-{}".format(*run)
        fp32, found = (read_stage_report(path).history for path in (one / "pretrain-none-1", folder))
        assert [point.loss for point in found] == pytest.approx([point.loss for point in fp32], rel=1e-2)
        before, after = (load_file(path / "model.safetensors") for path in (one / "pretrain-none-1", folder))
        frozen = [name for name in before if not name.startswith("projector")]
        assert frozen
        assert all(torch.equal(before[name], after[name]) for name in frozen)


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_from_parts(first: int, then: int, one: Path, tmp_path: Path) -> None:
    given = {"folder": one, "work": tmp_path / "work"}
    run_ranks(first, train_in_part, {**given, "processes": first, "stops": True})
    if then == 1:
        train_case(one, "longer", "full", 1, work=tmp_path / "work")
    else:
        run_ranks(then, train_in_part, {**given, "processes": then, "stops": False})
    expected, found = (read_stage_report(one / f"longer-{run}") for run in ("none-1", f"full-{then}"))
    assert found.resumed_from_step == 2
    assert [point.loss for point in found.history] == pytest.approx(
        [point.loss for point in expected.history], rel=1e-5
    )
    assert found.samples == expected.samples


def test_features_of_encoders_that_are_frozen_may_be_kept_where_processes_hold_parts(several: int, one: Path) -> None:
    for name, sharding in RUNS[several]:
        features = read_stage_report(one / f"{name}-{sharding}-{several}").features
        assert [each.encoder for each in features or ()] == (["left", "right"] if name == "kept features" else [])


def test_a_result_written_from_parts_is_whole(several: int, one: Path) -> None:
    for name, sharding in RUNS[several]:
        file = "encoder.safetensors" if CASES[name].stage == "prealign" else "model.safetensors"
        folders = [one / f"{name}-none-1", one / f"{name}-{sharding}-{several}"]
        written = [{file.relative_to(folder) for file in folder.rglob("*")} for folder in folders]
        assert written[0] == written[1]
        for path in (Path(file), Path(ADAPTER) / SAFETENSORS_WEIGHTS_NAME):
            if path not in written[0]:
                continue
            whole, parts = (load_file(folder / path) for folder in folders)
            assert list(whole) == list(parts)
            assert all(whole[key].shape == parts[key].shape and whole[key].dtype == parts[key].dtype for key in whole)
            # Adam turns rounding differences of tiny gradients into steps of the learning rate's size; most stay tiny.
            mean = torch.cat([(whole[key] - parts[key]).abs().flatten() for key in whole]).mean()
            assert mean < CASES[name].near / 10
