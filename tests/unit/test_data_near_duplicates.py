"""Near duplicates: the same as looking at every pair, for many in one bucket too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from manyeyes.data.curation import duplicates
from manyeyes.data.curation.duplicates import Images, Looks, find_near
from manyeyes.data.curation.recipe import NearSpec

SPEC = NearSpec(radius=7, max_difference=16)


class Pictures(Images):
    """Thumbnails of one image each, of which the blocks have one colour."""

    def __init__(self, colours: NDArray[np.uint8]) -> None:
        self.colours = colours
        self.asked = 0

    @contextmanager
    def thumbnails(self, samples: NDArray[np.int64], *, max_difference: float) -> Iterator[Looks]:
        samples = np.sort(samples)
        self.asked = len(samples)
        colours = self.colours[samples]
        yield Looks(samples, np.arange(len(samples) + 1), colours, colours.astype(np.int16), max_difference)


def look_at_every_pair(
    hashes: NDArray[np.uint64], keys: NDArray[np.uint64], rank: NDArray[np.int64], colours: NDArray[np.uint8]
) -> dict[int, int]:
    twins: dict[int, int] = {}
    stay: list[int] = []
    for sample in np.argsort(rank).tolist():
        for other in stay:
            near = keys[sample] == keys[other] and int(hashes[sample] ^ hashes[other]).bit_count() <= SPEC.radius
            if near and np.abs(colours[sample].astype(int) - colours[other]).mean() <= SPEC.max_difference:
                twins[sample] = other
                break
        else:
            stay.append(sample)
    return twins


def found_twins(pictures: Pictures, hashes: NDArray[np.uint64], keys: NDArray[np.uint64] | None, rank: NDArray) -> dict:
    gone, stays = find_near(np.arange(len(rank)), hashes=hashes, keys=keys, rank=rank, spec=SPEC, images=pictures)
    return dict(zip(gone.tolist(), stays.tolist(), strict=True))


@pytest.mark.parametrize("together", [4096, 16])
@pytest.mark.parametrize("with_keys", [False, True])
def test_what_is_left_out_is_what_comparing_every_pair_leaves_out(
    together: int, with_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_TOGETHER", together)  # 16: in many rounds, and with an index
    draw = np.random.default_rng(3)
    centres = draw.integers(0, 2**63, 6).astype(np.uint64)
    flips = np.array([sum(1 << int(bit) for bit in draw.integers(0, 64, draw.integers(0, 7))) for _ in range(300)])
    hashes = centres[draw.integers(0, 6, 300)] ^ flips.astype(np.uint64)
    colours = (40 * draw.integers(0, 6, (300, 1)) + draw.integers(0, 30, (300, 48))).astype(np.uint8)
    keys = draw.integers(0, 3, 300).astype(np.uint64)
    rank = draw.permutation(300)
    expected = look_at_every_pair(hashes, keys if with_keys else np.zeros_like(keys), rank, colours)
    assert 100 < len(expected) < 300
    assert found_twins(Pictures(colours), hashes, keys if with_keys else None, rank) == expected


def test_many_that_are_alike_are_compared_with_one() -> None:
    pictures = Pictures(np.full((20_000, 48), 7, np.uint8))
    twins = found_twins(pictures, np.full(20_000, 5, np.uint64), None, np.arange(20_000)[::-1])
    assert set(twins) == set(range(19_999))
    assert set(twins.values()) == {19_999}


def test_a_sample_without_a_neighbour_is_not_looked_at() -> None:
    pictures = Pictures(np.zeros((4, 48), np.uint8))
    hashes = np.array([0, 1, 2**40 - 1, 0], np.uint64)
    assert found_twins(pictures, hashes, np.array([1, 1, 1, 2], np.uint64), np.arange(4)) == {1: 0}
    assert pictures.asked == 2
    assert found_twins(pictures, hashes[:0], None, np.arange(0)) == {}


def test_of_one_hash_the_first_that_stay_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "ONE_HASH", 2)
    colours = np.repeat(np.array([0, 100, 200, 200, 100, 0], np.uint8), 48).reshape(6, 48)
    for together in (4096, 2):
        monkeypatch.setattr(duplicates, "_TOGETHER", together)
        assert found_twins(Pictures(colours), np.zeros(6, np.uint64), None, np.arange(6)) == {4: 1, 5: 0}
