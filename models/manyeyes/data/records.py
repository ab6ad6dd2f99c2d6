"""Records: one sample of a data set, with its images and its turns.

A record is what a row of a Parquet shard holds. The text of a human turn has one ``<image>`` placeholder for each
image of the record, in order; an answer is the text of the model's ("gpt") turn that follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from manyeyes.drawing import REQUEST, find_prompts
from manyeyes.errors import RecordError
from manyeyes.runtime.preprocess import measure_file, read_image_size

Speaker = Literal["human", "gpt"]
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        speaker: ``human`` asks, ``gpt`` answers (the names are LLaVA's).
        text: The words; ``<image>`` in a human turn stands for the record's next image.
    """

    speaker: Speaker
    text: str


@dataclass(frozen=True)
class ImageFile:
    """An image as it was published: its bytes are never re-encoded.

    Attributes:
        data: The whole file.
        path: Name that it had at its source; for people, never opened.
        sha256: Of ``data``, hexadecimal.
        width: Pixels, as stored in the file (before an EXIF rotation).
        height: Pixels, as stored in the file.
    """

    data: bytes
    path: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Record:
    """One sample: images, and turns about them.

    Attributes:
        id: Unique in its snapshot, for instance ``easy-vqa/train/123``.
        source: The data set it comes from.
        images: In the order of their placeholders; empty for a text-only sample.
        turns: Human first, then in turn.
        provenance: How it came about, as a JSON object, for instance which model wrote it; empty where nothing is said.
    """

    id: str
    source: str
    images: tuple[ImageFile, ...]
    turns: tuple[Turn, ...]
    provenance: str = ""


def read_image_file(data: bytes, *, path: str) -> ImageFile:
    """Make an ``ImageFile`` from the bytes of an image file.

    Args:
        data: The whole file; only its header is read here, ``check_record`` decodes it.
        path: Name to remember it by.

    Raises:
        RecordError: The bytes are not an image.
    """
    try:
        width, height = read_image_size(data)
    except RecordError as error:
        raise RecordError(
            f"{path} ({len(data)} bytes) is not an image that can be opened: {error.found}",
            "an image file of a format that ManyEyes reads",
            "Leave it out, or get it again from its source.",
        ) from error
    return ImageFile(data=data, path=path, sha256=hashlib.sha256(data).hexdigest(), width=width, height=height)


def check_record(record: Record) -> None:
    """Check everything that training relies on.

    Raises:
        RecordError: It has no id, a text cannot be written as UTF-8 (half of a surrogate pair), turns do not alternate
            from human to gpt, a text is empty, placeholders and images differ in number, a request for a picture is
            answered without a prompt for it, an image cannot be decoded, or its recorded sha256 or size is not its own.
    """
    problem = (
        find_id_problem(record.id)
        or find_encoding_problem(record)
        or find_role_problem(record.turns)
        or find_placeholder_problem(record.turns, num_images=len(record.images))
        or find_drawing_problem(record.turns)
        or find_checksum_problem(record.images)
        or find_decoding_problem(record.images)
    )
    if problem is not None:
        name = record.id.encode(errors="backslashreplace").decode()
        raise RecordError(f'record "{name}": {problem.found}', problem.needed, "Fix the sample or leave it out.")


@dataclass(frozen=True)
class SampleProblem:
    """Something wrong with a sample.

    Attributes:
        found: What was found.
        needed: What was needed instead.
    """

    found: str
    needed: str

    def __str__(self) -> str:
        return f"{self.found}; needed: {self.needed}"


def find_id_problem(record_id: str) -> SampleProblem | None:
    """An id that nobody could look up."""
    return None if record_id.strip() else SampleProblem("it has no id", "an id that is unique in the snapshot")


def find_encoding_problem(record: Record) -> SampleProblem | None:
    """The first text that no file can hold: half of a surrogate pair, from a careless JSON or an odd file name."""
    texts = [
        ("id", record.id),
        ("source", record.source),
        ("its provenance", record.provenance),
        *((f"the name of image {index}", image.path) for index, image in enumerate(record.images)),
        *((f"turn {index}", turn.text) for index, turn in enumerate(record.turns)),
    ]
    for name, text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return SampleProblem(
                f"{name} has {text[error.start]!r}, half of a surrogate pair", "text that UTF-8 can hold"
            )
    return None


def find_role_problem(turns: Sequence[Turn]) -> SampleProblem | None:
    """The first thing wrong with who speaks when, and whether something is said."""
    if not turns:
        return SampleProblem("it has no turns", "at least one question and its answer")
    for index, turn in enumerate(turns):
        expected = "human" if index % 2 == 0 else "gpt"
        if turn.speaker not in ("human", "gpt"):
            return SampleProblem(f'turn {index} is from "{turn.speaker}"', 'speakers are "human" and "gpt"')
        if turn.speaker != expected and index == 0:
            return SampleProblem("it starts with gpt", "human speaks first")
        if turn.speaker != expected:
            return SampleProblem(
                f"turns {index - 1} and {index} are both from {turn.speaker}", "human and gpt take turns"
            )
        if not turn.text.strip():
            return SampleProblem(f"turn {index} ({turn.speaker}) is empty", "every turn says something")
    if len(turns) % 2:
        return SampleProblem(f"it has {len(turns)} turns and ends with human", "every question has an answer")
    return None


def find_placeholder_problem(turns: Sequence[Turn], *, num_images: int) -> SampleProblem | None:
    """The first thing wrong with where ``<image>`` stands and how often.

    Args:
        turns: Of the record.
        num_images: How many images the record has.
    """
    for index, turn in enumerate(turns):
        if turn.speaker == "gpt" and PLACEHOLDER in turn.text:
            return SampleProblem(f"turn {index} (gpt) holds {PLACEHOLDER}", f"{PLACEHOLDER} stands in human turns only")
    placeholders = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if placeholders != num_images:
        return SampleProblem(
            f"it has {placeholders} {PLACEHOLDER} and {num_images} images", f"one {PLACEHOLDER} for each image"
        )
    return None


def find_drawing_problem(turns: Sequence[Turn]) -> SampleProblem | None:
    """The first answer to a request that ends with ``<GEN>`` that could not be drawn.

    Other answers may hold what they like: a page of HTML is not a drawing.
    """
    for index, turn in enumerate(turns[1:], start=1):
        if turn.speaker != "gpt" or not turns[index - 1].text.rstrip().endswith(REQUEST):
            continue
        prompts = find_prompts(turn.text)
        if prompts.problems:
            return SampleProblem(f"turn {index} (gpt): {prompts.problems[0]}", "each prompt between <h> and </h>")
        if not prompts.prompts:
            return SampleProblem(
                f"turn {index} (gpt) answers {REQUEST} without a prompt", "what to draw, between <h> and </h>"
            )
    return None


def find_checksum_problem(images: Sequence[ImageFile], *, found: Sequence[str] | None = None) -> SampleProblem | None:
    """The first image whose bytes do not have the recorded sha256.

    Args:
        images: Of the record.
        found: The sha256 of each, where it is known.
    """
    for index, image in enumerate(images):
        digest = found[index] if found is not None else hashlib.sha256(image.data).hexdigest()
        if digest != image.sha256:
            return SampleProblem(f"image {index} has sha256 {digest}", f"{image.sha256}, as recorded")
    return None


def find_decoding_problem(images: Sequence[ImageFile]) -> SampleProblem | None:
    """The first image that cannot be decoded whole, or has another size than recorded."""
    measured = measure_images(images)
    return measured if isinstance(measured, SampleProblem) else None


Measured = tuple[tuple[int, int], tuple[int, int]] | SampleProblem
"""Width and height of an image as stored and as decoded (after an EXIF rotation), in pixels; or why it has none."""


def measure_image(data: bytes) -> Measured:
    """Decode an image file whole."""
    try:
        return measure_file(data)
    except RecordError as error:
        return SampleProblem(error.found, error.needed.removesuffix(" is needed"))


def measure_images(
    images: Sequence[ImageFile], *, found: Sequence[Measured] | None = None
) -> tuple[tuple[int, int], ...] | SampleProblem:
    """Decode every image.

    Args:
        images: Of the record.
        found: What ``measure_image`` says of each, where it is known.

    Returns:
        Width and height of each as decoded, in pixels (after an EXIF rotation); or the first thing wrong with one.
    """
    sizes = []
    for index, image in enumerate(images):
        measured = measure_image(image.data) if found is None else found[index]
        if isinstance(measured, SampleProblem):
            return SampleProblem(f"image {index} cannot be decoded: {measured.found}", measured.needed)
        (width, height), decoded = measured
        if (width, height) != (image.width, image.height):
            return SampleProblem(
                f"image {index} is {width}x{height} pixels", f"{image.width}x{image.height} pixels, as recorded"
            )
        sizes.append(decoded)
    return tuple(sizes)


def as_speaker(name: str) -> Speaker:
    """Take a speaker's name as read from a file; ``find_role_problem`` tells whether it is one."""
    return cast("Speaker", name)
