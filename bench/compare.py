"""What is compared, and with what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from manyeyes.data.mixture import Mixture
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.evaluation.answering.torch_answerer import TorchAnswerer
from manyeyes.model import BranchBatch, ManyEyesForConditionalGeneration
from manyeyes.processor import ManyEyesProcessor
from manyeyes.recipe import MixturePart, Recipe
from manyeyes.runtime import Group
from manyeyes.training.batches import BatchBuilder

Parts = tuple[str, Callable[[], object], Callable[[], object], Callable[[object, object], tuple[str, bool]]]

IMAGES = 8
TOLERANCE = 1e-4


def training(
    recipe: Recipe, snapshot: Snapshot, model: ManyEyesForConditionalGeneration, processor: ManyEyesProcessor
) -> Parts:
    """Loss and gradients of eight images' questions: a row for each question, or the image's prefix shared."""
    mixture = Mixture([MixturePart(dataset="easy-vqa-train", turns="independent")], snapshot, seed=recipe.seed)
    samples = [mixture.sample(0, index) for index in range(IMAGES)]
    batch = BatchBuilder(mixture, processor).build(range(IMAGES))
    conversations = [turns for sample in samples for turns in sample.conversations()]
    owners = [index for index, sample in enumerate(samples) for _ in sample.conversations()]
    rows = [
        processor.encode(tuple((turn.speaker, turn.text) for turn in turns), num_images=1) for turns in conversations
    ]
    padded = processor.pad(rows, side="right", labels=True)
    spans = padded["image_spans"]
    pixels = {name: values[torch.tensor(owners)] for name, values in batch.pixel_values.items()}

    def norms() -> tuple[float, float]:
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        return float(total), len(grads)

    def plain() -> object:
        model.zero_grad()
        output = model(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            pixel_values=pixels,
            image_spans=spans,
            labels=padded["labels"],
        )
        output.loss.backward()
        return float(output.loss.detach()), norms()[0]

    def shared() -> object:
        model.zero_grad()
        assert batch.prefixes is not None
        cache = model.prefill_prefix(
            batch.prefixes["input_ids"],
            batch.prefixes["attention_mask"],
            visual_tokens=model.encode_images(batch.pixel_values),
            image_spans=batch.prefixes["image_spans"],
        )
        losses = [
            model.forward_branches(
                BranchBatch(
                    cache,
                    batch.prefixes["attention_mask"],
                    bucket["rows"],
                    bucket["input_ids"],
                    bucket["attention_mask"],
                    bucket["labels"],
                )
            ).loss
            for bucket in batch.branches
        ]
        loss = torch.stack(losses).sum() / batch.num_supervised
        loss.backward()
        return float(loss.detach()), norms()[0]

    def equal(left: object, right: object) -> tuple[str, bool]:
        (loss_a, norm_a), (loss_b, norm_b) = left, right  # type: ignore[misc]
        gap = max(abs(loss_a - loss_b) / abs(loss_a), abs(norm_a - norm_b) / abs(norm_a))
        return f"loss and gradient norm within {gap:.1e}", gap < TOLERANCE

    name = f"training step, {len(rows)} questions on {IMAGES} images: a row each with its own image / shared prefix"
    return name, plain, shared, equal


def evaluation(recipe: Recipe, snapshot: Snapshot, checkpoint: Path) -> Parts:
    """Greedy answers: ``generate`` for each question, or encoder and prefix once an image."""
    answerer = TorchAnswerer(checkpoint, threads=1)
    reader = RecordReader(snapshot.shards("easy-vqa-val"))
    records = [reader.read(index) for index in range(IMAGES)]
    groups = [
        Group(
            images=tuple(image.data for image in record.images),
            questions=tuple(turn.text.replace("<image>\n", "") for turn in record.turns[::2]),
        )
        for record in records
    ]
    most = recipe.evaluation.max_new_tokens or 16
    count = sum(len(group.questions) for group in groups)

    @torch.inference_mode()
    def one_by_one() -> object:
        processor, model = answerer.processor, answerer.model
        answers = []
        for group in groups:
            for question in group.questions:
                encoded = processor.encode((("human", f"<image>\n{question}"),), num_images=len(group.images))
                batch = processor.pad([encoded], side="left", labels=False)
                ids = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    image_spans=batch["image_spans"],
                    pixel_values=processor.pixel_values(list(group.images)),
                    max_new_tokens=most,
                    do_sample=False,
                    eos_token_id=list(processor.stop_token_ids),
                    pad_token_id=processor.tokenizer.pad_token_id,
                )
                new = ids[0, batch["input_ids"].shape[1] :].tolist()
                stops = [index for index, token in enumerate(new) if token in processor.stop_token_ids]
                answers.append(tuple(new[: stops[0]] if stops else new))
        return answers

    def shared() -> object:
        return [
            answer.token_ids for answers in answerer.answer_groups(groups, max_new_tokens=most) for answer in answers
        ]

    def equal(left: object, right: object) -> tuple[str, bool]:
        same = sum(a == b for a, b in zip(left, right, strict=True))  # type: ignore[call-overload]
        return f"{same} of {count} answers token for token", same == count

    name = f"evaluation, {count} questions on {len(groups)} images: generate one by one / shared prefix"
    return name, one_by_one, shared, equal
