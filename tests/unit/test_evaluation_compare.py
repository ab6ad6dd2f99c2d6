from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from manyeyes.cli.main import cli
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import EvaluationError
from manyeyes.evaluation import compare
from manyeyes.evaluation.compare import ModelComparison, compare_results, read_compared_images, read_results
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.outcomes import read_outcomes, write_outcomes
from manyeyes.evaluation.statistics.intervals import clustered_error
from manyeyes.evaluation.statistics.significance import (
    average_difference,
    compare_scores,
    difference_test,
    holm,
    two_sided,
)
from tests.benchmark_toys import f1, make_graded, make_row
from tests.evaluation_fakes import RuleAnswerer, make_recipe, make_snapshot, rule_with_errors

IMAGES = 24


@pytest.mark.parametrize(
    ("t", "degrees", "expected"),
    # Critical values of Student's t from the usual table; for one and two degrees p is exact.
    [(1, 1, 0.5), (12.7062, 1, 0.05), (4.30265, 2, 0.05), (2.22814, 10, 0.05), (3.16927, 10, 0.01), (1.96, 1e7, 0.05)],
)
def test_two_sided_equals_the_table(t: float, degrees: float, expected: float) -> None:
    assert two_sided(t, degrees) == pytest.approx(expected, rel=1e-4)
    assert two_sided(-t, degrees) == two_sided(t, degrees)


def test_no_difference_has_p_1_and_an_infinite_one_0() -> None:
    assert two_sided(0, 5) == 1
    assert two_sided(float("inf"), 5) == 0


def test_holm_equals_the_hand_computed_one() -> None:
    # Sorted: 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.5 x 1; never below the one before.
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.04, 0.9, 0.8]) == pytest.approx([0.12, 1.0, 1.0])
    assert holm([]) == []


def test_the_test_of_a_mean_equals_the_hand_computed_one() -> None:
    # Three images with two questions each. Differences: (+1, 0), (0, 0), (-1, +1): mean 1/6.
    # Residual sums per image: 1 - 2/6 = 2/3; -1/3; -1/3. Squares: 4/9 + 1/9 + 1/9 = 2/3.
    # Variance: 3/2 * (2/3) / 36 = 1/36, so the error is 1/6, and t is 1 on two degrees: p = 1 - 1 / sqrt(3).
    clusters = list("aabbcc")
    second, first = [1.0, 1, 0, 1, 0, 1], [0.0, 1, 0, 1, 1, 0]
    test = compare_scores(make_row(), make_graded(first, clusters), make_graded(second, clusters), "official")
    reach = 100 * 4.302653 / 6
    assert (test.difference, test.low, test.high) == pytest.approx((100 / 6, 100 / 6 - reach, 100 / 6 + reach))
    assert test.p == pytest.approx(1 - 1 / 3**0.5)
    assert test.detectable == pytest.approx((4.30265 + 1.06066) * 100 / 6, rel=1e-4)


def test_difference_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(21)
    trials, images, size = 1000, 100, 8
    clusters = np.repeat(np.arange(images), size).tolist()
    covered = 0
    for _ in range(trials):
        hard = np.repeat(generator.beta(8, 2, images), size)
        ours = (generator.random(images * size) < hard + 0.02 * (1 - hard)).astype(float)
        apart = ours - (generator.random(images * size) < hard)
        error = 100 * clustered_error(apart, clusters)
        test = difference_test(100 * apart.mean(), error, clusters=images, reach=100.0)
        covered += test.low <= 100 * 0.02 * 0.2 <= test.high
    assert 0.93 <= covered / trials <= 0.97


def test_a_score_that_is_no_mean_is_tested_by_resampling() -> None:
    # The bootstrap's error against the delta method's for F1 = 2h / (2h + w), on the same pairs.
    generator = np.random.default_rng(8)
    clusters, gold = np.repeat(np.arange(150), 4), ["yes", "no"] * 300
    hard = np.repeat(generator.beta(5, 2, 150), 4)
    models = [(generator.random(600) < hard * skill).astype(float) for skill in (0.9, 1.0)]
    graded = [make_graded(model.tolist(), clusters.tolist(), gold=gold) for model in models]
    test = compare_scores(make_row(aggregate=f1), *graded, "official", draws=2000)
    influence = np.zeros(150)
    for sign, scores in zip((-1, 1), models, strict=True):
        hits = np.bincount(clusters, weights=scores * (np.array(gold) == "yes"))
        wrong = np.bincount(clusters, weights=1 - scores)
        total = 2 * hits.sum() + wrong.sum()
        influence += sign * 100 * (2 * hits * wrong.sum() - 2 * hits.sum() * wrong) / total**2
    assert test.error == pytest.approx(np.sqrt(np.square(influence).sum() * 150 / 149), rel=0.06)
    assert test.difference == f1(graded[1], "")["score"] - f1(graded[0], "")["score"]
    assert (test.p < 0.05) == (test.low > 0 or test.high < 0)


def test_two_equal_models_are_called_different_one_time_in_twenty() -> None:
    generator = np.random.default_rng(9)
    clusters = np.repeat(np.arange(60), 5).tolist()
    alarms = 0
    for _ in range(600):
        hard = np.repeat(generator.beta(4, 2, 60), 5)
        first, second = ((generator.random(300) < hard).astype(float).tolist() for _ in range(2))
        test = compare_scores(make_row(), make_graded(first, clusters), make_graded(second, clusters), "official")
        alarms += test.p < 0.05
    assert 0.03 <= alarms / 600 <= 0.07


def test_what_is_detectable_is_detected_four_times_in_five() -> None:
    generator = np.random.default_rng(10)
    found = 0
    reference = difference_test(0.0, 1.0, clusters=40, reach=100)
    assert reference.detectable is not None
    for _ in range(2000):
        # Differences of 40 images, with a true mean of what is detectable at a standard error of 1.
        gains = generator.normal(reference.detectable, 40**0.5, 40)
        found += difference_test(gains.mean(), gains.std(ddof=1) / 40**0.5, clusters=40, reach=100).p < 0.05
    assert 0.77 <= found / 2000 <= 0.83


def test_models_that_never_differ_say_nothing_about_what_they_could() -> None:
    graded = make_graded([1, 0, 1], list("abc"))
    test = compare_scores(make_row(), graded, graded, "official")
    assert (test.difference, test.p, test.detectable) == (0, 1, None)


def test_one_image_shows_no_difference() -> None:
    test = compare_scores(make_row(), make_graded([0, 0], "aa"), make_graded([1, 1], "aa"), "official")
    assert (test.p, test.low, test.high) == (1, -100, 100)


def test_other_items_are_refused() -> None:
    with pytest.raises(EvaluationError, match="3 items against 2"):
        compare_scores(make_row(), make_graded([1, 1, 0], "abc"), make_graded([1, 1], "ab"), "official")


def test_an_average_weighs_points_by_their_maximum() -> None:
    percent, points = make_row("a"), make_row("b", maximum=2000.0)
    tests = [difference_test(4.0, 1.0, clusters=50, reach=100), difference_test(40.0, 20.0, clusters=50, reach=2000)]
    average = average_difference([(percent, tests[0]), (points, tests[1])])
    assert average.difference == pytest.approx((4 + 2) / 2)
    assert average.error == pytest.approx(2**0.5 / 2)
    with pytest.raises(EvaluationError, match="no benchmarks"):
        average_difference([])


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make_snapshot(tmp_path_factory.mktemp("snapshot"), images=IMAGES)


@pytest.fixture(scope="module")
def folders(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The first is wrong on images 0 to 8, the second on 8 alone."""
    root = tmp_path_factory.mktemp("results")
    for name, wrong in (("first", range(9)), ("second", [8])):
        rule = rule_with_errors(IMAGES, list(wrong))
        evaluate(
            RuleAnswerer(rule),
            make_recipe(),
            snapshot=snapshot,
            out_dir=root / name / "scorecard",
            code_digest="c",
            model_digest=name,
        )
    return root / "first", root / "second"


def test_two_scorecards_are_compared_item_by_item(folders: tuple[Path, Path]) -> None:
    comparison = compare_results(*(read_results(folder) for folder in folders))
    (compared,) = comparison.benchmarks.values()
    assert (compared.n, compared.clusters) == (96, 24)
    assert (compared.only_first, compared.only_second, compared.both, compared.neither) == (0, 32, 60, 4)
    assert compared.difference == pytest.approx(100 / 3, abs=1e-4)
    assert compared.verdict == "better"
    assert compared.p == compared.p_holm < 0.01
    assert comparison.average.difference == compared.difference
    back = compare_results(*(read_results(folder) for folder in reversed(folders)))
    assert back.benchmarks["easy-vqa"].verdict == "worse"
    assert back.benchmarks["easy-vqa"].difference == -compared.difference


def test_holm_may_take_a_verdict_back(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "holm", lambda values: [min(1.0, 1e6 * value) for value in values])
    comparison = compare_results(*(read_results(folder) for folder in folders))
    assert comparison.benchmarks["easy-vqa"].verdict == "not shown"


def test_other_questions_are_not_compared(folders: tuple[Path, Path], snapshot: Snapshot, tmp_path: Path) -> None:
    evaluate(
        RuleAnswerer(rule_with_errors(IMAGES)),
        make_recipe(evaluation__max_items=40),
        snapshot=snapshot,
        out_dir=tmp_path,
        code_digest="c",
        model_digest="third",
    )
    with pytest.raises(EvaluationError, match=r"easy-vqa: other questions \(96 of 96; 40 of 96\)"):
        compare_results(read_results(folders[0]), read_results(tmp_path))


def test_items_of_another_evaluation_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "scorecard.json").write_bytes((folders[0] / "scorecard" / "scorecard.json").read_bytes())
    items = read_outcomes(folders[1] / "scorecard" / "items.parquet")
    write_outcomes(items, tmp_path / "items.parquet")
    with pytest.raises(EvaluationError, match="another evaluation"):
        read_results(tmp_path)
    write_outcomes(replace(items, model_digest="first"), tmp_path / "items.parquet")
    assert read_results(tmp_path / "scorecard.json").digest == "first"


def test_the_images_of_a_comparison_are_found_by_their_bytes(snapshot: Snapshot, folders: tuple[Path, Path]) -> None:
    outcomes = read_results(folders[0]).items.of("easy-vqa")
    wanted = {outcomes[0].image_sha256, outcomes[-1].image_sha256}
    found = read_compared_images(snapshot, {"easy-vqa": {*wanted, "0" * 64}})
    assert set(found) == {("easy-vqa", sha256) for sha256 in wanted}
    assert all(data.startswith(b"\x89PNG") for data in found.values())


def test_the_command_writes_a_page_that_shows_both_answers_and_the_image(
    folders: tuple[Path, Path], snapshot: Snapshot, tmp_path: Path
) -> None:
    arguments = ["compare", *map(str, folders), "--out", str(tmp_path), "--data", str(snapshot.path), "--examples", "5"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "The second is better: +33.33 points on 96 questions on 24 images." in result.stdout
    assert "no pictures" not in result.stderr
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert html.count("<img ") == html.count("data:image/png;base64,") == 5
    assert "5 of 32, spread over the benchmark" in html
    assert "a horse ✗" in html
    assert re.search(r"second: <span class=\"good\">(red|blue|green|circle|rectangle|triangle|yes|no) ✓", html)
    assert not re.search(r"<script|https?://|<link", html)
    written = ModelComparison.model_validate_json((tmp_path / "compare.json").read_bytes())
    assert written.first.name == str(folders[0])


def test_without_the_snapshot_the_figures_stand_and_the_page_says_what_is_missing(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["compare", *map(str, folders), "--out", str(tmp_path / "out"), "--data", str(tmp_path / "nothing")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "no pictures: " in result.stderr
    assert "No pictures:</b>" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    as_json = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(as_json.stdout)["benchmarks"]["easy-vqa"]["only_second"] == 32


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=f'no folder "{tmp_path / "gone"}"'):
        CliRunner().invoke(cli, ["compare", str(tmp_path / "gone"), str(tmp_path)], catch_exceptions=False)
