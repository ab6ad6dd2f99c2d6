from __future__ import annotations

from collections import Counter

import pytest
from data_samples import make_record, make_snapshot

from manyeyes.data.mixture import BRIEF_DESCRIPTION, Mixture, ask_briefly
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import RecordError
from manyeyes.recipe import MixturePart, load_recipe


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    captions = [make_record(number, pairs=1) for number in range(220)]
    talks = [make_record(number, pairs=2, prefix="talk") for number in range(5)]
    return make_snapshot(tmp_path_factory.mktemp("questions"), {"captions": captions, "talks": talks})


def questions(mixture: Mixture, epoch: int) -> dict[str, str]:
    samples = [mixture.sample(epoch, index) for index in range(len(mixture))]
    return {sample.record.id: sample.conversations()[0][0].text for sample in samples}


def test_captions_are_asked_for_in_eleven_ways(snapshot: Snapshot) -> None:
    mixture = Mixture([MixturePart(dataset="toy-captions", questions="brief")], snapshot, seed=1)
    first = questions(mixture, 0)
    assert {text.removeprefix("<image>\n") for text in first.values()} == set(BRIEF_DESCRIPTION)
    assert all(text.startswith("<image>\n") for text in first.values())
    # 20 of each are expected; fewer than 5 has a chance below one in a hundred thousand.
    assert min(Counter(first.values()).values()) >= 5


def test_questions_are_redrawn_each_epoch_and_the_same_again(snapshot: Snapshot) -> None:
    part = MixturePart(dataset="toy-captions", questions="brief")
    mixture, again = Mixture([part], snapshot, seed=1), Mixture([part], snapshot, seed=1)
    assert questions(mixture, 0) == questions(again, 0)
    second = questions(mixture, 1)
    changed = sum(second[name] != text for name, text in questions(mixture, 0).items())
    assert changed > 150


def test_records_ask_for_themselves_by_default(snapshot: Snapshot) -> None:
    part = MixturePart(dataset="toy-captions")
    assert part.questions == "record"
    plain = Mixture([part], snapshot, seed=1)
    brief = Mixture([MixturePart(dataset="toy-captions", questions="brief")], snapshot, seed=1)
    record = plain.sample(0, 7).record
    assert record.turns[0].text.removeprefix("<image>\n") not in BRIEF_DESCRIPTION
    # Order, answers and images are those of the same mixture without drawn questions.
    for index in range(len(plain)):
        one, other = plain.sample(0, index), brief.sample(0, index)
        assert (one.record.id, one.record.images, one.record.turns[1]) == (
            other.record.id,
            other.record.images,
            other.record.turns[1],
        )


def test_recipe_tiny_asks_what_its_records_ask() -> None:
    parts = [part for _, stage in load_recipe("tiny").present_stages() for part in stage.mixture]
    assert [part.questions for part in parts] == ["record"] * len(parts)


def test_record_with_several_questions_is_refused_by_name(snapshot: Snapshot) -> None:
    mixture = Mixture([MixturePart(dataset="toy-talks", questions="brief")], snapshot, seed=1)
    with pytest.raises(RecordError, match=r"4 turns.*questions: brief"):
        mixture.sample(0, 0)


def test_a_caption_without_image_is_asked_for_without_placeholder() -> None:
    asked = ask_briefly(make_record(0, pairs=1, num_images=0), draw=11)
    assert asked.turns[0].text == BRIEF_DESCRIPTION[0]


def test_no_question_stands_twice() -> None:
    assert len(BRIEF_DESCRIPTION) == len(set(BRIEF_DESCRIPTION)) == 11
