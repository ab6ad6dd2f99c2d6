"""Cutting batches for several processes, and joining what they answer."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from manyeyes.evaluation.answering.processes import Piece, cut_batches, join_pieces
from manyeyes.runtime.bundle import GeneratedAnswer, Group


def make_group(name: str, *, questions: int, images: int = 1) -> Group:
    return Group(
        images=tuple(f"{name}{image}".encode() for image in range(images)),
        questions=tuple(f"{name} {question}" for question in range(questions)),
    )


def answer(piece: Piece) -> list[list[GeneratedAnswer]]:
    return [[GeneratedAnswer(question, ()) for question in group.questions] for group in piece.groups]


def questions_of(piece: Piece) -> list[str]:
    return [question for group in piece.groups for question in group.questions]


def test_one_process_gets_whole_batches() -> None:
    batches = [[make_group("a", questions=30), make_group("b", questions=1)], [make_group("c", questions=2)]]
    pieces = list(cut_batches(batches, processes=1))
    assert [list(piece.groups) for piece in pieces] == batches
    assert [(piece.batch, piece.place, piece.pieces) for piece in pieces] == [(0, 0, 1), (1, 0, 1)]


def test_only_the_last_batches_are_cut_each_in_two() -> None:
    batches = [[make_group(f"{batch}-{image}", questions=2) for image in range(4)] for batch in range(5)]
    pieces = list(cut_batches(batches, processes=2))
    assert [piece.pieces for piece in pieces] == [1, 1, 1, 2, 2, 2, 2]
    assert [len(piece.groups) for piece in pieces] == [4, 4, 4, 2, 2, 2, 2]


def test_a_single_batch_gives_every_process_two_pieces() -> None:
    pieces = list(cut_batches([[make_group(str(image), questions=1) for image in range(32)]], processes=4))
    assert [len(piece.groups) for piece in pieces] == [4] * 8


def test_questions_about_nothing_are_cut_though_they_are_one_group() -> None:
    (batch,) = [[make_group("a", questions=100, images=0)]]
    pieces = list(cut_batches([batch], processes=2))
    assert [len(questions_of(piece)) for piece in pieces] == [25] * 4
    assert [question for piece in pieces for question in questions_of(piece)] == list(batch[0].questions)


def test_an_image_is_only_shown_twice_where_its_questions_outweigh_it() -> None:
    few = list(cut_batches([[make_group("a", questions=8)]], processes=4))
    many = list(cut_batches([[make_group("a", questions=80)]], processes=4))
    assert len(few) == 1
    assert [len(questions_of(piece)) for piece in many] == [10] * 8
    assert all(piece.groups[0].images == (b"a0",) for piece in many)


def test_choices_go_with_their_questions() -> None:
    group = Group((), tuple(str(number) for number in range(8)), tuple((str(number), "x") for number in range(8)))
    pieces = list(cut_batches([[group]], processes=2))
    assert [part.choices for piece in pieces for part in piece.groups] == [
        tuple((question, "x") for question in questions_of(piece)) for piece in pieces
    ]


def test_batches_are_read_a_few_ahead_and_not_to_the_end() -> None:
    read = []

    def batches() -> Iterator[list[Group]]:
        for batch in range(100):
            read.append(batch)
            yield [make_group(str(batch), questions=1)]

    next(cut_batches(batches(), processes=3))
    assert read == [0, 1, 2, 3]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_answers_of_pieces_in_any_order_are_those_of_the_batches(processes: int) -> None:
    rng = random.Random(processes)
    batches = [
        [
            make_group(f"{batch}-{group}", questions=rng.choice([0, 1, 3, 40]), images=rng.choice([0, 1, 2]))
            for group in range(rng.choice([1, 2, 7]))
        ]
        for batch in range(6)
    ]
    pieces = list(cut_batches(batches, processes=processes))
    rng.shuffle(pieces)
    for place, batch in enumerate(batches):
        joined = join_pieces([(piece, answer(piece)) for piece in pieces if piece.batch == place])
        assert [tuple(answer.text for answer in group) for group in joined] == [group.questions for group in batch]


def test_batches_without_questions_are_whole_and_get_no_answers() -> None:
    batches = [[make_group("a", questions=0)], []]
    pieces = list(cut_batches(batches, processes=4))
    assert [piece.batch for piece in pieces] == [0, 1]
    assert join_pieces([(pieces[0], answer(pieces[0]))]) == [[]]
    assert join_pieces([(pieces[1], answer(pieces[1]))]) == []
