"""validate_data compares training with evaluation sets, before it says whether the data is fit."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from data_samples import make_snapshot
from PIL import Image

from bench.contamination import CHANGES, encode, photographs
from manyeyes.data.contamination.findings import read_contamination
from manyeyes.data.quarantine import read_quarantine
from manyeyes.data.records import Record, SampleProblem, Turn, read_image_file
from manyeyes.errors import ValidationError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.harness.base import Reporter, StepResult
from manyeyes.harness.inputs import compared_datasets
from manyeyes.recipe import Recipe, load_recipe
from tests.pinned_toys import opened

# The package's attribute of this name is the function.
STEP = importlib.import_module("manyeyes.steps.validate_data")


def record(name: str, data: bytes) -> Record:
    turns = (Turn("human", "<image>\nwhat is it?"), Turn("gpt", "a thing"))
    return Record(name, "toy", (read_image_file(data, path=name),), turns)


def validate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, train: list[Record], *, leave_out: bool = True
) -> StepResult:
    snapshot = make_snapshot(folder / "snapshot", {"train": train, "test": [record("test/coffee", encode(coffee()))]})
    overrides = {"data.eval_datasets": ["toy-test"], "data.contamination.leave_out": leave_out}
    inputs = opened(load_recipe("tiny", overrides=overrides), "validate_data", snapshot)
    monkeypatch.setenv("MANYEYES_CACHE", str(folder / "cache"))
    monkeypatch.setattr(STEP, "parse_pinned", lambda _: inputs)
    monkeypatch.setattr(STEP, "training_datasets", lambda _recipe: ["toy-train"])
    monkeypatch.setattr("manyeyes.training.batches.Admission", _Refusing)
    return STEP.validate_data(  # type: ignore[no-any-return]
        Reporter("validate_data"), pinned="", validation=folder / "validation"
    )


class _Refusing:
    """In place of the recipe's stages: refuses records by name."""

    def __init__(self, recipe: Recipe, *, snapshot_path: Path) -> None:
        assert recipe.data.eval_datasets == ("toy-test",)
        assert (snapshot_path / "manifest.json").is_file()

    def find_problem(self, record: Record, **_: object) -> SampleProblem | None:
        return SampleProblem("too long", "less") if record.id == "train/long" else None


def test_what_a_stage_would_refuse_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = record("train/long", encode(Image.new("RGB", (200, 16))))
    plain = [record(f"train/{number}", encode(Image.new("RGB", (16 + number, 16)))) for number in range(120)]
    validate(tmp_path, monkeypatch, [*plain, long])
    assert read_quarantine(tmp_path / "validation") == {"toy-train#120"}


def coffee() -> Image.Image:
    return photographs()["coffee.png"].resize((240, 160))


def others(count: int) -> list[Record]:
    images = [image for name, image in photographs().items() if not name.startswith("coffee")]
    return [record(f"train/{place}", encode(image.resize((60, 40)))) for place, image in enumerate(images[:count])]


@pytest.mark.parametrize("leave_out", [True, False])
def test_near_duplicates_are_left_out_of_training_or_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave_out: bool
) -> None:
    near = record("train/near", CHANGES["JPEG, quality 50"](coffee()))
    result = validate(tmp_path, monkeypatch, [*others(4), near], leave_out=leave_out)
    assert (result.metrics["near_duplicates"], result.metrics["contaminated_images"]) == (1, 0)
    assert "1 near duplicates among training images" in result.markdown
    assert read_quarantine(tmp_path / "validation") == ({"toy-train#4"} if leave_out else set())
    report = read_contamination(tmp_path / "validation")
    assert report is not None
    assert report.remaining_images == (0 if leave_out else 1)


def test_a_refused_snapshot_has_its_report_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="also in an evaluation set"):
        validate(tmp_path, monkeypatch, [*others(2), record("train/same", encode(coffee()))])
    assert read_quarantine(tmp_path / "validation") == {"toy-train#2"}


def test_training_data_is_compared_with_what_the_model_is_judged_on_where_nothing_else_is_named() -> None:
    recipe = load_recipe("llava-1.5-7b")
    assert not recipe.data.eval_datasets
    compared = compared_datasets(recipe)
    assert compared == [BENCHMARKS[name].dataset for name in recipe.evaluation.benchmarks]
    assert len(compared) > 5
    assert compared_datasets(load_recipe("tiny")) == ["easy-vqa-val", "easy-vqa-test"]
    assert compared_datasets(recipe.model_copy(update={"gate": ()})) == []
