"""Comparing folders of ``manyeyes score``: anyone's answers, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.compare import ModelComparison, compare_results, read_results
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.score import ScoreReport, score_predictions
from manyeyes.evaluation.statistics.significance import compare_scores
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors

IMAGES = 30


def mme_references() -> list[dict[str, Any]]:
    """Two questions an image."""
    return [
        {
            "id": f"{image}/{number}",
            "question_id": f"count/{image}.png",
            "question": "Is it? Please answer yes or no.",
            "answer": ("Yes", "No")[number],
            "category": "count",
        }
        for image in range(IMAGES)
        for number in range(2)
    ]


def answers(wrong: range) -> list[dict[str, str]]:
    """Right but for the images ``wrong``, of whose questions the first is answered wrongly."""
    return [
        {"id": f"{image}/{number}", "prediction": "no" if image in wrong else ("yes", "no")[number]}
        for image in range(IMAGES)
        for number in range(2)
    ]


def scored(folder: Path, wrong: range, references: list[dict[str, Any]] | None = None) -> ScoreReport:
    return score_predictions("mme", references or mme_references(), answers(wrong), out=folder)


def test_folders_of_score_are_compared_by_the_benchmarks_own_figure(tmp_path: Path) -> None:
    first, second = scored(tmp_path / "a", range(12)), scored(tmp_path / "b", range(3))
    ours, theirs = read_results(tmp_path / "a"), read_results(tmp_path / "b")
    comparison = compare_results(ours, theirs)
    (compared,) = comparison.benchmarks.values()
    assert (compared.first, compared.second) == (first.score, second.score) == (80 + 60, 95 + 90)
    assert compared.first_ci95 == first.ci95
    assert (compared.n, compared.clusters, compared.only_second, compared.only_first) == (60, 30, 9, 0)
    before, after = ([outcome.graded for outcome in side.items.of("mme")] for side in (ours, theirs))
    test = compare_scores(BENCHMARKS["mme"], before, after, "official")
    assert compared.ci95 == pytest.approx((test.low, test.high), abs=1e-3)
    assert compared.verdict == "better"
    assert (comparison.first.kind, comparison.first.recipe, comparison.data_md5) == ("answers", "", "")
    assert comparison.first.digest != comparison.second.digest


def test_the_command_compares_them_and_shows_both_answers(tmp_path: Path) -> None:
    scored(tmp_path / "a", range(12))
    scored(tmp_path / "b", range(3))
    out = tmp_path / "out"
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "The second is better: +45.00 points of the benchmark's own on 60 questions" in result.stdout
    assert "no pictures" not in result.stderr
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "Is it?" in page
    assert "no ✗" in page
    written = ModelComparison.model_validate_json((out / "compare.json").read_bytes())
    assert list(written.benchmarks) == ["mme"]


def test_the_order_of_references_and_their_images_change_nothing(tmp_path: Path) -> None:
    scored(tmp_path / "a", range(4))
    with_images = [row | {"image": {"bytes": None, "path": "x.png"}, "note": 1} for row in mme_references()[::-1]]
    scored(tmp_path / "b", range(4), with_images)
    (compared,) = compare_results(read_results(tmp_path / "a"), read_results(tmp_path / "b")).benchmarks.values()
    assert (compared.difference, compared.p) == (0, 1)


def test_other_references_or_another_variant_are_not_compared(tmp_path: Path) -> None:
    scored(tmp_path / "a", range(4))
    other = [row | {"question": "Another?"} if row["id"] == "7/0" else row for row in mme_references()]
    scored(tmp_path / "b", range(4), other)
    with pytest.raises(EvaluationError, match=r"mme: other questions \(60 of 60; 60 of 60\)"):
        compare_results(read_results(tmp_path / "a"), read_results(tmp_path / "b"))
    score_predictions("mme", mme_references(), answers(range(4)), variant="lmms", out=tmp_path / "c")
    with pytest.raises(EvaluationError, match="scored as official and as lmms"):
        compare_results(read_results(tmp_path / "a"), read_results(tmp_path / "c"))


def test_scored_answers_and_an_evaluation_are_not_compared(tmp_path: Path) -> None:
    evaluate(
        RuleAnswerer(rule_with_errors(4)),
        make_recipe(),
        snapshot=make_snapshot(tmp_path / "snapshot", images=4),
        out_dir=tmp_path / "evaluation",
        code_digest="c",
        model_digest="m",
    )
    scored(tmp_path / "a", range(4))
    with pytest.raises(EvaluationError, match="the other of an evaluation"):
        compare_results(read_results(tmp_path / "evaluation"), read_results(tmp_path / "a"))


def test_a_folder_whose_files_do_not_belong_together_is_refused(tmp_path: Path) -> None:
    scored(tmp_path / "a", range(4))
    items = tmp_path / "a" / "items.jsonl"
    lines = items.read_text(encoding="utf-8").splitlines()
    items.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"59 items in items.jsonl and 60 in score.json"):
        read_results(tmp_path / "a")
    shortened = {name: value for name, value in json.loads(lines[0]).items() if name != "facets"}
    items.write_text("\n".join([json.dumps(shortened), *lines[1:]]) + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="lacks 'facets' of an item"):
        read_results(tmp_path / "a")
    (tmp_path / "a" / "score.json").unlink()
    with pytest.raises(EvaluationError, match="what `manyeyes score` writes"):
        read_results(tmp_path / "a")


def test_a_reference_without_what_only_a_page_shows_is_still_scored(tmp_path: Path) -> None:
    bare = [{name: value for name, value in row.items() if name != "question"} for row in mme_references()]
    scored(tmp_path / "a", range(2), bare)
    assert {outcome.question for outcome in read_results(tmp_path / "a").items.outcomes} == {""}
