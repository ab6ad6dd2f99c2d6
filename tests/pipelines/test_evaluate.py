"""The compiled evaluate pipeline: a checkpoint on two benchmarks side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyeyes.model import build_model, save_checkpoint
from manyeyes.recipe import load_recipe
from tests.pipelines.checkout import Checkout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# There is one benchmark that toy data has; the library of the checkout gets another row of it.
SECOND = """
import dataclasses

BENCHMARKS["easy-vqa-again"] = dataclasses.replace(
    BENCHMARKS["easy-vqa"], name="easy-vqa-again", title="easy-VQA val", dataset="easy-vqa-val"
)
"""


@pytest.fixture
def two_benchmarks(toy_checkout: Checkout) -> Checkout:
    table = toy_checkout.library / "manyeyes" / "evaluation" / "benchmarks" / "__init__.py"
    table.write_text(table.read_text(encoding="utf-8") + SECOND, encoding="utf-8")
    return toy_checkout


def test_checkpoint_is_scored_on_every_benchmark_and_the_scorecards_merged(
    two_benchmarks: Checkout, toy_snapshot: Path
) -> None:
    folder = two_benchmarks.path
    recipe = load_recipe(str(folder / "toy.yaml"))
    model, processor = build_model(recipe.model, snapshot_path=toy_snapshot, seed=1)
    digest = save_checkpoint(model, processor, folder / "checkpoint")
    command = (
        *("run", "evaluate", "--recipe", "toy.yaml", "--param", "evaluate_model=checkpoint"),
        *("--param", "evaluate_benchmarks=easy-vqa-again, easy-vqa"),
    )
    code, output = two_benchmarks.run(*command)
    assert code == 0, output + two_benchmarks.log()[-8000:]
    summary = two_benchmarks.summary()
    names = {step.name for step in summary.steps}
    assert {"score_benchmark[easy-vqa]", "score_benchmark[easy-vqa-again]", "merge_scorecards"} <= names
    assert summary.scorecard is not None
    assert list(summary.scorecard) == ["easy-vqa-again", "easy-vqa"]
    assert "easy-vqa: " in output
    assert "easy-vqa-again: " in output
    assert summary.report is not None
    page = Path(summary.report).read_text(encoding="utf-8")
    for text in ("2 benchmarks", "easy-VQA test", "easy-VQA val"):
        assert text in page, text
    (card,) = (folder / "runs" / "latest" / "steps").resolve().rglob("merge-scorecards/scorecard/scorecard.json")
    model = json.loads(card.read_text(encoding="utf-8"))["model"]
    facts = model.pop("facts")
    assert model == {"digest": digest, "kind": "torch"}
    assert sum(facts["parts"].values()) == facts["parameters"]

    code, output = two_benchmarks.run(*command)
    assert code == 0, output
    cached = {step.name for step in two_benchmarks.summary().steps if step.cached}
    assert cached >= {"fetch_model", "score_benchmark[easy-vqa]"}
    ran = {step.name for step in two_benchmarks.summary().steps if not step.cached}
    assert ran == {"plan_evaluation", "merge_scorecards", "summarise_run"}
    (summary,) = (step for step in two_benchmarks.summary().steps if step.name == "summarise_run")
    assert "succeeded" in summary.figure

    for model_name, benchmark, message in (
        ("checkpoint", "easy-vqua", 'Did you mean "easy-vqa"'),
        ("./nowhere", "easy-vqa", "Check the path"),
        ("manyeyes-nothing@champion", "easy-vqa", "no such model"),
    ):
        given = ("--param", f"evaluate_model={model_name}", "--param", f"evaluate_benchmarks={benchmark}")
        code, output = two_benchmarks.run("run", "evaluate", "--recipe", "toy.yaml", *given)
        assert code == 2, output
        assert message in output
