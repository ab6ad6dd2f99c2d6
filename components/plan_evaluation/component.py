"""Find the model to score and the benchmarks to ask."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_evaluation(
    evaluate_model: str,
    evaluate_benchmarks: str,
    pinned: str,
    report: dsl.Output[dsl.HTML],
) -> NamedTuple(  # type: ignore[valid-type]
    "Planned",
    [
        ("fetch_model", str),
        ("score_benchmark", str),
        ("merge_scorecards", str),
        ("benchmarks", list),
        ("kind", str),
        ("model", str),
        ("model_digest", str),
        ("champion", str),
    ],
):
    """Find the model to score and the benchmarks to ask.

    Args:
        evaluate_model: A folder, s3://, or NAME, NAME@ALIAS, NAME/VERSION in the registry.
        evaluate_benchmarks: Names; empty: the recipe's own.
        pinned: What resolve_data pinned for this step.
        report: For people.
    """
    from manyeyes.kubeflow.component import run_component

    return run_component("plan_evaluation", locals())
