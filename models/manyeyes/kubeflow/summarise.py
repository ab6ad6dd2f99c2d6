"""From a run's events and artifacts to ``summary.json``, and from there to plain words."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from manyeyes.harness.events import (
    EXAMPLE_FILE,
    VARIANTS,
    Artifact,
    BundleSummary,
    ErrorReport,
    Event,
    ExampleSummary,
    GateRuleSummary,
    GateSummary,
    ModelSummary,
    ParitySummary,
    Problem,
    RunSummary,
    ScoreSummary,
    StepSummary,
    VariantSummary,
    union_seconds,
)
from manyeyes.harness.inputs import PINNING_STEPS

# Steps, train's aside, whose report is the result of their pipeline.
_RESULT_STEPS = (
    *("merge_scorecards", "advance_search", "compare_trials", "publish_snapshot", "judge_snapshot"),
    *("promote_version", "restore_previous"),
)


def summarise(
    events: list[Event],
    *,
    run_dir: Path,
    pipeline: str,
    status: Literal["succeeded", "failed", "interrupted"],
    started: str,
    git_commit: str | None,
    git_dirty: bool | None,
    error: ErrorReport | None,
    wall_s: float,
) -> RunSummary:
    """Put together what a run did; whatever it did not reach stays null.

    Args:
        events: All events of the run.
        run_dir: Its folder; reports are copied to ``reports/`` there.
        pipeline: Pipeline name.
        status: How it ended.
        started: ISO 8601.
        git_commit: Commit of the checkout.
        git_dirty: Whether the checkout differed from it.
        error: Why it failed.
        wall_s: Seconds from the command until now.
    """
    ended = {event.step: event for event in events if event.kind in ("completed", "cached")}
    reports = _copy_reports(ended, run_dir)
    pinned = next((_facts(ended[step]) for step in PINNING_STEPS if step in ended), {})
    registered = ended["register"].parameters if "register" in ended else {}
    steps = _steps(events, reports)
    intervals = [
        (event.ended - event.seconds, event.ended)
        for event in events
        if event.seconds is not None and event.ended is not None
    ]
    return RunSummary(
        run_id=run_dir.name,
        pipeline=pipeline,
        status=status,
        started=started,
        recipe=pinned.get("recipe"),
        recipe_digest=pinned.get("recipe_digest"),
        data_md5=pinned.get("data_md5"),
        code_digest=pinned.get("code_digest"),
        git_commit=git_commit,
        git_dirty=git_dirty,
        steps=steps,
        scorecard=_scores(
            _artifact(ended, "evaluate[torch]", "scorecard") or _artifact(ended, "merge_scorecards", "scorecard")
        ),
        bundle_scorecard=_scores(_artifact(ended, "evaluate[bundle]", "scorecard")),
        parity=_parity(_artifact(ended, "export_onnx", "parity")),
        gate=_gate(_artifact(ended, "gate", "gate")),
        model=ModelSummary(
            name=registered["name"], version=registered["version"], aliases=[str(a) for a in registered["aliases"]]
        )
        if registered
        else None,
        bundle=_bundle(_artifact(ended, "export_onnx", "bundle")),
        variants=_variants(
            _artifact(ended, "export_onnx", "bundle"), _artifact(ended, "evaluate[bundle]", "scorecard")
        ),
        example=_example(_artifact(ended, "evaluate[torch]", "scorecard"), run_dir),
        report=_report_of_result(reports),
        reports=reports,
        log=str(run_dir / "pipeline.log"),
        error=error,
        overhead_s=round(max(0.0, wall_s - union_seconds(intervals)), 3),
        wall_s=round(wall_s, 3),
    )


def _steps(events: list[Event], reports: dict[str, str]) -> list[StepSummary]:
    steps: dict[str, StepSummary] = {}
    for event in events:
        if event.kind not in ("finished", "cached"):
            continue
        steps[event.step] = StepSummary(
            name=event.step,
            seconds=round(event.seconds or 0.0, 3) if event.kind == "finished" else 0.0,
            cached=event.kind == "cached",
            import_seconds=round(event.import_seconds or 0.0, 3),
            figure=event.figure,
            report=reports.get(event.step),
        )
    return list(steps.values())


def _facts(event: Event) -> dict[str, str]:
    """What a step that pins recipe, data and code says of them."""
    report = event.artifacts.get("report")
    return {} if report is None else {name: str(value) for name, value in report.metadata.items()}


def _copy_reports(ended: dict[str, Event], run_dir: Path) -> dict[str, str]:
    """HTML reports under names that a browser opens; Kubeflow's artifacts have no suffix."""
    copies: dict[str, str] = {}
    for step, event in ended.items():
        source = event.artifacts.get("report")
        if source is None or not Path(source.path).is_file():
            continue
        # A locale may have no bytes for other characters in a file's name.
        plain = step.encode("ascii", "backslashreplace").decode()
        target = run_dir / "reports" / f"{re.sub(r'[^A-Za-z0-9._=+-]+', '-', plain).removesuffix('-')}.html"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source.path, target)
        copies[step] = str(target)
    return copies


def _report_of_result(reports: dict[str, str]) -> str | None:
    """The report that a person wants to see first: of the last step that has the pipeline's result."""
    found = [path for step, path in reports.items() if step.partition("[")[0] in _RESULT_STEPS]
    return reports.get("evaluate[torch]") or (found[-1] if found else None)


def _artifact(ended: dict[str, Event], step: str, name: str) -> Path | None:
    artifact: Artifact | None = ended[step].artifacts.get(name) if step in ended else None
    return None if artifact is None else Path(artifact.path)


def _read(path: Path | None, name: str) -> dict[str, Any] | None:
    if path is None:
        return None
    return dict(json.loads((path / name).read_text(encoding="utf-8")))


def _scores(folder: Path | None) -> dict[str, ScoreSummary] | None:
    card = _read(folder, "scorecard.json")
    if card is None:
        return None
    return {
        name: ScoreSummary(**{key: score[key] for key in ("n", "score", "ci95", "image_off", "parse_failures")})
        for name, score in card["benchmarks"].items()
    }


def _example(folder: Path | None, run_dir: Path) -> ExampleSummary | None:
    if folder is None or not (folder / EXAMPLE_FILE).is_file():
        return None
    example = ExampleSummary.model_validate_json((folder / EXAMPLE_FILE).read_text(encoding="utf-8"))
    image = shutil.copyfile(folder / example.image, run_dir / example.image)
    return example.model_copy(update={"image": str(image)})


def _parity(folder: Path | None) -> ParitySummary | None:
    report = _read(folder, "parity.json")
    if report is None:
        return None
    return ParitySummary(max_abs_logit=report["max_abs_logit"], token_match=report["token_match"])


def _gate(folder: Path | None) -> GateSummary | None:
    report = _read(folder, "gate.json")
    if report is None:
        return None
    keys = ("rule", "benchmark", "found", "needed", "passed")
    rules = [GateRuleSummary(**{key: rule.get(key) for key in keys}) for rule in report["rules"]]
    return GateSummary(verdict=report["verdict"], rules=rules)


def _bundle(folder: Path | None) -> BundleSummary | None:
    if folder is None:
        return None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return BundleSummary(path=str(folder), bytes=size)


def _variants(bundle: Path | None, scorecard: Path | None) -> dict[str, VariantSummary]:
    if bundle is None:
        return {}
    from manyeyes.runtime.bundle_contents import (
        DEFAULT_VARIANT,
        describe_precision,
        read_manifest,
        read_variants,
        variant_files,
    )

    manifest = read_manifest(bundle)
    found = {}
    for name, variant in read_variants(manifest).items():
        if name == DEFAULT_VARIANT or variant.parity is None:
            continue
        folder = None if scorecard is None else scorecard / VARIANTS / name
        found[name] = VariantSummary(
            precision=describe_precision(variant),
            bytes=sum(manifest["files"][file]["bytes"] for file in variant_files(variant)),
            token_match=variant.parity.token_match,
            scores=_scores(folder) or {},
        )
    return found


def in_words(summary: RunSummary) -> list[str]:
    """The last lines on the terminal, for a run that ended."""
    if summary.error is not None:
        lines = [f"{summary.error.step} failed: {summary.error.error}"]
        for problem in summary.error.problems or (summary.error,):
            if isinstance(problem, Problem):
                lines.append(f"  {problem.subject}")
            lines += [f"  found   {problem.found}", f"  needed  {problem.needed}", f"  do      {problem.do}"]
        return [*lines, f"  log     {_short(summary.log)}"]
    if summary.status == "interrupted":
        return [
            f"stopped after {_duration(summary.wall_s)}; nothing goes on running",
            "  the same command again continues where it stopped",
        ]
    lines = []
    for name, score in (summary.scorecard or {}).items():
        off = "" if score.image_off is None else f", without the image {score.image_off:.1f}%"
        lines.append(
            f"{name}: {score.score:.1f}% right (95% interval {score.ci95[0]:.1f} to {score.ci95[1]:.1f}, "
            f"{score.n:,} questions){off}"
        )
    if summary.gate is not None:
        failed = [rule for rule in summary.gate.rules if not rule.passed]
        lines.append(
            f"gate: {summary.gate.verdict} ({len(summary.gate.rules) - len(failed)} of {len(summary.gate.rules)} rules)"
        )
        lines += [f"  {rule.rule}: found {rule.found}, needed {rule.needed}" for rule in failed]
    if summary.model is not None:
        aliases = f", now {' and '.join(summary.model.aliases)}" if summary.model.aliases else ", no alias"
        lines.append(f"registered: {summary.model.name} version {summary.model.version}{aliases}")
    if summary.bundle is not None:
        lines.append(f"bundle: {_short(summary.bundle.path)} ({summary.bundle.bytes / 1e6:.1f} MB)")
    for name, variant in summary.variants.items():
        scores = "".join(f", {benchmark} {score.score:.1f}%" for benchmark, score in variant.scores.items())
        size, equal = f"{variant.bytes / 1e6:.1f} MB", f"{variant.token_match:.1%} token-equal"
        lines.append(f"  {name}: {variant.precision}, {size}, {equal}{scores}")
    if not lines:
        lines += [f"{step.name}: {step.figure}" for step in summary.steps if step.report == summary.report][-1:]
    if summary.report is not None:
        lines.append(f"report: {_short(summary.report)}")
    cached = sum(step.cached for step in summary.steps)
    share = 100 * summary.overhead_s / summary.wall_s if summary.wall_s else 0
    lines.append(
        f"time: {_duration(summary.wall_s)}, {_duration(summary.overhead_s)} ({share:.0f}%) of it outside the steps; "
        f"{cached} of {len(summary.steps)} steps from cache"
    )
    if summary.model is not None:
        promoted = "champion" in summary.model.aliases
        reference = summary.model.name if promoted else f"{summary.model.name}/{summary.model.version}"
        image, question = "IMAGE", "QUESTION"
        if summary.example is not None:
            image, question = _short(summary.example.image), summary.example.question
        lines += [
            "",
            "next:",
            f'  manyeyes ask {reference} {image} "{question}"',
            f"  manyeyes pull {reference} my-bundle"
            + "".join(f" --variant {name}" for name in [*summary.variants][-1:]),
            "  mlflow ui --backend-store-uri sqlite:///runs/mlflow.db",
        ]
    return lines


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def _short(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
