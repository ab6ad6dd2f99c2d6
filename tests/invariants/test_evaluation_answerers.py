"""Checkpoint and bundle of a toy model answer a benchmark alike, and as the model answers one question at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manyeyes.errors import RecordError
from manyeyes.evaluation.answering.answerers import BundleAnswerer, TorchAnswerer
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.outcomes import read_outcomes
from manyeyes.model import checkpoint_digest, load_checkpoint
from manyeyes.runtime.bundle import Group, load_bundle
from tests.evaluation_fakes import make_recipe, make_snapshot
from tests.export_toys import Toy
from tests.model_toys import png, toy_images

TOKENS = 5


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    images = [png(image) for image in toy_images(3)]
    return [
        Group((images[0],), ("what colour is the shape?", "is there a red circle? yes or no", "a?")),
        Group((images[1],), ("is there a circle?",)),
        # The first image again, two images in one question, and none at all.
        Group((images[0], images[2]), ("what differs?", "which is red?")),
        Group((), ("is there a red circle?", "what?")),
    ]


def test_torch_answers_as_generate_does_one_question_at_a_time(toy_bundle: Toy, groups: list[Group]) -> None:
    model, processor = load_checkpoint(toy_bundle.checkpoint)
    answers = TorchAnswerer(toy_bundle.checkpoint, threads=1).answer_groups(groups, max_new_tokens=TOKENS)
    assert [len(group) for group in answers] == [3, 1, 2, 2]
    for group, found in zip(groups, answers, strict=True):
        for question, answer in zip(group.questions, found, strict=True):
            batch = processor(images=[list(group.images)] if group.images else None, text=[question])
            with torch.inference_mode():
                ids = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)[0, batch["input_ids"].shape[1] :]
            expected = [token for token in ids.tolist() if token not in processor.stop_token_ids]
            assert list(answer.token_ids) == expected, question
            assert answer.text == processor.decode_answer(expected)
    # Else equality would say little.
    assert len({answer.token_ids for group in answers for answer in group}) > 3


def test_answers_do_not_depend_on_what_else_is_asked(toy_bundle: Toy, groups: list[Group]) -> None:
    together = TorchAnswerer(toy_bundle.checkpoint, threads=1).answer_groups(groups, max_new_tokens=TOKENS)
    few_at_once = TorchAnswerer(toy_bundle.checkpoint, threads=1, max_branches=2)
    assert few_at_once.answer_groups(groups, max_new_tokens=TOKENS) == together
    assert [few_at_once.answer_groups([group], max_new_tokens=TOKENS)[0] for group in groups] == together


def test_groups_without_questions_get_no_answers(toy_bundle: Toy, groups: list[Group]) -> None:
    answerer = TorchAnswerer(toy_bundle.checkpoint, threads=1)
    silent = Group(groups[0].images, ())
    expected = answerer.answer_groups(groups[:2], max_new_tokens=TOKENS)
    found = answerer.answer_groups([silent, groups[0], silent, groups[1]], max_new_tokens=TOKENS)
    assert found == [[], expected[0], [], expected[1]]
    assert answerer.answer_groups([silent], max_new_tokens=TOKENS) == [[]]
    assert answerer.answer_groups([], max_new_tokens=TOKENS) == []


def test_a_corrupt_image_is_refused(toy_bundle: Toy) -> None:
    with pytest.raises(RecordError):
        TorchAnswerer(toy_bundle.checkpoint, threads=1).answer_groups(
            [Group((b"no image",), ("a?",))], max_new_tokens=1
        )


def test_checkpoint_and_bundle_get_the_same_scorecard(toy_bundle: Toy, tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path / "snapshot", images=9)
    recipe = make_recipe(evaluation__batch_size=4)
    cards = {}
    for answerer, digest in (
        (TorchAnswerer(toy_bundle.checkpoint, threads=1), checkpoint_digest(toy_bundle.checkpoint)),
        (BundleAnswerer(toy_bundle.bundle, threads=1), toy_bundle.manifest.digest),
    ):
        cards[answerer.name] = evaluate(
            answerer,
            recipe,
            snapshot=snapshot,
            out_dir=tmp_path / answerer.name,
            code_digest="c",
            model_digest=digest,
        )
    assert (cards["torch"].model.kind, cards["bundle"].model.kind) == ("torch", "bundle")
    timeless = {"seconds": 0, "questions_per_s": 0}
    ours, theirs = (card.benchmarks["easy-vqa"].model_copy(update=timeless) for card in cards.values())
    assert ours == theirs
    ours, theirs = (read_outcomes(tmp_path / kind / "items.parquet").outcomes for kind in cards)
    assert ours == theirs
    assert len({outcome.prediction for outcome in ours}) > 1


def test_a_bundle_is_scored_without_torch() -> None:
    code = (
        "import sys; from manyeyes.evaluation.answering.answerers import BundleAnswerer; "
        "import manyeyes.evaluation.evaluate; "
        "sys.exit(bool({'torch', 'transformers', 'mlflow'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_mlflow_model_answers_as_the_bundle_does(toy_bundle: Toy, groups: list[Group]) -> None:
    from manyeyes.registry.pyfunc_model import answer_rows

    bundle = load_bundle(toy_bundle.bundle, threads=1)
    rows = [
        {"image": group.images[0] if group.images else None, "question": question}
        for group in groups
        if len(group.images) < 2
        for question in group.questions
    ]
    expected = [
        bundle.answer(row["question"], images=[row["image"]] if row["image"] else [], max_new_tokens=TOKENS)
        for row in rows
    ]
    assert answer_rows(bundle, rows, max_new_tokens=TOKENS) == expected
