"""Fetches models: a version's bundle, the champion with its evidence, or whatever somebody wants scored.

A bundle is checked, then moved into place at once. The champion's evidence is made comparable where it was scored on
other questions. A model to score is a folder, an S3 prefix or in the registry.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from manyeyes.data.remote import Remote, open_remote
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import BundleError, CheckpointError, EvaluationError, RegistryError, SnapshotError
from manyeyes.evaluation.answering.answerers import Answerer, BundleAnswerer
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard
from manyeyes.recipe import Recipe
from manyeyes.registry.approval import check_approved
from manyeyes.registry.gate import ChampionEvidence
from manyeyes.registry.mlflow_errors import registry_errors
from manyeyes.registry.references import (
    BUNDLE_PATH,
    BUNDLE_SCORECARD,
    CHAMPION,
    EVIDENCE_PATH,
    ITEMS,
    ModelReference,
    download,
    find_alias,
    find_version,
    list_version_files,
    parse_model_reference,
)
from manyeyes.registry.signing import BESIDE, SIGNATURE, sign_bundle, verify_signature, wanted_key
from manyeyes.registry.tracking import Tracking, connect
from manyeyes.runtime.bundle_contents import (
    MANIFEST,
    check_files,
    choose_variant,
    digest_files,
    needed_files,
    read_manifest,
)
from manyeyes.storage import folder_beside, is_there, link_or_copy, new_folder, replaceable, storage_errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def pull(
    name: str,
    alias_or_version: str | int | None = None,
    out_dir: Path | None = None,
    *,
    require_approved: bool = False,
    variant: str | None = None,
    verify_key: Path | None = None,
) -> Path:
    """Fetch a bundle from the registry, with its card and SBOM.

    Every file is checked against the manifest, the manifest's digest against the registry, and the signature where a
    key is given, before anything appears at ``out_dir``. A bundle that is there already is replaced; anything else is
    left alone.

    Args:
        name: Of the registered model, or a whole reference such as ``NAME@ALIAS``.
        alias_or_version: ``champion``, ``previous``, 3, ...; the champion when left out.
        out_dir: Where the bundle goes; ``<name>`` in the working directory when left out.
        require_approved: Refuse a version that nobody approved.
        variant: Fetch the files of this variant alone, for instance ``int4``; everything when left out.
        verify_key: Public key whose signature the bundle must carry; that of ``MANYEYES_VERIFY_KEY`` when left out.

    Returns:
        The bundle's folder.

    Raises:
        RegistryError: No such model, alias or version, it is not approved, ``out_dir`` is not a bundle's folder, or the
            key is none.
        RegistryUnreachableError: The registry does not answer.
        BundleError: A file is missing or is not what was registered, or not what was signed with the key.
        StorageError: No space, no permission, or no place for a folder: a file, or the working directory.
    """
    reference = parse_model_reference(name, alias_or_version)
    given = Path(reference.name) if out_dir is None else out_dir
    out_dir = replaceable(given)
    tracking = connect()
    version = find_version(tracking, reference)
    if require_approved:
        check_approved(tracking, version.name, int(version.version))
    expected = version.tags.get("bundle_digest")
    key = wanted_key(verify_key)
    if out_dir.exists():
        if _is_intact(out_dir, expected, variant, key):
            return given
        _check_replaceable(out_dir)
    if key is not None:
        check_signed(version, key=key)  # before the large files are fetched
    with storage_errors(out_dir):
        scratch = folder_beside(out_dir)
        try:
            if variant is None:
                bundle = download(tracking, version, BUNDLE_PATH, scratch)
            else:
                bundle = _download_variant(tracking, version, variant, scratch)
            if key is not None:
                verify_signature(bundle, key=key)
            _check(bundle, expected, reference, variant)
            if out_dir.exists():
                out_dir.rename(scratch / "replaced")
            bundle.rename(out_dir)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return given


def check_signed(version: ModelVersion, *, key: Path) -> None:
    """Check that a version's manifest, card and SBOM carry the signature of a key; fetches nothing else.

    Args:
        version: From ``find_version``.
        key: Public key, PEM.

    Raises:
        BundleError: It is not signed, or not with this key, or was changed since.
        RegistryError: ``key`` is no public key, or the files are gone.
        RegistryUnreachableError: The registry does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="manyeyes-signed-") as name:
        verify_signature(_download_manifest(connect(), version, Path(name)), key=key)


def sign_version(reference: ModelReference, *, key_file: Path | None = None) -> ModelReference:
    """Sign a registered version, or sign it anew; its files are compared with its digest first.

    Args:
        reference: Of the version.
        key_file: As ``sign_bundle``.

    Returns:
        The version that was signed.

    Raises:
        RegistryError: No such version, no key, or MLflow refuses.
        RegistryUnreachableError: The registry does not answer.
        BundleError: A file is missing or is not what was registered.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    tracking = connect()
    version = find_version(tracking, reference)
    with tempfile.TemporaryDirectory(prefix="manyeyes-sign-") as name:
        bundle = download(tracking, version, BUNDLE_PATH, Path(name))
        _check(bundle, version.tags.get("bundle_digest"), reference, None)
        sign_bundle(bundle, key_file=key_file)
        with registry_errors():
            place = tracking.client.get_model_version_download_uri(version.name, str(version.version))
            get_artifact_repository(place, tracking_uri=tracking.uri).log_artifact(str(bundle / SIGNATURE), BUNDLE_PATH)
    return ModelReference(version.name, None, int(version.version))


def _download_manifest(tracking: Tracking, version: ModelVersion, scratch: Path) -> Path:
    """Fetch a bundle's manifest, card, SBOM and signature; the folder that they are in."""
    # A file keeps its folders, as the whole bundle does.
    bundle = download(tracking, version, f"{BUNDLE_PATH}/{MANIFEST}", scratch).parent
    for name in sorted(list_version_files(version, BUNDLE_PATH) & {*BESIDE}):
        download(tracking, version, f"{BUNDLE_PATH}/{name}", scratch)
    return bundle


def _download_variant(tracking: Tracking, version: ModelVersion, variant: str, scratch: Path) -> Path:
    bundle = _download_manifest(tracking, version, scratch)
    manifest = read_manifest(bundle)
    for name in needed_files(manifest, choose_variant(bundle, manifest, variant)[1]):
        download(tracking, version, f"{BUNDLE_PATH}/{name}", scratch)
    return bundle


def _is_intact(folder: Path, expected: str | None, variant: str | None, key: Path | None) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        if key is not None:
            verify_signature(folder, key=key)
        manifest = read_manifest(folder)
        check_files(folder, _files(folder, manifest, variant))
    except BundleError:
        return False
    return bool(manifest.get("digest") == expected)


def _files(folder: Path, manifest: dict[str, Any], variant: str | None) -> dict[str, Any]:
    """What the manifest says of the files that are to be there."""
    if variant is None:
        files: dict[str, Any] = manifest["files"]
        return files
    return needed_files(manifest, choose_variant(folder, manifest, variant)[1])


def _check_replaceable(out_dir: Path) -> None:
    if not out_dir.is_dir() or (any(out_dir.iterdir()) and not (out_dir / MANIFEST).is_file()):
        raise RegistryError(
            f"{out_dir} is there and is no bundle", "a new folder, an empty one or a bundle's", "Name another folder."
        )


def _check(bundle: Path, expected: str | None, reference: ModelReference, variant: str | None) -> None:
    manifest = read_manifest(bundle)
    check_files(bundle, _files(bundle, manifest, variant))
    digest = digest_files(manifest["files"])
    if digest != expected:
        raise BundleError(
            f"the bundle of {reference} has digest {digest}",
            f"{expected} was registered",
            "The artifact store was changed: restore it, or register the bundle again.",
        )


def champion_evidence(name: str, version: int | None = None, *, work_dir: Path) -> ChampionEvidence | None:
    """The champion's registered scorecard and items; ``None`` when there is no champion.

    Args:
        name: Of the registered model.
        version: The champion's, where it was found before; today's when left out.
        work_dir: The evidence is fetched to ``<work_dir>/champion-<version>``.

    Raises:
        RegistryError: No such version, or its files are gone.
        RegistryUnreachableError: The registry does not answer.
    """
    tracking = connect()
    if version is None:
        version = find_alias(tracking, name, CHAMPION)
    if version is None:
        return None
    found = find_version(tracking, ModelReference(name, None, version))
    folder = work_dir / f"champion-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    evidence = download(tracking, found, EVIDENCE_PATH, folder)
    scorecard = read_scorecard(evidence / BUNDLE_SCORECARD)
    return ChampionEvidence(version, scorecard.model.digest, scorecard, evidence / ITEMS)


def comparable_champion(
    name: str,
    *,
    scorecard: Scorecard,
    recipe: Recipe,
    snapshot: Snapshot,
    code_digest: str,
    work_dir: Path,
    make_answerer: Callable[[Path], Answerer] = BundleAnswerer,
) -> ChampionEvidence | None:
    """The champion's evidence on the challenger's questions.

    Where any benchmark digest differs, the champion's bundle is fetched and scored again. That is kept under
    ``work_dir`` and used again for the same champion, questions and code.

    Args:
        name: Of the registered model.
        scorecard: The challenger's (bundle).
        recipe: The challenger's; says what to ask and how long answers may be.
        snapshot: The challenger's.
        code_digest: Of the code that evaluates.
        work_dir: For what is fetched and made.
        make_answerer: Loads a bundle's folder.

    Raises:
        RegistryError: The champion's files are gone.
        RegistryUnreachableError: The registry does not answer.
        BundleError: The champion's bundle is not what was registered.
        EvaluationError: The challenger's questions are not those of this recipe and snapshot.
    """
    champion = champion_evidence(name, work_dir=work_dir)
    if champion is None or same_questions(champion.scorecard, scorecard):
        return champion
    folder = work_dir / f"champion-{champion.version}"
    asked = "-".join(digest.rpartition(":")[2][:12] for digest in (snapshot.md5, recipe.digest, code_digest))
    # By digest and not by version: another store under the same name numbers its versions anew.
    out_dir = work_dir / f"rescored-{champion.bundle_digest[:12]}-{asked}"
    if (out_dir / "scorecard.json").is_file():
        anew = read_scorecard(out_dir / "scorecard.json")
    else:
        bundle = pull(name, champion.version, folder / "bundle")
        anew = evaluate(
            make_answerer(bundle),
            recipe,
            snapshot=snapshot,
            out_dir=out_dir,
            code_digest=code_digest,
            model_digest=champion.bundle_digest,
        )
    if not same_questions(anew, scorecard):
        raise EvaluationError(
            "champion and challenger were asked different questions even now",
            "the scorecard of this recipe on this snapshot",
            "Evaluate the challenger again.",
        )
    return ChampionEvidence(champion.version, champion.bundle_digest, anew, out_dir / ITEMS, rescored=True)


def same_questions(champion: Scorecard, challenger: Scorecard) -> bool:
    """Whether a champion answered every question that a challenger did."""
    return all(
        name in champion.benchmarks and champion.benchmarks[name].benchmark_digest == score.benchmark_digest
        for name, score in challenger.benchmarks.items()
    )


BUNDLE_MANIFEST, CHECKPOINT_MANIFEST = "manifest.json", "checkpoint.json"
Kind = Literal["torch", "bundle"]


@dataclass(frozen=True)
class ModelLocation:
    """A model that was found.

    Attributes:
        kind: ``torch`` for a checkpoint, ``bundle`` for an ONNX bundle.
        place: A folder's absolute path, ``s3://bucket/prefix`` or ``models:/NAME/VERSION``.
        digest: Of the checkpoint or bundle.
    """

    kind: Kind
    place: str
    digest: str


def locate_model(text: str) -> ModelLocation:
    """Find a model, and pin what may change: an alias becomes a version.

    Args:
        text: A folder, ``file://`` or ``s3://`` with a checkpoint or bundle, or NAME, NAME@ALIAS, NAME/VERSION in the
            registry; NAME alone is its champion. A folder that exists wins over a registered model of that name.

    Raises:
        CheckpointError: Neither a checkpoint nor a bundle is there.
        BundleError: Its manifest is broken.
        RegistryError: No such model, alias or version.
    """
    text = text.strip()
    path = Path(text.removeprefix("file://"))
    if not text:
        raise CheckpointError("no model is named", "a folder, s3:// or a registered model", "Name one.")
    if text.startswith("file://") or (is_there(path) and path.is_dir()):
        return _read_manifest(str(path.resolve()))
    if "://" in text:
        return _read_manifest(text.rstrip("/"))
    if text.startswith(("/", "./", "../")):
        raise CheckpointError(f'model is "{text}"', "a folder; there is none of that name", "Check the path.")
    from manyeyes.registry.references import find_version, parse_model_reference
    from manyeyes.registry.tracking import connect

    reference = parse_model_reference(text)  # refused as such before the registry is looked for
    found = find_version(connect(), reference)
    return ModelLocation("bundle", f"models:/{found.name}/{found.version}", str(found.tags["bundle_digest"]))


def fetch_model(location: ModelLocation, out: Path) -> None:
    """Put the model's files into a folder; hard links where that is possible.

    Args:
        location: From ``locate_model``.
        out: Folder to write; appears when it is complete.

    Raises:
        CheckpointError: A file of the checkpoint is missing, or it is another one than was located.
        BundleError: The same of a bundle.
        RegistryError: The registry has lost it.
        StorageError: No space, or no permission.
    """
    if location.place.startswith("models:/"):
        from manyeyes.registry.pull import pull

        pull(location.place, out_dir=out)
    else:
        with new_folder(out) as folder:
            for name in _file_names(location):
                _copy(location.place, name, folder / name)
    if _digest(location.kind, out) != location.digest:
        kind = CheckpointError if location.kind == "torch" else BundleError
        raise kind(
            f"{location.place} has digest {_digest(location.kind, out)[:16]}",
            f"{location.digest[:16]}, which it had when this run began",
            "Run it again, and leave the model alone meanwhile.",
        )


def _read_manifest(place: str) -> ModelLocation:
    kinds: tuple[tuple[Kind, str], ...] = (("bundle", BUNDLE_MANIFEST), ("torch", CHECKPOINT_MANIFEST))
    with _opened(place) as remote:
        for kind, name in kinds:
            manifest = remote.read(name)
            if manifest is not None:
                return ModelLocation(kind, place, str(_parse(place, name, manifest)["digest"]))
    raise CheckpointError(
        f"{place} has neither {BUNDLE_MANIFEST} nor {CHECKPOINT_MANIFEST}",
        "a checkpoint or a bundle of ManyEyes",
        "Check the path.",
    )


def _file_names(location: ModelLocation) -> Iterator[str]:
    name = BUNDLE_MANIFEST if location.kind == "bundle" else CHECKPOINT_MANIFEST
    with _opened(location.place) as remote:
        manifest = remote.read(name)
    if manifest is None:
        raise CheckpointError(f"{location.place} lost its {name}", "it was there when this run began", "Run it again.")
    yield name
    for file in _parse(location.place, name, manifest)["files"]:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{name} names {file!r}", "files below the model's folder", "Do not use this model.")
        yield file


def _parse(place: str, name: str, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{place}/{name} is not JSON ({error})", "digest and files", "Copy it again.") from error
    if not isinstance(found, dict) or not {"digest", "files"} <= set(found):
        raise BundleError(f"{place}/{name} is no manifest of ManyEyes", "digest and files", "Check the path.")
    return found


def _copy(place: str, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if "://" not in place:
        source = Path(place) / name
        if not source.is_file():
            raise CheckpointError(
                f"{place} lacks {name}", "every file that its manifest names", "Copy it again, whole."
            )
        link_or_copy(source, target)
        return
    with _opened(place) as remote, target.open("wb") as file:
        for chunk in remote.stream(name, offset=0, what=name):
            file.write(chunk)


def _digest(kind: Kind, folder: Path) -> str:
    if kind == "torch":
        from manyeyes.model import checkpoint_digest

        return checkpoint_digest(folder)
    from manyeyes.runtime.bundle_contents import check_files, digest_files, read_manifest

    manifest = read_manifest(folder)
    check_files(folder, manifest["files"])
    return digest_files(manifest["files"])


@contextmanager
def _opened(place: str) -> Iterator[Remote]:
    """The place of a model; speaks of a model where the reader of snapshots speaks of data."""
    try:
        yield open_remote(place)
    except SnapshotError as error:
        raise CheckpointError(
            f"model {place}: {error.found}",
            "a folder or s3://bucket/prefix with a checkpoint or a bundle",
            "Check the path and, for S3, the credentials and AWS_ENDPOINT_URL.",
            retry=error.retry,
        ) from error
