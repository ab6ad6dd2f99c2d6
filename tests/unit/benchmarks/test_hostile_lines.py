"""Whatever stands in a file of predictions or references, it is scored, or refused with file, line and column."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.scorer_cases import cases
from manyeyes.cli.main import cli
from manyeyes.errors import EvaluationError, ManyEyesError, StorageError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.score import ScoreReport, read_predictions, read_references, score_predictions
from tests.benchmark_rows import FIXTURES

ROUNDS = 15
SEED = 0
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 10**30, 10**4000, 1.5, float("nan"), float("inf"), -0.0),
    *("", " ", "?", "-1", "nan", "9" * 5000, "\ud83d", "a\udc00b", "\u2028", "\x00", "\u00b2", "\u0663", "\u0130"),
    *(
        "['a', 'b']",
        "[",
        "[1" + "0" * 5000 + "]",
        "(" * 300 + ")" * 300,
        "[" * 3000,
        "{}",
        "\\",
        "(a)",
        "A",
        "yes",
        "x" * 3000,
    ),
    *([], ["a"], ["\ud83d"], [None], [[]], [1], {}, {"answer": None}, {"a": {"b": [1]}}, [{}], [{"answer": 3}]),
    *([{"answer": "\ud83d"}], {"task": 3, "skills": 4}, {"skills": [1, None]}),
)
GQA = {"id": "7", "imageId": "n", "question": "Is it?", "answer": "yes"}
RIGHT = {"id": "7", "prediction": "yes"}


def write(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def score(folder: Path, references: Sequence[object], predictions: Sequence[object], name: str = "gqa") -> ScoreReport:
    """Score two files as the command does."""
    return score_predictions(
        name,
        read_references(write(folder / "R.jsonl", references)),
        read_predictions(write(folder / "P.jsonl", predictions)),
        out=folder / "out",
    )


@pytest.mark.parametrize("name", [name for name, row in BENCHMARKS.items() if not row.judged and row.hub_id])
def test_odd_values_in_any_column_are_scored_or_refused_with_their_place(name: str, tmp_path: Path) -> None:
    draw = random.Random(f"{SEED} {name}")
    items = cases(random_answers=1).get(name) or FIXTURES[name].answered
    rows = [row for place, (row, _) in enumerate(items) if row not in [other for other, _ in items[:place]]]
    row = BENCHMARKS[name]
    scored = 0
    refused: list[str] = []
    for _ in range(ROUNDS):
        references = [{**copy.deepcopy(one), "id": str(number)} for number, one in enumerate(rows)]
        predictions = [{"id": line["id"], "prediction": draw.choice(items)[1]} for line in references]
        # One that stays as it is: where no id fits, the files as a whole are refused.
        references.append({**copy.deepcopy(rows[0]), "id": "whole"})
        predictions.append({"id": "whole", "prediction": "yes"})
        for _ in range(draw.randint(1, 3)):
            lines: list[dict[str, Any]] = references if draw.random() < 0.6 else predictions
            line = draw.choice(lines[:-1])
            column = draw.choice([*line, "id"])
            if draw.random() < 0.1:
                line.pop(column, None)
            else:
                line[column] = draw.choice(ODD)
        try:
            report = score_predictions(
                name,
                read_references(write(tmp_path / "R.jsonl", references)),
                read_predictions(write(tmp_path / "P.jsonl", predictions)),
                variant=draw.choice(row.variants),
                seed=draw.choice((None, 1)),
                out=tmp_path / "out",
            )
        except ManyEyesError as error:
            refused.append(error.found)
        else:
            scored += 1
            assert 0 <= report.score <= row.maximum
            written = (tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
            assert len([json.loads(one) for one in written]) == report.n
            assert ScoreReport.model_validate_json((tmp_path / "out" / "score.json").read_bytes()) == report
    assert scored
    assert refused
    assert [found for found in refused if "R.jsonl, line " not in found and "P.jsonl, line " not in found] == []


def test_half_an_emoji_is_one_character_and_costs_nothing(tmp_path: Path) -> None:
    references = [GQA, {**GQA, "id": "\ud83d", "question": "Half \ude00?", "answer": "no"}]
    (tmp_path / "P.jsonl").write_text(
        '{"id": "7", "prediction": "Yes \\ud83d"}\n{"id": "\\ud83d", "prediction": "no"}\n', encoding="utf-8"
    )
    write(tmp_path / "R.jsonl", references)
    command = ["score", "gqa", "--references", str(tmp_path / "R.jsonl"), "--predictions", str(tmp_path / "P.jsonl")]
    result = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "50.00%" in result.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["prediction"]) for line in lines] == [("7", "Yes \ufffd"), ("\ufffd", "no")]
    # Two halves that belong together are their character.
    whole = score_predictions("gqa", [{**GQA, "answer": "\U0001f600"}], [{"id": "7", "prediction": "\ud83d\ude00"}])
    assert whole.score == 100


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000 + "]" * 100_000, "line 2 is nested too deep"),
        ('{"id": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is nested too deep"),
        (
            '{"id": "7", "prediction": "yes", "more": ' + "[" * 80 + "]" * 80 + "}",
            "line 2 is nested more than 64 levels",
        ),
        ('{"id": ' + "9" * 5000 + ', "prediction": "yes"}', "line 2 is not JSON .*4300 digits"),
        ('{"id": "7", "prediction": "yes"', "line 2 is not JSON"),
        ('["7", "yes"]', "line 2 is no object"),
        ('{"id": "7"}', 'line 2 has no "prediction"'),
        ('{"prediction": "yes"}', 'line 2 has no "id"'),
        ('{"id": null, "prediction": "yes"}', 'line 2: "id" is NoneType'),
        ('{"id": NaN, "prediction": "yes"}', 'line 2: "id" is float'),
        ('{"id": ["7"], "prediction": "yes"}', 'line 2: "id" is list'),
        ('{"id": "7", "prediction": NaN}', 'line 2: "prediction" is float'),
        ('{"id": "7", "prediction": ["yes"]}', 'line 2: "prediction" is list'),
    ],
)
def test_a_faulty_prediction_is_named_by_file_and_line(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "P.jsonl").write_text(json.dumps(RIGHT) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=f"P.jsonl, {said}"):
        score_predictions("gqa", [GQA], read_predictions(tmp_path / "P.jsonl"))


def test_brackets_within_texts_are_no_levels(tmp_path: Path) -> None:
    assert score(tmp_path, [GQA], [{**RIGHT, "why": "[" * 100}]).score == 100


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", ""])
def test_a_byte_order_mark_and_other_line_ends_are_read(encoding: str, end: str, tmp_path: Path) -> None:
    rows = [{"id": "7", "prediction": "yes\u2028"}, {"id": "8\u0085", "prediction": "no"}]
    lines = (end or "\n").join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    (tmp_path / "P.jsonl").write_bytes(lines.encode(encoding))
    assert read_predictions(tmp_path / "P.jsonl") == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"])
def test_another_encoding_is_refused_and_said(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "P.jsonl").write_bytes('{"id": "7", "prediction": "très"}\n'.encode(encoding))
    with pytest.raises(EvaluationError, match=r"P.jsonl.* (cannot be read|is not JSON)"):
        read_predictions(tmp_path / "P.jsonl")


@pytest.mark.parametrize(
    ("name", "column", "value", "said"),
    [
        ("vqav2", "answers", [{"answer_id": 1}], 'column "answers" holds list .*; "answers": list of records with the'),
        ("vqav2", "answers", [{"answer": "red"}, {"answer": 4}], 'column "answers" holds list'),
        ("mmbench", "index", "seven", 'column "index" holds str \'seven\'; "index": whole number, also as text'),
        ("mmbench", "index", "9" * 5000, 'column "index" holds str'),
        ("mmbench", "index", 7.5, 'column "index" holds float'),
        ("ai2d", "answer", "\u00b2", '"answer" is "\u00b2"; an index below 4'),
        ("scienceqa", "answer", 10**30, '"answer" is 1000'),
        ("mmmu", "options", "7", "\"options\" is '7'; a list written as text"),
        ("mmmu", "options", "[" * 500 + "]" * 500, '"options" is .*; a list written as text'),
        ("mmmu", "options", "[]", r'"options" is .\[\]'),
        ("mathvista", "choices", [], '"choices" is empty'),
        ("seed", "answer", "F", '"answer" is .F.; A to D'),
        ("cv-bench", "answer", "(F)", r'"answer" is "\(F\)"; one of A, B, C, D'),
        ("pope", "answer", "perhaps", '"answer" is .perhaps.; yes or no'),
        ("mme", "answer", "perhaps", '"answer" is .perhaps.; yes or no'),
    ],
)
def test_a_faulty_reference_is_named_by_file_line_and_column(
    name: str, column: str, value: object, said: str, tmp_path: Path
) -> None:
    row = {**cases(random_answers=0)[name][0][0], "id": "1"}
    assert score(tmp_path, [row], [{"id": "1", "prediction": "A"}], name).n == 1
    with pytest.raises(EvaluationError, match=f"R.jsonl, line 2: .*{said}"):
        score(tmp_path, [row, {**row, "id": "2", column: value}], [{"id": "1", "prediction": "A"}], name)


def test_a_number_written_as_text_is_an_index(tmp_path: Path) -> None:
    row = {**cases(random_answers=0)["mmbench"][0][0], "id": "1", "index": "1000000"}
    assert score(tmp_path, [row], [{"id": "1", "prediction": "B"}], "mmbench").scores["rows"] == 100


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(StorageError):
            # Nothing was read yet: without a column these would be refused.
            score_predictions("gqa", [{}], [{}], out=out)
