"""Decides whether the model may be promoted. Never cached: the champion may be another one today."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pydantic

from manyeyes.errors import EvaluationError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.events import VARIANTS
from manyeyes.harness.inputs import cache_dir, parse_pinned

T = TypeVar("T", bound=pydantic.BaseModel)


def gate(
    reporter: Reporter,
    *,
    registry_model: str,
    pinned: str,
    validation: Path,
    scorecard: Path,
    bundle_scorecard: Path,
    parity: Path,
    gate: Path,
) -> StepResult:
    """Write ``gate.json``. A failed verdict is a result and not an error.

    Args:
        reporter: Shows the progress.
        registry_model: Name in the registry; its champion is what the model is compared with.
        pinned: From ``preflight``: for this step, or for ``register``.
        validation: Folder of ``validate_data``.
        scorecard: Folder of ``evaluate`` for torch.
        bundle_scorecard: Folder of ``evaluate`` for the bundle.
        parity: Folder of ``export_onnx`` with ``parity.json``.
        gate: Folder to write ``gate.json`` into.
    """
    from manyeyes.data.contamination.findings import read_contamination
    from manyeyes.data.validation_report import ValidationReport
    from manyeyes.evaluation.scorecard import read_scorecard
    from manyeyes.export.parity import ParityReport
    from manyeyes.registry.gate import (
        VariantEvidence,
        decide,
        render_gate_html,
        render_gate_markdown,
        write_gate_report,
    )
    from manyeyes.registry.pull import comparable_champion

    # In a pipeline it runs in register's pod, and is given what is pinned for that.
    inputs = parse_pinned(pinned).of("gate")
    bundle_scores = read_scorecard(bundle_scorecard / "scorecard.json")
    reporter.progress("fetching the champion's evidence", done=0.1)
    champion = comparable_champion(
        registry_model,
        scorecard=bundle_scores,
        recipe=inputs.of("evaluate").recipe,
        snapshot=inputs.snapshot,
        code_digest=inputs.code_digest,
        work_dir=cache_dir() / "champions" / registry_model,
    )
    report = decide(
        inputs.recipe.gate,
        scorecard=read_scorecard(scorecard / "scorecard.json"),
        bundle_scorecard=bundle_scores,
        parity=_read(ParityReport, parity / "parity.json"),
        validation=_read(ValidationReport, validation / "validation.json"),
        items=bundle_scorecard / "items.parquet",
        champion=champion,
        contamination=read_contamination(validation),
        checkpoint_items=scorecard / "items.parquet",
        variants={
            folder.name: VariantEvidence(read_scorecard(folder / "scorecard.json"), folder / "items.parquet")
            for folder in sorted((bundle_scorecard / VARIANTS).glob("*"))
        },
    )
    gate.mkdir(parents=True, exist_ok=True)
    write_gate_report(report, gate / "gate.json")
    met = sum(rule.passed for rule in report.rules)
    against = f"champion version {report.champion}" if report.champion is not None else "no champion yet"
    return StepResult(
        headline=f"{report.verdict}: {met} of {len(report.rules)} rules met, {against}",
        metrics={
            "passed": float(report.verdict == "passed"),
            "rules": float(len(report.rules)),
            "rules_met": float(met),
        },
        html=render_gate_html(report),
        markdown=render_gate_markdown(report),
        metadata={"verdict": report.verdict, "challenger": report.challenger},
    )


def _read(report: type[T], path: Path) -> T:
    try:
        return report.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        raise EvaluationError(
            f"{path} is no {report.__name__} ({error})", "the folder that an earlier step wrote", "Run that step again."
        ) from error


STEP = Step(
    "gate",
    gate,
    imports=("manyeyes.data.validation_report", "manyeyes.export.parity", "manyeyes.registry.pull"),
    outputs=("gate",),
)
