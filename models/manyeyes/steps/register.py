"""Registers the bundle with all evidence; promotes it when the gate says so. Never cached."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from manyeyes.errors import RegistryError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.events import VARIANTS
from manyeyes.harness.inputs import parse_pinned
from manyeyes.pages import facts_table, step_page
from manyeyes.registry.references import CHECKPOINT_ITEMS, ITEMS, SCORECARD, VARIANT
from manyeyes.runtime.bundle_contents import DEFAULT_VARIANT, read_manifest, read_variants
from manyeyes.storage import link_or_copy


def register(
    reporter: Reporter,
    *,
    registry_model: str,
    pinned: str,
    validation: Path,
    scorecard: Path,
    bundle_scorecard: Path,
    parity: Path,
    bundle: Path,
    gate: Path,
) -> StepResult:
    """Make a version of the registered model, or find the one that this bundle is already.

    Args:
        reporter: Shows the progress.
        registry_model: Name in the registry.
        pinned: From ``preflight``.
        validation: Folder of ``validate_data``.
        scorecard: Folder of ``evaluate`` for torch.
        bundle_scorecard: Folder of ``evaluate`` for the bundle.
        parity: Folder of ``export_onnx`` with ``parity.json``.
        bundle: Folder of ``export_onnx``.
        gate: Folder of ``gate``.

    Returns:
        Values: ``name``, ``version``, ``aliases`` and ``verdict``.

    Raises:
        RegistryError: The bundle was made with another recipe.
    """
    from manyeyes.evaluation.scorecard import read_scorecard
    from manyeyes.registry.history import approvals_of
    from manyeyes.registry.lineage import LINEAGE, describe_lineage
    from manyeyes.registry.versions import register as register_version

    inputs = parse_pinned(pinned)
    recipe_digest = inputs.recipe.digest
    made_with = str(read_manifest(bundle)["recipe_digest"])
    # A bundle of an earlier version has the digest of the whole recipe.
    if made_with not in (inputs.of("export_onnx").recipe.digest, recipe_digest):
        raise RegistryError(
            f"bundle {bundle} was made with the recipe {made_with[:12]}",
            f"{recipe_digest[:12]}, the recipe that would be kept with the version",
            "Name the recipe that the bundle was exported with, or export it again.",
        )
    reporter.progress("copying bundle and evidence", done=0.1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(inputs.recipe.canonical_json(), encoding="utf-8")
        lineage = Path(folder) / LINEAGE
        lineage.write_text(
            describe_lineage(inputs.recipe, inputs.snapshot).model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        registered = register_version(
            registry_model,
            bundle=bundle,
            scorecard=scorecard / "scorecard.json",
            bundle_scorecard=bundle_scorecard / "scorecard.json",
            items=bundle_scorecard / "items.parquet",
            gate=gate / "gate.json",
            # The runner's, or the image's on a cluster.
            tags={
                "recipe_digest": recipe_digest,
                "data_remote": inputs.data_remote,
                "git_commit": os.environ.get("MANYEYES_GIT_COMMIT") or "unknown",
            },
            attachments=(
                parity / "parity.json",
                validation / "validation.json",
                recipe,
                lineage,
                *_variant_evidence(scorecard, bundle_scorecard, Path(folder)),
                *(path for path in [validation / "contamination.json"] if path.is_file()),
            ),
            run_id=reporter.run_id,
            approvals=approvals_of(inputs.recipe.registry),
        )
    aliases = list(registered.aliases)
    rows: list[tuple[str, object]] = [
        ("name", registered.name),
        ("version", registered.version),
        ("aliases", ", ".join(aliases) or "none"),
        ("gate", registered.verdict),
        ("new", "yes" if registered.created else "no, this bundle was registered before"),
        ("recipe digest", recipe_digest),
        ("data md5", inputs.data_md5),
        ("code digest", inputs.code_digest),
    ]
    scores = "; ".join(
        f"{benchmark} {score.score:.1f}{score.mark} ({score.ci95[0]:.1f} to {score.ci95[1]:.1f}, {score.n:,} questions)"
        for benchmark, score in read_scorecard(bundle_scorecard / "scorecard.json").benchmarks.items()
    )
    variants = [name for name in read_variants(read_manifest(bundle)) if name != DEFAULT_VARIANT]
    rows += [("variants", ", ".join(variants))] if variants else []
    name = f"{registered.name} version {registered.version}"
    return StepResult(
        headline=f"{name}, {' and '.join(aliases) if aliases else 'no alias'}",
        metrics={"version": float(registered.version)},
        html=step_page(f"Registered: {name}", "What the registry holds now.", {"": facts_table(rows)}),
        markdown=facts_table(rows).markdown() + "\n",
        values={
            "name": registered.name,
            "version": str(registered.version),
            "aliases": aliases,
            "verdict": registered.verdict,
        },
        metadata={
            "model": registered.name,
            "version": registered.version,
            "aliases": ", ".join(aliases),
            "verdict": registered.verdict,
            "scores": scores,
        },
    )


def _variant_evidence(scorecard: Path, bundle_scorecard: Path, folder: Path) -> Iterator[Path]:
    """What the bundle's variants are judged by: the checkpoint's items, and each one's scorecard and items."""
    files = {CHECKPOINT_ITEMS: scorecard / ITEMS}
    for variant in sorted((bundle_scorecard / VARIANTS).glob("*")):
        files |= {f"{VARIANT.format(variant.name)}{name}": variant / name for name in (SCORECARD, ITEMS)}
    for name, file in files.items():
        link_or_copy(file, folder / name)
        yield folder / name


STEP = Step("register", register, imports=("mlflow.pyfunc", "manyeyes.registry.versions"))
