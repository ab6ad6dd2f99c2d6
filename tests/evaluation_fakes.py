"""A small benchmark and models that answer by rule, for tests of evaluation and registry."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import ImageFile, Record, Turn
from manyeyes.data.shards import write_shards
from manyeyes.data.snapshot import Snapshot, open_folder
from manyeyes.evaluation.answering.answerers import AnsweredBatch, answer_in_turn
from manyeyes.evaluation.answering.encoder_cache import ImageCounts
from manyeyes.recipe import Recipe, load_recipe
from manyeyes.runtime.bundle import GeneratedAnswer, Group

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 160, 20)}
SHAPES = ("circle", "rectangle", "triangle")


def make_image(number: int) -> ImageFile:
    """A square of one colour; the number makes the pixels, and so the sha256, its own."""
    colour = list(COLOURS.values())[number % len(COLOURS)]
    picture = Image.new("RGB", (16, 16), colour)
    picture.putpixel((0, 0), (number % 256, number // 256, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = buffer.getvalue()
    return ImageFile(data=data, path=f"{number}.png", sha256=hashlib.sha256(data).hexdigest(), width=16, height=16)


def make_record(number: int) -> Record:
    """Four questions on one image; the answers follow from its number."""
    colour = list(COLOURS)[number % len(COLOURS)]
    shape = SHAPES[number // len(COLOURS) % len(SHAPES)]
    pairs = [
        ("what color is the shape?", colour),
        ("what shape is in the image?", shape),
        ("is there a red shape?", "yes" if colour == "red" else "no"),
        ("is there not a circle?", "no" if shape == "circle" else "yes"),
    ]
    turns = []
    for position, (question, answer) in enumerate(pairs):
        turns.append(Turn("human", ("<image>\n" if position == 0 else "") + question))
        turns.append(Turn("gpt", answer))
    return Record(id=f"easy-vqa/test/{number}", source="easy-vqa", images=(make_image(number),), turns=tuple(turns))


def make_snapshot(folder: Path, *, images: int) -> Snapshot:
    """A snapshot whose easy-vqa-test has this many images, four questions each."""
    write_shards([make_record(number) for number in range(images)], folder / "easy-vqa", "test")
    write_snapshot_manifest(folder, provenance={"easy-vqa-test": Provenance("MIT", "made for a test")})
    return open_folder(folder)


def make_recipe(**overrides: object) -> Recipe:
    """Recipe tiny with other values by dotted path, ``__`` for a dot; asks with the image and without it only."""
    values: dict[str, object] = {"evaluation__conditions": [], **overrides}
    return load_recipe("tiny", overrides={path.replace("__", "."): value for path, value in values.items()})


class RuleAnswerer:
    """Answers by a rule over image bytes (or None) and question; counts what it was asked."""

    def __init__(self, rule: Callable[[bytes | None, str], str], *, name: str = "torch") -> None:
        self.name = name
        self.rule = rule
        self.images = 0
        self.questions = 0
        self.image_counts = ImageCounts()

    def answer_groups(self, groups: Sequence[Group], *, max_new_tokens: int) -> list[list[GeneratedAnswer]]:
        assert max_new_tokens > 0
        answers = []
        for group in groups:
            self.images += len(group.images)
            self.questions += len(group.questions)
            image = group.images[0] if group.images else None
            answers.append([GeneratedAnswer(self.rule(image, question), ()) for question in group.questions])
        return answers

    def answer_batches(self, batches: Iterable[Sequence[Group]], *, max_new_tokens: int) -> Iterator[AnsweredBatch]:
        return answer_in_turn(self, batches, max_new_tokens=max_new_tokens)


def right_answers(images: int) -> dict[tuple[bytes, str], str]:
    """The reference of every question on the first this many images."""
    answers = {}
    for number in range(images):
        record = make_record(number)
        questions = [turn.text.removeprefix("<image>\n") for turn in record.turns[0::2]]
        for question, answer in zip(questions, record.turns[1::2], strict=True):
            answers[record.images[0].data, question] = answer.text
    return answers


def rule_with_errors(images: int, wrong_images: Sequence[int] = ()) -> Callable[[bytes | None, str], str]:
    """Right with the image but for ``wrong_images``, where every answer is nonsense; "no" without one or on grey."""
    references = right_answers(images)
    wrong = {make_image(number).data for number in wrong_images}

    def rule(image: bytes | None, question: str) -> str:
        if image is None:
            return "no"
        return "a horse" if image in wrong else references.get((image, question), "no")

    return rule
