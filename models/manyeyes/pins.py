"""Gives everything that a recipe names outside of itself its content, so that the recipe's digest knows it.

After ``pin_recipe``, a folder or file stands with the sha256 of its content and a model of the hub with a commit; the
same recipe with other weights is another recipe: with another digest, other cache keys and other results. What is in a
snapshot or a package has its digest already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyeyes.contents import content_digest
from manyeyes.errors import RecipeError, SourceError
from manyeyes.recipe import Recipe, change_recipe
from manyeyes.sources import split_pin

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_S = 10.0


def pin_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the content of everything that it names; one that is pinned stays as it is.

    Raises:
        RecipeError: A file that it names is not there.
        SourceError: A folder cannot be read, or a revision of the hub has no commit that is known here.
    """
    tree = recipe.model_dump(mode="json")
    data = tree["data"]
    changes = {
        "model": pin_sources(tree["model"]),
        "stages": pin_sources(tree["stages"]),
        "data.suite": _pin_file("data.suite", data["suite"]) if data["suite"].endswith(".json") else data["suite"],
        "data.contamination.benchmarks": [
            _pin_file("data.contamination.benchmarks", name)
            if Path(name).exists() or "/" in name or name.endswith(".parquet")
            else name
            for name in data["contamination"]["benchmarks"]
        ],
    }
    before = {
        "model": tree["model"],
        "stages": tree["stages"],
        "data.suite": data["suite"],
        "data.contamination.benchmarks": data["contamination"]["benchmarks"],
    }
    return recipe if changes == before else change_recipe(recipe, changes)


def pin_sources(tree: Any) -> Any:
    """A tree of plain values in which every ``source``, also at the end of a dotted key, is pinned."""
    if isinstance(tree, Mapping):
        return {
            key: pin_source(value)
            if isinstance(value, str) and key.rpartition(".")[2] == "source"
            else pin_sources(value)
            for key, value in tree.items()
        }
    return [pin_sources(entry) for entry in tree] if isinstance(tree, list | tuple) else tree


def pin_source(source: str) -> str:
    """A source with its content: ``dir:<path>#sha256=<digest>``, ``hub:<id>@<commit>``; others as they are.

    Raises:
        SourceError: A folder cannot be read, or a revision of the hub has no commit that is known here.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "scratch" and rest:
        return f"scratch:{pin_source(rest)}"
    if scheme == "dir" and rest:
        path, digest = split_pin(rest)
        return source if digest else f"dir:{path}#sha256={content_digest(Path(path))}"
    if scheme == "hub":
        repository, at, revision = rest.partition("@")
        if at and revision and not _COMMIT.fullmatch(revision):
            return f"hub:{repository}@{_commit(repository, revision)}"
    return source


def _pin_file(field: str, name: str) -> str:
    path, digest = split_pin(name)
    if digest:
        return name
    if not Path(path).exists():
        raise RecipeError(f'{field} names "{path}"', "a file that is there", "Check the path.")
    return f"{path}#sha256={content_digest(Path(path))}"


def _commit(repository: str, revision: str) -> str:
    """What a branch or tag means now: as the hub says, or, where it does not answer, as the local cache knows it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # Of the hub's HTTP library, whichever that is: what a network out of reach raises (huggingface_hub 2.4).
    from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]
    from huggingface_hub.file_download import repo_folder_name

    try:
        found = HfApi().model_info(repository, revision=revision, timeout=_HUB_TIMEOUT_S).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, NoAnswer, OSError) as error:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
        cached = folder / "refs" / revision
        found = cached.read_text(encoding="utf-8").strip() if cached.is_file() else None
        if found is None:
            raise SourceError(
                f'source is "hub:{repository}@{revision}", and the hub does not say which commit that is '
                f"({type(error).__name__})",
                "a commit, so that the same recipe always means the same weights",
                f"Write hub:{repository}@<commit of 40 digits>, or check name, revision and network.",
                retry=not isinstance(error, HFValidationError),
            ) from error
    if found is None or not _COMMIT.fullmatch(found):
        raise SourceError(
            f'source is "hub:{repository}@{revision}", which is the commit {found}', "40 hexadecimal digits", "Name it."
        )
    return found
