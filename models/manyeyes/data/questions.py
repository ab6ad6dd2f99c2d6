"""Questions that a mixture may put in place of a record's own."""

from __future__ import annotations

from dataclasses import replace

from manyeyes.data.records import PLACEHOLDER, Record, Turn
from manyeyes.errors import RecordError

# LLaVA, arXiv:2304.08485, the instructions for brief image description: one was drawn for each caption of the first
# stage. (Later versions train that stage with template `plain`, which drops the question.)
BRIEF_DESCRIPTION = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)


def ask_briefly(record: Record, *, draw: int) -> Record:
    """The record with a question for a brief description in place of its own, its images in front.

    Args:
        record: One question and its answer, the caption.
        draw: Any number; chooses the question.

    Raises:
        RecordError: More than one question.
    """
    if len(record.turns) != 2:
        raise RecordError(
            f'record "{record.id}" has {len(record.turns)} turns',
            "one question and one answer are needed where a mixture says questions: brief",
            "Say questions: record for its data set.",
        )
    question = BRIEF_DESCRIPTION[draw % len(BRIEF_DESCRIPTION)]
    text = f"{PLACEHOLDER}\n" * len(record.images) + question
    return replace(record, turns=(Turn("human", text), record.turns[1]))
