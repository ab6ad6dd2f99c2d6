"""Versions of registered models: register, promote, roll back.

A version is a bundle in an MLflow model, with the evidence behind it: scorecards, per-item outcomes, gate report,
lineage. Tags say what it is, aliases say what it is for: ``challenger`` is the newest version that passed the gate,
``champion`` the one to serve, ``previous`` the champion before.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from manyeyes.errors import RegistryError
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.registry.approval import check_approver, is_approved, waits
from manyeyes.registry.card import render_card
from manyeyes.registry.gate import GateReport, Verdict, read_gate_report
from manyeyes.registry.history import Approvals, Change, History, identify, move
from manyeyes.registry.lineage import read_lineage
from manyeyes.registry.logged_model import log_model, log_scores
from manyeyes.registry.mlflow_errors import create_once, registry_errors
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
    find_version,
    parse_model_reference,
)
from manyeyes.registry.sbom import render_sbom
from manyeyes.registry.signing import CARD, SBOM
from manyeyes.registry.tracking import Tracking, connect, step_run
from manyeyes.runtime.bundle_contents import check_files, read_manifest

__all__ = [
    "Approvals",
    "ModelReference",
    "RegisteredVersion",
    "approve",
    "champion_evidence",
    "comparable_champion",
    "describe",
    "parse_model_reference",
    "promote",
    "pull",
    "read_aliases",
    "register",
    "reject",
    "rollback",
]

_TAG_CHARACTERS = 5000
_PENDING, _WAITING, _DONE = "pending", "waiting", "done"
# On versions whose registration is recorded, or about to be.
_CLAIM = "manyeyes.registration"


@dataclass(frozen=True)
class RegisteredVersion:
    """One version in the registry.

    Attributes:
        name: Of the registered model.
        version: Number.
        aliases: That point at it now, sorted.
        verdict: The gate's.
        created: Whether this call registered it; ``False`` when its bundle was there already.
        notes: What the call found and put right: a move that was left half done, aliases that were moved by other
            means.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    verdict: Verdict
    created: bool = False
    notes: tuple[str, ...] = ()


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
    approvals: Approvals | None = None,
) -> RegisteredVersion:
    """Register a bundle with its evidence; when the gate passed it, promote it, or let it wait for approval.

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
        attachments: More files to keep with the version, for instance ``parity.json``. Card and SBOM name the parts,
            data sets and licences of a ``lineage.json`` among them.
        run_id: MLflow run that it belongs to; a run of its own when left out.
        approvals: What it needs before it becomes champion; left out, passing the gate is enough.

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
    own = None
    if not _versions_of(tracking, name, digest):
        evidence = {SCORECARD: scorecard, BUNDLE_SCORECARD: bundle_scorecard, ITEMS: items, GATE: gate}
        evidence |= {path.name: path for path in attachments}
        marks = _tags(manifest, score, report) | dict(tags or {})
        lineage = read_lineage(attachments)
        beside = {
            CARD: render_card(name, manifest, scorecard=score, report=report, lineage=lineage, tags=marks),
            SBOM: render_sbom(manifest, lineage),
        }
        with _run(name, run_id) as run:
            model_id, source = log_model(
                tracking, run, bundle=bundle, evidence=evidence, beside=beside, report=report, tags=marks
            )
            log_scores(tracking, run, model_id, score)
            own = _create_version(tracking, name, source=source, run_id=run, model_id=model_id, tags=marks)
    gate_digest = hashlib.sha256(gate.read_bytes()).hexdigest()
    version, notes = _settle_version(tracking, name, report, gate_digest=gate_digest, approvals=approvals)
    if report.verdict == "passed":
        notes += _promote_by_gate(tracking, version, report, gate_digest=gate_digest)
    return _describe(tracking, name, int(version.version), created=own == int(version.version), notes=notes)


def _settle_version(
    tracking: Tracking, name: str, report: GateReport, *, gate_digest: str, approvals: Approvals | None
) -> tuple[ModelVersion, tuple[str, ...]]:
    """The one version of a bundle: the recorded one, and of several that are not recorded yet the oldest.

    Processes that register one bundle at once each make a version; one of these is recorded, the others go.
    """
    digest, numbers, chosen = report.challenger, list[int](), 0

    def decide(history: History) -> Change | None:
        nonlocal numbers, chosen
        numbers = _versions_of(tracking, name, digest)
        recorded = [
            record
            for record in history.records
            if record.action == "register" and record.bundle_digest == digest and record.version in numbers
        ]
        chosen = (recorded[-1].version if recorded else None) or min(numbers)
        found = find_version(tracking, ModelReference(name, None, chosen))
        verdicts = {found.tags.get("gate"), report.verdict, *(record.verdict for record in recorded)}
        verdict: Verdict = "passed" if "passed" in verdicts else "failed"
        if recorded and recorded[-1].verdict == verdict:
            return None
        now_allowed = found.tags.get("gate") == "failed" and verdict == "passed"
        return Change(
            "register",
            chosen,
            history.aliases,
            tags=_gate_tags(report) if now_allowed else {},
            verdict=verdict,
            gate_digest=gate_digest if verdict == report.verdict else None,
            bundle_digest=digest,
            approvals=approvals,
        )

    made = move(tracking, name, decide)
    if len(numbers) > 1:
        _delete_spares(tracking, name, digest, chosen)
    return find_version(tracking, ModelReference(name, None, chosen)), made.notes


def _delete_spares(tracking: Tracking, name: str, digest: str, chosen: int) -> None:
    """Delete other versions of a bundle; those from before there was a history, and those with an alias, stay."""
    used = {chosen, *read_aliases(name).values()}
    with registry_errors():
        for version in tracking.client.search_model_versions(f"name='{name}' and tags.bundle_digest='{digest}'"):
            if _CLAIM in version.tags and int(version.version) not in used:
                try:
                    tracking.client.delete_model_version(name, str(version.version))
                except MlflowException as error:  # another process, which does the same
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise


def _promote_by_gate(
    tracking: Tracking, version: ModelVersion, report: GateReport, *, gate_digest: str
) -> tuple[str, ...]:
    """Make a version that passed the champion, once, and only while the champion is the one it was compared with.

    One that needs approval becomes the challenger, which waits; judged again after the champion changed, it waits anew.
    """
    name, number = version.name, int(version.version)

    def decide(history: History) -> Change | None:
        last = history.of(number, "register", "challenge", "approve", "reject", "promote")[-1:]
        waiting = bool(last) and last[0].action in ("challenge", "approve") and waits(history, number)
        if last and last[0].action != "register" and not (waiting and _against(history, number) != report.champion):
            return None
        if version.tags.get("promotion") not in (_PENDING, _WAITING):
            return None  # of a version from before there was a history
        champion = history.aliases.get(CHAMPION)
        if champion not in (report.champion, number):
            raise RegistryError(
                f'champion of "{name}" is version {champion} now',
                f"the gate compared version {number} with "
                f"{'no champion' if report.champion is None else f'version {report.champion}'}",
                "Run again: the gate then judges against the new champion.",
                retry=True,
            )
        waits_now = waits(history, number)
        return Change(
            "challenge" if waits_now else "promote",
            number,
            (history.aliases if waits_now else _crowned(history.aliases, number)) | {CHALLENGER: number},
            tags={"promotion": _WAITING if waits_now else _DONE},
            verdict=report.verdict,
            gate_digest=gate_digest,
            bundle_digest=report.challenger,
            against=report.champion,
        )

    return move(tracking, name, decide).notes


def _against(history: History, version: int) -> int | None:
    """The champion that the gate last compared a waiting version with."""
    return next((record.against for record in reversed(history.of(version, "challenge"))), None)


def _crowned(aliases: Mapping[str, int], number: int) -> dict[str, int]:
    """The aliases once a version is champion."""
    champion = aliases.get(CHAMPION)
    previous = {PREVIOUS: champion} if champion not in (None, number) else {}
    return {**aliases, **previous, CHAMPION: number}


def promote(
    name: str, alias_or_version: str | int | None = None, *, force: bool = False, reason: str = ""
) -> RegisteredVersion:
    """Make a version the champion; the old champion becomes ``previous``.

    For a version that needs approval this is an approval: the last one that it needs makes it champion. ``force`` skips
    the gate, and no approval.

    Args:
        name: Of the registered model, or a whole reference such as ``NAME/VERSION``.
        alias_or_version: Which, where ``name`` does not say it.
        force: Promote a version that the gate failed, too.
        reason: Why; kept as the version's tag ``promotion_reason``.

    Raises:
        RegistryError: No version was named, no such model or version, the gate failed it, or this person may not
            approve it.
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
    passed = found.tags.get("gate") == "passed"

    def decide(history: History) -> Change | None:
        if history.aliases.get(CHAMPION) == version:
            return None
        if waits(history, version):
            return _vote(tracking, history, found, reason=reason)
        return Change(
            "promote",
            version,
            _crowned(history.aliases, version),
            tags={"promotion": _DONE if passed else "forced"},
            forced=not passed,
            verdict=found.tags.get("gate"),
            gate_digest=_gate_digest(history, version),
            bundle_digest=found.tags.get("bundle_digest"),
        )

    made = move(tracking, name, decide, reason=reason)
    return _describe(tracking, name, version, notes=made.notes)


def _vote(tracking: Tracking, history: History, found: ModelVersion, *, reason: str) -> Change:
    """One more approval of a version; the last that it needs makes it champion."""
    name, version = found.name, int(found.version)
    _check_reason(reason, "approve")
    missing = check_approver(history, version, identify(tracking))
    champion = history.aliases.get(CHAMPION)
    if history.of(version, "challenge") and champion not in (_against(history, version), version):
        compared = _against(history, version)
        raise RegistryError(
            f'champion of "{name}" is version {champion} now',
            f"the gate compared version {version} with {f'version {compared}' if compared else 'no champion'}",
            "Run the pipeline again: the gate then judges it against the new champion, and it waits anew.",
        )
    return Change(
        "approve",
        version,
        history.aliases if missing else _crowned(history.aliases, version),
        tags={} if missing else {"promotion": _DONE},
        forced=found.tags.get("gate") != "passed",
        verdict=found.tags.get("gate"),
        gate_digest=_gate_digest(history, version),
        bundle_digest=found.tags.get("bundle_digest"),
    )


def approve(name: str, alias_or_version: str | int | None = None, *, reason: str) -> RegisteredVersion:
    """Approve a version: the last approval that it needs makes it champion.

    A champion that needed none, or that came by other means, may be approved too: it is then as good as any to
    ``check_approved``.

    Args:
        name: Of the registered model, or a whole reference such as ``NAME/VERSION``.
        alias_or_version: Which, where ``name`` does not say it.
        reason: Why; kept in the history.

    Raises:
        RegistryError: No reason, no such version, it does not wait, it was rejected, or this person may not approve it.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking, found = _find_to_decide(name, alias_or_version, reason, "approve")
    name, version = found.name, int(found.version)

    def decide(history: History) -> Change | None:
        champion = history.aliases.get(CHAMPION) == version
        if not waits(history, version) and (not champion or is_approved(history, version)):
            raise RegistryError(
                f"{name}/{version} does not wait for approval",
                "a version that does",
                f"What happened: manyeyes history {name}. To make it champion: manyeyes promote {name}/{version}",
            )
        return _vote(tracking, history, found, reason=reason)

    made = move(tracking, name, decide, reason=reason)
    return _describe(tracking, name, version, notes=made.notes)


def reject(name: str, alias_or_version: str | int | None = None, *, reason: str) -> RegisteredVersion:
    """Refuse a version that waits for approval, for good; ``challenger`` leaves it.

    Args:
        name: Of the registered model, or a whole reference such as ``NAME/VERSION``.
        alias_or_version: Which, where ``name`` does not say it.
        reason: Why; kept in the history.

    Raises:
        RegistryError: No reason, no such version, or it does not wait for approval.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking, found = _find_to_decide(name, alias_or_version, reason, "reject")
    name, version = found.name, int(found.version)

    def decide(history: History) -> Change | None:
        last = history.of(version, "challenge", "approve", "reject")[-1:]
        if not waits(history, version) or not last or last[0].action == "reject":
            raise RegistryError(
                f"{name}/{version} does not wait for approval",
                "a version that does",
                f"What happened: manyeyes history {name}. To replace a champion: manyeyes rollback {name}",
            )
        kept = {alias: n for alias, n in history.aliases.items() if (alias, n) != (CHALLENGER, version)}
        return Change(
            "reject",
            version,
            kept,
            tags={"promotion": "rejected"},
            verdict=found.tags.get("gate"),
            gate_digest=_gate_digest(history, version),
            bundle_digest=found.tags.get("bundle_digest"),
        )

    made = move(tracking, name, decide, reason=reason)
    return _describe(tracking, name, version, notes=made.notes)


def _find_to_decide(
    name: str, alias_or_version: str | int | None, reason: str, verb: str
) -> tuple[Tracking, ModelVersion]:
    _check_reason(reason, verb)
    reference = parse_model_reference(name, alias_or_version)
    if not reference.names_version:
        raise RegistryError(
            f'model is "{reference.name}"', "a version: NAME/VERSION", f"For instance: {reference.name}@{CHALLENGER}"
        )
    tracking = connect()
    return tracking, find_version(tracking, reference)


def _check_reason(reason: str, verb: str) -> None:
    if not reason.strip():
        raise RegistryError("reason is empty", f"why to {verb}; it is kept in the history", "Write a sentence.")


def _gate_digest(history: History, version: int) -> str | None:
    return next((record.gate_digest for record in reversed(history.of(version, "register"))), None)


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
    find_version(tracking, ModelReference(name, CHAMPION))  # says what there is, where there is none
    restored = 0

    def decide(history: History) -> Change | None:
        nonlocal restored
        champion, previous = history.aliases.get(CHAMPION), history.aliases.get(PREVIOUS)
        if champion is None or previous is None or previous == champion:
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
        restored = previous
        found = find_version(tracking, ModelReference(name, None, previous))
        return Change(
            "rollback",
            previous,
            {**history.aliases, CHAMPION: previous, PREVIOUS: champion},
            verdict=found.tags.get("gate"),
            gate_digest=_gate_digest(history, previous),
            bundle_digest=found.tags.get("bundle_digest"),
        )

    made = move(tracking, name, decide, reason=reason)
    return _describe(tracking, name, restored, notes=made.notes)


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


def _describe(
    tracking: Tracking, name: str, version: int, *, created: bool = False, notes: tuple[str, ...] = ()
) -> RegisteredVersion:
    found = find_version(tracking, ModelReference(name, None, version))
    verdict: Verdict = "passed" if found.tags.get("gate") == "passed" else "failed"
    return RegisteredVersion(name, version, tuple(sorted(found.aliases)), verdict, created, notes)


def _versions_of(tracking: Tracking, name: str, digest: str) -> list[int]:
    """Numbers of a bundle's versions: one, but while processes register it at once."""
    with registry_errors():
        found = tracking.client.search_model_versions(f"name='{name}' and tags.bundle_digest='{digest}'")
    return sorted(int(version.version) for version in found)


def _create_version(
    tracking: Tracking, name: str, *, source: str, run_id: str, model_id: str, tags: Mapping[str, str]
) -> int:
    marks = {**tags, _CLAIM: uuid.uuid4().hex}

    def create_model() -> bool:
        try:
            tracking.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return True

    def create() -> int:
        made = tracking.client.create_model_version(name, source=source, run_id=run_id, model_id=model_id, tags=marks)
        return int(made.version)

    def find() -> int | None:
        with registry_errors():
            found = tracking.client.search_model_versions(f"name='{name}' and source_path='{source}'")
        return min((int(version.version) for version in found), default=None)

    create_once(create_model, find=lambda: None)
    return create_once(create, find=find)


def _tags(manifest: Mapping[str, Any], score: Scorecard, report: GateReport) -> dict[str, str]:
    lineage = ("recipe", "recipe_digest", "data_md5", "code_digest", "checkpoint_digest")
    scores = {f"score.{name}": f"{scored.score:.2f}" for name, scored in score.benchmarks.items()}
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


@contextmanager
def _run(name: str, run_id: str | None) -> Iterator[str]:
    if run_id is not None:
        yield run_id
        return
    with step_run(f"register {name}") as run:
        yield run.run_id
