"""Joins what several steps found of a snapshot's shards, and lets Great Expectations judge it. Never cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from manyeyes.harness.base import Reporter, StepResult
from manyeyes.harness.inputs import cache_dir
from manyeyes.steps import validate_data


def judge_snapshot(reporter: Reporter, *, facts: Sequence[Path], pinned: str, validation: Path) -> StepResult:
    """Write what ``validate_data`` writes, and read no shard but those of which the page shows a sample.

    Args:
        reporter: Shows the progress.
        facts: From ``profile_shards``.
        pinned: From ``plan_validation``.
        validation: Folder to write.

    Raises:
        ValidationError: An expectation of severity ``critical`` does not hold.
        SourceError: The language model's tokenizer cannot be had.
    """
    from manyeyes.data.curation.gathering import take_over

    for folder in facts:
        take_over(folder, cache_dir=cache_dir())
    return validate_data.validate_data(reporter, pinned=pinned, validation=validation)


STEP = replace(validate_data.STEP, name="judge_snapshot", function=judge_snapshot)
