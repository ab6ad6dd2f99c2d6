"""Fixtures in each benchmark's own columns, scores by hand, and where published scripts disagree."""

from __future__ import annotations

from typing import Any

import pytest

from manyeyes.evaluation.benchmarks import BENCHMARKS, find_benchmark
from manyeyes.evaluation.score import score_predictions


def vqa_row(number: int, answers: list[str], kind: str = "other", image: int = 1) -> dict[str, Any]:
    return {
        "id": str(number),
        "question_id": number,
        "image_id": image,
        "question": "What is it?",
        "question_type": "what is",
        "answer_type": kind,
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": place}
            for place, answer in enumerate(answers, start=1)
        ],
    }


def ten(answer: str, matches: int = 10) -> list[str]:
    return [answer] * matches + [f"other {place}" for place in range(10 - matches)]


def score_of(name: str, row: dict[str, Any], prediction: str, variant: str | None = None) -> float:
    """The score of one item, in [0, 1]."""
    report = score_predictions(name, [row], [{"id": row["id"], "prediction": prediction}], variant=variant)
    return report.score / find_benchmark(name).maximum


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "lmms"),
    [
        ("Black.", ten("black"), 0, 1),  # all ten agree: the official script compares as it is
        ("black", ten("black"), 1, 1),
        (" black\n", ten("black"), 1, 1),
        ("Black.", ten("black", 9), 1, 1),
        ("black", ten("black", 3), 0.9, 0.9),
        ("two", ten("2", 2), 0.6, 0.6),
        ("it's", ten("it's", 1), 0.3, 0.3),
        ("", ten("black"), 0, 0),
    ],
)
def test_vqav2(prediction: str, answers: list[str], official: float, lmms: float) -> None:
    row = vqa_row(1, answers)
    assert score_of("vqav2", row, prediction) == pytest.approx(official)
    assert score_of("vqav2", row, prediction, "lmms") == pytest.approx(lmms)


def test_vqav2_has_sub_scores_by_answer_type_and_clusters_by_image() -> None:
    rows = [vqa_row(1, ten("yes"), "yes/no"), vqa_row(2, ten("3"), "number"), vqa_row(3, ten("cat"), image=2)]
    predictions = [{"id": "1", "prediction": "yes"}, {"id": "2", "prediction": "4"}, {"id": "3", "prediction": "cat"}]
    report = score_predictions("vqav2", rows, predictions)
    assert report.score == pytest.approx(200 / 3)
    assert report.scores == {"yes/no": 100, "number": 0, "other": 100}
    assert (report.n, report.clusters) == (3, 2)
    assert report.ci95[0] <= report.score <= report.ci95[1]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("yes", {"official": 1, "lmms": 1, "vlmevalkit": 1, "cambrian": 1}),
        ("Yes", {"official": 0, "lmms": 1, "vlmevalkit": 1, "cambrian": 1}),
        ("yes.", {"official": 0, "lmms": 1, "vlmevalkit": 0, "cambrian": 1}),
        (" yes", {"official": 0, "lmms": 1, "vlmevalkit": 1, "cambrian": 0}),
        ("y-e-s", {"official": 0, "lmms": 1, "vlmevalkit": 0, "cambrian": 0}),
        ("no", {"official": 0, "lmms": 0, "vlmevalkit": 0, "cambrian": 0}),
    ],
)
def test_gqa(prediction: str, expected: dict[str, float]) -> None:
    row = {"id": "201640614", "imageId": "n161313", "question": "Is it overcast?", "answer": "yes"}
    assert {variant: score_of("gqa", row, prediction, variant) for variant in expected} == expected


@pytest.mark.parametrize("name", ["textvqa", "vizwiz"])
@pytest.mark.parametrize(
    ("prediction", "answers", "expected", "vlmevalkit"),
    [
        ("Nokia.", ten("nokia"), 1, 1),
        ("3.", ten("3", 3), 0.9, 0),
        ("it's", ten("it 's", 4), 1, 0),
        ("Unanswerable", ten("unanswerable", 1), 0.3, 0.3),
    ],
)
def test_textvqa_and_vizwiz(name: str, prediction: str, answers: list[str], expected: float, vlmevalkit: float) -> None:
    row = {
        "id": "34602",
        "question_id": 34602,
        "image_id": "003a8ae2ef43b901",
        "question": "what is the brand?",
        "answers": answers,
        "category": "other",
        "ocr_tokens": ["NOKIA"],
    }
    for variant in ("official", "lmms", "cambrian"):
        assert score_of(name, row, prediction, variant) == pytest.approx(expected)
    assert score_of(name, row, prediction, "vlmevalkit") == pytest.approx(vlmevalkit)


def ocr_row(number: int, golds: list[str], kind: str = "Regular Text Recognition") -> dict[str, Any]:
    dataset = "HME100k" if kind.startswith("Handwritten M") else "IIIT5K"
    return {"id": str(number), "dataset": dataset, "question": "Read.", "question_type": kind, "answer": golds}


@pytest.mark.parametrize(
    ("prediction", "golds", "kind", "official", "lmms"),
    [
        ("It says CENTRE.", ["centre"], "Regular Text Recognition", 1, 1),
        ("cen tre", ["centre"], "Regular Text Recognition", 0, 0),
        ("two\nlines", ["two lines"], "Doc-oriented VQA", 1, 1),
        ("x ^ 2 + Y", ["x^2+Y"], "Handwritten Mathematical Expression Recognition", 1, 1),
        ("x^2+y", ["x^2+Y"], "Handwritten Mathematical Expression Recognition", 0, 0),
        ("ＡＢＣ", ["abc"], "Regular Text Recognition", 0, 1),  # noqa: RUF001
        ("b", ["a", "b"], "Scene Text-centric VQA", 1, 1),
        ("", ["a"], "Scene Text-centric VQA", 0, 0),
    ],
)
def test_ocrbench(prediction: str, golds: list[str], kind: str, official: float, lmms: float) -> None:
    row = ocr_row(1, golds, kind)
    for variant, expected in {"official": official, "lmms": lmms, "cambrian": official, "vlmevalkit": official}.items():
        assert score_of("ocrbench", row, prediction, variant) == expected


def test_ocrbench_scores_are_thousandths_that_add_up() -> None:
    rows = [
        ocr_row(1, ["a"]),
        ocr_row(2, ["b"], "Handwriting Recognition"),
        ocr_row(3, ["c"], "Key Information Extraction"),
        ocr_row(4, ["d"], "Key Information Extraction"),
    ]
    report = score_predictions("ocrbench", rows, [{"id": one, "prediction": "abc"} for one in "1234"])
    assert (report.score, report.unit) == (750, "points")
    assert report.scores == {
        "Regular Text Recognition": 250,
        "Handwriting Recognition": 250,
        "Text Recognition": 500,
        "Key Information Extraction": 250,
    }
    assert 0 <= report.ci95[0] < 750 < report.ci95[1] <= 1000


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("Yes ", "yes", {"official": 0, "lmms": 1, "vlmevalkit": 1, "cambrian": 0}),
        ("10%", "0.1", {"official": 1, "lmms": 1, "vlmevalkit": 1, "cambrian": 0}),
        ("0.0", "0", {"official": 0, "lmms": 0, "vlmevalkit": 0, "cambrian": 1}),
        ("104", "100", {"official": 1, "lmms": 1, "vlmevalkit": 1, "cambrian": 1}),
        ("Blue.", "blue", {"official": 0, "lmms": 0, "vlmevalkit": 0, "cambrian": 0}),
    ],
)
def test_chartqa(prediction: str, gold: str, expected: dict[str, float]) -> None:
    row = {"id": "0", "type": "human_test", "question": "How many?", "answer": gold}
    assert {variant: score_of("chartqa", row, prediction, variant) for variant in expected} == expected


def test_chartqa_has_both_halves() -> None:
    rows = [
        {"id": str(number), "type": kind, "question": "How many?", "answer": "7"}
        for number, kind in enumerate(["human_test", "human_test", "augmented_test"])
    ]
    predictions = [{"id": "0", "prediction": "7"}, {"id": "1", "prediction": "9"}, {"id": "2", "prediction": "7"}]
    report = score_predictions("chartqa", rows, predictions)
    assert (round(report.score, 6), report.scores) == (66.666667, {"human": 50, "augmented": 100})


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_docvqa_and_infovqa(name: str) -> None:
    row = {
        "id": "49153",
        "questionId": "49153",
        "docId": 14465,
        "image_url": "https://example.org/1.png",
        "question": "What is written?",
        "answers": ["itc limited", "ITC Ltd"],
    }
    assert score_of(name, row, "ITC  Limited") == 1
    assert score_of(name, row, "ITC Limite") == pytest.approx(10 / 11)
    assert score_of(name, row, "abc") == 0
    # A trailing space makes the text longer, which only the stripped answer of lmms-eval does not pay for.
    assert score_of(name, row, "ITC Limite ") == pytest.approx(10 / 11)
    assert score_of(name, row, "ITC Limite  ", "official") == pytest.approx(11 / 12)
    assert score_of(name, row, "ITC Limite  ", "lmms") == pytest.approx(10 / 11)


def test_prompts_are_those_of_the_papers() -> None:
    phrase = "\nAnswer the question using a single word or phrase."
    textvqa = {"question": "what is the Brand?", "ocr_tokens": ["NOKIA", "N95"]}
    prompt = BENCHMARKS["textvqa"].prompt
    assert prompt(textvqa, "default") == "What is the brand?" + phrase
    assert prompt(textvqa, "llava") == "what is the Brand?\nReference OCR token: NOKIA, N95" + phrase
    assert prompt(textvqa, "cambrian") == "what is the Brand?\nReference OCR tokens: NOKIA, N95" + phrase
    assert prompt({**textvqa, "ocr_tokens": []}, "cambrian") == "what is the Brand?\nReference OCR tokens:" + phrase
    question = {"question": "What is it?"}
    assert BENCHMARKS["vqav2"].prompt(question, "llava") == "What is it?" + phrase
    assert "respond with 'Unanswerable'." + phrase in BENCHMARKS["vizwiz"].prompt(question, "llava")
    assert BENCHMARKS["docvqa"].prompt(question, "cambrian") == "What is it?\nGive the short answer directly."
    assert BENCHMARKS["docvqa"].prompt(question, "default") == "What is it?" + phrase
    assert BENCHMARKS["ocrbench"].prompt(question, "default") == "What is it?"
    assert BENCHMARKS["chartqa"].prompt(question, "eagle") == "What is it?\nAnswer the question with a single word."
