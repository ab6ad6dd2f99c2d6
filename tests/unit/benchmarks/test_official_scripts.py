"""Answers on which a plain reading of a script and the script itself differ; found by running both on made-up texts."""

from __future__ import annotations

from manyeyes.evaluation.benchmarks import BENCHMARKS, option_letters
from manyeyes.evaluation.benchmarks.mathvista import JUDGING, extract
from tests import benchmark_rows as rows


def test_mathvista_takes_the_shortest_option_for_no_answer_at_all() -> None:
    # extract_answer returns "" for "" without asking its model, and calculate_score then takes the option with the
    # smallest edit distance to it.
    row = {
        "id": "1",
        **rows.mathvista(choices=["3 cm", "14", "4 cm"], question_type="multi_choice", answer_type="text", answer="14"),
    }
    grade = BENCHMARKS["mathvista"].grade
    for variant in ("official", "lmms"):
        graded = grade(row, "", variant)
        assert (graded.parsed, graded.score) == ("14", 1)
        assert grade({**row, "answer": "3 cm"}, "", variant).score == 0
        # With a judge, too.
        assert JUDGING.direct(row, "", variant) == graded
    # A space is something: upstream asks its model about it, and lmms-eval strips it first.
    assert (grade(row, " ", "official").parsed, grade(row, " ", "lmms").parsed) == (None, "14")
    # Without options there is nothing near.
    assert extract({"id": "1", **rows.mathvista()}, "") is None
    for variant in ("vlmevalkit", "cambrian"):
        assert grade(row, "", variant).score == 0


def test_ai2d_as_cambrian_scores_it_knows_no_digits_of_other_scripts() -> None:
    # The script compares texts: an index is right as "1" and not as the Arabic or the full-width digit.
    row = {"id": "1", **rows.ai2d(answer="1")}
    scores = [BENCHMARKS["ai2d"].grade(row, said, "cambrian").score for said in ("1", "B", "١", "１")]  # noqa: RUF001
    assert scores == [1, 1, 0, 0]


def test_vlmevalkit_measures_a_response_in_lower_case() -> None:
    # can_infer_text lowers the response before it compares lengths, and a capital dotted I becomes two characters.
    options = {"A": "yes", "B": "never"}
    assert option_letters.vlmevalkit("yes, iiiiiiiiiii", options) == "A"
    assert option_letters.vlmevalkit("yes, Iiiiiiiiiii".replace("I", "İ"), options) is None


def test_mmvp_as_cambrian_scores_it_cuts_an_option_at_its_second_bracket() -> None:
    # give_options takes what stands between the first and the second closing bracket.
    row = {"id": "1", **rows.mmvp(1, Options="(a) on the left) side (b) No")}
    grade = BENCHMARKS["mmvp"].grade
    assert grade(row, "on the left", "cambrian").score == 1
    assert grade(row, "side", "cambrian").score == 0
