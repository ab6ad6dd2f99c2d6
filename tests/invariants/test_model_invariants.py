"""Two ways to the same figure: padding, batching, prefixes, mixtures and freezing change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from manyeyes.errors import RecipeError, ShapeError
from manyeyes.model import BranchBatch, ManyEyesForConditionalGeneration, ManyEyesProcessor, build_model
from manyeyes.recipe import ModelSpec
from tests.model_toys import toy_images, toy_spec, write_language_model

Parts = tuple[ManyEyesForConditionalGeneration, ManyEyesProcessor]

CONVERSATIONS = [
    [("human", "<image>\n<image>\nwhat colour?"), ("gpt", "red"), ("human", "is it a circle?"), ("gpt", "no")],
    [("human", "is there a shape?"), ("gpt", "yes")],
    [("human", "<image>\nis the circle red, or what colour is it?"), ("gpt", "red red red")],
]
GROUPS: list[tuple[int, list[tuple[str, str]]]] = [
    (2, [("what colour?", "red"), ("is there a red circle in it?", "no"), ("a shape?", "yes")]),
    (0, [("is it red?", "yes"), ("what?", "red")]),
    (1, [("what colour is the circle?", "red")]),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return toy_spec(write_language_model(tmp_path_factory.mktemp("language-model")))


@pytest.fixture(scope="module")
def build(spec: ModelSpec) -> Callable[[], Parts]:
    return lambda: build_model(spec, snapshot_path=None, seed=1)


@pytest.fixture(scope="module")
def parts(build: Callable[[], Parts]) -> Parts:
    return build()


def prefill(parts: Parts, groups: list[tuple[int, list[tuple[str, str | None]]]]) -> BranchBatch:
    model, processor = parts
    batch = processor.pad_groups([processor.encode_group(pairs, num_images=count) for count, pairs in groups])
    num_images = sum(count for count, _ in groups)
    visual_tokens = None
    if num_images:
        visual_tokens = model.encode_images(processor.pixel_values(toy_images(num_images)))
    cache = model.prefill_prefix(
        batch["prefix_ids"], batch["prefix_mask"], visual_tokens=visual_tokens, image_spans=batch["image_spans"]
    )
    return BranchBatch(
        cache, batch["prefix_mask"], batch["rows"], batch["input_ids"], batch["attention_mask"], batch["labels"]
    )


def separate_conversations() -> tuple[list[list], list[list[tuple[str, str]]]]:
    """Every branch of GROUPS as a conversation of its own, and its images."""
    images, conversations, first = [], [], 0
    pictures = toy_images(sum(count for count, _ in GROUPS))
    for count, pairs in GROUPS:
        for question, answer in pairs:
            images.append(pictures[first : first + count])
            conversations.append([("human", "<image>\n" * count + question), ("gpt", answer)])
        first += count
    return images, conversations


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_change_no_logits(side: str, parts: Parts) -> None:
    model, processor = parts
    images = [toy_images(2), [], toy_images(1, seed=1)]
    batch = processor(images=images, conversations=CONVERSATIONS, padding_side=side)
    del batch["labels"]
    together = model(**batch).logits
    for row, (own, conversation) in enumerate(zip(images, CONVERSATIONS, strict=True)):
        alone = processor(images=[own] if own else None, conversations=[conversation])
        del alone["labels"]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], model(**alone).logits[0], rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_over_all_supervised_tokens_of_full_logits(parts: Parts) -> None:
    model, processor = parts
    batch = processor(images=toy_images(3), conversations=CONVERSATIONS)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    assert output.num_supervised == (labels != -100).sum()
    assert output.logits is None


def test_batch_without_any_answer_has_loss_zero(parts: Parts) -> None:
    model, processor = parts
    batch = processor(images=toy_images(3), conversations=CONVERSATIONS)
    batch["labels"].fill_(-100)
    output = model(**batch)
    assert output.loss.item() == 0.0
    output.loss.backward()


def test_branches_give_loss_and_gradients_of_separate_conversations(build: Callable[[], Parts]) -> None:
    first, second = build(), build()
    batch = prefill(first, GROUPS)
    shared = first[0].train().forward_branches(batch)
    shared.loss.backward()
    images, conversations = separate_conversations()
    whole = second[1](images=images, conversations=conversations)
    separate = second[0].train()(**whole, num_items_in_batch=1)
    separate.loss.backward()
    torch.testing.assert_close(shared.loss, separate.loss, rtol=1e-5, atol=1e-4)
    assert shared.num_supervised == separate.num_supervised
    gradients = {name: parameter.grad for name, parameter in second[0].named_parameters()}
    for name, parameter in first[0].named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_branch_does_not_see_its_neighbours(parts: Parts) -> None:
    batch = prefill(parts, [(1, [("what colour?", "red"), ("is it a circle?", "no")])])
    expected = parts[0].forward_branches(replace(batch, labels=None)).logits
    changed = prefill(parts, [(1, [("what colour?", "red"), ("no red shape there?", "yes")])])
    found = parts[0].forward_branches(replace(changed, labels=None)).logits
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], expected[1], atol=1e-2)


def test_prefix_cache_is_not_changed_by_its_branches(parts: Parts) -> None:
    batch = prefill(parts, GROUPS)
    keys = [layer.keys.clone() for layer in batch.prefix_cache.layers]
    first = parts[0].forward_branches(batch).loss
    second = parts[0].forward_branches(batch).loss
    assert torch.equal(first, second)
    assert all(torch.equal(layer.keys, before) for layer, before in zip(batch.prefix_cache.layers, keys, strict=True))


@pytest.mark.parametrize("kind", ["mixed", "text only"])
def test_decoded_branches_are_what_generate_gives(kind: str, parts: Parts) -> None:
    model, processor = parts
    asked = [(count, [(question, None) for question, _ in pairs]) for count, pairs in GROUPS]
    if kind == "text only":
        asked = asked[1:2]
    batch = prefill(parts, asked)
    # A stop token that random weights do write, so that answers differ in length.
    stop = [int(model.forward_branches(replace(batch, labels=None)).logits[-1].argmax()), *processor.stop_token_ids]
    answers = model.decode_branches(batch, max_new_tokens=6, stop_token_ids=stop)
    images, conversations = separate_conversations()
    chosen = slice(None) if kind == "mixed" else slice(3, 5)
    questions = processor(
        images=images[chosen] if kind == "mixed" else None,
        conversations=[turns[:1] for turns in conversations[chosen]],
    )
    generated = model.generate(**questions, max_new_tokens=6, do_sample=False, eos_token_id=stop)
    for answer, row in zip(answers.token_ids, generated[:, questions["input_ids"].shape[1] :].tolist(), strict=True):
        ended = next((place for place, token in enumerate(row) if token in stop), len(row))
        assert answer == row[:ended]
    assert answers.token_ids[-1] == []
    torch.testing.assert_close(
        answers.first_logits, model(**questions, logits_to_keep=1).logits[:, 0], rtol=1e-5, atol=1e-4
    )


def test_beams_in_a_padded_batch_are_beams_alone(parts: Parts) -> None:
    model, processor = parts
    images, questions = [toy_images(2), [], toy_images(1, seed=1)], ["what?", "is there a shape?", "a red circle?"]
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    batch = processor(images=images, text=questions)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, (own, question) in enumerate(zip(images, questions, strict=True)):
        alone = processor(images=[own], text=[question])
        answer = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert together[row, : len(answer)].tolist() == answer.tolist()


def test_cached_features_give_the_same_visual_tokens(parts: Parts) -> None:
    model, processor = parts
    pixels = processor.pixel_values(toy_images(3))
    assert torch.equal(model.fuse(model.encoder_features(pixels)), model.encode_images(pixels))
    assert model.encode_images(pixels).shape == (3, model.num_image_tokens, 32)


def test_an_image_may_be_shown_in_several_rows(parts: Parts) -> None:
    model, processor = parts
    turns = [[("human", "<image>\nwhat?"), ("gpt", "red")], [("human", "<image>\na circle?"), ("gpt", "no")]]
    [image] = toy_images(1)
    twice = processor(images=[image, image], conversations=turns)
    expected = model(**twice).loss
    spans = twice["image_spans"].clone()
    spans[:, 3] = 0
    once = model(
        input_ids=twice["input_ids"],
        attention_mask=twice["attention_mask"],
        visual_tokens=model.encode_images(processor.pixel_values([image])),
        image_spans=spans,
        labels=twice["labels"],
    )
    torch.testing.assert_close(once.loss, expected, rtol=1e-6, atol=1e-6)


def test_encoder_in_a_mixture_gives_what_it_gives_alone(parts: Parts, spec: ModelSpec) -> None:
    model, processor = parts
    pixels = processor.pixel_values(toy_images(2))
    fused = model.fusion(list(model.encoder_features(pixels).values()))
    first = 0
    for name in model.encoders:
        alone, _ = build_model(spec, snapshot_path=None, seed=9, encoders=[name])
        alone.encoders[name].load_state_dict(model.encoders[name].state_dict())
        own = alone.fusion(list(alone.encoder_features({name: pixels[name]}).values()))
        assert torch.equal(fused[..., first : first + own.shape[-1]], own)
        first += own.shape[-1]
    assert first == fused.shape[-1]


def test_frozen_groups_stay_as_they_are_bit_for_bit(build: Callable[[], Parts]) -> None:
    model, processor = build()
    groups = model.parameter_groups()
    trained = {name for name, _ in groups["projector"]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([parameter for _, parameter in groups["projector"]], lr=0.1)
    model.train()
    for _ in range(2):
        model(**processor(images=toy_images(3), conversations=CONVERSATIONS)).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained


def test_groups_hold_every_parameter_once(parts: Parts) -> None:
    model, _ = parts
    groups = model.parameter_groups()
    assert list(groups) == ["encoders.vit", "encoders.efficientnet", "fusion", "projector", "language_model"]
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("missing", ["image_spans", "pixels"])
def test_images_without_their_spans_are_refused(missing: str, parts: Parts) -> None:
    model, processor = parts
    batch = processor(images=toy_images(1), text="what?")
    left_out = ["image_spans"] if missing == "image_spans" else [key for key in batch if key.startswith("pixel")]
    with pytest.raises(ShapeError, match="image_spans"):
        model(**{key: value for key, value in batch.items() if key not in left_out})


def test_pixels_for_one_of_two_encoders_are_refused(parts: Parts) -> None:
    model, processor = parts
    batch = dict(processor(images=toy_images(1), text="what?"))
    del batch["pixel_values.vit"]
    with pytest.raises(ShapeError, match=r"for \['efficientnet', 'vit'\] is needed"):
        model(**batch)


def test_span_longer_than_the_image_is_refused(parts: Parts) -> None:
    model, processor = parts
    batch = processor(images=toy_images(1), text="what?")
    batch["image_spans"][0, 2] += 1
    with pytest.raises(ShapeError, match="images have 16"):
        model(**batch)


def test_answer_right_behind_the_prefix_is_refused(parts: Parts) -> None:
    batch = prefill(parts, GROUPS)
    batch.labels[0, 0] = 5
    with pytest.raises(ShapeError, match="first token of a branch"):
        parts[0].forward_branches(batch)


def test_gradient_checkpointing_and_shared_prefixes_do_not_mix(build: Callable[[], Parts]) -> None:
    model, processor = build()
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(RecipeError, match="gradient checkpointing"):
        prefill((model, processor), GROUPS)
