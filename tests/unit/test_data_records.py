from __future__ import annotations

import dataclasses
import hashlib

import pytest
from data_samples import make_image, make_record

from manyeyes.data.records import ImageFile, Record, Turn, check_record, read_image_file
from manyeyes.errors import RecordError

ASK, ANSWER = Turn("human", "what is it?"), Turn("gpt", "a circle")


def with_turns(*turns: Turn) -> Record:
    return dataclasses.replace(make_record(num_images=0), turns=turns)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_a_whole_record_passes(num_images: int) -> None:
    check_record(make_record(num_images=num_images, pairs=3))


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (with_turns(), "no turns"),
        (with_turns(ASK, ASK, ANSWER), "turns 0 and 1 are both from human"),
        (with_turns(ASK, ANSWER, ANSWER), "turns 1 and 2 are both from gpt"),
        (with_turns(ANSWER, ASK), "starts with gpt"),
        (with_turns(ASK, ANSWER, ASK), "ends with human"),
        (with_turns(ASK, Turn("gpt", "  ")), "turn 1 (gpt) is empty"),
        (with_turns(Turn("user", "hello"), ANSWER), 'from "user"'),  # type: ignore[arg-type]
        (with_turns(Turn("human", "<image>\nwhat?"), ANSWER), "1 <image> and 0 images"),
        (with_turns(ASK, Turn("gpt", "see <image>")), "turn 1 (gpt) holds <image>"),
        (dataclasses.replace(make_record(), turns=(ASK, ANSWER)), "0 <image> and 1 images"),
        (dataclasses.replace(make_record(), id=""), "it has no id"),
        (dataclasses.replace(make_record(), id=" \u2028"), "it has no id"),
        (with_turns(ASK, Turn("gpt", "Yes \ud83d")), r"turn 1 has '\ud83d', half of a surrogate pair"),
        (dataclasses.replace(make_record(), source="\udc80"), r"source has '\udc80', half of a surrogate pair"),
    ],
)
def test_a_bad_conversation_is_refused_with_its_reason(record: Record, found: str) -> None:
    with pytest.raises(RecordError) as caught:
        check_record(record)
    assert found in caught.value.found
    assert record.id in caught.value.found


def test_half_a_surrogate_pair_in_an_id_or_a_file_name_is_refused_in_text_that_can_be_printed() -> None:
    odd = dataclasses.replace(make_image(), path="caf\udce9.png")
    for record in (dataclasses.replace(make_record(), id="a\ud83d"), dataclasses.replace(make_record(), images=(odd,))):
        with pytest.raises(RecordError, match="half of a surrogate pair") as caught:
            check_record(record)
        str(caught.value).encode()


def with_image(image: ImageFile) -> Record:
    return dataclasses.replace(make_record(), images=(image,))


def test_a_truncated_image_is_refused() -> None:
    whole = make_image(3, size=(64, 64))
    cut = whole.data[: len(whole.data) // 2]
    image = dataclasses.replace(whole, data=cut, sha256=hashlib.sha256(cut).hexdigest())
    with pytest.raises(RecordError, match="image 0 cannot be decoded"):
        check_record(with_image(image))


def test_changed_image_bytes_are_noticed() -> None:
    image = dataclasses.replace(make_image(3), data=make_image(4).data)
    with pytest.raises(RecordError, match="image 0 has sha256"):
        check_record(with_image(image))


def test_a_wrong_size_is_noticed() -> None:
    image = dataclasses.replace(make_image(3, size=(8, 6)), width=6, height=8)
    with pytest.raises(RecordError, match=r"8x6 pixels; 6x8 pixels"):
        check_record(with_image(image))


def test_reading_an_image_file_gives_its_facts() -> None:
    data = make_image(5, size=(7, 4)).data
    image = read_image_file(data, path="five.png")
    assert (image.width, image.height, image.path) == (7, 4, "five.png")
    assert image.sha256 == hashlib.sha256(data).hexdigest()


def test_reading_something_else_names_the_file() -> None:
    with pytest.raises(RecordError, match=r"notes\.txt \(5 bytes\)"):
        read_image_file(b"hello", path="notes.txt")
