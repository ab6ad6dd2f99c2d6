from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.score import ScoreReport, read_predictions, score_predictions

GQA = [
    {"id": str(number), "imageId": f"n{number // 2}", "question": f"question {number}?", "answer": "yes"}
    for number in range(4)
]


def answers(**by_id: str) -> list[dict[str, Any]]:
    return [{"id": name.removeprefix("_"), "prediction": text} for name, text in by_id.items()]


def test_what_is_missing_is_wrong_and_everything_odd_is_counted() -> None:
    predictions = [*answers(_0="yes", _1=" ", _2="yes", _9="yes"), {"id": "2", "prediction": "no"}]
    report = score_predictions("gqa", GQA, predictions)
    assert (report.n, report.score) == (4, 50)
    assert (report.missing, report.missing_ids) == (1, ["3"])
    assert (report.unexpected, report.unexpected_ids) == (1, ["9"])
    assert (report.duplicates, report.duplicate_ids) == (1, ["2"])
    assert (report.empty, report.empty_ids) == (1, ["1"])
    assert (report.parse_failures, report.parse_failure_ids) == (1, ["1"])
    assert (report.benchmark, report.variant, report.unit, report.clusters) == ("gqa", "cambrian", "percent", 2)


def test_the_order_of_predictions_does_not_matter_and_numbers_are_ids_too() -> None:
    numbered = [{"id": number, "prediction": "yes"} for number in (3, 1, 0, 2)]
    assert score_predictions("gqa", GQA, numbered).score == 100


def test_nothing_predicted_is_all_wrong() -> None:
    report = score_predictions("gqa", GQA, [])
    assert (report.score, report.missing, report.parse_failures) == (0, 4, 0)


def test_only_the_first_twenty_ids_are_listed() -> None:
    rows = [{**GQA[0], "id": str(number)} for number in range(50)]
    report = score_predictions("gqa", rows, [])
    assert (report.missing, len(report.missing_ids)) == (50, 20)


def test_the_per_item_file_has_one_line_an_item(tmp_path: Path) -> None:
    report = score_predictions("gqa", GQA, answers(_0="yes", _1="no"), out=tmp_path)
    lines = [json.loads(line) for line in Path(report.per_item).read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["score"], line["missing"]) for line in lines] == [
        ("0", 1, False),
        ("1", 0, False),
        ("2", 0, True),
        ("3", 0, True),
    ]
    assert sum(line["score"] for line in lines) * 25 == report.score


def test_a_missing_column_is_named_with_its_nearest() -> None:
    row = {"id": "1", "imageId": "n1", "question": "is it?", "answers": "yes"}
    with pytest.raises(EvaluationError, match=r'gqa references, row 1 has no column "answer".*Did you mean "answers"'):
        score_predictions("gqa", [row], answers(_1="yes"))


def test_a_column_of_the_wrong_type_is_named() -> None:
    row = {"id": "1", "question_id": 1, "image_id": "a", "question": "is it?", "answers": "yes", "ocr_tokens": []}
    with pytest.raises(EvaluationError, match=r'"answers" holds str \'yes\'.*list of texts'):
        score_predictions("textvqa", [row], answers(_1="yes"))


def test_references_without_the_image_column_are_scored_with_each_item_as_its_own_cluster() -> None:
    rows = [{name: value for name, value in row.items() if name != "imageId"} for row in GQA]
    assert score_predictions("gqa", rows, answers(_0="yes")).clusters == 4


def test_equal_references_of_one_id_count_once_and_differing_ones_are_refused() -> None:
    report = score_predictions("gqa", [*GQA, GQA[0]], answers(_0="yes"))
    assert (report.n, report.duplicates, report.score) == (4, 1, 25)
    with pytest.raises(EvaluationError, match='row 5: a second "0", which differs'):
        score_predictions("gqa", [*GQA, {**GQA[0], "answer": "no"}], [])


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ({"id": "0"}, 'no "prediction"'),
        ({"prediction": "yes"}, 'no "id"'),
        ({"id": "0", "prediction": 7}, '"prediction" is int'),
    ],
)
def test_a_prediction_that_is_none_is_refused(prediction: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score_predictions("gqa", GQA, [prediction])


def test_no_references_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no references"):
        score_predictions("gqa", [], answers(_0="yes"))


def test_an_unknown_variant_says_what_there_is() -> None:
    with pytest.raises(EvaluationError, match="docvqa is scored as official, lmms, vlmevalkit"):
        score_predictions("docvqa", [{"id": "1"}], [], variant="cambrian")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_command_prints_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    references = write_lines(tmp_path / "r.jsonl", GQA)
    predictions = write_lines(tmp_path / "p.jsonl", answers(_0="yes", _1="Yes", _2="no"))
    command = ["score", "gqa", "--references", references, "--predictions", predictions]
    result = CliRunner().invoke(cli, [*command, "--variant", "official", "--json"])
    assert result.exit_code == 0, result.output
    report = ScoreReport.model_validate_json(result.output)
    assert (report.score, report.variant, report.missing) == (25, "official", 1)
    assert len((tmp_path / report.per_item).read_text(encoding="utf-8").splitlines()) == 4
    text = CliRunner().invoke(cli, command).output
    assert "50.00%" in text
    assert "missing 1" in text


def test_every_sub_score_has_an_interval_in_json_and_in_text(tmp_path: Path) -> None:
    rows = [{"id": str(n), "type": "human_test" if n % 2 else "augmented_test", "answer": "7"} for n in range(20)]
    references = write_lines(tmp_path / "r.jsonl", rows)
    predictions = write_lines(
        tmp_path / "p.jsonl", [{"id": str(n), "prediction": "7" if n % 4 else "8"} for n in range(20)]
    )
    command = ["score", "chartqa", "--references", references, "--predictions", predictions, "--out", str(tmp_path)]
    report = ScoreReport.model_validate_json(CliRunner().invoke(cli, [*command, "--json"]).output)
    assert report.scores == {"human": 100, "augmented": 50}
    low, high = report.scores_ci95["augmented"]
    assert 10 < low < 50 < high < 90
    assert report.scores_ci95["human"][1] == 100
    assert f"50.00 ({low:.2f} to {high:.2f})" in CliRunner().invoke(cli, command).output


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    references = write_lines(tmp_path / "r.jsonl", GQA)
    (tmp_path / "p.jsonl").write_text('{"id": "0", "prediction": "yes"}\n{"id": \n', encoding="utf-8")
    result = CliRunner().invoke(
        cli, ["score", "gqa", "--references", references, "--predictions", str(tmp_path / "p.jsonl")]
    )
    assert isinstance(result.exception, EvaluationError)
    assert "line 2 is not JSON" in str(result.exception)


def test_scorers_are_told_apart() -> None:
    assert len({row.scorer for row in BENCHMARKS.values()}) == len(BENCHMARKS)
    assert len({row.dataset for row in BENCHMARKS.values()}) == len(BENCHMARKS)


def test_an_image_that_is_only_named_does_not_stop_scoring_and_cannot_be_shown() -> None:
    rows = [{**row, "image": "photo.jpg"} for row in GQA]
    assert score_predictions("gqa", rows, answers(_0="yes")).score == 25
    with pytest.raises(EvaluationError, match="does not hold its bytes"):
        BENCHMARKS["gqa"].images(rows[0])
    with pytest.raises(EvaluationError, match="does not hold its bytes"):
        BENCHMARKS["gqa"].images({"image": {"bytes": None, "path": "photo.jpg"}})


def test_a_predictions_file_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "0", "prediction": "yes\u2028"}\n\n', encoding="utf-8-sig")
    assert read_predictions(path) == [{"id": "0", "prediction": "yes\u2028"}]
