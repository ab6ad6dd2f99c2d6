"""How a person names a registered model: ``NAME``, ``NAME@ALIAS``, ``NAME/VERSION``; and where a version keeps what."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manyeyes.errors import RegistryError, RegistryUnreachableError, did_you_mean

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from manyeyes.registry.tracking import Tracking

# MLflow takes seconds to import, and a name is checked before anything starts: only looking one up needs it.

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Nine digits: stores keep versions in 32 bits.
_REFERENCE = re.compile(
    rf"(?:models:/)?(?P<name>{_NAME.pattern})(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>[1-9][0-9]{{0,8}}))?"
)
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class ModelReference:
    """A registered model and which of its versions.

    Attributes:
        name: Of the registered model.
        alias: Names the version, or ``None``.
        version: Number of the version, or ``None``. With neither, the champion is meant.
    """

    name: str
    alias: str | None = None
    version: int | None = None

    @property
    def names_version(self) -> bool:
        """Whether an alias or a number was given, and not the model's name alone."""
        return self.alias is not None or self.version is not None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}" if self.version is not None else f"{self.name}@{self.alias or CHAMPION}"


def parse_model_reference(text: str, alias_or_version: str | int | None = None) -> ModelReference:
    """Read ``NAME[@ALIAS|/VERSION]``: the one reader of what a person types.

    Args:
        text: The whole reference, or the name alone where ``alias_or_version`` is given.
        alias_or_version: ``champion``, ``previous``, 3, ...; said beside the name.

    Raises:
        RegistryError: Not of that form; nothing of the text is ever left out.
    """
    whole = text.strip()
    if alias_or_version is not None:
        which = str(alias_or_version).strip()
        whole += f"{'/' if which.isdecimal() else '@'}{which}"
    match = _REFERENCE.fullmatch(whole)
    if match is None:
        raise RegistryError(
            f'model is "{whole[:300]}"',
            "NAME, NAME@ALIAS or NAME/VERSION, where a version is a whole number from 1",
            "For instance: manyeyes-tiny@champion",
        )
    version = match["version"]
    return ModelReference(match["name"], match["alias"], None if version is None else int(version))


def check_registry_name(name: str) -> None:
    """That MLflow and a command line take the name of a model.

    Raises:
        RegistryError: They do not.
    """
    if not _NAME.fullmatch(name):
        raise RegistryError(
            f'registry_model is "{name[:300]}"',
            "letters, digits, dots, dashes and underscores",
            "For instance: manyeyes-tiny",
        )


def find_version(tracking: Tracking, reference: ModelReference) -> ModelVersion:
    """The version that a reference names.

    Raises:
        RegistryError: No such model, alias or version; says which there are.
        RegistryUnreachableError: The registry does not answer.
    """
    from mlflow.exceptions import MlflowException

    from manyeyes.registry.mlflow_errors import registry_errors

    check_registry_name(reference.name)
    client = tracking.client
    with registry_errors():
        try:
            if reference.version is not None:
                return client.get_model_version(reference.name, str(reference.version))
            # get_model_version_by_alias returns a version without its aliases on SQL stores.
            number = client.get_model_version_by_alias(reference.name, reference.alias or CHAMPION).version
            return client.get_model_version(reference.name, str(number))
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
        raise _absent(tracking, reference)


def find_alias(tracking: Tracking, name: str, alias: str) -> int | None:
    """Number of the version that has an alias, or ``None``.

    Raises:
        RegistryError: No name of a model, such as ``NAME/VERSION``: MLflow would say that it has no such alias.
        RegistryUnreachableError: The registry does not answer.
    """
    from mlflow.exceptions import MlflowException

    from manyeyes.registry.mlflow_errors import registry_errors

    check_registry_name(name)
    with registry_errors():
        try:
            return int(tracking.client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
    return None


def _absent(tracking: Tracking, reference: ModelReference) -> RegistryError:
    names = [model.name for model in tracking.client.search_registered_models()]
    if reference.name not in names:
        there = f"There are: {', '.join(names)}." if names else "The registry is empty: manyeyes run makes one."
        return RegistryError(
            f'model is "{reference.name}"', "no such model", f"{did_you_mean(reference.name, names)}{there}"
        )
    model = tracking.client.get_registered_model(reference.name)
    if reference.version is None:
        alias = reference.alias or CHAMPION
        aliases = [f"{name} (version {number})" for name, number in sorted(model.aliases.items())]
        return RegistryError(
            f'alias is "{alias}"',
            f'"{reference.name}" has no such alias',
            f"{did_you_mean(alias, model.aliases)}It has: {', '.join(aliases) or 'none'}.",
        )
    versions = tracking.client.search_model_versions(f"name='{reference.name}'")
    numbers = sorted(int(version.version) for version in versions)
    return RegistryError(
        f"version is {reference.version}",
        f'"{reference.name}" has no such version',
        f"It has: {', '.join(map(str, numbers)) or 'none'}.",
    )


SCORECARD = "scorecard.json"
BUNDLE_SCORECARD = "bundle-scorecard.json"
ITEMS = "items.parquet"
CHECKPOINT_ITEMS = "checkpoint-items.parquet"
VARIANT = "variant-{}-"
"""In front of the names of a variant's scorecard and items."""
GATE = "gate.json"
BUNDLE_PATH = "artifacts/bundle"
EVIDENCE_PATH = "artifacts/evidence"

_ATTEMPTS = 4


def download(tracking: Tracking, version: ModelVersion, path: str, destination: Path) -> Path:
    """Fetch a file or folder of a version's MLflow model.

    Args:
        tracking: The registry.
        version: Whose model.
        path: Inside the model, with forward slashes.
        destination: Folder to put it into.

    Returns:
        Where it is now.

    Raises:
        RegistryError: The registry knows the version, but its files are gone.
        RegistryUnreachableError: The registry or its storage does not answer.
    """
    import mlflow

    from manyeyes.registry.mlflow_errors import registry_errors

    uri = f"models:/{version.name}/{version.version}/{path}"
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with registry_errors():
                return Path(
                    mlflow.artifacts.download_artifacts(
                        uri, dst_path=str(destination), tracking_uri=tracking.uri, registry_uri=tracking.uri
                    )
                )
        except RegistryUnreachableError:
            # MLflow repeats a request, but not a download that breaks off.
            if attempt == _ATTEMPTS:
                raise
            time.sleep(2**attempt)
        except (OSError, RegistryError) as error:
            raise RegistryError(
                f"{path} of {version.name}/{version.version} cannot be fetched ({error.__cause__ or error})",
                "the files that were registered with it",
                "Check that the artifact store answers and still has them.",
            ) from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def list_version_files(version: ModelVersion, path: str) -> set[str]:
    """Names of the files in a folder of a version's MLflow model.

    Args:
        version: Whose model.
        path: Inside the model, with forward slashes.

    Raises:
        RegistryError: MLflow refuses.
        RegistryUnreachableError: The registry or its storage does not answer.
    """
    import mlflow

    from manyeyes.registry.mlflow_errors import registry_errors

    with registry_errors():
        found = mlflow.artifacts.list_artifacts(f"models:/{version.name}/{version.version}/{path}")
    return {file.path.rpartition("/")[2] for file in found if not file.is_dir}
