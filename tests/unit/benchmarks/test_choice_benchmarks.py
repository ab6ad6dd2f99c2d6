"""What each benchmark with options, or with yes and no, makes of one answer and of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bench.scorer_cases import cases
from manyeyes.errors import EvaluationError
from manyeyes.evaluation.benchmarks import BENCHMARKS
from manyeyes.evaluation.score import ScoreReport, score_predictions
from tests import benchmark_rows as rows
from tests.benchmark_rows import FIXTURES


def grade(name: str, row: Mapping[str, Any], prediction: str, variant: str | None = None) -> float:
    benchmark = BENCHMARKS[name]
    return benchmark.grade({"id": "1", "row_number": 0, **row}, prediction, benchmark.check_variant(variant)).score


def score(
    name: str, answered: Sequence[tuple[Mapping[str, Any], str | None]], variant: str | None = None
) -> ScoreReport:
    """Score rows with their predictions; ``None`` is a missing one."""
    references = [{"id": str(number), **row} for number, (row, _) in enumerate(answered)]
    predictions = [
        {"id": str(references[number]["id"]), "prediction": text}
        for number, (_, text) in enumerate(answered)
        if text is not None
    ]
    return score_predictions(name, references, predictions, variant=variant)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B", "lmms vlmevalkit cambrian"),
        ("(B)", "lmms vlmevalkit cambrian"),
        ("B. foo", "lmms vlmevalkit cambrian"),
        ("B) foo", "vlmevalkit cambrian"),
        ("b", "lmms cambrian"),
        ("The answer is B", "vlmevalkit cambrian"),
        ("grass", "vlmevalkit"),
        ("1", "cambrian"),
        ("", ""),
    ],
)
def test_ai2d(prediction: str, right: str) -> None:
    got = [v for v in BENCHMARKS["ai2d"].variants if grade("ai2d", rows.ai2d(), prediction, v)]
    assert " ".join(got) == right


def test_ai2d_refuses_an_index_of_no_option() -> None:
    with pytest.raises(EvaluationError, match='"answer" is "3"; an index below 3'):
        grade("ai2d", rows.ai2d(answer="3"), "B")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B", "official lmms vlmevalkit cambrian"),
        ("B. rice", "official lmms vlmevalkit cambrian"),
        ("B.rice", "lmms vlmevalkit cambrian"),
        ("The answer is B.", "official vlmevalkit cambrian"),
        ("(B)", "vlmevalkit"),
        ("B rice", "vlmevalkit"),
        ("Rice!", "vlmevalkit cambrian"),
        ("b", "lmms cambrian"),
    ],
)
def test_scienceqa(prediction: str, right: str) -> None:
    got = [v for v in BENCHMARKS["scienceqa"].variants if grade("scienceqa", rows.scienceqa(), prediction, v)]
    assert " ".join(got) == right


def test_scienceqa_takes_no_letter_beyond_the_options() -> None:
    assert score("scienceqa", [(rows.scienceqa(), "C")]).parse_failures == 1


def test_scienceqa_scores_the_questions_with_an_image() -> None:
    report = score(
        "scienceqa",
        [
            (rows.scienceqa(), "B"),
            (rows.scienceqa(image=rows.dot(), grade="grade7"), "A"),
            (rows.scienceqa(image=None), "A"),
            (rows.scienceqa(image=None), "A"),
        ],
    )
    assert report.score == 50
    assert report.scores == {"all": 25, "natural science": 50, "grades 1-6": 100, "grades 7-12": 0}


def mme_images(*answers: str | None) -> list[tuple[dict[str, Any], str | None]]:
    """Two questions an image, the first to be answered yes, the second no."""
    return [
        (rows.mme(question_id=f"count/{number // 2}.png", answer=("Yes", "No")[number % 2]), answer)
        for number, answer in enumerate(answers)
    ]


def test_mme_adds_questions_right_and_images_right_in_points() -> None:
    report = score("mme", mme_images("yes", "no", "yes", "yes"))
    assert (report.score, report.unit) == (75 + 50, "points")
    cognition = [
        (rows.mme(question_id="code/1.png", category="code_reasoning"), "Yes."),
        (rows.mme(question_id="code/1.png", category="code_reasoning", answer="No"), "No."),
    ]
    both = score("mme", [*mme_images("yes", "no", "yes", "yes"), *cognition])
    assert (both.score, both.scores["cognition"], both.scores["total"]) == (125, 200, 325)
    assert both.scores["count"] == 125
    assert both.clusters == 3


def test_mme_counts_what_is_neither_as_unread_and_a_missing_answer_as_wrong() -> None:
    report = score("mme", mme_images("I think yes", "no", None, "no"))
    assert (report.score, report.parse_failures, report.missing) == (50, 1, 1)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("Yes.", "official lmms vlmevalkit cambrian"),
        ("y", "lmms"),
        (" yes", "official lmms vlmevalkit"),
        ("I say yes", "vlmevalkit"),
        ("Yes, there is no dog", "official lmms"),
    ],
)
def test_mme_variants(prediction: str, right: str) -> None:
    got = [v for v in BENCHMARKS["mme"].variants if grade("mme", rows.mme(), prediction, v)]
    assert " ".join(got) == right


def test_mmbench_counts_a_question_that_is_right_in_every_rotation() -> None:
    answered = [
        (rows.mmbench(7), "A"),
        (rows.mmbench(1_000_007, answer="B", A="cat", B="dog"), "B. dog"),
        (rows.mmbench(8), "A"),
        (rows.mmbench(1_000_008, answer="B", A="cat", B="dog"), "A"),
        (rows.mmbench(9, category="counting"), "A"),
        (rows.mmbench(1_000_009, answer="B"), None),
    ]
    report = score("mmbench", answered)
    assert report.score == pytest.approx(100 / 3)
    assert report.scores == {
        "first pass": 100,
        "rows": pytest.approx(400 / 6),
        "coarse": pytest.approx(100 / 3),
        "counting": 0,
        "identity": 50,
    }
    assert report.clusters == 3


def test_mmbench_variants_differ_in_what_they_read() -> None:
    def right(prediction: str) -> str:
        variants = BENCHMARKS["mmbench"].variants
        return " ".join(v for v in variants if grade("mmbench", rows.mmbench(7), prediction, v))

    assert right("A") == "official lmms vlmevalkit cambrian"
    assert right("A dog is what I see here") == "official lmms cambrian"  # by the text, or the first character
    assert right("maybe it is the answer (A), I hope") == "lmms vlmevalkit"
    assert right("A dog, not a cat") == "lmms cambrian"
    assert right("a dog, if you ask me") == "official lmms cambrian"
    assert right("Surely not the second") == ""


def test_mmbench_reads_nan_as_an_option_where_upstream_does() -> None:
    row = rows.mmbench(7, A="banana", D=None)
    assert grade("mmbench", row, "a banana", "official") == 0  # "nan" is in "banana", so two options match
    assert grade("mmbench", row, "a banana", "vlmevalkit") == 1


def test_mmbench_without_the_first_row_counts_no_question() -> None:
    report = score("mmbench", [(rows.mmbench(7), "A"), (rows.mmbench(1_000_008), "B")])
    assert (report.score, report.scores["rows"]) == (100, 50)


def test_seed_scores_the_image_part() -> None:
    answered = [
        (rows.seed(), "B"),
        (rows.seed(data_id="d2"), "b) cat"),
        (rows.seed(data_id="d3"), "C"),
        (rows.seed(data_id="v1", data_type="video", question_type_id=8), "B"),
    ]
    report = score("seed", answered)
    assert report.score == pytest.approx(200 / 3)
    assert (report.scores["all"], report.scores["video"], report.scores["Visual Reasoning"]) == (75, 100, 100)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B", "official lmms vlmevalkit cambrian"),
        ("B.", "lmms vlmevalkit cambrian"),
        ("But why", "lmms cambrian"),
        ("(B)", "vlmevalkit cambrian"),
        ("cat", "vlmevalkit"),
    ],
)
def test_seed_variants(prediction: str, right: str) -> None:
    got = [v for v in BENCHMARKS["seed"].variants if grade("seed", rows.seed(), prediction, v)]
    assert " ".join(got) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("B", "B", "official lmms vlmevalkit cambrian"),
        ("The answer is (B)", "B", "official lmms vlmevalkit cambrian"),
        ("B. Klee", "B", "lmms vlmevalkit cambrian"),
        ("I believe that this was painted by Klee", "B", "official lmms"),
    ],
)
def test_mmmu_with_options(prediction: str, answer: str, right: str) -> None:
    got = [v for v in BENCHMARKS["mmmu"].variants if grade("mmmu", rows.mmmu(answer=answer), prediction, v)]
    assert " ".join(got) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("14.00", "14", "official lmms vlmevalkit cambrian"),
        ("The total is 1,400.", "1400", "official lmms"),
        ("x = 14.5", "14", "vlmevalkit"),  # which makes the reference an option, found in the text
        ("14.5", "14", "vlmevalkit cambrian"),
        ("In Paris", "Paris", "official lmms vlmevalkit"),
        ("Paris in France", "Paris", "vlmevalkit"),  # the others take what follows "is "
        ("so x", "x", "official lmms vlmevalkit"),
        ("maximum", "x", "vlmevalkit"),  # one character has to stand with a space
        ("b", "24/7", ""),
        ("about 24/7", "['24/7', '3.43']", "official"),  # lists are lists to MMMU's own answer file alone
        ("3.428", "['24/7', '3.43']", "official"),
    ],
)
def test_mmmu_open(prediction: str, answer: str, right: str) -> None:
    row = rows.mmmu(question_type="open", options="[]", answer=answer)
    got = [v for v in BENCHMARKS["mmmu"].variants if grade("mmmu", row, prediction, v)]
    assert " ".join(got) == right


def test_mmmu_guesses_only_with_a_seed_and_then_always_the_same() -> None:
    references = [rows.mmmu(id=f"validation_Art_{number}") for number in range(60)]
    predictions = [{"id": row["id"], "prediction": "hm"} for row in references]
    plain = score_predictions("mmmu", references, predictions)
    assert (plain.score, plain.parse_failures) == (0, 60)
    seeded = [score_predictions("mmmu", references, predictions, seed=seed).score for seed in (42, 42, 43)]
    assert 10 < seeded[0] < 60
    assert seeded[0] == seeded[1] != seeded[2]


def test_mmmu_scores_by_domain_and_subject() -> None:
    answered = [(rows.mmmu(), "B"), (rows.mmmu(id="validation_Math_3"), "A")]
    assert score("mmmu", answered).scores == {
        "multiple-choice": 50,
        "Art and Design": 100,
        "Science": 0,
        "Art_Theory": 100,
        "Math": 0,
    }


def test_mmmu_options_that_are_no_list_are_named() -> None:
    with pytest.raises(EvaluationError, match="a list written as text"):
        grade("mmmu", rows.mmmu(options='"dog, cat'), "A")


def multi(**values: Any) -> dict[str, Any]:
    row = rows.mathvista(
        question_type="multi_choice", answer_type="text", choices=["3 cm", "4 cm", "14"], answer="4 cm"
    )
    return {**row, **values}


@pytest.mark.parametrize(
    ("row", "prediction", "right"),
    [
        (multi(), "4 cm", "official lmms vlmevalkit"),
        (multi(), "B", "official lmms vlmevalkit cambrian"),
        (multi(), "(B) 4 cm", "official lmms vlmevalkit"),
        (multi(), "B. 4 cm", "vlmevalkit"),  # the script asks for the type "multiple-choice", which is never said
        (multi(), "it is 4 cm I say", "vlmevalkit"),
        (rows.mathvista(), "14", "official lmms vlmevalkit cambrian"),
        (rows.mathvista(), "14.0", "official lmms cambrian"),
        (rows.mathvista(), "14.5", "official lmms cambrian"),  # made whole, or within 5%
        (rows.mathvista(), "The answer is 14", ""),
        (rows.mathvista(answer="1.5", answer_type="float", precision=1.0), "1.46", "official cambrian"),
        (rows.mathvista(answer="1.5", answer_type="float", precision=1), "1.46", "official lmms cambrian"),
        (rows.mathvista(answer="1.40", answer_type="float", precision=2.0), "1.40", "vlmevalkit cambrian"),
        (rows.mathvista(answer="[1, 2]", answer_type="list"), "[1, 2]", "official lmms cambrian"),
        (rows.mathvista(), "", ""),
    ],
)
def test_mathvista(row: dict[str, Any], prediction: str, right: str) -> None:
    got = [v for v in BENCHMARKS["mathvista"].variants if grade("mathvista", row, prediction, v)]
    assert " ".join(got) == right


def test_mathvista_leaves_what_a_judge_would_extract_unread() -> None:
    answered = [(rows.mathvista(), "It must be 14 apples"), (rows.mathvista(pid="2"), "14")]
    report = score("mathvista", answered)
    assert (report.score, report.parse_failures) == (50, 1)
    assert report.scores["algebraic reasoning"] == 50
    assert report.scores["math word problem"] == 50


def test_mathvista_takes_the_nearest_option_of_an_extraction() -> None:
    from manyeyes.evaluation.benchmarks.mathvista import extract, grade_extraction

    row = {"id": "1", **multi()}
    assert extract(row, "the longer side, 4 centimetres") is None
    assert grade_extraction(row, "4 cms", "official").parsed == "4 cm"
    assert grade_extraction(row, "4 cms", "official").score == 1
    assert grade_extraction(row, "C", "official").parsed == "14"


def pope_answers(*pairs: tuple[str, str | None]) -> list[tuple[dict[str, Any], str | None]]:
    """(category/reference, prediction)."""
    return [
        (rows.pope(category=named.split("/")[0], answer=named.split("/")[1], image_source=f"i{number}"), said)
        for number, (named, said) in enumerate(pairs)
    ]


def test_pope_is_the_mean_f1_of_the_categories_or_pooled() -> None:
    answered = pope_answers(
        ("random/yes", "yes"), ("random/no", "no"),  # F1 1
        ("popular/yes", "yes"), ("popular/yes", "no"), ("popular/no", "yes"), ("popular/no", "no"),  # F1 1/2
    )  # fmt: skip
    official = score("pope", answered)
    assert official.score == pytest.approx(75)
    assert official.scores["random f1"] == 100
    assert official.scores["popular accuracy"] == 50
    for variant in ("lmms", "vlmevalkit"):  # 2 true, 1 false positive, 1 false negative
        assert score("pope", answered, variant).score == pytest.approx(200 / 3)
    assert score("pope", answered, "cambrian").score == pytest.approx(400 / 6)


def test_pope_garbage_is_yes_officially_and_no_false_negative_in_lmms() -> None:
    answered = pope_answers(("random/yes", "yes"), ("random/yes", "hm"), ("random/no", "no"), ("random/no", "hm"))
    official = score("pope", answered)
    assert official.scores["recall"] == 100
    assert official.scores["precision"] == pytest.approx(200 / 3)
    assert official.scores["yes ratio"] == 75
    lmms = score("pope", answered, "lmms")
    assert (lmms.score, lmms.scores["recall"], lmms.scores["accuracy"], lmms.scores["yes ratio"]) == (100, 100, 50, 50)
    vlmevalkit = score("pope", answered, "vlmevalkit")
    assert (vlmevalkit.scores["recall"], vlmevalkit.parse_failures) == (50, 2)


@pytest.mark.parametrize("variant", ["official", "lmms"])
def test_pope_counts_a_missing_answer_as_the_wrong_one(variant: str) -> None:
    full = pope_answers(("random/yes", "yes"), ("random/yes", "no"), ("random/no", "yes"), ("random/no", "no"))
    gone = [(row, None if place in (1, 2) else said) for place, (row, said) in enumerate(full)]
    assert score("pope", gone, variant).score == score("pope", full, variant).score == 50


def test_mmvp_counts_pairs() -> None:
    answered = [
        (rows.mmvp(1), "A"),
        (rows.mmvp(2, **{"Correct Answer": "(b)"}), "b"),
        (rows.mmvp(3), "A"),
        (rows.mmvp(4, **{"Correct Answer": "(b)"}), "A"),
    ]
    for variant in BENCHMARKS["mmvp"].variants:
        report = score("mmvp", [(row, said.upper()) for row, said in answered if said], variant)
        assert (report.score, report.scores["single"], report.clusters) == (50, 75, 2)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("(a)", "lmms cambrian"),
        ("A.", "lmms vlmevalkit cambrian"),
        ("Yes", "vlmevalkit cambrian"),
        ("Option A, I say", "lmms vlmevalkit"),
        ("The answer is (a).", "lmms cambrian"),
        ("a dog", "lmms"),
    ],
)
def test_mmvp_variants(prediction: str, right: str) -> None:
    got = [v for v in BENCHMARKS["mmvp"].variants if grade("mmvp", rows.mmvp(1), prediction, v)]
    assert " ".join(got) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("C", "C", "lmms cambrian"),
        ("C.", "C", "lmms cambrian"),
        ("(C)", "C", "lmms"),
        ("C. Ahead", "C", "lmms"),  # Cambrian's first word is "c."
        ("The answer is C", "C", "lmms cambrian"),
        ("c", "C", "cambrian"),
        ("Two", "two", "lmms cambrian"),
        ("two cars", "two", "cambrian"),
        ("", "two", ""),
    ],
)
def test_realworldqa(prediction: str, answer: str, right: str) -> None:
    row = rows.realworldqa(answer=answer)
    got = [v for v in BENCHMARKS["realworldqa"].variants if grade("realworldqa", row, prediction, v)]
    assert " ".join(got) == right


def test_cv_bench_is_the_mean_of_2d_and_3d_and_micro_in_lmms() -> None:
    answered = [
        (rows.cv_bench(), "B"),
        (rows.cv_bench(), "A"),
        (rows.cv_bench(source="COCO"), "B"),
        (rows.cv_bench(source="Omni3D", type="3D", task="Depth"), "(B)"),
    ]
    for variant in ("official", "vlmevalkit", "cambrian"):
        assert score("cv-bench", answered, variant).score == 87.5
    lmms = score("cv-bench", answered, "lmms")
    assert (lmms.score, lmms.scores["2D"], lmms.scores["3D"], lmms.scores["2D and 3D"]) == (75, 75, 100, 87.5)
    assert (lmms.scores["ADE20K"], lmms.scores["Depth"]) == (50, 100)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("(B)", "official lmms vlmevalkit cambrian"),
        ("The answer is B.", "official vlmevalkit cambrian"),
        ("3", "official vlmevalkit cambrian"),
        ("Because of 3", "official lmms cambrian"),  # the first letter
        ("", ""),
    ],
)
def test_cv_bench_variants(prediction: str, right: str) -> None:
    got = [v for v in BENCHMARKS["cv-bench"].variants if grade("cv-bench", rows.cv_bench(), prediction, v)]
    assert " ".join(got) == right


@pytest.mark.parametrize(
    "name", [name for name, row in BENCHMARKS.items() if "lmms" in row.variants and not row.judged]
)
def test_lmms_strips_every_answer(name: str) -> None:
    for row, answer in cases(random_answers=0).get(name) or FIXTURES[name].answered:
        for spaced in (f"{answer}\n", f"\t{answer}", f" \n{answer}\u00a0\r\n"):
            assert grade(name, row, spaced, "lmms") == grade(name, row, answer.strip(), "lmms"), (spaced, row)
