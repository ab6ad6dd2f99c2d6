from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.compare import render_correlation
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.statistics.correlation import correlate, read_scores
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors


def _four_abilities(models: int = 40) -> dict[str, dict[str, float]]:
    """Four abilities with three benchmarks each, in turn, so that neighbours belong to different ones."""
    generator = np.random.default_rng(11)
    abilities = generator.normal(size=(models, 4))
    scores = {
        f"{'abcd'[place % 4]}{place // 4}": 50 + 10 * abilities[:, place % 4] + generator.normal(0, 3, models)
        for place in range(12)
    }
    return {f"model {row}": {name: float(values[row]) for name, values in scores.items()} for row in range(models)}


def test_benchmarks_of_one_ability_form_a_group() -> None:
    found = correlate(_four_abilities())
    assert found.groups == {f"{letter}{number}": "abcd".index(letter) for letter in "abcd" for number in range(3)}
    assert list(found.benchmarks) == list(found.groups)
    matrix = np.array(found.correlation)
    np.testing.assert_allclose(matrix, matrix.T)
    assert (np.diag(matrix) == 1).all()
    assert matrix[0, 1] > 0.8 > 0.5 > abs(matrix[0, 3])


def test_correlation_equals_the_hand_computed_one() -> None:
    # x - mean: -1, 0, 1; y - mean: -1, -1, 2 (halved: the same): r = 3 / sqrt(2 * 6).
    found = correlate({"m": {"x": 1, "y": 3}, "n": {"x": 2, "y": 3}, "o": {"x": 3, "y": 6}}, groups=1)
    r = 3 / 12**0.5
    assert found.correlation == ((pytest.approx(1), pytest.approx(r)), (pytest.approx(r), pytest.approx(1)))
    # Components of [[1, r], [r, 1]]: 1 + r along (1, 1), 1 - r along (1, -1).
    assert found.explained == pytest.approx(((1 + r) / 2, (1 - r) / 2))
    for first, second in found.loadings.values():
        assert first == pytest.approx(((1 + r) / 2) ** 0.5)
        assert abs(second) == pytest.approx(((1 - r) / 2) ** 0.5)


def test_a_missing_score_leaves_the_others_in() -> None:
    scores = _four_abilities()
    whole = correlate(scores)
    del scores["model 1"]["a0"]
    part = correlate(scores)
    assert len(part.models_in_components) == 39
    places = [whole.benchmarks.index(name) for name in ("b0", "c1")]
    assert part.correlation[places[0]][places[1]] == whole.correlation[places[0]][places[1]]
    assert part.correlation[0][1] != whole.correlation[0][1]
    few = {model: {**row, "rare": 1.0 * place} for place, (model, row) in enumerate(scores.items())}
    for model in list(few)[4:]:
        few[model].pop("a1")
    assert len(correlate(few).models_in_components) == 3
    del few["model 2"]["a0"], few["model 3"]["rare"], few["model 4"]["rare"]
    with pytest.raises(EvaluationError, match="1 of 40 models"):
        correlate(few)


def test_tables_come_from_csv_json_and_scorecards(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("model,easy-vqa,gqa\nllava,60,62.5\neagle,,64\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"cambrian": {"gqa": 65, "easy-vqa": None}}), encoding="utf-8")
    evaluate(
        RuleAnswerer(rule_with_errors(4, [0])),
        make_recipe(),
        snapshot=make_snapshot(tmp_path / "data", images=4),
        out_dir=tmp_path / "ours" / "scorecard",
        code_digest="c",
        model_digest="m",
    )
    scores = read_scores([tmp_path / "a.csv", tmp_path / "b.json", tmp_path / "ours"])
    assert scores == {
        "llava": {"easy-vqa": 60, "gqa": 62.5},
        "eagle": {"gqa": 64},
        "cambrian": {"gqa": 65},
        "ours": {"easy-vqa": 75},
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "model,gqa\nllava,high\n", "could not convert"),
        ("t.csv", "model,gqa\nllava,1,2\n", "3 cells for 2 columns"),
        ("t.csv", "model,gqa\nllava,nan\n", "'nan' is no score"),
        ("t.json", "[1]", "no object of objects"),
        ("t.json", "{", "no table of scores"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message):
        read_scores([tmp_path / name])


def test_too_little_is_refused() -> None:
    two = {"m": {"x": 1.0, "y": 2.0}, "n": {"x": 2.0, "y": 1.0}}
    with pytest.raises(EvaluationError, match="2 models and 2 benchmarks"):
        correlate(two)
    with pytest.raises(EvaluationError, match="2 of 3 models have every benchmark"):
        correlate({**two, "o": {"x": 3.0}})
    with pytest.raises(EvaluationError, match="all models score 1 on y"):
        correlate({model: {"x": float(place), "y": 1.0} for place, model in enumerate("mno")})


def test_a_model_that_is_there_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("model,gqa\nllava,60\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("model,gqa\nllava,61\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match='"llava" is there twice'):
        read_scores([tmp_path / "a.csv", tmp_path / "b.csv"])


def test_the_command_draws_every_benchmark_once_and_no_label_on_another(tmp_path: Path) -> None:
    scores = _four_abilities()
    names = list(scores["model 0"])
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", *names])
        writer.writerows([model, *row.values()] for model, row in scores.items())
    arguments = ["correlate", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "group 1: a0, a1, a2\n" in result.stdout
    html = (tmp_path / "out" / "correlation.html").read_text(encoding="utf-8")
    assert html == render_correlation(correlate(read_scores([tmp_path / "t.csv"])))
    labels = re.findall(r'<text class="name" x="([\d.-]+)%" y="([\d.-]+)"[^>]*>([a-d]\d)</text>', html)
    assert sorted(name for _, _, name in labels) == sorted(names)
    # Of a field that is 640 pixels wide, or wider.
    places = [(6.4 * float(x), float(y)) for x, y, _ in labels]
    for index, (x, y) in enumerate(places):
        assert all(abs(x - other_x) > 13 or abs(y - other_y) >= 12.9 for other_x, other_y in places[:index])
    assert not re.search(r"<script|https?://|<link", html)
