"""The gate: may this version be promoted?

Pure: rules and evidence in, report out. The rules, and how each is decided, are in `manyeyes.recipe.gate_rules`; here
the evidence is brought together and checked to belong together. It fails closed: a rule without its evidence is not
met. Scores are the bundle's, because the bundle is what is served; torch's own scorecard only says whether the export
kept them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError, model_validator

from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import find_benchmark
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, read_outcomes
from manyeyes.evaluation.scorecard import ModelKind, Scorecard
from manyeyes.evaluation.statistics.significance import PairedTest, compare_scores
from manyeyes.pages import Table, Text, render
from manyeyes.recipe.gate_rules import Evidence, GateRule, RuleResult
from manyeyes.runtime.bundle_contents import DEFAULT_VARIANT
from manyeyes.storage import write_file
from manyeyes.strict import StrictModel

if TYPE_CHECKING:
    from manyeyes.data.contamination.findings import ContaminationReport
    from manyeyes.data.validation_report import ValidationReport
    from manyeyes.export.parity import ParityReport

Verdict = Literal["passed", "failed"]


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
class VariantEvidence:
    """What the gate needs to know of a variant of the bundle.

    Attributes:
        scorecard: Of the variant.
        items: Its ``items.parquet``.
    """

    scorecard: Scorecard
    items: Path


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
    checkpoint_items: Path | None = None,
    variants: Mapping[str, VariantEvidence] | None = None,
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
        checkpoint_items: The checkpoint's ``items.parquet``; variants are compared with it.
        variants: The bundle's other variants, by name; the default one is in ``bundle_scorecard``.

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

    def compare(benchmark: str) -> PairedTest:
        assert champion is not None
        return _compare_with(champion, benchmark, bundle_scorecard, outcomes)

    scored = {DEFAULT_VARIANT: VariantEvidence(bundle_scorecard, items), **(variants or {})}
    compared = {} if checkpoint_items is None else _compare_with_checkpoint(scorecard, checkpoint_items, scored)
    evidence = Evidence(scorecard, bundle_scorecard, parity, validation, champion, contamination, compare, compared)
    results = tuple(rule.decide(evidence) for rule in rules)
    return GateReport(
        verdict=_verdict(results),
        rules=results,
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


def _compare_with(
    champion: ChampionEvidence, benchmark: str, scorecard: Scorecard, outcomes: OutcomeFile
) -> PairedTest:
    score, theirs = scorecard.benchmarks[benchmark], _belonging(champion.items, champion.scorecard)
    if theirs.benchmark_digests.get(benchmark) != score.benchmark_digest:
        raise EvaluationError(
            f'champion version {champion.version} was scored on another "{benchmark}"',
            f"benchmark digest {score.benchmark_digest[:16]}",
            "Score its bundle again: comparable_champion does.",
        )
    return compare_outcomes(benchmark, outcomes.of(benchmark), theirs.of(benchmark), variant=score.variant)


def _compare_with_checkpoint(
    scorecard: Scorecard, items: Path, variants: Mapping[str, VariantEvidence]
) -> dict[str, Callable[[str], PairedTest]]:
    checkpoint = _belonging(items, scorecard, kind="torch")

    def of(variant: VariantEvidence) -> Callable[[str], PairedTest]:
        theirs = _belonging(variant.items, variant.scorecard)

        def compare(benchmark: str) -> PairedTest:
            if theirs.benchmark_digests.get(benchmark) != checkpoint.benchmark_digests.get(benchmark):
                raise EvaluationError(
                    f'checkpoint and variant were asked other questions of "{benchmark}"',
                    "one benchmark digest",
                    "Evaluate both again.",
                )
            return compare_outcomes(
                benchmark,
                theirs.of(benchmark),
                checkpoint.of(benchmark),
                variant=scorecard.benchmarks[benchmark].variant,
            )

        return compare

    return {name: of(variant) for name, variant in variants.items()}


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


def _belonging(items: Path, scorecard: Scorecard, *, kind: ModelKind = "bundle") -> OutcomeFile:
    outcomes = read_outcomes(items)
    if scorecard.model.kind != kind or outcomes.model_digest != scorecard.model.digest:
        raise EvaluationError(
            f"{items} is of {outcomes.kind} {outcomes.model_digest[:16]}, the scorecard of {scorecard.model.kind} "
            f"{scorecard.model.digest[:16]}",
            f"scorecard and items of one {'bundle' if kind == 'bundle' else 'checkpoint'}",
            f"Pass the {'bundle' if kind == 'bundle' else 'checkpoint'}'s scorecard with the items.parquet beside it.",
        )
    expected = {name: score.benchmark_digest for name, score in scorecard.benchmarks.items()}
    if dict(outcomes.benchmark_digests) != expected:
        raise EvaluationError(
            f"{items} has other questions than its scorecard", "one benchmark digest", "Evaluate the model again."
        )
    return outcomes


def render_gate_html(report: GateReport) -> str:
    """One HTML file without scripts or references."""
    return _render("gate.html", report)


def render_gate_markdown(report: GateReport) -> str:
    """The same as Markdown, for a terminal or the Kubeflow UI."""
    return _render("gate.md", report)


def gate_table(report: GateReport) -> Table:
    """The rules, one a row: found, needed, met, and why."""
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
    return Table(("rule", "found", "needed", "met", "why"), rows, stacked=True)


def _render(template: str, report: GateReport) -> str:
    digests = [["challenger's bundle", report.challenger]]
    digests += [["champion's bundle", report.champion_digest]] if report.champion_digest else []
    digests += [[name, digest] for name, digest in report.benchmark_digests.items()]
    failed = sum(not result.passed for result in report.rules)
    against = f"champion version {report.champion}" if report.champion else "no champion, this is the first"
    return render(
        template,
        title=f"Gate: {report.verdict}",
        verdict=report.verdict,
        summary=f"{failed} of {len(report.rules)} rules are not met ({against}); no alias moves."
        if failed
        else f"All {len(report.rules)} rules are met ({against}).",
        rules=gate_table(report),
        digests=Table(("what", "digest"), digests, code=(1,)),
    )
