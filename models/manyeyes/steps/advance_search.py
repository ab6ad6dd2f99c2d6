"""Closes one round of a search: who won, whether to go on, and with which sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyeyes.errors import PipelineError
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import parse_pinned
from manyeyes.search.search import (
    close_round,
    copy_trials,
    gains,
    read_search,
    search_html,
    search_markdown,
    trial_folder,
    write_search,
)
from manyeyes.search.trial import read_trial, trial_folders
from manyeyes.search.variant import in_batches


def advance_search(
    reporter: Reporter,  # noqa: ARG001  (every step has one)
    *,
    pinned: str,
    before: Path,
    trials: Sequence[Path],
    search: Path,
) -> StepResult:
    """Write ``search.json`` with one round more, the trials so far, and the page with the ladder of sets.

    Args:
        reporter: Not needed.
        pinned: From ``preflight``.
        before: Folder of the search before this round.
        trials: Folders of ``train_trial``.
        search: Folder to write.

    Returns:
        Values: ``goes_on``, yes or no; ``candidates`` of the next round; and ``encoders``, the best set so far.

    Raises:
        PipelineError: Trials of another round.
    """
    state, known = read_search(before)
    copy_trials({key: trial_folder(before, key) for key in known}, search)
    found = {read_trial(folder).variant.key: folder for folder in trial_folders(trials)}
    best = known[state.best].encoders if state.best else ()
    expected = {variant.key for variant in state.next_sets(best)}
    if set(found) != expected:
        raise PipelineError(
            f"trials of {', '.join(sorted(found)) or 'nothing'}",
            f"those of this round: {', '.join(sorted(expected))}",
            "Pass on what train_trial made of the candidates.",
        )
    state = close_round(state, before, found)
    copy_trials(found, search)
    write_search(state, search)
    state, known = read_search(search)
    differences = gains(state, search)
    assert state.best is not None
    winner = known[state.best]
    candidates = [] if state.ended else in_batches(state.next_sets(winner.encoders))
    recipe = parse_pinned(pinned).recipe
    return StepResult(
        headline=f"{' + '.join(winner.encoders)}: {winner.mean:.1f}%"
        + (f"; ended: {state.ended}" if state.ended else ""),
        metrics={
            "mean_score": winner.mean,
            "encoders": float(len(winner.encoders)),
            "trials": float(len(known)),
            "visual_tokens": float(winner.visual_tokens),
        },
        html=search_html(state, known, differences, seed=recipe.seed),
        markdown=search_markdown(state, known, differences),
        values={"goes_on": "no" if state.ended else "yes", "candidates": candidates, "encoders": list(winner.encoders)},
        metadata={"best": state.best, "ended": state.ended or "no"},
    )


STEP = Step(
    "advance_search", advance_search, imports=("pyarrow.parquet", "manyeyes.registry.tracking"), outputs=("search",)
)
