"""Data files of a hub repository, fetched to this disk before they are imported."""

from __future__ import annotations

import re
from pathlib import Path

from manyeyes.data.sources_table import SOURCES
from manyeyes.errors import DataError
from manyeyes.storage import cache_dir, storage_errors


def fetch_hub_files(url: str, *, source: str) -> str:
    """Fetch the data files of a hub repository at a revision.

    What was fetched before stays and is not fetched again. Images that a repository keeps in archives are to be
    unpacked by hand and named with ``--images``.

    Args:
        url: ``hub:ID@REVISION``; ``hub:`` alone is the home of ``source``, at its main branch.
        source: A key of ``SOURCES`` whose files are wanted; empty for all of a repository's data files.

    Returns:
        The folder.

    Raises:
        DataError: Not such an address, or the hub does not give the files (``retry``).
        StorageError: No space or no permission.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    row = SOURCES.get(source)
    hub_id, _, revision = url.removeprefix("hub:").partition("@")
    hub_id = hub_id or (row.hub_id if row else "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise DataError(
            f'"{url}" names no repository', "hub:OWNER/NAME@REVISION", "See: manyeyes data sources, and docs/data.md"
        )
    wanted = [row.files] if row and row.files else ["*.parquet", "*.json", "*.jsonl", "*.arrow", "*.tar"]
    # A folder of its own: the hub's cache is made of links, and a file's place tells nothing there.
    folder = cache_dir() / "hub_data" / f"{hub_id.replace('/', '--')}@{revision or 'main'}"
    try:
        with storage_errors(folder):
            snapshot_download(
                hub_id, repo_type="dataset", revision=revision or None, allow_patterns=wanted, local_dir=folder
            )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise DataError(
            f"{hub_id}@{revision or 'main'} cannot be fetched from the hub: {error}",
            "a data set that exists and that you may read",
            "Check the name, the network and HF_TOKEN, or import files that you have.",
            retry=True,
        ) from error
    if not any(Path(folder).rglob("*.*")):
        raise DataError(f"{hub_id} has no {', '.join(wanted)}", "its data files", "Import files that you have.")
    return str(folder)
