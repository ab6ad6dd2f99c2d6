"""Profiles the snapshot and lets Great Expectations judge it, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from manyeyes.errors import ValidationError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import Pinned, cache_dir, parse_pinned, training_datasets
from manyeyes.recipe import Recipe


def validate_data(
    reporter: Reporter,
    *,
    pinned: str,
    validation: Path,
) -> StepResult:
    """Write ``profile.parquet``, ``validation.json``, ``validation.html`` and ``quarantine.jsonl``.

    A sample that some stage of the recipe would refuse (too long, say) is put aside too, from all of them.
    Where the recipe has evaluation sets, training data is compared with them too: ``contamination.json``,
    ``contamination.html``, ``contamination.md``, ``pairs.jsonl`` and ``contaminated.jsonl``.

    Args:
        reporter: Shows the progress.
        pinned: From ``preflight``.
        validation: Folder to write.

    Raises:
        ValidationError: An expectation of severity ``critical`` does not hold.
        SourceError: The language model's tokenizer cannot be had.
    """
    from manyeyes.data.contamination.search import find_contamination
    from manyeyes.data.validation import validate_snapshot

    inputs = parse_pinned(pinned)
    recipe = inputs.recipe
    reporter.progress("profiling every sample", done=0.1)
    report = validate_snapshot(
        inputs.snapshot,
        datasets=training_datasets(recipe),
        eval_datasets=list(recipe.data.eval_datasets),
        suite=recipe.data.suite,
        out_dir=validation,
        **fit_of(inputs),
        progress=lambda sentence, done: reporter.progress(sentence, done=0.1 + 0.4 * done),
    )
    contamination = None
    if benchmarks := compared_with(recipe):
        contamination = find_contamination(
            inputs.snapshot,
            datasets=training_datasets(recipe),
            benchmarks=benchmarks,
            out_dir=validation,
            cache_dir=cache_dir() / "fingerprints",
            leave_out=recipe.data.contamination.leave_out,
            progress=lambda sentence, done: reporter.progress(sentence, done=0.5 + 0.5 * done),
        )
    failed = [row for row in report.expectations if not row.success]
    if report.verdict != "passed":
        raise ValidationError(
            f"snapshot {inputs.data_md5[:8]}: " + "; ".join(row.explanation for row in report.failures()),
            f'every critical expectation of suite "{report.suite}" to hold',
            f"Read {validation / 'validation.html'}, fix the data, then: dvc add data && dvc push",
        )
    found = [] if contamination is None else contamination.datasets
    return StepResult(
        headline=f"{report.verdict}: {report.rows:,} samples, {report.quarantined} quarantined",
        metrics={
            "samples": float(report.rows),
            "quarantined": float(report.quarantined),
            "contaminated_images": float(report.contaminated_images),
            "near_duplicates": float(sum(row.near + row.mirrored for row in found)),
            "samples_with_shared_text": float(sum(row.overlapping for row in found)),
            "expectations_not_met": float(len(failed)),
        },
        html=(validation / "validation.html").read_text(encoding="utf-8"),
        markdown=report.as_markdown() + ("" if contamination is None else "\n" + contamination.as_markdown()),
        metadata={"data_md5": inputs.data_md5, "suite": report.suite, "verdict": report.verdict},
    )


def fit_of(inputs: Pinned) -> dict[str, Any]:
    """What a profile asks of samples for a recipe, and where what it found of a shard is kept.

    Raises:
        SourceError: The language model's tokenizer cannot be had.
    """
    from manyeyes.training.batches import Admission

    return {
        "find_misfit": Admission(inputs.recipe, snapshot_path=inputs.snapshot.path).find_problem,
        "misfit_key": replace(inputs, data_md5="", data_remote="").text(),
        "cache_dir": cache_dir() / "profiles",
    }


def compared_with(recipe: Recipe) -> Sequence[str]:
    """Data sets that training data is compared with; none where nothing is compared."""
    return [*recipe.data.eval_datasets, *recipe.data.contamination.benchmarks]


STEP = Step(
    "validate_data",
    validate_data,
    imports=(
        "great_expectations",
        "manyeyes.data.contamination.search",
        "manyeyes.registry.tracking",
        "manyeyes.training.batches",
    ),
    outputs=("validation",),
)
