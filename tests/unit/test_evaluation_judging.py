"""Benchmarks that a judge scores: what it is asked, how its verdicts are read, and what happens without one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS, Graded, Row
from manyeyes.evaluation.benchmarks.llava_bench import read_marks
from manyeyes.evaluation.benchmarks.mm_vet import read_correctness
from manyeyes.evaluation.judging.judge import Judge, JudgeError
from manyeyes.evaluation.judging.scoring import JUDGINGS, judge_items, judge_predictions, score_ensemble
from manyeyes.evaluation.score import score_predictions
from manyeyes.recipe.recipe import JudgeSpec
from tests.judge_server import Say, Trouble, in_turn, judge_server

COCO = [
    {
        "id": f"{number}",
        "question_id": number,
        "question": f"Question {number}?",
        "image_id": f"image {number // 3}",
        "category": ("conv", "detail", "complex")[number % 3],
        "caption": ["A cat sits.", "It is grey."],
        "answer": f"Reference {number}.",
    }
    for number in range(6)
]
WILD = {
    "id": "0",
    "question_id": 0,
    "question": "What is it?",
    "image_id": "001",
    "category": "conv",
    "caption": "A volcano.",
    "gpt_answer": "Diamond Head.",
}
MM_VET = [
    {"id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5", "capability": "ocr,math"},
    {"id": "v1_1", "question": "Who is it?", "answer": "A<OR>B", "capability": "know,rec"},
    {"id": "v1_2", "question": "What does it say?", "answer": "stop", "capability": "ocr"},
]
SCIENCE = [
    {
        "id": f"{number}",
        "question": f"Question {number}?",
        "choices": ["red", "green", "blue"],
        "answer": 0,
        "hint": "Look.",
        "subject": "natural science",
        "grade": "grade4",
    }
    for number in range(5)
]
MATHVISTA = {
    "id": "1",
    "pid": "1",
    "question": "How many?",
    "query": "Hint: answer with an integer.\nQuestion: How many?",
    "choices": None,
    "precision": None,
    "answer": "4",
    "question_type": "free_form",
    "answer_type": "integer",
    "image": "images/1.jpg",
    "metadata": {"task": "counting", "skills": ["arithmetic"]},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MANYEYES_JUDGE_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


def make_judge(endpoint: str, **changes: Any) -> Judge:
    return Judge(JudgeSpec(endpoint=endpoint, model="judge", **changes), wait=lambda _: None)


def answers(references: Sequence[Mapping[str, Any]], text: str = "An answer.") -> list[dict[str, str]]:
    return [{"id": str(row["id"]), "prediction": text} for row in references]


def by_question(verdicts: Mapping[str, str | Trouble]) -> Say:
    """Answers a question by the first of these texts that occurs in it."""

    def say(body: dict[str, Any], before: int) -> str | Trouble:
        text = body["messages"][-1]["content"].split("Correctness\n---")[-1]
        return next(verdict for part, verdict in verdicts.items() if part in text)

    return say


# --- LLaVA-Bench ---------------------------------------------------------------------------------------------------


def test_llava_bench_asks_in_llavas_structure_and_divides_mean_by_mean() -> None:
    marks = {f"Question {number}?": f"{8 + number % 3} {4 + number}\nBecause." for number in range(6)}
    with judge_server(by_question(marks)) as server:
        report = judge_predictions("llava-bench-coco", COCO, answers(COCO), make_judge(server.endpoint))
    first = next(body for body in server.bodies if "Question 0?" in body["messages"][1]["content"])
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    text = first["messages"][1]["content"]
    assert text.startswith(
        "[Context]\nA cat sits.\nIt is grey.\n\n[Question]\nQuestion 0?\n\n"
        "[Assistant 1]\nReference 0.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nAn answer.\n\n[End of Assistant 2]\n\n[System]\n"
    )
    assert (first["temperature"], first["max_tokens"]) == (0.2, 1024)
    # Reference: 8 9 10 8 9 10. Model: 4 5 6 7 8 9.
    assert report.score == pytest.approx(100 * 39 / 54)
    assert report.scored is not None
    assert report.scored.scores == pytest.approx(
        {
            "conv": 100 * 11 / 16,
            "detail": 100 * 13 / 18,
            "complex": 100 * 15 / 20,
            "model_mark": 6.5,
            "reference_mark": 9.0,
        }
    )
    assert (report.scored.clusters, report.scored.unit, report.judged) == (2, "relative", 6)
    assert report.judge.requests == 6


def test_model_that_beats_the_reference_is_above_100() -> None:
    with judge_server(in_turn("5 10")) as server:
        report = judge_predictions("llava-bench-coco", COCO, answers(COCO), make_judge(server.endpoint))
    assert report.scored is not None
    assert report.score == 200
    low, high = report.scored.ci95
    assert low <= 200 <= high


def test_wild_has_one_caption_and_gpts_answer() -> None:
    with judge_server(in_turn("10 5")) as server:
        report = judge_predictions("llava-bench-wild", [WILD], answers([WILD]), make_judge(server.endpoint))
    text = server.bodies[0]["messages"][1]["content"]
    assert "[Context]\nA volcano.\n\n" in text
    assert "[Assistant 1]\nDiamond Head.\n\n" in text
    assert report.score == 50


@pytest.mark.parametrize(
    ("verdict", "official", "lmms"),
    [
        ("8 7", (8, 7), (8, 7)),
        ("8,7\nBecause", (8, 7), (8, 7)),
        ("8.5 7", (8.5, 7), (8.5, 7)),
        ("8, 7", None, (8, 7)),
        ("Assistant 1: 8, Assistant 2: 7", None, (1, 8)),
        ("8 7 9", None, (8, 7)),
        ("8 7 ", None, (8, 7)),
        ("\n8 7", None, None),
        ("0 7", None, None),
        ("11 7", None, None),
        ("8 0", (8, 0), (8, 0)),
        ("nan 7", None, None),
        ("-1 -1", None, (1, 1)),
        ("", None, None),
    ],
)
def test_marks_are_read_from_the_first_line(
    verdict: str, official: tuple[float, float] | None, lmms: tuple[float, float] | None
) -> None:
    assert read_marks(verdict, "official") == official
    assert read_marks(verdict, "lmms") == lmms


# --- MM-Vet --------------------------------------------------------------------------------------------------------


def test_mm_vet_completes_a_table_and_scores_by_capability() -> None:
    verdicts = {"What is x?": "0.5", "Who is it?": "1.0", "What does it say?": "0.0 because"}
    with judge_server(by_question(verdicts)) as server:
        report = judge_predictions("mm-vet", MM_VET, answers(MM_VET), make_judge(server.endpoint))
    texts = [body["messages"][0]["content"] for body in server.bodies]
    assert any(text.endswith("\nWhat is x? | -1 <AND> -5 | An answer. |") for text in texts)
    assert all("Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n" in text for text in texts)
    assert all(body["temperature"] == 0 for body in server.bodies)
    assert report.scored is not None
    assert report.score == pytest.approx(50)
    assert report.scored.scores == pytest.approx(
        {
            "rec": 100,
            "ocr": 25,
            "know": 100,
            "math": 50,
            "ocr+math": 50,
            "ocr only": 0,
            "rec+know": 100,
        }
    )


@pytest.mark.parametrize(
    ("verdict", "correctness"),
    [
        ("0.7", 0.7),
        (" 1.0 |", 1.0),
        ("0", 0.0),
        ("1.1", None),
        ("-0.1", None),
        ("good", None),
        ("nan", None),
        ("", None),
    ],
)
def test_correctness_is_the_first_word(verdict: str, correctness: float | None) -> None:
    assert read_correctness(verdict) == correctness


# --- without verdicts ----------------------------------------------------------------------------------------------


def test_items_without_verdict_withhold_the_score_and_are_in_no_figure() -> None:
    verdicts: dict[str, str | Trouble] = {"What is x?": "nonsense", "Who is it?": "1.0", "What does it say?": "0.5"}
    with judge_server(by_question(verdicts)) as server:
        report = judge_predictions("mm-vet", MM_VET, answers(MM_VET), make_judge(server.endpoint, readings=2))
        assert (report.score, report.scored, report.judged, report.unjudged) == (None, None, 2, 1)
        assert report.unjudged_reasons == {"v1_0": "2 answers made no sense, the last: 'nonsense'"}
        lenient = make_judge(server.endpoint, readings=1, max_unjudged=0.4)
        partial = judge_predictions("mm-vet", MM_VET, answers(MM_VET), lenient)
    assert partial.score == pytest.approx(75)
    assert partial.scored is not None
    assert (partial.scored.n, partial.unjudged) == (2, 1)


def test_all_verdicts_failing_is_no_score_at_all() -> None:
    with judge_server(in_turn("I cannot judge this.")) as server:
        judge = make_judge(server.endpoint, max_unjudged=0.9)
        report = judge_predictions("llava-bench-coco", COCO, answers(COCO), judge)
    assert (report.score, report.judged, report.unjudged) == (None, 0, 6)


def test_answer_that_needs_no_judge_is_graded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graded: list[str] = []

    def grade(row: Row, prediction: str, variant: str) -> Graded:
        graded.append(prediction)
        return BENCHMARKS["mathvista"].grade(row, prediction, variant)

    monkeypatch.setitem(JUDGINGS, "mathvista", replace(JUDGINGS["mathvista"], ask=lambda *_: None, direct=grade))
    judge = make_judge("http://127.0.0.1:1/v1")
    verdicts = judge_items(BENCHMARKS["mathvista"], [(MATHVISTA, "4"), (MATHVISTA, "5")], judge, variant="official")
    assert [verdict.value.score for verdict in verdicts if verdict.value] == [1.0, 0.0]
    assert graded == ["4", "5"]


def test_judge_that_goes_away_ends_the_run_and_the_next_run_asks_the_rest(tmp_path: Path) -> None:
    def judge(endpoint: str) -> Judge:
        spec = JudgeSpec(endpoint=endpoint, model="judge", attempts=1, concurrency=1)
        return Judge(spec, cache=tmp_path / "cache", wait=lambda _: None)

    away = False

    def say(body: dict[str, Any], before: int) -> str | Trouble:
        return Trouble(status=503) if away and "Question 0?" not in body["messages"][1]["content"] else "10 8"

    with judge_server(say) as server:
        row = BENCHMARKS["llava-bench-coco"]
        judge_items(row, [(COCO[0], "An answer.")], judge(server.endpoint), variant="official")
        away = True
        with pytest.raises(JudgeError, match="in a row"):
            judge_predictions("llava-bench-coco", COCO, answers(COCO), judge(server.endpoint))
        away = False
        report = judge_predictions("llava-bench-coco", COCO, answers(COCO), judge(server.endpoint))
    assert report.score == 80
    assert (report.judge.cached, report.judge.requests) == (1, 5)


def test_missing_prediction_is_judged_empty_and_wrong() -> None:
    with judge_server(in_turn("1.0")) as server:
        report = judge_predictions("mm-vet", MM_VET, answers(MM_VET[:2]), make_judge(server.endpoint))
    assert report.scored is not None
    assert report.score == pytest.approx(200 / 3)
    assert (report.scored.missing, report.scored.missing_ids) == (1, ["v1_2"])


def test_without_a_judge_they_are_refused_by_name() -> None:
    for name in ("llava-bench-coco", "llava-bench-wild", "mm-vet"):
        assert BENCHMARKS[name].judged
        with pytest.raises(EvaluationError, match=f"{name} is judged by a language model"):
            score_predictions(name, MM_VET, answers(MM_VET))
        with pytest.raises(EvaluationError, match=r"a language model that judges it. Score it with: manyeyes judge"):
            BENCHMARKS[name].grade(MM_VET[0], "x", "official")
    assert {name for name, row in BENCHMARKS.items() if row.judged} <= set(JUDGINGS)


def test_benchmark_that_needs_no_judge_says_so() -> None:
    with judge_server(in_turn("1.0")) as server, pytest.raises(EvaluationError, match="manyeyes score easy-vqa"):
        judge_predictions("easy-vqa", [], [], make_judge(server.endpoint))


# --- MathVista -----------------------------------------------------------------------------------------------------


def mathvista(prediction: str, verdict: str, variant: str = "official", **changes: Any) -> tuple[float, int]:
    """The item's score in percent, and how many questions the judge was asked."""
    row = MATHVISTA | changes
    with judge_server(in_turn(verdict)) as server:
        report = judge_predictions(
            "mathvista", [row], answers([row], prediction), make_judge(server.endpoint), variant=variant
        )
    assert report.score is not None
    return report.score, len(server.bodies)


def test_mathvista_asks_only_where_the_response_is_no_answer() -> None:
    assert mathvista("4", "5") == (100, 0)
    assert mathvista("There are 4 in all.", "4") == (100, 1)
    assert mathvista("There are 4 in all.", "5") == (0, 1)
    assert mathvista("4.0", "4.0") == (100, 1)
    options = {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"], "answer": "blue"}
    assert mathvista("blue", "A", **options) == (100, 0)
    assert mathvista("It is the second.", "B", **options) == (100, 1)
    assert mathvista("(B)", "A", **options) == (0, 1)
    # Nothing becomes the nearest option: the first of two that are as near.
    assert mathvista("", "A", **options)[1] == 0


def test_mathvista_of_vlmevalkit_asks_after_its_rules_and_cambrian_never() -> None:
    options = {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"], "answer": "blue"}
    assert mathvista("The answer is B", "A", "vlmevalkit", **options) == (100, 0)
    assert mathvista("Surely the second one.", "B", "vlmevalkit", **options) == (100, 1)
    assert mathvista("There are 4 in all.", "4", "cambrian") == (0, 0)


def test_mathvista_prompt_ends_with_question_and_response() -> None:
    with judge_server(in_turn("4")) as server:
        judge_predictions("mathvista", [MATHVISTA], answers([MATHVISTA], "So 4."), make_judge(server.endpoint))
    text = server.bodies[0]["messages"][0]["content"]
    assert text.endswith("\n\nHow many?\n\nSo 4.\n\nExtracted answer: ")
    assert len(re.findall("Extracted answer: .", text)) == 5


# --- ScienceQA -----------------------------------------------------------------------------------------------------


def science(letters: str) -> list[dict[str, str]]:
    """``A`` names option A; ``-`` names none."""
    return [
        {"id": str(number), "prediction": "I do not know." if letter == "-" else f"The answer is {letter}."}
        for number, letter in enumerate(letters)
    ]


def test_complement_fills_in_where_the_other_model_fails() -> None:
    # The right answer is A throughout.
    report = score_ensemble(SCIENCE, science("ABA-A"), science("AAB--"), scheme="complement")
    assert (report.ours.score, report.other.score) == (60, 40)
    assert report.score == 60  # A A B - A
    assert report.upper_bound == 80
    assert (report.agreed, report.differed, report.only_one, report.neither) == (1, 2, 1, 1)
    assert report.judge is None


def test_judge_decides_where_they_differ_and_is_asked_nothing_else() -> None:
    with judge_server(in_turn("Both are good. The answer is A.")) as server:
        judge = make_judge(server.endpoint)
        report = score_ensemble(SCIENCE, science("ABA-A"), science("AAB--"), scheme="judge", judge=judge)
    assert report.score == 80  # A, A by the judge twice, none, A
    assert report.judge is not None
    assert report.judge.requests == 2
    text = next(
        body["messages"][0]["content"] for body in server.bodies if "Question 1?" in body["messages"][0]["content"]
    )
    assert "Options: (A) red (B) green (C) blue" in text
    assert "[Assistant 1]\nThe answer is A.\n" in text
    assert "[Assistant 2]\nThe answer is B.\n" in text


def test_judge_may_decide_for_neither_and_nonsense_withholds_the_score() -> None:
    with judge_server(in_turn("The answer is C.")) as server:
        judge = make_judge(server.endpoint)
        assert score_ensemble(SCIENCE, science("BAAAA"), science("AAAAA"), scheme="judge", judge=judge).score == 80
    with judge_server(in_turn("Hm.")) as server:
        judge = make_judge(server.endpoint)
        report = score_ensemble(SCIENCE, science("BAAAA"), science("AAAAA"), scheme="judge", judge=judge)
        assert (report.score, report.ensemble, report.unjudged) == (None, None, 1)
        assert list(report.unjudged_reasons) == ["0"]
    with pytest.raises(EvaluationError, match="no judge"):
        score_ensemble(SCIENCE, science("BAAAA"), science("AAAAA"), scheme="judge")


# --- before anybody is asked ---------------------------------------------------------------------------------------

READ = {
    "llava-bench-coco": (COCO, ("question", "image_id", "category", "caption", "answer")),
    "llava-bench-wild": ([WILD], ("question", "image_id", "category", "caption", "gpt_answer")),
    "mm-vet": (MM_VET, ("question", "answer", "capability")),
    "mathvista": ([MATHVISTA], ("question", "answer", "question_type", "answer_type")),
}


@pytest.mark.parametrize(
    ("name", "column"), [(name, column) for name, (_, columns) in READ.items() for column in columns]
)
@pytest.mark.parametrize("value", [None, {"of": "no type"}], ids=["missing", "wrong type"])
def test_a_wrong_column_is_found_before_the_judge_is_asked(name: str, column: str, value: object) -> None:
    rows = [dict(row) for row in READ[name][0]]
    # The last one: the judge would have been asked about all the others.
    if value is None:
        del rows[-1][column]
    else:
        rows[-1][column] = value
    with judge_server(in_turn("5 5")) as server:
        with pytest.raises(EvaluationError, match=column.removeprefix("gpt_")):
            judge_predictions(name, rows, answers(rows, "it is 4 or so"), make_judge(server.endpoint))
        assert server.bodies == []


@pytest.mark.parametrize("column", ["question", "choices", "answer"])
def test_a_wrong_column_is_found_before_two_models_are_judged(column: str) -> None:
    rows = [dict(row) for row in SCIENCE]
    del rows[-1][column]
    with judge_server(in_turn("The answer is A.")) as server:
        judge = make_judge(server.endpoint)
        with pytest.raises(EvaluationError, match=column):
            score_ensemble(rows, science("BAAAA"), science("ABBBB"), scheme="judge", judge=judge)
        assert server.bodies == []


@pytest.mark.parametrize("name", JUDGINGS)
def test_ids_that_match_nothing_are_found_before_the_judge_is_asked(name: str) -> None:
    rows = READ[name][0]
    with judge_server(in_turn("5 5")) as server:
        with pytest.raises(EvaluationError, match=r'none of 1 predictions.*predictions: "other"; references: "'):
            judge_predictions(name, rows, [{"id": "other", "prediction": "x"}], make_judge(server.endpoint))
        other, judge = [{"id": "other", "prediction": "A"}], make_judge(server.endpoint)
        with pytest.raises(EvaluationError, match="none of 1 predictions"):
            score_ensemble(SCIENCE, science("AAAAA"), other, scheme="judge", judge=judge)
        assert server.bodies == []


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    def write(references: Sequence[Mapping[str, Any]], **predictions: Sequence[Mapping[str, Any]]) -> list[str]:
        arguments = []
        for name, rows in {"references": references, **predictions}.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            arguments += [f"--{name}", str(path)]
        return arguments

    return write


def test_command_prints_one_object_and_keeps_answers_and_items(files: Callable[..., list[str]]) -> None:
    arguments = ["judge", "mm-vet", *files(MM_VET, predictions=answers(MM_VET)), "--model", "judge", "--json"]
    with judge_server(in_turn("0.5")) as server:
        for requests in (3, 0):
            result = CliRunner().invoke(cli, [*arguments, "--endpoint", server.endpoint])
            assert result.exit_code == 0, result.output
            report = json.loads(result.stdout)
            assert report["score"] == 50
            assert report["judge"]["requests"] == requests
    items = [json.loads(line) for line in Path(report["scored"]["per_item"]).read_text(encoding="utf-8").splitlines()]
    assert [item["score"] for item in items] == [0.5] * 3


def test_command_in_words(files: Callable[..., list[str]]) -> None:
    arguments = ["judge", "scienceqa", *files(SCIENCE, predictions=science("ABA-A"), other=science("AAB--"))]
    result = CliRunner().invoke(cli, [*arguments, "--scheme", "complement"])
    assert "both, complement: 60.00%" in result.output
    with judge_server(in_turn("A pear")) as server:
        given = ["--endpoint", server.endpoint, "--model", "judge", "--price-in", "1", "--price-out", "1"]
        result = CliRunner().invoke(cli, [*arguments, *given])
        assert "both, judge: no score, 2 items have no verdict" in result.output
        assert "6 unreadable, 600 + 60 tokens, cost 0.0007" in result.output
        mm_vet = ["judge", "mm-vet", *files(MM_VET, predictions=answers(MM_VET))]
        result = CliRunner().invoke(cli, [*mm_vet, *given])
        assert "mm-vet: no score, 3 of 3 items have no verdict" in result.output


@pytest.mark.parametrize(("first", "failed"), [("A pear", 3), ("0.5", 2)])
def test_command_without_a_score_is_an_error_and_prints_what_there_is(
    files: Callable[..., list[str]], first: str, failed: int
) -> None:
    arguments = ["judge", "mm-vet", *files(MM_VET, predictions=answers(MM_VET)), "--model", "judge"]
    with judge_server(by_question({"What is x?": first, "": "A pear"})) as server:
        result = CliRunner().invoke(cli, [*arguments, "--endpoint", server.endpoint, "--json"])
    assert isinstance(result.exception, EvaluationError)
    assert f"{failed} of 3 items have no verdict" in result.exception.found
    report = json.loads(result.stdout)
    assert (report["score"], report["unjudged"], report["judged"]) == (None, failed, 3 - failed)


def test_command_that_may_leave_items_unjudged_gives_a_score_and_counts_them(files: Callable[..., list[str]]) -> None:
    arguments = ["judge", "mm-vet", *files(MM_VET, predictions=answers(MM_VET)), "--model", "judge"]
    arguments += ["--max-unjudged", "0.7"]
    with judge_server(by_question({"What is x?": "0.5", "": "A pear"})) as server:
        result = CliRunner().invoke(cli, [*arguments, "--endpoint", server.endpoint])
    assert result.exit_code == 0, result.output
    assert "2 of 3 items have no verdict, and are in no figure" in result.output


def test_command_warns_of_predictions_that_match_nothing(files: Callable[..., list[str]]) -> None:
    extra = [*answers(MM_VET), {"id": "v1_99", "prediction": "x"}]
    with judge_server(in_turn("0.5")) as server:
        arguments = ["judge", "mm-vet", *files(MM_VET, predictions=extra), "--model", "judge", "--json"]
        result = CliRunner().invoke(cli, [*arguments, "--endpoint", server.endpoint])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["score"] == 50
    assert 'warning: 1 predictions have the id of no reference and are not scored: "v1_99"' in result.stderr
    more = [*science("AAAAA"), {"id": "x", "prediction": "A"}]
    arguments = ["judge", "scienceqa", *files(SCIENCE, predictions=science("AAAAA"), other=more)]
    result = CliRunner().invoke(cli, [*arguments, "--scheme", "complement"])
    assert result.exit_code == 0
    assert "warning: --other: 1 predictions" in result.stderr


def test_scoring_warns_of_ids_that_match_nothing_and_refuses_where_none_matches(
    files: Callable[..., list[str]],
) -> None:
    rows = [{"id": f"{number}", "question": "?", "answer": "A", "imageId": "1"} for number in range(3)]
    some = [{"id": f"{number}", "prediction": "A"} for number in range(2, 9)]
    result = CliRunner().invoke(cli, ["score", "gqa", *files(rows, predictions=some), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["unexpected"] == 6
    warning = 'warning: 6 predictions have the id of no reference and are not scored: "3", "4", "5", ...'
    assert warning in result.stderr
    for none, said in (([{"id": "gqa/1", "prediction": "A"}], "none of 1 predictions"), ([], "holds no prediction")):
        result = CliRunner().invoke(cli, ["score", "gqa", *files(rows, predictions=none)])
        assert isinstance(result.exception, EvaluationError)
        assert said in result.exception.found


def test_command_without_judge_or_with_a_bad_one_says_what_to_give(files: Callable[..., list[str]]) -> None:
    arguments = ["judge", "mm-vet", *files(MM_VET, predictions=answers(MM_VET))]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, EvaluationError)
    assert "--endpoint" in result.exception.do
    result = CliRunner().invoke(cli, [*arguments, "--endpoint", "https://me:secret@a/v1", "--model", "judge"])
    assert isinstance(result.exception, EvaluationError)
    assert "secret" not in str(result.exception)
    assert "--endpoint" in result.exception.found
    other = ["--other", arguments[arguments.index("--predictions") + 1], "--scheme", "complement"]
    result = CliRunner().invoke(cli, [*arguments, *other])
    assert isinstance(result.exception, EvaluationError)
    assert "scienceqa" in str(result.exception)
