"""Does the bundle answer as torch does?

Torch answers each question on its own with ``generate``: no padding, no shared prefix, nothing of the runtime's
decoding. The bundle answers as it will in use: images once, prefixes shared, in batches. Equal tokens therefore vouch
for the graphs and for the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from manyeyes.errors import BundleError, EvaluationError
from manyeyes.runtime.bundle import GeneratedAnswer, Group, load_bundle
from manyeyes.runtime.bundle_contents import (
    DEFAULT_VARIANT,
    BundleVariant,
    describe_precision,
    read_manifest,
    read_variants,
)
from manyeyes.strict import StrictModel

if TYPE_CHECKING:  # the gate reads reports and needs no torch
    from manyeyes.model import ManyEyesForConditionalGeneration, ManyEyesProcessor

_MAX_MISMATCHES = 20


class Mismatch(StrictModel):
    """A question that torch and the bundle answer differently."""

    group: int = Field(ge=0, description="Which group of questions, from 0.")
    question: str = Field(description="The question.")
    torch_text: str = Field(description="Torch's answer.")
    bundle_text: str = Field(description="The bundle's answer.")
    torch_ids: list[int] = Field(description="Torch's tokens, without the stop token.")
    bundle_ids: list[int] = Field(description="The bundle's tokens, without the stop token.")


class ParityFigures(StrictModel):
    """How closely one variant of a bundle follows torch."""

    precision: str = Field(default="fp32", description="fp32, or that of each graph: vision int8, decoder int4.")
    items: int = Field(ge=0, description="Questions compared.")
    token_match: float = Field(ge=0, le=1, description="Share of questions whose whole token sequence is equal.")
    max_abs_logit: float = Field(ge=0, description="Largest absolute difference of a first-token logit.")
    mean_abs_logit: float = Field(ge=0, description="Mean absolute difference of first-token logits.")
    max_new_tokens: int = Field(ge=1, description="Most tokens an answer may have.")
    providers: list[str] = Field(description="Execution providers that ran the bundle, best first.")
    mismatches: list[Mismatch] = Field(description=f"The first {_MAX_MISMATCHES} questions answered differently.")


class ParityReport(ParityFigures):
    """``parity.json``: how closely a bundle follows torch; at the top its default variant."""

    variants: dict[str, ParityFigures] = Field(default={}, description="The same of the other variants, by name.")


@dataclass(frozen=True)
class _Reference:
    token_ids: tuple[int, ...]
    text: str
    first_logits: NDArray[np.float32]


def measure_parity(
    checkpoint: Path, bundle: Path, groups: Sequence[Group], *, items: int, max_new_tokens: int
) -> ParityReport:
    """Let torch and every variant of the bundle answer the same questions.

    Args:
        checkpoint: What the bundle was exported from.
        bundle: The bundle's folder.
        groups: Questions about images; the first ``items`` questions count.
        items: Questions to compare; all where there are fewer.
        max_new_tokens: Most tokens an answer may have.

    Raises:
        EvaluationError: There is no question.
        CheckpointError: The checkpoint is missing or incomplete.
        BundleError: The bundle is incomplete or was changed.
        RecordError: An image cannot be decoded, or a question is too long.
    """
    from manyeyes.model import load_checkpoint

    chosen = list(_first_questions(groups, items))
    if not chosen:
        raise EvaluationError("no question to compare", "at least one is needed", "Pass groups that have questions.")
    manifest = read_manifest(bundle)
    model, processor = load_checkpoint(checkpoint)
    model = model.eval().float()
    references = [
        [_answer_with_torch(model, processor, group.images, question, max_new_tokens) for question in group.questions]
        for group in chosen
    ]
    figures = {
        name: _compare(bundle, name, variant, chosen, references, max_new_tokens)
        for name, variant in read_variants(manifest).items()
    }
    return ParityReport(**dict(figures.pop(DEFAULT_VARIANT)), variants=figures)


def _compare(
    bundle: Path,
    name: str,
    variant: BundleVariant,
    groups: Sequence[Group],
    references: Sequence[Sequence[_Reference]],
    max_new_tokens: int,
) -> ParityFigures:
    runner = load_bundle(bundle, variant=name)
    found = runner.answer_groups(groups, max_new_tokens=max_new_tokens, first_logits=True)
    count, matches, largest, total = 0, 0, 0.0, 0.0
    mismatches: list[Mismatch] = []
    for index, (group, of_group, answers) in enumerate(zip(groups, references, found, strict=True)):
        for question, reference, answer in zip(group.questions, of_group, answers, strict=True):
            difference = _compare_logits(reference, answer)
            count += 1
            largest = max(largest, float(difference.max()))
            total += float(difference.mean())
            if reference.token_ids == answer.token_ids:
                matches += 1
            elif len(mismatches) < _MAX_MISMATCHES:
                mismatches.append(
                    Mismatch(
                        group=index,
                        question=question,
                        torch_text=reference.text,
                        bundle_text=answer.text,
                        torch_ids=list(reference.token_ids),
                        bundle_ids=list(answer.token_ids),
                    )
                )
    return ParityFigures(
        precision=describe_precision(variant),
        items=count,
        token_match=matches / count,
        max_abs_logit=largest,
        mean_abs_logit=total / count,
        max_new_tokens=max_new_tokens,
        providers=list(runner.providers),
        mismatches=mismatches,
    )


def _first_questions(groups: Sequence[Group], items: int) -> Iterator[Group]:
    left = items
    for group in groups:
        if left <= 0:
            return
        if not group.questions:
            continue
        questions = group.questions[:left]
        left -= len(questions)
        yield Group(images=group.images, questions=questions)


def _answer_with_torch(
    model: ManyEyesForConditionalGeneration,
    processor: ManyEyesProcessor,
    images: Sequence[bytes],
    question: str,
    max_new_tokens: int,
) -> _Reference:
    batch = processor(images=list(images), text=question)
    stop_ids = processor.stop_token_ids
    output = model.generate(
        **batch,
        max_new_tokens=min(max_new_tokens, processor.max_length - batch["input_ids"].shape[1]),
        do_sample=False,
        num_beams=1,
        eos_token_id=stop_ids,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = [int(token) for token in output.sequences[0, -len(output.logits) :]]
    written = tokens[:-1] if tokens[-1] in stop_ids else tokens
    return _Reference(tuple(written), processor.decode_answer(written), output.logits[0][0].float().numpy())


def _compare_logits(reference: _Reference, answer: GeneratedAnswer) -> NDArray[np.float32]:
    assert answer.first_logits is not None
    if reference.first_logits.shape != answer.first_logits.shape:
        raise BundleError(
            f"bundle gives {answer.first_logits.shape[0]} logits",
            f"the checkpoint gives {reference.first_logits.shape[0]}",
            "Compare a bundle with the checkpoint that it was exported from.",
        )
    difference: NDArray[np.float32] = np.abs(reference.first_logits - answer.first_logits)
    # A bundle that computes NaN must not pass for one without a difference.
    return np.where(np.isnan(difference), np.float32(np.finfo(np.float32).max), difference)
