"""Where pretrained parts come from.

A source is ``hub:<id>@<revision>``, ``dir:<path>`` (``dir:<path>#sha256=<digest>`` where its content is known),
``snapshot:<path in the data snapshot>``, ``package:<distribution>/<file>#sha256=<digest>`` or ``scratch:``. Nothing is
fetched that a recipe does not name.
No torch here: the first step of a pipeline checks every source before anything heavy starts.

Gives everything that a recipe names outside of itself its content, so that the recipe's digest knows it.

After ``pin_recipe``, a folder or file stands with the sha256 of its content and a model of the hub with a commit; the
same recipe with other weights is another recipe: with another digest, other cache keys and other results. What is in a
snapshot or a package has its digest already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from manyeyes.errors import RecipeError, SourceError, did_you_mean
from manyeyes.recipe import Recipe, change_recipe
from manyeyes.storage import content_digest, hash_file

SCHEMES = ("hub", "dir", "snapshot", "package", "scratch")

# What is needed of a hub repository: weights as safetensors, configuration, tokenizer.
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")

# Of the language models whose config.json is committed here, as their cards on the hub say. Looked up in November 2026:
# the card's text for Vicuna, its licence tag for the others; Meta's and Google's are gated, and copies of them say so.
HUB_LICENCES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "Apache-2.0",
    "NousResearch/Nous-Hermes-2-Yi-34B": "Apache-2.0",
    "google/gemma-2b-it": "Gemma Terms of Use",
    "lmsys/vicuna-13b-v1.3": "non-commercial",
    "lmsys/vicuna-13b-v1.5": "Llama 2 Community License Agreement",
    "lmsys/vicuna-7b-v1.3": "non-commercial",
    "lmsys/vicuna-7b-v1.5": "Llama 2 Community License Agreement",
    "meta-llama/Meta-Llama-3-8B-Instruct": "Meta Llama 3 Community License Agreement",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "Apache-2.0",
}


def resolve_source(
    source: str, *, snapshot_path: Path | None, files: Sequence[str] = (), parts: Sequence[str] = ()
) -> Path | None:
    """Find the files that a source names; fetches only ``hub:``.

    Args:
        source: ``hub:``, ``dir:``, ``snapshot:``, ``package:`` or ``scratch:``, as in the head of this module.
        snapshot_path: Folder of the data snapshot; needed for ``snapshot:``.
        files: Of a hub repository fetch nothing but the first of these that it has, and return that file.
        parts: Of a hub repository fetch nothing but these, by their paths in it, and return the folder.

    Returns:
        A file or a folder that exists; None for ``scratch:``.

    Raises:
        SourceError: Not a source, nothing there, or a sha256 that differs.
    """
    scheme, colon, rest = source.partition(":")
    if not colon or scheme not in SCHEMES:
        raise SourceError(
            f'source is "{source}"',
            "it starts with " + ", ".join(f"{name}:" for name in SCHEMES),
            did_you_mean(scheme, SCHEMES) + "For instance: dir:weights/clip",
        )
    if scheme == "scratch":
        if rest:
            raise SourceError(f'source is "{source}"', "nothing follows scratch: here", "Write scratch: alone.")
        return None
    if not rest:
        raise SourceError(f'source is "{source}"', f"something must follow {scheme}:", "Name the weights.")
    if scheme == "hub":
        return _resolve_hub(source, rest, files, parts)
    if scheme == "package":
        return _resolve_package(source, rest)
    if scheme == "dir":
        return open_pinned(rest, source=source)
    if snapshot_path is None:
        raise SourceError(f'source is "{source}"', "there is no snapshot here", "Name the snapshot, or use dir:.")
    root = snapshot_path.resolve()
    path = (root / rest).resolve()
    if not path.is_relative_to(root):
        raise SourceError(f'source is "{source}"', "a path inside the snapshot", "Leave the .. out, or use dir:.")
    return _existing(path, source, inside=f"the snapshot {snapshot_path}")


def committed_config(source: str) -> Path | None:
    """The ``config.json`` of a hub's language model that is committed here, so that its sizes are known offline.

    Args:
        source: ``hub:<id>@<revision>``; the revision does not matter, a model keeps its sizes.

    Returns:
        ``manyeyes/hub_configs/<id with -- for />.json``, or None for other sources and models without one.
    """
    name = hub_id(source).replace("/", "--")
    path = Path(str(resources.files("manyeyes"))) / "hub_configs" / f"{name}.json"
    return path if name and path.is_file() else None


def hub_id(source: str) -> str:
    """``owner/name`` of a hub source; empty for others."""
    scheme, _, rest = source.partition(":")
    return rest.partition("@")[0] if scheme == "hub" else ""


def split_pin(text: str) -> tuple[str, str]:
    """``<path>#sha256=<digest>`` as path and digest; an empty digest where there is none."""
    match = re.fullmatch(r"(.*)#sha256=([0-9a-f]{64})", text, flags=re.DOTALL)
    return (match[1], match[2]) if match else (text, "")


def open_pinned(text: str, *, source: str = "") -> Path:
    """A file or folder of this machine by ``<path>`` or ``<path>#sha256=<digest>``.

    Args:
        text: Path and digest.
        source: What messages call it; ``text`` when left out.

    Raises:
        SourceError: Nothing there, or its content is not what the digest says.
    """
    name, digest = split_pin(text)
    path = _existing(Path(name), source or text, inside="this machine")
    if digest and (found := content_digest(path)) != digest:
        raise SourceError(
            f"{path} holds something else by now (sha256 {found[:12]} and not {digest[:12]})",
            "what was there when the run began",
            "Start a new run, which takes what is there now, or put the old content back.",
        )
    return path


def language_model_config_file(source: str, *, snapshot_path: Path | None) -> Path:
    """The ``config.json`` of a language model; of a hub's the one that is committed here, where there is one.

    Args:
        source: As ``model.language_model.source``.
        snapshot_path: Folder of the data snapshot, where the source is ``snapshot:``; a folder with that model's
            ``config.json`` alone is enough.

    Returns:
        The file; in a folder that lacks it, the path where it should be.

    Raises:
        SourceError: It cannot be had.
    """
    place = source.removeprefix("scratch:")
    committed = committed_config(place)
    if committed is not None:
        return committed
    path = resolve_source(place, snapshot_path=snapshot_path, files=("config.json",)) if place else None
    if path is None:
        raise SourceError(
            f'language model source is "{source}"', "a model with a config.json", "Name one, or scratch:<source>."
        )
    return path if path.is_file() else path / "config.json"


def _existing(path: Path, source: str, *, inside: str) -> Path:
    if path.exists():
        return path
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise SourceError(f'source is "{source}"', f"no such file or folder in {inside}", did_you_mean(path.name, siblings))


def _resolve_hub(source: str, rest: str, files: Sequence[str], parts: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    repository, at, revision = rest.partition("@")
    if not at or not revision:
        raise SourceError(
            f'source is "{source}"',
            "a revision is needed, so that the same recipe always means the same weights",
            f"Write hub:{repository}@<commit>.",
        )
    try:
        for position, name in enumerate(() if parts else files, start=1):
            try:
                return Path(hf_hub_download(repository, name, revision=revision))
            except (RemoteEntryNotFoundError, LocalEntryNotFoundError):
                if position == len(files):
                    raise
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(parts or _HUB_FILES)))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(
            f'source is "{source}" ({type(error).__name__}: {error})',
            "the hub must have it, or the local cache",
            "Check name, revision and network; without a network fill the cache first (huggingface-cli download).",
            retry=isinstance(error, LocalEntryNotFoundError),
        ) from error


def _resolve_package(source: str, rest: str) -> Path:
    match = re.fullmatch(r"(?P<name>[^/#]+)/(?P<file>[^#]+)#sha256=(?P<digest>[0-9a-f]{64})", rest)
    if match is None:
        raise SourceError(
            f'source is "{source}"',
            "package:<distribution>/<file>#sha256=<64 hexadecimal digits>",
            "Add the part that is missing.",
        )
    name, file, digest = match["name"], match["file"], match["digest"]
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise SourceError(
            f'package "{name}" is not installed', f'source "{source}" needs it', f"Install it: pip install {name}"
        ) from error
    path = Path(str(distribution.locate_file(file)))
    if not path.is_file():
        raise SourceError(
            f'package "{name}" {distribution.version} has no file "{file}"',
            f'source "{source}" needs it',
            did_you_mean(file, [str(entry) for entry in distribution.files or []]),
        )
    found = hash_file(path)
    if found != digest:
        raise SourceError(
            f"{path} has sha256 {found}",
            f"the recipe says {digest}",
            f"Install the version of {name} that the recipe was made with, or correct the recipe.",
        )
    return path


_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_S = 10.0


def pin_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the content of everything that it names; one that is pinned stays as it is.

    Raises:
        RecipeError: A file that it names is not there.
        SourceError: A folder cannot be read, or a revision of the hub has no commit that is known here.
    """
    tree = recipe.model_dump(mode="json")
    changes = {name: pin_sources(tree[name]) for name in ("model", "stages")}
    before = {name: tree[name] for name in changes}
    if "data" in tree:  # a step may have been given other parts only
        suite, named = tree["data"]["suite"], tree["data"]["contamination"]["benchmarks"]
        before |= {"data.suite": suite, "data.contamination.benchmarks": named}
        changes["data.suite"] = _pin_file("data.suite", suite) if suite.endswith(".json") else suite
        changes["data.contamination.benchmarks"] = [
            _pin_file("data.contamination.benchmarks", name)
            if Path(name).exists() or "/" in name or name.endswith(".parquet")
            else name
            for name in named
        ]
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
