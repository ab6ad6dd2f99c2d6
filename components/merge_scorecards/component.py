"""Put the scorecards of a model's benchmarks together."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge_scorecards(
    scorecards: dsl.Input[list[dsl.Artifact]],
    pinned: str,
    scorecard: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    champion: str = "",
) -> None:
    """Put the scorecards of a model's benchmarks together.

    Args:
        scorecards: One of each benchmark.
        pinned: What plan_evaluation pinned for this step.
        scorecard: scorecard.json, items.parquet and the report.
        metrics: Scalars.
        report: For people.
        champion: NAME/VERSION in the registry to compare with; NAME alone has none yet. Empty: none is looked up.
    """
    from manyeyes.kubeflow.component import run_component

    run_component("merge_scorecards", locals())
