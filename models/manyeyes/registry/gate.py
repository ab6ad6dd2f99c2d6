"""The gate: may this version be promoted?

Pure: rules and evidence in, report out. Scores are the bundle's, because the bundle is what is served; torch's own
scorecard only says whether the export kept them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import find_benchmark
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, read_outcomes
from manyeyes.evaluation.output import write_file
from manyeyes.evaluation.scorecard import BenchmarkScore, Scorecard
from manyeyes.evaluation.significance import PairedTest, compare_scores
from manyeyes.recipe import (
    ContaminationRule,
    FloorRule,
    GateRule,
    ImageAddsRule,
    NonInferiorityRule,
    ParityRule,
    ValidationRule,
)

if TYPE_CHECKING:
    from manyeyes.data.contamination.report import ContaminationReport
    from manyeyes.data.validation import ValidationReport
    from manyeyes.export.parity import ParityReport

Verdict = Literal["passed", "failed"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RuleResult(_Strict):
    """One rule of the recipe."""

    rule: str = Field(description="Kind of rule, as in the recipe.")
    benchmark: str | None = Field(description="The benchmark that it judges, or null.")
    found: str = Field(description="What was found, with its unit.")
    needed: str = Field(description="What the rule asks for, with its unit.")
    passed: bool = Field(description="Whether the rule is met.")
    explanation: str = Field(description="Why the rule is there and how the figure came about.")


class GateReport(_Strict):
    """``gate.json``: the verdict and every rule behind it."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    verdict: Verdict = Field(description="passed when every rule is met.")
    rules: tuple[RuleResult, ...] = Field(min_length=1, description="In the recipe's order.")
    challenger: str = Field(description="Digest of the bundle that was judged.")
    champion: int | None = Field(description="Version of the champion that it was compared with; null for the first.")
    champion_digest: str | None = Field(description="Digest of the champion's bundle, or null.")
    benchmark_digests: dict[str, str] = Field(description="By benchmark; both models were scored on these questions.")

    @property
    def reasons(self) -> tuple[str, ...]:
        """What failed, one sentence a rule."""
        return tuple(
            f"{result.rule}{f' ({result.benchmark})' if result.benchmark else ''}: found {result.found}, needed "
            f"{result.needed}"
            for result in self.rules
            if not result.passed
        )


@dataclass(frozen=True)
class ChampionEvidence:
    """What the gate needs to know of the champion.

    Attributes:
        version: In the registry.
        bundle_digest: Of its bundle.
        scorecard: Of its bundle.
        items: Its bundle's ``items.parquet``.
        rescored: Whether the scorecard was made anew, because its registered one asks other questions.
    """

    version: int
    bundle_digest: str
    scorecard: Scorecard
    items: Path
    rescored: bool = False


def judge(
    rules: Sequence[GateRule],
    *,
    scorecard: Scorecard,
    bundle_scorecard: Scorecard,
    parity: ParityReport,
    validation: ValidationReport,
    items: Path,
    champion: ChampionEvidence | None,
    contamination: ContaminationReport | None = None,
) -> GateReport:
    """Apply a recipe's gate rules.

    Args:
        rules: ``recipe.gate``.
        scorecard: Of the checkpoint in torch.
        bundle_scorecard: Of the bundle.
        parity: Bundle against torch.
        validation: Of the training data.
        items: The bundle's ``items.parquet``.
        champion: The champion on the same questions, or ``None`` when there is none yet.
        contamination: Of the training data; without it only exact duplicates are known.

    Raises:
        EvaluationError: The evidence does not belong together: other models, other questions, a benchmark missing.
    """
    outcomes = _belonging(items, bundle_scorecard)
    if scorecard.model.kind != "torch":
        raise EvaluationError(
            f'scorecard is of kind "{scorecard.model.kind}"', "the checkpoint's", "Pass the torch scorecard first."
        )
    if scorecard.benchmarks.keys() != bundle_scorecard.benchmarks.keys() or any(
        score.benchmark_digest != bundle_scorecard.benchmarks[name].benchmark_digest
        for name, score in scorecard.benchmarks.items()
    ):
        raise EvaluationError(
            "checkpoint and bundle were asked different questions", "one benchmark digest", "Evaluate both again."
        )
    results = []
    for rule in rules:
        match rule:
            case FloorRule():
                results.append(_judge_floor(rule, _score_of(bundle_scorecard, rule.benchmark)))
            case ImageAddsRule():
                results.append(_judge_image_adds(rule, _score_of(bundle_scorecard, rule.benchmark)))
            case NonInferiorityRule():
                score = _score_of(bundle_scorecard, rule.benchmark)
                results.append(_judge_non_inferiority(rule, score, outcomes, champion))
            case ParityRule():
                results.append(_judge_parity(rule, scorecard, bundle_scorecard, parity))
            case ValidationRule():
                results.append(_judge_validation(validation))
            case ContaminationRule():
                results.append(_judge_contamination(rule, validation, contamination))
    return GateReport(
        verdict="passed" if all(result.passed for result in results) else "failed",
        rules=tuple(results),
        challenger=bundle_scorecard.model.digest,
        champion=champion.version if champion else None,
        champion_digest=champion.bundle_digest if champion else None,
        benchmark_digests={name: score.benchmark_digest for name, score in bundle_scorecard.benchmarks.items()},
    )


def compare_outcomes(
    benchmark: str, challenger: Sequence[Outcome], champion: Sequence[Outcome], *, variant: str
) -> PairedTest:
    """The benchmark's own figure of the challenger minus the champion's, paired by item and clustered by image.

    Not the mean of the items' scores: MME counts pairs, POPE is an F1, CV-Bench an average of averages. Such figures
    are compared by a bootstrap over clusters, the same for both.

    Args:
        benchmark: Row of ``BENCHMARKS``.
        challenger: Its items.
        champion: The champion's, in any order.
        variant: Whose scoring.

    Raises:
        EvaluationError: The items differ, or there is no such benchmark.
    """
    theirs = {outcome.id: outcome.graded for outcome in champion}
    if len(theirs) != len(champion) or theirs.keys() != {outcome.id for outcome in challenger}:
        raise EvaluationError(
            f"{len(challenger)} items against {len(champion)}, with other ids",
            "the same items",
            "Score both models on the same benchmark.",
        )
    return compare_scores(
        find_benchmark(benchmark),
        [theirs[outcome.id] for outcome in challenger],
        [outcome.graded for outcome in challenger],
        variant,
    )


def write_gate_report(report: GateReport, path: Path) -> None:
    """Write ``gate.json``; whole or not at all.

    Raises:
        StorageError: No space, or no permission.
    """
    write_file(path, report.model_dump_json(indent=2).encode() + b"\n")


def read_gate_report(path: Path) -> GateReport:
    """Read and check ``gate.json``.

    Raises:
        EvaluationError: Missing, or not a gate report.
    """
    try:
        return GateReport.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise EvaluationError(
            f"{path} is not a gate report ({error})", "what the gate step writes", "Run the gate step first."
        ) from error


def _belonging(items: Path, scorecard: Scorecard) -> OutcomeFile:
    outcomes = read_outcomes(items)
    if scorecard.model.kind != "bundle" or outcomes.model_digest != scorecard.model.digest:
        raise EvaluationError(
            f"{items} is of {outcomes.kind} {outcomes.model_digest[:16]}, the scorecard of {scorecard.model.kind} "
            f"{scorecard.model.digest[:16]}",
            "scorecard and items of one bundle",
            "Pass the bundle's scorecard with the items.parquet beside it.",
        )
    expected = {name: score.benchmark_digest for name, score in scorecard.benchmarks.items()}
    if dict(outcomes.benchmark_digests) != expected:
        raise EvaluationError(
            f"{items} has other questions than its scorecard", "one benchmark digest", "Evaluate the bundle again."
        )
    return outcomes


def _score_of(scorecard: Scorecard, benchmark: str) -> BenchmarkScore:
    if benchmark not in scorecard.benchmarks:
        raise EvaluationError(
            f"scorecard has {', '.join(scorecard.benchmarks)}",
            f'a gate rule judges "{benchmark}"',
            "Add it to evaluation.benchmarks and evaluate again.",
        )
    return scorecard.benchmarks[benchmark]


def _judge_floor(rule: FloorRule, score: BenchmarkScore) -> RuleResult:
    return RuleResult(
        rule=rule.rule,
        benchmark=rule.benchmark,
        found=f"{score.score:.2f}{score.mark}",
        needed=f"at least {rule.at_least:g}{score.mark}",
        passed=score.score >= rule.at_least,
        explanation=f"The bundle's score; 95% interval {score.ci95[0]:.2f} to {score.ci95[1]:.2f}.{_asked(score)}",
    )


def _judge_image_adds(rule: ImageAddsRule, score: BenchmarkScore) -> RuleResult:
    low, high = score.image_adds_ci95
    return RuleResult(
        rule=rule.rule,
        benchmark=rule.benchmark,
        found=f"{score.image_adds:+.2f} points",
        needed=f"at least {rule.at_least:+g} points",
        passed=score.image_adds >= rule.at_least,
        explanation=f"{score.score:.2f}{score.mark} with the image, {score.image_off:.2f}{score.mark} with it "
        f"removed: the model looks. 95% interval {low:+.2f} to {high:+.2f}.{_asked(score)}",
    )


def _judge_non_inferiority(
    rule: NonInferiorityRule, score: BenchmarkScore, outcomes: OutcomeFile, champion: ChampionEvidence | None
) -> RuleResult:
    needed = f"lower end above {rule.margin:+g} points"
    if champion is None:
        return RuleResult(
            rule=rule.rule,
            benchmark=rule.benchmark,
            found="no champion yet",
            needed=needed,
            passed=True,
            explanation="The first version has nothing to be worse than.",
        )
    theirs = _belonging(champion.items, champion.scorecard)
    if theirs.benchmark_digests.get(rule.benchmark) != score.benchmark_digest:
        raise EvaluationError(
            f'champion version {champion.version} was scored on another "{rule.benchmark}"',
            f"benchmark digest {score.benchmark_digest[:16]}",
            "Score its bundle again: comparable_champion does.",
        )
    difference = compare_outcomes(
        rule.benchmark, outcomes.of(rule.benchmark), theirs.of(rule.benchmark), variant=score.variant
    )
    anew = " scored anew on these questions" if champion.rescored else ""
    return RuleResult(
        rule=rule.rule,
        benchmark=rule.benchmark,
        found=f"{difference.difference:+.2f} points ({difference.low:+.2f} to {difference.high:+.2f})",
        needed=needed,
        passed=difference.low > rule.margin,
        explanation=f"Challenger minus champion (version {champion.version}, "
        f"{champion.scorecard.benchmarks[rule.benchmark].score:.2f}{score.mark}{anew}), paired and clustered by image, "
        "95%."
        f"{_asked(score)}",
    )


def _judge_parity(
    rule: ParityRule, scorecard: Scorecard, bundle_scorecard: Scorecard, parity: ParityReport
) -> RuleResult:
    apart = max(
        abs(score.score - bundle_scorecard.benchmarks[name].score) * 100 / score.maximum
        for name, score in scorecard.benchmarks.items()
    )
    passed = (
        parity.items > 0
        and parity.token_match >= rule.token_match
        and parity.max_abs_logit <= rule.max_abs_logit
        and apart <= rule.max_score_difference
    )
    return RuleResult(
        rule=rule.rule,
        benchmark=None,
        found=f"{100 * parity.token_match:.1f}% of {parity.items} answers equal, logits within "
        f"{parity.max_abs_logit:.2g}, scores {apart:.2f} points apart",
        needed=f"{100 * rule.token_match:g}%, logits within {rule.max_abs_logit:g}, scores at most "
        f"{rule.max_score_difference:g} points apart",
        passed=passed,
        explanation="The bundle answers as torch does: whole token sequences, first logits, and scores on every "
        "benchmark.",
    )


def _judge_validation(validation: ValidationReport) -> RuleResult:
    failed = [outcome.name for outcome in validation.expectations if not outcome.success]
    return RuleResult(
        rule="validation",
        benchmark=None,
        found=validation.verdict,
        needed="passed",
        passed=validation.verdict == "passed",
        explanation=f"Suite {validation.suite} over {validation.rows:,} samples, {validation.quarantined:,} of them in "
        f"quarantine. Not met: {', '.join(failed) or 'none'}.",
    )


def _judge_contamination(
    rule: ContaminationRule, validation: ValidationReport, contamination: ContaminationReport | None
) -> RuleResult:
    exact = validation.contaminated_images
    near = contamination.remaining_images if contamination else 0
    texts = contamination.remaining_texts if contamination else 0
    too_many_texts = rule.max_texts is not None and texts > rule.max_texts
    searched = (
        f"Whole search: {contamination.headline()}; "
        + ("training leaves them out." if contamination.left_out else "training does not leave them out.")
        if contamination
        else "Near duplicates and texts were not searched for."
    )
    return RuleResult(
        rule=rule.rule,
        benchmark=None,
        found=f"{exact + near:,} images" + (f", {texts:,} texts" if rule.max_texts is not None else ""),
        needed=f"at most {rule.max_images:,} images"
        + (f", {rule.max_texts:,} texts" if rule.max_texts is not None else ""),
        passed=exact + near <= rule.max_images and not too_many_texts,
        explanation="Training images that an evaluation set has too: by exact sha256, and near duplicates that "
        f"training does not leave out. {searched}",
    )


def _asked(score: BenchmarkScore) -> str:
    if score.n == score.n_total:
        return ""
    return f" Only the first {score.n:,} of {score.n_total:,} questions were asked."
