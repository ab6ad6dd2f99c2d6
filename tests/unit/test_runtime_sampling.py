from __future__ import annotations

import math

import numpy as np
import pytest

from manyeyes.errors import RecordError
from manyeyes.runtime.sampling import AnswerText, Sampling, log_probabilities, make_picker


def draws(sampling: Sampling, logits: list[float], *, count: int = 4000) -> np.ndarray:
    pick = make_picker(sampling)
    row = np.array(logits, np.float32)
    return np.bincount([pick(row) for _ in range(count)], minlength=len(logits)) / count


def test_temperature_zero_takes_the_likeliest_token_and_of_equal_ones_the_first() -> None:
    assert make_picker(Sampling())(np.array([0, 3, 3, 1], np.float32)) == 1


def test_tokens_are_drawn_as_often_as_temperature_says() -> None:
    logits = [0.0, math.log(3), -math.inf]
    assert draws(Sampling(temperature=1, seed=1), logits) == pytest.approx([0.25, 0.75, 0], abs=0.03)
    # At half the temperature the odds are squared: 1 to 9.
    assert draws(Sampling(temperature=0.5, seed=1), logits) == pytest.approx([0.1, 0.9, 0], abs=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = [math.log(chance) for chance in (0.1, 0.5, 0.15, 0.25)]
    assert draws(Sampling(temperature=1, top_p=0.75, seed=1), logits) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert draws(Sampling(temperature=1, top_p=0.01, seed=1), logits).tolist() == [0, 1, 0, 0]


def test_nucleus_of_a_large_vocabulary_is_the_one_of_a_full_sort() -> None:
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for top_p in (0.3, 0.9999):  # within the candidates that are sorted first, and beyond them
        chances = np.exp(logits.astype(np.float64))
        chances /= chances.sum()
        order = np.argsort(-chances, kind="stable")
        kept = order[: int(np.searchsorted(chances[order].cumsum(), top_p)) + 1]
        drawn = np.random.default_rng(7)
        pick = make_picker(Sampling(temperature=1, top_p=top_p, seed=7))
        summed = chances[kept].cumsum()
        expected = [int(kept[np.searchsorted(summed, drawn.random() * summed[-1], side="right")]) for _ in range(50)]
        assert [pick(logits) for _ in range(50)] == expected


def test_seed_repeats_the_draws_and_no_seed_does_not() -> None:
    row = np.zeros(1000, np.float32)

    def first(seed: int | None) -> list[int]:
        pick = make_picker(Sampling(temperature=1, seed=seed))
        return [pick(row) for _ in range(8)]

    assert first(3) == first(3)
    assert first(-3) == first(-3)
    assert first(3) != first(4)
    assert first(None) != first(None)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": ("a", "")}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict, named: str) -> None:
    with pytest.raises(RecordError, match=named):
        Sampling(**values)


def test_log_probabilities_add_up_to_one() -> None:
    found = log_probabilities(np.array([1000, 1000 + math.log(3)], np.float32))
    assert np.exp(found) == pytest.approx([0.25, 0.75], rel=1e-4)


def shown(text: str, *, stop: tuple[str, ...] = ()) -> list[str]:
    """What is shown after each byte of a text, and at the end."""
    content = text.encode()
    answer = AnswerText(lambda ids: bytes(ids).decode(errors="replace"), stop=stop)
    parts = []
    for byte in content:
        parts.append(answer.add(byte))
        if answer.stopped:
            break
    return [*parts, answer.finish()]


def test_text_is_shown_without_white_space_around_it_and_without_half_characters() -> None:
    assert shown(" a é ") == ["", "a", "", "", " é", "", ""]


def test_stop_text_and_what_follows_is_never_shown() -> None:
    assert shown("ab--cd", stop=("--",)) == ["a", "b", "", "", ""]
    # Held back while it may be one, and shown once it is not.
    assert shown("a-b-", stop=("--",)) == ["a", "", "-b", "", "-"]
    assert "".join(shown("one STOP", stop=("zzz", "STOP"))) == "one"
