"""The verbs of the registry: ask, pull, promote, rollback."""

from __future__ import annotations

from pathlib import Path

from manyeyes.errors import RegistryError
from manyeyes.registry.versions import RegisteredVersion, describe, parse_model_reference, promote, pull, rollback
from manyeyes.steps.inputs import cache_dir


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
    """Make a version the champion; says what the registry holds now.

    Raises:
        RegistryError: No version number in ``reference``, or the gate failed the version.
    """
    parsed = parse_model_reference(reference)
    number = parsed.version
    if number is None:
        if "@" not in reference:
            raise RegistryError(
                f'model is "{reference}"',
                "a version: NAME/VERSION or NAME@ALIAS",
                f"For instance: {reference}@challenger",
            )
        number = describe(parsed).version
    return _in_words(promote(parsed.name, number, force=force))


def rollback_model(name: str) -> str:
    """Make the previous champion the champion again; says what the registry holds now."""
    return _in_words(rollback(parse_model_reference(name).name))


def _in_words(version: RegisteredVersion) -> str:
    return f"{version.name} version {version.version} is now {' and '.join(version.aliases)} (gate: {version.verdict})"
