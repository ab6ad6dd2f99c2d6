"""What a version was made of: pretrained parts and data sets with their licences, and the packages of the environment.

It is written down when a version is registered and kept with it, so that its card and its SBOM say the same wherever
the version is copied to.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field

from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.scorecard import read_checked
from manyeyes.recipe import Recipe
from manyeyes.sources import HUB_LICENCES, hub_id, split_pin
from manyeyes.strict import StrictModel

LINEAGE = "lineage.json"
NOT_STATED = "not stated"


class PretrainedPart(StrictModel):
    """Weights that training began with, or that were taken as they are."""

    part: str = Field(description="encoders.NAME or language_model.")
    source: str = Field(description="As the recipe names it.")
    licence: str = Field(description="SPDX name or words; `not stated` where nothing here says it.")
    said_by: str = Field(description="Who says so; empty where nobody does.")


class UsedDataset(StrictModel):
    """One data set of the snapshot."""

    name: str = Field(description="In the snapshot.")
    use: Literal["training", "evaluation"] = Field(description="What it was used for.")
    licence: str = Field(description="SPDX name or words; `not stated` where nothing here says it.")
    source: str = Field(description="Where it comes from and what was done to it; empty where nothing says it.")


class Lineage(StrictModel):
    """``lineage.json``: what a version was made of."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    recipe: str = Field(description="Name of the recipe.")
    recipe_digest: str = Field(description="sha256 of the whole recipe, hexadecimal.")
    description: str = Field(description="The recipe's own.")
    pretrained: tuple[PretrainedPart, ...] = Field(description="Pretrained parts, in the model's order.")
    datasets: tuple[UsedDataset, ...] = Field(description="Data sets, those for training first.")
    max_length: int = Field(gt=0, description="Tokens of the longest conversation, image tokens included.")
    python: str = Field(description="Version of Python that registered it.")
    packages: dict[str, str] = Field(description="Version of each Python package in that environment, by name.")


def describe_lineage(recipe: Recipe, snapshot: Snapshot) -> Lineage:
    """Bring together what recipe, snapshot, encoder table and this environment say.

    Args:
        recipe: The whole one.
        snapshot: What was trained and judged on.
    """
    training = dict.fromkeys(part.dataset for _, stage in recipe.present_stages() for part in stage.mixture)
    judged = dict.fromkeys(BENCHMARKS[name].dataset for name in recipe.evaluation.benchmarks if name in BENCHMARKS)
    specs = [recipe.model, *(recipe.stage_model(stage) for stage, _ in recipe.present_stages())]
    parts: dict[tuple[str, str], PretrainedPart] = {}
    for spec in specs:
        sources = [(f"encoders.{encoder.name}", encoder.source, encoder.encoder) for encoder in spec.encoders]
        for part, source, row in [*sources, ("language_model", spec.language_model.source, "")]:
            if source != "scratch:":
                licence, said_by = _licence(source, row, snapshot)
                parts[part, source] = PretrainedPart(part=part, source=source, licence=licence, said_by=said_by)
    return Lineage(
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        description=recipe.description,
        pretrained=tuple(parts.values()),
        datasets=(*_datasets(training, "training", snapshot), *_datasets(judged, "evaluation", snapshot)),
        max_length=recipe.model.language_model.max_length,
        python=platform.python_version(),
        packages=installed_packages(),
    )


def read_lineage(files: Iterable[Path]) -> Lineage | None:
    """The lineage among some files; ``None`` where there is none.

    Raises:
        EvaluationError: It is none.
    """
    file = next((file for file in files if file.name == LINEAGE), None)
    if file is None:
        return None
    return read_checked(file, Lineage, what="a lineage", needed="a lineage", do="Run the step register.")


def installed_packages() -> dict[str, str]:
    """Version of each Python package here, by name."""
    return {found.name: found.version for found in sorted(metadata.distributions(), key=lambda one: one.name.lower())}


def _licence(source: str, row: str, snapshot: Snapshot) -> tuple[str, str]:
    """Licence of a source, and who says so."""
    from manyeyes.encoders import ENCODERS  # torch, which a lineage that is read back does not need

    source = source.removeprefix("scratch:")
    scheme, _, rest = source.partition(":")
    place, _ = split_pin(rest)
    if row and _same_place(source, ENCODERS[row].source):
        return ENCODERS[row].licence, "the table of encoders"
    if scheme == "snapshot":
        entries = [entry for entry in snapshot.manifest.pretrained.values() if entry.path == place]
        return (entries[0].licence, "the data snapshot") if entries else (NOT_STATED, "")
    if scheme == "hub" and hub_id(source) in HUB_LICENCES:
        return HUB_LICENCES[hub_id(source)], "its card on the hub"
    if scheme == "package":
        told = metadata.metadata(place.partition("/")[0]).json
        licence = str(told.get("license_expression") or told.get("license") or "").strip().partition("\n")[0]
        return (licence, "the package") if licence else (NOT_STATED, "")
    return NOT_STATED, ""


def _same_place(one: str, other: str) -> bool:
    """Whether two sources are the same files; of the hub, whatever the revision."""
    if one.startswith("hub:") and other.startswith("hub:"):
        return hub_id(one) == hub_id(other)
    return other != "scratch:" and one == other


def _datasets(
    names: dict[str, None], use: Literal["training", "evaluation"], snapshot: Snapshot
) -> Iterator[UsedDataset]:
    for name in names:
        entry = snapshot.manifest.datasets.get(name)
        licence, source = (entry.licence, entry.source) if entry else (NOT_STATED, "")
        yield UsedDataset(name=name, use=use, licence=licence or NOT_STATED, source=source)
