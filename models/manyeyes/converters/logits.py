"""Logits of every position, for checking one implementation against another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from manyeyes.errors import RecordError, ShapeError
from manyeyes.model import ManyEyesForConditionalGeneration, load_checkpoint
from manyeyes.processor import PIXELS, ManyEyesProcessor, from_questions
from manyeyes.runtime.chat import IMAGE_PLACEHOLDER, ChatTemplate, Encoded, encode_conversation, get_chat_template
from manyeyes.storage import new_file

IMAGE_ID = -200
"""In ids that were made elsewhere: an image goes here. LLaVA's own convention."""


@dataclass(frozen=True)
class PromptLogits:
    """What a model makes of one prompt.

    Attributes:
        token_ids: ``[T]``; the image token's id at every visual token.
        image_spans: Start and length in tokens of each image.
        logits: ``[T, V]``, float32: at each position the scores of the next token.
    """

    token_ids: list[int]
    image_spans: list[tuple[int, int]]
    logits: NDArray[np.float32]


def prompt_logits(
    checkpoint: Path,
    *,
    prompt: str | None = None,
    images: Sequence[bytes] = (),
    ids: Path | None = None,
    pixels: Path | None = None,
) -> PromptLogits:
    """Run a checkpoint of ours over one prompt, in fp32.

    Args:
        checkpoint: Its folder.
        prompt: A question, around which the checkpoint's template is put; or the whole text with ``<image>`` in it,
            known by its end: that of the template where an answer begins (`` ASSISTANT:``).
        images: Image files.
        ids: Instead of ``prompt``: a JSON file with a list of token ids, -200 where an image goes; or an object with
            ``input_ids`` and ``image_sizes``, width and height of each image.
        pixels: Instead of ``images``: a safetensors file with ``[I, 3, size, size]`` for each encoder by its name, with
            or without ``pixel_values.`` in front; one tensor alone may have any name.

    Raises:
        CheckpointError: Missing, incomplete or changed.
        RecordError: Images and placeholders differ in number, or ids that cannot be used.
        ShapeError: Pixels for other encoders, or of other sizes.
    """
    model, processor = load_checkpoint(checkpoint, dtype=torch.float32)
    cut = [processor.cut_image(image) for image in images]
    sizes = [image.size for image in cut]
    if ids is not None:
        encoded, told = _read_ids(ids, processor, sizes)
        sizes = sizes or told
    elif prompt is not None:
        count = len(images) or (prompt.count(IMAGE_PLACEHOLDER) or 1 if pixels is not None else 0)
        encoded = _encode_prompt(prompt, processor, num_images=count, sizes=sizes)
    else:
        raise RecordError("neither a prompt nor ids", "one of them is needed", "Pass --prompt or --ids.")
    inputs: dict[str, Any] = {}
    if encoded.image_spans:
        values = {PIXELS + name: value for name, value in processor.normalize_images(cut).items()} if cut else {}
        inputs |= values or _read_pixels(pixels, model, processor)
        inputs |= processor.size_inputs(sizes) if sizes else {}
        spans = [(0, start, length, image) for image, (start, length) in enumerate(encoded.image_spans)]
        inputs["image_spans"] = torch.tensor(spans, dtype=torch.long)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([encoded.input_ids], dtype=torch.long), **inputs)
    return PromptLogits(
        token_ids=list(encoded.input_ids),
        image_spans=list(encoded.image_spans),
        logits=output.logits[0].float().numpy(),
    )


def save_logits(logits: NDArray[np.float32], path: Path) -> None:
    """Write ``[T, V]`` as numpy does, all or nothing.

    Raises:
        StorageError: It cannot be written.
    """
    with new_file(path) as file, file.open("wb") as stream:
        np.save(stream, logits)


def is_whole(prompt: str, template: ChatTemplate) -> bool:
    """Whether a text already has the template around it: it ends where an answer begins."""
    asked = get_chat_template(template.asked_as) if template.asked_as else template
    end = asked.human_suffix + asked.gpt_prefix
    return bool(end.strip()) and prompt.rstrip().endswith(end.rstrip())


def _encode_prompt(
    prompt: str, processor: ManyEyesProcessor, *, num_images: int, sizes: Sequence[tuple[int, int]]
) -> Encoded:
    template = processor.conversation_template
    if is_whole(prompt, template):
        # Nothing around it but the beginning of sequence, where the text leaves it to the tokenizer.
        start = "" if prompt.startswith(template.start) else template.start
        bare = ChatTemplate(name="bare", start=start, adds_bos=template.adds_bos)
        return encode_conversation(
            processor.rust_tokenizer,
            bare,
            [("human", prompt)],
            image_tokens=processor.count_tokens(num_images, sizes or None),
            image_token_id=processor.image_token_id,
            generation_prompt=True,
        )
    turns, _ = from_questions([prompt], [[b""] * num_images])
    return processor.encode(turns[0], num_images=num_images, image_sizes=sizes or None)


def _read_ids(
    path: Path, processor: ManyEyesProcessor, sizes: Sequence[tuple[int, int]]
) -> tuple[Encoded, list[tuple[int, int]]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({error})", "a JSON file of token ids", "Check it.") from error
    told: list[tuple[int, int]] = []
    if isinstance(values, dict):
        told = [(int(width), int(height)) for width, height in values.get("image_sizes", [])]
        values = values.get("input_ids")
    if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not isinstance(values, list) or not values or not all(isinstance(token, int) for token in values):
        raise RecordError(f"{path} holds no list of ids", "one row of token ids", "Write a JSON list of numbers.")
    lengths = iter(processor.count_tokens(values.count(IMAGE_ID), list(sizes) or told or None))
    encoded = Encoded()
    for token in values:
        if token == IMAGE_ID:
            length = next(lengths)
            encoded.image_spans.append((len(encoded.input_ids), length))
            encoded.input_ids.extend([processor.image_token_id] * length)
        else:
            encoded.input_ids.append(token)
    return encoded, told


def _read_pixels(
    path: Path | None, model: ManyEyesForConditionalGeneration, processor: ManyEyesProcessor
) -> dict[str, Tensor]:
    wanted = {name: transform.size for name, transform in processor.image_transforms.items()}
    if path is None:
        raise RecordError("a prompt with images, and no image", "an image or pixels", "Pass --image or --pixels.")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{path} cannot be read ({error})", "a safetensors file of pixels", "Check it.") from error
    given: Mapping[str, Tensor] = {key.removeprefix(PIXELS): tensor for key, tensor in stored.items()}
    if len(given) == 1 and len(wanted) == 1:
        given = dict(zip(wanted, given.values(), strict=True))
    if set(given) != set(wanted):
        raise ShapeError(f"{path} has {sorted(given)}", f"pixels for {sorted(wanted)}", "Name them so.")
    for name, tensor in given.items():
        if tensor.ndim != 4 or tuple(tensor.shape[1:]) != (3, wanted[name], wanted[name]):
            raise ShapeError(
                f'pixels "{name}" are {list(tensor.shape)}',
                f"[images or tiles, 3, {wanted[name]}, {wanted[name]}]",
                "Make them for this checkpoint.",
            )
    return {PIXELS + name: tensor.to(model.dtype) for name, tensor in given.items()}
