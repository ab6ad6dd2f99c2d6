"""The verbs of the registry: ask, pull, promote, rollback."""

from __future__ import annotations

from pathlib import Path

from manyeyes.harness.inputs import cache_dir
from manyeyes.registry.versions import RegisteredVersion, describe, parse_model_reference, promote, pull, rollback


def pulled_bundle(reference: str) -> Path:
    """Folder of a registered model's bundle on this machine, fetched when it is not there yet."""
    version = describe(parse_model_reference(reference))
    return pull(
        f"{version.name}/{version.version}", out_dir=cache_dir() / "bundles" / f"{version.name}-{version.version}"
    )


def pull_model(reference: str, out: Path) -> Path:
    """Fetch a bundle into ``out``."""
    return pull(reference, out_dir=out)


def promote_model(reference: str, *, force: bool) -> str:
    """Make a version the champion; says what the registry holds now."""
    return _in_words(promote(reference, force=force))


def rollback_model(reference: str) -> str:
    """Make the previous champion the champion again; says what the registry holds now."""
    return _in_words(rollback(reference))


def _in_words(version: RegisteredVersion) -> str:
    return f"{version.name} version {version.version} is now {' and '.join(version.aliases)} (gate: {version.verdict})"
