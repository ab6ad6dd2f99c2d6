from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from manyeyes.errors import RecordError
from manyeyes.processor import ManyEyesProcessor
from manyeyes.runtime.preprocess import ImageTransform
from manyeyes.tokenizer_files import load_tokenizer
from tests.model_toys import toy_images, write_tokenizer

IMAGE_ID = 3
GREY = (0.5, 0.5, 0.5)
TWO_TURNS = [("human", "<image>\nwhat colour?"), ("gpt", "red"), ("human", "is it a circle?"), ("gpt", "no")]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ManyEyesProcessor:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return ManyEyesProcessor(
        load_tokenizer(folder),
        transforms={
            "coarse": ImageTransform(size=8, mean=GREY, std=GREY).as_dict(),
            "fine": ImageTransform(size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).as_dict(),
        },
        template="vicuna_v1",
        system="",
        num_image_tokens=4,
        image_token_id=IMAGE_ID,
        max_length=128,
    )


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_only_answers_and_their_ends_are_labelled(processor: ManyEyesProcessor) -> None:
    batch = processor(images=toy_images(1), conversations=[TWO_TURNS])
    counted = batch["labels"][0] != -100
    assert torch.equal(batch["labels"][0][counted], batch["input_ids"][0][counted])
    assert processor.tokenizer.decode(batch["input_ids"][0][counted]) == " red</s> no</s>"


def test_spans_point_at_the_visual_tokens(processor: ManyEyesProcessor) -> None:
    several = [("human", "<image>\n<image>\nthe same?"), ("gpt", "no")]
    batch = processor(images=toy_images(3), conversations=[several, [("human", "hello"), ("gpt", "no")], TWO_TURNS])
    assert batch["image_spans"][:, [0, 2, 3]].tolist() == [[0, 4, 0], [0, 4, 1], [2, 4, 2]]
    places = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, start, length, _ in batch["image_spans"].tolist():
        places[row, start : start + length] = True
    assert torch.equal(places, batch["input_ids"] == IMAGE_ID)


def test_questions_are_padded_on_the_left_and_spans_move_along(processor: ManyEyesProcessor) -> None:
    batch = processor(images=[[image] for image in toy_images(2)], text=["what is the colour of it?", "red?"])
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["attention_mask"][1, 0] == 0
    assert "labels" not in batch
    for row, start, length, _ in batch["image_spans"].tolist():
        assert (batch["input_ids"][row, start : start + length] == IMAGE_ID).all()


def test_text_alone_makes_no_pixels(processor: ManyEyesProcessor) -> None:
    batch = processor(text="is there a circle?")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<s>USER: is there a circle? ASSISTANT:"


def test_one_image_may_stand_alone_or_in_lists(processor: ManyEyesProcessor) -> None:
    [image] = toy_images(1)
    alone = processor(images=image, text="what?")
    for images in ([image], [[image]], png(image), [png(image)]):
        again = processor(images=images, text="what?")
        assert all(torch.equal(again[key], alone[key]) for key in alone)


def test_every_encoder_gets_its_own_pixels(processor: ManyEyesProcessor) -> None:
    white = np.full((16, 16, 3), 255, np.uint8)
    pixels = processor.pixel_values([white])
    assert pixels["coarse"].shape == (1, 3, 8, 8)
    assert pixels["fine"].shape == (1, 3, 16, 16)
    torch.testing.assert_close(pixels["coarse"], torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(pixels["fine"], torch.ones(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("images", "conversations"),
    [
        ([], [TWO_TURNS]),
        (toy_images(2), [TWO_TURNS]),
        ([toy_images(2), []], [TWO_TURNS, TWO_TURNS]),
    ],
    ids=["no image", "one too many", "in the wrong conversation"],
)
def test_images_without_placeholder_are_refused(
    processor: ManyEyesProcessor, images: list, conversations: list
) -> None:
    with pytest.raises(RecordError, match="one placeholder per image"):
        processor(images=images, conversations=conversations)


def test_several_questions_need_their_own_lists_of_images(processor: ManyEyesProcessor) -> None:
    with pytest.raises(RecordError, match="2 questions and images for 3"):
        processor(images=toy_images(3), text=["a?", "b?"])


def test_broken_image_is_refused(processor: ManyEyesProcessor) -> None:
    with pytest.raises(RecordError):
        processor(images=png(toy_images(1)[0])[:100], text="what?")


def test_conversation_above_the_maximum_length_is_refused(processor: ManyEyesProcessor) -> None:
    with pytest.raises(RecordError, match="at most 128 are allowed"):
        processor(text="colour " * 200)


def test_text_and_conversations_together_are_refused(processor: ManyEyesProcessor) -> None:
    with pytest.raises(ValueError, match="either text or conversations"):
        processor(text="a?", conversations=[TWO_TURNS])


def test_prefix_and_branch_make_up_the_conversation(processor: ManyEyesProcessor) -> None:
    group = processor.encode_group([("what colour?", "red"), ("a circle?", None)], num_images=2)
    whole = processor.encode([("human", "<image>\n<image>\nwhat colour?"), ("gpt", "red")], num_images=2)
    assert [*group.prefix_ids, *group.branches[0].input_ids] == whole.input_ids
    assert group.prefix_ids[-1] == IMAGE_ID
    assert set(group.branches[1].labels) == {-100}


def test_groups_are_padded_towards_their_meeting_point(processor: ManyEyesProcessor) -> None:
    pictured = processor.encode_group([("what?", "red"), ("a red circle?", "no")], num_images=1)
    plain = processor.encode_group([("what?", "red")], num_images=0)
    batch = processor.pad_groups([plain, pictured])
    assert batch["rows"].tolist() == [0, 1, 1]
    assert plain.prefix_ids == ()
    assert batch["prefix_mask"].tolist() == [[0] * len(pictured.prefix_ids), [1] * len(pictured.prefix_ids)]
    [[row, start, length, image]] = batch["image_spans"].tolist()
    assert (row, start + length, image) == (1, len(pictured.prefix_ids), 0)
    assert batch["attention_mask"][:, 0].tolist() == [1, 1, 1]
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape


def test_saved_processor_makes_the_same_batch(processor: ManyEyesProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = ManyEyesProcessor.from_pretrained(tmp_path)
    first = processor(images=toy_images(1), conversations=[TWO_TURNS])
    second = again(images=toy_images(1), conversations=[TWO_TURNS])
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert again.stop_token_ids == processor.stop_token_ids == [2]


def test_answers_are_decoded_without_special_tokens(processor: ManyEyesProcessor) -> None:
    ids = processor.tokenizer(" red", add_special_tokens=False)["input_ids"]
    assert processor.decode_answer([*ids, 2]) == "red"


def test_conversation_that_is_too_long_is_refused_or_loses_its_end(processor: ManyEyesProcessor) -> None:
    turns = [*TWO_TURNS, ("human", "what else? " * 60), ("gpt", "nothing")]
    with pytest.raises(RecordError, match="at most 128 are allowed"):
        processor.encode(turns, num_images=1)
    whole = processor.encode(TWO_TURNS, num_images=1)
    cut = processor.encode(turns, num_images=1, too_long="cut")
    assert len(cut.input_ids) == len(cut.supervised) == 128
    assert cut.input_ids[: len(whole.input_ids)] == whole.input_ids
    assert sum(cut.supervised) == sum(whole.supervised)
    assert cut.image_spans == whole.image_spans


def test_conversation_is_not_cut_within_an_image(processor: ManyEyesProcessor) -> None:
    turns = [("human", "look well " * 60 + "<image>"), ("gpt", "yes")]
    with pytest.raises(RecordError, match="at most 128 are allowed"):
        processor.encode(turns, num_images=1, too_long="cut")
