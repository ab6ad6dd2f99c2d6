"""``NAME``, ``NAME@ALIAS`` and ``NAME/VERSION``: how a person names a registered model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from manyeyes.errors import RegistryError, did_you_mean
from manyeyes.registry.mlflow_errors import registry_errors
from manyeyes.registry.tracking import Tracking

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_REFERENCE = re.compile(
    r"(?:models:/)?(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>\d+))?"
)
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class ModelReference:
    """A registered model and which of its versions.

    Attributes:
        name: Of the registered model.
        alias: Names the version, or ``None`` when a number does.
        version: Number of the version, or ``None`` when an alias names it.
    """

    name: str
    alias: str | None
    version: int | None

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}" if self.alias else f"{self.name}/{self.version}"


def parse_model_reference(text: str) -> ModelReference:
    """Read ``NAME[@ALIAS|/VERSION]``; a name alone means ``@champion``.

    Raises:
        RegistryError: Not of that form.
    """
    match = _REFERENCE.fullmatch(text.strip())
    if match is None:
        raise RegistryError(
            f'model is "{text}"', "NAME, NAME@ALIAS or NAME/VERSION", "For instance: manyeyes-tiny@champion"
        )
    version = match["version"]
    alias = match["alias"] if version is None else None
    return ModelReference(
        name=match["name"],
        alias=(alias or CHAMPION) if version is None else None,
        version=None if version is None else int(version),
    )


def find_version(tracking: Tracking, reference: ModelReference) -> ModelVersion:
    """The version that a reference names.

    Raises:
        RegistryError: No such model, alias or version; says which there are.
        RegistryUnreachableError: The registry does not answer.
    """
    client = tracking.client
    with registry_errors():
        try:
            if reference.version is not None:
                return client.get_model_version(reference.name, str(reference.version))
            # get_model_version_by_alias returns a version without its aliases on SQL stores.
            number = client.get_model_version_by_alias(reference.name, reference.alias).version
            return client.get_model_version(reference.name, str(number))
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
        raise _absent(tracking, reference)


def find_alias(tracking: Tracking, name: str, alias: str) -> int | None:
    """Number of the version that has an alias, or ``None``.

    Raises:
        RegistryUnreachableError: The registry does not answer.
    """
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
    if reference.alias is not None:
        aliases = [f"{alias} (version {number})" for alias, number in sorted(model.aliases.items())]
        return RegistryError(
            f'alias is "{reference.alias}"',
            f'"{reference.name}" has no such alias',
            f"{did_you_mean(reference.alias, model.aliases)}It has: {', '.join(aliases) or 'none'}.",
        )
    versions = tracking.client.search_model_versions(f"name='{reference.name}'")
    numbers = sorted(int(version.version) for version in versions)
    return RegistryError(
        f"version is {reference.version}",
        f'"{reference.name}" has no such version',
        f"It has: {', '.join(map(str, numbers)) or 'none'}.",
    )
