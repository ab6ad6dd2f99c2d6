"""The exit handler: says how the run went and where everything is, and tells a webhook."""

# kfp reads the annotations themselves, and takes this file's text into the pipeline: no future import, and all imports
# of the body inside the body.
from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def summarise_run(
    pipeline: str,
    subject: str,
    run_id: str,
    report: dsl.Output[dsl.HTML],
    notes: dsl.Output[dsl.Markdown],
    status: dsl.PipelineTaskFinalStatus,
    recipe_text: str = "",
) -> None:
    """Say how the run went and where everything is, and tell a webhook (MANYEYES_WEBHOOK_URL).

    Args:
        pipeline: Name of the pipeline.
        subject: What it was run for, for instance the recipe; the first line is shown.
        run_id: Of the pipeline run: dsl.PIPELINE_JOB_ID_PLACEHOLDER.
        report: The summary for people.
        notes: The same as Markdown.
        status: Kubeflow's verdict, which every exit handler gets.
        recipe_text: The recipe where it travels as text; its name is shown instead of the subject.
    """
    from manyeyes.kubeflow.component import run_component

    given = {"subject": recipe_text or subject, "state": status.state, "message": status.error_message or ""}
    run_component("summarise_run", {**locals(), **given})
