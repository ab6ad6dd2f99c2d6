"""Puts the scorecards of a model's benchmarks together: one scorecard, one file of answers, one report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import load_benchmarks
from manyeyes.evaluation.outcomes import OutcomeFile, average_groups, read_outcomes, write_outcomes
from manyeyes.evaluation.report.contents import describe_reproduction, merge_runs
from manyeyes.evaluation.report.writing import build_report, read_report, write_report
from manyeyes.evaluation.scorecard import Scorecard, read_scorecard, write_scorecard
from manyeyes.harness.base import Reporter, Step, StepResult
from manyeyes.harness.inputs import parse_pinned
from manyeyes.steps.evaluate import find_champion
from manyeyes.web.chat_client import add_uses


def merge_scorecards(
    reporter: Reporter,
    *,
    scorecards: Sequence[Path],
    pinned: str,
    scorecard: Path,
    champion: str = "",
) -> StepResult:
    """Write ``scorecard.json``, ``items.parquet``, and ``report`` as ``html``, ``md`` and ``json``, of all benchmarks.

    Args:
        reporter: Shows the progress.
        scorecards: Folders of ``score_benchmark``, in any order.
        pinned: From ``plan_evaluation``.
        scorecard: Folder to write.
        champion: ``NAME/VERSION`` in the registry from ``plan_evaluation``, so that another champion makes another
            report; ``NAME`` alone has none yet. Empty: none is looked up.

    Raises:
        EvaluationError: A benchmark is missing, or the scorecards are not of one model.
    """
    inputs = parse_pinned(pinned)
    cards = [read_scorecard(folder / "scorecard.json") for folder in scorecards]
    names = list(inputs.recipe.evaluation.benchmarks)
    card = merge(cards, names=names, recipe=inputs.recipe.name, recipe_digest=inputs.recipe.digest)
    files = [read_outcomes(folder / "items.parquet") for folder in scorecards]
    digests = {name: digest for file in files for name, digest in file.benchmark_digests.items()}
    outcomes = [outcome for name in names for file in files for outcome in file.of(name)]
    card = card.model_copy(update={"groups": average_groups(card.benchmarks, outcomes)})
    reporter.progress("reading the images of the report", done=0.5)
    benchmarks = load_benchmarks(inputs.recipe.evaluation, snapshot=inputs.snapshot)
    write_outcomes(OutcomeFile(card.model.digest, card.model.kind, digests, outcomes), scorecard / "items.parquet")
    reports = [read_report(folder / "report.json").reproduction for folder in scorecards]
    reproduction = describe_reproduction(
        card.model.kind, benchmarks=names, recipe=inputs.recipe, data_md5=card.data_md5
    ).model_copy(update={"runs": merge_runs([run for report in reports for run in report.runs])})
    report = build_report(
        card,
        outcomes,
        benchmarks,
        recipe=inputs.recipe,
        champion=find_champion(champion),
        reproduction=reproduction,
    )
    write_report(scorecard, report, benchmarks)
    write_scorecard(card, scorecard / "scorecard.json")
    return StepResult(
        headline=", ".join(f"{name} {score.score:.1f}{score.mark}" for name, score in card.benchmarks.items()),
        metrics=card.metrics(),
        html=(scorecard / "report.html").read_text(encoding="utf-8"),
        markdown=(scorecard / "report.md").read_text(encoding="utf-8"),
        metadata={"model_digest": card.model.digest, "kind": card.model.kind, "recipe_digest": card.recipe_digest},
    )


def merge(cards: Sequence[Scorecard], *, names: Sequence[str], recipe: str, recipe_digest: str) -> Scorecard:
    """One scorecard of several, benchmarks in the order of ``names``.

    Raises:
        EvaluationError: A benchmark is missing or there twice, or the scorecards are not of one model and snapshot.
    """
    found = [name for card in cards for name in (*card.benchmarks, *card.skipped)]
    if sorted(found) != sorted(names):
        raise EvaluationError(
            f"scorecards of {', '.join(sorted(found)) or 'nothing'}",
            f"one of each of {', '.join(names)}",
            "Score the benchmarks that are missing.",
        )
    facts = {(card.model.model_dump_json(), card.data_md5, card.code_digest, card.max_new_tokens) for card in cards}
    if len(facts) != 1:
        raise EvaluationError(
            "scorecards of different models, snapshots, code or answer lengths",
            "one model, asked in one way",
            "Score all benchmarks again.",
        )
    scores = {name: score for card in cards for name, score in card.benchmarks.items()}
    skipped = {name: reason for card in cards for name, reason in card.skipped.items()}
    return cards[0].model_copy(
        update={
            "recipe": recipe,
            "recipe_digest": recipe_digest,
            "benchmarks": {name: scores[name] for name in names if name in scores},
            "judge": add_uses([card.judge for card in cards if card.judge is not None]),
            "skipped": {name: skipped[name] for name in names if name in skipped},
        }
    )


STEP = Step(
    "merge_scorecards",
    merge_scorecards,
    imports=("pyarrow.parquet", "manyeyes.evaluation.report.writing", "manyeyes.registry.tracking"),
    outputs=("scorecard",),
)
