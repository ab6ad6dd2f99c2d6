"""Disturbing one encoder's features: nothing else changes, and what is disturbed is what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.answering.answerers import TorchAnswerer
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.benchmarks.easy_vqa import EASY_VQA
from manyeyes.evaluation.reliance import (
    RelianceReport,
    ShuffleEncoder,
    measure_reliance,
    render_reliance_text,
    zero_encoder,
)
from manyeyes.model import build_model, save_checkpoint
from manyeyes.runtime.bundle import Group
from tests.evaluation_fakes import make_image, make_recipe, make_snapshot
from tests.model_toys import toy_spec, write_language_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    model, processor = build_model(
        toy_spec(write_language_model(folder / "language_model")), snapshot_path=None, seed=3
    )
    save_checkpoint(model, processor, folder / "checkpoint")
    return folder / "checkpoint"


def test_zeroing_changes_one_encoder_only() -> None:
    features = {"a": torch.ones(3, 2, 4, 4), "b": torch.ones(3, 5, 2, 2)}
    disturbed = zero_encoder("b")(features, [1, 1, 1])
    assert disturbed["a"] is features["a"]
    assert disturbed["b"].shape == (3, 5, 2, 2)
    assert not disturbed["b"].any()
    assert features["b"].all()


def test_shuffling_gives_every_image_the_features_of_the_one_before() -> None:
    features = {"a": torch.arange(6.0).reshape(6, 1, 1, 1), "b": torch.arange(6.0).reshape(6, 1, 1, 1)}
    # Three images of one, three and two tiles; the fourth call has one image.
    disturb = ShuffleEncoder("a")
    disturbed = disturb(features, [1, 3, 2])
    assert disturbed["a"].flatten().tolist() == [4, 0, 0, 0, 1, 2]
    assert disturbed["b"] is features["b"]
    alone = disturb({"a": torch.full((1, 1, 1, 1), 9.0)}, [1])
    assert alone["a"].flatten().tolist() == [4]
    again = disturb({"a": torch.full((2, 1, 1, 1), 7.0)}, [1])
    assert again["a"].flatten().tolist() == [9, 9]
    # Pixels that come whole: two rows a piece inside the model.
    whole = ShuffleEncoder("a")({"a": torch.arange(4.0).reshape(4, 1, 1, 1)}, [1, 1])
    assert whole["a"].flatten().tolist() == [2, 3, 0, 1]


def test_one_image_alone_cannot_be_shuffled() -> None:
    with pytest.raises(EvaluationError, match="one image alone"):
        ShuffleEncoder("a")({"a": torch.ones(1, 1, 1, 1)}, [1])


def test_undisturbed_features_give_the_same_answers(checkpoint: Path) -> None:
    groups = [Group((make_image(number).data,), ("what color is the shape?", "a?")) for number in range(3)]
    answerer = TorchAnswerer(checkpoint, threads=1)
    plain = answerer.answer_groups(groups, max_new_tokens=5)
    answerer.disturb = lambda features, rows: features if rows == [1, 1, 1] else {}
    assert answerer.answer_groups(groups, max_new_tokens=5) == plain
    # With every encoder zeroed, all images are the same image.
    names = list(answerer.model.encoder_sizes)
    answerer.disturb = lambda features, _: {name: torch.zeros_like(features[name]) for name in names}
    blind = answerer.answer_groups(groups, max_new_tokens=5)
    assert blind[0] == blind[1] == blind[2]
    assert blind != plain


def test_the_command_reports_every_encoder_zeroed_and_shuffled(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "data", images=7)
    recipe = make_recipe(evaluation__batch_size=3, evaluation__max_new_tokens=3)
    answerer = TorchAnswerer(checkpoint, threads=1)
    said: list[str] = []
    report = measure_reliance(answerer, recipe, snapshot=snapshot, model_digest="m", on_progress=said.append)
    encoders = list(answerer.model.encoder_sizes)
    (benchmark,) = report.benchmarks.values()
    assert [(row.encoder, row.how) for row in benchmark.encoders] == [
        (encoder, how) for encoder in encoders for how in ("zeroed", "shuffled")
    ]
    assert len(said) == 1 + 2 * len(encoders)
    assert answerer.disturb is None
    for row in benchmark.encoders:
        assert row.score == pytest.approx(benchmark.score - row.loss, abs=1e-3)
    arguments = ["reliance", str(checkpoint), "--data", str(snapshot.path), "--out", str(tmp_path / "out")]
    settings = ["--set", "evaluation.max_items=12", "--set", "evaluation.max_new_tokens=2"]
    result = CliRunner().invoke(cli, [*arguments, *settings], catch_exceptions=False)
    assert result.exit_code == 0
    written = RelianceReport.model_validate_json((tmp_path / "out" / "reliance.json").read_bytes())
    assert written.benchmarks["easy-vqa"].n == 12
    assert all(encoder in (tmp_path / "out" / "reliance.html").read_text(encoding="utf-8") for encoder in encoders)


def test_benchmarks_that_need_a_judge_are_named_and_not_asked(checkpoint: Path, tmp_path: Path) -> None:
    judged = replace(EASY_VQA, name="easy-judged", judged=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BENCHMARKS, "easy-judged", judged)
        snapshot = make_snapshot(tmp_path / "data", images=2)
        answerer = TorchAnswerer(checkpoint, threads=1)
        both = make_recipe(evaluation__benchmarks=["easy-judged", "easy-vqa"], evaluation__max_new_tokens=1)
        report = measure_reliance(answerer, both, snapshot=snapshot, model_digest="m")
        assert (list(report.benchmarks), report.skipped) == (["easy-vqa"], ("easy-judged",))
        assert "a language model judges: easy-judged" in render_reliance_text(report)
        alone = make_recipe(
            evaluation__benchmarks=["easy-judged"], gate=[{"rule": "floor", "benchmark": "easy-judged", "at_least": 1}]
        )
        with pytest.raises(EvaluationError, match="all of easy-judged are judged"):
            measure_reliance(answerer, alone, snapshot=snapshot, model_digest="m")
