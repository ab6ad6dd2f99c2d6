"""Draws by a curation recipe, writes the data set, lets Great Expectations judge it, and pushes its files."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from manyeyes.data.curation.planned import parse_planned
from manyeyes.data.snapshot import MANIFEST, open_folder, write_dvc_text
from manyeyes.errors import ValidationError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import cache_dir, work_dir

SUITE = "conversations"
# Of a new snapshot: its listing as DVC keeps it, and the text of its .dvc file.
LISTING, DVC_FILE = "listing.json", "data.dvc"


def curate_data(reporter: Reporter, *, facts: Sequence[Path], pinned: str, curated: Path) -> StepResult:
    """Write what ``manyeyes data curate`` writes, and push it with all else that the snapshot has.

    The snapshot is visible once ``publish_snapshot`` has pushed its listing. A killed step goes on where it was: under
    ``MANYEYES_WORKDIR``, and with the files that are pushed.

    Args:
        reporter: Shows the progress.
        facts: From ``gather_facts``.
        pinned: From ``plan_curation``.
        curated: Folder to write: the manifest, listing and ``.dvc`` file of the new snapshot, the page, and what
            validation found; no shard.

    Raises:
        SnapshotError: A shard is missing or damaged, or a remote does not answer (``retry``) or refuses.
        DataError: Nothing is left, or a category of the ratio has no sample.
        ValidationError: An expectation of severity ``critical`` does not hold of what was drawn.
    """
    from manyeyes.data.curation.curate import SPLIT, curate
    from manyeyes.data.curation.gathering import take_over
    from manyeyes.data.pushing import add_to_snapshot
    from manyeyes.data.remote import open_writable_remote
    from manyeyes.data.validation import validate_snapshot

    planned = parse_planned(pinned)
    for folder in facts:
        take_over(folder, cache_dir=cache_dir())
    recipe = planned.recipe
    out = work_dir() / "curations" / hashlib.sha256(pinned.encode()).hexdigest()[:16] / "snapshot"
    report = curate(
        recipe,
        planned.snapshots,
        out,
        cache_dir=cache_dir(),
        progress=lambda sentence, done: reporter.progress(sentence, done=0.5 * done),
    )
    validation = validate_snapshot(
        open_folder(out),
        datasets=[f"{recipe.name}-{SPLIT}"],
        eval_datasets=[],
        suite=SUITE,
        out_dir=curated / "validation",
        cache_dir=cache_dir() / "profiles",
        progress=lambda sentence, done: reporter.progress(sentence, done=0.5 + 0.25 * done),
    )
    if validation.verdict != "passed":
        raise ValidationError(
            f"what {recipe.name} draws: " + "; ".join(row.explanation for row in validation.failures()),
            f'every critical expectation of suite "{SUITE}" to hold',
            f"Read {curated / 'validation' / 'validation.html'}, and correct filters or inputs of the recipe.",
        )
    added = add_to_snapshot(planned.snapshot, out)
    added.push(
        open_writable_remote(planned.out_remote),
        progress=lambda sentence, done: reporter.progress(sentence, done=0.75 + 0.25 * done),
    )
    for name in (MANIFEST, f"{recipe.name}-curation.html", f"{recipe.name}-curation.json"):
        shutil.copyfile(out / name, curated / name)
    (curated / LISTING).write_bytes(added.listing())
    dvc = added.dvc_output()
    (curated / DVC_FILE).write_text(write_dvc_text(dvc), encoding="utf-8")
    page = (out / f"{recipe.name}-curation.html").read_text(encoding="utf-8")
    shutil.rmtree(out.parent)  # all of it is in the remote
    return StepResult(
        headline=report.headline(),
        metrics={
            "samples": float(report.samples),
            "drawn": float(report.drawn),
            "one_word_answers_before": report.answers_before.share,
            "one_word_answers_after": report.answers_after.share,
            "quarantined": float(validation.quarantined),
            "expectations_not_met": float(sum(not row.success for row in validation.expectations)),
        },
        html=page,
        markdown=report.as_markdown() + "\n" + validation.as_markdown(),
        metadata={"data_md5": dvc.md5, "recipe_digest": recipe.digest, "drawn_digest": report.drawn_digest},
    )


STEP = Step(
    "curate_data",
    curate_data,
    imports=("great_expectations", "manyeyes.data.contamination.search", "manyeyes.registry.tracking"),
    outputs=("curated",),
)
