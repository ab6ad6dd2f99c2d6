"""From one environment to the next: a version is copied with its evidence, and judged again where it arrives.

An environment is a registered model of its own (``tiny-dev``, ``tiny-prod``), or another MLflow server.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from manyeyes.data.contamination.findings import read_contamination
from manyeyes.data.snapshot import open_snapshot
from manyeyes.data.validation_report import ValidationReport
from manyeyes.errors import RegistryError
from manyeyes.evaluation.scorecard import read_scorecard
from manyeyes.export.parity import ParityReport
from manyeyes.recipe import parse_recipe
from manyeyes.registry.gate import VariantEvidence, decide, write_gate_report
from manyeyes.registry.history import approvals_of
from manyeyes.registry.mlflow_errors import without_password
from manyeyes.registry.pull import champion_evidence, comparable_champion, pull, same_questions
from manyeyes.registry.references import (
    BUNDLE_SCORECARD,
    CHECKPOINT_ITEMS,
    EVIDENCE_PATH,
    GATE,
    ITEMS,
    SCORECARD,
    VARIANT,
    ModelReference,
    check_registry_name,
    download,
    find_version,
)
from manyeyes.registry.tracking import connect, default_tracking_uri
from manyeyes.registry.versions import RegisteredVersion, register
from manyeyes.runtime.bundle_contents import DEFAULT_VARIANT, read_manifest, read_variants

_RECIPE, _PARITY, _VALIDATION = "recipe.json", "parity.json", "validation.json"
# By whom the other server knows us, and MLflow's own variable for it.
_THERE = {
    "MANYEYES_TO_USERNAME": "MLFLOW_TRACKING_USERNAME",
    "MANYEYES_TO_PASSWORD": "MLFLOW_TRACKING_PASSWORD",
    "MANYEYES_TO_TOKEN": "MLFLOW_TRACKING_TOKEN",
}
_MADE_ANEW = {GATE, "gate.html", "gate.md"}
_LINEAGE = ("recipe_digest", "data_remote", "git_commit")


def copy_version(reference: ModelReference, to: str, *, to_uri: str = "", cache_dir: Path) -> RegisteredVersion:
    """Register a version in another environment, where the gate of its recipe compares it with that champion.

    Where that champion answered other questions, its bundle is scored again on the data that the version names.

    Args:
        reference: Of the version.
        to: Name of the other registered model.
        to_uri: Tracking URI of the other server, without a password; the same one when left out. Who we are there is in
            ``MANYEYES_TO_USERNAME`` and ``MANYEYES_TO_PASSWORD``, or ``MANYEYES_TO_TOKEN``; in MLflow's own variables
            when left out.
        cache_dir: For the snapshot and the other champion, where it must be scored again.

    Raises:
        RegistryError: The same model; an address with a password; no such version; it was registered without the
            evidence that the gate needs; or the champion there changed meanwhile.
        RegistryUnreachableError: One of the registries does not answer.
        RecipeError: This version of ManyEyes does not know a field of the recipe that the version was made with.
        SnapshotError: The data that the version names cannot be had, and the champion there must be scored again.
    """
    check_registry_name(to)
    check_address(to_uri)
    tracking = connect()
    if to == reference.name and (not to_uri or to_uri == tracking.uri):
        raise RegistryError(
            f'"{to}" is where {reference} is',
            "another registered model, or another server",
            f"To make it champion there: manyeyes promote {reference}",
        )
    found = find_version(tracking, reference)
    with tempfile.TemporaryDirectory(prefix="manyeyes-copy-") as name:
        scratch = Path(name)
        bundle = pull(reference.name, int(found.version), scratch / "bundle")
        evidence = download(tracking, found, EVIDENCE_PATH, scratch)
        missing = [name for name in (_RECIPE, _PARITY, _VALIDATION) if not (evidence / name).is_file()]
        if missing:
            raise RegistryError(
                f"{reference} was registered without {', '.join(missing)}",
                "the evidence that the gate judges by",
                "Register it with the pipeline's step register.",
            )
        recipe = parse_recipe((evidence / _RECIPE).read_text(encoding="utf-8"))
        scores = read_scorecard(evidence / BUNDLE_SCORECARD)
        checkpoint_items = evidence / CHECKPOINT_ITEMS  # which versions of an older ManyEyes lack
        with _registry_at(to_uri):
            work_dir = cache_dir / "champions" / to
            champion = champion_evidence(to, work_dir=work_dir)
            if champion is not None and not same_questions(champion.scorecard, scores):
                champion = comparable_champion(
                    to,
                    scorecard=scores,
                    recipe=recipe,
                    snapshot=open_snapshot(
                        md5=found.tags["data_md5"], remote=found.tags.get("data_remote", ""), cache_dir=cache_dir
                    ),
                    code_digest=found.tags["code_digest"],
                    work_dir=work_dir,
                )
            report = decide(
                recipe.gate,
                scorecard=read_scorecard(evidence / SCORECARD),
                bundle_scorecard=scores,
                parity=ParityReport.model_validate_json((evidence / _PARITY).read_bytes()),
                validation=ValidationReport.model_validate_json((evidence / _VALIDATION).read_bytes()),
                items=evidence / ITEMS,
                champion=champion,
                contamination=read_contamination(evidence),
                checkpoint_items=checkpoint_items if checkpoint_items.is_file() else None,
                variants={
                    name: VariantEvidence(
                        read_scorecard(evidence / f"{VARIANT.format(name)}{SCORECARD}"),
                        evidence / f"{VARIANT.format(name)}{ITEMS}",
                    )
                    for name in read_variants(read_manifest(bundle))
                    if name != DEFAULT_VARIANT
                },
            )
            gate = scratch / GATE
            write_gate_report(report, gate)
            kept = {SCORECARD, BUNDLE_SCORECARD, ITEMS, *_MADE_ANEW}
            copied = register(
                to,
                bundle=bundle,
                scorecard=evidence / SCORECARD,
                bundle_scorecard=evidence / BUNDLE_SCORECARD,
                items=evidence / ITEMS,
                gate=gate,
                tags={key: found.tags[key] for key in _LINEAGE if key in found.tags}
                | {"copied_from": f"models:/{found.name}/{found.version}"},
                attachments=sorted(path for path in evidence.iterdir() if path.name not in kept),
                approvals=approvals_of(recipe.registry),
            )
        shutil.rmtree(bundle)
    return copied


def check_address(uri: str) -> None:
    """Refuse an address with a password in it: a command line is seen by others, and kept in histories.

    Raises:
        RegistryError: It has one.
    """
    if urlsplit(uri).password is not None:
        raise RegistryError(
            f"--to-uri is {without_password(uri)}, with a password",
            "an address without one",
            f"Set {', '.join(_THERE)} for a server, or PGPASSWORD for PostgreSQL.",
        )


@contextmanager
def _registry_at(uri: str) -> Iterator[None]:
    wanted = {"MLFLOW_TRACKING_URI": uri or default_tracking_uri()}
    if uri:
        wanted |= {name: os.environ[there] for there, name in _THERE.items() if os.environ.get(there)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        connect(create=True)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        connect()
