"""Scores a model on the recipe's benchmarks, with the image and without; once for torch, once for the bundle."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Literal

from PIL import Image

from manyeyes.evaluation.benchmarks import find_benchmark, load_benchmark
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.steps.base import Reporter, Step, StepResult, num_threads
from manyeyes.steps.inputs import Inputs, open_inputs, work_dir
from manyeyes.steps.summary import EXAMPLE_FILE, ExampleSummary


def evaluate(
    reporter: Reporter,
    *,
    kind: Literal["torch", "bundle"],
    model: Path,
    recipe_json: str,
    recipe_digest: str,
    data_md5: str,
    data_remote: str,
    code_digest: str,
    scorecard: Path,
    other_scorecard: Path | None = None,
) -> StepResult:
    """Write ``scorecard.json``, ``items.parquet``, ``report.html`` and ``report.md``.

    Args:
        reporter: Shows the progress.
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        model: Its folder.
        recipe_json: From ``resolve_data``.
        recipe_digest: From ``resolve_data``.
        data_md5: From ``resolve_data``.
        data_remote: From ``resolve_data``.
        code_digest: From ``resolve_data``.
        scorecard: Folder to write.
        other_scorecard: Folder of the same model's other scorecard; the report shows the difference.
    """
    from manyeyes.evaluation.answerers import Answerer, BundleAnswerer, TorchAnswerer
    from manyeyes.evaluation.evaluate import EvaluationProgress
    from manyeyes.evaluation.evaluate import evaluate as evaluate_model

    inputs = open_inputs(recipe_json, recipe_digest=recipe_digest, data_md5=data_md5, data_remote=data_remote)
    threads = num_threads()
    answerer: Answerer
    if kind == "torch":
        from manyeyes.model import checkpoint_digest

        answerer, digest = TorchAnswerer(model, threads=threads), checkpoint_digest(model)
    else:
        answerer = BundleAnswerer(model, threads=threads)
        digest = str(json.loads((model / "manifest.json").read_text())["digest"])

    def show(progress: EvaluationProgress) -> None:
        reporter.progress(
            f"{progress.benchmark} {progress.condition}: {progress.score:.1f}% of {progress.done:,}, "
            f"{progress.questions_per_s:,.0f} questions/s",
            done=progress.done / progress.total,
            eta_s=progress.eta_s,
        )

    card = evaluate_model(
        answerer,
        inputs.recipe,
        snapshot=inputs.snapshot,
        out_dir=scorecard,
        code_digest=code_digest,
        model_digest=digest,
        on_progress=show,
        work_dir=work_dir() / "evaluate",
    )
    _keep_example(inputs, scorecard)
    figure = ", ".join(
        [
            f"{name} {score.score:.1f}{score.mark}, without image {score.image_off:.1f}{score.mark}"
            for name, score in card.benchmarks.items()
        ]
        + [f"{name} skipped" for name in card.skipped]
    )
    return StepResult(
        figure=figure,
        metrics=card.metrics(),
        html=(scorecard / "report.html").read_text(),
        markdown=(scorecard / "report.md").read_text() + _difference(card, other_scorecard),
        metadata={"model_digest": digest, "kind": kind, "recipe_digest": recipe_digest, "data_md5": data_md5},
    )


def _keep_example(inputs: Inputs, folder: Path) -> None:
    """One image and question of the first benchmark, for a person to try."""
    row = find_benchmark(inputs.recipe.evaluation.benchmarks[0])
    benchmark = load_benchmark(row, snapshot=inputs.snapshot, max_items=1)
    (item,) = benchmark.items
    images = benchmark.read_images(item.record)
    if images:
        with Image.open(io.BytesIO(images[0])) as opened:
            image = folder / f"example.{(opened.format or 'png').lower()}"
        image.write_bytes(images[0])
        example = ExampleSummary(image=image.name, question=item.question, reference=item.reference)
        (folder / EXAMPLE_FILE).write_text(example.model_dump_json(indent=2) + "\n")


def _difference(card: Scorecard, other: Path | None) -> str:
    if other is None:
        return ""
    before = read_scorecard(other / "scorecard.json")
    lines = [
        f"- {name}: {score.score - before.benchmarks[name].score:+.2f} points against {before.model.kind}"
        for name, score in card.benchmarks.items()
        if name in before.benchmarks
    ]
    return "\n\n" + "\n".join(lines) + "\n"


_LIGHT = ("pyarrow.parquet", "onnxruntime", "manyeyes.evaluation.evaluate", "manyeyes.registry.tracking")

# A bundle is scored without torch, whose import takes seconds.
STEPS: dict[str, Step] = {
    "torch": Step(
        "evaluate", evaluate, imports=("manyeyes.evaluation.torch_answerer", *_LIGHT), outputs=("scorecard",)
    ),
    "bundle": Step("evaluate", evaluate, imports=_LIGHT, outputs=("scorecard",)),
}
