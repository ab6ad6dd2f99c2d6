"""Versions of registered models: register, promote, roll back.

A version is a bundle in an MLflow model, with the evidence behind it: scorecards, per-item outcomes, gate report,
lineage. Tags say what it is, aliases say what it is for: ``challenger`` is the newest version that passed the gate,
``champion`` the one to serve, ``previous`` the champion before.

The MLflow model of a version holds bundle, evidence and the code that serves it, logged in one piece.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from manyeyes import __version__
from manyeyes.errors import RegistryError
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.registry.gate import GateReport, Verdict, read_gate_report, render_gate_html, render_gate_markdown
from manyeyes.registry.mlflow_errors import REQUEST, create_once, registry_errors
from manyeyes.registry.pull import champion_evidence, comparable_champion, pull
from manyeyes.registry.references import (
    BUNDLE_SCORECARD,
    CHALLENGER,
    CHAMPION,
    GATE,
    ITEMS,
    PREVIOUS,
    SCORECARD,
    ModelReference,
    check_registry_name,
    find_alias,
    find_version,
    parse_model_reference,
)
from manyeyes.registry.tracking import Tracking, connect, step_run
from manyeyes.runtime.bundle_contents import check_files, read_manifest
from manyeyes.storage import link_or_copy

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
    "read_aliases",
    "register",
    "rollback",
]

_MAX_NEW_TOKENS = 32


def log_model(
    tracking: Tracking,
    run_id: str,
    *,
    bundle: Path,
    evidence: Mapping[str, Path],
    report: GateReport,
    tags: Mapping[str, str],
) -> tuple[str, str]:
    """Make the MLflow model with bundle and evidence.

    Args:
        tracking: Where.
        run_id: Run that it belongs to.
        bundle: Its folder.
        evidence: Files to keep with it, by name.
        report: The gate's; kept as pages too.
        tags: Of the model.

    Returns:
        The model's id, and where its files are.

    Raises:
        RegistryError: MLflow or its artifact store refuses.
        RegistryUnreachableError: One of them does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="manyeyes-register-") as name:
        staging = Path(name)
        # MLflow names artifact folders after their last path component, and follows no symbolic link out of them.
        shutil.copytree(bundle, staging / "bundle", copy_function=link_or_copy)
        (staging / "evidence").mkdir()
        for target, path in evidence.items():
            link_or_copy(path, staging / "evidence" / target)
        (staging / "evidence" / "gate.html").write_text(render_gate_html(report), encoding="utf-8")
        (staging / "evidence" / "gate.md").write_text(render_gate_markdown(report), encoding="utf-8")
        with registry_errors(), _quiet_mlflow() as pyfunc:
            logged = _create_model(tracking, run_id, tags)
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


def _create_model(tracking: Tracking, run_id: str, tags: Mapping[str, str]) -> LoggedModel:
    marks = dict(tags) | {REQUEST: uuid.uuid4().hex}

    def create() -> LoggedModel:
        return tracking.client.create_logged_model(
            tracking.experiment_id, name="bundle", source_run_id=run_id, tags=marks, model_type="manyeyes-bundle"
        )

    def find() -> LoggedModel | None:
        with registry_errors():
            found = tracking.client.search_logged_models(
                [tracking.experiment_id], f"tags.`{REQUEST}` = '{marks[REQUEST]}'"
            )
        return found[0] if found else None

    return create_once(create, find=find)


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


def log_scores(tracking: Tracking, run_id: str, model_id: str, score: Scorecard) -> None:
    """Record a scorecard's figures on a run and its model.

    Raises:
        RegistryUnreachableError: The store does not answer any more.
    """
    metrics = [Metric(key, value, 0, 0, model_id=model_id, run_id=run_id) for key, value in score.metrics().items()]
    with registry_errors():
        tracking.client.log_batch(run_id, metrics=metrics)


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


_TAG_CHARACTERS = 5000
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
    check_registry_name(name)
    tracking = connect(create=True)
    version = _find_bundle(tracking, name, digest)
    created = version is None
    if version is None:
        evidence = {SCORECARD: scorecard, BUNDLE_SCORECARD: bundle_scorecard, ITEMS: items, GATE: gate}
        evidence |= {path.name: path for path in attachments}
        marks = _tags(manifest, score, report) | dict(tags or {})
        with _run(name, run_id) as run:
            model_id, source = log_model(tracking, run, bundle=bundle, evidence=evidence, report=report, tags=marks)
            log_scores(tracking, run, model_id, score)
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


def promote(
    name: str, alias_or_version: str | int | None = None, *, force: bool = False, reason: str = ""
) -> RegisteredVersion:
    """Make a version the champion; the old champion becomes ``previous``.

    Args:
        name: Of the registered model, or a whole reference such as ``NAME/VERSION``.
        alias_or_version: Which, where ``name`` does not say it.
        force: Promote a version that the gate failed, too.
        reason: Why; kept as the version's tag ``promotion_reason``.

    Raises:
        RegistryError: No version was named, no such model or version, or the gate failed it.
        RegistryUnreachableError: The registry does not answer.
    """
    reference = parse_model_reference(name, alias_or_version)
    if not reference.names_version:
        raise RegistryError(
            f'model is "{reference.name}"',
            "a version: NAME/VERSION or NAME@ALIAS",
            f"For instance: {reference.name}@{CHALLENGER}",
        )
    tracking = connect()
    found = find_version(tracking, reference)
    name, version = reference.name, int(found.version)
    if found.tags.get("gate") != "passed" and not force:
        raise RegistryError(
            f"{name}/{version} has gate={found.tags.get('gate')} ({found.tags.get('gate_reasons')})",
            "a version that passed the gate",
            "Choose another version, or say --force.",
        )
    _make_champion(tracking, found, expected=find_alias(tracking, name, CHAMPION))
    marks = {"promotion": "forced" if found.tags.get("gate") != "passed" else _DONE}
    _set_tags(tracking, found, marks | _reason_tags(reason))
    return _describe(tracking, name, version)


def rollback(name: str, alias_or_version: str | int | None = None, *, reason: str = "") -> RegisteredVersion:
    """Make ``previous`` the champion again; the two swap, so a second rollback undoes the first.

    Args:
        name: Of the registered model, or a whole reference: its version must then be the one that becomes champion.
        alias_or_version: That version, where ``name`` does not say it.
        reason: Why; kept as the tag ``promotion_reason`` of the version that is champion again.

    Raises:
        RegistryError: No such model or version, no earlier champion, or another one than was named.
        RegistryUnreachableError: The registry does not answer.
    """
    reference = parse_model_reference(name, alias_or_version)
    name = reference.name
    tracking = connect()
    wanted = int(find_version(tracking, reference).version) if reference.names_version else None
    champion = int(find_version(tracking, ModelReference(name, CHAMPION)).version)
    previous = find_alias(tracking, name, PREVIOUS)
    if previous is None or previous == champion:
        raise RegistryError(
            f'champion of "{name}" is version {champion}, and no version is "{PREVIOUS}"',
            "an earlier champion",
            f"Promote a version by number: manyeyes promote {name}/VERSION",
        )
    if wanted is not None and wanted != previous:
        raise RegistryError(
            f"{reference} is version {wanted}" if reference.alias else f"version is {wanted}",
            f"version {previous}, which was champion before: a rollback restores no other",
            f"Leave the version out, or promote the one you want: manyeyes promote {name}/{wanted}",
        )
    with registry_errors():
        tracking.client.set_registered_model_alias(name, CHAMPION, str(previous))
        tracking.client.set_registered_model_alias(name, PREVIOUS, str(champion))
    restored = find_version(tracking, ModelReference(name, None, previous))
    _set_tags(tracking, restored, _reason_tags(reason))
    return _describe(tracking, name, previous)


def read_aliases(name: str) -> dict[str, int]:
    """Version by alias.

    Raises:
        RegistryError: No such model.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking = connect()
    with registry_errors():
        model = tracking.client.get_registered_model(name)
    return {alias: int(number) for alias, number in model.aliases.items()}


def describe(reference: ModelReference) -> RegisteredVersion:
    """What the registry says of a version; of the champion where none is named.

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


def _create_version(
    tracking: Tracking, name: str, *, source: str, run_id: str, model_id: str, tags: Mapping[str, str]
) -> ModelVersion:
    def create_model() -> bool:
        try:
            tracking.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return True

    def create() -> int:
        made = tracking.client.create_model_version(
            name, source=source, run_id=run_id, model_id=model_id, tags=dict(tags)
        )
        return int(made.version)

    def find() -> int | None:
        with registry_errors():
            found = tracking.client.search_model_versions(f"name='{name}' and source_path='{source}'")
        return min((int(version.version) for version in found), default=None)

    create_once(create_model, find=lambda: None)
    return find_version(tracking, ModelReference(name, None, create_once(create, find=find)))


def _set_tags(tracking: Tracking, version: ModelVersion, tags: Mapping[str, str]) -> None:
    with registry_errors():
        for key, value in tags.items():
            tracking.client.set_model_version_tag(version.name, str(version.version), key, value)


def _tags(manifest: Mapping[str, Any], score: Scorecard, report: GateReport) -> dict[str, str]:
    lineage = ("recipe", "recipe_digest", "data_md5", "code_digest", "checkpoint_digest")
    scores = {f"score.{name}": f"{scored.score:.2f}" for name, scored in score.benchmarks.items()}
    return {
        "bundle_digest": str(manifest["digest"]),
        **{key: str(manifest[key]) for key in lineage},
        **scores,
        **_gate_tags(report),
    }


def _reason_tags(reason: str) -> dict[str, str]:
    return {"promotion_reason": reason[:_TAG_CHARACTERS]} if reason else {}


def _gate_tags(report: GateReport) -> dict[str, str]:
    reasons = "; ".join(report.reasons)[:_TAG_CHARACTERS]
    promotion = _PENDING if report.verdict == "passed" else "refused"
    return {"gate": report.verdict, "gate_reasons": reasons or "none", "promotion": promotion}


@contextmanager
def _run(name: str, run_id: str | None) -> Iterator[str]:
    if run_id is not None:
        yield run_id
        return
    with step_run(f"register {name}") as run:
        yield run.run_id
