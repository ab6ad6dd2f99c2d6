"""easy-VQA: 4,000 training and 1,000 test images of one coloured shape each, with 48,248 questions.

Published by Victor Zhou as the PyPI package ``easy-vqa`` (MIT), from which the files are taken as they are. All
questions of an image become one record, in their published order, ``<image>`` in front of the first.

``easy-vqa-val`` holds 200 of the training images: those whose sha256 of ``easy-vqa-val/<number>`` is lowest. The draw
depends on nothing else, so it is the same everywhere and for ever; hyperparameters are chosen on these, never on the
test set.

``build_easy_vqa_sentences`` makes the same questions with answers in whole sentences, and captions, by rules.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

from manyeyes.data.builders.manifest import Provenance, write_snapshot_manifest
from manyeyes.data.records import PLACEHOLDER, Record, Turn, check_record, read_image_file
from manyeyes.data.shards import ShardWriter
from manyeyes.errors import SourceError
from manyeyes.storage import new_folder

NUM_VALIDATION_IMAGES = 200
# Two shards for the training set: small enough to look at, more than one so that nothing relies on there being one.
_ROWS_PER_SHARD = 2000
_LICENCE = "MIT"
_SOURCE = "PyPI easy-vqa 1.0 (Victor Zhou); questions of an image joined in one record"
_SENTENCES = _SOURCE + "; answers made sentences by rules"

IN_A_SENTENCE = "Answer in a sentence."
"""Behind a question whose answer is a sentence."""


def build_easy_vqa(out: Path) -> None:
    """Write ``easy-vqa-train``, ``easy-vqa-val`` and ``easy-vqa-test`` into a snapshot folder.

    The same package gives the same bytes.

    Args:
        out: The snapshot's folder; made when missing. ``out/easy-vqa`` is replaced, the rest stays.

    Raises:
        SourceError: The package is not installed, or not the version that is known.
        StorageError: No space or no permission.
    """
    package = _open_package()
    with new_folder(out / "easy-vqa") as folder:
        _write(folder, package=package)
    held_out = f"; the {NUM_VALIDATION_IMAGES} training images with the lowest sha256 of easy-vqa-val/<number>"
    others = f"; all training images but the {NUM_VALIDATION_IMAGES} of easy-vqa-val"
    write_snapshot_manifest(
        out,
        provenance={
            "easy-vqa-train": Provenance(_LICENCE, _SOURCE + others),
            "easy-vqa-val": Provenance(_LICENCE, _SOURCE + held_out),
            "easy-vqa-test": Provenance(_LICENCE, _SOURCE),
        },
    )


def build_easy_vqa_sentences(out: Path) -> None:
    """Write ``easy-vqa-sentences-train``, ``-val``, ``-test``, ``-captions`` and ``-balanced`` into a snapshot folder.

    The first three are easy-VQA's questions with ``IN_A_SENTENCE`` behind them and answers such as "There is no blue
    shape."; captions describe each training image whose questions tell shape and colour: "A red circle."; balanced are
    those of train again, of an image as many about what is not there as about what is.

    Args:
        out: The snapshot's folder; made when missing. ``out/easy-vqa-sentences`` is replaced, the rest stays.

    Raises:
        SourceError: The package is not installed, or not the version that is known.
        StorageError: No space or no permission.
    """
    package = _open_package()
    with new_folder(out / "easy-vqa-sentences") as folder:
        _write(folder, package=package, sentences=True)
    how = dict.fromkeys(("train", "val", "test", "captions"), _SENTENCES) | {
        "balanced": _SENTENCES + ", as many about what is not there as about what is"
    }
    write_snapshot_manifest(
        out, provenance={f"easy-vqa-sentences-{split}": Provenance(_LICENCE, source) for split, source in how.items()}
    )


_COLOURS = "black|blue|brown|gray|green|red|teal|yellow"
_SHAPES = "circle|rectangle|triangle"
_THING = re.compile(rf"\b((?:{_COLOURS}) shape|{_SHAPES}|shape)\b")
_NEGATED = re.compile(r"\b(not|no)\b")


def answer_in_a_sentence(question: str, answer: str) -> str:
    """One of easy-VQA's answers as a sentence that names what was asked about.

    It has no "yes" and no "no" in front: those depend on the question's own "not" too, what is there does not.

    Args:
        question: As published, for instance "is there not a blue shape?".
        answer: One of its 13 answers.

    Raises:
        SourceError: A question that easy-VQA does not ask.
    """
    thing = _THING.search(question)
    if thing is None:
        raise SourceError(f'easy-vqa has the question "{question}"', "a shape or a colour in it", "Install 1.0.")
    if answer in ("yes", "no"):
        return f"There is {'a' if _is_present(question, answer) else 'no'} {thing[1]}."
    if answer in _COLOURS.split("|"):
        return f"The {thing[1]} is {answer}."
    return f"The {thing[1]} is a {answer}."


def write_caption(pairs: Sequence[tuple[str, str]]) -> str | None:
    """The caption of an image, from what its questions and answers say; None where they leave colour or shape open.

    Args:
        pairs: Question and answer.
    """
    # A sentence about something that is there names nothing else; one about what is not there says "no".
    told = [sentence for pair in pairs if " no " not in (sentence := answer_in_a_sentence(*pair))]
    colour, shape = (
        next((found[0] for sentence in told if (found := re.search(rf"\b({words})\b", sentence))), None)
        for words in (_COLOURS, _SHAPES)
    )
    return None if colour is None or shape is None else f"A {colour} {shape}."


def balance(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of an image's questions about what is not there, as many as there are about what is; colours and shapes apart.

    Published, 87% of the questions for a colour and 66% of those for a shape are about one that is not there; who says
    so blindly is mostly right, and learns late to look. The draw is by sha256 of the question. VQA v2 balances for the
    same reason: arXiv:1612.00837.

    Args:
        pairs: Question and answer.

    Returns:
        Those that are left, in their order; questions that yes or no does not answer are all there.
    """
    left_out: set[tuple[str, str]] = set()
    for of_colour in (True, False):
        asked = [
            pair
            for pair in pairs
            if pair[1] in ("yes", "no") and bool(re.search(rf"\b({_COLOURS})\b", pair[0])) == of_colour
        ]
        absent = sorted((pair for pair in asked if not _is_present(*pair)), key=lambda pair: _sha256(pair[0]))
        left_out.update(absent[len(asked) - len(absent) :])
    return [pair for pair in pairs if pair not in left_out]


def _is_present(question: str, answer: str) -> bool:
    """Whether what a question of yes or no asks for is there."""
    return (answer == "yes") != bool(_NEGATED.search(question))


def draw_validation_images(numbers: set[int]) -> set[int]:
    """Draw the training images that are held out.

    Args:
        numbers: Of all training images.
    """
    return set(sorted(numbers, key=lambda number: _sha256(f"easy-vqa-val/{number}"))[:NUM_VALIDATION_IMAGES])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _open_package() -> Traversable:
    try:
        version = metadata.version("easy-vqa")
    except metadata.PackageNotFoundError as error:
        raise SourceError("easy-vqa is not installed", "easy-vqa 1.0", "pip install easy-vqa==1.0") from error
    if version != "1.0":
        raise SourceError(f"easy-vqa {version} is installed", "easy-vqa 1.0", "pip install easy-vqa==1.0")
    return resources.files("easy_vqa")


def _write(folder: Path, *, package: Traversable, sentences: bool = False) -> None:
    for split in ("train", "test"):
        published = list(_read_records(package / "data" / split, split=split))
        records = [_in_sentences(record) for record in published] if sentences else published
        held_out = draw_validation_images({_number(record) for record in records}) if split == "train" else set()
        for name, chosen in (
            (split, [record for record in records if _number(record) not in held_out]),
            ("val", [record for record in records if _number(record) in held_out]),
        ):
            with ShardWriter(folder, name, rows_per_shard=_ROWS_PER_SHARD) as writer:
                for record in chosen:
                    writer.write(record)
        if sentences and split == "train":
            shown = [record for record in published if _number(record) not in held_out]
            with ShardWriter(folder, "captions", rows_per_shard=_ROWS_PER_SHARD) as writer:
                for record in shown:
                    caption = write_caption(_pairs(record))
                    if caption is not None:
                        writer.write(_with_pairs(record, [("Describe the image.", caption)], split="captions"))
            with ShardWriter(folder, "balanced", rows_per_shard=_ROWS_PER_SHARD) as writer:
                for record in shown:
                    if pairs := balance(_pairs(record)):
                        writer.write(_in_sentences(_with_pairs(record, pairs, split="balanced")))
    licence = metadata.distribution("easy-vqa").read_text("LICENSE")
    if licence is None:
        raise SourceError("easy-vqa has no LICENSE", "its licence", "pip install --force-reinstall easy-vqa==1.0")
    (folder / "LICENSE").write_text(licence, encoding="utf-8", newline="\n")


def _pairs(record: Record) -> list[tuple[str, str]]:
    texts = [turn.text.removeprefix(f"{PLACEHOLDER}\n") for turn in record.turns]
    return list(zip(texts[0::2], texts[1::2], strict=True))


def _in_sentences(record: Record) -> Record:
    pairs = [
        (f"{question} {IN_A_SENTENCE}", answer_in_a_sentence(question, answer)) for question, answer in _pairs(record)
    ]
    name = record.id.replace("easy-vqa/", "easy-vqa-sentences/")  # a mixture may hold both
    return replace(record, id=name, source="easy-vqa-sentences", turns=_turns(pairs))


def _with_pairs(record: Record, pairs: Sequence[tuple[str, str]], *, split: str) -> Record:
    return replace(record, id=record.id.replace("/train/", f"/{split}/"), turns=_turns(pairs))


def _turns(pairs: Sequence[tuple[str, str]]) -> tuple[Turn, ...]:
    """``<image>`` stands in front of the first question."""
    turns: list[Turn] = []
    for question, answer in pairs:
        turns += [Turn("human", question if turns else f"{PLACEHOLDER}\n{question}"), Turn("gpt", answer)]
    return tuple(turns)


def _number(record: Record) -> int:
    return int(record.id.rpartition("/")[2])


def _read_records(split_folder: Traversable, *, split: str) -> Iterator[Record]:
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((split_folder / "questions.json").read_text(encoding="utf-8")):
        questions.setdefault(number, []).append((question, answer))
    for number, pairs in sorted(questions.items()):
        name = f"{number}.png"
        image = read_image_file((split_folder / "images" / name).read_bytes(), path=name)
        turns = _turns(pairs)
        record = Record(id=f"easy-vqa/{split}/{number}", source="easy-vqa", images=(image,), turns=turns)
        check_record(record)
        yield record
