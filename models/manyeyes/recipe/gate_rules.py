"""The gate's rules: what a recipe may write, and how each is decided.

One class a rule: its fields are what a recipe writes, its function decides from the evidence that
``manyeyes.registry.gate`` gathers. ``docs/gate.md`` has every rule and how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, get_args

from pydantic import Field

from manyeyes.errors import EvaluationError
from manyeyes.recipe.model import MAX_COUNT, Strict
from manyeyes.strict import StrictModel

# Beyond the maximum of any benchmark.
_MAX_POINTS = 1e6


class RuleResult(StrictModel):
    """One rule of the recipe."""

    rule: str = Field(description="Kind of rule, as in the recipe.")
    benchmark: str | None = Field(description="The benchmark that it is about, or null.")
    found: str = Field(description="What was found, with its unit.")
    needed: str = Field(description="What the rule asks for, with its unit.")
    passed: bool = Field(description="Whether the rule is met.")
    explanation: str = Field(description="Why the rule is there and how the figure came about.")


# --- evidence -----------------------------------------------------------------------------------------------------
# What rules read of the reports, which are made in rooms above this one; the reports' own fields say more.


class _Score(Protocol):
    """Of ``BenchmarkScore`` in a scorecard; in the benchmark's unit, which ``mark`` writes."""

    @property
    def score(self) -> float: ...
    @property
    def ci95(self) -> tuple[float, float]: ...
    @property
    def image_off(self) -> float: ...
    @property
    def image_adds(self) -> float: ...
    @property
    def image_adds_ci95(self) -> tuple[float, float]: ...
    @property
    def maximum(self) -> float: ...
    @property
    def mark(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def n_total(self) -> int: ...
    @property
    def parse_failures(self) -> int: ...


class _Scorecard(Protocol):
    """``scorecard.json``: scores by benchmark, and why the others were skipped."""

    @property
    def benchmarks(self) -> Mapping[str, _Score]: ...
    @property
    def skipped(self) -> Mapping[str, str]: ...


class _ParityFigures(Protocol):
    """Of one variant; ``precision`` is fp32 or says which graphs are below it."""

    @property
    def precision(self) -> str: ...


class _Parity(_ParityFigures, Protocol):
    """``parity.json``."""

    @property
    def items(self) -> int: ...
    @property
    def token_match(self) -> float: ...
    @property
    def max_abs_logit(self) -> float: ...
    @property
    def variants(self) -> Mapping[str, _ParityFigures]: ...


class _Expectation(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def success(self) -> bool: ...


class _Validation(Protocol):
    """``validation.json``."""

    @property
    def verdict(self) -> str: ...
    @property
    def suite(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def quarantined(self) -> int: ...
    @property
    def contaminated_images(self) -> int: ...
    @property
    def eval_datasets(self) -> Sequence[str]: ...
    @property
    def expectations(self) -> Sequence[_Expectation]: ...


class _Contamination(Protocol):
    """``contamination.json``."""

    @property
    def left_out(self) -> bool: ...
    @property
    def remaining_images(self) -> int: ...
    @property
    def remaining_texts(self) -> int: ...
    def headline(self) -> str: ...


class _Champion(Protocol):
    """The version that is promoted now, scored on the same questions; ``rescored`` where that was done anew."""

    @property
    def version(self) -> int: ...
    @property
    def scorecard(self) -> _Scorecard: ...
    @property
    def rescored(self) -> bool: ...


class _Difference(Protocol):
    """Challenger minus champion, and its 95% interval; points."""

    @property
    def difference(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class Evidence:
    """What rules are decided from; ``None`` is evidence that is missing, and a rule that needs it is not met.

    Attributes:
        scorecard: Of the checkpoint in torch.
        bundle_scorecard: Of the bundle, on the same questions.
        parity: Bundle against torch.
        validation: Of the training data.
        champion: The champion on the same questions, or ``None`` when there is none yet.
        contamination: Of the training data; without it only exact duplicates are known.
        compare: Challenger and champion on one benchmark.
        variants: By name of a variant below fp32 that was scored: checkpoint and variant on one benchmark.
    """

    scorecard: _Scorecard
    bundle_scorecard: _Scorecard
    parity: _Parity | None
    validation: _Validation | None
    champion: _Champion | None
    contamination: _Contamination | None
    compare: Callable[[str], _Difference]
    variants: Mapping[str, Callable[[str], _Difference]] = field(default_factory=dict)


# --- rules --------------------------------------------------------------------------------------------------------


class Rule(Strict, ABC):
    """A rule. One that cannot decide cannot be made, so it cannot pass."""

    rule: str

    @abstractmethod
    def decide(self, evidence: Evidence) -> RuleResult:
        """Whether the evidence meets this rule; without the evidence that it needs, it is not met."""

    def result(self, *, found: str, needed: str, passed: bool, explanation: str) -> RuleResult:
        """What ``decide`` answers.

        Args:
            found: With its unit.
            needed: With its unit.
            passed: Whether the rule is met.
            explanation: Why the rule is there and how the figure came about.
        """
        return RuleResult(
            rule=self.rule,
            benchmark=getattr(self, "benchmark", None),
            found=found,
            needed=needed,
            passed=passed,
            explanation=explanation,
        )

    def no_verdict(self, needed: str, *, why: str) -> RuleResult:
        """What ``decide`` answers without the evidence that it needs: not met."""
        explanation = f"{why} A rule that cannot be decided is not met."
        return self.result(found="no verdict", needed=needed, passed=False, explanation=explanation)


class BenchmarkRule(Rule, ABC):
    """A rule on the bundle's score on one benchmark; not met where the benchmark was skipped."""

    benchmark: str

    @abstractmethod
    def decide_score(self, score: _Score, evidence: Evidence) -> RuleResult:
        """Whether the bundle's score on the benchmark meets this rule."""

    def decide(self, evidence: Evidence) -> RuleResult:
        """Decide from the bundle's score.

        Raises:
            EvaluationError: The benchmark was not asked at all.
        """
        scorecard = evidence.bundle_scorecard
        if self.benchmark in scorecard.benchmarks:
            return self.decide_score(scorecard.benchmarks[self.benchmark], evidence)
        if self.benchmark in scorecard.skipped:
            why = f"It was skipped: {scorecard.skipped[self.benchmark]}."
            return self.no_verdict(f"a score on {self.benchmark}", why=why)
        raise EvaluationError(
            f"scorecard has {', '.join(scorecard.benchmarks)}",
            f'a gate rule is about "{self.benchmark}"',
            "Add it to evaluation.benchmarks and evaluate again.",
        )


class FloorRule(BenchmarkRule):
    """The score is at least so much."""

    rule: Literal["floor"]
    at_least: float = Field(ge=0, le=_MAX_POINTS, description="Points of the benchmark's own figure.")

    def decide_score(self, score: _Score, evidence: Evidence) -> RuleResult:
        """The score itself."""
        return self.result(
            found=f"{score.score:.2f}{score.mark}",
            needed=f"at least {self.at_least:g}{score.mark}",
            passed=score.score >= self.at_least,
            explanation=f"The bundle's score; 95% interval {score.ci95[0]:.2f} to {score.ci95[1]:.2f}.{_asked(score)}",
        )


class NonInferiorityRule(BenchmarkRule):
    """The lower end of challenger minus champion (paired, clustered by image, 95%) is above a margin."""

    rule: Literal["non-inferiority"]
    margin: float = Field(
        ge=-_MAX_POINTS, le=0, description="Points of the benchmark's own figure (MME: of 2,000); 0 or below."
    )

    def decide_score(self, score: _Score, evidence: Evidence) -> RuleResult:
        """Challenger minus champion; the first version has nothing to be worse than."""
        champion, needed = evidence.champion, f"lower end above {self.margin:+g} points"
        if champion is None:
            return self.result(
                found="no champion yet",
                needed=needed,
                passed=True,
                explanation="The first version has nothing to be worse than.",
            )
        difference = evidence.compare(self.benchmark)
        anew = " scored anew on these questions" if champion.rescored else ""
        return self.result(
            found=f"{difference.difference:+.2f} points ({difference.low:+.2f} to {difference.high:+.2f})",
            needed=needed,
            passed=difference.low > self.margin,
            explanation=f"Challenger minus champion (version {champion.version}, "
            f"{champion.scorecard.benchmarks[self.benchmark].score:.2f}{score.mark}{anew}), paired and clustered by "
            f"image, 95%.{_asked(score)}",
        )


class ImageAddsRule(BenchmarkRule):
    """The score with the image is this many points above the score without."""

    rule: Literal["image-adds"]
    at_least: float = Field(ge=0, le=_MAX_POINTS, description="Points of the benchmark's own figure.")

    def decide_score(self, score: _Score, evidence: Evidence) -> RuleResult:
        """The score with the image minus the score with it removed."""
        low, high = score.image_adds_ci95
        return self.result(
            found=f"{score.image_adds:+.2f} points",
            needed=f"at least {self.at_least:+g} points",
            passed=score.image_adds >= self.at_least,
            explanation=f"{score.score:.2f}{score.mark} with the image, {score.image_off:.2f}{score.mark} with it "
            f"removed: the model looks. 95% interval {low:+.2f} to {high:+.2f}.{_asked(score)}",
        )


class ParityRule(Rule):
    """The bundle answers as torch does."""

    rule: Literal["parity"]
    token_match: float = Field(default=1.0, ge=0, le=1)
    max_abs_logit: float = Field(default=1e-3, gt=0, le=1e6)
    max_score_difference: float = Field(
        default=0.1,
        ge=0,
        le=100,
        description="Points between torch's and bundle's score, each as percent of its maximum.",
    )

    def decide(self, evidence: Evidence) -> RuleResult:
        """Whole token sequences, first logits, and the score on every benchmark."""
        parity, ours, theirs = evidence.parity, evidence.scorecard.benchmarks, evidence.bundle_scorecard.benchmarks
        needed = (
            f"{100 * self.token_match:g}%, logits within {self.max_abs_logit:g}, scores at most "
            f"{self.max_score_difference:g} points apart"
        )
        if parity is None or parity.items == 0:
            return self.no_verdict(needed, why="Bundle and torch were compared on no answer.")
        if not ours:
            return self.no_verdict(needed, why="Every benchmark was skipped, so there are no scores to compare.")
        apart = [abs(score.score - theirs[name].score) * 100 / score.maximum for name, score in ours.items()]
        return self.result(
            found=f"{100 * parity.token_match:.1f}% of {parity.items} answers equal, logits within "
            f"{parity.max_abs_logit:.2g}, scores {max(apart):.2f} points apart",
            needed=needed,
            passed=parity.token_match >= self.token_match
            and parity.max_abs_logit <= self.max_abs_logit
            and all(points <= self.max_score_difference for points in apart),
            explanation="The bundle answers as torch does: whole token sequences, first logits, and scores on every "
            "benchmark.",
        )


class PrecisionRule(Rule):
    """Every variant below fp32 scores as the checkpoint does, within a margin.

    On every benchmark the lower end of variant minus checkpoint (paired, clustered by image, 95%) is above it.
    """

    rule: Literal["precision"]
    margin: float = Field(
        ge=-_MAX_POINTS, le=0, description="Points of each benchmark's own figure (MME: of 2,000); 0 or below."
    )

    def decide(self, evidence: Evidence) -> RuleResult:
        """The variant and benchmark that lose most; a variant that was not scored is not met."""
        needed = f"lower end above {self.margin:+g} points in every variant"
        parity, variants = evidence.parity, evidence.variants
        if parity is None:
            return self.no_verdict(needed, why="The bundle's variants are not known: it has no parity report.")
        below = {name for name, figures in parity.variants.items() if figures.precision != "fp32"}
        below |= {"default"} if parity.precision != "fp32" else set()
        if not below:
            why = "Every variant of this bundle is fp32."
            return self.result(found="nothing below fp32", needed=needed, passed=True, explanation=why)
        absent = sorted(below - variants.keys())
        if absent or not evidence.scorecard.benchmarks:
            return self.no_verdict(needed, why=f"No score of {', '.join(absent) or 'any benchmark'} was found.")
        compared = {
            (name, benchmark): variants[name](benchmark)
            for name in sorted(below)
            for benchmark in evidence.scorecard.benchmarks
        }
        (name, benchmark), worst = min(compared.items(), key=lambda item: item[1].low)
        others = "; ".join(
            f"{one} on {asked} {found.difference:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
            for (one, asked), found in compared.items()
        )
        return self.result(
            found=f"{name} on {benchmark}: {worst.difference:+.2f} points ({worst.low:+.2f} to {worst.high:+.2f})",
            needed=needed,
            passed=worst.low > self.margin,
            explanation=f"Variant minus checkpoint, paired and clustered by image, 95%: {others}.",
        )


class ValidationRule(Rule):
    """The data passed validation."""

    rule: Literal["validation"]

    def decide(self, evidence: Evidence) -> RuleResult:
        """The suite's verdict."""
        validation = evidence.validation
        if validation is None or validation.rows == 0:
            return self.no_verdict("passed", why="No sample was validated.")
        failed = [outcome.name for outcome in validation.expectations if not outcome.success]
        return self.result(
            found=validation.verdict,
            needed="passed",
            passed=validation.verdict == "passed",
            explanation=f"Suite {validation.suite} over {validation.rows:,} samples, {validation.quarantined:,} of "
            f"them in quarantine. Not met: {', '.join(failed) or 'none'}.",
        )


class ContaminationRule(Rule):
    """No more than this many training images are also in an evaluation set: exact sha256, and near duplicates."""

    rule: Literal["contamination"]
    max_images: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="Exact duplicates, and near ones that training does not leave out."
    )
    max_texts: int | None = Field(
        default=None,
        ge=0,
        le=MAX_COUNT,
        description="Samples with a text of an evaluation set that training does not leave out; null does not judge.",
    )

    def decide(self, evidence: Evidence) -> RuleResult:
        """Images by exact sha256, and the near duplicates and texts that training does not leave out."""
        validation, contamination = evidence.validation, evidence.contamination
        needed = f"at most {self.max_images:,} images" + (
            f", {self.max_texts:,} texts" if self.max_texts is not None else ""
        )
        if validation is None:
            return self.no_verdict(needed, why="The training data was not validated.")
        if contamination is None and not validation.eval_datasets:
            why = "Nothing was compared: the recipe names no data set to compare with and none to be judged on."
            return self.no_verdict(needed, why=why)
        if contamination is None and self.max_texts is not None:
            return self.no_verdict(needed, why="Texts were not searched for.")
        exact = validation.contaminated_images
        near = contamination.remaining_images if contamination else 0
        texts = contamination.remaining_texts if contamination else 0
        too_many_texts = self.max_texts is not None and texts > self.max_texts
        searched = (
            f"Whole search: {contamination.headline()}; "
            + ("training leaves them out." if contamination.left_out else "training does not leave them out.")
            if contamination
            else "Near duplicates and texts were not searched for."
        )
        return self.result(
            found=f"{exact + near:,} images" + (f", {texts:,} texts" if self.max_texts is not None else ""),
            needed=needed,
            passed=exact + near <= self.max_images and not too_many_texts,
            explanation="Training images that an evaluation set has too: by exact sha256, and near duplicates that "
            f"training does not leave out. {searched}",
        )


GateRule = Annotated[
    FloorRule | NonInferiorityRule | ImageAddsRule | ParityRule | PrecisionRule | ValidationRule | ContaminationRule,
    Field(discriminator="rule"),
]

# Every rule by the name that a recipe writes; the union above is the one list of them.
GATE_RULES: dict[str, type[Rule]] = {
    get_args(rule.model_fields["rule"].annotation)[0]: rule for rule in get_args(get_args(GateRule)[0])
}


def _asked(score: _Score) -> str:
    if score.n == score.n_total:
        return ""
    return f" Only the first {score.n:,} of {score.n_total:,} questions were asked."
