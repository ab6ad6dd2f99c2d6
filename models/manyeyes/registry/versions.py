"""Versions of registered models: register, promote, roll back.

A version is a bundle in an MLflow model, with the evidence behind it: scorecards, per-item outcomes, gate report,
lineage. Tags say what it is, aliases say what it is for: ``challenger`` is the newest version that passed the gate,
``champion`` the one to serve, ``previous`` the champion before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from manyeyes import __version__
from manyeyes.errors import RegistryError
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.registry.champion import champion_evidence, comparable_champion
from manyeyes.registry.evidence import BUNDLE_SCORECARD, GATE, ITEMS, SCORECARD
from manyeyes.registry.gate import GateReport, Verdict, read_gate_report
from manyeyes.registry.gate_report import render_gate_html, render_gate_markdown
from manyeyes.registry.pull import pull
from manyeyes.registry.references import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ModelReference,
    find_alias,
    find_version,
    parse_model_reference,
)
from manyeyes.registry.tracking import Tracking, connect, registry_errors, step_run
from manyeyes.runtime.bundle import check_files, read_manifest

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

__all__ = [
    "ModelReference",
    "RegisteredVersion",
    "champion_evidence",
    "comparable_champion",
    "describe",
    "parse_model_reference",
    "promote",
    "pull",
    "register",
    "rollback",
]

_TAG_CHARACTERS = 5000
_MAX_NEW_TOKENS = 32
_PENDING, _DONE = "pending", "done"


@dataclass(frozen=True)
class RegisteredVersion:
    """One version in the registry.

    Attributes:
        name: Of the registered model.
        version: Number.
        aliases: That point at it now, sorted.
        verdict: The gate's.
        created: Whether this call registered it; ``False`` when its bundle was there already.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    verdict: Verdict
    created: bool = False


def register(
    name: str,
    *,
    bundle: Path,
    scorecard: Path,
    bundle_scorecard: Path,
    items: Path,
    gate: Path,
    tags: Mapping[str, str] | None = None,
    attachments: Sequence[Path] = (),
    run_id: str | None = None,
) -> RegisteredVersion:
    """Register a bundle with its evidence, and promote it when the gate passed it.

    The same bundle digest is never registered twice: the version that has it is reported, and a promotion that was
    interrupted, or that a new verdict now allows, is carried out.

    Args:
        name: Of the registered model; made when missing.
        bundle: Its folder.
        scorecard: Torch's ``scorecard.json``.
        bundle_scorecard: The bundle's ``scorecard.json``.
        items: The bundle's ``items.parquet``.
        gate: ``gate.json``.
        tags: Lineage beyond what the bundle's manifest says, for instance ``git_commit``.
        attachments: More files to keep with the version, for instance ``parity.json``.
        run_id: MLflow run that it belongs to; a run of its own when left out.

    Raises:
        BundleError: A file of the bundle is missing or has changed.
        EvaluationError: A file of evidence is missing, or not about this bundle.
        RegistryError: The champion is another one than the gate compared with.
        RegistryUnreachableError: The registry does not answer.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest["files"])
    report = read_gate_report(gate)
    score = read_scorecard(bundle_scorecard)
    digest = str(manifest["digest"])
    if report.challenger != digest or score.model.digest != digest:
        raise RegistryError(
            f"bundle has digest {digest[:16]}, gate report {report.challenger[:16]}, scorecard "
            f"{score.model.digest[:16]}",
            "evidence about this very bundle",
            "Evaluate the bundle, run the gate, then register.",
        )
    tracking = connect()
    version = _find_bundle(tracking, name, digest)
    created = version is None
    if version is None:
        evidence = {SCORECARD: scorecard, BUNDLE_SCORECARD: bundle_scorecard, ITEMS: items, GATE: gate}
        evidence |= {path.name: path for path in attachments}
        marks = _tags(manifest, score, report) | dict(tags or {})
        with _run(name, run_id) as run:
            model_id, source = _log_model(tracking, run, bundle=bundle, evidence=evidence, report=report, tags=marks)
            _log_scores(tracking, run, model_id, score)
            version = _create_version(tracking, name, source=source, run_id=run, model_id=model_id, tags=marks)
    elif version.tags.get("gate") == "failed" and report.verdict == "passed":
        _set_tags(tracking, version, _gate_tags(report))
        version = find_version(tracking, ModelReference(name, None, int(version.version)))
    if report.verdict == "passed" and version.tags.get("promotion") == _PENDING:
        expected = report.champion
        with registry_errors():
            tracking.client.set_registered_model_alias(name, CHALLENGER, str(version.version))
        _make_champion(tracking, version, expected=expected)
        _set_tags(tracking, version, {"promotion": _DONE})
    return _describe(tracking, name, int(version.version), created=created)


def promote(name: str, version: int, *, force: bool = False) -> RegisteredVersion:
    """Make a version the champion; the old champion becomes ``previous``.

    Args:
        name: Of the registered model.
        version: Number.
        force: Promote a version that the gate failed, too.

    Raises:
        RegistryError: No such model or version, or the gate failed it.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking = connect()
    found = find_version(tracking, ModelReference(name, None, version))
    if found.tags.get("gate") != "passed" and not force:
        raise RegistryError(
            f"{name}/{version} has gate={found.tags.get('gate')} ({found.tags.get('gate_reasons')})",
            "a version that passed the gate",
            "Choose another version, or say --force.",
        )
    _make_champion(tracking, found, expected=find_alias(tracking, name, CHAMPION))
    _set_tags(tracking, found, {"promotion": "forced" if found.tags.get("gate") != "passed" else _DONE})
    return _describe(tracking, name, version)


def rollback(name: str) -> RegisteredVersion:
    """Make ``previous`` the champion again; the two swap, so a second rollback undoes the first.

    Raises:
        RegistryError: No such model, or no earlier champion.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking = connect()
    champion = int(find_version(tracking, ModelReference(name, CHAMPION, None)).version)
    previous = find_alias(tracking, name, PREVIOUS)
    if previous is None or previous == champion:
        raise RegistryError(
            f'champion of "{name}" is version {champion}, and no version is "{PREVIOUS}"',
            "an earlier champion",
            f"Promote a version by number: manyeyes promote {name}/VERSION",
        )
    with registry_errors():
        tracking.client.set_registered_model_alias(name, CHAMPION, str(previous))
        tracking.client.set_registered_model_alias(name, PREVIOUS, str(champion))
    return _describe(tracking, name, previous)


def describe(reference: ModelReference) -> RegisteredVersion:
    """What the registry says of a version.

    Raises:
        RegistryError: No such model, alias or version.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking = connect()
    return _describe(tracking, reference.name, int(find_version(tracking, reference).version))


def _describe(tracking: Tracking, name: str, version: int, *, created: bool = False) -> RegisteredVersion:
    found = find_version(tracking, ModelReference(name, None, version))
    verdict: Verdict = "passed" if found.tags.get("gate") == "passed" else "failed"
    return RegisteredVersion(name, version, tuple(sorted(found.aliases)), verdict, created)


def _find_bundle(tracking: Tracking, name: str, digest: str) -> ModelVersion | None:
    with registry_errors():
        found = tracking.client.search_model_versions(f"name='{name}' and tags.bundle_digest='{digest}'")
    if not found:
        return None
    # search_model_versions leaves aliases out.
    oldest = min(int(version.version) for version in found)
    return find_version(tracking, ModelReference(name, None, oldest))


def _make_champion(tracking: Tracking, version: ModelVersion, *, expected: int | None) -> None:
    """Compare and set: move the aliases only while the champion is the one that was compared with."""
    name, number = version.name, int(version.version)
    champion = find_alias(tracking, name, CHAMPION)
    if champion == number:
        return
    if champion != expected:
        raise RegistryError(
            f'champion of "{name}" is version {champion} now',
            f"the gate compared version {number} with {'no champion' if expected is None else f'version {expected}'}",
            "Run again: the gate then judges against the new champion.",
            retry=True,
        )
    with registry_errors():
        if champion is not None:
            tracking.client.set_registered_model_alias(name, PREVIOUS, str(champion))
        tracking.client.set_registered_model_alias(name, CHAMPION, str(number))


def _log_model(
    tracking: Tracking,
    run_id: str,
    *,
    bundle: Path,
    evidence: Mapping[str, Path],
    report: GateReport,
    tags: Mapping[str, str],
) -> tuple[str, str]:
    """The MLflow model with bundle and evidence; its id and where its files are."""
    with tempfile.TemporaryDirectory(prefix="manyeyes-register-") as name:
        staging = Path(name)
        # MLflow names artifact folders after their last path component, and follows no symbolic link out of them.
        shutil.copytree(bundle, staging / "bundle", copy_function=_link_or_copy)
        (staging / "evidence").mkdir()
        for target, path in evidence.items():
            _link_or_copy(path, staging / "evidence" / target)
        (staging / "evidence" / "gate.html").write_text(render_gate_html(report), encoding="utf-8")
        (staging / "evidence" / "gate.md").write_text(render_gate_markdown(report), encoding="utf-8")
        with registry_errors(), _quiet_mlflow() as pyfunc:
            logged = tracking.client.create_logged_model(
                tracking.experiment_id,
                name="bundle",
                source_run_id=run_id,
                tags=dict(tags),
                model_type="manyeyes-bundle",
            )
            pyfunc.log_model(
                model_id=logged.model_id,
                name="bundle",
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"bundle": str(staging / "bundle"), "evidence": str(staging / "evidence")},
                signature=_signature(),
                pip_requirements=_requirements(),
            )
            tracking.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, 0)])
    return str(logged.model_id), str(logged.artifact_location)


@contextmanager
def _quiet_mlflow() -> Iterator[Any]:
    """``mlflow.pyfunc`` without what does not concern the user.

    Its import warns of MLflow's own classes, and logging wants an input example, for which it would load the bundle.
    ``log_model`` would also take the run in ``MLFLOW_RUN_ID`` for its own and end it; here ``source_run_id`` says which
    run it is.
    """
    injected = os.environ.pop("MLFLOW_RUN_ID", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*(is inferred as AnyType|An input example was not provided)", UserWarning
            )
            import mlflow.pyfunc  # takes a second, and nothing else here needs it

            yield mlflow.pyfunc
    finally:
        if injected is not None:
            os.environ["MLFLOW_RUN_ID"] = injected


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _log_scores(tracking: Tracking, run_id: str, model_id: str, score: Scorecard) -> None:
    metrics = [Metric(key, value, 0, 0, model_id=model_id, run_id=run_id) for key, value in score.metrics().items()]
    with registry_errors():
        tracking.client.log_batch(run_id, metrics=metrics)


def _create_version(
    tracking: Tracking, name: str, *, source: str, run_id: str, model_id: str, tags: Mapping[str, str]
) -> ModelVersion:
    with registry_errors():
        try:
            tracking.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        created = tracking.client.create_model_version(
            name, source=source, run_id=run_id, model_id=model_id, tags=dict(tags)
        )
    return find_version(tracking, ModelReference(name, None, int(created.version)))


def _set_tags(tracking: Tracking, version: ModelVersion, tags: Mapping[str, str]) -> None:
    with registry_errors():
        for key, value in tags.items():
            tracking.client.set_model_version_tag(version.name, str(version.version), key, value)


def _tags(manifest: Mapping[str, Any], score: Scorecard, report: GateReport) -> dict[str, str]:
    lineage = ("recipe", "recipe_digest", "data_md5", "code_digest", "checkpoint_digest")
    scores = {f"score.{name}": f"{figure.score:.2f}" for name, figure in score.benchmarks.items()}
    return {
        "bundle_digest": str(manifest["digest"]),
        **{key: str(manifest[key]) for key in lineage},
        **scores,
        **_gate_tags(report),
    }


def _gate_tags(report: GateReport) -> dict[str, str]:
    reasons = "; ".join(report.reasons)[:_TAG_CHARACTERS]
    promotion = _PENDING if report.verdict == "passed" else "refused"
    return {"gate": report.verdict, "gate_reasons": reasons or "none", "promotion": promotion}


def _signature() -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), name="image", required=False), ColSpec(DataType.string, name="question")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.integer, _MAX_NEW_TOKENS)]),
    )


def _requirements() -> list[str]:
    """What serving needs: this package's core and MLflow's own base; no torch."""
    names = ("mlflow", "numpy", "pillow", "tokenizers")
    return [f"manyeyes=={__version__}", *(f"{name}=={metadata.version(name)}" for name in names)]


@contextmanager
def _run(name: str, run_id: str | None) -> Iterator[str]:
    if run_id is not None:
        yield run_id
        return
    with step_run(f"register {name}") as run:
        yield run.run_id
