"""Writes the ONNX bundle and compares its answers with torch's."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from manyeyes.evaluation.benchmarks import Benchmark, load_benchmarks
from manyeyes.harness.base import Reporter, Step, StepResult, num_threads
from manyeyes.harness.inputs import parse_pinned
from manyeyes.pages import facts_table, step_page
from manyeyes.runtime.bundle import Group
from manyeyes.runtime.bundle_contents import variant_files


def export_onnx(
    reporter: Reporter,
    *,
    checkpoint: Path,
    pinned: str,
    bundle: Path,
    parity: Path,
) -> StepResult:
    """Write the bundle's folder and ``parity.json``.

    Args:
        reporter: Shows the progress.
        checkpoint: Checkpoint of ``sft``.
        pinned: From ``preflight``.
        bundle: Folder to write.
        parity: Folder to write ``parity.json`` into.

    Raises:
        CheckpointError: The checkpoint is of another model than the recipe's.
    """
    import torch

    from manyeyes.export.bundle import export_bundle, record_parity, write_json
    from manyeyes.export.parity import measure_parity
    from manyeyes.model import match_checkpoint

    inputs = parse_pinned(pinned)
    recipe = inputs.recipe
    torch.set_num_threads(num_threads())
    # The bundle's lineage says that it is of this recipe.
    models = [recipe.stage_model(name) for name, _ in recipe.present_stages() if name != "prealign"][::-1]
    match_checkpoint(checkpoint, [*models, recipe.model], snapshot_path=inputs.snapshot.path)
    reporter.progress("writing the graphs", done=0.1)
    asked = recipe.evaluation.model_copy(update={"benchmarks": recipe.evaluation.benchmarks[:1]})
    (benchmark,) = load_benchmarks(asked, snapshot=inputs.snapshot, max_items=recipe.export.parity_items)
    groups = _groups(benchmark)
    manifest = export_bundle(
        checkpoint,
        bundle,
        recipe=recipe,
        data_md5=inputs.data_md5,
        code_digest=inputs.code_digest,
        calibration=groups,
    )
    reporter.progress("comparing with torch", done=0.5)
    report = measure_parity(
        checkpoint,
        bundle,
        groups,
        items=recipe.export.parity_items,
        max_new_tokens=asked.max_new_tokens or benchmark.row.max_new_tokens,
    )
    record_parity(bundle, report)
    parity.mkdir(parents=True, exist_ok=True)
    write_json(report, parity / "parity.json")
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    rows: list[tuple[str, object]] = [
        ("bundle digest", manifest.digest),
        ("bytes", size),
        ("opset", manifest.opset),
        ("precision", report.precision),
        ("questions compared", report.items),
        ("same tokens as torch (fraction)", report.token_match),
        ("largest difference of a logit", report.max_abs_logit),
        ("mean difference of a logit", report.mean_abs_logit),
        ("providers", ", ".join(report.providers)),
    ]
    variants: list[tuple[str, object]] = [
        (
            f"{name}: {figures.precision}",
            f"{sum(manifest.files[file].bytes for file in variant_files(manifest.variants[name])):,} bytes, "
            f"{figures.token_match:.1%} token-equal, logits within {figures.max_abs_logit:.2g}",
        )
        for name, figures in report.variants.items()
    ]
    files: list[tuple[str, object]] = [(name, file.bytes) for name, file in sorted(manifest.files.items())]
    return StepResult(
        headline=f"{size / 1e6:.1f} MB, {report.token_match:.1%} of {report.items} answers token-equal to torch",
        metrics={
            "bytes": float(size),
            "token_match": report.token_match,
            "max_abs_logit": report.max_abs_logit,
            "mean_abs_logit": report.mean_abs_logit,
            **{f"{name}.token_match": figures.token_match for name, figures in report.variants.items()},
        },
        html=step_page(
            f"Bundle of {recipe.name}",
            "What the bundle holds, and how it compares with torch.",
            {
                "": facts_table(rows),
                **({"Variants": facts_table(variants)} if variants else {}),
                "Files (bytes)": facts_table(files),
            },
        ),
        markdown=facts_table(rows).markdown() + "\n",
        metadata={"bundle_digest": manifest.digest, "recipe_digest": recipe.digest, "data_md5": inputs.data_md5},
    )


def _groups(benchmark: Benchmark) -> list[Group]:
    groups = []
    for record, items in groupby(benchmark.items, key=lambda item: item.record):
        groups.append(Group(images=benchmark.read_images(record), questions=tuple(item.prompt for item in items)))
    return groups


STEP = Step(
    "export_onnx",
    export_onnx,
    imports=(
        "torch",
        "manyeyes.model",
        "manyeyes.export.bundle",
        "manyeyes.export.parity",
        "onnxruntime",
        "manyeyes.registry.tracking",
    ),
    outputs=("bundle", "parity"),
)
