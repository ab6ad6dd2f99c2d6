"""Vectors worked out by hand from the published parsers, and checked against lmms-eval 0.7.3 and VLMEvalKit."""

from __future__ import annotations

import pytest

from manyeyes.evaluation.benchmarks import option_letters as parsers

ANIMALS = {"A": "dog", "B": "cat", "C": "red fox", "D": "owl"}


@pytest.mark.parametrize(
    ("response", "official", "lmms"),
    [
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(B)", "B", "B"),
        ("(A) is wrong, (C) is right", "C", "C"),
        ("(C) because (A)", "A", "A"),
        ("DNA strand", None, "A"),  # lmms asks for no space before the letter
        ("B. dog", None, "B"),  # five words or fewer: MMMU answers at random, lmms takes "B."
        ("A or B and no other one", "B", "B"),
        ("the animal that I see is an OWL", "D", "D"),
        ("it is the owl", None, None),  # too short for the options' texts
        ("first a dog and then a cat I think", "B", "B"),  # the last text
        ("b", None, None),
        ("", None, None),
    ],
)
def test_mmmu_parsers(response: str, official: str | None, lmms: str | None) -> None:
    assert parsers.mmmu_official(response, ANIMALS) == official
    assert parsers.mmmu_lmms(response, ANIMALS) == lmms


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("Answer: **B**", "B"),
        ("A or B", None),  # two letters, and no text
        ("B is the one that I would choose here", None),  # too far from the end, and "dog" etc. do not occur
        ("The answer is **B** because it has fur and ears", "B"),
        ("The answer is B, not A.", "B"),
        ("The correct ANSWER  is *b because it has fur and ears", "B"),
        ("A or B? The answer is C. No, the answer is D.", "C"),  # the first
        ("the answer is a cat", "A"),  # an article is read as a letter
        ("The answer is (B), not (A).", None),  # only asterisks may stand before the letter
        ("The answer is E, and neither B nor A.", None),
        ("a cat", "B"),
        ("a cat and a dog", None),
        ("cat " + "!" * 40, None),  # more than twice as long as all options
        ("Z", "Z"),
        ("Sorry, I can't help with images of people yet. B", "Z"),
        ("Failed to obtain answer via API", None),
        ("b", None),
        ("", None),
    ],
)
def test_vlmevalkit_parser(response: str, letter: str | None) -> None:
    assert parsers.vlmevalkit(response, ANIMALS) == letter


def test_vlmevalkit_reads_no_letter_beyond_d_after_the_answer_is() -> None:
    options = parsers.lettered(["ant", "bee", "cow", "dog", "eel"])
    assert parsers.vlmevalkit("The answer is E, not A, as B would be wrong.", options) is None
    assert parsers.vlmevalkit("The answer is D, not A, as B would be wrong.", options) == "D"
    assert parsers.vlmevalkit("The answer is D, not A.", parsers.lettered(["ant", "bee"])) == "A"


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B).", "B"),
        ("E", "E"),  # no option, but a letter
        ("I say B because", "B"),
        ("A bird sits here B", None),  # "A" among more than three words
        ("A bird sits here B.", "B"),
        ("A bird", "A"),
        ("It is an Owl", "D"),
        ("cat or dog", None),
        ("B C", None),
    ],
)
def test_mmbench_parser(response: str, letter: str | None) -> None:
    assert parsers.mmbench(response, ANIMALS) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B. cat", "B"),
        ("The correct answer is (B).", "B"),
        ("(A) no, (B) yes", "B"),
        ("A is wrong. The answer is C", "A"),  # the start is stronger than the end
        ("I looked at A. and then chose B", "B"),  # the end is stronger than "X."
        ("The answer is probably C or D in my view", "D"),  # every letter after the phrase; the last
        ("XBX", "B"),
        ("b", None),
        (" ", None),
    ],
)
def test_ranked_parser(response: str, letter: str | None) -> None:
    assert parsers.ranked(response, tuple("ABCD")) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "b"),
        ("(C)", "c"),
        ("B) foo", "b"),
        ("The answer is C.", "c"),
        ("Answer: (D)", "d"),
        ("so the answer is: B", ":"),  # "answer is" is cut before "answer is:" is looked for
        ("Probably B", "p"),
        ("", ""),
    ],
)
def test_cambrian_takes_the_first_character_after_the_last_announcement(response: str, letter: str) -> None:
    assert parsers.cambrian_letter(response) == letter


def test_only_some_of_cambrians_scripts_strip_a_colon() -> None:
    assert parsers.cambrian_choice("cat:") == "cat"
    assert parsers.cambrian_choice("cat:", trailing=".") == "cat:"


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B. cat", "B"),
        ("B.", None),  # a space has to follow
        (" B", None),
        ("The answer is B.", "B"),
        ("The answer is B", None),  # some character has to follow
        ("The answer is A. The answer is B.", None),
        ("F", None),
        ("(B)", None),
    ],
)
def test_llava_scienceqa_parser(response: str, letter: str | None) -> None:
    assert parsers.llava_scienceqa(response) == letter


@pytest.mark.parametrize(
    ("response", "letter"), [("(b) x", "B"), ("  C.", "C"), ("The answer is C.", "T"), ("3", None), ("", None)]
)
def test_cv_bench_parser_of_lmms_takes_the_first_letter_of_anything(response: str, letter: str | None) -> None:
    assert parsers.cv_bench_lmms(response) == letter


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("(a)", "A"),
        ("B. yes", "B"),
        ("The answer is b", "B"),
        ("Option A", "A"),
        ("a dog", "A"),
        ("Both", "B"),
        ("", None),
    ],
)
def test_mmvp_parser_of_lmms(response: str, letter: str | None) -> None:
    assert parsers.mmvp_lmms(response) == letter
