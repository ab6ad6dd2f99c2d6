"""Which samples of a step share a row: nothing is lost, nothing is over the limits, no process waits for another."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes.errors import RecipeError
from manyeyes.recipe import PackingSpec, change_recipe, load_recipe
from manyeyes.training.packing import SampleSize, packed_micro_batches, share_out

SIZES = st.lists(st.builds(SampleSize, st.integers(1, 300), st.integers(0, 4)), min_size=1, max_size=40)


@given(sizes=SIZES, tokens=st.integers(50, 500), images=st.none() | st.integers(1, 8), ranks=st.integers(1, 5))
def test_every_sample_stands_in_one_micro_batch_within_the_limits(
    sizes: list[SampleSize], tokens: int, images: int | None, ranks: int
) -> None:
    shares = share_out(sizes, PackingSpec(tokens=tokens, images=images), num_ranks=ranks)
    assert len(shares) == ranks
    assert sorted(place for share in shares for own in share for place in own) == list(range(len(sizes)))
    for own in (own for share in shares for own in share):
        assert own == sorted(own)
        # One that is larger than a micro-batch stands alone.
        assert len(own) == 1 or sum(sizes[place].tokens for place in own) <= tokens
        assert images is None or len(own) == 1 or sum(sizes[place].images for place in own) <= images
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_smallest_number_of_rounds_that_holds_all_is_taken() -> None:
    sizes = [SampleSize(60, 1), SampleSize(40, 1), SampleSize(50, 1), SampleSize(50, 1)]
    assert share_out(sizes, PackingSpec(tokens=100), num_ranks=1) == [[[0, 1], [2, 3]]]
    assert share_out(sizes, PackingSpec(tokens=100, images=1), num_ranks=2) == [[[0], [1]], [[2], [3]]]


def test_processes_get_about_as_much_of_a_long_tailed_mix() -> None:
    """Lengths as of LLaVA-665k: taken in order, one of eight processes has a third more than the average."""
    generator = random.Random(3)
    sizes = [SampleSize(int(600 + generator.lognormvariate(5, 0.9)), 1) for _ in range(128)]
    shares = share_out(sizes, PackingSpec(tokens=4096), num_ranks=8)
    loads = [sum(sizes[place].tokens for own in share for place in own) for share in shares]
    in_order = [sum(size.tokens for size in sizes[rank::8]) for rank in range(8)]
    mean = sum(loads) / 8
    assert max(loads) / mean < 1.03
    assert max(loads) < max(in_order)
    # Micro-batches of one round run at the same time.
    assert len({len(share) for share in shares}) == 1
    for at_once in zip(*shares, strict=True):
        filled = [sum(sizes[place].tokens for place in own) for own in at_once]
        assert max(filled) / min(filled) < 1.15


def test_a_step_is_the_same_samples_for_any_number_of_processes() -> None:
    sizes = {position: SampleSize(10 + position % 7, 1) for position in range(100)}
    for ranks in (1, 2, 3):
        for step in range(4):
            own = [
                position
                for rank in range(ranks)
                for micro_batch in packed_micro_batches(
                    step,
                    measure=sizes.__getitem__,
                    packing=PackingSpec(tokens=40),
                    batch_size=30,
                    num_samples=100,
                    rank=rank,
                    num_ranks=ranks,
                )
                for position in micro_batch
            ]
            assert sorted(own) == list(range(step * 30, min(100, step * 30 + 30)))


def test_recipe_with_both_kinds_of_micro_batch_is_refused() -> None:
    recipe = load_recipe("tiny")
    with pytest.raises(RecipeError, match="set micro_batch_size to null, or leave packing out"):
        change_recipe(recipe, {"stages.sft.packing": {"tokens": 4096}, "stages.sft.micro_batch_size": 4})


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"tokens": 8, "images": 0}, {"images": 4}, {"tokens": 8, "rows": 2}])
def test_packing_that_says_nothing_usable_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"stages\.sft\.packing"):
        change_recipe(load_recipe("tiny"), {"stages.sft.packing": wrong})
