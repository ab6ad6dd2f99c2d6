"""Chosen answers: the option of the highest logit in an independent forward pass, alike in torch and in the bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from manyeyes.errors import RecordError
from manyeyes.evaluation.answering.answerers import BundleAnswerer, TorchAnswerer
from manyeyes.evaluation.reliance import measure_reliance, render_reliance_text
from manyeyes.model import load_checkpoint
from manyeyes.runtime.bundle import Group
from tests.evaluation_fakes import make_recipe, make_snapshot
from tests.export_toys import Toy
from tests.model_toys import png, toy_images

LETTERS = ("A", "B", "C", "D")
YES_NO = ("Yes", "No", "yes", "no")
# To the toy's tokenizer all of these begin with the token of a space, the next two with another token each, and of the
# last one some are the beginning of others.
PAIR = ("circle", "no")
WORDS = ("circle", "cir", "c", "no")
TOKENS = 4


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    images = [png(image) for image in toy_images(6, seed=4)]
    asked = [("a?", LETTERS), ("how many?", YES_NO), ("a red circle?", WORDS), ("what colour is it?", PAIR)]
    questions, choices = (tuple(part) for part in zip(*asked, strict=True))
    return [
        *(Group((image,), questions, choices) for image in images),
        # Two images, none, and free questions beside questions with options.
        Group((images[0], images[2]), ("a?", "describe it", "how many?"), (WORDS, (), LETTERS)),
        Group((), ("how many?", "A or B?"), (WORDS, LETTERS)),
        Group((images[1],), ("describe it",)),
    ]


def each(groups: list[Group]) -> Iterator[tuple[Group, str, tuple[str, ...]]]:
    for group in groups:
        for place, question in enumerate(group.questions):
            yield group, question, group.options(place)


def choose_alone(model: Any, processor: Any, group: Group, question: str, options: tuple[str, ...]) -> str:
    """The choice by one full forward pass an option, from image bytes, without any cache."""
    passes = []
    for option in options:
        conversation = [("human", "<image>\n" * len(group.images) + question), ("gpt", option)]
        batch = processor(images=[list(group.images)] if group.images else None, conversations=[conversation])
        labels = batch.pop("labels")[0]
        with torch.inference_mode():
            logits = model(**batch).logits[0].double().log_softmax(-1)
        # What the loss counts is the answer in its conversation, with the token that ends it.
        supervised = (labels != -100).nonzero().flatten()
        ids = labels[supervised]
        own = logits[supervised - 1, ids]
        passes.append((int(ids[0]), float(own[0]), float(own.sum())))
    best = max(passes, key=lambda each: each[1])[0]
    return max(zip(passes, options, strict=True), key=lambda each: (each[0][0] == best, each[0][2]))[1]


def test_a_choice_is_that_of_full_forward_passes_in_torch_and_in_the_bundle(
    toy_bundle: Toy, groups: list[Group]
) -> None:
    model, processor = load_checkpoint(toy_bundle.checkpoint)
    model.eval()
    by_torch = TorchAnswerer(toy_bundle.checkpoint, threads=1).answer_groups(groups, max_new_tokens=TOKENS)
    by_bundle = BundleAnswerer(toy_bundle.bundle, threads=1).answer_groups(groups, max_new_tokens=TOKENS)
    assert by_torch == by_bundle
    chosen = []
    answers = [answer for group in by_torch for answer in group]
    for (group, question, options), answer in zip(each(groups), answers, strict=True):
        if options:
            assert answer.text == choose_alone(model, processor, group, question, options), question
            assert answer.token_ids == ()
            chosen.append((options, answer.text))
    # Else equality would say little.
    assert len(chosen) == 28
    for options in (LETTERS, YES_NO, WORDS, PAIR):
        assert len({text for own, text in chosen if own == options}) > 1, options


def test_free_questions_beside_choices_are_generated_as_ever(toy_bundle: Toy, groups: list[Group]) -> None:
    for answerer in (TorchAnswerer(toy_bundle.checkpoint, threads=1), BundleAnswerer(toy_bundle.bundle, threads=1)):
        mixed = answerer.answer_groups(groups, max_new_tokens=TOKENS)
        free = [Group(group.images, group.questions) for group in groups]
        written = answerer.answer_groups(free, max_new_tokens=TOKENS)
        for group, ours, theirs in zip(groups, mixed, written, strict=True):
            for place in range(len(group.questions)):
                assert bool(group.options(place)) != (ours[place] == theirs[place])


def test_choices_do_not_depend_on_what_else_is_asked_or_on_the_batch(toy_bundle: Toy, groups: list[Group]) -> None:
    together = TorchAnswerer(toy_bundle.checkpoint, threads=1).answer_groups(groups, max_new_tokens=TOKENS)
    few_at_once = TorchAnswerer(toy_bundle.checkpoint, threads=1, max_branches=2)
    assert few_at_once.answer_groups(groups, max_new_tokens=TOKENS) == together
    assert [few_at_once.answer_groups([group], max_new_tokens=TOKENS)[0] for group in groups] == together
    small = BundleAnswerer(toy_bundle.bundle, threads=1, batch_size=2)
    assert small.answer_groups(groups, max_new_tokens=TOKENS) == together


def test_the_order_of_options_does_not_matter(toy_bundle: Toy, groups: list[Group]) -> None:
    answerer = TorchAnswerer(toy_bundle.checkpoint, threads=1)
    turned = [
        Group(group.images, group.questions, tuple(options[::-1] for options in group.choices)) for group in groups
    ]
    assert answerer.answer_groups(turned, max_new_tokens=TOKENS) == answerer.answer_groups(
        groups, max_new_tokens=TOKENS
    )


def test_a_single_option_is_the_answer(toy_bundle: Toy, groups: list[Group]) -> None:
    group = Group(groups[0].images, ("is it red?",), (("B",),))
    for answerer in (TorchAnswerer(toy_bundle.checkpoint, threads=1), BundleAnswerer(toy_bundle.bundle, threads=1)):
        assert answerer.answer_groups([group], max_new_tokens=1)[0][0].text == "B"


def test_a_question_that_leaves_no_room_for_an_option_is_refused(toy_bundle: Toy) -> None:
    long_option = "red " * 400
    for answerer in (TorchAnswerer(toy_bundle.checkpoint, threads=1), BundleAnswerer(toy_bundle.bundle, threads=1)):
        with pytest.raises(RecordError, match="longest option"):
            answerer.answer_groups([Group((), ("what?",), (("A", long_option),))], max_new_tokens=1)


def test_reliance_says_that_answers_were_chosen(toy_bundle: Toy, tmp_path: Path) -> None:
    report = measure_reliance(
        TorchAnswerer(toy_bundle.checkpoint, threads=1),
        make_recipe(evaluation__multiple_choice="prefill"),
        snapshot=make_snapshot(tmp_path, images=4),
        model_digest="m",
    )
    assert report.benchmarks["easy-vqa"].multiple_choice == "prefill"
    assert "Answers were chosen from options after one prefill" in render_reliance_text(report)
