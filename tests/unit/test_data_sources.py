from __future__ import annotations

import pytest

from manyeyes.data.sources_table import LETTER, OPTION, SHORT, SOURCES, add_answer_format, choose_sentence, find_source


@pytest.mark.parametrize("name", ["tallyqa", "TallyQA", "tallyqa_250k.json", "tallyqa_250k", "TALLY-QA.jsonl"])
def test_a_source_is_found_by_the_names_that_mixtures_give_it(name: str) -> None:
    assert find_source(name) is SOURCES["tallyqa"]


def test_a_name_that_no_row_has_finds_none() -> None:
    assert find_source("my-own-photos") is None


def test_no_two_rows_share_a_name() -> None:
    for name, row in SOURCES.items():
        assert all(find_source(known) is row for known in (name, row.title, *row.aliases)), name


def test_a_sentence_about_the_answer_is_put_behind_a_question_once() -> None:
    asked = add_answer_format("How many?\n", SHORT)
    assert asked == f"How many?\n{SHORT}"
    assert add_answer_format(asked, SHORT) == asked
    assert add_answer_format("How many?", "") == "How many?"


@pytest.mark.parametrize(("name", "of_letters"), [("iconqa", LETTER), ("q-instruct", OPTION)])
def test_a_source_that_asks_with_options_and_without_has_a_sentence_for_each(name: str, of_letters: str) -> None:
    row = SOURCES[name]
    for answer in ("B", "(B)", "B.", "B. Slightly blurred", "Answer: B"):
        assert choose_sentence(answer, row.answer_format, row.letter_format) == of_letters, answer
    for answer in ("7", "A dog", "yes", "Blurred", ""):
        assert choose_sentence(answer, row.answer_format, row.letter_format) == SHORT, answer
    assert choose_sentence("B", SHORT, "") == SHORT
