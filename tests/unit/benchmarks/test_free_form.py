from __future__ import annotations

import pytest

from manyeyes.evaluation.benchmarks.rules import (
    anls,
    levenshtein,
    normalise_evalai,
    normalise_vlmevalkit,
    normalise_vqa,
    normalise_vqa_lmms,
    relaxed_match,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "evalai", "vqa", "vlmevalkit"),
    [
        ("a/b", "b", "b", "b"),  # the slash becomes a space, then the article goes
        ("it's", "it 's", "it's", "it's"),
        ("3.", "3", "3", "3."),
        ("12,5 cm", "125 cm", "125 cm", "125 cm"),
        ("50%", "50%", "50%", "50%"),
        ("$5:30", "$5:30", "$5:30", "$5:30"),
        ("None", "0", "0", "0"),
        ("Ten of the Two", "10 of 2", "10 of 2", "10 of 2"),
        ("dont", "don't", "don't", "don't"),
        ("couldnt've", "couldn't've", "couldn't've", "couldn't've"),
        ("Im", "im", "im", "im"),
        ("somebody'd", "somebodyd", "somebodyd", "somebodyd"),
        ("The U.S.", "us", "us", "us"),
        ("2.5", "2.5", "2.5", "2.5"),
        ("yes!\nno", "yes no", "yes no", "yes no"),
        ("well-known", "well known", "well known", "well known"),
        ("well - known", "well known", "well known", "well known"),
        # One space beside a mark anywhere drops all of its kind.
        ("a-b - c", "ab c", "ab c", "ab c"),
        ("1,000", "1000", "1000", "1000"),
        ("yes, sir", "yes sir", "yes sir", "yes sir"),
        ("", "", "", ""),
    ],
)
def test_normalisers_agree_with_the_published_scripts(text: str, evalai: str, vqa: str, vlmevalkit: str) -> None:
    assert (normalise_evalai(text), normalise_vqa(text), normalise_vlmevalkit(text)) == (evalai, vqa, vlmevalkit)


def test_only_lmms_takes_several_commas_between_digits_for_a_number() -> None:
    # A number in the text drops all marks; without one, each becomes a space.
    assert normalise_vqa_lmms("1,,2 x/y") == "12 xy"
    assert normalise_vqa("1,,2 x/y") == "1 2 x y"


def test_only_the_first_32_full_stops_go() -> None:
    assert normalise_vqa("x." * 34) == "x" * 32 + "x.x."


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_each_annotator_out_in_turn(matches: int, accuracy: float) -> None:
    assert vqa_accuracy("x", ["x"] * matches + ["y"] * (10 - matches)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "golds", "score"),
    [
        ("abcd", ["abcd"], 1),
        ("ABCD", ["abcd"], 1),
        ("abcx", ["zzzz", "abcd"], 0.75),
        ("abxx", ["abcd"], 0.5),  # 0.5 itself is kept
        ("axxx", ["abcd"], 0),
        ("ab  cd", ["ab cd"], 1),
        ("abcx     ", ["abcd"], 1 - 1 / 9),  # lengths are those of the text as written
        ("", [""], 1),
        ("", ["abc"], 0),
    ],
)
def test_anls_by_hand(answer: str, golds: list[str], score: float) -> None:
    assert anls(answer, golds) == pytest.approx(score)


def test_levenshtein_by_hand() -> None:
    assert levenshtein("kitten", "sitting") == levenshtein("sitting", "kitten") == 3
    assert levenshtein("", "abc") == 3


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("0", "0", True),
        ("0.0", "0", False),
        ("10%", "0.1", True),
        ("10%", "10", False),
        ("1,000", "1000", False),
        ("1950", "2008", True),
        ("nan", "5", False),
        ("inf", "5", False),
        ("5 ", "5", True),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("1.05", "1", False),  # 1.05 - 1 is a little more than 0.05 in floating point
        ("105", "100", True),
        ("106", "100", False),
        ("-95", "-100", True),
    ],
)
def test_relaxed_match_by_hand(answer: str, gold: str, right: bool) -> None:
    assert relaxed_match(answer, gold) is right
