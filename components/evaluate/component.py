"""Score a model on the recipe's benchmarks, with the image and without."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    kind: str,
    model: dsl.Input[dsl.Artifact],
    pinned: str,
    scorecard: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
    other_scorecard: dsl.Input[dsl.Artifact] = None,
    registry_model: str = "",
) -> None:
    """Score a model on the recipe's benchmarks, with the image and without.

    Args:
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: Checkpoint or bundle.
        pinned: What resolve_data pinned for this step.
        scorecard: scorecard.json, items.parquet and the report.
        metrics: Scalars.
        report: For people.
        notes: The same without pictures; the reason, when the step fails.
        other_scorecard: Another scorecard of the same model, to show the difference.
        registry_model: Name in the registry whose champion the report compares with; empty: none.
    """
    from pathlib import Path

    from manyeyes.harness.base import run_step
    from manyeyes.steps.evaluate import STEPS

    run_step(
        STEPS[kind],
        metrics=metrics,
        report=report,
        notes=notes,
        label=kind,
        outputs={"scorecard": scorecard},
        kind=kind,
        model=Path(model.path),
        pinned=pinned,
        other_scorecard=Path(other_scorecard.path) if other_scorecard else None,
        registry_model=registry_model,
    )
