"""Scores any checkpoint, bundle or registered version on a list of benchmarks."""

# kfp reads the annotations themselves: no future import here.
from kfp import dsl

from components.fetch_model.component import fetch_model
from components.merge_scorecards.component import merge_scorecards
from components.plan_evaluation.component import plan_evaluation
from components.score_benchmark.component import score_benchmark
from components.summarise_run.component import summarise_run


# A pipeline of its own for the same reasons as stages in pipelines/train.py.
@dsl.pipeline(name="benchmarks")
def benchmarks(
    names: list,
    kind: str,
    model: dsl.Input[dsl.Model],
    score: str,
    merge: str,
    champion: str,
) -> dsl.Artifact:
    """Score a model on every benchmark, side by side, and put the scorecards together.

    Args:
        names: Benchmarks; never empty.
        kind: torch for a checkpoint, bundle for an ONNX bundle.
        model: Checkpoint or bundle.
        score: What is pinned for score_benchmark.
        merge: What is pinned for merge_scorecards.
        champion: What the report compares with.
    """
    with dsl.ParallelFor(names, name="each benchmark") as benchmark:
        scored = score_benchmark(benchmark=benchmark, kind=kind, model=model, pinned=score)
    # Never cached, and cheap: how a run ended that is otherwise from the cache is known by it.
    merged = merge_scorecards(
        scorecards=dsl.Collected(scored.outputs["scorecard"]), champion=champion, pinned=merge
    ).set_caching_options(False)
    return merged.outputs["scorecard"]


@dsl.pipeline(name="evaluate")
def evaluate(
    evaluate_model: str,
    evaluate_benchmarks: str = "",
    recipe: str = "tiny",
    recipe_overrides: str = "",
    recipe_text: str = "",
    data_md5: str = "",
    data_remote: str = "",
) -> None:
    """Score a checkpoint, a bundle or a registered version on a list of benchmarks; one merged report.

    Args:
        evaluate_model: A folder or s3:// with a checkpoint or bundle, or NAME, NAME@ALIAS, NAME/VERSION.
        evaluate_benchmarks: Names separated by commas, spaces or lines. Empty: the recipe's own.
        recipe: A recipe's name: how many items, how long answers, which chat template.
        recipe_overrides: Changes to the recipe, one a line, for instance evaluation.max_items=100
        recipe_text: A recipe of your own, as YAML, taken instead of recipe.
        data_md5: Snapshot (outs[0].md5 in data.dvc). Empty in a checkout only.
        data_remote: A folder, s3://bucket/prefix or hub:OWNER/NAME@COMMIT that holds the snapshot. Empty in a checkout
            only.
    """
    summary = summarise_run(pipeline="evaluate", subject=evaluate_model, run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    with dsl.ExitHandler(summary.set_caching_options(False), name="score and report"):
        planned = plan_evaluation(
            evaluate_model=evaluate_model,
            evaluate_benchmarks=evaluate_benchmarks,
            recipe=recipe,
            recipe_overrides=recipe_overrides,
            recipe_text=recipe_text,
            data_md5=data_md5,
            data_remote=data_remote,
        ).set_caching_options(False)
        fetched = fetch_model(
            pinned=planned.outputs["fetch_model"],
            **{name: planned.outputs[name] for name in ("kind", "model", "model_digest")},
        )
        model = fetched.outputs["fetched"]
        benchmarks(
            names=planned.outputs["benchmarks"],
            kind=planned.outputs["kind"],
            model=model,
            score=planned.outputs["score_benchmark"],
            merge=planned.outputs["merge_scorecards"],
            champion=planned.outputs["champion"],
        )
