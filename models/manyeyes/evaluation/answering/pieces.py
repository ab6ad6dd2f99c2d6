"""Batches of questions cut into pieces, so that several processes have work to the end.

Most batches go whole to one process: a large batch is what makes a device fast. Only the last ones are cut, as many as
there are processes; else all of them would wait for the one that got the last batch. What is cut follows from the
batches alone, never from who was quicker, so that a run asks the same pieces each time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from manyeyes.runtime.bundle import GeneratedAnswer, Group

# An image costs about as much as so many questions without one; the same figure as where batches are planned.
_QUESTIONS_PER_IMAGE = 8
# So many pieces a process at the end: what the slowest still has to do then is half of its share at most.
_PIECES_PER_PROCESS = 2


@dataclass(frozen=True)
class Piece:
    """Some questions of a batch.

    Attributes:
        batch: Place of the batch, from 0.
        place: Of the piece in its batch, from 0.
        pieces: How many the batch was cut into.
        groups: To be asked together.
        origins: Place in the batch of the group that each one is of; a group may go on in the next piece.
        size: How many groups the batch has.
    """

    batch: int
    place: int
    pieces: int
    groups: tuple[Group, ...]
    origins: tuple[int, ...]
    size: int


def cut_batches(batches: Iterable[Sequence[Group]], *, processes: int) -> Iterator[Piece]:
    """Pieces in the order of the batches; all batches whole but for the last ``processes`` of them.

    Reads ``processes`` batches ahead.

    Args:
        batches: What to ask.
        processes: Which answer side by side; 1 cuts nothing.
    """
    ahead: deque[tuple[int, Sequence[Group]]] = deque()
    for index, groups in enumerate(batches):
        ahead.append((index, groups))
        if len(ahead) > processes:
            yield from _pieces(*ahead.popleft(), parts=1)
    if not ahead:
        return
    parts = 1 if processes == 1 else math.ceil(_PIECES_PER_PROCESS * processes / len(ahead))
    for index, groups in ahead:
        yield from _pieces(index, groups, parts=parts)


def join_pieces(answered: Sequence[tuple[Piece, Sequence[Sequence[GeneratedAnswer]]]]) -> list[list[GeneratedAnswer]]:
    """The answers of a batch, one list a group, from those of its pieces in any order."""
    groups: list[list[GeneratedAnswer]] = [[] for _ in range(answered[0][0].size)]
    for piece, answers in sorted(answered, key=lambda pair: pair[0].place):
        for origin, of_group in zip(piece.origins, answers, strict=True):
            groups[origin] += of_group
    return groups


def _pieces(batch: int, groups: Sequence[Group], *, parts: int) -> Iterator[Piece]:
    cut = _cut(groups, parts)
    for place, piece in enumerate(cut):
        yield Piece(
            batch=batch,
            place=place,
            pieces=len(cut),
            groups=tuple(group for _, group in piece),
            origins=tuple(origin for origin, _ in piece),
            size=len(groups),
        )


def _cut(groups: Sequence[Group], parts: int) -> list[list[tuple[int, Group]]]:
    """At most ``parts`` runs of groups of about the same weight; never none."""
    total = sum(_weight(group) for group in groups)
    if parts == 1 or total == 0:
        return [list(enumerate(groups))]
    shares = [
        (origin, share) for origin, group in enumerate(groups) for share in _share_questions(group, total / parts)
    ]
    total = sum(_weight(share) for _, share in shares)
    runs: dict[int, list[tuple[int, Group]]] = {}
    before = 0
    for origin, share in shares:
        weight = _weight(share)
        # By where its middle lies, so that each run comes close to its part of the total.
        runs.setdefault(min(parts - 1, int((before + weight / 2) / total * parts)), []).append((origin, share))
        before += weight
    return list(runs.values())


def _share_questions(group: Group, most: float) -> list[Group]:
    """A group heavier than ``most`` as several on the same images, where their questions outweigh these."""
    images = _QUESTIONS_PER_IMAGE * len(group.images)
    count = math.ceil(_weight(group) / most)
    # Each share encodes the images again, which has to pay.
    count = min(count, len(group.questions) // max(1, images))
    if count < 2:
        return [group]
    ends = [round(len(group.questions) * part / count) for part in range(count + 1)]
    return [
        dataclasses.replace(group, questions=group.questions[start:end], choices=group.choices[start:end])
        for start, end in itertools.pairwise(ends)
    ]


def _weight(group: Group) -> int:
    """What a group costs, in questions; nothing is done for images without one."""
    return _QUESTIONS_PER_IMAGE * len(group.images) + len(group.questions) if group.questions else 0
