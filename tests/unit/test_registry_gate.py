from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError, RecipeError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.outcomes import Outcome, OutcomeFile, write_outcomes
from manyeyes.evaluation.scorecard import Scorecard
from manyeyes.evaluation.statistics.significance import compare_scores
from manyeyes.recipe import gate_rules, parse_recipe
from manyeyes.recipe.gate_rules import (
    GATE_RULES,
    ContaminationRule,
    FloorRule,
    GateRule,
    ImageAddsRule,
    NonInferiorityRule,
    ParityRule,
    PrecisionRule,
    ValidationRule,
)
from manyeyes.registry.gate import (
    ChampionEvidence,
    GateReport,
    VariantEvidence,
    compare_outcomes,
    decide,
    read_gate_report,
    render_gate_html,
    render_gate_markdown,
    write_gate_report,
)
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors
from tests.gate_toys import PAGE, RULES

IMAGES = 36


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


class Scored:
    """A model that is wrong on some images, scored as checkpoint and as bundle."""

    def __init__(
        self, snapshot: Snapshot, folder: Path, wrong: range, *, digest: str = "bundle", **recipe: Any
    ) -> None:
        def score(kind: str, digest: str) -> Scorecard:
            return evaluate(
                RuleAnswerer(rule_with_errors(IMAGES, wrong), name=kind),
                make_recipe(**recipe),
                snapshot=snapshot,
                out_dir=folder / kind,
                code_digest="c",
                model_digest=digest,
            )

        self.torch = score("torch", "checkpoint")
        self.bundle = score("bundle", digest)
        self.items = folder / "bundle" / "items.parquet"


@pytest.fixture(scope="module")
def good(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored(snapshot, tmp_path_factory.mktemp("good"), range(2))


@pytest.fixture(scope="module")
def worse(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored(snapshot, tmp_path_factory.mktemp("worse"), range(7), digest="worse")


def parity(**changes: Any) -> Any:
    return SimpleNamespace(
        **(
            {"items": 200, "token_match": 1.0, "max_abs_logit": 2e-5, "mean_abs_logit": 1e-6}
            | {"precision": "fp32", "variants": {}}
            | changes
        )
    )


def validation(**changes: Any) -> Any:
    facts = {
        "verdict": "passed",
        "suite": "conversations",
        "rows": 4000,
        "quarantined": 0,
        "contaminated_images": 0,
        "eval_datasets": ("easy-vqa-val",),
        "expectations": (),
    }
    return SimpleNamespace(**(facts | changes))


def decide_one(rule: GateRule, scored: Scored, champion: ChampionEvidence | None = None, **evidence: Any) -> GateReport:
    given = {"parity": parity(), "validation": validation()} | evidence
    return decide(
        [rule],
        scorecard=scored.torch,
        bundle_scorecard=scored.bundle,
        items=scored.items,
        champion=champion,
        **given,
    )


def as_champion(scored: Scored, version: int = 3) -> ChampionEvidence:
    return ChampionEvidence(version, scored.bundle.model.digest, scored.bundle, scored.items)


def test_floor(good: Scored) -> None:
    # 34 of 36 images right: 94.44%.
    passed = decide_one(FloorRule(rule="floor", benchmark="easy-vqa", at_least=94.4), good)
    failed = decide_one(FloorRule(rule="floor", benchmark="easy-vqa", at_least=94.5), good)
    assert (passed.verdict, failed.verdict) == ("passed", "failed")
    assert failed.rules[0].found == "94.44%"
    assert failed.rules[0].needed == "at least 94.5%"
    assert failed.reasons == ("floor (easy-vqa): found 94.44%, needed at least 94.5%",)
    assert passed.reasons == ()


def test_image_adds(good: Scored) -> None:
    # 25% without the image: it adds 69.44 points.
    passed = decide_one(ImageAddsRule(rule="image-adds", benchmark="easy-vqa", at_least=69), good)
    failed = decide_one(ImageAddsRule(rule="image-adds", benchmark="easy-vqa", at_least=70), good)
    assert (passed.verdict, failed.verdict) == ("passed", "failed")
    assert failed.rules[0].found == "+69.44 points"
    assert failed.rules[0].needed == "at least +70 points"


def test_non_inferiority(good: Scored, worse: Scored) -> None:
    rule = NonInferiorityRule(rule="non-inferiority", benchmark="easy-vqa", margin=-0.5)
    passed = decide_one(rule, good, as_champion(worse))
    failed = decide_one(rule, worse, as_champion(good))
    assert (passed.verdict, failed.verdict) == ("passed", "failed")
    # Five of 36 images more are wrong: 13.89 points.
    assert passed.rules[0].found.startswith("+13.89 points (")
    assert failed.rules[0].found.startswith("-13.89 points (")
    assert failed.rules[0].needed == "lower end above -0.5 points"
    assert failed.champion == 3
    assert failed.champion_digest == "bundle"


def test_a_better_mean_with_a_wide_interval_is_not_enough(snapshot: Snapshot, tmp_path: Path, good: Scored) -> None:
    # Wrong on two other images: equal on average, but nobody knows within half a point.
    other = Scored(snapshot, tmp_path, range(5, 7), digest="other")
    rule = NonInferiorityRule(rule="non-inferiority", benchmark="easy-vqa", margin=-0.5)
    report = decide_one(rule, other, as_champion(good))
    assert report.rules[0].found.startswith("+0.00 points (-")
    assert report.verdict == "failed"
    assert decide_one(rule.model_copy(update={"margin": -20}), other, as_champion(good)).verdict == "passed"


def mme_items(right: dict[int, tuple[bool, bool]]) -> list[Outcome]:
    """Two questions an image of MME's category "count"."""
    return [
        Outcome(
            benchmark="mme",
            id=f"{image}/{number}",
            image_sha256=f"{image}",
            question="?",
            answer_type="count",
            reference="yes",
            prediction="yes" if correct else "no",
            parsed="yes" if correct else "no",
            correct=float(correct),
            prediction_image_off="no",
            parsed_image_off="no",
            correct_image_off=0.0,
            facets=json.dumps({"category": "count", "unit": f"{image}"}),
        )
        for image, pair in right.items()
        for number, correct in enumerate(pair)
    ]


def as_mme(scored: Scored, outcomes: list[Outcome], score: float, folder: Path) -> Any:
    """The scorecards of ``scored`` with MME instead of easy-VQA."""
    easy = scored.bundle.benchmarks["easy-vqa"]
    figures = {"score": score, "ci95": (0.0, 2000.0), "unit": "points", "maximum": 2000.0, "variant": "official"}
    benchmarks = {"mme": easy.model_copy(update=figures)}
    items = folder / "items.parquet"
    digest = scored.bundle.model.digest
    write_outcomes(OutcomeFile(digest, "bundle", {"mme": easy.benchmark_digest}, outcomes), items)
    cards = (card.model_copy(update={"benchmarks": benchmarks}) for card in (scored.torch, scored.bundle))
    return SimpleNamespace(**dict(zip(("torch", "bundle"), cards, strict=True)), items=items)


def test_non_inferiority_compares_the_benchmarks_own_figure(good: Scored, worse: Scored, tmp_path: Path) -> None:
    # Half of the images wholly right: 50 + 50 points. One question right of each image, and both of one: more
    # questions right (52.5%), yet only one of twenty pairs: 52.5 + 5 points.
    whole = mme_items({image: (image < 10, image < 10) for image in range(20)})
    halves = mme_items({image: (True, image == 0) for image in range(20)})
    champion = as_mme(good, whole, 100.0, tmp_path / "champion")
    challenger = as_mme(worse, halves, 57.5, tmp_path / "challenger")
    rule = NonInferiorityRule(rule="non-inferiority", benchmark="mme", margin=-10)
    failed = decide_one(rule, challenger, as_champion(champion))
    assert failed.verdict == "failed"
    assert failed.rules[0].found.startswith("-42.50 points (")
    assert "(version 3, 100.00 points), paired" in failed.rules[0].explanation
    assert decide_one(rule, champion, as_champion(challenger)).rules[0].found.startswith("+42.50 points (")
    # The interval is that of the difference of MME's own figure: the bootstrap of `manyeyes compare`.
    ours, theirs = ([outcome.graded for outcome in outcomes] for outcomes in (halves, whole))
    test = compare_scores(BENCHMARKS["mme"], theirs, ours, "official")
    assert f"({test.low:+.2f} to {test.high:+.2f})" in failed.rules[0].found
    shuffled = compare_outcomes("mme", halves, whole[::-1], variant="official")
    assert shuffled == test
    # Margins are of the figure's own unit, and parity of its percentage: 1 of 2,000 points are 0.05%.
    near = SimpleNamespace(
        torch=challenger.torch.model_copy(
            update={"benchmarks": {"mme": challenger.torch.benchmarks["mme"].model_copy(update={"score": 58.5})}}
        ),
        bundle=challenger.bundle,
        items=challenger.items,
    )
    assert "scores 0.05 points apart" in decide_one(ParityRule(rule="parity"), near).rules[0].found


def test_variants_below_fp32_score_as_the_checkpoint_within_a_margin(
    good: Scored, worse: Scored, snapshot: Snapshot, tmp_path: Path
) -> None:
    """``worse`` is wrong on five images more than the checkpoint of ``good``."""
    rule = PrecisionRule(rule="precision", margin=-1)
    below = SimpleNamespace(precision="decoder int4")
    report = parity(precision="fp32", variants={"small": below})

    def verdict(rule: PrecisionRule, report: Any, variant: Scored | None) -> Any:
        given = {} if variant is None else {"small": VariantEvidence(variant.bundle, variant.items)}
        return decide(
            [rule],
            scorecard=good.torch,
            bundle_scorecard=good.bundle,
            parity=report,
            validation=None,
            items=good.items,
            champion=None,
            checkpoint_items=good.items.parents[1] / "torch" / "items.parquet",
            variants=given,
        ).rules[0]

    assert verdict(rule, report, good).passed
    failed = verdict(rule, report, worse)
    assert not failed.passed
    lost = worse.bundle.benchmarks["easy-vqa"].score - good.torch.benchmarks["easy-vqa"].score
    assert failed.found.startswith(f"small on easy-vqa: {lost:+.2f} points (")
    assert verdict(rule.model_copy(update={"margin": -60}), report, worse).passed
    # Nothing below fp32 is met; a variant that was not scored, or that nobody measured, is not.
    assert verdict(rule, parity(precision="fp32", variants={}), None).passed
    assert verdict(rule, report, None).found == "no verdict"
    assert verdict(rule, None, good).found == "no verdict"
    # The default variant is judged by the same rule.
    assert verdict(rule, parity(precision="decoder int8", variants={}), None).found.startswith("default on easy-vqa")


def test_the_same_model_again_is_not_inferior(good: Scored) -> None:
    rule = NonInferiorityRule(rule="non-inferiority", benchmark="easy-vqa", margin=-0.5)
    assert decide_one(rule, good, as_champion(good)).verdict == "passed"


def test_the_first_model_has_no_champion_to_be_worse_than(good: Scored) -> None:
    report = decide_one(NonInferiorityRule(rule="non-inferiority", benchmark="easy-vqa", margin=0), good)
    assert report.verdict == "passed"
    assert report.champion is None
    assert report.rules[0].found == "no champion yet"


def test_a_champion_of_other_questions_is_not_compared(snapshot: Snapshot, tmp_path: Path, good: Scored) -> None:
    cut = Scored(snapshot, tmp_path, range(2), evaluation__max_items=20)
    rule = NonInferiorityRule(rule="non-inferiority", benchmark="easy-vqa", margin=-0.5)
    with pytest.raises(EvaluationError, match='champion version 3 was scored on another "easy-vqa"'):
        decide_one(rule, good, as_champion(cut))


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "passed"),
        ({"token_match": 0.995}, "failed"),
        ({"max_abs_logit": 2e-3}, "failed"),
        ({"items": 0}, "failed"),
    ],
)
def test_parity(good: Scored, change: dict[str, float], verdict: str) -> None:
    report = decide_one(ParityRule(rule="parity"), good, parity=parity(**change))
    assert report.verdict == verdict
    if "token_match" in change:
        assert report.rules[0].found.startswith("99.5% of 200 answers equal")


def test_parity_needs_equal_scores_too(good: Scored, worse: Scored) -> None:
    good_torch_worse_bundle = SimpleNamespace(torch=good.torch, bundle=worse.bundle, items=worse.items)
    report = decide_one(ParityRule(rule="parity"), good_torch_worse_bundle)
    assert report.verdict == "failed"
    assert "scores 13.89 points apart" in report.rules[0].found


def test_validation(good: Scored) -> None:
    rule = ValidationRule(rule="validation")
    failed = [SimpleNamespace(name="roles alternate", success=False)]
    assert decide_one(rule, good).verdict == "passed"
    report = decide_one(rule, good, validation=validation(verdict="failed", expectations=failed))
    assert report.verdict == "failed"
    assert report.rules[0].found == "failed"
    assert "Not met: roles alternate." in report.rules[0].explanation


def test_contamination(good: Scored) -> None:
    rule = ContaminationRule(rule="contamination", max_images=1)
    assert decide_one(rule, good, validation=validation(contaminated_images=1)).verdict == "passed"
    report = decide_one(rule, good, validation=validation(contaminated_images=2))
    assert report.verdict == "failed"
    assert (report.rules[0].found, report.rules[0].needed) == ("2 images", "at most 1 images")


def test_one_failed_rule_fails_the_gate_and_all_rules_are_reported(good: Scored) -> None:
    recipe = make_recipe()
    report = decide(
        recipe.gate,
        scorecard=good.torch,
        bundle_scorecard=good.bundle,
        parity=parity(token_match=0.9),
        validation=validation(),
        items=good.items,
        champion=None,
    )
    assert report.verdict == "failed"
    assert [result.rule for result in report.rules] == [rule.rule for rule in recipe.gate]
    assert [result.rule for result in report.rules if not result.passed] == ["parity"]


def test_items_of_the_checkpoint_are_refused(good: Scored) -> None:
    with pytest.raises(EvaluationError, match="scorecard and items of one bundle"):
        decide_one(
            ValidationRule(rule="validation"),
            SimpleNamespace(torch=good.torch, bundle=good.bundle, items=good.items.parents[1] / "torch/items.parquet"),
        )


def test_checkpoint_and_bundle_must_have_answered_the_same_questions(
    snapshot: Snapshot, tmp_path: Path, good: Scored
) -> None:
    cut = Scored(snapshot, tmp_path, range(2), evaluation__max_items=20)
    with pytest.raises(EvaluationError, match="different questions"):
        decide_one(
            ValidationRule(rule="validation"), SimpleNamespace(torch=cut.torch, bundle=good.bundle, items=good.items)
        )


def test_a_rule_on_a_benchmark_that_was_not_run_is_refused(good: Scored) -> None:
    with pytest.raises(EvaluationError, match='a gate rule is about "gqa"'):
        decide_one(FloorRule(rule="floor", benchmark="gqa", at_least=1), good)


def test_a_cut_benchmark_is_named_in_the_explanation(snapshot: Snapshot, tmp_path: Path) -> None:
    cut = Scored(snapshot, tmp_path, range(2), evaluation__max_items=20)
    report = decide_one(FloorRule(rule="floor", benchmark="easy-vqa", at_least=1), cut)
    assert "Only the first 20 of 144 questions were asked." in report.rules[0].explanation


def test_the_report_is_read_back_and_shown(good: Scored, tmp_path: Path) -> None:
    report = decide_one(FloorRule(rule="floor", benchmark="easy-vqa", at_least=99), good)
    write_gate_report(report, tmp_path / "gate.json")
    assert read_gate_report(tmp_path / "gate.json") == report
    html, markdown = render_gate_html(report), render_gate_markdown(report)
    for text in (html, markdown):
        assert "94.44%" in text
        assert "at least 99%" in text
        assert "1 of 1 rules are not met" in text
    assert "| floor: easy-vqa | 94.44% | at least 99% | **no** |" in markdown
    with pytest.raises(EvaluationError, match="not a gate report"):
        read_gate_report(tmp_path / "missing.json")


# --- it fails closed ----------------------------------------------------------------------------------------------


def test_every_rule_is_decided(good: Scored, worse: Scored) -> None:
    assert {rule["rule"] for rule in RULES} == set(GATE_RULES)
    searched = SimpleNamespace(remaining_images=0, remaining_texts=0, left_out=True, headline=lambda: "nothing")
    for values in RULES:
        rule = GATE_RULES[values["rule"]].model_validate(values)
        assert set(values) == set(type(rule).model_fields), "docs/gate.md shows every field"
        report = decide_one(rule, good, as_champion(worse), contamination=searched)  # type: ignore[arg-type]
        assert (report.verdict, report.rules[0].rule) == ("passed", values["rule"])


def test_no_rules_pass_nothing(good: Scored) -> None:
    with pytest.raises(EvaluationError, match="no gate rules"):
        decide(
            [],
            scorecard=good.torch,
            bundle_scorecard=good.bundle,
            parity=parity(),
            validation=validation(),
            items=good.items,
            champion=None,
        )


@pytest.mark.parametrize(
    ("rule", "evidence", "why"),
    [
        (ParityRule(rule="parity"), {"parity": None}, "compared on no answer"),
        (ParityRule(rule="parity"), {"parity": parity(items=0)}, "compared on no answer"),
        (ValidationRule(rule="validation"), {"validation": None}, "No sample was validated"),
        (ValidationRule(rule="validation"), {"validation": validation(rows=0)}, "No sample was validated"),
        (ContaminationRule(rule="contamination"), {"validation": None}, "was not validated"),
        (ContaminationRule(rule="contamination"), {"validation": validation(eval_datasets=())}, "Nothing was compared"),
        (ContaminationRule(rule="contamination", max_texts=0), {}, "Texts were not searched for"),
    ],
)
def test_a_rule_without_its_evidence_is_not_met(good: Scored, rule: Any, evidence: Any, why: str) -> None:
    report = decide_one(rule, good, **evidence)
    assert (report.verdict, report.rules[0].found) == ("failed", "no verdict")
    assert why in report.rules[0].explanation


@pytest.mark.parametrize(
    "rule",
    [
        FloorRule(rule="floor", benchmark="mm-vet", at_least=0),
        ImageAddsRule(rule="image-adds", benchmark="mm-vet", at_least=0),
        NonInferiorityRule(rule="non-inferiority", benchmark="mm-vet", margin=-100),
    ],
)
def test_a_rule_on_a_skipped_benchmark_is_not_met(good: Scored, rule: Any) -> None:
    skipped = {"skipped": {"mm-vet": "no judge"}}
    cards = SimpleNamespace(
        torch=good.torch.model_copy(update=skipped), bundle=good.bundle.model_copy(update=skipped), items=good.items
    )
    report = decide_one(rule, cards)
    assert (report.verdict, report.rules[0].found) == ("failed", "no verdict")
    assert "It was skipped: no judge." in report.rules[0].explanation


@pytest.mark.parametrize(
    "rule",
    [
        FloorRule.model_construct(rule="floor", benchmark="easy-vqa", at_least=float("nan")),
        ImageAddsRule.model_construct(rule="image-adds", benchmark="easy-vqa", at_least=float("nan")),
        ParityRule.model_construct(rule="parity", max_abs_logit=float("nan")),
        ParityRule.model_construct(rule="parity", max_score_difference=float("nan")),
        NonInferiorityRule.model_construct(rule="non-inferiority", benchmark="easy-vqa", margin=float("nan")),
    ],
)
def test_what_is_no_number_meets_no_rule(good: Scored, worse: Scored, rule: Any) -> None:
    assert decide_one(rule, good, as_champion(worse)).verdict == "failed"


@pytest.mark.parametrize("change", [{"verdict": "passed"}, {"rules": ()}])
def test_a_verdict_that_its_rules_do_not_say_is_refused(good: Scored, tmp_path: Path, change: dict[str, Any]) -> None:
    report = decide_one(FloorRule(rule="floor", benchmark="easy-vqa", at_least=99), good)
    stored = json.loads(report.model_dump_json()) | change
    (tmp_path / "gate.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(EvaluationError, match="not a gate report"):
        read_gate_report(tmp_path / "gate.json")
    with pytest.raises(ValidationError):
        GateReport.model_validate(stored)


def test_an_unknown_rule_in_a_stored_recipe_is_refused() -> None:
    stored = json.loads(make_recipe().canonical_json())
    stored["gate"].append({"rule": "vibes", "benchmark": "easy-vqa"})
    with pytest.raises(RecipeError, match="gate"):
        parse_recipe(json.dumps(stored))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"\xff", b'{"items": "many"}'])
def test_evidence_that_cannot_be_read_stops_the_step(content: bytes | None, tmp_path: Path) -> None:
    from manyeyes.export.parity import ParityReport
    from manyeyes.steps.gate import _read

    if content is not None:
        (tmp_path / "parity.json").write_bytes(content)
    with pytest.raises(EvaluationError, match="is no ParityReport"):
        _read(ParityReport, tmp_path / "parity.json")


# --- docs/gate.md -------------------------------------------------------------------------------------------------


(CLASS,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def rules_of_the_page(rule: str) -> types.ModuleType:
    """The module of rules with one more, as the page says to add it: before the union, and at its end."""
    source = Path(gate_rules.__file__).read_text(encoding="utf-8")
    union = source[source.index("GateRule = Annotated[") :].replace(",\n    Field(", " | ReadableRule,\n    Field(", 1)
    module = types.ModuleType("rules_of_the_page")
    sys.modules[module.__name__] = module  # pydantic looks for the names of annotations there
    module.__dict__.update(vars(gate_rules), __name__=module.__name__)
    exec(compile(f"from __future__ import annotations\n{rule}\n\n{union}", "gate_rules.py", "exec"), module.__dict__)
    return module


def test_the_page_has_every_rule_and_its_fields() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|(.*)$", PAGE, flags=re.MULTILINE))
    assert set(rows) == set(GATE_RULES)
    for name, rule in GATE_RULES.items():
        for field in set(rule.model_fields) - {"rule", "benchmark"}:
            assert f"`{field}`" in rows[name]


def test_the_rule_of_the_page_can_be_added_and_decides(good: Scored) -> None:
    rules = rules_of_the_page(CLASS)
    assert list(rules.GATE_RULES) == [*GATE_RULES, "readable"]
    score = good.bundle.benchmarks["easy-vqa"]
    share = 100 * score.parse_failures / score.n
    assert share > 0
    for at_most, verdict in ((share, "passed"), (share - 0.01, "failed")):
        values = {"rule": "readable", "benchmark": "easy-vqa", "at_most": at_most}
        report = decide_one(TypeAdapter(rules.GateRule).validate_python(values), good)
        assert (report.verdict, report.rules[0].found) == (verdict, f"{share:.2f}%")


def test_a_rule_that_cannot_decide_cannot_be_made() -> None:
    rules = rules_of_the_page(CLASS.partition("    def ")[0])
    values = {"rule": "readable", "benchmark": "easy-vqa", "at_most": 5}
    with pytest.raises(TypeError, match="abstract"):
        rules.ReadableRule(**values)
    with pytest.raises(TypeError, match="abstract"):
        rules.ReadableRule.model_construct(**values)
    with pytest.raises(TypeError, match="abstract"):
        TypeAdapter(rules.GateRule).validate_python(values)
