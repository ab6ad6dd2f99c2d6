"""Makes a curated snapshot visible in its remote. Never cached, and cheap: how a run ended is known by it."""

from __future__ import annotations

from pathlib import Path

from manyeyes.data.curation.planned import parse_planned
from manyeyes.data.pushing import push_listing
from manyeyes.data.remote import open_writable_remote
from manyeyes.data.snapshot import parse_dvc_text, read_snapshot_manifest
from manyeyes.errors import PipelineError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.pages import Table, Text, facts_table, step_page
from manyeyes.steps.curate_data import DVC_FILE, LISTING


def publish_snapshot(reporter: Reporter, *, curated: Path, pinned: str) -> StepResult:
    """Check that the remote has every file of the new snapshot, and push its listing.

    Args:
        reporter: Shows the progress.
        curated: From ``curate_data``.
        pinned: From ``plan_curation``.

    Raises:
        SnapshotError: The remote lacks a file, refuses or does not answer (``retry``).
    """
    planned = parse_planned(pinned)
    reporter.progress("asking the remote for every file", done=0.1)
    text = (curated / DVC_FILE).read_text(encoding="utf-8")
    dvc = parse_dvc_text(text, path=curated / DVC_FILE)
    md5 = push_listing((curated / LISTING).read_bytes(), open_writable_remote(planned.out_remote))
    if md5 != dvc.md5:
        raise PipelineError(
            f"{curated / LISTING} has md5 {md5}",
            f"{dvc.md5}, as {DVC_FILE} says",
            "Run the pipeline without its cache.",
        )
    manifest = read_snapshot_manifest(curated, whole=False)
    name = planned.recipe.name
    facts = facts_table(
        [
            ("snapshot (md5)", md5),
            ("remote", planned.out_remote),
            ("made from", planned.data_md5),
            ("files", f"{dvc.nfiles:,}"),
            ("GB", f"{dvc.size / 1e9:,.3f}"),
        ]
    )
    rows = [
        [
            Text(own, kind="strong") if own.startswith(f"{name}-") else own,
            f"{entry.rows:,}",
            f"{entry.images:,}",
            entry.source,
        ]
        for own, entry in manifest.datasets.items()
    ]
    datasets = Table(("data set", "records", "images", "where from"), rows, numbers=(1, 2))
    return StepResult(
        headline=f"data_md5 {md5} in {planned.out_remote}",
        metrics={"files": float(dvc.nfiles), "size_bytes": float(dvc.size)},
        html=step_page(
            f"Snapshot with {name}",
            "Train on it: give this data_md5 and remote to a pipeline, or put these lines into data.dvc and commit it.",
            {"": facts, "Data sets": datasets, DVC_FILE: text},
        ),
        markdown=f"{facts.markdown()}\n\n```yaml\n{text}```\n",
        values={"data_md5": md5},
        metadata={"data_md5": md5, "data_remote": planned.out_remote},
    )


STEP = Step("publish_snapshot", publish_snapshot, imports=("manyeyes.registry.tracking",))
