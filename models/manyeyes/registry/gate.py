"""The gate: may this version be promoted?

Pure: rules and evidence in, report out. It fails closed: a rule without its evidence, or that nothing here decides, is
not met. `docs/gate.md` has every rule and how to add one. Scores are the bundle's, because the bundle is what is
served; torch's own scorecard only says whether the export kept them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, assert_never

from pydantic import Field, ValidationError, model_validator

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import find_benchmark
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, read_outcomes
from manyeyes.evaluation.scorecard import BenchmarkScore, Scorecard
from manyeyes.evaluation.statistics.significance import PairedTest, compare_scores
from manyeyes.pages import Table, Text, render
from manyeyes.recipe import (
    ContaminationRule,
    FloorRule,
    GateRule,
    ImageAddsRule,
    NonInferiorityRule,
    ParityRule,
    ValidationRule,
)
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel

if TYPE_CHECKING:
    from manyeyes.data.contamination.findings import ContaminationReport
    from manyeyes.data.validation_report import ValidationReport
    from manyeyes.export.parity import ParityReport

Verdict = Literal["passed", "failed"]


class _OfBenchmark(Protocol):
    @property
    def rule(self) -> str: ...
    @property
    def benchmark(self) -> str: ...


class RuleResult(StrictModel):
    """One rule of the recipe."""

    rule: str = Field(description="Kind of rule, as in the recipe.")
    benchmark: str | None = Field(description="The benchmark that it is about, or null.")
    found: str = Field(description="What was found, with its unit.")
    needed: str = Field(description="What the rule asks for, with its unit.")
    passed: bool = Field(description="Whether the rule is met.")
    explanation: str = Field(description="Why the rule is there and how the figure came about.")


class GateReport(StrictModel):
    """``gate.json``: the verdict and every rule behind it."""

    format_version: Literal[1] = Field(default=1, description="Version of this file's format.")
    verdict: Verdict = Field(description="passed when every rule is met.")
    rules: tuple[RuleResult, ...] = Field(min_length=1, description="In the recipe's order.")
    challenger: str = Field(description="Digest of the bundle that was decided about.")
    champion: int | None = Field(description="Version of the champion that it was compared with; null for the first.")
    champion_digest: str | None = Field(description="Digest of the champion's bundle, or null.")
    benchmark_digests: dict[str, str] = Field(description="By benchmark; both models were scored on these questions.")

    @model_validator(mode="after")
    def _verdict_follows_the_rules(self) -> GateReport:
        if self.verdict != _verdict(self.rules):
            raise ValueError(f"verdict is {self.verdict}, and the rules say {_verdict(self.rules)}")
        return self

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


@dataclass(frozen=True)
class Evidence:
    """What rules are decided from; ``None`` is evidence that is missing, and a rule that needs it is not met.

    Attributes:
        scorecard: Of the checkpoint in torch.
        bundle_scorecard: Of the bundle, on the same questions.
        outcomes: The bundle's items.
        parity: Bundle against torch.
        validation: Of the training data.
        champion: The champion on the same questions, or ``None`` when there is none yet.
        contamination: Of the training data; without it only exact duplicates are known.
    """

    scorecard: Scorecard
    bundle_scorecard: Scorecard
    outcomes: OutcomeFile
    parity: ParityReport | None
    validation: ValidationReport | None
    champion: ChampionEvidence | None
    contamination: ContaminationReport | None


def decide(
    rules: Sequence[GateRule],
    *,
    scorecard: Scorecard,
    bundle_scorecard: Scorecard,
    parity: ParityReport | None,
    validation: ValidationReport | None,
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
        EvaluationError: No rules, or evidence that does not belong together: other models, other questions, a benchmark
            missing.
    """
    if not rules:
        raise EvaluationError("no gate rules", "one at least: without any, everything would pass", "Add one to `gate`.")
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
    evidence = Evidence(scorecard, bundle_scorecard, outcomes, parity, validation, champion, contamination)
    results = tuple(decide_rule(rule, evidence) for rule in rules)
    return GateReport(
        verdict=_verdict(results),
        rules=results,
        challenger=bundle_scorecard.model.digest,
        champion=champion.version if champion else None,
        champion_digest=champion.bundle_digest if champion else None,
        benchmark_digests={name: score.benchmark_digest for name, score in bundle_scorecard.benchmarks.items()},
    )


def decide_rule(rule: GateRule, evidence: Evidence) -> RuleResult:
    """Apply one rule. One that has no case here is not met, and mypy refuses this function."""
    match rule:
        case FloorRule():
            return _decide_floor(rule, evidence)
        case ImageAddsRule():
            return _decide_image_adds(rule, evidence)
        case NonInferiorityRule():
            return _decide_non_inferiority(rule, evidence)
        case ParityRule():
            return _decide_parity(rule, evidence)
        case ValidationRule():
            return _decide_validation(rule, evidence)
        case ContaminationRule():
            return _decide_contamination(rule, evidence)
    try:
        assert_never(rule)
    except AssertionError:
        return _no_verdict(rule, "a case in decide_rule", why="Nothing decides this rule.")


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
    write_file(path, report.model_dump_json(indent=2) + "\n")


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


def _verdict(rules: Sequence[RuleResult]) -> Verdict:
    return "passed" if rules and all(result.passed for result in rules) else "failed"


def _no_verdict(rule: GateRule | _OfBenchmark, needed: str, *, why: str) -> RuleResult:
    """What a rule says that cannot be decided: not met."""
    return RuleResult(
        rule=rule.rule,
        benchmark=getattr(rule, "benchmark", None),
        found="no verdict",
        needed=needed,
        passed=False,
        explanation=f"{why} A rule that cannot be decided is not met.",
    )


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


def _score_of(scorecard: Scorecard, benchmark: str) -> BenchmarkScore | None:
    """The score that a rule is about; ``None`` where the benchmark was skipped.

    Raises:
        EvaluationError: The benchmark was not asked at all.
    """
    if benchmark not in scorecard.benchmarks and benchmark not in scorecard.skipped:
        raise EvaluationError(
            f"scorecard has {', '.join(scorecard.benchmarks)}",
            f'a gate rule is about "{benchmark}"',
            "Add it to evaluation.benchmarks and evaluate again.",
        )
    return scorecard.benchmarks.get(benchmark)


def _skipped(rule: _OfBenchmark, scorecard: Scorecard) -> RuleResult:
    return _no_verdict(
        rule, f"a score on {rule.benchmark}", why=f"It was skipped: {scorecard.skipped[rule.benchmark]}."
    )


def _decide_floor(rule: FloorRule, evidence: Evidence) -> RuleResult:
    score = _score_of(evidence.bundle_scorecard, rule.benchmark)
    if score is None:
        return _skipped(rule, evidence.bundle_scorecard)
    return RuleResult(
        rule=rule.rule,
        benchmark=rule.benchmark,
        found=f"{score.score:.2f}{score.mark}",
        needed=f"at least {rule.at_least:g}{score.mark}",
        passed=score.score >= rule.at_least,
        explanation=f"The bundle's score; 95% interval {score.ci95[0]:.2f} to {score.ci95[1]:.2f}.{_asked(score)}",
    )


def _decide_image_adds(rule: ImageAddsRule, evidence: Evidence) -> RuleResult:
    score = _score_of(evidence.bundle_scorecard, rule.benchmark)
    if score is None:
        return _skipped(rule, evidence.bundle_scorecard)
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


def _decide_non_inferiority(rule: NonInferiorityRule, evidence: Evidence) -> RuleResult:
    score, champion = _score_of(evidence.bundle_scorecard, rule.benchmark), evidence.champion
    if score is None:
        return _skipped(rule, evidence.bundle_scorecard)
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
        rule.benchmark, evidence.outcomes.of(rule.benchmark), theirs.of(rule.benchmark), variant=score.variant
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


def _decide_parity(rule: ParityRule, evidence: Evidence) -> RuleResult:
    parity, ours, theirs = evidence.parity, evidence.scorecard.benchmarks, evidence.bundle_scorecard.benchmarks
    needed = (
        f"{100 * rule.token_match:g}%, logits within {rule.max_abs_logit:g}, scores at most "
        f"{rule.max_score_difference:g} points apart"
    )
    if parity is None or parity.items == 0:
        return _no_verdict(rule, needed, why="Bundle and torch were compared on no answer.")
    if not ours:
        return _no_verdict(rule, needed, why="Every benchmark was skipped, so there are no scores to compare.")
    apart = [abs(score.score - theirs[name].score) * 100 / score.maximum for name, score in ours.items()]
    return RuleResult(
        rule=rule.rule,
        benchmark=None,
        found=f"{100 * parity.token_match:.1f}% of {parity.items} answers equal, logits within "
        f"{parity.max_abs_logit:.2g}, scores {max(apart):.2f} points apart",
        needed=needed,
        passed=parity.token_match >= rule.token_match
        and parity.max_abs_logit <= rule.max_abs_logit
        and all(points <= rule.max_score_difference for points in apart),
        explanation="The bundle answers as torch does: whole token sequences, first logits, and scores on every "
        "benchmark.",
    )


def _decide_validation(rule: ValidationRule, evidence: Evidence) -> RuleResult:
    validation = evidence.validation
    if validation is None or validation.rows == 0:
        return _no_verdict(rule, "passed", why="No sample was validated.")
    failed = [outcome.name for outcome in validation.expectations if not outcome.success]
    return RuleResult(
        rule=rule.rule,
        benchmark=None,
        found=validation.verdict,
        needed="passed",
        passed=validation.verdict == "passed",
        explanation=f"Suite {validation.suite} over {validation.rows:,} samples, {validation.quarantined:,} of them in "
        f"quarantine. Not met: {', '.join(failed) or 'none'}.",
    )


def _decide_contamination(rule: ContaminationRule, evidence: Evidence) -> RuleResult:
    validation, contamination = evidence.validation, evidence.contamination
    needed = f"at most {rule.max_images:,} images" + (
        f", {rule.max_texts:,} texts" if rule.max_texts is not None else ""
    )
    if validation is None:
        return _no_verdict(rule, needed, why="The training data was not validated.")
    if contamination is None and not validation.eval_datasets:
        why = "Nothing was compared: the recipe names no data set to compare with and none to be judged on."
        return _no_verdict(rule, needed, why=why)
    if contamination is None and rule.max_texts is not None:
        return _no_verdict(rule, needed, why="Texts were not searched for.")
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
        needed=needed,
        passed=exact + near <= rule.max_images and not too_many_texts,
        explanation="Training images that an evaluation set has too: by exact sha256, and near duplicates that "
        f"training does not leave out. {searched}",
    )


def _asked(score: BenchmarkScore) -> str:
    if score.n == score.n_total:
        return ""
    return f" Only the first {score.n:,} of {score.n_total:,} questions were asked."


def render_gate_html(report: GateReport) -> str:
    """One HTML file without scripts or references."""
    return _render("gate.html", report)


def render_gate_markdown(report: GateReport) -> str:
    """The same as Markdown, for a terminal or the Kubeflow UI."""
    return _render("gate.md", report)


def _render(template: str, report: GateReport) -> str:
    rows: list[list[str | Text]] = [
        [
            f"{result.rule}: {result.benchmark}" if result.benchmark else result.rule,
            result.found,
            result.needed,
            Text("yes", kind="good") if result.passed else Text("no", kind="bad", mark="**"),
            Text(result.explanation, kind="quiet"),
        ]
        for result in report.rules
    ]
    digests = [["challenger's bundle", report.challenger]]
    digests += [["champion's bundle", report.champion_digest]] if report.champion_digest else []
    digests += [[name, digest] for name, digest in report.benchmark_digests.items()]
    failed = sum(not result.passed for result in report.rules)
    against = f"champion version {report.champion}" if report.champion else "no champion, this is the first"
    return render(
        template,
        title=f"Gate: {report.verdict}",
        verdict=report.verdict,
        summary=f"{failed} of {len(rows)} rules are not met ({against}); no alias moves."
        if failed
        else f"All {len(rows)} rules are met ({against}).",
        rules=Table(("rule", "found", "needed", "met", "why"), rows, stacked=True),
        digests=Table(("what", "digest"), digests, code=(1,)),
    )
