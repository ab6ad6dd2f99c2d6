"""The compiled ablate pipeline, one optimizer step a stage, and the trial that it is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyeyes.data.snapshot import read_dvc_file
from manyeyes.harness.base import Reporter, StepResult
from manyeyes.recipe import load_recipe
from manyeyes.search.trial import read_trial, trial_folders
from manyeyes.search.variant import Variant
from manyeyes.steps import train_trial as trials
from tests.pinned_toys import pin
from tests.pipelines.checkout import Checkout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_combination_is_trained_and_compared(toy_checkout: Checkout) -> None:
    grid = "ablate_grid=model.projector.depth=[as-is, 1]\n"
    code, output = toy_checkout.run("run", "ablate", "--recipe", "toy.yaml", "--param", grid)
    assert code == 0, output + toy_checkout.log()[-8000:]
    summary = toy_checkout.summary()
    names = [step.name for step in summary.steps]
    assert {"train_trial[as-is]", "train_trial[projector.depth=1]", "compare_trials"} <= set(names)
    assert summary.report is not None
    page = Path(summary.report).read_text(encoding="utf-8")
    for text in ("Ablation of toy", "projector.depth=1", "Difference to as-is"):
        assert text in page, text
    assert "report: " in output

    code, output = toy_checkout.run("run", "ablate", "--recipe", "toy.yaml", "--param", grid)
    assert code == 0, output
    again = {step.name: step.cached for step in toy_checkout.summary().steps}
    assert again["train_trial[as-is]"]
    assert again["train_trial[projector.depth=1]"]
    assert not again["compare_trials"]  # the last step: what it leaves tells that the run went well


def test_draws_are_trained_and_compared(toy_checkout: Checkout) -> None:
    draws = "balance_draws=cap=[as-is, 8]"  # as-is is the ablation's first variant, which is kept
    code, output = toy_checkout.run("run", "balance", "--recipe", "toy.yaml", "--param", draws)
    assert code == 0, output + toy_checkout.log()[-8000:]
    summary = toy_checkout.summary()
    names = [step.name for step in summary.steps]
    assert {"plan_balance", "train_trial[as-is]", "train_trial[draw.cap=8]", "compare_trials"} <= set(names)
    assert summary.report is not None
    page = Path(summary.report).read_text(encoding="utf-8")
    for text in ("Draws of toy", "draw.cap=8", "Difference to as-is"):
        assert text in page, text


def test_trial_that_was_scored_is_never_trained_again(
    toy_checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYEYES_WORKDIR", str(tmp_path / "work"))
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MANYEYES_THREADS", "1")
    recipe = load_recipe(str(toy_checkout.path / "toy.yaml"))
    (tmp_path / "validation").mkdir()

    def run(*variants: Variant, out: str, name: str = "toy") -> StepResult:
        return trials.train_trial(
            Reporter("trial"),
            variants="\n".join(variant.text() for variant in variants),
            pinned=pin(
                recipe.model_copy(update={"name": name}),
                "train_trial",
                data_md5=read_dvc_file(toy_checkout.path / "data.dvc").md5,
                data_remote=str(toy_checkout.path / "infra" / "dvc-remote"),
            ),
            validation=tmp_path / "validation",
            trial=tmp_path / out,
        )

    variant = Variant(encoders=("vit",), changes={"stages.prealign": None, "stages.pretrain": None})
    run(variant, out="first")
    first = read_trial(tmp_path / "first")
    assert [stage.stage for stage in first.stages] == ["sft"]
    assert first.visual_tokens == 16
    assert set(first.flops_per_sample) == {"sft"}
    assert first.parameters > 100_000
    assert first.scorecard.benchmarks["easy-vqa"].n == 16
    # The scores are kept and nothing else: no checkpoint, no running folder.
    assert not list((tmp_path / "work").rglob("*.safetensors"))
    kept = [path.name for path in (tmp_path / "work" / "trials").rglob("*") if path.is_file()]
    assert sorted(kept) == ["items.parquet", "trial.json"]

    def refuse(*_arguments: object, **_named: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(trials, "train_stage", refuse)
    # Asked for in other words, and under another name, it is the same trial.
    same = Variant(changes={"stages.pretrain": None, "stages.prealign": None})
    result = run(same, out="second", name="renamed")
    second = read_trial(tmp_path / "second")
    assert "scored before" in result.headline
    assert second.variant == same
    assert json.loads(second.recipe)["name"] == "renamed"
    assert (second.scorecard, second.stages) == (first.scorecard, first.stages)
    with pytest.raises(AssertionError, match="trained again"):
        run(Variant(changes={**same.changes, "seed": 2}), out="third")
    # A batch that was stopped goes on after the trials that it has.
    both = run(same, variant, out="batch")
    assert both.headline.startswith("best of 2: ")
    assert both.headline.endswith(result.headline)
    assert [read_trial(path).variant for path in trial_folders([tmp_path / "batch"])] == [same, variant]
    with pytest.raises(AssertionError, match="trained again"):
        run(same, Variant(changes={**same.changes, "seed": 2}), out="fourth")
