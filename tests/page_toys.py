"""Every page and note with made-up contents: for tests of their markup, and for looking at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_origin

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from kfp_server_api import V2beta1Run
from pydantic import BaseModel

from manyeyes.data.contamination.findings import (
    BenchmarkFindings,
    ContaminationReport,
    DatasetFindings,
    Pair,
    Thresholds,
    render_contamination,
)
from manyeyes.data.curation.page import render_curation
from manyeyes.data.curation.recipe import CurationRecipe, NounPhraseSpec, SourceSpec
from manyeyes.data.curation.report import (
    AnswerMachine,
    CuratedExample,
    CuratedInput,
    CuratedSource,
    CurationReport,
    Distribution,
)
from manyeyes.data.generation.dataset import GenerationReport, RefusedItem
from manyeyes.data.generation.page import render_generation
from manyeyes.data.importing.import_report import ImportReport, render_import
from manyeyes.data.profile import SCHEMA
from manyeyes.data.quarantine import QuarantinedSample
from manyeyes.data.records import Record, Turn
from manyeyes.data.shards import write_shards
from manyeyes.data.validation_report import ExpectationOutcome, ValidationReport, render_validation, show_image
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.compare import (
    AverageDifference,
    ComparedBenchmark,
    ComparedModel,
    ModelComparison,
    render_comparison,
    render_comparison_text,
    render_correlation,
)
from manyeyes.evaluation.outcomes import OutcomeFile
from manyeyes.evaluation.reliance import (
    BenchmarkReliance,
    EncoderReliance,
    RelianceReport,
    render_reliance,
    render_reliance_text,
)
from manyeyes.evaluation.report.writing import build_report, render_html, render_markdown
from manyeyes.evaluation.statistics.correlation import BenchmarkCorrelation
from manyeyes.harness.cluster import Reason
from manyeyes.harness.events import ErrorReport, Problem
from manyeyes.kubeflow.run_status import Failure, RunStatus, render_status
from manyeyes.kubeflow.workflow import Attempt, StepStatus
from manyeyes.pages import (
    Curve,
    Point,
    Table,
    Text,
    draw_bars,
    draw_curves,
    facts_table,
    scatter,
    step_page,
)
from manyeyes.recipe import load_recipe
from manyeyes.recipe.gate_rules import RuleResult
from manyeyes.registry.card import render_card
from manyeyes.registry.gate import GateReport, render_gate_html, render_gate_markdown
from manyeyes.registry.history import History, Identity, MoveRecord
from manyeyes.registry.history_page import render_history
from manyeyes.registry.lineage import Lineage, PretrainedPart, UsedDataset
from manyeyes.search.search import Search, SearchRound, search_html, search_markdown
from manyeyes.search.trial import Difference, Row, Trial, TrialStage
from manyeyes.search.variant import Variant
from manyeyes.steps.compare_trials import comparison_html
from manyeyes.steps.summarise_run import NoticeStep, RunNotice, render_notice
from manyeyes.web.chat_client import ServiceUse
from tests.evaluation_fakes import make_image
from tests.report_toys import make_evaluation

EVIL = """<script>alert(1)</script><img src=x onerror=alert(1)>"'&</style>"""
# Words that the code reads and does not only show.
CODE_WORDS = {
    "image-on",
    "image-off",
    "grey",
    "other-image",
    "llava",
    "eagle",
    "cambrian",
    "mini-gemini",
    "human",
    "gpt",
    "drawn",
}

Change = Callable[[Any], Any]


def spoil(value: Any) -> Any:
    """The same with ``EVIL`` in every text: of models, their parts, and the keys of their maps."""
    if isinstance(value, str):
        return value if value in CODE_WORDS or not value else f"{EVIL}{value}"
    if isinstance(value, BaseModel):
        fields = {
            name: getattr(value, name) if get_origin(field.annotation) is Literal else spoil(getattr(value, name))
            for name, field in type(value).model_fields.items()
        }
        return type(value).model_construct(**fields)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: spoil(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, dict):
        return {spoil(key): spoil(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(spoil, value))
    return type(value)(map(spoil, value)) if isinstance(value, (list, tuple)) else value


def report_pages(change: Change) -> dict[str, str]:
    card, outcomes, benchmarks = make_evaluation(["gqa", "mme", "pope"])
    made = build_report(card, outcomes, benchmarks, recipe=load_recipe("tiny"))
    report = change(made)
    pictures = {
        example.image_sha256: make_image(1).data for details in report.details.values() for example in details.worst
    }
    return {"report.html": render_html(report, pictures), "report.md": render_markdown(report)}


def compare_pages(change: Change) -> dict[str, str]:
    _, outcomes, _ = make_evaluation(["gqa"])
    theirs = [dataclasses.replace(each, correct=1 - each.correct) for each in outcomes]
    model = ComparedModel(name="model", recipe="tiny", kind="torch", digest="d" * 64)
    compared = ComparedBenchmark(
        **{"title": "GQA", "unit": "percent", "variant": "lmms", "n": 27, "clusters": 9, "first": 50.0, "second": 60.0},
        first_ci95=(46.0, 54.0),
        second_ci95=(56.0, 64.0),
        **{"difference": 10.0, "ci95": (4.0, 16.0), "p": 0.00001, "p_holm": 0.003, "verdict": "better"},
        **{"detectable": 8.0, "only_first": 3, "only_second": 6, "both": 9, "neither": 9},
    )
    comparison = change(
        ModelComparison(
            first=model,
            second=model,
            data_md5="e" * 32,
            average=AverageDifference(difference=10.0, ci95=(4.0, 16.0), p=0.01, detectable=None),
            benchmarks={"gqa": compared},
            not_compared={"mme": "another prompt"},
        )
    )
    # The page asks the table of benchmarks for the maximum.
    comparison = comparison.model_copy(update={"benchmarks": {"gqa": next(iter(comparison.benchmarks.values()))}})
    sides = [
        SimpleNamespace(
            items=OutcomeFile("d", "torch", {}, [dataclasses.replace(change(each), benchmark="gqa") for each in side])
        )
        for side in (outcomes, theirs)
    ]
    html = render_comparison(
        comparison,
        *sides,  # type: ignore[arg-type]
        read_image=lambda _, __: make_image(1).data,
        images_missing=change("no snapshot"),
    )
    return {"compare.html": html, "compare.md": render_comparison_text(comparison)}


def correlation_page(change: Change) -> dict[str, str]:
    # As many as Cambrian-1 compares, those with the longest names.
    names = tuple(sorted(BENCHMARKS, key=len)[-16:])
    found = BenchmarkCorrelation(
        models=("a", "b", "c"),
        models_in_components=("a", "b", "c"),
        benchmarks=names,
        groups={name: number % 4 for number, name in enumerate(names)},
        correlation=tuple(
            tuple(None if (row, column) == (1, 1) else (-1.0) ** (row + column) * 0.55 for column in range(16))
            for row in range(16)
        ),
        explained=(0.8, 0.2),
        # Two, far apart: where names would overlap, lines to them are drawn.
        loadings={names[0]: (0.9, 0.1), names[1]: (-0.4, 0.3)},
    )
    return {"correlation.html": render_correlation(change(found))}


def reliance_pages(change: Change) -> dict[str, str]:
    encoder = EncoderReliance(
        encoder="clip", how="zeroed", score=3.0, loss=1.0, loss_ci95=(0.0, 2.0), p=0.1, p_holm=0.2
    )
    benchmark = BenchmarkReliance(
        **{"title": "GQA", "unit": "percent", "n": 9, "images": 3, "score": 4.0, "ci95": (3.0, 5.0)},
        multiple_choice="generate",
        encoders=(encoder,),
    )
    report = change(
        RelianceReport(
            model_digest="d", recipe="tiny", data_md5="e", benchmarks={"gqa": benchmark}, skipped=("mm-vet",)
        )
    )
    return {"reliance.html": render_reliance(report), "reliance.md": render_reliance_text(report)}


def gate_pages(change: Change) -> dict[str, str]:
    rules = [
        RuleResult(rule="floor", benchmark=name, found="3%", needed="4%", passed=passed, explanation="why")
        for name, passed in (("gqa", True), (None, False))
    ]
    report = change(
        GateReport(
            verdict="failed",
            rules=tuple(rules),
            challenger="c" * 64,
            champion=3,
            champion_digest="d" * 64,
            benchmark_digests={"gqa": "e" * 64},
        )
    )
    scorecard, _, _ = make_evaluation(["gqa", "mme"])
    lineage = Lineage(
        **{"recipe": "tiny", "recipe_digest": "f" * 64, "description": "Small.", "max_length": 64, "python": "3.11"},
        pretrained=(PretrainedPart(part="language_model", source="hub:a/b@c", licence="MIT", said_by="its card"),),
        datasets=(UsedDataset(name="gqa", use="evaluation", licence="not stated", source="somewhere"),),
        packages={"torch": "2"},
    )
    digests = ("recipe", "recipe_digest", "data_md5", "code_digest", "checkpoint_digest", "digest")
    card = render_card(
        change("manyeyes-tiny"),
        dict.fromkeys(digests, change("r")) | {"files": {}},
        scorecard=change(scorecard),
        report=report,
        lineage=change(lineage),
        tags={},
    )
    return {"gate.html": render_gate_html(report), "gate.md": render_gate_markdown(report), "card.md": card}


def contamination_page(change: Change) -> dict[str, str]:
    counts = dict.fromkeys(("images", "exact", "near", "mirrored", "undecidable", "unreadable", "overlapping"), 1)
    pair = Pair(
        **{
            "kind": "near",
            "dataset": "train",
            "id": "train/1",
            "row": 1,
            "benchmark_row": 1,
            "image": 0,
            "benchmark": "test",
            "benchmark_id": "test/1",
        },
        **{"benchmark_image": 0, "distance": 2, "difference": 1.5, "share": None},
    )
    report = change(
        ContaminationReport(
            data_md5="e" * 32,
            thresholds=Thresholds(),
            benchmarks=(BenchmarkFindings(name="test", **counts, texts=3, too_short=1),),
            datasets=(DatasetFindings(name="train", **counts, samples=2),),
            left_out=False,
            examples=(pair,),
        )
    )
    shown = {report.examples[0]: (show_image(make_image(1).data), show_image(b"no image"))}
    return {
        "contamination.html": render_contamination(report, pictures=shown),
        "contamination.md": report.as_markdown(),
    }


def import_page(change: Change) -> dict[str, str]:
    report = change(
        ImportReport(
            **{"dataset": "toy-train", "kind": "json", "title": "Toys", "files": ["toy.json"], "items": 3, "kept": 2},
            **{"images": 2, "distinct_images": 1, "text_only": 0, "shards": 1, "reasons": {"image missing": 1}},
            **{"repairs": {"image marks merged": 1}, "sources": {"a": 1, "b": 1}},
        )
    )
    turns = (Turn("human", change("<image>\nwhat?")), Turn("gpt", change("a toy")))
    sample = Record(change("toy/0"), change("toy"), (make_image(1),), turns)
    left_out = [QuarantinedSample(id=change("toy/2"), row=2, dataset="toy-train", reason=change("image missing"))]
    page = render_import(report, samples=[sample], left_out=left_out)
    return {"import.html": page, "import.md": report.as_markdown()}


def generation_page(change: Change) -> dict[str, str]:
    use = ServiceUse(
        **{"endpoint": "https://models.example/v1", "model": "writer", "served": ["writer-1"], "requests": 4},
        **{"cached": 1, "retried": 0, "unreadable": 1, "prompt_tokens": 900, "answer_tokens": 90, "cost": 0.1},
    )
    report = GenerationReport(
        **{"kind": "engine", "records": 1, "refused": 2, "looked_at": {"pages": 2}, "refusals": {"page": 2}},
        **{"prompts": {"question 1": "a" * 64}, "service": use, "cost": 0.2},
    )
    refused = [RefusedItem(id="toy/2", reason="it is no page", text="Well ...", source="https://a.example/")]
    turns = (Turn("human", change("<image>\nwhat?")), Turn("gpt", change("a toy")))
    sample = Record(change("toy/0"), "toy", (make_image(1),), turns)
    page = render_generation(
        change(report), dataset=change("toy"), samples=[sample], refused=[change(item) for item in refused]
    )
    return {"generation.html": page}


def validation_page(change: Change, folder: Path) -> dict[str, str]:
    turns = tuple(Turn("gpt" if place % 2 else "human", f"text {place}") for place in range(12))
    records = [Record(change(f"toy/{row}"), "toy", (make_image(row),), tuple(map(change, turns))) for row in range(3)]
    shards = write_shards(records, folder, "train")
    columns = {"row": range(3), "n_tokens": [7, 8, 9], "text_chars": [70, 80, 90]}
    columns |= {"id": [change(f"toy/{row}") for row in range(3)], "problem": ["", "", change("broken")]}
    constant = {"dataset": change("toy"), "is_eval": False, "width": 8, "height": 6, "n_images": 1, "n_turns": 12}
    facts, profile = pd.DataFrame(columns).assign(**constant), folder / "profile.parquet"
    pq.write_table(pa.Table.from_pandas(facts, schema=pa.schema([SCHEMA.field(name) for name in facts])), profile)
    report = ValidationReport(
        **{"verdict": "failed", "data_md5": "e" * 32, "suite": "conversations", "suite_sha256": "f" * 64},
        **{"datasets": {"toy": 3}, "eval_datasets": (), "rows": 3, "quarantined": 1, "contaminated_images": 0},
        expectations=tuple(
            ExpectationOutcome(
                **{"name": "usable", "severity": severity, "success": success, "unexpected_count": int(not success)},
                **{"unexpected_percent": 3.0, "examples": ("toy/1",), "explanation": "all can be used"},
            )
            for severity, success in (("critical", False), ("warning", False), ("info", True))
        ),
    )
    report = change(report)
    entry = SimpleNamespace(images=3, licence=change("CC0-1.0"), source=change("made for a test"))
    snapshot = SimpleNamespace(dataset=lambda _: entry, shards=lambda _: shards)
    html = render_validation(report, profile=profile, snapshot=snapshot)  # type: ignore[arg-type]
    return {"validation.html": html, "validation.md": report.as_markdown()}


def curation_page(change: Change, folder: Path) -> dict[str, str]:
    records = [
        Record(f"toy/{row}", "toy", (make_image(row),), (Turn("human", "q"), Turn("gpt", "a"))) for row in (0, 1)
    ]
    shards = write_shards([change(record) for record in records], folder, "train")
    manifest = SimpleNamespace(datasets={change("toy"): 0})
    snapshot = SimpleNamespace(manifest=manifest, shard_paths=lambda _: shards, on_demand=lambda _: None)
    source = CuratedSource(
        name="toy", category="General", prompt="short", samples=9, fit=6, drawn=4, left_out={"cap": 2}
    )
    report = CurationReport(
        recipe=CurationRecipe(
            name="toy",
            description="words",
            cap=4,
            ratio={"General": 1},
            sources={"x": SourceSpec()},
            noun_phrases=NounPhraseSpec(sources=("toy",)),
        ),
        **{"recipe_digest": "a" * 64, "drawn_digest": "b" * 64, "samples": 9, "drawn": 4, "reasons": {"cap": 2}},
        inputs=(CuratedInput(md5="c" * 32, datasets={"toy": 9}),),
        sources=(source, source),
        answers_before=AnswerMachine(answers=9, one_word=6),
        answers_after=AnswerMachine(answers=4, one_word=1),
        noun_phrases=(7, 3),
        distributions={"pairs": Distribution(ends=(1, 2), before=(0, 5, 4), after=(0, 2, 2))},
        examples=tuple(
            CuratedExample(dataset="toy", row=row, id=f"toy/{row}", source="toy", reason=reason, detail="because")
            for row, reason in enumerate(("drawn", "cap"))
        ),
    )
    return {"curation.html": render_curation(change(report), snapshots=[snapshot])}  # type: ignore[list-item]


def run_pages(change: Change) -> dict[str, str]:
    error = ErrorReport(
        **{
            "step": "sft",
            "error": "RecordError",
            "found": "a pear",
            "needed": "an apple",
            "do": "Buy.",
            "retry": False,
        },
        user_error=True,
    )
    problem = Problem(subject="data", found="none", needed="some", do="Fetch it.")
    pages = {}
    for problems in ((), (problem,)):
        notice = change(
            RunNotice(
                **{"text": "it failed", "pipeline": "train", "subject": "tiny", "run_id": "r1", "state": "failed"},
                steps=[NoticeStep(name="sft", state="failed", seconds=1.5, figure="loss 3", link="https://m/1")],
                error=error.model_copy(update={"problems": problems}),
                links={"run": "https://k/1"},
            )
        )
        notice = notice.model_copy(update={"links": {"run": change("https://k/1")}})
        facts = [(change("result"), change("failed"))]
        pages = {name: pages.get(name, "") + render_notice(name, notice, facts) for name in ("run.html", "run.md")}
    return pages


def status_page(change: Change) -> dict[str, str]:
    def moment(second: int) -> datetime:
        return datetime(2026, 11, 28, 1, 0, second, tzinfo=UTC)

    reason = Reason(change("out of memory"), needed=change("more"), do=change("Raise it."))
    attempts = [Attempt(change("pod"), "failed", moment(number), moment(number + 5), reason) for number in (5, 15)]
    steps = [
        StepStatus("a", change("sft"), "sft", "failed", attempts, moment(0), moment(20), reason),
        StepStatus("b", change("evaluate the bundle"), "evaluate", "waiting", (), moment(20), None, reason),
        StepStatus("c", change("gate"), "gate", "not started"),
    ]
    run = V2beta1Run(run_id=change("r1"), display_name=change("nightly"), state="FAILED")
    report = ErrorReport(
        step="sft",
        error="OutOfMemory",
        found=change("out of memory"),
        needed=change("more"),
        do=change("Raise it."),
        retry=False,
        user_error=True,
    )
    failure = Failure(change("sft"), report, [change("the last line")])
    status = RunStatus(run, steps, change("Argo's word"))
    return {"status.html": render_status(status, [failure], ui="https://k", now=moment(40))}


def history_page(change: Change) -> dict[str, str]:
    moves: list[tuple[Any, ...]] = [
        ("adopt", None, {"champion": 1}, 0),
        ("promote", 2, {"champion": 2, "previous": 1}, 5),
        ("outside", None, {"champion": 1, "previous": 1}, 20),
        ("rollback", 2, {"champion": 2, "previous": 1}, 21),
    ]
    records = tuple(
        MoveRecord(
            number=number,
            action=action,
            version=version,
            moves={change("champion"): (None, version)},
            aliases=aliases,
            by=Identity(name=change("ada"), source="mlflow"),
            at=f"2026-11-{day + 1:02}T10:00:00.000+00:00",
            reason=change("better on charts") if version else "",
            gate_digest=change("0" * 64),
            client=change("manyeyes 1"),
            code="unknown",
            previous="",
            request=str(number),
        )
        for number, (action, version, aliases, day) in enumerate(moves, 1)
    )
    history = History(change("tiny"), "run", records, "", (change("record 9 is missing"),))
    scores = {version: {change("easy-vqa"): change("94.40")} for version in (1, 2)}
    return {"history.html": render_history(history, scores, now=datetime(2026, 11, 28, tzinfo=UTC))}


def step_pages(change: Change) -> dict[str, str]:
    texts = [[Text("a", "b", (1,), "good"), Text("c", link="https://m/1")], [Text("code", kind="code"), "d"]]
    plot = scatter(
        [Point(1, 2, "one", "first", "on"), Point(3, -4, "two", "second", "llava", "●")], x_label="x", y_label="y"
    )
    sections = {
        "": facts_table([("name", "value"), ("digest", "d" * 64)]),
        "Table": Table(("h", "i"), texts, stacked=True, code=(1,)),
        "Curve": draw_curves([Curve("loss", [(0, 1), (1, 2)])], x_label="step", y_label="loss"),
        "Points": plot,
        "Bars": draw_bars([1, 2], titles=["one", "two"], below=("low", "middle", "high")),
    }
    # A kind is a name of the stylesheet and never a text.
    kept = {
        "good",
        "code",
        "on",
        "llava",
        "●",
        "axis",
        "leader",
        "axis dashed",
        "tick",
        "name",
        "end",
        "middle",
        "start",
    }

    def careful(value: Any) -> Any:
        if isinstance(value, str):
            return value if value in kept else change(value)
        if isinstance(value, (Table, Text)) or type(value).__name__ == "Drawing":
            return dataclasses.replace(
                value, **{f.name: careful(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(careful, value))
        return type(value)(map(careful, value)) if isinstance(value, (list, tuple)) else value

    changed = {change(name): careful(part) for name, part in sections.items()}
    return {"step.html": step_page(change("Title"), change("sentence"), changed)}


def make_trials() -> tuple[dict[str, Trial], dict[str, Difference]]:
    card, _, _ = make_evaluation(["gqa", "pope"])
    trials = {
        name: Trial(
            variant=Variant(encoders=tuple(name.split("+"))),
            recipe="{}",
            recipe_digest="d" * 64,
            encoders=tuple(name.split("+")),
            stages=(TrialStage(stage="prealign", encoder="clip", seconds=3.0, final_loss=0.5, checkpoint_digest="e"),),
            scorecard=card,
            mean=40.0 + place,
            mean_ci95=(38.0, 44.0),
            parameters=2_000_000,
            visual_tokens=16,
            flops_per_sample={"sft": 3.2e9},
            train_seconds=120.0,
            evaluate_seconds=3.0,
        )
        for place, name in enumerate(("clip", "clip+sam", "clip+convnext"))
    }
    differences = {name: Difference(1.5, (0.5, 2.5), {}) for name in list(trials)[1:]}
    return trials, differences


def search_pages(change: Change) -> dict[str, str]:
    trials, differences = make_trials()
    rounds = (
        SearchRound(number=0, candidates=("clip",), chosen="clip", gain=None, gain_ci95=None),
        SearchRound(number=1, candidates=("clip+sam",), chosen="clip+sam", gain=1.5, gain_ci95=(0.5, 2.5)),
        SearchRound(number=2, candidates=("clip+convnext",), chosen=None, gain=0.0, gain_ci95=(-1.0, 1.0)),
    )
    search = Search(
        recipe="tiny",
        pool=("clip", "sam"),
        start=("clip",),
        max_rounds=2,
        min_gain=0.1,
        rounds=rounds,
        ended="nothing gained",
    )
    given = [change(search), {change(key): change(trial) for key, trial in trials.items()}]
    given.append({change(key): gained for key, gained in differences.items()})
    return {"search.html": search_html(*given, seed=0), "search.md": search_markdown(*given)}


def ablation_page(change: Change) -> dict[str, str]:
    trials, differences = make_trials()
    rows = [
        Row(change(name), change(trial), differences.get(name), wins=place == 1)
        for place, (name, trial) in enumerate(trials.items())
    ]
    return {"ablation.html": comparison_html(change("tiny"), rows)}


CASES: list[Callable[..., dict[str, str]]] = [
    *(report_pages, compare_pages, correlation_page, reliance_pages, gate_pages, contamination_page, validation_page),
    import_page,
    generation_page,
    curation_page,
    *(run_pages, status_page, history_page, step_pages, search_pages, ablation_page),
]
PARTS = {"base.html", "parts.html", "charts.html", "trials.html"}


def render_all(change: Change, folder: Path) -> dict[str, str]:
    folder.mkdir()
    return {
        name: text
        for case in CASES
        for name, text in (case(change, folder) if case in (validation_page, curation_page) else case(change)).items()
    }
