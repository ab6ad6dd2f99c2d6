"""Profiles the snapshot and lets Great Expectations judge it, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path

from manyeyes.errors import ValidationError
from manyeyes.steps.base import Reporter, Step, StepResult
from manyeyes.steps.inputs import open_inputs, training_datasets


def validate_data(
    reporter: Reporter,
    *,
    recipe_json: str,
    recipe_digest: str,
    data_md5: str,
    data_remote: str,
    code_digest: str,  # noqa: ARG001  (part of the cache key)
    validation: Path,
) -> StepResult:
    """Write ``profile.parquet``, ``validation.json``, ``validation.html`` and ``quarantine.jsonl``.

    Args:
        reporter: Shows the progress.
        recipe_json: From ``resolve_data``.
        recipe_digest: From ``resolve_data``.
        data_md5: From ``resolve_data``.
        data_remote: From ``resolve_data``.
        code_digest: From ``resolve_data``.
        validation: Folder to write.

    Raises:
        ValidationError: An expectation of severity ``critical`` does not hold.
    """
    from manyeyes.data.validation import validate_snapshot

    inputs = open_inputs(recipe_json, recipe_digest=recipe_digest, data_md5=data_md5, data_remote=data_remote)
    recipe = inputs.recipe
    reporter.progress("profiling every sample", done=0.1)
    report = validate_snapshot(
        inputs.snapshot,
        datasets=training_datasets(recipe),
        eval_datasets=list(recipe.data.eval_datasets),
        suite=recipe.data.suite,
        out_dir=validation,
    )
    failed = [row for row in report.expectations if not row.success]
    if report.verdict != "passed":
        raise ValidationError(
            f"snapshot {data_md5[:8]}: " + "; ".join(row.explanation for row in report.failures()),
            f'every critical expectation of suite "{report.suite}" to hold',
            f"Read {validation / 'validation.html'}, mend the data, then: dvc add data && dvc push",
        )
    return StepResult(
        figure=f"{report.verdict}: {report.rows:,} samples, {report.quarantined} quarantined",
        metrics={
            "samples": float(report.rows),
            "quarantined": float(report.quarantined),
            "contaminated_images": float(report.contaminated_images),
            "expectations_not_met": float(len(failed)),
        },
        html=(validation / "validation.html").read_text(),
        markdown=report.as_markdown(),
        metadata={"data_md5": data_md5, "suite": report.suite, "verdict": report.verdict},
    )


STEP = Step(
    "validate_data",
    validate_data,
    imports=("great_expectations", "manyeyes.data.validation", "manyeyes.registry.tracking"),
    outputs=("validation",),
)
