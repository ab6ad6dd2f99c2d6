"""Score a model on one benchmark, with the image and without."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def score_benchmark(
    benchmark: str,
    kind: str,
    model: dsl.Input[dsl.Model],
    recipe_json: str,
    recipe_digest: str,
    data_md5: str,
    data_remote: str,
    code_digest: str,
    scorecard: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
) -> None:
    """Score a model on one benchmark, with the image and without.

    Args:
        benchmark: A row of BENCHMARKS.
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: Checkpoint or bundle.
        recipe_json: Recipe with every default filled in.
        recipe_digest: Its sha256.
        data_md5: Snapshot.
        data_remote: A folder or s3:// that holds it.
        code_digest: Digest of the image or of the library's source.
        scorecard: scorecard.json, items.parquet and the report.
        metrics: Scalars.
        report: For people.
        notes: The same in short; the reason, when the step fails.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.score_benchmark import STEPS

    run_step(
        STEPS[kind],
        metrics=metrics,
        report=report,
        notes=notes,
        label=benchmark,
        outputs={"scorecard": scorecard},
        benchmark=benchmark,
        kind=kind,
        model=Path(model.path),
        recipe_json=recipe_json,
        recipe_digest=recipe_digest,
        data_md5=data_md5,
        data_remote=data_remote,
        code_digest=code_digest,
    )
