"""Trains and scores variants of a recipe, one after another: the work of a search or an ablation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from manyeyes.data.quarantine import read_quarantine
from manyeyes.errors import LockedError, RecipeError
from manyeyes.estimate import RecipeFacts
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import Pinned, is_absent, parse_pinned, work_dir
from manyeyes.harness.stage import HEAVY, LOCAL_BRANCHES, train_stage
from manyeyes.pages import Table, facts_table, step_page
from manyeyes.recipe import Recipe, StageName
from manyeyes.search.trial import ITEMS_FILE, TRIAL_FILE, Trial, TrialStage, mean_score, read_trial
from manyeyes.search.variant import Variant, parse_batch
from manyeyes.sources import pin_recipe
from manyeyes.steps.evaluate import evaluate

_WAIT_S = 2.0
_STEPS_OF_STAGES = {"prealign": "prealign_encoder", "pretrain": "pretrain_projector", "sft": "sft"}
Result = TypeVar("Result")


def train_trial(
    reporter: Reporter,
    *,
    variants: str,
    pinned: str,
    validation: Path,
    trial: Path,
    encoder_checkpoints: Sequence[Path] = (),
) -> StepResult:
    """Run every stage of each variant and score it; a variant that was scored before is taken as it is.

    A step that is run again, after an eviction for instance, goes on with the variant that it was at.

    Args:
        reporter: Shows the progress.
        variants: Texts of variants, one a line.
        pinned: From ``preflight``.
        validation: Folder of ``validate_data``.
        trial: Folder to write: ``trial.json`` and ``items.parquet``, of several variants in a folder each.
        encoder_checkpoints: Folders of ``prealign_encoder``; a variant prealigns its encoders itself without them.

    Raises:
        RecipeError: A variant is no recipe, or has no stage that makes a model.
        PipelineError: ``variants`` are not the texts of some.
    """
    batch = parse_batch(variants)
    if len(batch) == 1:
        return _train_variant(reporter, batch[0], pinned, validation, trial, encoder_checkpoints)
    results: list[StepResult] = []
    for number, variant in enumerate(batch):
        reporter.progress(f"variant {number + 1} of {len(batch)}: {variant.label}", done=number / len(batch))
        folder = trial / variant.key
        results.append(_train_variant(reporter, variant, pinned, validation, folder, encoder_checkpoints))
    rows = [[variant.label, result.headline] for variant, result in zip(batch, results, strict=True)]
    table = Table(("variant", "mean score"), rows)
    best = max(range(len(batch)), key=lambda index: results[index].metrics["mean_score"])
    return StepResult(
        headline=f"best of {len(batch)}: {batch[best].label}, {results[best].headline}",
        metrics={"trials": float(len(batch)), **results[best].metrics},
        html=step_page("Trials", "Variants of the recipe, trained and scored one after another.", {"": table}),
        markdown=table.markdown() + "\n",
        metadata={"variants": len(batch)},
    )


def _train_variant(
    reporter: Reporter,
    parsed: Variant,
    pinned: str,
    validation: Path,
    trial: Path,
    encoder_checkpoints: Sequence[Path],
) -> StepResult:
    inputs = parse_pinned(pinned)
    recipe = pin_recipe(parsed.apply(inputs.recipe))
    inputs = replace(inputs, recipe=recipe)
    if recipe.stages.pretrain is None and recipe.stages.sft is None:
        raise RecipeError(
            f'variant "{parsed.label}" has no stage that makes a model', "pretrain, sft or both", "Add one."
        )
    given = _given_encoders(encoder_checkpoints, recipe)
    kept = work_dir() / "trials" / _identity(inputs, given, validation=validation)
    found = (kept / TRIAL_FILE).is_file()
    if not found:
        job = _Job(
            parsed,
            inputs,
            Reporter(reporter.step),
            validation=validation,
            folder=kept.with_name(f"{kept.name}-running"),
        )
        job.run(given, kept)
    shutil.copytree(kept, trial, dirs_exist_ok=True)
    # What was kept may have been asked for in other words.
    asked = {"variant": parsed, **_record(recipe)}
    result = read_trial(kept).model_copy(update=asked)
    (trial / TRIAL_FILE).write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    rows: list[tuple[str, object]] = [
        ("variant", parsed.label),
        ("encoders", ", ".join(result.encoders)),
        ("mean score (%)", f"{result.mean:.2f} ({result.mean_ci95[0]:.2f} to {result.mean_ci95[1]:.2f})"),
        *((name, f"{score.score:.2f}{score.mark}") for name, score in result.scorecard.benchmarks.items()),
        ("parameters", result.parameters),
        ("visual tokens", result.visual_tokens),
        *(
            (f"loss after {stage.stage}{f' of {stage.encoder}' if stage.encoder else ''}", stage.final_loss)
            for stage in result.stages
        ),
        ("seconds of training", result.train_seconds),
        ("trained now", "no, by an earlier run" if found else "yes"),
        ("recipe digest", result.recipe_digest),
    ]
    return StepResult(
        headline=f"{result.mean:.1f}% ({result.mean_ci95[0]:.1f} to {result.mean_ci95[1]:.1f})"
        + (", scored before" if found else ""),
        metrics={
            "mean_score": result.mean,
            "parameters": float(result.parameters),
            "visual_tokens": float(result.visual_tokens),
            "train_seconds": result.train_seconds,
            **result.scorecard.metrics(),
        },
        html=step_page(
            f"Trial {parsed.label}", "One variant of the recipe, trained and scored.", {"": facts_table(rows)}
        ),
        markdown=facts_table(rows).markdown() + "\n",
        metadata={"recipe_digest": result.recipe_digest, "data_md5": inputs.data_md5, "variant": parsed.text()},
    )


class _Job:
    """The training and scoring of one variant."""

    def __init__(
        self,
        variant: Variant,
        inputs: Pinned,
        reporter: Reporter,
        *,
        validation: Path,
        folder: Path,
    ) -> None:
        self.variant = variant
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.reporter = reporter
        self.validation = validation
        self.folder = folder
        # On a cluster every trial has a machine of its own.
        self.branches = LOCAL_BRANCHES if "MANYEYES_RUN_LOCK" in os.environ else 1
        self.stages: list[TrialStage] = []
        self.last_digest = ""

    def run(self, given: dict[str, Path], kept: Path) -> None:
        """Write the trial's folder ``kept``, whole or not at all."""
        from manyeyes.estimate.skeleton import count_both
        from manyeyes.storage import new_folder

        encoders = {
            name: given.get(name) or self._stage("prealign", name) for name in self.recipe.prealigned_encoders()
        }
        checkpoint: Path | None = None
        for stage in ("pretrain", "sft"):
            if getattr(self.recipe.stages, stage) is not None:
                checkpoint = self._stage(stage, None, {} if checkpoint else encoders, checkpoint)
        assert checkpoint is not None
        size, facts = count_both(self.recipe, snapshot_path=self.inputs.snapshot.path)
        scores = self.folder / "scores"
        evaluate(
            self.reporter,
            kind="torch",
            model=checkpoint,
            scorecard=scores,
            other_scorecard=None,
            processes=None,
            pinned=self.inputs.of("evaluate").text(),
            frozen_encoders=shared_encoders(self.recipe),
            facts=facts,
        )
        with new_folder(kept) as new:
            shutil.copyfile(scores / "items.parquet", new / ITEMS_FILE)
            (new / TRIAL_FILE).write_text(
                self._describe(scores, size).model_dump_json(indent=2) + "\n", encoding="utf-8"
            )
        # The scores are what counts; a checkpoint of every trial would fill any disk.
        shutil.rmtree(self.folder)
        shutil.rmtree(work_dir() / self.last_digest, ignore_errors=True)

    def _stage(
        self,
        stage: StageName,
        encoder: str | None,
        encoder_checkpoints: dict[str, Path] | None = None,
        checkpoint: Path | None = None,
    ) -> Path:
        from manyeyes.training.stage import read_stage_report

        out = self.folder / (f"{stage}-{encoder}" if encoder else stage)
        _when_free(
            lambda: train_stage(
                self.reporter,
                stage,
                validation=self.validation,
                out=out,
                encoder=encoder,
                encoder_checkpoints=encoder_checkpoints,
                checkpoint=checkpoint,
                branches=self.branches,
                pinned=self.inputs.of(_STEPS_OF_STAGES[stage], encoder=encoder or "").text(),
            ),
            self.reporter,
        )
        report = read_stage_report(out)
        self.stages.append(
            TrialStage(
                stage=stage,
                encoder=encoder,
                seconds=round(report.seconds, 3),
                samples=report.samples,
                final_loss=report.final_loss,
                checkpoint_digest=report.checkpoint_digest,
            )
        )
        self.last_digest = report.stage_digest
        return out

    def _describe(self, scores: Path, size: RecipeFacts) -> Trial:
        from manyeyes.evaluation.scorecard import read_scorecard

        card = read_scorecard(scores / "scorecard.json")
        mean, ci95 = mean_score(card)
        return Trial(
            variant=self.variant,
            **_record(self.recipe),
            encoders=tuple(encoder.name for encoder in self.recipe.model.encoders),
            stages=tuple(self.stages),
            scorecard=card,
            mean=mean,
            mean_ci95=ci95,
            parameters=size.parameters.total,
            visual_tokens=size.visual_tokens,
            flops_per_sample=size.flops_per_sample,
            train_seconds=round(sum(stage.seconds for stage in self.stages), 3),
            evaluate_seconds=round(sum(score.seconds for score in card.benchmarks.values()), 3),
        )


def shared_encoders(recipe: Recipe) -> tuple[str, ...]:
    """Encoders whose features a trial's scoring keeps: where a stage does, those that no stage of the model trains."""
    stages = [spec for name, spec in recipe.present_stages() if name != "prealign"]
    if not any(spec.keep_features for spec in stages):
        return ()
    trained = {group for spec in stages for group in spec.train}
    names = [encoder.name for encoder in recipe.model.encoders]
    return tuple(name for name in names if not trained & {"encoders", f"encoders.{name}"})


def _when_free(train: Callable[[], Result], reporter: Reporter) -> Result:
    """Call ``train``; while another trial trains the very same stage, wait: then its result is taken."""
    while True:
        try:
            return train()
        except LockedError:
            reporter.progress("waiting for another trial, which trains the same stage", done=0.0)
            time.sleep(_WAIT_S)


def _given_encoders(folders: Sequence[Path], recipe: Recipe) -> dict[str, Path]:
    """Folders of ``prealign_encoder`` by encoder name, those of this variant only."""
    from manyeyes.training.stage import ENCODER_FACTS

    wanted = recipe.prealigned_encoders()
    found = {
        str(json.loads((folder / ENCODER_FACTS).read_text(encoding="utf-8"))["name"]): folder
        for folder in folders
        if not is_absent(folder)
    }
    return {name: folder for name, folder in found.items() if name in wanted}


def _record(recipe: Recipe) -> dict[str, str]:
    """What ``trial.json`` says of the recipe, every default filled in: it is to be trained again by later versions."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return {"recipe": text, "recipe_digest": hashlib.sha256(text.encode()).hexdigest()}


def _identity(inputs: Pinned, given: dict[str, Path], *, validation: Path) -> str:
    """sha256 over everything that determines a trial's result; the gate, names and words are no part of it."""
    from manyeyes.training.stage import encoder_digest

    facts_kept = {
        "recipe": inputs.recipe.model_dump(mode="json", include={"seed", "model", "stages", "evaluation"}),
        "encoders": {name: encoder_digest(folder) for name, folder in sorted(given.items())},
        "quarantine": sorted(read_quarantine(validation)),
        "data_md5": inputs.data_md5,
        "code_digest": inputs.code_digest,
    }
    return hashlib.sha256(json.dumps(facts_kept, sort_keys=True).encode()).hexdigest()


STEP = Step(
    "train_trial",
    train_trial,
    imports=(
        *HEAVY,
        "manyeyes.evaluation.answering.torch_answerer",
        "manyeyes.evaluation.evaluate",
        "manyeyes.estimate.skeleton",
    ),
    outputs=("trial",),
)
