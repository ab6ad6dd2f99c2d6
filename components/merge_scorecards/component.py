"""Put the scorecards of a model's benchmarks together."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge_scorecards(
    scorecards: dsl.Input[list[dsl.Artifact]],
    recipe_json: str,
    recipe_digest: str,
    data_md5: str,
    data_remote: str,
    code_digest: str,
    scorecard: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
    champion: str = "",
) -> None:
    """Put the scorecards of a model's benchmarks together.

    Args:
        scorecards: One of each benchmark.
        recipe_json: Recipe with every default filled in.
        recipe_digest: Its sha256.
        data_md5: Snapshot.
        data_remote: A folder or s3:// that holds it.
        code_digest: Digest of the image or of the library's source.
        scorecard: scorecard.json, items.parquet and the report.
        metrics: Scalars.
        report: For people.
        notes: The same without pictures; the reason, when the step fails.
        champion: NAME/VERSION in the registry to compare with; NAME alone has none yet. Empty: none is looked up.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.merge_scorecards import STEP

    run_step(
        STEP,
        metrics=metrics,
        report=report,
        notes=notes,
        outputs={"scorecard": scorecard},
        scorecards=[Path(artifact.path) for artifact in scorecards],
        recipe_json=recipe_json,
        recipe_digest=recipe_digest,
        data_md5=data_md5,
        data_remote=data_remote,
        code_digest=code_digest,
        champion=champion,
    )
